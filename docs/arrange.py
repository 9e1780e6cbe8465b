"""Lay out what sphinx-build and nbconvert read: `python docs/arrange.py PROFILE RESULTS`.

Writes RESULTS/PROFILE/work/docs: these pages, the executed notebooks, and scripts from packages.
"""

import html
import re
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from string import Template

import nbformat

from prunestudy.errors import InputError
from prunestudy.papers import card
from prunestudy.study.lines import write_text
from prunestudy.study.notebooks import executed, is_current
from prunestudy.study.plan import plan
from prunestudy.study.records import Store, repository


def read(path: Path, profile: str) -> nbformat.NotebookNode:
    """Return the executed notebook at `path`; raises `InputError` unless it is there and whole."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (OSError, ValueError, LookupError, AttributeError, nbformat.ValidationError):
        way_out = f"is not a whole notebook; `make study PROFILE={profile}` executes it anew"
        raise InputError(f"notebook = {path}: {way_out}") from None
    return notebook


def arrange(notebook: nbformat.NotebookNode) -> None:
    """Give figures their alternative text, and cells without one their place on the slides."""
    for cell in notebook.cells:
        if cell.cell_type == "code":  # an empty text is the badge of an address not filled in
            cell.outputs = [o for o in cell.outputs if o.get("data", {}).get("text/markdown") != ""]
        tags = cell.metadata.setdefault("tags", [])
        if cell.cell_type == "markdown":
            heading = re.search("^##? ", cell.source, re.MULTILINE)
            place = "slide" if heading else "-" if "solution" in tags else "subslide"
        else:
            place = "-" if cell.outputs or "exercise" in tags else "skip"
        cell.metadata.setdefault("slideshow", {"slide_type": place})
        shown = [output for output in cell.get("outputs", []) if "data" in output]
        if any(output.data.keys() - {"text/plain"} for output in shown):
            tags.append("drawn")  # on slides without its code
        for output in shown:
            if "image/png" in output.data:
                source = f"data:image/png;base64,{output.data['image/png']}"
                about = output.metadata.get("image/png", {}) | {"class": "figure", "src": source}
                pairs = (f'{name}="{html.escape(str(value))}"' for name, value in about.items())
                output.data = {"text/html": f"<img {' '.join(pairs)}>"}


def main(profile: str, results: str) -> None:
    """Write everything; nothing is written before all notebooks were read."""
    papers = sorted({item.paper for item in plan(profile)}, key=lambda paper: card(paper).notebook)
    store = Store(profile, results)
    paths = {paper: executed(store, paper) for paper in papers}
    notebooks = {path: read(path, profile) for path in paths.values()}
    old = [path for paper, path in paths.items() if not is_current(store, profile, paper)]
    work = store.folder / "work" / "docs"
    shutil.copytree(Path(__file__).parent, work, dirs_exist_ok=True)
    links = ", ".join(f"[{path.stem[:2]}](notebooks/{path.name})" for path in old)
    older = f"Executed before their text or their records changed: {links}." if old else ""
    index = Template((work / "index.md").read_text(encoding="utf-8"))
    write_text(work / "index.md", index.substitute(profile=profile, older=older))
    (work / "notebooks").mkdir(exist_ok=True)
    for path, notebook in notebooks.items():
        arrange(notebook)
        nbformat.write(notebook, work / "notebooks" / path.name)
    shutil.copy(repository() / "notebooks/README.md", work / "notebooks")
    shutil.copy(repository() / "results/cpu/figures/overview_five_ways.png", work)
    shutil.copy(files("sphinx-mathjax-offline") / "static/mathjax/tex-svg.js", work / "assets")
    reveal = files("sphinx_revealjs") / "_static/revealjs"
    for name in ("dist", "plugin/notes"):
        shutil.copytree(reveal / name, work / "assets/reveal" / name, dirs_exist_ok=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
