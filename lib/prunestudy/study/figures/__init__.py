"""Figures, drawn from the tables and the runs' arrays; saved as PNG.

Here is what several papers' notebooks draw; what one paper alone draws is in a file of its name.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from prunestudy import methods
from prunestudy.papers import Card
from prunestudy.study import tables
from prunestudy.study.figures import look
from prunestudy.study.figures.look import COLOURS, MARKERS, save, save_to, style, title_of
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store

__all__ = ["COLOURS", "MARKERS", "save", "save_to", "style", "title_of"]

_NAMES = {"%": "accuracy", " dB": "PSNR"}


def metric_against_target(
    summary: pd.DataFrame, paper: Card, model: str, dataset: str, kind: str = "sparsity"
) -> Figure:
    """Mean metric over seeds against the share kept of what `kind` counts.

    With the sd, the dense net of the same epochs, and published numbers that belong here. Raises
    `InputError` if no run is done.
    """
    where = {"model": model, "dataset": dataset, "variant": "", "target_kind": kind}
    rows = look.select(summary, f"{model} on {dataset}", "no finished run with a target", **where)
    factor, unit = tables.UNITS[rows.metric_name.iloc[0]]
    figure, (axes,) = look.canvas(size=(6.4, 4.2))
    for method in look.in_order(rows.method):
        line = rows[rows.method == method].sort_values("target")
        kept = 100 * (1 - (line.sparsity if kind == "sparsity" else line.target))
        label = f"{look.title_of(method)} ({_seeds(line.n)})"
        sd = factor * line.metric_sd.fillna(0)
        axes.errorbar(kept, factor * line.metric, sd, capsize=3, **look.of(method, label=label))
    dense = factor * rows.dense_metric.mean()
    axes.axhline(dense, color=look.COLOURS["dense"], ls="--", lw=1, label="dense, same epochs")
    _draw_published(axes, paper, rows.iloc[0], factor)
    ticks = sorted({round(100 * (1 - target), 3) for target in rows.target})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=f"{methods.TARGETS[kind]} kept", ylabel=f"test {_NAMES[unit]}, {unit.strip()}")
    axes.set_title(f"{look.place_of(rows)}: mean and sd over seeds")
    # A control that fails must not flatten the others into one line.
    lowest = factor * rows[rows.method != "random"].metric.min()
    span = max(dense - lowest, 0.2)
    axes.set_ylim(lowest - 0.5 * span, dense + 0.25 * span)
    look.cut_off(axes, factor * rows.metric)
    axes.legend(fontsize=7, loc="lower center", ncols=2)
    return figure


def _seeds(counts: pd.Series) -> str:
    """Say from how many seeds the points of a line are."""
    least, most = counts.min(), counts.max()
    return f"n = {least}" if least == most else f"n = {least} to {most}"


def _draw_published(axes: Axes, paper: Card, row: pd.Series, factor: float) -> None:
    keys = ("model", "dataset", "target_kind")
    for number in paper.published:
        same = all(getattr(number, key) == row[key] for key in keys)
        if same and number.metric == row.metric_name and number.kept:
            label = f"{number.method.replace('_', ' ')}, quoted [{number.mark}]"
            spot = (100 * number.kept, factor * number.value)
            axes.plot(*spot, "*", ms=14, color="black", label=label, zorder=5)


def variants(summary: pd.DataFrame, method: str) -> Figure:
    """Difference to dense of each variant of `method` beside the default, with 95% intervals.

    At the net, data set and target of the first variant. Raises `InputError` without variants.
    """
    ours = summary[summary.method == method]
    first = look.select(ours[ours.variant != ""], f"variants of {method}").iloc[0]
    keys = ["model", "dataset", "target_kind", "target", "device"]
    rows = ours[(ours[keys] == first[keys]).all(axis=1)].sort_values("difference")
    lost = rows.diverged.map(lambda count: f" ({count} diverged)" if count else "")
    factor, unit = tables.UNITS[first.metric_name]
    middle = factor * rows.difference
    error = np.array(
        [middle - factor * rows.difference_low, factor * rows.difference_high - middle]
    )
    figure, (axes,) = look.canvas(size=(7, 0.45 * len(rows) + 1.4))
    labels = rows.variant.replace("", "our reading") + lost
    axes.errorbar(middle, labels, xerr=error, fmt="o", color=look.COLOURS[method], capsize=3)
    near = middle.max() > -3  # else the line of the dense net would press all points together
    if near:
        axes.axvline(0, color="black", ls="--", lw=1)
    if near and middle.min() < -3:
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
    points = "points" if unit == "%" else "dB"
    axes.set(xlabel=f"{_NAMES[unit]} minus dense, {points} (mean and 95% interval)")
    axes.set_title(
        f"{look.place_of(rows)}, {tables.removed(first.target, first.target_kind)} removed"
    )
    return figure


def layer_sparsity(store: Store, planned: Sequence[Planned], target: float, **where: str) -> Figure:
    """Kept share of each layer's weights at `target`, by method: mean and sd over seeds.

    `where` are settings of the runs, such as their model and dataset.
    """
    where = {"kind": "sparsity"} | where
    axes = bars_by_method(store, planned, "layers", target, _kept_percent, where)
    axes.set(ylabel="kept, %", title=f"where the weights stay, {1 - target:.0%} kept")
    return axes.figure


def _kept_percent(sparsity: float) -> float:
    return 100 * (1 - sparsity)


def bars_by_method(
    store: Store,
    planned: Sequence[Planned],
    metric: str,
    target: float,
    value: Callable[[float], float],
    where: dict[str, str],
) -> Axes:
    """Bars of what records hold in `metric` per layer or group, a colour per method.

    Of the runs without a variant at `target`; `where` are settings of theirs and the target's
    `kind`. Raises `InputError` if none is done.
    """
    same = {name: wanted for name, wanted in where.items() if name != "kind"}

    def wanted(item: Planned) -> bool:
        settings, aim = item.settings, item.settings.target
        at_target = aim is not None and (aim.kind, aim.value) == (where["kind"], target)
        here = all(getattr(settings, name) == value for name, value in same.items())
        return at_target and here and not item.variant

    rows = [
        (layer.removesuffix(".weight"), look.title_of(settings.method), value(held))
        for settings, record in look.finished(store, planned, wanted)
        for layer, held in record["metrics"].get(metric, {}).items()
    ]
    look.require_rows(rows, f"{metric} at {target:g} of {where['kind']}")
    table = pd.DataFrame(rows, columns=["layer", "method", "value"])
    colours = {look.title_of(method): colour for method, colour in look.COLOURS.items()}
    width = max(6.8, 0.45 * table.layer.nunique() + 3.5)
    axes = look.bars(table, {name: colours[name] for name in table.method.unique()}, width)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter("")
    look.plain_ticks(axes.yaxis)
    look.legend_beside(axes)
    return axes
