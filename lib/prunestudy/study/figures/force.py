"""Figures of Coordinating Filters, and the table of ranks that they share."""

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from prunestudy.errors import InputError
from prunestudy.papers import Card
from prunestudy.study import tables
from prunestudy.study.figures import COLOURS, MARKERS, style, title_of
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store

_METHODS = ("plain_low_rank", "force")
_MOST_PANELS = 4


def ranks_table(store: Store, planned: list[Planned]) -> pd.DataFrame:
    """One row per run and layer: rank at 5% error of the trained net, and the full rank.

    Of runs whose target is a share of the energy; `speed_up` is the layer's by MACs at that rank,
    `whole` the metric at which it was measured, before factorising.
    """
    rows = []
    for item, record in _done(store, planned, "energy"):
        metrics, settings = record["metrics"], item.settings
        arrays = store.arrays(settings.run)
        for name, rank in metrics.items():
            layer = name.removeprefix("rank.")
            if layer != name:
                full = len(arrays[f"energy_before.{layer}"])
                place = (settings.model, settings.dataset, settings.method, item.variant)
                more = (metrics[f"speed_up.{layer}"], metrics.get("metric_whole"))
                rows.append((*place, settings.seed, layer, rank, full, *more))
    columns = "model dataset method variant seed layer rank full speed_up whole".split()
    return pd.DataFrame(rows, columns=columns)


def ranks_beside_published(ranks: pd.DataFrame, paper: Card) -> pd.DataFrame:
    """Mean rank per layer of each method and variant, beside the published ranks of that net."""
    if ranks.empty:
        return ranks
    label = ranks.method.map(title_of) + ranks.variant.map(lambda v: f", {v}" if v else "")
    keys = ["model", "dataset", "layer", "full"]
    wide = ranks.assign(label=label).pivot_table("rank", keys, "label", "mean", sort=False).round(1)
    for table in paper.ranks:
        found = dict(zip(table.layers, table.ranks, strict=True))
        model, layers = (wide.index.get_level_values(name) for name in ("model", "layer"))
        column = [
            found.get(layer) if name == table.model else None
            for name, layer in zip(model, layers, strict=True)
        ]
        if any(rank is not None for rank in column):
            wide[f"{table.text} [{table.mark}]"] = pd.array(column, dtype="Int64")
    return wide.reset_index()


def rank_per_layer(ranks: pd.DataFrame, paper: Card, model: str, dataset: str) -> Figure:
    """Ranks at 5% error, forced against plain, as shares of the full rank; published ones as marks.

    Raises `InputError` if no such run is done.
    """
    style()
    rows = ranks[(ranks.model == model) & (ranks.dataset == dataset) & (ranks.variant == "")]
    if rows.empty:
        raise InputError(f"figure = ranks of {model} on {dataset}: no finished run")
    rows = rows.assign(share=100 * rows["rank"] / rows.full, name=rows.method.map(title_of))
    layers = list(dict.fromkeys(rows.layer))
    figure, axes = plt.subplots(figsize=(max(6.4, 0.55 * len(layers) + 2), 3.8))
    palette = {title_of(method): COLOURS[method] for method in _METHODS}
    sns.barplot(
        rows, x="layer", y="share", hue="name", order=layers, hue_order=palette, palette=palette,
        errorbar="sd" if rows.seed.nunique() > 1 else None, ax=axes,
    )  # fmt: skip
    for table in (t for t in paper.ranks if t.model == model and t.mark == "P"):
        shares = [100 * r / n for r, n in zip(table.ranks, table.full, strict=True)]
        marker = MARKERS[table.method]
        label = f"published: {title_of(table.method)} [{table.mark}]"
        face = "white" if table.method == "plain_low_rank" else "black"
        axes.plot(table.layers, shares, marker, mec="black", mfc=face, ms=6, label=label)
    axes.set(ylabel="rank at 5% error, % of full", xlabel="", ylim=(0, 119))
    axes.set_title(f"{model} on {tables.datasets_title(dataset)} (n = {rows.seed.nunique()})")
    if len(layers) > 6:
        axes.tick_params(axis="x", rotation=90)
    axes.legend(fontsize=8, ncols=2, loc="upper center", frameon=True)
    return figure


def filters(store: Store, run: str, layer: str, side: int) -> Figure:
    """Filters of `layer` (kernel `side` x `side`, first input channel) before and after."""
    style()
    arrays = store.arrays(run)
    pictures = {}
    for when in ("before", "after"):
        rows = arrays[f"filters_{when}.{layer}"]
        unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        pictures[when] = _mosaic(unit[:, : side * side].reshape(-1, side, side))
    height, width = pictures["before"].shape
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.4 * height / width + 0.4))
    for axes, (when, picture) in zip(panels, pictures.items(), strict=True):
        most = np.nanmax(np.abs(picture))
        axes.imshow(picture, cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set(title=f"{layer}, {when}", xticks=[], yticks=[])
        axes.grid(visible=False)
    return figure


def angles(store: Store, runs: dict[str, str], layers: list[str]) -> Figure:
    """Angles between the filters of each layer: at the start, and after each method (name -> run).

    All runs have the same start.
    """
    style()
    layers = _some(layers)
    figure, panels = plt.subplots(1, len(layers), figsize=(3.3 * len(layers) + 0.6, 3.2))
    edges = np.linspace(0, 180, 37)
    for axes, layer in zip(np.atleast_1d(panels), layers, strict=True):
        before = store.arrays(next(iter(runs.values())))[f"angles_before.{layer}"]
        axes.stairs(before / before.sum(), edges, fill=True, color="0.8", label="at the start")
        for method, run in runs.items():
            counts = store.arrays(run)[f"angles_after.{layer}"]
            share = counts / max(counts.sum(), 1)
            axes.stairs(share, edges, color=COLOURS[method], lw=1.8, label=title_of(method))
        axes.set(title=layer, xlabel="angle between two filters, degrees", xticks=(0, 45, 90, 135))
    np.atleast_1d(panels)[0].set_ylabel("share of the pairs")
    handles = np.atleast_1d(panels)[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, loc="outside upper center", ncols=1 + len(runs))
    return figure


def error_against_rank(store: Store, runs: dict[str, str], layers: list[str]) -> Figure:
    """Share of the squared energy lost against the share of the rank kept (name -> run)."""
    style()
    layers = _some(layers)
    size = (3.3 * len(layers) + 0.6, 3.2)
    figure, panels = plt.subplots(1, len(layers), figsize=size, sharey=True)
    for axes, layer in zip(np.atleast_1d(panels), layers, strict=True):
        for method, run in runs.items():
            kept = store.arrays(run)[f"energy_after.{layer}"]
            share = 100 * np.arange(1, len(kept) + 1) / len(kept)
            lost = 100 * np.maximum(1 - kept, 1e-6)
            axes.plot(share, lost, color=COLOURS[method], label=title_of(method))
        axes.axhline(5, color="black", ls="--", lw=1)
        axes.set(title=layer, xlabel="rank, % of full", yscale="log", ylim=(0.02, 100))
        axes.yaxis.set_major_formatter("{x:g}")
    first = np.atleast_1d(panels)[0]
    first.set_ylabel("energy lost, %")
    first.legend(fontsize=8, loc="lower left")
    return figure


def speed_up(store: Store, planned: list[Planned], runs: pd.DataFrame) -> Figure:
    """Speed-up of the factorised nets: the convolutions by theory, the net by MACs, and measured.

    Mean over seeds; measured bars are there once the timing step has run. Raises `InputError` if
    no run with factors is done.
    """
    style()
    kinds = [
        "convolutions, MACs",
        "whole net, MACs",
        "measured, batch 1",
        "measured, batch 128",
    ]
    timed = runs.set_index("run")
    rows = []
    for item, record in _done(store, planned, "energy"):
        row, s = timed.loc[item.settings.run], item.settings
        values = (
            record["metrics"].get("factor_speed_up"),
            row.dense_macs / row.macs,
            row.dense_latency_b1_ms / row.latency_b1_ms,
            row.dense_latency_b128_ms / row.latency_b128_ms,
        )
        where = f"{s.model}, {tables.datasets_title(s.dataset)}: {title_of(s.method)}"
        rows += [(where, k, v) for k, v in zip(kinds, values, strict=True)] * (not item.variant)
    if not rows:
        raise InputError("figure = speed-up: no finished run with a target of energy")
    table = pd.DataFrame(rows, columns=["net", "kind", "speed-up"])
    figure, axes = plt.subplots(figsize=(7.5, 1.6 + 0.75 * table.net.nunique()))
    sns.barplot(table, y="net", x="speed-up", hue="kind", ax=axes, errorbar=None, palette="Greys_r",
                edgecolor="0.3")  # fmt: skip
    for bars in axes.containers:
        labels = axes.bar_label(bars, fmt="{:.2f}x", fontsize=7, padding=2)
        plt.setp(labels, bbox={"fc": "white", "ec": "none", "pad": 0.3})
    axes.axvline(1, color="black", ls="--", lw=1)
    axes.margins(x=0.12)
    axes.set(ylabel="", xlabel="times faster than the dense net")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def fine_tuning(store: Store, planned: list[Planned]) -> Figure:
    """Validation accuracy by epoch at equal ranks: training, factorising, fine-tuning; by method.

    Mean over seeds. Raises `InputError` if no run is done.
    """
    style()
    rows = [row for item, record in _done(store, planned, "rank") if not item.variant
            for row in _path(store, item, record)]  # fmt: skip
    if not rows:
        raise InputError("figure = fine-tuning: no finished run with a target of rank")
    table = pd.DataFrame(rows, columns=["method", "seed", "epoch", "accuracy", "start"])
    figure, axes = plt.subplots(figsize=(6.8, 3.8))
    for method, group in table.groupby("method"):
        mean = group.groupby("epoch").accuracy.mean()
        label = f"{title_of(method)} (n = {group.seed.nunique()})"
        axes.plot(mean.index, 100 * mean, "-", marker=MARKERS[method], ms=4, color=COLOURS[method],
                  label=label)  # fmt: skip
    cut = table.start.mean()
    axes.axvline(cut, color="black", ls="--", lw=1)
    axes.text(cut, 0.03, " factorised", transform=axes.get_xaxis_transform(), fontsize=8)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    return figure


def strengths(store: Store, planned: list[Planned]) -> Figure:
    """Total rank at 5% error and validation accuracy against lambda, from the search.

    Raises `InputError` if none of its runs is done.
    """
    style()
    rows, plain = [], None
    for item, record in _done(store, planned, "energy", "search"):
        m, params = record["metrics"], item.settings.params
        values = (m["rank_total"], 100 * m["metric_whole"], 100 * m["metric"])
        if item.settings.method == "force":
            rows.append((params["kind"].upper(), params["strength"], *values))
        else:
            plain = values
    if not rows:
        raise InputError("figure = lambda: no finished run of the search")
    table = pd.DataFrame(rows, columns=["kind", "lambda", "rank", "whole", "factorised"])
    table = table.sort_values("lambda")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for colour, (kind, line) in zip(("#029e73", "#0173b2"), table.groupby("kind"), strict=False):
        left.plot(line["lambda"], line["rank"], "o-", color=colour, label=kind)
        right.plot(line["lambda"], line.whole, "o-", color=colour, label=f"{kind}, whole net")
        right.plot(line["lambda"], line.factorised, "o:", color=colour, mfc="white",
                   label=f"{kind}, factorised")  # fmt: skip
    if plain:
        left.axhline(plain[0], color=COLOURS["plain_low_rank"], ls="--", label="no force")
        for value, line, net in ((plain[1], "--", "whole net"), (plain[2], ":", "factorised")):
            colour, label = COLOURS["plain_low_rank"], f"no force, {net}"
            right.axhline(value, color=colour, ls=line, label=label)
        right.set_ylim(plain[1] - 3, plain[1] + 0.3)
    for axes, name in ((left, "total rank at 5% error"), (right, "validation accuracy, %")):
        axes.set(xscale="log", xlabel="lambda", ylabel=name)
        axes.legend(fontsize=8, loc="lower left")
    return figure


def layers_of(ranks: pd.DataFrame, model: str) -> list[str]:
    """Names of the layers of `model`, in order."""
    return list(dict.fromkeys(ranks[ranks.model == model].layer))


def _done(
    store: Store, planned: list[Planned], kind: str, purpose: str = ""
) -> Iterator[tuple[Planned, dict[str, Any]]]:
    """Finished runs of the two methods with a target of `kind`; search runs only if asked for."""
    seen = set()
    for item in planned:
        s = item.settings
        ours = s.method in _METHODS and s.target is not None and s.target.kind == kind
        wanted = item.purpose == purpose if purpose else item.purpose != "search"
        if ours and wanted and s.run not in seen:
            record = store.read(s)
            seen.add(s.run)
            if record and record["status"] == "done":
                yield item, record


def _path(store: Store, item: Planned, record: dict[str, Any]) -> list[tuple]:
    """Validation accuracy of a run by epoch, and of its factors before their first step."""
    history, s = store.history(record["run"]), item.settings
    start = (1 - s.params["fine_tune"]) * history[-1]["epoch"]
    first = record["metrics"]["validation_factorised"]
    points = [(row["epoch"], row["validation_top1"]) for row in history]
    # Just behind the epoch that ends there, so that the drop is seen.
    points = sorted([*points, (start + 0.01, first)])
    return [(s.method, s.seed, epoch, score, start) for epoch, score in points]


def _some(layers: list[str]) -> list[str]:
    """At most four of `layers`, evenly spaced, the first and the last among them."""
    places = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_PANELS)).round().astype(int)
    return [layers[place] for place in places]


def _mosaic(pictures: np.ndarray) -> np.ndarray:
    """Pictures (N, h, w) in rows with a gap of one pixel, as one array; NaN in the gaps."""
    count, height, width = pictures.shape
    columns = -(-count // 4)
    whole = np.full((4 * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        top, left = row * (height + 1), column * (width + 1)
        whole[top : top + height, left : left + width] = picture
    return whole
