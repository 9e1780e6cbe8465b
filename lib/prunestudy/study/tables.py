"""The two tidy tables of a profile, made from records: runs.csv and summary.csv."""

import csv
import html
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prunestudy import datasets, methods, papers
from prunestudy.errors import InputError
from prunestudy.papers import Card, card
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store, write_text
from prunestudy.study.verdicts import Interval, margin_to_dense, removed

RUN_COLUMNS = (
    "run parent paper method variant model dataset seed epochs precision threads target_kind "
    "target sparsity parameters nonzeros macs nonzero_macs dense_parameters dense_macs "
    "metric_name metric dense_metric macro_f1 latency_b1_ms latency_b128_ms "
    "dense_latency_b1_ms dense_latency_b128_ms peak_memory_mb bytes train_seconds status "
    "reading stage after device"
).split()
# What is equal for all seeds of a setting; only runs of one device are averaged and compared.
KEYS = (
    "paper method variant model dataset epochs precision threads target_kind target metric_name "
    "device"
).split()
SUMMARY_COLUMNS = (
    "paper method variant model dataset epochs precision threads target_kind target metric_name "
    "n diverged metric metric_sd dense_metric difference_n difference difference_sd "
    "difference_low difference_high sparsity nonzeros published mark source verdict "
    "reading stage after device"
).split()
_TEXT = set(
    "run parent paper method variant model dataset precision target_kind metric_name status mark "
    "source verdict reading stage after device".split()
)
_ALWAYS = ("seed", "epochs", "threads", "n", "diverged", "difference_n")
# By metric: the factor to its unit for people, and the unit.
UNITS = {"top1": (100, "%"), "miou": (100, "%"), "psnr": (1, " dB")}


def runs_table(store: Store, planned: list[Planned]) -> pd.DataFrame:
    """One row per paper, run and device of the planned runs that are done, without the search."""
    rows = [
        _row(item, record)
        for item in planned
        if item.purpose != "search"
        for record in store.read_all(item.settings)
    ]
    table = pd.DataFrame(rows, columns=RUN_COLUMNS)
    # A run that two experiments share under two labels is one row, under the plainer label.
    one = ["paper", "run", "device"]
    table = table.sort_values([*one, "variant"]).drop_duplicates(one, ignore_index=True)
    # The dense net of same paper, model, data, seed, total epochs and device.
    keys = ["paper", "model", "dataset", "seed", "epochs", "device"]
    dense = table[(table["method"] == "dense") & (table["reading"] == "")]
    dense = dense[dense["stage"].isin(["", "start"]) & (dense["status"] == "done")]
    metric = dense.sort_values("stage").drop_duplicates(keys).set_index(keys)["metric"]
    if metric.empty:
        return table
    return table.assign(dense_metric=metric.reindex(pd.MultiIndex.from_frame(table[keys])).array)


def _row(item: Planned, record: dict[str, Any]) -> dict[str, Any]:
    settings, aim = item.settings, item.settings.aim
    own = "method model dataset seed epochs precision threads".split()
    return {
        **{name: record["metrics"].get(name) for name in RUN_COLUMNS if name in record["metrics"]},
        **{name: getattr(settings, name) for name in own},
        **{name: getattr(item, name) for name in ("paper", "variant", "reading", "stage", "after")},
        **(record["latency"] or {}).get("ms", {}),
        "run": record["run"],  # settings.run would hash them once more
        "parent": record["parent"] or "",
        "target_kind": aim.kind if aim else "",
        "target": aim.value if aim else math.nan,
        "train_seconds": record["cost"]["train_seconds"],
        "status": record["status"],
        "device": record["environment"]["device"],
    }


def summary_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: mean, sd and n over seeds, and the paired difference to dense.

    `diverged` counts the seeds that n lacks; a setting of which none is done has no row.
    """
    keys = [key for key in KEYS if key != "metric_name"]  # a diverged run has no metric's name
    done = runs[runs["status"] == "done"]
    done = done.assign(difference=done["metric"] - done["dense_metric"])
    groups = done.groupby(keys, dropna=False)
    rows = groups[["metric_name", "reading", "stage", "after"]].first()
    rows[["metric", "dense_metric", "sparsity", "nonzeros"]] = groups[
        ["metric", "dense_metric", "sparsity", "nonzeros"]
    ].mean()
    rows["metric_sd"] = groups["metric"].agg(lambda values: values.std())
    rows["n"] = groups.size()
    everything = runs.groupby(keys, dropna=False).size()
    rows["diverged"] = everything.reindex(rows.index) - rows["n"]
    intervals = groups["difference"].agg(
        lambda values: Interval.of([x for x in values if not math.isnan(x)])
    )
    for name in ("n", "mean", "sd", "low", "high"):
        column = "difference" if name == "mean" else f"difference_{name}"
        rows[column] = [getattr(interval, name) for interval in intervals]
    rows = rows.reset_index()
    cards = {paper: card(paper) for paper in set(rows["paper"])}
    said = []
    for row, interval in zip(rows.to_dict("records"), intervals, strict=True):
        margin = margin_to_dense(cards[row["paper"]], row)
        verdict = "" if margin is None else interval.verdict(margin)
        said.append((*_beside(cards[row["paper"]], row), verdict))
    columns = ["published", "mark", "source", "verdict"]
    return rows.join(pd.DataFrame(said, columns=columns))[SUMMARY_COLUMNS]


def _beside(paper: Card, row: dict[str, Any]) -> tuple[float, str, str]:
    """The published number beside a setting, its mark and source; NaN and "" without one."""
    keys = ("method", "model", "dataset", "target", "target_kind")
    for number in paper.published if not row["variant"] else ():
        if number.target is not None and all(getattr(number, key) == row[key] for key in keys):
            return number.value, number.mark, number.source
    return math.nan, "", ""


def build(store: Store, planned: list[Planned]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the two tables, of runs and of settings, from the records."""
    runs = runs_table(store, planned)
    return runs, summary_table(runs)


def write(store: Store, planned: list[Planned]) -> None:
    """Write runs.csv and summary.csv from the records."""
    for name, table in zip(("runs", "summary"), build(store, planned), strict=True):
        write_text(store.folder / "tables" / f"{name}.csv", text_of(table))


def text_of(table: pd.DataFrame) -> str:
    """Return `table` as the text of its CSV file."""
    return table.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def read_table(path: Path) -> pd.DataFrame:
    """Read runs.csv or summary.csv; `InputError` if it is not as `write` leaves it."""
    again = "`prunestudy table` makes it again from the records"
    columns = RUN_COLUMNS if path.stem == "runs" else SUMMARY_COLUMNS
    try:
        text = path.read_bytes().decode()
        header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        if header != columns or {len(line) for line in lines} - {len(columns)} or text[-1] != "\n":
            raise ValueError
        table = pd.DataFrame(lines, columns=columns)
        for name in columns:
            if name not in _TEXT:
                table[name] = pd.to_numeric(table[name].where(table[name] != ""))
        _check(table)
    except FileNotFoundError:
        raise InputError(f"table = {path}: is not there; {again}") from None
    except (ValueError, csv.Error, OSError):
        raise InputError(f"table = {path}: is damaged or of another version; {again}") from None
    return table


def _check(table: pd.DataFrame) -> None:
    """Raise `ValueError` for cells that no run can have."""
    known = {"paper": papers.names(), "method": methods.names(), "metric_name": ("", *UNITS)}
    known["target_kind"] = ("", *methods.TARGETS)
    right = [table[name].isin(allowed).all() for name, allowed in known.items()]
    numbers = table[[name for name in table if name not in _TEXT]].astype(float)
    right.append(not np.isinf(numbers).any(axis=None))
    right.append(numbers[[name for name in _ALWAYS if name in table]].notna().all(axis=None))
    right.append(((table["target_kind"] == "") == table["target"].isna()).all())
    for dataset in set(table["dataset"]):
        datasets_title(dataset)
    if not all(right):
        raise ValueError


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary for people: percent and points (dB for psnr), interval in brackets.

    The verdict is on the card's claim against dense, with the margin below dense that it allows.
    Rows of several papers, and of several devices, are told apart by a column.
    """
    rows = list(summary.itertuples(index=False))
    columns = {
        "paper": [card(row.paper).short or card(row.paper).title for row in rows],
        "device": list(summary["device"]),
        "net": list(summary["model"]),
        "data": [datasets_title(row.dataset) for row in rows],
        "method": [setting_title(row) for row in rows],
        "removed": [removed(r.target, r.target_kind) if r.target_kind else "" for r in rows],
        "n": [f"{row.n}, {row.diverged} diverged" if row.diverged else row.n for row in rows],
        "result": [result(row) for row in rows],
        "minus dense": [difference(row) for row in rows],
        "published": [_published(row) for row in rows],
        "verdict (margin)": [_verdict(row) for row in rows],
    }
    for name in ("paper", "device"):
        if summary[name].nunique() < 2:
            del columns[name]
    return pd.DataFrame(columns)


def setting_title(row: Any) -> str:
    """A row's method for people, with its variant."""
    title = methods.method_class(row.method).title
    return f"{title}, {row.variant}" if row.variant else title


def result(row: Any) -> str:
    """Mean and sd of a row's metric for people: "99.20 ± 0.05%"."""
    factor, unit = UNITS[row.metric_name]
    sd = "" if math.isnan(row.metric_sd) else f" ± {factor * row.metric_sd:.2f}"
    return f"{factor * row.metric:.2f}{sd}{unit}"


def difference(row: Any) -> str:
    """A row's difference to dense for people, in the metric's unit: "+0.10 [-0.02, +0.22]"."""
    numbers = (row.difference, row.difference_low, row.difference_high)
    return bracket(*(UNITS[row.metric_name][0] * number for number in numbers))


def _published(row: Any) -> str:
    factor, unit = UNITS[row.metric_name]
    return "" if pd.isna(row.published) else f"{factor * row.published:.2f}{unit} [{row.mark}]"


def _verdict(row: Any) -> str:
    margin = margin_to_dense(card(row.paper), row._asdict())
    if not row.verdict or margin is None:
        return row.verdict
    return f"{row.verdict} ({UNITS[row.metric_name][0] * margin:+g})"


def datasets_title(name: str) -> str:
    """Title of data set `name` for people; a folder's own name."""
    return name.removeprefix("folder:") if ":" in name else datasets.info(name).title


def bracket(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A difference for people, with its interval: "+0.10 [-0.02, +0.22]"; "" for NaN."""
    if math.isnan(mean):
        return ""
    interval = "" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{mean:+.{digits}f}{interval}"


def markdown(table: pd.DataFrame) -> str:
    """Markdown table of `table`; markup in its cells appears as text."""

    def cell(value: Any) -> str:
        text = html.escape(str(value), quote=False).replace("\n", " ")
        for sign in "\\|*_`[]~":
            text = text.replace(sign, "\\" + sign)
        return text

    lines = [[cell(name) for name in table.columns], ["---"] * len(table.columns)]
    lines += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def fill_readme(path: Path, summary: pd.DataFrame) -> None:
    """Put what each paper's own method reached between the two `results` comments of `path`."""
    own = summary[(summary["variant"] == "") & (summary["method"] == summary["paper"])]
    fill(path, "results", markdown(readable(own)))


def fill(path: Path, name: str, text: str) -> None:
    """Put `text` between the two comments called `name` of the Markdown page `path`.

    Raises `InputError` if the page has no such pair.
    """
    begin, end = f"<!-- {name}: made by `prunestudy readme` -->\n", f"<!-- end of {name} -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise InputError(f"readme = {path.name}: has no pair of {name} comments")
    write_text(path, f"{before}{begin}\n{text}\n{end}{after}")
