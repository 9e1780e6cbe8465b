"""The five papers side by side: what each setting costs and gains, claim by claim."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from prunestudy.errors import InputError
from prunestudy.methods.search import Search
from prunestudy.papers import cards
from prunestudy.papers.claims import Rule
from prunestudy.study import tables
from prunestudy.study.lines import right_of
from prunestudy.study.plan import plan
from prunestudy.study.select import comparisons, index
from prunestudy.study.session import Session
from prunestudy.study.verdicts import claims_table, observed, verdicts_table
from prunestudy.train.result import Result

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
}
_SLACK = 1.1  # times as large still counts as small, since targets are met to a channel only
_SAME = ["model", "dataset", "epochs", "device"]  # settings are compared where these are equal


def settings_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per setting that is done: its summary, `label` for people, and `COSTS`.

    Costs are shares of the dense net of the same model, data, total epochs and device: means over
    seeds, times of the first seed. Raises `InputError` if no run is done.
    """
    runs = runs[~runs["stage"].isin(["start", "half"])]
    done = runs[runs["status"] == "done"]
    if done.empty:
        raise InputError("overview: no run is done yet")
    plain = done[(done["method"] == "dense") & (done["variant"] == "")]
    dense = plain.groupby(_SAME)[["peak_memory_mb", "bytes"]].mean()
    dense = dense.reindex(pd.MultiIndex.from_frame(done[_SAME])).set_axis(done.index)
    done = done.assign(
        weights=done["nonzeros"] / done["dense_parameters"],
        macs=done["macs"] / done["dense_macs"],
        nonzero_macs=done["nonzero_macs"] / done["dense_macs"],
        time_b1=done["latency_b1_ms"] / done["dense_latency_b1_ms"],
        time_b128=done["latency_b128_ms"] / done["dense_latency_b128_ms"],
        memory=done["peak_memory_mb"] / dense["peak_memory_mb"],
        bytes=done["bytes"] / dense["bytes"],
    )
    costs = done.groupby(tables.KEYS, dropna=False)[[*COSTS]].mean()
    rows = tables.summary_table(runs).merge(costs.reset_index(), on=tables.KEYS)
    order = list(dict.fromkeys(["dense", *OURS, *rows["method"]]))
    shown = tables.readable(rows)
    gone = (", " + shown["removed"] + " removed").where(shown["removed"] != "", "")
    lengths = rows.groupby(["dataset", "method"])["epochs"].transform("nunique")
    long = ", " + rows["epochs"].astype(str) + " epochs"
    gone = gone.where((rows["method"] != "dense") | (lengths == 1), long)
    rows = rows.assign(
        combined=rows["stage"] == "combined",
        order=rows["method"].map(order.index),
        label=shown["method"] + gone,
    )
    by = ["dataset", "combined", "order", "target_kind", "target"]
    return rows.sort_values(by, ignore_index=True, kind="stable")


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `settings_table` for people; costs in percent of dense, empty if not measured."""
    table = tables.readable(rows).reindex(columns=["n", "result", "minus dense"])
    table.insert(0, "setting", rows["label"].array)
    for cost, words in COSTS.items():
        table[f"{words}, %"] = ["" if math.isnan(x) else f"{100 * x:.3g}" for x in rows[cost]]
    return table


def which_when(rows: pd.DataFrame, at_least: float) -> pd.DataFrame:
    """The smallest setting by each of `COSTS` that loses no more than `at_least`, for people.

    `rows` are of one net and data set. Of those about as small it is the most accurate.
    """
    able = rows[(rows["method"] != "dense") & (rows["difference"] >= at_least)]
    costs = [cost for cost in COSTS if able[cost].notna().any()]
    near = [able[able[cost] <= _SLACK * able[cost].min()] for cost in costs]
    best: dict[Any, list[str]] = {}
    for cost, settings in zip(costs, near, strict=True):
        best.setdefault(settings["difference"].idxmax(), []).append(COSTS[cost])
    table = readable(able.loc[[*best]])
    table.insert(0, "to save", [", ".join(words) for words in best.values()])
    return table


def class_drops(study: Session) -> pd.DataFrame:
    """Accuracy minus that of the dense net by data set, method and class; a mean over the rest.

    No rows where records do not say which images were right. `InputError` without the images.
    """
    runs, found = index(study.planned), []
    for method in OURS:
        rule = Rule(kind="description", method=method, against="dense")
        for comparison in comparisons(rule, runs):
            for pairs in observed(study.store, comparison).values():
                right = [[right_of(record) for record in pair] for pair in pairs]
                if all(each is not None for pair in right for each in pair):
                    lost = np.mean([ours * 1.0 - dense for ours, dense in right], axis=0)
                    labels = study.runner.load(comparison.dataset).test.labels.numpy()
                    classes = pd.Series(lost).groupby(labels).mean()
                    said = {"dataset": comparison.dataset, "method": method}
                    found += [said | {"class": c, "drop": x} for c, x in classes.items()]
    table = pd.DataFrame(found, columns=["dataset", "method", "class", "drop"])
    return table.groupby(["dataset", "method", "class"], sort=False, as_index=False).mean()


def verdicts(study: Session) -> pd.DataFrame:
    """Every row of every paper's `verdicts_table` in the profile of `study`."""
    planned, papers = plan(study.profile, (), study.seeds, study.epochs), cards()
    found = [verdicts_table(study.store, planned, p, images=True) for p in papers if p.is_paper]
    return pd.concat(found, ignore_index=True)


def claims(judged: pd.DataFrame) -> pd.DataFrame:
    """Every claim of every paper in `judged` (`verdicts`), and what came out, for people."""
    names = {paper.id: paper.short or paper.title for paper in cards()}
    table = claims_table(judged).drop(columns="claim").rename(columns={"text": "claim"})
    return table.assign(paper=table["paper"].map(names))


def layer_left(result: Result, name: str) -> np.ndarray:
    """What a pruned net has of its layer `name`, each weight in its place; NaN is gone.

    (out, in); two factors of rank r stand beside an empty square, (r + out, r + in).
    """
    layer, dense = result.model.get_submodule(name), result.dense.get_submodule(name).weight
    if isinstance(layer, nn.Sequential):
        basis, mixture = (part.weight.detach().numpy() for part in layer)
        rank = len(basis)
        shown = np.full((rank + len(dense), rank + dense.shape[1]), math.nan)
        shown[:rank, rank:], shown[rank:, :rank] = basis, mixture
        return shown
    weight, shown = layer.weight.detach().numpy(), np.full(dense.shape, math.nan)
    method, kept = result.method, [np.arange(size) for size in dense.shape]
    if channels := getattr(method, "channels", None):
        open_ = torch.zeros(channels.size + 1, dtype=torch.bool)
        open_[-1] = True  # what always stays
        if isinstance(method, Search):
            found = method.budget.indices(method.point.kept)
            for part, left in zip(channels.slices, found, strict=True):
                open_[part.start + left] = True
        else:
            open_[:-1] = method.open()
        kept = [open_[channels.numbers(name, axis)].nonzero().flatten() for axis in ("out", "in")]
    shown[np.ix_(*kept)] = np.where(weight == 0, math.nan, weight)
    return shown
