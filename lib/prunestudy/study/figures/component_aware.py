"""Figures of component-aware pruning with soft coefficients."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from prunestudy import shrink
from prunestudy.errors import InputError
from prunestudy.measure import Constraint
from prunestudy.shrink import ComponentGroup
from prunestudy.study import tables
from prunestudy.study.figures import COLOURS, style
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store

_CONTROLS = {
    "": ("uniform share", COLOURS["uniform"], "s"),
    "one ranking": ("one ranking, group L2", COLOURS["group_l2"], "D"),
    "one ranking, Taylor": ("one ranking, Taylor", COLOURS["l1_filter"], "^"),
    "random": ("random", COLOURS["random"], "v"),
}
_COUPLING = "#d55e00"


def psnr_against_removed(summary: pd.DataFrame, model: str, dataset: str) -> Figure:
    """Mean PSNR over seeds against the share removed: after pruning, and fine-tuned where done.

    Dashed: the same control with components looked at. Raises `InputError` without finished runs.
    """
    style()
    rows = summary[(summary.model == model) & (summary.dataset == dataset)]
    rows = rows[rows.target_kind == "parameters"]
    if rows.empty:
        raise InputError(f"figure = {model} on {dataset}: no finished run with a target")
    tuned = rows.variant.str.contains("fine-tuned")
    panels = {"after pruning": rows[~tuned], "fine-tuned": rows[tuned]}
    panels = {title: part for title, part in panels.items() if len(part)}
    size = (1 + 4.3 * len(panels), 4.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for panel, (title, part) in zip(axes[0], panels.items(), strict=True):
        for label, wanted, look in _lines():
            suffix = ", fine-tuned" if title == "fine-tuned" else ""
            method, variant = wanted
            line = part[(part.method == method) & (part.variant == (variant + suffix).lstrip(", "))]
            line = line.sort_values("target")
            if len(line):
                sd = line.metric_sd.fillna(0)
                panel.errorbar(100 * line.target, line.metric, sd, capsize=2, label=label, **look)
        panel.axhline(part.dense_metric.mean(), color=COLOURS["dense"], ls=":", lw=1.5)
        panel.set(title=title, xlabel="parameters removed, %")
        panel.set_xticks([100 * t for t in sorted(set(part.target))])
    axes[0][0].set_ylabel("test PSNR, dB (mean and sd)")
    figure.suptitle(f"{model} on {tables.datasets_title(dataset)}; dotted: dense", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _lines() -> list[tuple[str, tuple[str, str], dict[str, Any]]]:
    ours = {"color": COLOURS["component_aware"], "marker": "o", "lw": 2.5, "zorder": 3}
    grid = {"color": "black", "marker": "*", "ls": "", "ms": 9, "zorder": 4}
    lines = [("soft coefficients", ("component_aware", ""), ours)]
    lines.append(("soft coefficients, grid", ("component_aware", "grid"), grid))
    for variant, (label, colour, marker) in _CONTROLS.items():
        look = {"color": colour, "marker": marker, "ms": 4, "lw": 1.2}
        by = (variant + ", by component").lstrip(", ")
        lines.append((label, ("uniform", variant), look))
        lines.append((f"{label}, by component", ("uniform", by), look | {"ls": "--"}))
    return lines


def groups(found: Sequence[ComponentGroup]) -> Figure:
    """The dependency groups by layer; those of a component in its colour, coupling ones in bold."""
    style()
    figure = shrink.draw([each.group for each in found])
    axes, names = figure.axes[0], list(dict.fromkeys(c for each in found for c in each.components))
    palette = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    for label, each in zip(axes.get_yticklabels(), found, strict=True):
        inside = len(each.components) == 1
        label.set_color(palette[each.components[0]] if inside else "black")
        label.set_fontweight("normal" if inside else "bold")
    for label in axes.get_xticklabels():
        label.set_color(palette.get(label.get_text().partition(".")[0], "black"))
    axes.set_title("groups inside one component, and coupling groups (bold)", fontsize=9)
    return figure


def reconstructions(store: Store, runs: Mapping[str, Mapping[float, str]]) -> Figure:
    """Images, the dense net's outputs, then each method's (label -> target -> run) at each share.

    The first method's runs hold the images and the dense outputs.
    """
    style()
    first = store.arrays(next(iter(next(iter(runs.values())).values())))
    rows = [("image", first["shown"]), ("dense", first["output_dense"])]
    targets = sorted({t for by_target in runs.values() for t in by_target})
    for target in targets:
        for label, by_target in runs.items():
            if target in by_target:
                pictures = store.arrays(by_target[target])["output_pruned"]
                rows.append((f"{label}, {target:.0%}", pictures))
    count = len(first["shown"])
    figure, axes = plt.subplots(len(rows), count, figsize=(1 + 0.75 * count, 0.8 * len(rows)))
    for line, (label, pictures) in zip(axes, rows, strict=True):
        for panel, picture in zip(line, pictures, strict=True):
            panel.imshow(picture[0], cmap="gray", vmin=0, vmax=255)
            panel.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def coefficients(store: Store, planned: Sequence[Planned], model: str, dataset: str) -> Figure:
    """Share of each group's channels removed, ours, mean and sd over seeds, by target."""
    style()
    rows = []
    for item in planned:
        s = item.settings
        ours = s.method == "component_aware" and not item.variant and s.recipe.epochs == 0
        record = store.read(s) if ours and (s.model, s.dataset) == (model, dataset) else None
        for row in record["metrics"]["report"] if record else ():
            label = f"{row['group']}\n({row['kind']})"
            rows.append((s.target.value, label, 100 * row["removed"]))
    table = pd.DataFrame(rows, columns=["target", "group", "removed"])
    if table.empty:
        raise InputError(f"figure = coefficients of {model} on {dataset}: no finished run")
    table["parameters removed"] = [f"{t:.0%}" for t in table.target]
    figure, axes = plt.subplots(figsize=(1.5 * table.group.nunique() + 1, 3.6))
    sns.barplot(
        table.sort_values("target", kind="stable"),
        x="group",
        y="removed",
        hue="parameters removed",
        order=list(dict.fromkeys(table.group)),
        palette="flare",
        errorbar="sd",
        err_kws={"lw": 1},
        ax=axes,
    )
    axes.set(xlabel="", ylabel="channels removed, %", ylim=(0, 100))
    axes.set_title(f"coefficients found, {model} on {tables.datasets_title(dataset)}")
    axes.tick_params(axis="x", labelsize=8)
    small = {"fontsize": 7, "title_fontsize": 7}
    axes.legend(title="parameters removed", ncols=5, loc="upper center", **small)
    return figure


def search_cost(store: Store, planned: Sequence[Planned]) -> Figure:
    """Sample passes of both solvers against the number of coefficients, one point a run."""
    style()
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    rows = []
    for item in planned:
        s = item.settings
        record = store.read(s) if s.method == "component_aware" else None
        if record and record["status"] == "done":
            m, grid = record["metrics"], s.params["solver"] == "grid"
            kind = "grid: judged" if grid else "gradient descent"
            rows.append((m["coefficients"], m["search_passes"], kind))
            if grid:
                rows.append((m["coefficients"], m["grid_passes"], "grid: all points"))
    table = pd.DataFrame(rows, columns=["coefficients", "passes", "search"]).drop_duplicates()
    looks = {
        "gradient descent": (COLOURS["component_aware"], "o"),
        "grid: judged": ("0.4", "s"),
        "grid: all points": ("black", "*"),
    }
    for kind, (colour, marker) in looks.items():
        part = table[table.search == kind]
        axes.scatter(part.coefficients, part.passes, 45, colour, marker=marker, label=kind)
    axes.set(yscale="log", xlabel="coefficients", ylabel="sample passes")
    axes.set_xticks(sorted(set(table.coefficients)))
    axes.set_title("what the search costs (forward 1, forward and backward 3)")
    axes.legend(fontsize=8)
    return figure


def latent_space(store: Store, run: str, title: str = "") -> Figure:
    """Latent vectors of validation images before and after pruning, two principal components."""
    style()
    arrays = store.arrays(run)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8))
    for panel, name in zip(axes, ("dense", "pruned"), strict=True):
        points = arrays[f"latent_{name}"].astype(float)
        drawn = panel.scatter(*points.T, 18, arrays["labels"], cmap="tab10", vmin=-0.5, vmax=9.5)
        panel.set(title=f"latent space, {name}", xlabel="first component")
    axes[0].set_ylabel("second component")
    figure.colorbar(drawn, ax=axes, ticks=range(10), label="class")
    figure.suptitle(title, fontsize=10)
    return figure


def refusal(points: pd.DataFrame, limit: Constraint, closest: float) -> Figure:
    """A metric against the share removed, with its limit: what is accepted, and what is not.

    `points` has columns `removed` and the metric's name; `closest` is the largest share that
    holds.
    """
    style()
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    values = points[limit.metric]
    holds = np.array([limit.shortfall(value) <= 0 for value in values])
    axes.plot(100 * points.removed, values, color="0.6", lw=1, zorder=1)
    for good, colour, marker in ((True, "#029e73", "o"), (False, _COUPLING, "X")):
        part, label = points[holds == good], "accepted" if good else "refused"
        spot = 100 * part.removed, part[limit.metric]
        axes.scatter(*spot, 60, colour, marker=marker, label=label, zorder=2)
    for removed, value, good in zip(points.removed, values, holds, strict=True):
        if not good:
            axes.vlines(100 * removed, value, limit.limit, color=_COUPLING, ls=":", lw=1.2)
            text = f"{limit.shortfall(value):.3g} short"
            axes.annotate(
                text,
                (100 * removed, (value + limit.limit) / 2),
                (4, 0),
                textcoords="offset points",
                fontsize=7,
                va="center",
            )
    axes.axhline(limit.limit, color="black", lw=1.2, label=str(limit))
    axes.axvline(100 * closest, color="#029e73", ls="--", lw=1, label=f"closest: {closest:.1%}")
    axes.set(xlabel="parameters removed, %", ylabel=limit.metric)
    axes.set_xlim(0, 100)
    axes.legend(fontsize=8, loc="lower left")
    return figure


def report(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The report per group as bars: what was removed, and what that alone costs in each metric."""
    style()
    table = pd.DataFrame(rows)
    columns = [name for name in table if name.endswith("lost alone")]
    labels = [f"{r.group} ({r.place})" for r in table.itertuples()]
    colours = [_COUPLING if kind == "coupling" else "#0173b2" for kind in table.kind]
    size = (4 + 2.2 * (1 + len(columns)), 1 + 0.4 * len(table))
    figure, axes = plt.subplots(1, 1 + len(columns), figsize=size, sharey=True)
    values = [100 * table.removed, *(table[name] for name in columns)]
    for panel, name, value in zip(axes, ["channels removed, %", *columns], values, strict=True):
        panel.barh(labels, value, color=colours)
        panel.axvline(0, color="black", lw=0.8)
        panel.set_xlabel(name, fontsize=8)
        panel.tick_params(labelsize=8)
    axes[0].invert_yaxis()
    figure.suptitle("per group; coupling groups in orange", fontsize=9)
    return figure
