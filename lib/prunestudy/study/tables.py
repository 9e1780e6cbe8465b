"""The two tidy tables of a profile, made from records: runs.csv and summary.csv."""

import html
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from prunestudy import datasets, methods
from prunestudy.errors import InputError
from prunestudy.papers import Card, Published, card
from prunestudy.study import verdicts
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store, write_text
from prunestudy.study.verdicts import Interval, removed

RUN_COLUMNS = (
    "run parent paper method variant model dataset seed epochs precision threads target_kind "
    "target sparsity parameters nonzeros macs nonzero_macs dense_parameters dense_macs "
    "metric_name metric dense_metric macro_f1 latency_b1_ms latency_b128_ms "
    "dense_latency_b1_ms dense_latency_b128_ms peak_memory_mb bytes train_seconds status "
    "reading stage after"
).split()
KEYS = (
    "paper method variant model dataset epochs precision threads target_kind target metric_name"
).split()
SUMMARY_COLUMNS = (
    KEYS
    + (
        "n diverged metric metric_sd dense_metric difference_n difference difference_sd "
        "difference_low difference_high sparsity nonzeros published mark source verdict "
        "reading stage after"
    ).split()
)


def runs_table(store: Store, planned: list[Planned]) -> pd.DataFrame:
    """One row per (paper, run) of the planned runs that are done; search runs left out."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for item in planned:
        record = store.read(item.settings) if item.purpose != "search" else None
        if record is not None:
            rows[item.paper, item.settings.run, item.variant] = _row(store, item, record)
    table = pd.DataFrame(rows.values(), columns=RUN_COLUMNS)
    # A run that two experiments share under two labels is one row, under the plainer label.
    table = table.sort_values(["paper", "run", "variant"]).drop_duplicates(["paper", "run"])
    return _with_dense(table).reset_index(drop=True)


def _row(store: Store, item: Planned, record: dict[str, Any]) -> dict[str, Any]:
    settings, metrics = item.settings, record["metrics"]
    target = settings.aim
    return {
        "run": settings.run,
        "parent": record["parent"] or "",
        "paper": item.paper,
        "method": settings.method,
        "variant": item.variant,
        "model": settings.model,
        "dataset": settings.dataset,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "precision": settings.precision,
        "threads": settings.threads,
        "target_kind": target.kind if target else "",
        "target": target.value if target else math.nan,
        **{name: metrics.get(name) for name in RUN_COLUMNS if name in metrics},
        **(record["latency"] or {}).get("ms", {}),
        "train_seconds": record["cost"]["train_seconds"],
        "status": record["status"],
        **{name: getattr(item, name) for name in ("reading", "stage", "after")},
    }


def _with_dense(table: pd.DataFrame) -> pd.DataFrame:
    """Fill dense_metric: the dense net of same paper, model, data, seed and total epochs."""
    keys = ["paper", "model", "dataset", "seed", "epochs"]
    plain = (table["method"] == "dense") & table["variant"].isin(["", "start"])
    dense = table[plain & (table["status"] == "done")].sort_values("variant")
    metric = dense.drop_duplicates(keys).set_index(keys)["metric"]
    where = pd.MultiIndex.from_frame(table[keys])
    return table.assign(dense_metric=metric.reindex(where).to_numpy() if len(metric) else math.nan)


def summary_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: mean, sd and n over seeds, and the paired difference to dense.

    `diverged` counts the seeds that n lacks; a setting of which none is done has no row.
    """
    # A diverged run has no metric, nor its name.
    keys = [key for key in KEYS if key != "metric_name"]
    groups = [group for _, group in runs.groupby(keys, dropna=False, sort=True)]
    rows = [_summary(group) for group in groups if (group["status"] == "done").any()]
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS)


def _summary(all_seeds: pd.DataFrame) -> dict[str, Any]:
    group = all_seeds[all_seeds["status"] == "done"]
    first = group.iloc[0]
    row = {key: first[key] for key in KEYS}
    difference = Interval.of(list((group["metric"] - group["dense_metric"]).dropna()))
    published = _beside(card(first["paper"]), first)
    return row | {
        "n": len(group),
        "diverged": len(all_seeds) - len(group),
        "metric": group["metric"].mean(),
        "metric_sd": group["metric"].std(),
        "dense_metric": group["dense_metric"].mean(),
        "difference_n": difference.n,
        "difference": difference.mean,
        "difference_sd": difference.sd,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "sparsity": group["sparsity"].mean(),
        "nonzeros": group["nonzeros"].mean(),
        "published": published.value if published else math.nan,
        "mark": published.mark if published else "",
        "source": published.source if published else "",
        "verdict": _verdict_to_dense(card(first["paper"]), first, difference),
        **{name: first[name] for name in ("reading", "stage", "after")},
    }


def _beside(paper: Card, row: pd.Series) -> Published | None:
    """The published number that stands beside this setting, if there is one."""
    keys = ("method", "model", "dataset", "target", "target_kind")
    for number in paper.published:
        if number.target is not None and all(getattr(number, k) == row[k] for k in keys):
            return None if row["variant"] else number
    return None


def _verdict_to_dense(paper: Card, row: pd.Series, difference: Interval) -> str:
    margin = verdicts.margin_to_dense(paper, row)
    return "" if margin is None else difference.verdict(margin)


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


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary for people: percent and points (dB for psnr), interval in brackets.

    The verdict is on the card's claim against dense, with the margin below dense that it allows.
    Rows of several papers are told apart by a column.
    """
    rows = list(summary.itertuples(index=False))
    columns = {
        "net": [row.model for row in rows],
        "data": [datasets_title(row.dataset) for row in rows],
        "method": [
            methods.method_class(row.method).title + (f", {row.variant}" if row.variant else "")
            for row in rows
        ],
        "removed": [
            "" if pd.isna(row.target) else removed(row.target, row.target_kind) for row in rows
        ],
        "n": [f"{row.n}, {row.diverged} diverged" if row.diverged else row.n for row in rows],
        "result": [result(row) for row in rows],
        "minus dense": [_minus_dense(row) for row in rows],
        "published": [_published(row) for row in rows],
        "verdict (margin)": [_verdict(row) for row in rows],
    }
    if summary["paper"].nunique() > 1:
        columns = {"paper": [_short(card(row.paper)) for row in rows]} | columns
    return pd.DataFrame(columns)


def _short(paper: Card) -> str:
    return paper.short or paper.title


def _verdict(row: Any) -> str:
    margin = verdicts.margin_to_dense(card(row.paper), row._asdict())
    if not row.verdict or margin is None:
        return row.verdict
    return f"{row.verdict} ({UNITS[row.metric_name][0] * margin:+g})"


# By metric: the factor to its unit for people, and the unit.
UNITS = {"top1": (100, "%"), "miou": (100, "%"), "psnr": (1, " dB")}


def result(row: Any) -> str:
    """Mean and sd of a row's metric for people: "99.20 ± 0.05%"."""
    factor, unit = UNITS[row.metric_name]
    sd = "" if math.isnan(row.metric_sd) else f" ± {factor * row.metric_sd:.2f}"
    return f"{factor * row.metric:.2f}{sd}{unit}"


def _minus_dense(row: Any) -> str:
    factor, _ = UNITS[row.metric_name]
    return bracket(*(factor * x for x in (row.difference, row.difference_low, row.difference_high)))


def _published(row: Any) -> str:
    factor, unit = UNITS[row.metric_name]
    return "" if pd.isna(row.published) else f"{factor * row.published:.2f}{unit} [{row.mark}]"


def datasets_title(name: str) -> str:
    """Title of data set `name` for people; a folder's own name."""
    return name.removeprefix("folder:") if ":" in name else datasets.info(name).title


def bracket(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A difference for people, with its interval: "+0.10 [-0.02, +0.22]"; "" for NaN."""
    if math.isnan(mean):
        return ""
    interval = "" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{mean:+.{digits}f}{interval}"


def read_table(path: Path) -> pd.DataFrame:
    """Read a table written by `write_tables`; empty labels stay empty text."""
    text = "run parent paper method variant model dataset precision target_kind metric_name".split()
    text += "status mark source verdict reading stage after".split()
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(text, str))
    except FileNotFoundError:
        raise InputError(f"table = {path.name}: not there; run the study first") from None
    return table.fillna({name: "" for name in text if name in table})


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
