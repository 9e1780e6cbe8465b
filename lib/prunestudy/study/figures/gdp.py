"""Figures of GDP."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prunestudy.papers import Card
from prunestudy.study import tables
from prunestudy.study.figures import bars_by_method, look
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store

_LINES = 60  # gates drawn of a group


def gate_paths(store: Store, run: str, most: int = 4) -> Figure:
    """Gates of the largest dependency groups step by step, and the cost that they leave."""
    arrays, metrics = store.arrays(run), store.load(run)["metrics"]
    steps, paths = arrays["gate_steps"], arrays["gate_paths"].astype(float)
    names, group_of = list(metrics["channels"]), arrays["gate_groups"]
    sizes = np.bincount(group_of)
    shown = sorted(np.argsort(-sizes, kind="stable")[:most])
    count = len(shown) + 1
    figure, axes = look.canvas(count, (2.7 * count, 3.1), sharey=True, sharex=True)
    for panel, group in zip(axes, shown, strict=False):
        columns = np.flatnonzero(group_of == group)
        for column in columns[:: -(-len(columns) // _LINES)]:
            kept = paths[-1, column] > 0
            colour = look.COLOURS["gdp"] if kept else "0.6"
            panel.plot(steps, paths[:, column], color=colour, lw=0.7, alpha=0.7, zorder=1 + kept)
        left = metrics["channels"][names[group]]
        panel.set_title(f"{names[group]}: {left} of {sizes[group]}")
    soft, hard = arrays["cost_path"]
    axes[-1].plot(steps, hard, color="black", label="open channels")
    axes[-1].plot(steps, soft, color=look.COLOURS["gdp"], label="soft gates")
    axes[-1].set_title("cost, share of dense")
    axes[-1].legend(fontsize=7)
    for panel in axes:
        panel.axvline(metrics["met_at"] * (steps[-1] + 1), color="black", ls=":", lw=1)
        panel.set_xlabel("step")
    axes[0].set_ylabel("gate g")
    return figure


def final_gates(store: Store, runs: dict[str, str]) -> Figure:
    """Histogram of the gates before removal, one panel per method (name -> run).

    GDP's at the end; those of hard concrete (at test time) before they are thresholded.
    """
    figure, axes = look.canvas(len(runs), (4 * len(runs), 3), sharey=True)
    for panel, (method, run) in zip(axes, runs.items(), strict=True):
        gates = store.arrays(run)["final_gates"].astype(float)
        panel.hist(gates, np.linspace(0, 1, 41), color=look.COLOURS[method])
        between = ((gates > 0) & (gates <= 0.5)).mean()
        panel.set(title=f"{look.title_of(method)}: {between:.0%} in (0, 0.5]", xlabel="gate")
        panel.set_yscale("symlog", linthresh=1)
        look.plain_ticks(panel.yaxis)
    axes[0].set_ylabel("channels")
    return figure


def channels_kept(store: Store, planned: Sequence[Planned], target: float, **where: str) -> Figure:
    """Channels kept of each group at `target`, by method: mean and sd over seeds.

    `where` are settings of the runs (model, dataset) and the target's `kind`. Raises `InputError`
    without runs.
    """
    axes = bars_by_method(store, planned, "channels", target, float, where)
    removed = tables.removed(target, where["kind"])
    axes.set(ylabel="channels kept", title=f"{where['model']}, {removed} removed: channels kept")
    return axes.figure


def accuracy_against_latency(runs: pd.DataFrame, model: str, dataset: str, batch: int) -> Figure:
    """Mean metric over seeds against the measured speed-up of seed 0, one point per target.

    Raises `InputError` if no net was timed.
    """
    name = f"latency of {model} on {dataset}"
    rows = look.select(runs, name, model=model, dataset=dataset, variant="")
    rows = rows.assign(
        mean=rows.groupby(["method", "target_kind", "target"]).metric.transform("mean")
    )
    timed = rows[rows[f"latency_b{batch}_ms"].notna() & rows.target.notna()]
    look.require_rows(timed, name, "no net was timed")
    factor, unit = tables.UNITS[timed.metric_name.iloc[0]]
    figure, (axes,) = look.canvas(size=(7.4, 4))
    for method, points in timed.groupby("method"):
        gain = points[f"dense_latency_b{batch}_ms"] / points[f"latency_b{batch}_ms"]
        axes.scatter(gain, factor * points["mean"], s=45, **look.of(method))
    axes.axhline(factor * rows.dense_metric.mean(), color=look.COLOURS["dense"], ls="--", lw=1)
    axes.axvline(1, color="black", lw=0.8)
    metric = "accuracy, %" if unit == "%" else f"metric,{unit}"
    axes.set(xlabel=f"measured speed-up at batch {batch}, times", ylabel=f"test {metric}")
    axes.set_title(f"{look.place_of(rows)}: mean over seeds; dashed: dense")
    look.legend_beside(axes)
    return figure


def loss_and_removals(store: Store, runs: dict[str, str]) -> Figure:
    """Training loss step by step (name -> run), and below when GDP closed its channels."""
    figure, (above, below) = look.canvas(1, (8, 4.4), rows=2, sharex=True, height_ratios=[3, 1])
    for method, run in runs.items():
        roughness = store.load(run)["metrics"]["roughness"]
        smooth = pd.Series(store.arrays(run)["loss"]).rolling(10, min_periods=1).mean()
        label = f"{look.title_of(method)}: {roughness:.3f} from step to step"
        above.plot(smooth, color=look.COLOURS[method], lw=1, label=label)
    above.set(ylabel="training loss (mean of 10)", yscale="log")
    above.legend(fontsize=8)
    closed = store.arrays(runs["gdp"])["closed"]
    below.hist(closed[:, 0], bins=60, color=look.COLOURS["gdp"], histtype="stepfilled")
    below.set(xlabel="step", ylabel="channels closed")
    return figure


def reference_rows(card: Card, model: str, dataset: str) -> Figure:
    """What other methods lost on a net, against the share of FLOPs that they cut (published)."""
    rows = [p for p in card.published if (p.model, p.dataset) == (model, dataset)]
    look.require_rows(rows, f"reference rows of {model} on {dataset}", "none in the card")
    figure, (axes,) = look.canvas(size=(5.2, 3.2))
    for row in rows:
        spot = 100 * (1 - row.kept), 100 * (row.value - row.dense)
        axes.plot(*spot, "*", ms=10, color="black")
        name = row.text.split(": ")[1].split(",")[0]
        beside = (5, 4 if spot[1] > 0 else -9)
        axes.annotate(name, spot, beside, textcoords="offset points", fontsize=7)
    axes.axhline(0, color="black", ls="--", lw=1)
    axes.margins(x=0.25, y=0.2)
    axes.set(xlabel="FLOPs cut, %", ylabel="accuracy minus its dense, points")
    axes.set_title(f"{rows[0].text.split(': ')[0]}: other methods, published [{rows[0].mark}]")
    return figure
