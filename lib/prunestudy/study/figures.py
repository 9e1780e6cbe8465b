"""Figures, drawn from the tables and the runs' arrays; saved as PNG and SVG."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from prunestudy import datasets, methods
from prunestudy.errors import InputError
from prunestudy.papers import Card
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store

# The same colour and marker for a method in every figure of the study.
_ORDER = ("sparse_gates", "gradual_magnitude", "magnitude", "l1", "random", "dense")
_COLOURS = dict(zip(_ORDER, [*sns.color_palette("colorblind", 5), (0.3, 0.3, 0.3)], strict=True))
_MARKERS = dict(zip(_ORDER, "osD^vx", strict=True))


def style() -> None:
    """Set the study's look for figures."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    # Text stays text in an SVG, and its ids do not change from one drawing to the next.
    mpl.rcParams.update({"svg.hashsalt": "prunestudy", "svg.fonttype": "none"})
    mpl.rcParams.update({"figure.dpi": 110, "savefig.dpi": 160, "figure.constrained_layout.use": 1})


def save(figure: Figure, store: Store, name: str) -> list[Path]:
    """Write `figure` as PNG and SVG into the profile's figures folder; return both paths."""
    return save_to(figure, store.folder / "figures", name)


def save_to(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `figure` as PNG and SVG into `folder`; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        # Neither the date nor the version: the same figure gives the same file.
        figure.savefig(path, metadata={"Date" if path.suffix == ".svg" else "Software": None})
    return paths


def title_of(method: str) -> str:
    """Name of `method` for people."""
    return methods.method_class(method).title


def accuracy_against_kept(summary: pd.DataFrame, paper: Card, model: str, dataset: str) -> Figure:
    """Mean metric over seeds against the kept share, with the sd, dense, and what was quoted."""
    style()
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    rows = summary[
        (summary.model == model) & (summary.dataset == dataset) & (summary.variant == "")
    ]
    with_target = rows[rows.target.notna()]
    if with_target.empty:
        raise InputError(f"figure = {model} on {dataset}: no finished run with a target")
    for method in (m for m in _ORDER if m in set(with_target.method)):
        line = with_target[with_target.method == method].sort_values("target")
        axes.errorbar(
            100 * (1 - line.sparsity),
            100 * line.metric,
            yerr=100 * line.metric_sd.fillna(0),
            label=f"{title_of(method)} (n = {line.n.min()})",
            color=_COLOURS[method],
            marker=_MARKERS[method],
            capsize=3,
        )
    dense = with_target.dense_metric.mean()
    axes.axhline(100 * dense, color=_COLOURS["dense"], ls="--", lw=1, label="dense, same epochs")
    _draw_published(axes, paper, model, dataset)
    kept = sorted({round(100 * (1 - t), 3) for t in with_target.target})
    axes.set_xscale("log")
    axes.set_xticks(kept, [f"{k:g}%" for k in kept])
    axes.minorticks_off()
    axes.set(xlabel="weights kept", ylabel="test accuracy, %")
    axes.set_title(f"{model} on {datasets.info(dataset).title}: mean and sd over seeds")
    _zoom(axes, 100 * with_target[with_target.method != "random"].metric.min(), 100 * dense)
    axes.legend(fontsize=7, loc="lower center", ncols=2)
    return figure


def readings(summary: pd.DataFrame) -> Figure:
    """Difference to dense of each variant of the gates beside the default, with intervals."""
    style()
    ours = summary[summary.method == "sparse_gates"]
    variants = ours[ours.variant != ""]
    keys = ["model", "dataset", "target"]
    first = variants.iloc[0]
    same = (ours[keys] == first[keys]).all(axis=1)
    rows = ours[same].sort_values("difference")
    labels = rows.variant.replace("", "our reading")
    error = [rows.difference - rows.difference_low, rows.difference_high - rows.difference]
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(rows) + 1.4))
    style_of = {"fmt": "o", "color": _COLOURS["sparse_gates"], "capsize": 3}
    axes.errorbar(100 * rows.difference, labels, xerr=100 * np.array(error), **style_of)
    axes.axvline(0, color="black", ls="--", lw=1)
    axes.set(xlabel="accuracy minus dense, points (mean and 95% interval)")
    axes.set_title(f"{first.model} on {first.dataset}, {1 - first.target:.0%} of the weights kept")
    worst = 100 * rows.difference.min()
    if worst < -3:
        axes.set_xscale("symlog", linthresh=1)
    return figure


def _draw_published(axes, paper: Card, model: str, dataset: str) -> None:
    for number in paper.published:
        if (number.model, number.dataset) == (model, dataset) and number.kept:
            label = f"{number.method.replace('_', ' ')}, quoted [{number.mark}]"
            spot = (100 * number.kept, 100 * number.value)
            axes.plot(*spot, "*", ms=14, color="black", label=label, zorder=5)


def _zoom(axes, lowest: float, dense: float) -> None:
    """A control that fails must not flatten the others into one line."""
    span = max(dense - lowest, 0.2)
    axes.set_ylim(lowest - 0.5 * span, dense + 0.25 * span)
    axes.text(0.01, 0.01, "values below are cut off", transform=axes.transAxes, fontsize=7)


def gate_histograms(store: Store, run: str) -> Figure:
    """Histogram of the gates at the first, a middle and the last epoch in which they train."""
    style()
    counts, rows = store.arrays(run)["gate_histograms"], store.history(run)
    open_epochs = [i for i, row in enumerate(rows) if row["phase"] == "gates"] or [0]
    chosen = sorted({open_epochs[0], open_epochs[len(open_epochs) // 2], open_epochs[-1]})
    figure, axes = plt.subplots(1, len(chosen), figsize=(3 * len(chosen), 3), sharey=True)
    edges = np.linspace(0, 1, counts.shape[1] + 1)
    for panel, epoch in zip(np.atleast_1d(axes), chosen, strict=True):
        panel.stairs(
            counts[epoch] / counts[epoch].sum(), edges, fill=True, color=_COLOURS["sparse_gates"]
        )
        panel.set(title=f"after epoch {epoch + 1}", xlabel="gate g", yscale="log")
    np.atleast_1d(axes)[0].set_ylabel("share of the weights")
    return figure


def undecided(store: Store, run: str) -> Figure:
    """Undecided and kept shares, and accuracy of the sampled and the thresholded net, by epoch."""
    style()
    rows = pd.DataFrame(store.history(run))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(rows.epoch, 100 * rows.kept, marker="o", label="g >= 0.5 (kept)")
    left.plot(rows.epoch, 100 * rows.undecided, marker="s", label="0.05 < g < 0.95 (undecided)")
    left.set(xlabel="epoch", ylabel="share of the weights, %", yscale="symlog", ylim=(-0.2, 150))
    left.yaxis.set_major_formatter("{x:g}")
    left.legend(fontsize=8)
    right.plot(rows.epoch, 100 * rows.validation_top1, marker="o", label="thresholded")
    if "validation_top1_sampled" in rows:
        sampled = pd.to_numeric(rows.validation_top1_sampled, errors="coerce")
        right.plot(rows.epoch, 100 * sampled, marker="s", label="sampled")
    right.set(xlabel="epoch", ylabel="validation accuracy, %")
    right.legend(fontsize=8)
    return figure


def layer_sparsity(store: Store, planned: list[Planned], target: float) -> Figure:
    """Kept share of each layer at `target`, by method, mean over seeds."""
    style()
    rows = []
    for item in planned:
        record = store.read(item.settings)
        if item.settings.target and item.settings.target.value == target and not item.variant:
            layers = record["metrics"].get("layers", {}) if record else {}
            name = title_of(item.settings.method)
            rows += [(name, k.removesuffix(".weight"), 100 * (1 - v)) for k, v in layers.items()]
    table = pd.DataFrame(rows, columns=["method", "layer", "kept, %"])
    figure, axes = plt.subplots(figsize=(6.8, 3.6))
    palette = {title_of(m): _COLOURS[m] for m in _ORDER}
    sns.barplot(
        table, x="layer", y="kept, %", hue="method", palette=palette, ax=axes, errorbar="sd"
    )
    axes.set(yscale="log", title=f"where the weights stay, {1 - target:.0%} kept")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter("{x:g}")
    axes.legend(fontsize=8)
    return figure


def kept_against_start(store: Store, runs: dict[str, str]) -> Figure:
    """|w| of kept weights at the end against the start, one panel per method (name -> run)."""
    style()
    figure, axes = plt.subplots(
        1, len(runs), figsize=(3.6 * len(runs), 3.6), sharex=True, sharey=True
    )
    for panel, (method, run) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        arrays, scale = store.arrays(run), store.load(run)["metrics"]["kept_scale"]
        start, end = np.abs(arrays["kept_start"]), np.abs(arrays["kept_end"])
        panel.plot(start, end, ".", ms=3, alpha=0.5, color=_COLOURS.get(method))
        limit = 1.05 * max(start.max(initial=0), end.max(initial=0), 1e-6)
        panel.plot([0, limit], [0, limit], "k--", lw=1)
        panel.set(title=f"{title_of(method)}: x{scale:.2f}", xlabel="|w| of the dense start")
    np.atleast_1d(axes)[0].set_ylabel("|w| in the sparse net")
    return figure
