"""Sphinx's settings for the report; see `prunestudy.study.report`."""

from typing import Any

from docutils import nodes

project = "prunestudy"
extensions = ["myst_nb"]
exclude_patterns = ["files"]

nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # they would come from elsewhere
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
# Notebooks begin parts of a page at the level that reads best.
suppress_warnings = ["myst.header", "misc.highlighting_failure"]

html_theme = "furo"
html_static_path = ["static", "../vendor"]
html_css_files = ["katex/katex.min.css", "site.css"]
html_js_files = [
    "katex/katex.min.js",
    "katex/contrib/auto-render.min.js",
    "tablesort/tablesort.min.js",
    "tablesort/tablesort.number.min.js",
    "site.js",
]
html_math_renderer = "katex"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_show_search_summary = False  # it would fetch pages, which file: does not allow
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(f"{writer.starttag(node, 'span', '', CLASS='math')}\\(")
    writer.body.append(f"{writer.encode(node.astext())}\\)</span>")
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f"{writer.starttag(node, 'div', CLASS='math')}\\[")
    writer.body.append(f"{writer.encode(node.astext())}\\]</div>\n")
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Formulas go to the page as TeX between marks; KaTeX's auto-render draws them there."""
    app.add_html_math_renderer("katex", (_inline, None), (_block, None))
