"""How the study's figures look, and what they share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunestudy import methods
from prunestudy.errors import InputError
from prunestudy.study import tables
from prunestudy.study.figures.inline import show_well

# Colour and marker of a method in every figure: the papers' own are dots, their controls not.
_LOOK = {
    "dense": ("#4d4d4d", "x"),
    "sparse_gates": ("#0173b2", "o"),
    "force": ("#029e73", "o"),
    "gdp": ("#d55e00", "o"),
    "magnitude_attention": ("#cc78bc", "o"),
    "component_aware": ("#56b4e9", "o"),
    "gradual_magnitude": ("#de8f05", "s"),
    "group_l2": ("#de8f05", "^"),
    "plain_low_rank": ("#de8f05", "P"),
    "uniform": ("#5e3c99", "d"),
    "magnitude": ("#ca9161", "D"),
    "l1_filter": ("#ca9161", "X"),
    "l1": ("#b8a200", "^"),
    "network_slimming": ("#b8a200", "<"),
    "dpf": ("#5e3c99", "P"),
    "hard_concrete": ("#5e3c99", "X"),
    "snip": ("#f781bf", "h"),
    "scratch": ("#f781bf", "p"),
    "random": ("#949494", "v"),
}
COLOURS = {method: colour for method, (colour, _) in _LOOK.items()}


def style() -> None:
    """Set the study's look for figures."""
    show_well()
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    mpl.rcParams.update({"figure.dpi": 110, "savefig.dpi": 160, "figure.constrained_layout.use": 1})
    mpl.rcParams.update({"legend.fontsize": 8, "axes.titlesize": 10, "figure.titlesize": 10})


def save_to(figure: Figure, folder: Path, name: str) -> Path:
    """Write `figure` as PNG into `folder`, without a date: the same figure gives the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    return folder / f"{name}.png"


def canvas(
    columns: int = 1, size: tuple[float, float] = (6.4, 4), rows: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches in the study's look, and its panels row by row."""
    style()
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    return figure, list(axes.flat)


def title_of(method: str) -> str:
    """Name of `method` for people."""
    return methods.method_class(method).title


def place_of(rows: pd.DataFrame) -> str:
    """Net and data set of `rows`, which share them: "lenet5 on MNIST"."""
    return f"{rows.model.iloc[0]} on {tables.datasets_title(rows.dataset.iloc[0])}"


def require_rows(rows: Any, figure: str) -> None:
    """Raise `InputError` if there is nothing to draw."""
    if not len(rows):
        raise InputError(f"figure = {figure}: no finished run")


def select(table: pd.DataFrame, figure: str, **where: Any) -> pd.DataFrame:
    """The rows whose columns are as in `where`, of the device that has most of them.

    Runs of two devices are not drawn as one line. Raises `InputError` if there is no row.
    """
    for name, value in where.items():
        table = table[table[name] == value]
    require_rows(table, figure)
    return table[table["device"] == table["device"].mode()[0]]


def points(axes: Axes, rows: pd.DataFrame, x: str, y: str, sd: str, **options: Any) -> None:
    """Points of columns `x` and `y` with error bars `sd`, one line per `label`.

    Each in the colour and marker of its `method`, in the order of the palette.
    """
    rows = rows.sort_values("method", key=lambda names: names.map([*COLOURS].index), kind="stable")
    for label, line in rows.groupby("label", sort=False):
        colour, marker = _LOOK[line.method.iloc[0]]
        own = {"color": colour, "marker": marker, "ms": 7 if marker == "o" else 6, "capsize": 2}
        own |= {"ls": line.ls.iloc[0]} if "ls" in line else {}
        axes.errorbar(x, y, sd, data=line.sort_values(x), label=label, **(own | options))


def histograms(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, str]]],
    edges: np.ndarray,
    xlabel: str,
    ylabel: str,
    **options: Any,
) -> Figure:
    """Counts between `edges` as shares of a panel's first ones: title -> label -> counts, colour.

    The first are filled, the others are lines over them.
    """
    figure, axes = canvas(len(panels), (3.3 * len(panels) + 0.6, 3.2), sharey=True)
    for panel, (title, shown) in zip(axes, panels.items(), strict=True):
        first = next(iter(shown))
        for label, (counts, colour) in shown.items():
            style = {"color": colour, "label": label, "fill": label == first, "lw": 1.8}
            panel.stairs(counts / shown[first][0].sum(), edges, **style)
        panel.set(title=title, xlabel=xlabel, **options)
    axes[0].set_ylabel(ylabel)
    if len(shown) > 1:
        legend(figure, "outside upper center", columns=len(shown))
    return figure


def frame(axes: Axes, rows: pd.DataFrame, y: str, dense: float) -> None:
    """Limit the y axis so that random pruning, where it fails, does not flatten the others."""
    values = [*rows[y][rows.method != "random"], dense]
    margin = max(0.1 * (max(values) - min(values)), 0.05)
    axes.set_ylim(min(values) - margin, max(values) + min(margin, 0.5))
    axes.axhline(dense, color=COLOURS["dense"], ls="--", lw=1, label="dense")
    if rows[y].min() < min(values) - margin:
        axes.plot([], [], " ", label="(values below the frame are cut off)")


def legend(figure: Figure, where: str = "outside right upper", columns: int = 1) -> None:
    """One legend beside all panels; what several of them show is named once."""
    named = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for pair in named for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles, loc=where, ncols=columns, handlelength=3)
