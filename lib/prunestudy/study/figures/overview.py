"""Figures of the five papers side by side.

They raise `InputError` ("figure = ...") where no run is done that they would show.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prunestudy.errors import require_one_of
from prunestudy.study import tables
from prunestudy.study.figures import look
from prunestudy.study.overview import COSTS, DUELS, name_of

_CAPTIONS = {
    "dense": "darker: larger",
    "gate variables": "2016: single weights,\nby gates that train",
    "coordinating filters": "2017: all filters from\na few basis filters",
    "GDP": "2021: whole channels,\nby gates that polarise",
    "magnitude attention": "2023: single weights,\nby size, while they train",
    "component-aware": "2025: channels, each part\nto a degree of its own",
}
_RANK = 3  # of the drawing
_VERDICTS = {
    "confirmed": "#029e73",
    "undecided": "#d9c77c",
    "contradicted": "#d55e00",
    "not testable here": "#b0b0b0",
    "no runs in this profile": "#ececec",
}
# What stands for one role in a paper's own figures must be told apart where all come together.
_OTHER_MARKERS = {"group_l2": "^", "plain_low_rank": "P", "l1_filter": "X", "uniform": "d"}
_MARKERS = look.MARKERS | _OTHER_MARKERS
_AXES = ("weights", "nonzero_macs", "time_b1", "time_b128", "memory", "bytes")
_SHARES = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_FINE_SHARES = (20, 30, 40, 50, 60, 80, 100, 150, 200)
_GAINS = (0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 20)


def five_ways(size: int = 16) -> Figure:
    """What each paper leaves of one layer's weights: a drawing, on random numbers."""
    generator = np.random.default_rng(3)
    weight = generator.normal(size=(size, size)) * generator.gamma(2, 0.5, size=(size, 1))
    gates, large, half = generator.random(weight.shape), np.abs(weight), size // 2
    parts = (_strongest(weight[:half], 5, 4), _strongest(weight[half:], 2, 4))
    left = (
        weight,
        np.where(gates < 0.25, weight, np.nan),
        _factors(weight),
        _strongest(weight, 9, 8),
        np.where(large > np.quantile(large, 0.75), weight, np.nan),
        np.concatenate(parts),
    )
    colours = plt.get_cmap("GnBu")(np.linspace(0.35, 1, 64))
    figure, axes = look.canvas(len(left), (12.6, 2.9))
    for panel, (name, caption), values in zip(axes, _CAPTIONS.items(), left, strict=True):
        panel.imshow(np.abs(values), cmap=ListedColormap(colours, bad="#ececec"), vmin=0, vmax=3)
        panel.set(title=name, xticks=[], yticks=[])
        panel.set_xlabel(caption, fontsize=8.5)
        panel.grid(visible=False)
    corner, middle = _RANK + 0.5, _RANK + half + 0.5
    axes[2].add_patch(Rectangle((corner, corner), size, size, fill=False, ls=":", color="0.5"))
    centred = {"ha": "center", "va": "center", "fontsize": 8, "color": "0.35"}
    axes[2].text(middle, middle, "their product", **centred)
    axes[5].axhline(half - 0.5, color="black", lw=1.5)
    return figure


def _strongest(weight: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The matrix without its weakest `rows` and `columns`."""
    strength = np.abs(weight)
    kept = weight.copy()
    kept[np.argsort(strength.sum(1))[:rows]] = np.nan
    kept[:, np.argsort(strength.sum(0))[:columns]] = np.nan
    return kept


def _factors(weight: np.ndarray) -> np.ndarray:
    """Two factors of the matrix around an empty place: mixture on the left, basis on top."""
    left, values, right = np.linalg.svd(weight)
    root, side = 2 * np.sqrt(values[:_RANK]), len(weight) + _RANK + 1
    drawing = np.full((side, side), np.nan)
    drawing[_RANK + 1 :, :_RANK] = left[:, :_RANK] * root
    drawing[:_RANK, _RANK + 1 :] = right[:_RANK] * root[:, None]
    return drawing


def pareto(rows: pd.DataFrame, dataset: str) -> Figure:
    """Metric minus dense (mean and sd over seeds) against what is left of six costs.

    `rows` of `overview.settings_table`; combinations are left out. The line joins the settings
    that no smaller one beats.
    """
    single = rows[(rows.method != "dense") & rows.difference.notna()]
    part = look.select(single, f"costs on {dataset}", dataset=dataset, combined=False)
    factor, _ = tables.UNITS[part.metric_name.iloc[0]]
    part = part.assign(points=factor * part.difference, sd=factor * part.difference_sd.fillna(0))
    figure, axes = look.canvas(3, (11.5, 7.4), rows=2, sharey=True)
    _frame(axes[0], part)
    for panel, cost in zip(axes, _AXES, strict=True):
        measured = part[part[cost].notna()]
        for method in look.in_order(measured.method):
            line = measured[measured.method == method]
            style = _OURS if method in DUELS else _CONTROL
            style = style | look.of(method, marker=_MARKERS[method], ls="", capsize=2, lw=1)
            panel.errorbar(100 * line[cost], line.points, line.sd, **style)
        best = frontier(measured[measured.points > panel.get_ylim()[0]], cost)
        panel.plot(100 * best[cost], best.points, color="0.35", lw=1, zorder=1)
        panel.axhline(0, color=look.COLOURS["dense"], ls="--", lw=1)
        panel.axvline(100, color=look.COLOURS["dense"], ls="--", lw=1)
        shares = [*100 * measured[cost], 50, 100]
        low, high = min(shares) / 1.3, max(shares) * 1.3
        panel.set_xlim(low, high)
        look.log_ticks(panel.xaxis, _FINE_SHARES if high < 8 * low else _SHARES)
        panel.set_xlabel(f"{COSTS[cost]}, % of dense")
    for panel in (axes[0], axes[3]):
        panel.set_ylabel("minus dense, points (mean and sd)")
    figure.suptitle(f"{look.place_of(part)}: what is lost against what is left", fontsize=11)
    look.legend_of_all(figure, "outside lower center", columns=5)
    return figure


_OURS = {"ms": 8, "zorder": 3}
_CONTROL = {"ms": 5, "zorder": 2, "alpha": 0.75}


def frontier(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The rows that lose less than every row of smaller or equal `cost`, smallest first."""
    ordered = rows.sort_values([cost, "difference"], ascending=[True, False])
    before = ordered.difference.cummax().shift(fill_value=-np.inf)
    return ordered[ordered.difference > before]


def _frame(panel: Axes, part: pd.DataFrame) -> None:
    """Set the limits so that a control that fails does not flatten the others into one line."""
    shown = part[part.method != "random"]
    span, sd = max(-shown.points.min(), 0.1), shown.sd.max()
    if span > 20:  # one of the five that fails is shown too, but must not flatten the rest
        panel.set_yscale("symlog", linthresh=10)
        panel.set_yticks(ticks := [0, -2, -5, -10, -20, -50], [f"{tick}" for tick in ticks])
    highest = max(shown.points.max(), 0) + 0.2 * min(span, 10)
    panel.set_ylim(shown.points.min() - 0.2 * span - sd, highest + sd)
    look.cut_off(panel, part.points, "bottom")


def training_against_gain(rows: pd.DataFrame, dataset: str, gain: str = "time_b128") -> Figure:
    """What inference gains (`gain`, one of `COSTS`) against what training costs; bars: its range.

    Raises `InputError` for another gain as well.
    """
    require_one_of("gain", gain, COSTS)
    timed = rows[(rows.method != "dense") & rows[gain].notna() & rows.training.notna()]
    part = look.select(timed, f"{gain} on {dataset}", "nothing was measured", dataset=dataset)
    figure, (axes,) = look.canvas(size=(8.4, 4.6))
    for (method, both), points in part.groupby(["method", "combined"], sort=False):
        spread = np.abs([points.training_low, points.training_high] - points.training.to_numpy())
        style = {"marker": "*", "ms": 12} if both else {"marker": _MARKERS[method], "ms": 7}
        style |= {"color": look.COLOURS[method], "ls": "", "elinewidth": 0.8}
        label = name_of(points.iloc[0])
        axes.errorbar(points.training, 1 / points[gain], xerr=spread, label=label, **style)
    axes.axhline(1, color=look.COLOURS["dense"], ls="--", lw=1)
    axes.axvline(1, color=look.COLOURS["dense"], ls="--", lw=1)
    look.log_ticks(axes.yaxis, _GAINS)
    axes.set_xlabel("training time, times dense (median, range)")
    axes.set_ylabel(f"{COSTS[gain]}: dense / small, times")
    axes.set_title(f"{look.place_of(part)}: training cost and inference gain", fontsize=10)
    look.legend_of_all(figure, "outside right upper", columns=1)
    return figure


def pairs(rows: pd.DataFrame, dataset: str) -> Figure:
    """Each combination above the single settings of the two methods in it, with 95% intervals.

    To the right of each: what is left of weights and MACs.
    """
    both = look.select(rows, f"combinations on {dataset}", dataset=dataset, combined=True)
    alone = rows[(rows.dataset == dataset) & (rows.device == both.device.iloc[0]) & ~rows.combined]
    alone = alone[alone.method.isin([*both.method, *both.after])]
    shown = pd.concat([both, alone]).iloc[::-1]
    factor, _ = tables.UNITS[shown.metric_name.iloc[0]]
    figure, (axes,) = look.canvas(size=(9.5, 0.38 * len(shown) + 1.3))
    for place, row in enumerate(shown.itertuples()):
        bars = np.nan_to_num([[row.difference - row.low], [row.high - row.difference]])
        style = {"marker": "*" if row.combined else _MARKERS[row.method], "capsize": 3}
        style |= {"color": look.COLOURS[row.method], "ms": 11 if row.combined else 6}
        axes.errorbar(factor * row.difference, place, xerr=factor * bars, **style)
        text = f"{100 * row.weights:.3g}% of the weights, {100 * row.macs:.3g}% of the MACs"
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), shown.label, fontsize=8)
    axes.axvline(0, color=look.COLOURS["dense"], ls="--", lw=1)
    axes.axhline(len(alone) - 0.5, color="0.6", lw=0.8)
    lowest = factor * shown.difference.min()
    axes.set_xlim(min(1.3 * lowest, factor * shown.low.max()), max(0.5, -0.25 * lowest))
    axes.set_xlabel("minus dense, points (mean and 95% interval)")
    axes.set_title(f"{look.place_of(both)}: two methods (stars), and each alone", fontsize=10)
    return figure


def verdicts(claims: pd.DataFrame) -> Figure:
    """How many comparisons of each paper's claims came out which way."""
    counts = pd.crosstab(claims.paper, claims.verdict).reindex(claims.paper.unique()[::-1])
    counts = counts[[name for name in _VERDICTS if name in counts]]
    figure, (axes,) = look.canvas(size=(9, 0.5 * len(counts) + 1.4))
    counts.plot.barh(stacked=True, color=_VERDICTS, width=0.8, ax=axes, legend=False)
    for bars, name in zip(axes.containers, counts, strict=True):
        labels = [str(count) if count else "" for count in counts[name]]
        axes.bar_label(bars, labels, label_type="center", fontsize=8)
    axes.set(xlabel="comparisons that the claims are tested by", ylabel="")
    axes.grid(visible=False, axis="y")
    look.legend_of_all(figure, "outside upper center", columns=len(counts.columns))
    return figure
