"""Figures of component-aware pruning with soft coefficients.

They raise `InputError` ("figure = ...") where no run is done that they would show.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from prunestudy import shrink
from prunestudy.measure import Constraint
from prunestudy.shrink import ComponentGroup
from prunestudy.study import tables
from prunestudy.study.figures import look
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store

_STAGES = {"": "after pruning", "fine-tuned": "fine-tuned"}
# Method and reading to label, colour and marker. Where components are looked at, it is dashed.
_LINES = {
    ("component_aware", ""): ("soft coefficients", look.COLOURS["component_aware"], "o"),
    ("component_aware", "grid"): ("soft coefficients, grid", "black", "*"),
    ("uniform", ""): ("uniform share", look.COLOURS["uniform"], "s"),
    ("uniform", "one ranking"): ("one ranking, group L2", look.COLOURS["group_l2"], "D"),
    ("uniform", "one ranking, Taylor"): ("one ranking, Taylor", look.COLOURS["l1_filter"], "^"),
    ("uniform", "random"): ("random", look.COLOURS["random"], "v"),
}
_BY_COMPONENT = ", by component"
_COUPLING, _GOOD = "#d55e00", "#029e73"


def psnr_against_removed(summary: pd.DataFrame, model: str, dataset: str) -> Figure:
    """Mean PSNR over seeds against the share removed: after pruning, and fine-tuned where done.

    Dashed: the same control, component by component.
    """
    where = {"model": model, "dataset": dataset, "target_kind": "parameters"}
    rows = look.select(summary, f"{model} on {dataset}", "no finished run with a target", **where)
    panels = [(stage, part) for stage, part in rows.groupby("stage") if stage in _STAGES]
    figure, axes = look.canvas(len(panels), (1 + 4.3 * len(panels), 4.4), sharey=True)
    for panel, (stage, part) in zip(axes, panels, strict=True):
        for (method, reading), (label, colour, marker) in _LINES.items():
            ours = method == "component_aware"
            style = {"color": colour, "marker": marker, "ms": 7 if ours else 4, "capsize": 2}
            style |= {"lw": 2.5 if ours else 1.2, "zorder": 3 if ours else 2}
            dashes = {"": "" if reading == "grid" else "-"}
            for more, dash in (dashes if ours else {"": "-", _BY_COMPONENT: "--"}).items():
                wanted = (reading + more).removeprefix(", ")
                line = part[(part.method == method) & (part.reading == wanted)]
                line = line.sort_values("target")
                if len(line):
                    spots = (100 * line.target, line.metric, line.metric_sd.fillna(0))
                    panel.errorbar(*spots, ls=dash, label=label + more, **style)
        panel.axhline(part.dense_metric.mean(), color=look.COLOURS["dense"], ls=":", lw=1.5)
        panel.set(title=_STAGES[stage], xlabel="parameters removed, %")
        panel.set_xticks([100 * target for target in sorted(set(part.target))])
    axes[0].set_ylabel("test PSNR, dB (mean and sd)")
    figure.suptitle(f"{look.place_of(rows)}; dotted: dense", fontsize=10)
    look.legend_of_all(figure, "outside lower center", columns=1 + len(panels))
    return figure


def groups(found: Sequence[ComponentGroup]) -> Figure:
    """The dependency groups by layer; those of a component in its colour, coupling ones in bold."""
    look.style()
    figure = shrink.draw([group.group for group in found])
    axes, names = figure.axes[0], list(dict.fromkeys(c for g in found for c in g.components))
    colours = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    for label, group in zip(axes.get_yticklabels(), found, strict=True):
        inside = len(group.components) == 1
        label.set_color(colours[group.components[0]] if inside else "black")
        label.set_fontweight("normal" if inside else "bold")
    for label in axes.get_xticklabels():
        label.set_color(colours.get(label.get_text().partition(".")[0], "black"))
    axes.set_title("groups inside one component, and coupling groups (bold)", fontsize=9)
    return figure


def reconstructions(store: Store, runs: Mapping[str, Mapping[float, str]]) -> Figure:
    """Images, the dense net's outputs, then each method's (label -> target -> run) at each share.

    The first method's runs hold the images and the dense outputs.
    """
    first = store.arrays(next(iter(next(iter(runs.values())).values())))
    rows = [("image", first["shown"]), ("dense", first["output_dense"])]
    for target in sorted({target for by_target in runs.values() for target in by_target}):
        rows += [
            (f"{label}, {target:.0%}", store.arrays(by_target[target])["output_pruned"])
            for label, by_target in runs.items()
            if target in by_target
        ]
    count = len(first["shown"])
    figure, axes = look.canvas(count, (1 + 0.75 * count, 0.8 * len(rows)), rows=len(rows))
    for line, (label, pictures) in enumerate(rows):
        for panel, picture in zip(axes[line * count :], pictures, strict=False):
            panel.imshow(picture[0], cmap="gray", vmin=0, vmax=255)
            panel.set(xticks=[], yticks=[])
        axes[line * count].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def coefficients(store: Store, planned: Sequence[Planned], model: str, dataset: str) -> Figure:
    """Share of each group's channels that soft coefficients remove, by target."""

    def wanted(item: Planned) -> bool:
        s = item.settings
        here = (s.method, s.model, s.dataset) == ("component_aware", model, dataset)
        return here and not item.variant

    rows = [
        (f"{row['group']}\n({row['kind']})", settings.target.value, 100 * row["removed"])
        for settings, record in look.finished(store, planned, wanted)
        for row in record["metrics"]["report"]
    ]
    look.require_rows(rows, f"coefficients of {model} on {dataset}")
    table = pd.DataFrame(rows, columns=["group", "target", "removed"])
    table = table.sort_values("target", kind="stable")
    table["target"] = [f"{target:.0%}" for target in table.target]
    axes = look.bars(table, "flare", 1.5 * table.group.nunique() + 2)
    axes.set(ylabel="channels removed, %", ylim=(0, 100))
    axes.set_title(f"coefficients found, {model} on {tables.datasets_title(dataset)}")
    look.legend_beside(axes, "parameters\nremoved")
    return axes.figure


def search_cost(store: Store, planned: Sequence[Planned]) -> Figure:
    """Sample passes of both solvers against the number of coefficients, one point a run."""
    found = look.finished(store, planned, lambda item: item.settings.method == "component_aware")
    runs = [(settings.params["solver"] == "grid", record["metrics"]) for settings, record in found]
    figure, (axes,) = look.canvas(size=(6.4, 3.8))
    for label, of_grid, passes, colour, marker in (
        ("gradient descent", False, "search_passes", look.COLOURS["component_aware"], "o"),
        ("grid: judged", True, "search_passes", "0.4", "s"),
        ("grid: all points", True, "grid_passes", "black", "*"),
    ):
        spots = {(m["coefficients"], m[passes]) for is_grid, m in runs if is_grid == of_grid}
        axes.scatter(*np.array([*spots]).T, 45, colour, marker=marker, label=label)
    axes.set(yscale="log", xlabel="coefficients", ylabel="sample passes")
    axes.set_xticks(sorted({m["coefficients"] for _, m in runs}))
    axes.set_title("what the search costs (forward 1, forward and backward 3)")
    axes.legend(fontsize=8)
    return figure


def latent_space(store: Store, run: str, title: str = "") -> Figure:
    """Latent vectors of validation images before and after pruning, two principal components."""
    arrays = store.arrays(run)
    figure, axes = look.canvas(2, (8, 3.8))
    for panel, name in zip(axes, ("dense", "pruned"), strict=True):
        points = arrays[f"latent_{name}"].astype(float)
        drawn = panel.scatter(*points.T, 18, arrays["labels"], cmap="tab10", vmin=-0.5, vmax=9.5)
        panel.set(title=f"latent space, {name}", xlabel="first component")
    axes[0].set_ylabel("second component")
    figure.colorbar(drawn, ax=axes, ticks=range(10), label="class")
    figure.suptitle(title, fontsize=10)
    return figure


def refusal(points: pd.DataFrame, limit: Constraint, closest: float) -> Figure:
    """A metric against the share removed, with its limit: what is accepted, and what is refused.

    `points` has columns `removed` and the metric's name; `closest` is the largest share that
    holds.
    """
    figure, (axes,) = look.canvas(size=(6.4, 3.6))
    removed, values = 100 * points.removed, points[limit.metric]
    short = values.map(limit.shortfall)
    axes.plot(removed, values, color="0.6", lw=1, zorder=1)
    for holds, colour, marker, label in (
        (short <= 0, _GOOD, "o", "accepted"),
        (short > 0, _COUPLING, "X", "refused"),
    ):
        axes.scatter(removed[holds], values[holds], 60, colour, marker=marker, label=label)
    for x, value, missing in zip(removed, values, short, strict=True):
        if missing > 0:
            axes.vlines(x, value, limit.limit, color=_COUPLING, ls=":", lw=1.2)
            axes.text(x + 1, (value + limit.limit) / 2, f"{missing:.3g} short", fontsize=7)
    axes.axhline(limit.limit, color="black", lw=1.2, label=str(limit))
    axes.axvline(100 * closest, color=_GOOD, ls="--", lw=1, label=f"closest: {closest:.1%}")
    axes.set(xlabel="parameters removed, %", ylabel=limit.metric, xlim=(0, 100))
    axes.legend(fontsize=8, loc="lower left")
    return figure


def report(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The report per group as bars: what was removed, and what that alone costs in each metric."""
    table = pd.DataFrame(rows)
    values = {"channels removed, %": 100 * table.removed}
    values |= {name: table[name] for name in table if name.endswith("lost alone")}
    colours = np.where(table.kind == "coupling", _COUPLING, look.COLOURS["sparse_gates"])
    size = (4 + 2.2 * len(values), 1 + 0.4 * len(table))
    figure, axes = look.canvas(len(values), size, sharey=True)
    for panel, (name, value) in zip(axes, values.items(), strict=True):
        panel.barh(table.group + " (" + table.place + ")", value, color=colours)
        panel.axvline(0, color="black", lw=0.8)
        panel.set_xlabel(name, fontsize=8)
        panel.tick_params(labelsize=8)
    axes[0].invert_yaxis()
    figure.suptitle("per group; coupling groups in orange", fontsize=9)
    return figure
