"""Figures that compare the five papers."""

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from prunestudy.methods import TARGETS
from prunestudy.papers import card
from prunestudy.study import figures as look
from prunestudy.study import tables
from prunestudy.study.overview import COSTS, OURS
from prunestudy.study.statistics import OUTCOMES

_CAPTIONS = {
    "dense": "darker: larger",
    "sparse_gates": "2016: single weights,\nby gates that train",
    "force": "2017: two thin layers,\nfilters pulled together",
    "gdp": "2021: whole channels,\nby gates that polarise",
    "magnitude_attention": "2023: single weights,\nby size, while they train",
    "component_aware": "2025: whole channels,\na share of each part",
}
_VERDICTS = {
    "confirmed": "#029e73",
    "undecided": "#d9c77c",
    "contradicted": "#d55e00",
    "by construction": "#7fb3d5",
    "not testable here": "#b0b0b0",
    "not tested": "#ececec",
}
# What is drawn of the costs, and the controls beside the papers' methods: seven series in all.
_AXES = ("time_b1", "bytes")
_TICKS = (2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100)
_LOST = (-50, -20, -10, -5, -3, -2, -1, -0.5, -0.2, 0, 0.2, 0.5, 1, 2, 5)
_CONTROLS = ("gradual_magnitude", "group_l2")
_AROUND = ((1.8, 0.4), (-1.8, 0.4), (1.8, -0.4), (-1.8, -0.4), (0, 1), (0, -1))
# Where a point's label may stand, from the nearest on, and the room that one takes; in points.
_OFFSETS = np.array([(x * n, y * n) for n in (12, 18, 26) for x, y in _AROUND])
_ROOM = np.array([23, 8])


def five_ways(
    layers: Mapping[str, np.ndarray], left: float, figure: Figure | None = None
) -> Figure:
    """What each method leaves of one trained layer, at a share `left` of the net; grey is gone.

    `layers`: the dense one, then `overview.layer_left` by method. An earlier `figure` is redrawn.
    """
    figure = figure or look.canvas(len(layers), (13.4, 3.2))[0]
    colours = ListedColormap(plt.get_cmap("GnBu")(np.linspace(0.35, 1, 64)), bad="#ececec")
    dense = next(iter(layers.values()))
    most = np.quantile(np.abs(dense), 0.98)
    for panel, (name, matrix) in zip(figure.axes, layers.items(), strict=True):
        panel.clear()
        panel.imshow(np.abs(matrix), cmap=colours, vmin=0, vmax=most)
        share = np.isfinite(matrix).sum() / dense.size
        title = look.title_of(name).removesuffix(" (ours)")
        panel.set(xlabel=_CAPTIONS[name], xticks=[], yticks=[])
        panel.set_title(f"{title}: {share:.0%}" if name != "dense" else title)
        panel.grid(visible=False)
        if matrix.shape != dense.shape:  # two factors
            middle = len(matrix) - len(dense) / 2
            panel.text(middle, middle, "their product", ha="center", va="center", fontsize=8)
    figure.suptitle(
        f"One layer. Each method keeps {left:.0%} of the net; above: what it keeps of this layer"
    )
    return figure


def pareto(rows: pd.DataFrame, dataset: str) -> Figure:
    """Metric minus dense (mean and sd) of `overview.settings_table` against time and bytes.

    Of the papers' methods and two controls. The line joins what no smaller one beats.
    """
    single = rows[rows.method.isin([*OURS, *_CONTROLS]) & rows.difference.notna()]
    part = look.select(single, f"costs on {dataset}", dataset=dataset, combined=False)
    factor, _ = tables.UNITS[part.metric_name.iloc[0]]
    part = part.assign(
        **{cost: 100 * part[cost] for cost in _AXES},
        lost=factor * part.difference,
        sd=factor * part.difference_sd.fillna(0),
        label=part.method.map(look.title_of),
    )
    measured = [cost for cost in _AXES if part[cost].notna().any()]
    figure, axes = look.canvas(len(measured), (5.2 * len(measured), 4.8), sharey=True)
    for panel, cost in zip(axes, measured, strict=True):
        seen = part[part[cost].notna()]
        look.points(panel, seen, cost, "lost", "sd", ls="")
        panel.set_xscale("log")
        panel.xaxis.set_minor_locator(NullLocator())
        wide = seen[cost].max() > 3 * seen[cost].min()
        panel.xaxis.set_major_locator(FixedLocator(_TICKS) if wide else MaxNLocator(6))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.margins(x=0.1)
        panel.set_yscale("symlog", linthresh=np.clip(3 * part.lost.abs().median(), 0.1, 1))
        panel.set_yticks(_LOST, map("{:g}".format, _LOST))
        panel.axhline(0, color=look.COLOURS["dense"], ls="--", lw=1, label="dense")
        panel.set_ylim(1.1 * (part.lost - part.sd).min(), max(0, *(part.lost + part.sd)) + 0.03)
        front = {"color": "0.35", "lw": 1, "zorder": 1, "label": "front: no cheaper one is better"}
        panel.plot(cost, "lost", data=frontier(seen, cost), **front)
        panel.set_xlabel(f"{COSTS[cost]}, % of dense")
    axes[0].set_ylabel("accuracy minus dense, points (mean and sd)")
    figure.suptitle(f"{look.place_of(part)}: what is lost against what is left")
    look.legend(figure, "outside lower center", columns=5)
    figure.draw_without_rendering()  # says where the points lie
    for panel, cost in zip(axes, measured, strict=True):
        _name_shares(panel, part[part[cost].notna()], cost)
    return figure


def _name_shares(panel: Axes, rows: pd.DataFrame, cost: str) -> None:
    """Write the share removed, and of what, beside each point: where there is room, if there is."""
    points = 72 / panel.figure.dpi
    places = points * panel.transData.transform(rows[[cost, "lost"]].to_numpy())
    taken, (low, high) = [*places], points * panel.bbox.get_points()
    for row, place in zip(rows.itertuples(), places, strict=True):
        free = [min(np.abs((place + o - t) / _ROOM).max() for t in taken) for o in _OFFSETS]
        ends = [(place + o - _ROOM / 2, place + o + _ROOM / 2) for o in _OFFSETS]
        inside = [(low < left).all() and (right < high).all() for left, right in ends]
        offset = _OFFSETS[int(np.argmax(np.minimum(free, 1) * inside))]
        taken.append(place + offset)
        near = {"xytext": offset, "textcoords": "offset points", "ha": "center", "va": "center"}
        near |= {"fontsize": 7, "color": look.COLOURS[row.method]}
        near |= {"arrowprops": {"arrowstyle": "-", "lw": 0.4, "color": near["color"]}}
        count = TARGETS[row.target_kind][0].lower()
        panel.annotate(f"{row.target:.0%} {count}", (getattr(row, cost), row.lost), **near)


def frontier(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The rows that lose less than every row of smaller or equal `cost`, smallest first."""
    ordered = rows.sort_values([cost, "difference"], ascending=[True, False])
    before = ordered.difference.cummax().shift(fill_value=-np.inf)
    return ordered[ordered.difference > before]


def verdicts(rows: pd.DataFrame) -> Figure:
    """`overview.verdicts`: a square for each net that a claim was tested on, or one why not."""
    known = rows.assign(verdict=rows.verdict.where(rows.verdict.isin([*_VERDICTS]), "not tested"))
    claims, papers = known.groupby(["paper", "claim"], sort=False), known.paper.unique()
    texts = {key: textwrap.fill(claim.says.iloc[0], 125) for key, claim in claims}
    rows_of = len(papers) + sum(1 + 0.6 * text.count("\n") for text in texts.values())
    figure, (axes,) = look.canvas(size=(8.6, 0.24 * rows_of + 1))
    counts, y = dict.fromkeys(_VERDICTS, 0), 0
    tested = known[known.verdict.isin(OUTCOMES)].groupby(["paper", "claim"]).size()
    most = max((*tested, 1))
    for (name, key), claim in claims:
        if name in papers:  # its first claim
            axes.text(0, y, card(name).short or card(name).title, weight="bold", va="center")
            papers, y = papers[papers != name], y + 1
        tested = [verdict for verdict in claim.verdict if verdict in OUTCOMES]
        shown = sorted(tested or {min(claim.verdict, key=[*_VERDICTS].index)})
        colours = [_VERDICTS[verdict] for verdict in shown]
        more = 0.6 * texts[name, key].count("\n")  # lines above the first
        y += more / 2
        axes.scatter(range(len(shown)), [y] * len(shown), s=90, c=colours, marker="s")
        axes.text(most, y, texts[name, key], va="center", fontsize=8)
        counts = counts | {each: counts[each] + shown.count(each) for each in shown}
        y += 1 + more / 2
    axes.set(xlim=(-0.5, 30), ylim=(y, -1))
    axes.axis("off")
    for name in filter(counts.get, counts):
        label = f"{name}: {counts[name]}"
        axes.scatter([], [], s=80, c=_VERDICTS[name], marker="s", label=label)
    figure.suptitle(
        f"{len(claims)} claims, {sum(counts.values())} squares: "
        "one for each net with a verdict, one where there is none"
    )
    look.legend(figure, "outside lower center", columns=3)
    return figure


def classes(drops: pd.DataFrame) -> Figure:
    """Which classes pay for the pruning: `overview.class_drops`, a panel for each data set."""
    datasets = drops.dataset.unique()
    most = 100 * float(drops["drop"].abs().max()) or 1.0
    figure, axes = look.canvas(len(datasets), (6.2 * len(datasets), 2.9))
    for panel, name in zip(axes, datasets, strict=True):
        part = drops[drops.dataset == name]
        grid = 100 * part.pivot_table("drop", "method", "class", sort=False)
        grid.index = grid.index.map(look.title_of)
        panel.imshow(grid, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        for (y, x), value in np.ndenumerate(grid.to_numpy()):
            white = "white" if abs(value) > 0.6 * most else "black"
            text = f"{value:+.1f}" if abs(value) >= 0.05 else "0.0"
            panel.text(x, y, text, ha="center", va="center", fontsize=7, color=white)
        panel.set_xticks(range(grid.shape[1]), grid.columns)
        panel.set_yticks(range(len(grid)), grid.index)
        panel.set(title=f"{tables.datasets_title(name)}: accuracy minus dense, points, by class")
        panel.set_xlabel("class")
        panel.grid(visible=False)
    return figure
