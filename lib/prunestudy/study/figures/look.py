"""How the study's figures look, and the shapes that many of them share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from prunestudy import methods
from prunestudy.errors import InputError
from prunestudy.study import tables
from prunestudy.study.figures.inline import show_well
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store
from prunestudy.study.settings import RunSettings

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
_LONGEST = 60  # characters of names that fit side by side under an axis


def style() -> None:
    """Set the study's look for figures."""
    show_well()
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    mpl.rcParams.update({"figure.dpi": 110, "savefig.dpi": 160, "figure.constrained_layout.use": 1})


def save(figure: Figure, store: Store, name: str) -> Path:
    """Write `figure` into the profile's figures folder; return its path."""
    return save_to(figure, store.folder / "figures", name)


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


def of(method: str, **options: Any) -> dict[str, Any]:
    """Colour, marker and label of `method`, and `options` that are put over them."""
    own = {"color": COLOURS[method], "marker": MARKERS[method], "label": title_of(method)}
    return own | options


def in_order(names: pd.Series) -> list[str]:
    """The methods among `names`, in the order of the palette."""
    return [method for method in COLOURS if method in set(names)]


def place_of(rows: pd.DataFrame) -> str:
    """Net and data set of `rows`, which share them: "lenet5 on MNIST"."""
    return f"{rows.model.iloc[0]} on {tables.datasets_title(rows.dataset.iloc[0])}"


def require_rows(rows: Any, figure: str, why: str = "no finished run") -> None:
    """Raise `InputError` if there is nothing to draw."""
    if not len(rows):
        raise InputError(f"figure = {figure}: {why}")


def select(
    table: pd.DataFrame, figure: str, why: str = "no finished run", **where: Any
) -> pd.DataFrame:
    """The rows whose columns are as in `where`, of the device that has most of them.

    Runs of two devices are not drawn as one line. Raises `InputError` if there is no row.
    """
    for name, value in where.items():
        table = table[table[name] == value]
    require_rows(table, figure, why)
    return table[table["device"] == table["device"].mode()[0]]


def finished(
    store: Store, planned: Sequence[Planned], wanted: Callable[[Planned], bool]
) -> Iterator[tuple[RunSettings, dict[str, Any]]]:
    """Settings and records of the runs that are done and `wanted`, each run once."""
    chosen = {item.settings.run: item.settings for item in planned if wanted(item)}
    for settings in chosen.values():
        record = store.read(settings)
        if record and record["status"] == "done":
            yield settings, record


def log_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Make `axis` logarithmic, in plain numbers: those of `ticks` that lie within its limits."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    inside = [tick for tick in ticks if low <= tick <= high]
    axis.set_ticks(inside, [f"{tick:g}" for tick in inside])
    axis.axes.minorticks_off()


def plain_ticks(axis: Axis) -> None:
    """Write the numbers of a logarithmic axis as 0.1, 1, 10."""
    axis.set_major_formatter("{x:g}")


def legend_beside(axes: Axes, title: str | None = None) -> None:
    """Put the legend to the right of the panel."""
    axes.legend(title=title, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def legend_of_all(figure: Figure, where: str, columns: int) -> None:
    """One legend for all panels outside of them; what several panels show is named once."""
    named = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for pair in named for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles, loc=where, ncols=columns, fontsize=8)


def histogram(axes: Axes, counts: np.ndarray, edges: np.ndarray, **look: Any) -> None:
    """Draw counts between `edges` as shares of their sum."""
    axes.stairs(counts / max(counts.sum(), 1), edges, **look)


def bars(table: pd.DataFrame, palette: Mapping[str, Any] | str, width: float) -> Axes:
    """Grouped bars: mean and sd of the third column by the first (groups) and second (colours)."""
    _, (axes,) = canvas(size=(width, 3.6))
    group, colour, value = table.columns
    options = {"palette": palette, "saturation": 1, "errorbar": "sd", "err_kws": {"lw": 1}}
    sns.barplot(table, x=group, y=value, hue=colour, ax=axes, **options)
    axes.set_xlabel("")
    if sum(len(name.partition("\n")[0]) for name in table[group].unique()) > _LONGEST:
        axes.tick_params(axis="x", rotation=90, labelsize=7)
    return axes


def cut_off(axes: Axes, values: pd.Series, where: str = "top") -> None:
    """Say so, at the top or bottom, where some of `values` lie below the frame."""
    if values.min() < axes.get_ylim()[0]:
        height = {"top": 0.985, "bottom": 0.02}[where]
        place = {"transform": axes.transAxes, "va": where, "fontsize": 7}
        axes.text(0.01, height, "values below the frame are cut off", **place)
