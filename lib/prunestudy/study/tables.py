"""The tidy tables of a profile, made from records: runs.csv, summary.csv and verdicts.csv."""

import html
import math

import pandas as pd

from prunestudy import datasets, models
from prunestudy.methods import method_class
from prunestudy.papers import Card, card
from prunestudy.study.lines import write_text
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store
from prunestudy.study.statistics import interval
from prunestudy.study.verdicts import COLUMNS, called, removed, verdicts_table

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
_PLACE = "method model dataset target target_kind".split()
DIFFERENCE = "difference_n difference difference_sd difference_low difference_high".split()
SUMMARY_COLUMNS = [
    *KEYS[:-1],
    *"n diverged metric metric_sd dense_metric".split(),
    *DIFFERENCE,
    *"sparsity nonzeros published mark source reading stage after device".split(),
]
# By metric: the factor to its unit for people, and the unit.
UNITS = dict.fromkeys(("top1", "top5", "miou"), (100, "%")) | {"psnr": (1, " dB")}


def runs_table(store: Store, planned: list[Planned]) -> pd.DataFrame:
    """One row per paper, run and device of the planned runs that are done, without the search."""
    rows = []
    own = ("method", "model", "dataset", "seed", "epochs", "precision", "threads")
    words = ("paper", "variant", "reading", "stage", "after")
    for item in (item for item in planned if item.purpose != "search"):
        settings, aim = item.settings, item.settings.aim
        for record in store.read_all(settings):
            row = {name: value for name, value in record["metrics"].items() if name in RUN_COLUMNS}
            row |= {name: getattr(settings, name) for name in own}
            row |= {name: getattr(item, name) for name in words}
            row |= (record["latency"] or {}).get("ms", {})
            row["run"] = record["run"]  # settings.run would hash them once more
            row["parent"], row["status"] = record["parent"] or "", record["status"]
            row["target_kind"], row["target"] = (aim.kind, aim.value) if aim else ("", math.nan)
            row["train_seconds"] = record["cost"]["train_seconds"]
            row["device"] = record["environment"]["device"]
            rows.append(row)
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


def summary_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per setting of which a run is done: over seeds, and paired with dense."""
    keys = [key for key in KEYS if key != "metric_name"]  # a diverged run has no metric's name
    done = runs[runs["status"] == "done"]
    done = done.assign(difference=done["metric"] - done["dense_metric"])
    groups = done.groupby(keys, dropna=False)
    means = {name: (name, "mean") for name in ("metric", "dense_metric", "sparsity", "nonzeros")}
    words = {name: (name, "first") for name in ("metric_name", "reading", "stage", "after")}
    rows = groups.agg(**means, **words, n=("run", "size"))
    rows["metric_sd"] = groups["metric"].agg(lambda values: values.std())
    rows["diverged"] = runs.groupby(keys, dropna=False).size().reindex(rows.index) - rows["n"]
    intervals = [interval([*values.dropna()]) for _, values in groups["difference"]]
    rows = rows.join(pd.DataFrame(intervals, rows.index, DIFFERENCE)).reset_index()
    beside = []
    for paper, variant, *place in rows[["paper", "variant", *_PLACE]].itertuples(index=False):
        number = None if variant else card(paper).published_at(*place)
        beside.append((number.value, number.mark, number.source) if number else (math.nan, "", ""))
    return rows.join(pd.DataFrame(beside, columns=["published", "mark", "source"]))[SUMMARY_COLUMNS]


def build(store: Store, planned: list[Planned]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the two tables, of runs and of settings, from the records."""
    runs = runs_table(store, planned)
    return runs, summary_table(runs)


def verdicts(store: Store, planned: list[Planned]) -> pd.DataFrame:
    """The verdicts on the claims of all papers in `planned`, in the columns of their file."""
    papers = dict.fromkeys(item.paper for item in planned)
    found = [verdicts_table(store, planned, card(paper))[COLUMNS] for paper in papers]
    return pd.concat([table for table in found if len(table)] or found[:1], ignore_index=True)


def write(store: Store, planned: list[Planned]) -> pd.DataFrame:
    """Write runs.csv, summary.csv and verdicts.csv from the records; return the summary."""
    runs, summary = build(store, planned)
    made = {"runs": runs, "summary": summary, "verdicts": verdicts(store, planned)}
    for name, table in made.items():
        write_text(store.folder / "tables" / f"{name}.csv", text_of(table))
    return summary


def text_of(table: pd.DataFrame) -> str:
    """Return `table` as the text of its CSV file."""
    return table.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary for people, in percent and points, or dB; with the paper, if of several."""
    rows = []
    for row in summary.to_dict("records"):
        (factor, unit), paper, n = UNITS[row["metric_name"]], card(row["paper"]), row["n"]
        sd = "" if math.isnan(row["metric_sd"]) else f" ± {factor * row['metric_sd']:.2f}"
        published = f"{factor * row['published']:.2f}{unit} [{row['mark']}]"
        difference = (factor * row[f"difference{end}"] for end in ("", "_low", "_high"))
        method = method_class(row["method"]).title
        shown = {
            "paper": paper.short or paper.title,
            "device": row["device"],
            "net": models.title(row["model"]),
            "data": datasets_title(row["dataset"]),
            "method": f"{method}, {row['variant']}" if row["variant"] else method,
            "removed": row["target_kind"] and removed(row["target"], row["target_kind"]),
            "n": f"{n} ({row['diverged']} diverged)" if row["diverged"] else n,
            "result": f"{factor * row['metric']:.2f}{sd}{unit}",
            "minus dense": bracket(*difference),
            "published": "" if math.isnan(row["published"]) else published,
        }
        rows.append(shown)
    one = [name for name in ("paper", "device") if summary[name].nunique() < 2]
    return pd.DataFrame(rows).drop(columns=one, errors="ignore")


def by_share(summary: pd.DataFrame) -> pd.DataFrame:
    """A row for each method on a net, a column for each share removed.

    In brackets the difference to dense, in points or dB; a star: its interval leaves out zero.
    """
    table, summary = readable(summary), summary.reset_index(drop=True)
    if table.empty:
        return table
    about = [name for name in table if name in ("paper", "device", "net", "data", "method")]
    share = table["removed"].replace("", "none removed")
    changed = table["minus dense"].str.partition(" ")[0]
    apart = (summary["difference_low"] > 0) | (summary["difference_high"] < 0)
    changed = " (" + changed + apart.map({True: "*)", False: ")"})
    changed = changed.where((changed.str.len() > 3) & (summary["target_kind"] != ""), "")
    order = share[summary.sort_values(["target_kind", "target"]).index].unique()
    table = table.assign(share=share, result=table["result"] + changed)
    lines = table.groupby(about, sort=False)
    wide = lines["n"].agg(lambda n: "; ".join(map(str, n.unique()))).to_frame()
    wide = wide.join(table.pivot_table("result", about, "share", "last")[order])
    beside = table[table["published"] != ""].groupby(about)[["published", "share"]].last()
    if len(beside):
        wide["published"] = beside["published"] + ", " + beside["share"]
    # Methods on one net and data set stand together.
    place = [name for name in about if name != "method"]
    return wide.fillna("").sort_values(place, kind="stable").reset_index().rename_axis(columns=None)


def readable_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `verdicts_table` for people, without columns in which nothing stands."""
    rows = []
    for row in table.to_dict("records"):
        factor, unit = UNITS.get(row["scored"], (1, ""))
        ends = [("mean", f"{of}low", f"{of}high") for of in ("", "images_")]
        digits = 2 if unit else 0 if abs(row["mean"]) > 1000 else 4
        spans = [bracket(*(factor * row[name] for name in each), digits=digits) for each in ends]
        unit = unit.replace("%", " points")
        seeds, images = (f"{span}{unit}" if span else "" for span in spans)
        within = f", to within {factor * row['margin']:g}{unit}" if row["margin"] else ""
        p, opposite = (f"{row[name]:.2g}" for name in ("p_adjusted", "p_opposite_adjusted"))
        metric = "" if row["metric"] in ("", "metric") else f" ({row['metric'].replace('_', ' ')})"
        where = {models.title: row["model"], datasets_title: row["dataset"]}
        pair = " - ".join(called(x) for x in (row["method"], row["control"]) if x)
        shown = {
            "claim": row["claim"].replace("_", " "),
            "test": row["kind"].replace("n_i", "n-i").replace("_", " ") + within,
            "compared": pair + metric,
            "where": " on ".join(of(name) for of, name in where.items() if name),
            **{name: row[name] for name in ("targets", "n")},
            "mean, over seeds": seeds,
            "over seeds and images": "" if math.isnan(row["images_low"]) else images,
            "p": p.replace("nan", ""),
            "p of the opposite": opposite.replace("nan", ""),
            **{name: row[name] for name in ("verdict", "failures")},
        }
        rows.append(shown)
    found = pd.DataFrame(rows)
    return found.loc[:, (found != "").any()]


def published_table(paper: Card) -> pd.DataFrame:
    """One row per published number of `paper`, for people; without columns that are empty."""
    metrics = dict.fromkeys(f"{of}{n.metric}" for n in paper.published for of in ("dense ", ""))
    rows = []
    for number in paper.published:
        (factor, unit), net = UNITS[number.metric], number.model
        net = models.title(net) if net in models.names() else net.replace("_", " ")
        row = {"net": net, "data": datasets_title(number.dataset), "published": number.text}
        row[number.metric] = f"{factor * number.value:.2f}{unit}"
        if number.dense is not None:
            row[f"dense {number.metric}"] = f"{factor * number.dense:.2f}{unit}"
        row["kept"] = "" if number.kept is None else f"{100 * number.kept:g}%"
        row["non-zeros"] = "" if number.nonzeros is None else f"{number.nonzeros:,}"
        row["speed-up"] = "" if number.speed_up is None else f"{number.speed_up:.2f}x"
        rows.append(row | {"read in": f"{number.source} [{number.mark}]"})
    columns = ["net", "data", "published", *metrics, "kept", "non-zeros", "speed-up", "read in"]
    table = pd.DataFrame(rows, columns=columns).fillna("")
    return table.loc[:, (table != "").any()]


def datasets_title(name: str) -> str:
    """Title of data set `name` for people; a folder's own name."""
    return name.removeprefix("folder:") if ":" in name else datasets.info(name).title


def bracket(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A difference for people, with its interval: "+0.10 [-0.02, +0.22]"; "" for NaN."""
    if math.isnan(mean):
        return ""
    bounds = "" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{mean:+.{digits}f}{bounds}"


_ESCAPED = str.maketrans({"\n": " "} | {sign: f"\\{sign}" for sign in "\\|*_`[]~"})


def markdown(table: pd.DataFrame) -> str:
    """Markdown table of `table`; markup in its cells appears as text."""
    rows = [table.columns, *table.itertuples(index=False)]
    lines = [[html.escape(str(cell), quote=False).translate(_ESCAPED) for cell in r] for r in rows]
    lines.insert(1, ["---"] * len(table.columns))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
