"""Figures of MAP: what its audit trail and its attention show."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from prunestudy.study.figures import look
from prunestudy.study.records import Store

_OURS = look.COLOURS["magnitude_attention"]
_HIGHEST = 4.0  # of the attention's histograms


def layers_of(arrays: dict[str, np.ndarray]) -> list[str]:
    """Names of the layers in a trail."""
    return bytes(arrays["trail_layers"]).decode().replace(".weight", "").split("\n")


def flow(store: Store, run: str) -> Figure:
    """Weights cut and returned at each mask update; below, the kept share and the loss."""
    trail = store.arrays(run)
    step, total = trail["trail_step"], trail["trail_size"].sum()
    method = store.load(run)["settings"]["method"]
    colour, edges = (
        look.COLOURS[method],
        [0, *step],
    )  # an update changes what stood since the last one
    cut, returned = (100 * trail[f"trail_{kind}"].sum(1) / total for kind in ("cut", "returned"))
    figure, (top, bottom) = look.canvas(1, (7.2, 5), rows=2, sharex=True, height_ratios=(3, 2))
    top.stairs(returned, edges, fill=True, color=look.COLOURS["magnitude"], label="come back")
    top.stairs(-cut, edges, fill=True, color=colour, label="leave")
    top.axhline(0, color="black", lw=0.8)
    # A linear middle, so that the few that return can be seen beside the many that leave.
    top.set_yscale("symlog", linthresh=0.1)
    top.set_ylim(-2 * max(cut.max(initial=0), 0.1), 3 * max(returned.max(initial=0), 0.1))
    top.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    top.set(
        ylabel="% of the weights", title=f"connections at each mask update, {look.title_of(method)}"
    )
    top.legend(fontsize=8, loc="lower right", ncols=2)
    bottom.plot(step, 100 * trail["trail_kept"].sum(1) / total, color=colour, label="kept, %")
    bottom.plot(step, trail["trail_loss"], color=look.COLOURS["dense"], lw=1, label="training loss")
    bottom.set(xlabel="training step", yscale="log")
    look.plain_ticks(bottom.yaxis)
    bottom.legend(fontsize=8, loc="upper right", ncols=2)
    return figure


def layers_over_time(store: Store, run: str) -> Figure:
    """Kept share of each layer after each mask update."""
    trail = store.arrays(run)
    names, size = layers_of(trail), trail["trail_size"]
    steps = [0, *trail["trail_step"]]
    kept = np.vstack([size, trail["trail_kept"]])
    figure, (axes,) = look.canvas(size=(7.2, 3.8))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(names)))
    for name, column, colour in zip(names, (kept / size).T, colours, strict=True):
        axes.plot(steps, 100 * column, color=colour, label=name)
    axes.plot(steps, 100 * kept.sum(1) / size.sum(), "k--", lw=1.5, label="whole net")
    axes.set(xlabel="training step", ylabel="kept, %", yscale="log")
    look.plain_ticks(axes.yaxis)
    axes.set_title("where the weights stay, from mask to mask")
    axes.legend(fontsize=7, ncols=1 + len(names) // 12, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def attention_histograms(store: Store, run: str) -> Figure:
    """Histograms of A at the start, in the middle and at the end; kept weights stand out."""
    counts = store.arrays(run)["attention"]
    chosen = sorted({0, (len(counts) - 1) // 2, len(counts) - 1})
    edges = np.linspace(0, _HIGHEST, counts.shape[-1] + 1)
    figure, axes = look.canvas(len(chosen), (3.2 * len(chosen), 3.2), sharey=True)
    for panel, epoch in zip(axes, chosen, strict=True):
        of_all, of_kept = counts[epoch] / counts[epoch][0].sum()
        panel.stairs(of_all, edges, fill=True, color="#cccccc", label="all weights")
        panel.stairs(of_kept, edges, fill=True, color=_OURS, label="kept weights")
        when = f"after epoch {epoch}" if epoch else "at the start"
        panel.set(title=when, xlabel="attention A (4: and above)", yscale="log")
    axes[0].set_ylabel("share of the weights")
    axes[-1].legend(fontsize=8)
    return figure


def updates_by_layer(store: Store, runs: dict[str, str]) -> Figure:
    """Each layer's share of all movement of weights, beside its share of the kept weights.

    One panel per entry of `runs` (label -> run); the dark part is movement of weights that the
    final net keeps.
    """
    figure, axes = look.canvas(len(runs), (3.6 * len(runs), 3.6), sharey=True)
    for panel, (label, run) in zip(axes, runs.items(), strict=True):
        trail = store.arrays(run)
        moved, surviving = trail["trail_movement"].sum(0).T
        kept, place = trail["trail_kept"][-1], np.arange(len(trail["trail_size"]))
        panel.bar(place, 100 * moved / moved.sum(), color="#cccccc", label="all movement")
        panel.bar(place, 100 * surviving / moved.sum(), color=_OURS, label="on kept weights")
        panel.plot(place, 100 * kept / kept.sum(), "ko", ms=5, label="kept weights")
        panel.set_xticks(place, layers_of(trail), rotation=60, ha="right", fontsize=7)
        panel.set_title(f"{label}: {surviving.sum() / moved.sum():.0%} survive")
    axes[0].set_ylabel("share by layer, %")
    axes[-1].legend(fontsize=8)
    return figure
