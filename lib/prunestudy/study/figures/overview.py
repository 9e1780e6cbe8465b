"""Figures of the five papers side by side."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prunestudy.errors import InputError, require_one_of
from prunestudy.study import tables
from prunestudy.study.figures import COLOURS, MARKERS, style, title_of
from prunestudy.study.overview import COSTS, DUELS, name_of

_GONE = "#ececec"
_RANK = 3  # of the drawing
_VERDICTS = {
    "confirmed": "#029e73",
    "undecided": "#d9c77c",
    "contradicted": "#d55e00",
    "not testable here": "#b0b0b0",
    "no runs in this profile": "#ececec",
}
# What stands for one role in a paper's own figures must be told apart where all come together.
_SHAPES = MARKERS | {"group_l2": "^", "plain_low_rank": "P", "l1_filter": "X", "uniform": "d"}
_AXES = ("weights", "nonzero_macs", "time_b1", "time_b128", "memory", "bytes")


def five_ways(size: int = 16) -> Figure:
    """What each paper leaves of one layer's weights: a drawing, on random numbers."""
    style()
    generator = np.random.default_rng(3)
    weight = generator.normal(size=(size, size)) * generator.gamma(2, 0.5, size=(size, 1))
    large, gates = np.abs(weight), generator.random(weight.shape)
    figure, axes = plt.subplots(1, 6, figsize=(12.6, 2.9))
    drawn = (
        ("dense", "darker: larger", weight),
        (
            "gate variables",
            "2016: single weights,\nby gates that train",
            np.where(gates < 0.25, weight, np.nan),
        ),
        (
            "coordinating filters",
            "2017: all filters from\na few basis filters",
            _factors(weight, _RANK),
        ),
        (
            "GDP",
            "2021: whole channels,\nby gates that polarise",
            _without_channels(weight, rows=9, columns=8),
        ),
        (
            "magnitude attention",
            "2023: single weights,\nby size, while they train",
            np.where(large > np.quantile(large, 0.75), weight, np.nan),
        ),
        (
            "component-aware",
            "2025: channels, each part\nto a degree of its own",
            _by_component(weight),
        ),
    )
    for panel, (name, below, values) in zip(axes, drawn, strict=True):
        _matrix(panel, values, name)
        panel.set_xlabel(below, fontsize=8.5)
    _mark_product(axes[2], size, _RANK)
    axes[5].axhline(size / 2 - 0.5, color="black", lw=1.5)
    return figure


def _without_channels(weight: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The matrix without its weakest rows and columns."""
    strength = np.abs(weight)
    kept = weight.copy()
    kept[np.argsort(strength.sum(1))[:rows]] = np.nan
    kept[:, np.argsort(strength.sum(0))[:columns]] = np.nan
    return kept


def _by_component(weight: np.ndarray) -> np.ndarray:
    """The upper half loses many columns, the lower half few rows: two parts of one net."""
    half = len(weight) // 2
    upper = _without_channels(weight[:half], rows=5, columns=4)
    lower = _without_channels(weight[half:], rows=2, columns=4)
    return np.concatenate([upper, lower])


def _factors(weight: np.ndarray, rank: int) -> np.ndarray:
    """The two factors of a matrix of `rank` around an empty place: mixture left, basis on top."""
    left, values, right = np.linalg.svd(weight)
    size, root = len(weight), 2 * np.sqrt(values[:rank])
    canvas = np.full((size + rank + 1, size + rank + 1), np.nan)
    canvas[rank + 1 :, :rank] = left[:, :rank] * root
    canvas[:rank, rank + 1 :] = right[:rank] * root[:, None]
    return canvas


def _mark_product(axes: Axes, size: int, rank: int) -> None:
    corner, middle = rank + 0.5, rank + size / 2 + 0.5
    axes.add_patch(Rectangle((corner, corner), size, size, fill=False, ls=":", color="0.5"))
    axes.text(middle, middle, "their product", ha="center", va="center", fontsize=8, color="0.35")


def _matrix(axes: Axes, values: np.ndarray, name: str) -> None:
    colour = ListedColormap(plt.get_cmap("GnBu")(np.linspace(0.35, 1, 64)), bad=_GONE)
    axes.imshow(np.abs(values), cmap=colour, vmin=0, vmax=3)
    axes.set(title=name, xticks=[], yticks=[])
    axes.grid(visible=False)


def pareto(rows: pd.DataFrame, dataset: str) -> Figure:
    """Metric minus dense (mean and sd over seeds) against what is left of six costs.

    `rows` of `overview.settings_table`; combinations are left out. The line joins the settings
    that no smaller one beats. Raises `InputError` if there is no row.
    """
    style()
    part = rows[(rows.dataset == dataset) & ~rows.combined & (rows.method != "dense")]
    part = part[part.difference.notna()]
    if part.empty:
        raise InputError(f"figure = costs on {dataset}: no finished run")
    factor, _ = tables.UNITS[part.metric_name.iloc[0]]
    figure, panels = plt.subplots(2, 3, figsize=(11.5, 7.4), sharey=True)
    bottom = _frame(panels[0, 0], part, factor)
    for panel, cost in zip(panels.flat, _AXES, strict=True):
        measured = part[part[cost].notna()]
        for method in (m for m in COLOURS if m in set(measured.method)):
            _points(panel, measured[measured.method == method], cost, factor)
        best = frontier(measured[factor * measured.difference > bottom], cost)
        panel.plot(100 * best[cost], factor * best.difference, color="0.35", lw=1, zorder=1)
        panel.axhline(0, color=COLOURS["dense"], ls="--", lw=1)
        _shares(panel, 100 * measured[cost])
        panel.set_xlabel(f"{COSTS[cost]}, % of dense")
    for panel in panels[:, 0]:
        panel.set_ylabel("minus dense, points (mean and sd)")
    where = f"{part.model.iloc[0]} on {tables.datasets_title(dataset)}"
    figure.suptitle(f"{where}: what is lost against what is left", fontsize=11)
    handles = {h.get_label(): h for p in panels.flat for h in p.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def frontier(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The rows that lose less than every row of smaller or equal `cost`, smallest first."""
    ordered = rows.sort_values([cost, "difference"], ascending=[True, False])
    before = ordered.difference.cummax().shift(fill_value=-np.inf)
    return ordered[ordered.difference > before]


def _points(panel: Axes, line: pd.DataFrame, cost: str, factor: float) -> None:
    method = line.method.iloc[0]
    ours = method in DUELS
    panel.errorbar(
        100 * line[cost],
        factor * line.difference,
        factor * line.difference_sd.fillna(0),
        ls="",
        marker=_SHAPES[method],
        ms=8 if ours else 5,
        color=COLOURS[method],
        alpha=1 if ours else 0.75,
        capsize=2,
        lw=1,
        zorder=3 if ours else 2,
        label=title_of(method),
    )


def _shares(panel: Axes, values: pd.Series) -> None:
    """A log axis in percent, wide enough for the values and for the dense net."""
    panel.axvline(100, color=COLOURS["dense"], ls="--", lw=1)
    low, high = min([*values, 50]) / 1.3, max([*values, 100]) * 1.3
    fine = (20, 30, 40, 50, 60, 80, 100, 150, 200)
    coarse = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
    ticks = [t for t in (fine if high < 8 * low else coarse) if low <= t <= high]
    panel.set_xscale("log")
    panel.set_xlim(low, high)
    panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
    panel.minorticks_off()


def _frame(panel: Axes, part: pd.DataFrame, factor: float) -> float:
    """A control that fails must not flatten the others into one line; return the lower edge."""
    values = factor * part[part.method != "random"].difference
    sd = factor * part.difference_sd.fillna(0).where(part.method != "random", 0).max()
    span = max(-values.min(), 0.1)
    if span > 20:  # one of the five that fails is shown too, but must not flatten the rest
        panel.set_yscale("symlog", linthresh=10)
        panel.set_yticks(ticks := [0, -2, -5, -10, -20, -50], [f"{tick}" for tick in ticks])
    panel.set_ylim(values.min() - 0.2 * span - sd, max(values.max(), 0) + 0.2 * min(span, 10) + sd)
    if factor * part.difference.min() < panel.get_ylim()[0]:
        place = {"transform": panel.transAxes, "va": "bottom", "fontsize": 7}
        panel.text(0.02, 0.02, "values below the frame are cut off", **place)
    return panel.get_ylim()[0]


def training_against_gain(rows: pd.DataFrame, dataset: str, gain: str = "time_b128") -> Figure:
    """What inference gains (`gain`, one of `COSTS`) against what training costs; bars: its range.

    Raises `InputError` for another gain, or where no net was timed.
    """
    require_one_of("gain", gain, COSTS)
    style()
    part = rows[(rows.dataset == dataset) & (rows.method != "dense")]
    part = part[part[gain].notna() & part.training.notna()]
    if part.empty:
        raise InputError(f"figure = {gain} on {dataset}: nothing was measured")
    figure, axes = plt.subplots(figsize=(8.4, 4.6))
    for method, points in part.groupby("method", sort=False):
        for both, chosen in points.groupby("combined"):
            spread = [chosen.training - chosen.training_low, chosen.training_high - chosen.training]
            name = name_of(method, chosen.variant.iloc[0])
            look = {"marker": "*" if both else _SHAPES[method], "ms": 12 if both else 7}
            look |= {"color": COLOURS[method], "label": name, "ls": "", "elinewidth": 0.8}
            axes.errorbar(chosen.training, 1 / chosen[gain], xerr=np.array(spread), **look)
    axes.axhline(1, color=COLOURS["dense"], ls="--", lw=1)
    axes.axvline(1, color=COLOURS["dense"], ls="--", lw=1)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [
        t for t in (0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 20) if low <= t <= high
    ]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training time, times dense (median, range)")
    axes.set_ylabel(f"{COSTS[gain]}: dense / small, times")
    where = f"{part.model.iloc[0]} on {tables.datasets_title(dataset)}"
    axes.set_title(f"{where}: training cost and inference gain", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=7.5)
    return figure


def pairs(rows: pd.DataFrame, dataset: str) -> Figure:
    """Each combination above the single settings of the two methods in it, with 95% intervals.

    To the right of each: what is left of weights and MACs. Raises `InputError` without one.
    """
    style()
    part = rows[rows.dataset == dataset]
    both = part[part.combined]
    if both.empty:
        raise InputError(f"figure = combinations on {dataset}: no finished run")
    single = part[~part.combined & part.method.isin({*both.method, *DUELS})]
    shown = pd.concat([both, single[single.method.isin(_methods_of(both))]]).iloc[::-1]
    factor, _ = tables.UNITS[shown.metric_name.iloc[0]]
    figure, axes = plt.subplots(figsize=(9.5, 0.38 * len(shown) + 1.3))
    for place, row in enumerate(shown.itertuples()):
        bars = [[row.difference - row.low], [row.high - row.difference]]
        look = {"marker": "*" if row.combined else _SHAPES[row.method], "capsize": 3}
        look |= {"color": COLOURS[row.method], "ms": 11 if row.combined else 6}
        axes.errorbar(factor * row.difference, place, xerr=factor * np.nan_to_num(bars), **look)
        text = f"{100 * row.weights:.3g}% of the weights, {100 * row.macs:.3g}% of the MACs"
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), shown.label, fontsize=8)
    axes.axvline(0, color=COLOURS["dense"], ls="--", lw=1)
    axes.axhline(len(single[single.method.isin(_methods_of(both))]) - 0.5, color="0.6", lw=0.8)
    lowest = factor * shown.difference.min()
    axes.set_xlim(min(1.3 * lowest, factor * shown.low.max()), max(0.5, -0.25 * lowest))
    axes.set_xlabel("minus dense, points (mean and 95% interval)")
    where = f"{both.model.iloc[0]} on {tables.datasets_title(dataset)}"
    axes.set_title(f"{where}: two methods (stars), and each alone", fontsize=10)
    return figure


def _methods_of(both: pd.DataFrame) -> set[str]:
    """The methods in the combinations: the last ones, and those that they came after."""
    named = {"after force": "force", "after GDP": "gdp"}
    return {*both.method, *(named[variant] for variant in both.variant)}


def verdicts(claims: pd.DataFrame) -> Figure:
    """How many comparisons of each paper's claims came out which way."""
    style()
    counts = claims.groupby("paper", sort=False).verdict.value_counts().unstack(fill_value=0)
    counts = counts.reindex(columns=[v for v in _VERDICTS if v in counts]).iloc[::-1]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(counts) + 1.4))
    left = np.zeros(len(counts))
    for name in counts:
        bars = axes.barh(counts.index, counts[name], left=left, color=_VERDICTS[name], label=name)
        numbers = [str(v) if v else "" for v in counts[name]]
        axes.bar_label(bars, numbers, label_type="center", fontsize=8)
        left += counts[name]
    axes.set(xlabel="comparisons that the claims are tested by")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=len(counts.columns), fontsize=8)
    return figure
