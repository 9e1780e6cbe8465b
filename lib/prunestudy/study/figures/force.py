"""Figures of Coordinating Filters, and the table of ranks that they share.

They raise `InputError` ("figure = ...") where no run is done that they would show.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from prunestudy.papers import Card
from prunestudy.study import tables
from prunestudy.study.figures import look
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store

_METHODS = ("plain_low_rank", "force")
_MOST_PANELS = 4


def _of_kind(kind: str, *purposes: str):
    """Choose planned runs of the two methods with a target of `kind`."""

    def wanted(item: Planned) -> bool:
        s = item.settings
        ours = s.method in _METHODS and s.target is not None and s.target.kind == kind
        return ours and item.purpose in (purposes or ("results", "ablation"))

    return wanted


def ranks_table(store: Store, planned: Sequence[Planned]) -> pd.DataFrame:
    """One row per run and layer: rank at 5% error of the trained net, and the full rank.

    Of runs whose target is a share of the energy; `speed_up` is the layer's by MACs at that rank,
    `whole` the metric at which it was measured, before factorising.
    """
    labels = {item.settings.run: item.variant for item in reversed(planned)}
    rows = []
    for s, record in look.finished(store, planned, _of_kind("energy")):
        metrics, arrays = record["metrics"], store.arrays(s.run)
        place = (s.model, s.dataset, s.method, labels[s.run], s.seed)
        for layer in (name[5:] for name in metrics if name.startswith("rank.")):
            full = len(arrays[f"energy_before.{layer}"])
            measured = (metrics[f"speed_up.{layer}"], metrics.get("metric_whole"))
            rows.append((*place, layer, metrics[f"rank.{layer}"], full, *measured))
    columns = "model dataset method variant seed layer rank full speed_up whole".split()
    return pd.DataFrame(rows, columns=columns)


def ranks_beside_published(ranks: pd.DataFrame, paper: Card) -> pd.DataFrame:
    """Mean rank per layer of each method and variant, beside the published ranks of that net."""
    if ranks.empty:
        return ranks
    label = ranks.method.map(look.title_of) + ranks.variant.map(lambda v: f", {v}" if v else "")
    keys = ["model", "dataset", "layer", "full"]
    wide = ranks.assign(label=label).pivot_table("rank", keys, "label", "mean", sort=False)
    wide = wide.round(1).reset_index()
    for table in paper.ranks:
        published = wide.layer.map(dict(zip(table.layers, table.ranks, strict=True)))
        published = published.where(wide.model == table.model)
        if published.notna().any():
            wide[f"{table.text} [{table.mark}]"] = published.astype("Int64")
    return wide


def rank_per_layer(ranks: pd.DataFrame, paper: Card, model: str, dataset: str) -> Figure:
    """Ranks at 5% error, forced against plain, in % of the full rank; published ones as marks."""
    rows = ranks[(ranks.model == model) & (ranks.dataset == dataset) & (ranks.variant == "")]
    look.require_rows(rows, f"ranks of {model} on {dataset}")
    rows = rows.assign(share=100 * rows["rank"] / rows.full, method=rows.method.map(look.title_of))
    palette = {look.title_of(method): look.COLOURS[method] for method in _METHODS}
    width = max(6.4, 0.55 * rows.layer.nunique() + 2)
    axes = look.bars(rows[["layer", "method", "share"]], palette, width)
    for table in (t for t in paper.ranks if t.model == model and t.mark == "P"):
        shares = 100 * np.array(table.ranks) / np.array(table.full)
        style = {"mec": "black", "mfc": "white" if table.method == "plain_low_rank" else "black"}
        label = f"published: {look.title_of(table.method)} [{table.mark}]"
        axes.plot(table.layers, shares, look.MARKERS[table.method], ms=6, label=label, **style)
    axes.set(ylabel="rank at 5% error, % of full", ylim=(0, 119))
    axes.set_title(f"{look.place_of(rows)} (n = {rows.seed.nunique()})")
    axes.legend(fontsize=8, ncols=2, loc="upper center", frameon=True)
    return axes.figure


def filters(store: Store, run: str, layer: str, side: int) -> Figure:
    """Filters of `layer` (kernel `side` x `side`, first input channel) before and after."""
    arrays = store.arrays(run)
    pictures = {}
    for when in ("before", "after"):
        rows = arrays[f"filters_{when}.{layer}"]
        unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        pictures[when] = _mosaic(unit[:, : side * side].reshape(-1, side, side))
    height, width = pictures["before"].shape
    figure, axes = look.canvas(2, (9, 4.4 * height / width + 0.4))
    for panel, (when, picture) in zip(axes, pictures.items(), strict=True):
        most = np.nanmax(np.abs(picture))
        panel.imshow(picture, cmap="RdBu_r", vmin=-most, vmax=most)
        panel.set(title=f"{layer}, {when}", xticks=[], yticks=[])
        panel.grid(visible=False)
    return figure


def _mosaic(pictures: np.ndarray) -> np.ndarray:
    """Pictures (N, h, w) in four rows with gaps of one pixel, as one array; NaN in the gaps."""
    count, _, width = pictures.shape
    columns = -(-count // 4)
    fill = ((0, 4 * columns - count), (0, 1), (0, 1))
    framed = np.pad(pictures.astype(float), fill, constant_values=np.nan)
    grid = framed.reshape(4, columns, *framed.shape[1:]).swapaxes(1, 2)
    return grid.reshape(-1, columns * (width + 1))[:-1, :-1]


def angles(store: Store, runs: dict[str, str], layers: list[str]) -> Figure:
    """Angles between the filters of each layer: at the start, and after each method (name -> run).

    All runs have the same start.
    """
    layers, edges = _some(layers), np.linspace(0, 180, 37)
    arrays = {method: store.arrays(run) for method, run in runs.items()}
    start = next(iter(arrays.values()))
    figure, axes = look.canvas(len(layers), (3.3 * len(layers) + 0.6, 3.2))
    for panel, layer in zip(axes, layers, strict=True):
        grey = {"fill": True, "color": "0.8", "label": "at the start"}
        look.histogram(panel, start[f"angles_before.{layer}"], edges, **grey)
        for method, held in arrays.items():
            style = {"color": look.COLOURS[method], "lw": 1.8, "label": look.title_of(method)}
            look.histogram(panel, held[f"angles_after.{layer}"], edges, **style)
        panel.set(title=layer, xlabel="angle between two filters, degrees", xticks=(0, 45, 90, 135))
    axes[0].set_ylabel("share of the pairs")
    look.legend_of_all(figure, "outside upper center", columns=1 + len(runs))
    return figure


def error_against_rank(store: Store, runs: dict[str, str], layers: list[str]) -> Figure:
    """Share of the squared energy lost against the share of the rank kept (name -> run)."""
    layers = _some(layers)
    figure, axes = look.canvas(len(layers), (3.3 * len(layers) + 0.6, 3.2), sharey=True)
    for panel, layer in zip(axes, layers, strict=True):
        for method, run in runs.items():
            kept = store.arrays(run)[f"energy_after.{layer}"]
            share = 100 * np.arange(1, len(kept) + 1) / len(kept)
            lost = 100 * np.maximum(1 - kept, 1e-6)
            panel.plot(share, lost, color=look.COLOURS[method], label=look.title_of(method))
        panel.axhline(5, color="black", ls="--", lw=1)
        panel.set(title=layer, xlabel="rank, % of full", yscale="log", ylim=(0.02, 100))
        look.plain_ticks(panel.yaxis)
    axes[0].set_ylabel("energy lost, %")
    axes[0].legend(fontsize=8, loc="lower left")
    return figure


def speed_up(store: Store, planned: Sequence[Planned], runs: pd.DataFrame) -> Figure:
    """Speed-up of the factorised nets: the convolutions by theory, the net by MACs, and measured.

    Mean over seeds; measured bars are there once the timing step has run.
    """
    found = look.finished(store, planned, _of_kind("energy"))
    theory = {s.run: record["metrics"].get("factor_speed_up") for s, record in found}
    rows = runs[runs.run.isin(theory) & (runs.variant == "")]
    rows = rows.sort_values("run", key=lambda names: names.map(list(theory).index))
    look.require_rows(rows, "speed-up", "no finished run with a target of energy")
    net = rows.model + ", " + rows.dataset.map(tables.datasets_title)
    kinds = {
        "net": net + ": " + rows.method.map(look.title_of),
        "convolutions, MACs": rows.run.map(theory),
        "whole net, MACs": rows.dense_macs / rows.macs,
        "measured, batch 1": rows.dense_latency_b1_ms / rows.latency_b1_ms,
        "measured, batch 128": rows.dense_latency_b128_ms / rows.latency_b128_ms,
    }
    table = pd.DataFrame(kinds).melt("net", var_name="kind", value_name="speed-up")
    figure, (axes,) = look.canvas(size=(7.5, 1.6 + 0.75 * table.net.nunique()))
    style = {"palette": "Greys_r", "edgecolor": "0.3", "errorbar": None}
    sns.barplot(table, y="net", x="speed-up", hue="kind", ax=axes, **style)
    for bars in axes.containers:
        for label in axes.bar_label(bars, fmt="{:.2f}x", fontsize=7, padding=2):
            label.set_bbox({"fc": "white", "ec": "none", "pad": 0.3})
    axes.axvline(1, color="black", ls="--", lw=1)
    axes.margins(x=0.12)
    axes.set(ylabel="", xlabel="times faster than the dense net")
    look.legend_beside(axes)
    return figure


def fine_tuning(store: Store, planned: Sequence[Planned]) -> Figure:
    """Validation accuracy by epoch at equal ranks: training, factorising, fine-tuning; by method.

    Mean over seeds.
    """
    wanted = _of_kind("rank")
    rows = []
    for s, record in look.finished(store, planned, lambda p: wanted(p) and not p.variant):
        history = store.history(s.run)
        cut = (1 - s.params["fine_tune"]) * history[-1]["epoch"]
        points = [(row["epoch"], row["validation_top1"]) for row in history]
        # Just behind the epoch that ends there, so that the drop is seen.
        points.append((cut + 0.01, record["metrics"]["validation_factorised"]))
        rows += [(s.method, s.seed, epoch, 100 * score) for epoch, score in points]
    look.require_rows(rows, "fine-tuning", "no finished run with a target of rank")
    table = pd.DataFrame(rows, columns=["method", "seed", "epoch", "accuracy"])
    figure, (axes,) = look.canvas(size=(6.8, 3.8))
    for method, group in table.groupby("method"):
        label = f"{look.title_of(method)} (n = {group.seed.nunique()})"
        axes.plot(group.groupby("epoch").accuracy.mean(), ms=4, **look.of(method, label=label))
    axes.axvline(cut, color="black", ls="--", lw=1)
    axes.text(cut, 0.03, " factorised", transform=axes.get_xaxis_transform(), fontsize=8)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    look.legend_of_all(figure, "outside upper center", columns=2)
    return figure


def strengths(store: Store, planned: Sequence[Planned]) -> Figure:
    """Total rank at 5% error and validation accuracy against lambda, from the search."""
    rows = []
    for s, record in look.finished(store, planned, _of_kind("energy", "search")):
        metrics = record["metrics"]
        kind = s.params["kind"].upper() if s.method == "force" else "no force"
        scores = (100 * metrics["metric_whole"], 100 * metrics["metric"])
        rows.append((kind, s.params.get("strength"), metrics["rank_total"], *scores))
    table = pd.DataFrame(rows, columns=["kind", "lambda", "rank", "whole", "factorised"])
    forced = table[table.kind != "no force"].sort_values("lambda")
    look.require_rows(forced, "lambda", "no finished run of the search")
    figure, (left, right) = look.canvas(2, (9, 3.6))
    for colour, (kind, line) in zip(("#029e73", "#0173b2"), forced.groupby("kind"), strict=False):
        style = {"color": colour, "marker": "o"}
        left.plot(line["lambda"], line["rank"], label=kind, **style)
        right.plot(line["lambda"], line.whole, label=f"{kind}, whole net", **style)
        style |= {"ls": ":", "mfc": "white", "label": f"{kind}, factorised"}
        right.plot(line["lambda"], line.factorised, **style)
    for plain in table[table.kind == "no force"].itertuples():
        style = {"color": look.COLOURS["plain_low_rank"], "ls": "--"}
        left.axhline(plain.rank, label="no force", **style)
        right.axhline(plain.whole, label="no force, whole net", **style)
        right.axhline(plain.factorised, label="no force, factorised", **style | {"ls": ":"})
        right.set_ylim(plain.whole - 3, plain.whole + 0.3)
    for axes, name in ((left, "total rank at 5% error"), (right, "validation accuracy, %")):
        axes.set(xscale="log", xlabel="lambda", ylabel=name)
        axes.legend(fontsize=8, loc="lower left")
    return figure


def layers_of(ranks: pd.DataFrame, model: str) -> list[str]:
    """Names of the layers of `model`, in order."""
    return list(dict.fromkeys(ranks[ranks.model == model].layer))


def _some(layers: list[str]) -> list[str]:
    """At most four of `layers`, evenly spaced, the first and the last among them."""
    places = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_PANELS)).round().astype(int)
    return [layers[place] for place in places]
