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
import pandas as pd
from readme import came_out, judged, net

from prunestudy.errors import InputError
from prunestudy.methods import method_class
from prunestudy.papers import Card, card
from prunestudy.study import tables
from prunestudy.study.lines import write_text
from prunestudy.study.notebooks import executed, is_current
from prunestudy.study.plan import plan
from prunestudy.study.records import Store, repository

_FILTERS = ("paper", "net", "outcome")


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


def called(label: str) -> str:
    """A label of a card for people: "uniform, fine-tuned"."""
    name, _, rest = label.partition(", ")
    return ", ".join(filter(None, (method_class(name).title if name else "", rest)))


def verdicts_page(found: dict[str, pd.DataFrame]) -> str:
    """Every row of every paper's table of verdicts, with a filter for each of `_FILTERS`."""
    heads = ("paper", "claim", "compared", "net", "n", "mean [95% interval]", "what came out")
    lines = []
    for paper, rows in found.items():
        for row in rows.itertuples():
            where = net(row.model, row.dataset) if row.model else ""
            metric = "" if row.metric in ("", "metric") else f" ({row.metric.replace('_', ' ')})"
            pair = " against ".join(filter(None, (called(row.method), called(row.control))))
            told = ": ".join(filter(None, (row.verdict or "described", row.why)))
            outcome = (row.verdict or "described").partition(":")[0]
            short = card(paper).short or card(paper).title
            data = zip(_FILTERS, (short, where, outcome), strict=True)
            shown = (short, row.says, pair + metric, where, row.n or "")
            shown = (*shown, tables.bracket(row.mean, row.low, row.high, 4), told)
            keys = " ".join(f'data-{key}="{html.escape(value)}"' for key, value in data)
            cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in shown)
            lines.append(f"<tr {keys}>{cells}</tr>")
    filters = "".join(
        f'<label>{key} <select data-filter="{key}"><option value="">all</option></select></label>'
        for key in _FILTERS
    )
    head = "".join(f"<th>{each}</th>" for each in heads)
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return (
        f'<div class="filters">{filters}<output class="shown"></output></div>\n'
        f'<div class="verdicts-box"><table class="verdicts">{table}</table></div>'
    )


def paper_page(paper: Card, rows: pd.DataFrame) -> str:
    """A paper: citation, notebook, what it claims and what came out, published numbers, gaps."""
    claims = [
        {
            "claim": f"{claim.text} [{claim.mark}]",
            "where": claim.place,
            "what came out": came_out(rows[rows.claim == claim.id]),
        }
        for claim in paper.claims
    ]
    open_ = [{"open in the paper": gap.text, "read here as": gap.reading} for gap in paper.unknown]
    parts = [
        f"# {paper.short or paper.title}",
        f"{paper.authors}: *{paper.title}*, {paper.venue} "
        f"([arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})).",
        f"**[The notebook, executed](../notebooks/{paper.notebook}.ipynb)** explains the paper, "
        f"runs its experiments and ends in exercises. The method is one file, "
        f"`lib/prunestudy/methods/{paper.id}.py`, and so is the card, "
        f"`lib/prunestudy/papers/{paper.id}.toml`.",
    ]
    sections = {
        "What it claims, and what came out": pd.DataFrame(claims),
        "Published numbers": tables.published_table(paper),
        "What the paper leaves open": pd.DataFrame(open_),
    }
    for title, table in sections.items():
        if len(table):
            parts += [f"## {title}", tables.markdown(table)]
    return "\n\n".join(parts) + "\n"


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
    found = judged(store, profile)
    page = Template((work / "verdicts.md").read_text(encoding="utf-8"))
    text = page.substitute(profile=profile, table=verdicts_page(found))
    write_text(work / "verdicts.md", text)
    for name in ("notebooks", "papers"):
        (work / name).mkdir(exist_ok=True)
    for name, table in found.items():
        write_text(work / "papers" / f"{name}.md", paper_page(card(name), table))
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
