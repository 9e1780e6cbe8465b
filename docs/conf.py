"""Sphinx's settings for the site; `arrange.py` lays out the pages that it is made of."""

project = "prunestudy"
html_title = "prunestudy"
extensions = ["myst_nb"]

nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # they would come from elsewhere
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
# Notebooks begin parts of a page at the level that reads best.
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_static_path = ["site.css", "verdicts.js", "assets/tex-svg.js"]
html_css_files = ["site.css"]
html_js_files = ["verdicts.js"]
mathjax_path = "tex-svg.js"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_search_summary = False  # it would fetch pages, which file: does not allow
pygments_style = "friendly"
pygments_dark_style = "github-dark"
