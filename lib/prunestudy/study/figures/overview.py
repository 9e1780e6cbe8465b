"""Figures that compare the five papers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from prunestudy.papers import card
from prunestudy.study import figures as look
from prunestudy.study import tables
from prunestudy.study.overview import COSTS
from prunestudy.study.statistics import OUTCOMES

_CAPTIONS = {
    "dense": "darker: larger",
    "gate variables": "2016: single weights,\nby gates that train",
    "coordinating filters": "2017: all filters from\na few basis filters",
    "GDP": "2021: whole channels,\nby gates that polarise",
    "magnitude attention": "2023: single weights,\nby size, while they train",
    "component-aware": "2025: channels, each part\nto a degree of its own",
}
_VERDICTS = {
    "confirmed": "#029e73",
    "undecided": "#d9c77c",
    "contradicted": "#d55e00",
    "by construction": "#7fb3d5",
    "not testable here": "#b0b0b0",
    "not tested": "#ececec",
}
_AXES = ("weights", "nonzero_macs", "time_b1", "time_b128", "memory", "bytes")


def five_ways() -> Figure:
    """What each paper leaves of one layer's weights: a drawing, on random numbers."""
    generator = np.random.default_rng(3)
    weight = generator.normal(size=(16, 16)) * generator.gamma(2, 0.5, size=(16, 1))
    gates, large = generator.random(weight.shape), np.abs(weight)
    left, values, right = np.linalg.svd(weight)
    factors = np.full((20, 20), np.nan)  # the mixture on the left, the basis on top
    factors[4:, :3] = 2 * left[:, :3] * np.sqrt(values[:3])
    factors[:3, 4:] = 2 * right[:3] * np.sqrt(values[:3, None])

    def strongest(part: np.ndarray, rows: int, columns: int) -> np.ndarray:
        strength, kept = np.abs(part), np.full_like(part, np.nan)
        places = np.ix_(strength.sum(1).argsort()[-rows:], strength.sum(0).argsort()[-columns:])
        kept[places] = part[places]
        return kept

    shown = (
        weight,
        np.where(gates < 0.25, weight, np.nan),
        factors,
        strongest(weight, 7, 8),
        np.where(large > np.quantile(large, 0.75), weight, np.nan),
        np.vstack([strongest(weight[:8], 3, 12), strongest(weight[8:], 6, 12)]),
    )
    colours = plt.get_cmap("GnBu")(np.linspace(0.35, 1, 64))
    figure, axes = look.canvas(len(shown), (12.6, 2.9))
    for panel, (name, caption), matrix in zip(axes, _CAPTIONS.items(), shown, strict=True):
        panel.imshow(np.abs(matrix), cmap=ListedColormap(colours, bad="#ececec"), vmin=0, vmax=3)
        panel.set(title=name, xlabel=caption, xticks=[], yticks=[])
        panel.grid(visible=False)
    axes[2].text(11.5, 11.5, "their product", ha="center", va="center", fontsize=8)
    axes[5].axhline(7.5, color="black", lw=1.5)
    return figure


def pareto(rows: pd.DataFrame, dataset: str) -> Figure:
    """Metric minus dense (mean and sd over seeds) against what is left of six costs.

    `rows` of `overview.settings_table`; combinations are left out. The line joins the settings
    that no smaller one beats.
    """
    single = rows[(rows.method != "dense") & rows.difference.notna()]
    part = look.select(single, f"costs on {dataset}", dataset=dataset, combined=False)
    factor, _ = tables.UNITS[part.metric_name.iloc[0]]
    shares = {cost: 100 * part[cost] for cost in _AXES}
    scores = {"lost": factor * part.difference, "sd": factor * part.difference_sd.fillna(0)}
    part = part.assign(**shares, **scores, label=part.method.map(look.title_of))
    figure, axes = look.canvas(3, (11.5, 7.4), rows=2, sharey=True)
    for panel, cost in zip(axes, _AXES, strict=True):
        measured = part[part[cost].notna()]
        look.points(panel, measured, cost, "lost", "sd", ls="")
        panel.axvline(100, color=look.COLOURS["dense"], ls="--", lw=1)
        panel.set_xscale("log", subs=[])
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_yscale("symlog", linthresh=1)
        panel.set_yticks(ticks := [-50, -20, -10, -5, -2, -1, -0.5, -0.2, 0, 0.2], map(str, ticks))
        look.frame(panel, part, "lost", 0)
        best = frontier(measured[measured.lost > panel.get_ylim()[0]], cost)
        panel.plot(cost, "lost", data=best, color="0.35", lw=1, zorder=1, label="front")
        panel.set_xlabel(f"{COSTS[cost]}, % of dense")
    for panel in (axes[0], axes[3]):
        panel.set_ylabel("minus dense, points (mean and sd)")
    figure.suptitle(f"{look.place_of(part)}: what is lost against what is left")
    look.legend(figure, "outside lower center", columns=5)
    return figure


def frontier(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The rows that lose less than every row of smaller or equal `cost`, smallest first."""
    ordered = rows.sort_values([cost, "difference"], ascending=[True, False])
    before = ordered.difference.cummax().shift(fill_value=-np.inf)
    return ordered[ordered.difference > before]


def verdicts(rows: pd.DataFrame) -> Figure:
    """What came out of each claim of each paper: a square for each net that it was tested on.

    `rows` of `overview.verdicts`; a claim that was not tested has one square, which says why.
    """
    known = rows.assign(verdict=rows.verdict.where(rows.verdict.isin([*_VERDICTS]), "not tested"))
    groups = [*known.groupby(["paper", "claim"], sort=False)]
    figure, (axes,) = look.canvas(size=(7, 0.22 * len(groups) + 1.2))
    most, drawn = 1, set()
    for y, (_, claim) in enumerate(groups):
        tested = [v for v in claim.verdict if v in OUTCOMES]
        shown = sorted(tested or {min(claim.verdict, key=[*_VERDICTS].index)})
        colours = [_VERDICTS[verdict] for verdict in shown]
        axes.scatter(range(len(shown)), [y] * len(shown), s=110, c=colours, marker="s")
        most, drawn = max(most, len(shown)), drawn | {*shown}
    papers = [card(paper).short or card(paper).title for (paper, _), _ in groups]
    heads = [p if p != before else "" for before, p in zip(["", *papers], papers, strict=False)]
    names = [
        f"{head}   {claim.replace('_', ' ')}"
        for head, ((_, claim), _) in zip(heads, groups, strict=True)
    ]
    axes.set_yticks(range(len(groups)), names)
    axes.set(xlim=(-0.5, max(most, 5) - 0.5), xticks=[], xlabel="nets that a claim is tested on")
    axes.invert_yaxis()
    axes.grid(visible=False)
    for name in (name for name in _VERDICTS if name in drawn):
        axes.scatter([], [], s=80, c=_VERDICTS[name], marker="s", label=name)
    look.legend(figure, "outside upper center", columns=6)
    return figure


def classes(drops: pd.DataFrame) -> Figure:
    """Which classes pay for the pruning: `overview.class_drops`, a panel for each data set."""
    datasets = drops.dataset.unique()
    figure, axes = look.canvas(len(datasets), (5.5 * len(datasets), 4.2))
    for panel, name in zip(axes, datasets, strict=True):
        part = drops[drops.dataset == name]
        grid = 100 * part.pivot_table("drop", "method", "class", sort=False)
        grid.index = grid.index.map(look.title_of)
        most = float(grid.abs().max().max()) or 1.0
        image = panel.imshow(grid, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        panel.set_xticks(range(grid.shape[1]), grid.columns)
        panel.set_yticks(range(len(grid)), grid.index)
        panel.set(title=tables.datasets_title(name), xlabel="class")
        panel.grid(visible=False)
        figure.colorbar(image, ax=panel, label="minus dense, points")
    return figure
