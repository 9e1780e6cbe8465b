"""Figures, drawn from the tables and the runs' arrays; saved as PNG and SVG.

Here is what every paper's notebook draws; what one paper alone draws is in a file of its name.
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from prunestudy import datasets, methods
from prunestudy.errors import InputError
from prunestudy.papers import Card
from prunestudy.study import tables
from prunestudy.study.figures.inline import show_well
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store

# The same colour and marker for a method in every figure: the papers' own in strong colours that
# the colour-blind can tell apart, their controls in others.
_LOOK = {
    "dense": ("#4d4d4d", "x"),
    "sparse_gates": ("#0173b2", "o"),
    "force": ("#029e73", "o"),
    "gdp": ("#d55e00", "o"),
    "magnitude_attention": ("#cc78bc", "o"),
    "component_aware": ("#56b4e9", "o"),
    "gradual_magnitude": ("#de8f05", "s"),
    "group_l2": ("#de8f05", "s"),
    "plain_low_rank": ("#de8f05", "s"),
    "uniform": ("#5e3c99", "s"),
    "magnitude": ("#ca9161", "D"),
    "l1_filter": ("#ca9161", "D"),
    "l1": ("#b8a200", "^"),
    "network_slimming": ("#b8a200", "^"),
    "dpf": ("#5e3c99", "P"),
    "hard_concrete": ("#5e3c99", "P"),
    "snip": ("#f781bf", "h"),
    "scratch": ("#f781bf", "h"),
    "random": ("#949494", "v"),
}
COLOURS = {method: colour for method, (colour, _) in _LOOK.items()}
MARKERS = {method: marker for method, (_, marker) in _LOOK.items()}


def style() -> None:
    """Set the study's look for figures."""
    show_well()
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


def metric_against_target(
    summary: pd.DataFrame, paper: Card, model: str, dataset: str, kind: str = "sparsity"
) -> Figure:
    """Mean metric over seeds against the share kept of what `kind` counts.

    With the sd, the dense net of the same epochs, and published numbers that belong here. Raises
    `InputError` if no run is done.
    """
    style()
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    rows = _plain(summary, model, dataset, kind)
    if rows.empty:
        raise InputError(f"figure = {model} on {dataset}: no finished run with a target")
    factor, unit = tables.UNITS[rows.metric_name.iloc[0]]
    for method in (m for m in _LOOK if m in set(rows.method)):
        line = rows[rows.method == method].sort_values("target")
        axes.errorbar(
            100 * (1 - (line.sparsity if kind == "sparsity" else line.target)),
            factor * line.metric,
            yerr=factor * line.metric_sd.fillna(0),
            label=f"{title_of(method)} ({_seeds(line.n)})",
            color=COLOURS[method],
            marker=MARKERS[method],
            capsize=3,
        )
    dense = factor * rows.dense_metric.mean()
    axes.axhline(dense, color=COLOURS["dense"], ls="--", lw=1, label="dense, same epochs")
    _draw_published(axes, paper, rows, factor)
    kept = sorted({round(100 * (1 - t), 3) for t in rows.target})
    axes.set_xscale("log")
    axes.set_xticks(kept, [f"{k:g}%" for k in kept])
    axes.minorticks_off()
    axes.set(xlabel=f"{methods.TARGETS[kind]} kept", ylabel=f"test {_NAMES[unit]}, {unit.strip()}")
    axes.set_title(f"{model} on {datasets.info(dataset).title}: mean and sd over seeds")
    _zoom(axes, factor * rows.metric, factor * rows[rows.method != "random"].metric, dense)
    axes.legend(fontsize=7, loc="lower center", ncols=2)
    return figure


_NAMES = {"%": "accuracy", " dB": "PSNR"}


def _seeds(counts: pd.Series) -> str:
    """Say from how many seeds the points of a line are."""
    least, most = counts.min(), counts.max()
    return f"n = {least}" if least == most else f"n = {least} to {most}"


def _plain(summary: pd.DataFrame, model: str, dataset: str, kind: str) -> pd.DataFrame:
    """Rows of the default variants that have a target of `kind`."""
    wanted = (summary.model == model) & (summary.dataset == dataset) & (summary.variant == "")
    return summary[wanted & (summary.target_kind == kind) & summary.target.notna()]


def variants(summary: pd.DataFrame, method: str) -> Figure:
    """Difference to dense of each variant of `method` beside the default, with 95% intervals.

    At the net, data set and target of the first variant. Raises `InputError` without variants.
    """
    style()
    ours = summary[summary.method == method]
    others = ours[ours.variant != ""]
    if others.empty:
        raise InputError(f"figure = variants of {method}: no finished run")
    keys = ["model", "dataset", "target_kind", "target"]
    first = others.iloc[0]
    rows = ours[(ours[keys] == first[keys]).all(axis=1)].sort_values("difference")
    names = rows.variant.replace("", "our reading")
    lost = rows.diverged.map(lambda count: f" ({count} diverged)" if count else "")
    labels = names + lost
    error = [rows.difference - rows.difference_low, rows.difference_high - rows.difference]
    factor, unit = tables.UNITS[first.metric_name]
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(rows) + 1.4))
    style_of = {"fmt": "o", "color": COLOURS[method], "capsize": 3}
    axes.errorbar(factor * rows.difference, labels, xerr=factor * np.array(error), **style_of)
    spread = factor * rows.difference
    near = spread.max() > -3  # else the line of the dense net would press all points together
    if near:
        axes.axvline(0, color="black", ls="--", lw=1)
    points = "points" if unit == "%" else "dB"
    axes.set(xlabel=f"{_NAMES[unit]} minus dense, {points} (mean and 95% interval)")
    data = tables.datasets_title(first.dataset)
    removed = tables.removed(first.target, first.target_kind)
    axes.set_title(f"{first.model} on {data}, {removed} removed")
    if near and spread.min() < -3:
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
    return figure


def _draw_published(axes, paper: Card, rows: pd.DataFrame, factor: float) -> None:
    first = rows.iloc[0]
    for number in paper.published:
        same = (number.model, number.dataset, number.target_kind, number.metric) == (
            *(first.model, first.dataset),
            *(first.target_kind, first.metric_name),
        )
        if same and number.kept:
            label = f"{number.method.replace('_', ' ')}, quoted [{number.mark}]"
            spot = (100 * number.kept, factor * number.value)
            axes.plot(*spot, "*", ms=14, color="black", label=label, zorder=5)


def _zoom(axes, values: pd.Series, shown: pd.Series, dense: float) -> None:
    """A control that fails must not flatten the others into one line."""
    lowest = shown.min()
    span = max(dense - lowest, 0.2)
    axes.set_ylim(lowest - 0.5 * span, dense + 0.25 * span)
    if values.min() < axes.get_ylim()[0]:
        place = {"transform": axes.transAxes, "va": "top", "fontsize": 7}
        axes.text(0.01, 0.985, "values below the frame are cut off", **place)


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
    shown = {p.settings.method for p in planned if p.settings.target}
    palette = {title_of(m): COLOURS[m] for m in _LOOK if m in shown}
    sns.barplot(
        table, x="layer", y="kept, %", hue="method", palette=palette, ax=axes, errorbar="sd"
    )
    axes.set(yscale="log", title=f"where the weights stay, {1 - target:.0%} kept")
    if table.layer.nunique() > 8:  # their names would run into each other
        axes.tick_params(axis="x", rotation=90, labelsize=7)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter("{x:g}")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
