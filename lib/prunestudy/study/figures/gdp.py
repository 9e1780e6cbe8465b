"""Figures of GDP."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from prunestudy.errors import InputError
from prunestudy.papers import Card
from prunestudy.study import tables
from prunestudy.study.figures import COLOURS, MARKERS, style, title_of
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store

_LINES = 60  # gates drawn of a group


def gate_paths(store: Store, run: str, most: int = 4) -> Figure:
    """Gates of the largest dependency groups step by step, and the cost that they leave."""
    style()
    arrays, metrics = store.arrays(run), store.load(run)["metrics"]
    steps, paths = arrays["gate_steps"], arrays["gate_paths"].astype(float)
    names, of = list(metrics["channels"]), arrays["gate_groups"]
    shown = sorted(np.argsort(-np.bincount(of), kind="stable")[:most])
    figure, axes = plt.subplots(
        1, len(shown) + 1, figsize=(2.7 * (len(shown) + 1), 3.1), sharey=True, sharex=True
    )
    met = metrics["met_at"] * (steps[-1] + 1)
    for panel, group in zip(axes, shown, strict=False):
        columns = np.flatnonzero(of == group)
        columns = columns[:: -(-len(columns) // _LINES)]
        for column in columns:
            kept = paths[-1, column] > 0
            colour = COLOURS["gdp"] if kept else "0.6"
            panel.plot(steps, paths[:, column], color=colour, lw=0.7, alpha=0.7, zorder=1 + kept)
        size, left = int((of == group).sum()), metrics["channels"][names[group]]
        panel.set(title=f"{names[group]}: {left} of {size}", xlabel="step")
    soft, hard = arrays["cost_path"]
    axes[-1].plot(steps, hard, color="black", label="open channels")
    axes[-1].plot(steps, soft, color=COLOURS["gdp"], label="soft gates")
    axes[-1].set(title="cost, share of dense", xlabel="step")
    axes[-1].legend(fontsize=7)
    for panel in axes:
        panel.axvline(met, color="black", ls=":", lw=1)
    axes[0].set_ylabel("gate g")
    return figure


def final_gates(store: Store, runs: dict[str, str]) -> Figure:
    """Histogram of the gates before removal, one panel per method (name -> run).

    GDP's at the end, the drawn gates' (at test time) in the last epoch before they are decided.
    """
    style()
    figure, axes = plt.subplots(1, len(runs), figsize=(4 * len(runs), 3), sharey=True)
    edges = np.linspace(0, 1, 41)
    for panel, (method, run) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        paths, rows = store.arrays(run)["gate_paths"].astype(float), store.history(run)
        deciding = [i for i, row in enumerate(rows) if row["phase"] == "gates"]
        # The epoch at whose end the gates are decided shows them as they were.
        last = paths[-1] if method == "gdp" else paths[max(deciding[-1] - 1, 0)]
        panel.hist(last, edges, color=COLOURS[method])
        between = ((last > 0) & (last <= 0.5)).mean()
        panel.set(title=f"{title_of(method)}: {between:.0%} in (0, 0.5]", xlabel="gate")
        panel.set_yscale("symlog", linthresh=1)
        panel.yaxis.set_major_formatter("{x:g}")
    np.atleast_1d(axes)[0].set_ylabel("channels")
    return figure


def channels_kept(store: Store, planned: list[Planned], target: float, **where: str) -> Figure:
    """Share of each group's channels that is kept at `target`, by method, mean over seeds.

    `where` are settings of the runs (model, dataset), `kind` the target's. `InputError` without
    runs.
    """
    style()
    kind, rows = where.pop("kind"), []
    for item in planned:
        s, aim = item.settings, item.settings.target
        wanted = aim and (aim.kind, aim.value) == (kind, target) and not item.variant
        if not wanted or any(getattr(s, key) != value for key, value in where.items()):
            continue
        record = store.read(s)
        kept = record["metrics"].get("channels", {}) if record else {}
        rows += [(title_of(s.method), s.method, group, count) for group, count in kept.items()]
    if not rows:
        raise InputError(f"figure = channels at {target:g} of {kind}: no finished run")
    table = pd.DataFrame(rows, columns=["method", "name", "group", "channels"])
    groups = table.group.nunique()
    figure, axes = plt.subplots(figsize=(max(6.0, 0.75 * groups + 2.5), 3.6))
    palette = {title_of(name): COLOURS[name] for name in table.name.unique()}
    look = {"palette": palette, "saturation": 1, "errorbar": "sd", "ax": axes}
    sns.barplot(table, x="group", y="channels", hue="method", **look)
    axes.set(ylabel="channels kept", xlabel="", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_title(f"{where['model']}, {tables.removed(target, kind)} removed: channels kept")
    if groups > 4:
        axes.tick_params(axis="x", rotation=60, labelsize=8)
    sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), fontsize=8, title=None)
    return figure


def accuracy_against_latency(runs: pd.DataFrame, model: str, dataset: str, batch: int) -> Figure:
    """Metric over seeds against the measured speed-up of seed 0, one point per target.

    Raises `InputError` if no net was timed.
    """
    style()
    rows = runs[(runs.model == model) & (runs.dataset == dataset) & (runs.variant == "")]
    keys = ["method", "target_kind", "target"]
    mean = rows.groupby(keys).metric.mean()
    timed = rows[rows[f"latency_b{batch}_ms"].notna() & rows.target.notna()]
    if timed.empty:
        raise InputError(f"figure = latency of {model} on {dataset}: no net was timed")
    figure, axes = plt.subplots(figsize=(6.4, 4))
    factor, unit = tables.UNITS[timed.metric_name.iloc[0]]
    for method, points in timed.groupby("method"):
        gain = points[f"dense_latency_b{batch}_ms"] / points[f"latency_b{batch}_ms"]
        height = [factor * mean[tuple(row)] for row in points[keys].itertuples(index=False)]
        look = {"color": COLOURS[method], "marker": MARKERS[method], "s": 45}
        axes.scatter(gain, height, label=title_of(method), **look)
    axes.axhline(factor * rows.dense_metric.mean(), color=COLOURS["dense"], ls="--", lw=1)
    axes.axvline(1, color="black", lw=0.8)
    name = "accuracy, %" if unit == "%" else f"metric,{unit}"
    axes.set(xlabel=f"measured speed-up at batch {batch}, times", ylabel=f"test {name}")
    axes.set_title(f"{model} on {tables.datasets_title(dataset)}: mean over seeds; dashed: dense")
    axes.legend(fontsize=8)
    return figure


def loss_and_removals(store: Store, runs: dict[str, str]) -> Figure:
    """Training loss step by step (name -> run), and below when GDP closed its channels."""
    style()
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 4.4), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    for method, run in runs.items():
        loss, rough = store.arrays(run)["loss"], store.load(run)["metrics"]["roughness"]
        smooth = pd.Series(loss).rolling(10, min_periods=1).mean()
        label = f"{title_of(method)}: {rough:.3f} from step to step"
        above.plot(smooth, color=COLOURS[method], lw=1, label=label)
    above.set(ylabel="training loss (mean of 10)", yscale="log")
    above.legend(fontsize=8)
    closed = store.arrays(runs["gdp"])["closed"]
    below.hist(closed[:, 0], bins=60, color=COLOURS["gdp"], histtype="stepfilled")
    below.set(xlabel="step", ylabel="channels closed")
    return figure


def reference_rows(card: Card, model: str, dataset: str) -> Figure:
    """What other methods lost on a net, against the share of FLOPs that they cut (published)."""
    style()
    rows = [p for p in card.published if (p.model, p.dataset) == (model, dataset)]
    if not rows:
        raise InputError(f"figure = reference rows: none for {model} on {dataset}")
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    for row in rows:
        cut, change = 100 * (1 - row.kept), 100 * (row.value - row.dense)
        axes.plot(cut, change, "*", ms=10, color="black")
        name = row.text.split(": ")[1].split(",")[0]
        axes.annotate(name, (cut, change), (5, 4), textcoords="offset points", fontsize=7)
    axes.axhline(0, color="black", ls="--", lw=1)
    axes.margins(x=0.25, y=0.2)
    axes.set(xlabel="FLOPs cut, %", ylabel="accuracy minus its dense, points")
    axes.set_title(f"{rows[0].text.split(': ')[0]}: other methods, published [{rows[0].mark}]")
    return figure
