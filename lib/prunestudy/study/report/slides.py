"""Slides of an executed notebook: reveal.js by nbconvert, without a network.

A cell's own `slideshow` metadata is respected; where it has none, its place follows from what it
is: a heading opens a slide, what does not fit goes to the slide below, long code and code of
tables and figures give their output alone, code without output stays away, each exercise has a
slide of its own and its solution comes after it.
"""

import math
import re
import shutil
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from prunestudy.errors import InputError, require
from prunestudy.papers import cards
from prunestudy.study.records import Store, write_text
from prunestudy.study.report import HERE, executed_notebooks, need, outputs

_LINES = 17  # that fit on a slide
_LONGEST_CODE = 12
_FIGURE_LINES = 13  # at most, and as many as a figure of full width that is as high
_FULL_WIDTH_LINES = 30
_CHARACTERS = 85  # in a line of text
_OUTPUT_ONLY = "output-only"


def build(profile: str, names: list[str], results: str = "", out: str = "") -> list[Path]:
    """Write slides of the notebooks called `names` into `out`; return the pages.

    A name is a paper's, a notebook's or a path; none means all executed notebooks of `profile`.
    `out` is results/<profile>/slides by default. Raises `InputError` for a name that is none.
    """
    need("nbconvert")
    need("sphinx_revealjs")
    store = Store(profile, results or None)
    chosen = [_find(store, profile, name) for name in names]
    chosen = chosen or executed_notebooks(store, profile)
    target = Path(out) if out else store.folder / "slides"
    require(not target.is_file(), "out", str(target), "a folder")
    pages = [(path.stem, outputs.read(path)) for path in chosen]
    _vendor(target)
    return [_page(notebook, target, stem) for stem, notebook in pages]


def _find(store: Store, profile: str, name: str) -> Path:
    if name.endswith(".ipynb"):
        require(Path(name).is_file(), "notebook", name, "a file that is there")
        return Path(name)
    there = {path.stem: path for path in executed_notebooks(store, profile)}
    stem = {card.id: card.notebook for card in cards()}.get(name, name)
    if stem not in there:
        allowed = f"of profile {profile} there are {', '.join(there)}; or a path to an .ipynb"
        raise InputError(f"notebook = {name!r}: {allowed}")
    return there[stem]


def _vendor(target: Path) -> None:
    """Put reveal.js, KaTeX and the style beside the pages."""
    reveal = Path(str(files("sphinx_revealjs"))) / "_static/revealjs"
    for name in ("dist/reset.css", "dist/reveal.css", "dist/reveal.js", "plugin/notes/notes.js"):
        _copy(reveal / name, target / "reveal" / name)
    _copy(reveal / "dist/theme/white.css", target / "reveal/dist/theme/white.css")
    for name in ("dist/theme/fonts/source-sans-pro", "LICENSE"):
        _copy(reveal / name, target / "reveal" / name)
    _copy(HERE / "vendor/katex", target / "katex")
    _copy(HERE / "site/slides/slides.css", target / "slides.css")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def _page(notebook: Any, target: Path, stem: str) -> Path:
    from nbconvert import SlidesExporter
    from traitlets.config import Config

    arranged = arrange(notebook)
    outputs.with_figure_files(arranged, target / "figures", stem, "figures")
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {_OUTPUT_ONLY}
    exporter = SlidesExporter(
        config=config,
        template_name="slides",
        extra_template_basedirs=[str(HERE / "site")],
        reveal_url_prefix="reveal",
        reveal_theme="white",
    )
    arranged.metadata["title"] = _title(arranged)
    html, _ = exporter.from_notebook_node(arranged)
    page = target / f"{stem}.html"
    write_text(page, html)
    return page


def _title(notebook: Any) -> str:
    return next(c.source for c in notebook.cells if c.source.startswith("# ")).split("\n")[0][2:]


def arrange(notebook: Any) -> Any:
    """Give every cell its place: its own `slideshow` metadata, else the rule of this module."""
    notebook.cells = [part for cell in notebook.cells for part in _parts(cell)]
    used = 0.0
    for cell, after in zip_longest(notebook.cells, notebook.cells[1:]):
        kind, lines = _place(cell, used, after), _lines(cell)
        cell.metadata["slideshow"] = {"slide_type": kind} | cell.metadata.get("slideshow", {})
        kind = cell.metadata["slideshow"]["slide_type"]
        if kind in ("slide", "subslide"):
            used = lines
        elif kind not in ("skip", "notes"):
            used += lines
        if _is_output_only(cell):
            cell.metadata["tags"] = [*outputs.tags(cell), _OUTPUT_ONLY]
        if "solution" in outputs.tags(cell):
            cell.source = cell.source.replace("<details>", "<details open>")
    return notebook


def _parts(cell: Any) -> list[Any]:
    """A text cell with several headings is as many cells; so are several tables or figures."""
    if "solution" in outputs.tags(cell):
        return [cell]
    if cell.cell_type == "markdown":
        changes = [{"source": text} for text in re.split(r"\n(?=#{1,2} )", cell.source)]
    elif _is_output_only(cell):
        changes = [{"outputs": group} for group in _with_captions(cell.outputs)]
    else:
        return [cell]
    return [
        NotebookNode(cell, **change, metadata=cell.metadata.copy(), id=f"{cell.get('id', '')}-{i}")
        for i, change in enumerate(changes)
    ]


def _with_captions(shown: list[Any]) -> list[list[Any]]:
    """Each output alone, but a line of text together with what it stands above."""
    groups: list[list[Any]] = []
    for output in shown:
        under_caption = groups and all(map(_is_caption, groups[-1]))
        groups = [*groups[:-1], [*groups[-1], output]] if under_caption else [*groups, [output]]
    return groups


def _is_caption(output: Any) -> bool:
    return "text/markdown" in output.get("data", {}) and _output_lines(output) <= 1


def _place(cell: Any, used: float, after: Any) -> str:
    tags = outputs.tags(cell)
    if cell.cell_type == "code":
        if "exercise" in tags:
            return "-"
        if "injected-parameters" in tags or not any(map(_output_lines, cell.outputs)):
            return "skip"
    elif cell.source.startswith("#"):
        return "slide"
    elif "solution" in tags:
        return "fragment"
    elif re.match(r"\*\*\d+\.\*\*", cell.source):
        return "subslide"
    # Text goes to the next slide with the figure that it is about.
    is_about = cell.cell_type == "markdown" and after is not None and after.cell_type == "code"
    wanted = _lines(cell) + (_lines(after) if is_about else 0)
    return "subslide" if used and used + wanted > _LINES else "-"


def _is_output_only(cell: Any) -> bool:
    """Whether the code behind the output is long, or makes a table or figure."""
    if cell.cell_type != "code" or "exercise" in outputs.tags(cell):
        return False
    drawn = any(set(output.get("data", {})) - {"text/plain"} for output in cell.outputs)
    return drawn or len(cell.source.splitlines()) > _LONGEST_CODE


def _lines(cell: Any) -> float:
    """About how many lines the cell takes on a slide."""
    rows = [math.ceil(len(line) / _CHARACTERS) or 0.5 for line in cell.source.splitlines()]
    if cell.cell_type == "markdown":
        return sum(rows) + 2 * cell.source.count("$$")
    code = 0 if _is_output_only(cell) else 0.8 * len(rows)
    return code + sum(_output_lines(output) for output in cell.outputs)


def _output_lines(output: Any) -> float:
    data = output.get("data", {})
    if any(kind.startswith("image/") for kind in data):
        size = output.metadata.get("image/png", {})
        return min(_FIGURE_LINES, _FULL_WIDTH_LINES * size.get("height", 1) / size.get("width", 1))
    if "text/html" in data:
        return 1.2 * data["text/html"].count("<tr")
    shown = output.get("text") or data.get("text/markdown", data.get("text/plain", ""))
    return len(shown.splitlines())
