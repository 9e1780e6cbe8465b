"""Figures, drawn from the tables and the runs' arrays: their look, and what several papers draw.

What one paper's notebook alone draws is in `papers`, what compares the five in `overview`. Figures
raise `InputError` ("figure = ...") where no run is done that they would show.
"""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from prunestudy import methods, models
from prunestudy.errors import InputError
from prunestudy.papers import Card
from prunestudy.study import tables

# Colour and marker of a method in every figure: dots for the papers' own methods only.
_LOOK = {
    "dense": ("#4d4d4d", "x"),
    "sparse_gates": ("#0173b2", "o"),
    "force": ("#029e73", "o"),
    "gdp": ("#d55e00", "o"),
    "magnitude_attention": ("#cc78bc", "o"),
    "component_aware": ("#56b4e9", "o"),
    "gradual_magnitude": ("#de8f05", "s"),
    "group_l2": ("#882255", "^"),
    "taylor_channels": ("#117733", ">"),
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
_SHARP = 1.5
_NAMES = {"%": "accuracy", " dB": "PSNR"}


def style() -> None:
    """Set the study's look: whole tables, and figures with their size and alternative text."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell and "image/png" in shell.display_formatter.formatters:
        # It sets formatters of its own the first time it is imported: let it, then replace them.
        import matplotlib_inline.backend_inline  # noqa: F401

        shell.display_formatter.formatters["image/png"].for_type(Figure, shown)
    for whole in ("max_colwidth", "max_rows", "max_columns"):
        pd.set_option(f"display.{whole}", None)
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    mpl.rcParams.update({"figure.dpi": 110, "savefig.dpi": 160, "figure.constrained_layout.use": 1})
    mpl.rcParams.update({"legend.fontsize": 8, "axes.titlesize": 10, "figure.titlesize": 10})


def shown(figure: Figure) -> tuple[bytes, dict[str, object]] | None:
    """`figure` for a notebook: a PNG at `_SHARP` times the pixels, and its size and `alt_text`."""
    from IPython.core.pylabtools import print_figure

    if not (png := print_figure(figure, dpi=_SHARP * figure.dpi)):
        return None  # of an empty figure there is nothing
    width, height = (round(side / _SHARP) for side in Image.open(io.BytesIO(png)).size)
    return with_palette(png), {"width": width, "height": height, "alt": alt_text(figure)}


def as_png(figure: Figure) -> bytes:
    """`figure` as a PNG file: the same figure gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return with_palette(out.getvalue())


def with_palette(png: bytes, colours: int = 256) -> bytes:
    """`png` in so many colours: half of the bytes, of files that are tracked."""
    picture, out = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(colours, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


def alt_text(figure: Figure) -> str:
    """What the figure shows, in words: titles, axes, and what the legends name."""
    parts = [figure.get_suptitle()]
    for axes in figure.axes:
        against = " against ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
        parts.append(": ".join(filter(None, (axes.get_title(), against))))
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    parts += [", ".join(text.get_text() for text in each.get_texts()) for each in legends if each]
    return ". ".join(dict.fromkeys(" ".join(part.split()) for part in parts if part))


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
    """Net and data set of `rows`, which share them: "LeNet-5 on MNIST"."""
    return f"{models.title(rows.model.iloc[0])} on {tables.datasets_title(rows.dataset.iloc[0])}"


def select(table: pd.DataFrame, figure: str, **where: Any) -> pd.DataFrame:
    """Rows with the values `where`, of the device that has most; `InputError` if there is none."""
    table = table[(table[[*where]] == pd.Series(where)).all(axis=1)]
    if table.empty:
        raise InputError(f"figure = {figure}: no finished run")
    return table[table["device"] == table["device"].mode()[0]]


def points(axes: Axes, rows: pd.DataFrame, x: str, y: str, sd: str, **options: Any) -> None:
    """Points with error bars, a line per `label` in the look of its `method`; palette's order."""
    rows = rows.sort_values("method", key=lambda names: names.map([*COLOURS].index), kind="stable")
    for label, line in rows.groupby("label", sort=False):
        colour, marker = _LOOK[line.method.iloc[0]]
        own = {"color": colour, "marker": marker, "ms": 7 if marker == "o" else 6, "capsize": 2}
        own |= {"ls": line.ls.iloc[0]} if "ls" in line else {}
        own |= {"mfc": "none"} if own.get("ls") == "--" else {}
        axes.errorbar(x, y, sd, data=line.sort_values(x), label=label, **(own | options))


def histograms(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, str]]],
    top: float,
    xlabel: str,
    ylabel: str,
    **options: Any,
) -> Figure:
    """Equal bins from 0 to `top`: title -> label -> counts, colour; the first one is filled."""
    figure, axes = canvas(len(panels), (3.3 * len(panels) + 0.6, 3.2), sharey=True)
    for panel, (title, counted) in zip(axes, panels.items(), strict=True):
        first = next(iter(counted))
        edges = np.linspace(0, top, len(counted[first][0]) + 1)
        for label, (counts, colour) in counted.items():
            look = {"color": colour, "label": label, "fill": label == first, "lw": 1.8}
            panel.stairs(counts / counted[first][0].sum(), edges, **look)
        panel.set(title=title, xlabel=xlabel, **options)
    axes[0].set_ylabel(ylabel)
    if axes[0].get_yscale() == "log":  # a range of its own makes equal bars look far apart
        axes[0].set_ylim(bottom=min(1e-3, axes[0].get_ylim()[0]))
    if len(counted) > 1:
        legend(figure, "outside upper center", columns=len(counted))
    return figure


def legend(figure: Figure, where: str = "outside right upper", columns: int = 1) -> None:
    """One legend beside all panels; what several of them show is named once."""
    named = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for pair in named for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles, loc=where, ncols=columns, handlelength=3)


def metric_against_target(
    summary: pd.DataFrame, paper: Card, model: str, dataset: str, kind: str = "sparsity"
) -> Figure:
    """Mean metric and sd against the share kept, beside the dense net and published numbers."""
    where = {"model": model, "dataset": dataset, "variant": "", "target_kind": kind}
    rows = select(summary, f"{model} on {dataset}", **where)
    factor, unit = tables.UNITS[metric := rows.metric_name.iloc[0]]
    least, most = (rows.groupby("method").n.transform(end).map(str) for end in ("min", "max"))
    seeds = least.where(least == most, least + " to " + most)
    rows = rows.assign(
        kept=100 * (1 - (rows.sparsity if kind == "sparsity" else rows.target)),
        value=factor * rows.metric,
        sd=factor * rows.metric_sd.fillna(0),
        label=rows.method.map(title_of) + " (n = " + seeds + ")",
    )
    # Side by side, so that bars at one share do not hide each other.
    order = rows.method.map({name: k for k, name in enumerate(rows.method.unique())})
    rows = rows.assign(kept=rows.kept * 1.02 ** (order - order.mean()))
    figure, (axes,) = canvas(size=(6.8, 4.4))
    points(axes, rows, "kept", "value", "sd")
    dense = factor * rows.dense_metric[rows.n.idxmax()]  # of the setting of most seeds
    axes.axhline(dense, color=COLOURS["dense"], ls="--", lw=1, label="dense")
    # Random pruning, where it fails, would flatten the others.
    shown, least = rows[rows.method != "random"], rows.loc[rows.value.idxmin()]
    values = [*(shown.value - shown.sd), *(shown.value + shown.sd), dense]
    margin = max(0.1 * (max(values) - min(values)), 0.05)
    axes.set_ylim(min(values) - margin, max(values) + min(margin, 0.5))
    if least.value < min(values) - margin:
        label = f"(below the frame: {title_of(least.method)}, down to {least.value:.3g})"
        axes.plot([], [], " ", label=label)
    for number in paper.published:
        place = (number.model, number.dataset, number.target_kind, number.metric)
        if place == (model, dataset, kind, metric) and number.kept:
            name = number.method
            name = title_of(name) if name in _LOOK else name.replace("_", " ")
            name = name.removesuffix(" (ours)")
            star = {"ms": 14, "color": "black", "label": f"{name}, published [{number.mark}]"}
            axes.plot(100 * number.kept, factor * number.value, "*", zorder=5, **star)
    ticks = sorted({round(100 * (1 - target), 3) for target in rows.target})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=f"{methods.TARGETS[kind]} kept", ylabel=f"test {_NAMES[unit]}, {unit.strip()}")
    axes.set_title(f"{place_of(rows)}: mean and sd over seeds")
    legend(figure, "outside lower center", columns=2)
    return figure


def variants(summary: pd.DataFrame, method: str) -> Figure:
    """Difference to dense of `method`'s variants, with 95% intervals, where the first one is."""
    ours = summary[summary.method == method]
    first = select(ours[ours.variant != ""], f"variants of {method}").iloc[0]
    keys = ["model", "dataset", "target_kind", "target", "device"]
    rows = ours[(ours[keys] == first[keys]).all(axis=1)].sort_values("difference")
    lost = rows.diverged.map(lambda count: f" ({count} diverged)" if count else "")
    factor, unit = tables.UNITS[first.metric_name]
    middle, low, high = (factor * rows[f"difference{end}"] for end in ("", "_low", "_high"))
    figure, (axes,) = canvas(size=(7, 0.45 * len(rows) + 1.4))
    labels = rows.variant.replace("", "our reading") + ", n = " + rows.n.map(str) + lost
    look = {"fmt": "o", "color": COLOURS[method], "capsize": 3}
    axes.errorbar(middle, labels, xerr=[middle - low, high - middle], **look)
    axes.axvline(0, color="black", ls="--", lw=1)
    if max(-low.min(), high.max()) > 1:
        axes.set_xscale("symlog", linthresh=1)
        least, most = axes.get_xlim()
        ticks = (sign * size for size in (0, 0.5, 1, 2, 5, 10, 20, 50) for sign in (-1, 1))
        axes.set_xticks(sorted({tick for tick in ticks if least <= tick <= most}))
        axes.xaxis.set_major_formatter("{x:g}")
    words = "points" if unit == "%" else "dB"
    axes.set(xlabel=f"{_NAMES[unit]} minus dense, {words} (mean and 95% interval)")
    removed = tables.removed(first.target, first.target_kind)
    axes.set_title(f"{place_of(rows)}, {removed} removed")
    return figure
