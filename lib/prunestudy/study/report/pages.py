"""The pages of the report as Markdown, and the files that lie beside them."""

import itertools
import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import pandas as pd

from prunestudy import methods
from prunestudy.papers import MARKS, Card, Published, cards
from prunestudy.study import overview, tables
from prunestudy.study.notebooks import is_current
from prunestudy.study.plan import Tiny
from prunestudy.study.records import Store, repository, write_text
from prunestudy.study.report import HERE, outputs

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")
_VERDICTS = ("confirmed", "contradicted", "undecided", "not testable here")
_BELOW_ALL = "-999999999"  # where an empty cell goes among numbers


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, where it leads, and the name by which others lead to it."""

    text: str
    link: str = ""
    anchor: str = ""

    @property
    def key(self) -> str:
        """What a column of numbers is sorted by."""
        number = _NUMBER.match(self.text)
        return f"{float(number[0]):.10f}" if number else _BELOW_ALL


@dataclass(frozen=True)
class Table:
    """A table for people: a column of numbers is sorted as such."""

    columns: list[str]
    rows: list[list[Cell]]

    @classmethod
    def of(cls, frame: pd.DataFrame, **links: list[str]) -> "Table":
        """Return `frame` as a table; the cells of a column named in `links` lead there."""
        columns = [_cells(frame[name], links.get(name)) for name in frame]
        rows = [list(row) for row in zip(*columns, strict=True)]
        return cls([str(name) for name in frame], rows)

    def numeric(self, column: int) -> bool:
        """Whether all cells of a column that are not empty begin with a number."""
        texts = [row[column].text for row in self.rows if row[column].text]
        return bool(texts) and all(_NUMBER.match(text) for text in texts)


def _cells(column: pd.Series, links: list[str] | None) -> list[Cell]:
    return [
        Cell(_text(value), link)
        for value, link in zip(column, links or [""] * len(column), strict=True)
    ]


def _text(value: Any) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() else f"{value:.4g}"
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Paper:
    """What the pages say of one paper in one profile; `notebook` is "" where none was executed."""

    card: Card
    notebook: str
    own: Table
    settings: Table
    verdicts: pd.DataFrame
    runs: Table

    @property
    def name(self) -> str:
        """Its short name."""
        return self.card.short or self.card.title

    @property
    def published(self) -> Table:
        """Published numbers, each with its mark and where it was read."""
        return Table.of(pd.DataFrame([_quoted(number) for number in self.card.published]))

    @property
    def ranks(self) -> Table:
        """Published ranks, layer by layer."""
        rows = [
            {
                "what": each.text,
                "top-1, %": _percent(each.top1),
                "ranks": ", ".join(
                    f"{name} {rank}/{full}"
                    for name, rank, full in zip(each.layers, each.ranks, each.full, strict=True)
                ),
                "mark": each.mark,
                "source": each.source,
            }
            for each in self.card.ranks
        ]
        return Table.of(pd.DataFrame(rows))

    @property
    def unknown(self) -> Table:
        """What the paper leaves open, and our readings."""
        rows = [{"what": each.text, "our reading": each.reading} for each in self.card.unknown]
        return Table.of(pd.DataFrame(rows))

    def judged(self, claim: str) -> Table:
        """The comparisons that judge a claim, with the records of their first seed.

        Empty for a claim that is not testable.
        """
        rows = self.verdicts[self.verdicts["claim"] == claim].dropna(subset="rule")
        numbers = zip(rows["difference"], rows["low"], rows["high"], strict=True)
        shown = rows[["rule", "where"]].assign(
            difference=[tables.bracket(*each, digits=4) for each in numbers],
            n=rows["n"].astype(int),
            verdict=rows["verdict"],
        )
        links = {}
        for name, runs in zip(("run", "against"), _compared(rows), strict=True):
            shown[name] = [run and run.rpartition("-")[2] for run in runs]
            links[name] = [run and f"../records/{run}.txt" for run in runs]
        return Table.of(shown, **links)

    def counts(self) -> str:
        """How many comparisons with runs in this profile got which verdict, for people."""
        found = list(self.verdicts["verdict"])
        counted = [(found.count(verdict), verdict) for verdict in _VERDICTS]
        return ", ".join(f"{count} {verdict}" for count, verdict in counted if count)


def _quoted(number: Published) -> dict[str, Any]:
    percent = number.metric != "psnr"
    return {
        "what": number.text,
        "metric": f"{number.metric}, {'%' if percent else 'dB'}",
        "value": _percent(number.value) if percent else number.value,
        "dense": _percent(number.dense) if percent else number.dense,
        "weights kept, %": _percent(number.kept),
        "non-zeros": number.nonzeros,
        "speed-up": number.speed_up,
        "mark": number.mark,
        "source": number.source,
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _compared(verdicts: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The runs of the first seed that each comparison is of; "" where there is none."""
    sides = [record.partition(" - ") for record in verdicts["record"]]
    return [ours for ours, _, _ in sides], [theirs for _, _, theirs in sides]


def read_tables(store: Store) -> list[pd.DataFrame]:
    """The tables of runs and of settings; raises `InputError` if one is not there."""
    return [tables.read_table(store.folder / f"tables/{name}.csv") for name in ("runs", "summary")]


def write(
    source: Path, store: Store, profile: str, notebooks: list[Path], made: list[pd.DataFrame]
) -> None:
    """Write all pages and files of the report below `source`; `made` are the profile's tables."""
    stems = [path.stem for path in notebooks]
    claims = overview.claims(profile, store, Tiny())
    papers = [_paper(each, stems, claims, *made) for each in cards()]
    titles = {each.card.notebook: f"{each.card.notebook[:2]} {each.name}" for each in papers}
    known = {"profile": profile, "papers": papers, "marks": MARKS, "stems": stems}
    known["titles"] = {stem: titles.get(stem, stem) for stem in stems}
    old = [p.notebook for p in papers if p.notebook and not is_current(store, profile, p.card.id)]
    _page(source / "index.md", "index", front=_front(source / "files/figures"), old=old, **known)
    _page(source / "tables.md", "tables", **known)
    for paper in papers:
        for name, wanted in (("papers", paper.card.is_paper), ("runs", paper.runs.rows)):
            if wanted:
                _page(source / name / f"{paper.card.id}.md", name, paper=paper, **known)
    there = [path.name for path in notebooks]
    for path in notebooks:
        _notebook(source, path, there)
    text = (repository() / "notebooks/README.md").read_text(encoding="utf-8")
    write_text(source / "notebooks/README.md", outputs.without_dead_links(text, there))
    named = itertools.chain(made[0]["run"], *_compared(claims))
    for run in sorted({run for run in named if run}):
        write_text(source / f"files/records/{run}.txt", store.shown(run))


def _page(path: Path, template: str, **values: Any) -> None:
    loader = jinja2.FileSystemLoader(HERE / "site/pages")
    room = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    root = "../" * (path.parent.name in ("papers", "runs"))
    write_text(path, room.get_template(f"{template}.md.j2").render(root=root, **values))


def _paper(
    card: Card, stems: list[str], claims: pd.DataFrame, runs: pd.DataFrame, summary: pd.DataFrame
) -> Paper:
    runs, summary = (table[table["paper"] == card.id] for table in (runs, summary))
    name = card.short or card.title
    names = {key: f"setting-{count}" for count, key in enumerate(_settings(summary))}
    own = (summary["variant"] == "") & (summary["method"] == summary["paper"])
    return Paper(
        card,
        card.notebook if card.notebook in stems else "",
        *(_summary(table, names) for table in (summary[own], summary)),
        claims[claims["paper"] == name],
        _runs(runs, names),
    )


def _settings(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    """What tells the settings of a paper apart, row by row."""
    return list(table[tables.KEYS].fillna(-1).itertuples(index=False, name=None))


def _summary(summary: pd.DataFrame, names: dict[tuple[Any, ...], str]) -> Table:
    """The summary for people; n leads to the runs behind the row."""
    links = [f"runs/{key[0]}.html#{names[key]}" for key in _settings(summary)]
    return Table.of(tables.readable(summary), n=links)


def _runs(runs: pd.DataFrame, names: dict[tuple[Any, ...], str]) -> Table:
    """The runs, setting by setting; each leads to its record, the first of a setting is named."""
    order = {name: count for count, name in enumerate(names.values())}
    runs = runs.assign(setting=[names.get(key, "") for key in _settings(runs)])
    runs = runs.assign(place=runs["setting"].map(order)).sort_values(["place", "seed"])
    factor = [tables.UNITS.get(name, (1, ""))[0] for name in runs["metric_name"]]
    shown = pd.DataFrame(
        {
            "run": runs["run"],
            "method": [methods.method_class(name).title for name in runs["method"]],
            "variant": runs["variant"],
            "net": runs["model"],
            "data": [tables.datasets_title(name) for name in runs["dataset"]],
            "removed": [
                "" if pd.isna(target) else tables.removed(target, kind)
                for target, kind in zip(runs["target"], runs["target_kind"], strict=True)
            ],
            "seed": runs["seed"],
            "epochs": runs["epochs"],
            "result": runs["metric"] * factor,
            "minus dense": (runs["metric"] - runs["dense_metric"]) * factor,
            "parameters": runs["parameters"],
            "non-zeros": runs["nonzeros"],
            "MACs": runs["macs"],
            "bytes": runs["bytes"],
            "ms, batch 1": runs["latency_b1_ms"],
            "training, s": runs["train_seconds"],
            "status": runs["status"],
        }
    )
    table = Table.of(shown, run=[f"../records/{run}.txt" for run in runs["run"]])
    first = ~runs["setting"].duplicated()
    for row, name, is_first in zip(table.rows, runs["setting"], first, strict=True):
        row[0] = replace(row[0], anchor=name if is_first else "")
    return table


def _front(figures: Path) -> dict[str, str]:
    """README's first paragraph and its first figure, which is copied into `figures`."""
    readme = repository() / "README.md"
    text = readme.read_text(encoding="utf-8")
    alt, path = re.search(r"!\[([^\]]+)\]\(([^)]+)\)", text).groups()
    figures.mkdir(parents=True)
    picture = readme.parent / path
    shutil.copy(picture, figures / picture.name)
    after = text.partition(f"({path})")[2].strip()
    return {"alt": alt, "figure": picture.name, "says": after.partition("\n\n")[0]}


def _notebook(source: Path, path: Path, there: list[str]) -> None:
    notebook = outputs.read(path)
    outputs.with_figure_files(notebook, source / "files/figures", path.stem, "../figures", there)
    write_text(source / "notebooks" / path.name, nbformat.writes(notebook))
