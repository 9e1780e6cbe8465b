"""Figures, drawn from the tables and the runs' arrays; saved as PNG.

Here is what several papers' notebooks draw; what one paper alone draws is in a file of its name.
They raise `InputError` ("figure = ...") where no run is done that they would show.
"""

import pandas as pd
from matplotlib.figure import Figure

from prunestudy import methods
from prunestudy.papers import Card
from prunestudy.study import tables
from prunestudy.study.figures import look
from prunestudy.study.figures.look import save_to, style

__all__ = ["metric_against_target", "save_to", "style", "variants"]

_NAMES = {"%": "accuracy", " dB": "PSNR"}


def metric_against_target(
    summary: pd.DataFrame, paper: Card, model: str, dataset: str, kind: str = "sparsity"
) -> Figure:
    """Mean metric and sd over seeds against the share kept of what `kind` counts.

    Beside them the dense net of the same epochs, and published numbers that belong here.
    """
    where = {"model": model, "dataset": dataset, "variant": "", "target_kind": kind}
    rows = look.select(summary, f"{model} on {dataset}", **where)
    factor, unit = tables.UNITS[rows.metric_name.iloc[0]]
    least, most = (rows.groupby("method").n.transform(end).map(str) for end in ("min", "max"))
    seeds = least.where(least == most, least + " to " + most)
    rows = rows.assign(
        kept=100 * (1 - (rows.sparsity if kind == "sparsity" else rows.target)),
        value=factor * rows.metric,
        sd=factor * rows.metric_sd.fillna(0),
        label=rows.method.map(look.title_of) + " (n = " + seeds + ")",
    )
    figure, (axes,) = look.canvas(size=(6.8, 4.4))
    look.points(axes, rows, "kept", "value", "sd")
    look.frame(axes, rows, "value", factor * rows.dense_metric.mean())
    for number in paper.published:
        place = (number.model, number.dataset, number.target_kind, number.metric)
        if place == (model, dataset, kind, rows.metric_name.iloc[0]) and number.kept:
            label = f"{number.method.replace('_', ' ')}, quoted [{number.mark}]"
            spot = (100 * number.kept, factor * number.value)
            axes.plot(*spot, "*", ms=14, color="black", label=label, zorder=5)
    ticks = sorted({round(100 * (1 - target), 3) for target in rows.target})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=f"{methods.TARGETS[kind]} kept", ylabel=f"test {_NAMES[unit]}, {unit.strip()}")
    axes.set_title(f"{look.place_of(rows)}: mean and sd over seeds")
    look.legend(figure, "outside lower center", columns=2)
    return figure


def variants(summary: pd.DataFrame, method: str) -> Figure:
    """Difference to dense of each variant of `method` beside the default, with 95% intervals.

    At the net, data set and target of the first variant.
    """
    ours = summary[summary.method == method]
    first = look.select(ours[ours.variant != ""], f"variants of {method}").iloc[0]
    keys = ["model", "dataset", "target_kind", "target", "device"]
    rows = ours[(ours[keys] == first[keys]).all(axis=1)].sort_values("difference")
    lost = rows.diverged.map(lambda count: f" ({count} diverged)" if count else "")
    factor, unit = tables.UNITS[first.metric_name]
    middle, low, high = (factor * rows[f"difference{end}"] for end in ("", "_low", "_high"))
    figure, (axes,) = look.canvas(size=(7, 0.45 * len(rows) + 1.4))
    labels = rows.variant.replace("", "our reading") + lost
    style = {"fmt": "o", "color": look.COLOURS[method], "capsize": 3}
    axes.errorbar(middle, labels, xerr=[middle - low, high - middle], **style)
    if middle.max() > -3:  # else the line of the dense net would press all points together
        axes.axvline(0, color="black", ls="--", lw=1)
        if middle.min() < -3:
            axes.set_xscale("symlog", linthresh=1)
            axes.xaxis.set_major_formatter("{x:g}")
    points = "points" if unit == "%" else "dB"
    axes.set(xlabel=f"{_NAMES[unit]} minus dense, {points} (mean and 95% interval)")
    removed = tables.removed(first.target, first.target_kind)
    axes.set_title(f"{look.place_of(rows)}, {removed} removed")
    return figure
