"""The five papers side by side: what each setting costs and gains, pair by pair, claim by claim."""

import math
from typing import Any

import numpy as np
import pandas as pd

from prunestudy.errors import InputError
from prunestudy.methods import method_class
from prunestudy.papers import cards
from prunestudy.papers.claims import Rule
from prunestudy.study import tables
from prunestudy.study.lines import right_of
from prunestudy.study.plan import Planned, plan
from prunestudy.study.records import Store
from prunestudy.study.select import comparisons, index
from prunestudy.study.session import Session
from prunestudy.study.verdicts import claims_table, observed, removed, row_of, verdicts_table

OURS = tuple(card.id for card in cards() if card.is_paper)  # each paper's method has its name
# What may matter about a net, as a share of the dense one, and its name for people.
COSTS = {
    "weights": "weights",
    "macs": "MACs",
    "nonzero_macs": "MACs with non-zero weights",
    "time_b1": "time for one image",
    "time_b128": "time for 128 images",
    "memory": "peak memory",
    "bytes": "bytes on disk",
    "training": "training time",
}
_SLACK = 1.1  # times as large still counts as small, since targets are met to a channel only
_DUEL = "method control model dataset targets n mean low high".split()
# Settings are compared where these are equal.
_SAME = ["model", "dataset", "epochs", "device"]


def settings_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per setting that is done: its summary, difference to dense, and `COSTS`.

    `label` names it for people; `combined` marks two methods, one after the other. Costs are
    shares of the dense net of the same model, data, total epochs and device: means over seeds,
    times of the first seed, training (parents included) a median. Raises `InputError` if no run is
    done.
    """
    done = runs[(runs["status"] == "done") & ~runs["stage"].isin(["start", "half"])]
    if done.empty:
        raise InputError("overview: no run is done yet")
    done = done.assign(**_shares(done, runs))
    groups = done.groupby(tables.KEYS, dropna=False)
    costs = groups[[*COSTS]].mean().assign(training=groups["training"].median())
    rows = tables.summary_table(done).merge(costs.reset_index(), on=tables.KEYS)
    order = list(dict.fromkeys(["dense", *OURS, *rows["method"]]))
    rows = rows.assign(
        combined=rows["stage"] == "combined",
        order=rows["method"].map(order.index),
        label=[_label(row) for row in rows.itertuples()],
    )
    by = ["dataset", "combined", "order", "target_kind", "target"]
    return rows.sort_values(by, ignore_index=True, kind="stable")


def _label(row: Any) -> str:
    """A setting for people: its method, which reading or after what, what was removed."""
    aim = f"{removed(row.target, row.target_kind)} removed" if row.target_kind else ""
    return ", ".join(filter(None, (method_class(row.method).title, row.variant, aim)))


def _shares(done: pd.DataFrame, runs: pd.DataFrame) -> dict[str, pd.Series]:
    """`COSTS` of each run that is done; training counts all runs that it continues."""
    seconds = runs.set_index(["run", "device"])["train_seconds"].to_dict()
    parents = dict(zip(runs["run"], runs["parent"], strict=True))

    def training(run: str, device: str) -> float:
        before = training(parents[run], device) if parents.get(run) else 0.0
        return seconds.get((run, device), math.nan) + before

    pairs = zip(done["run"], done["device"], strict=True)
    done = done.assign(training=[training(*pair) for pair in pairs])
    dense = done[(done["method"] == "dense") & (done["variant"] == "")]

    def of_dense(name: str, *more: str) -> pd.Series:
        keys = [*_SAME, *more]
        mean = dense.groupby(keys)[name].mean()
        return done[name] / mean.reindex(pd.MultiIndex.from_frame(done[keys])).array

    return {
        "weights": done["nonzeros"] / done["dense_parameters"],
        "macs": done["macs"] / done["dense_macs"],
        "nonzero_macs": done["nonzero_macs"] / done["dense_macs"],
        "time_b1": done["latency_b1_ms"] / done["dense_latency_b1_ms"],
        "time_b128": done["latency_b128_ms"] / done["dense_latency_b128_ms"],
        "memory": of_dense("peak_memory_mb"),
        "bytes": of_dense("bytes"),
        "training": of_dense("training", "seed"),
    }


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `settings_table` for people; costs in percent of dense, empty if not measured."""
    table = tables.readable(rows).reindex(columns=["n", "result", "minus dense"])
    table.insert(0, "setting", rows["label"].array)
    for cost, words in COSTS.items():
        table[f"{words}, %"] = ["" if math.isnan(x) else f"{100 * x:.3g}" for x in rows[cost]]
    return table


def which_when(rows: pd.DataFrame, at_least: float) -> pd.DataFrame:
    """The setting to take to save each of `COSTS`, if the mean may lose down to `at_least`.

    For people; `rows` are of one net and data set. Of the settings about as small as the smallest
    it is the most accurate.
    """
    able = rows[(rows["method"] != "dense") & (rows["difference"] >= at_least)]
    costs = [cost for cost in COSTS if able[cost].notna().any()]
    near = [able[able[cost] <= _SLACK * able[cost].min()] for cost in costs]
    best = readable(able.loc[[settings["difference"].idxmax() for settings in near]])
    best.insert(0, "to save", [COSTS[cost] for cost in costs])
    return best


def combinations(rows: pd.DataFrame) -> pd.DataFrame:
    """Each combination of two methods, followed by the best single setting that is as small.

    In weights or in MACs: which of them the second target says.
    """
    found, single = [], rows[~rows["combined"] & (rows["method"] != "dense")]
    for place, both in rows[rows["combined"]].iterrows():
        cost = "weights" if both["target_kind"] == "sparsity" else "macs"
        like = single[(single[_SAME] == both[_SAME]).all(axis=1)]
        like = like[like[cost] <= _SLACK * both[cost]]
        found += [place, *like.nlargest(1, "metric").index]
    return rows.loc[found]


def duels(store: Store, planned: list[Planned]) -> pd.DataFrame:
    """Each paper's method beside all others at the same targets, as a description; a pair once.

    `side` says whether the interval lies above 0.
    """
    runs, found = index(planned), []
    others = sorted({label for label, _, _ in runs if ", " not in label} - {"dense"})
    for ours in OURS:
        others = [label for label in others if label != ours]
        for other in others:
            rule = Rule(kind="description", method=ours, against=other)
            found += [row_of(store, c) | {"method": ours} for c in comparisons(rule, runs)]
    table = pd.DataFrame(found, columns=_DUEL)
    side = np.select([table["low"] > 0, table["high"] < 0], ["ahead", "behind"], "holds 0")
    return table.assign(side=side)


def class_drops(study: Session) -> pd.DataFrame:
    """What each class pays: accuracy minus that of the dense net, per data set, method and class.

    Of the methods with their own settings, a mean over nets, targets and seeds; no rows where the
    records do not say which test images were right. Raises `InputError` if the images are missing.
    """
    runs, found = index(study.planned), []
    for method in dict.fromkeys(label for label, _, _ in runs if ", " not in label):
        rule = Rule(kind="description", method=method, against="dense")
        for comparison in comparisons(rule, runs) if method != "dense" else ():
            for pairs in observed(study.store, comparison).values():
                right = [[right_of(record) for record in pair] for pair in pairs]
                if all(each is not None for pair in right for each in pair):
                    lost = np.mean([ours * 1.0 - dense for ours, dense in right], axis=0)
                    labels = study.runner.load(comparison.dataset).test.labels.numpy()
                    classes = pd.Series(lost).groupby(labels).mean()
                    said = {"dataset": comparison.dataset, "method": method}
                    found += [said | {"class": c, "drop": x} for c, x in classes.items()]
    table = pd.DataFrame(found, columns=["dataset", "method", "class", "drop"])
    by = ["dataset", "method", "class"]
    return table.groupby(by, sort=False, as_index=False).mean()


def verdicts(study: Session) -> pd.DataFrame:
    """Every row of every paper's `verdicts_table` in the profile of `study`."""
    found = []
    for paper in (card for card in cards() if card.is_paper):
        sized = (study.profile, (paper.id,), study.seeds, study.epochs)
        planned = plan(*sized) if study.profile in paper.profiles else []
        found.append(verdicts_table(study.store, planned, paper, images=True))
    return pd.concat(found, ignore_index=True)


def claims(study: Session) -> pd.DataFrame:
    """Every claim of every paper, and what came out on top in the profile of `study`."""
    table = claims_table(verdicts(study))
    names = {paper.id: paper.short or paper.title for paper in cards()}
    return table.assign(paper=table["paper"].map(names))
