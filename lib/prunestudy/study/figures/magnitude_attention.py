"""Figures of MAP: what its audit trail and its attention show."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from prunestudy.study.figures import COLOURS, style, title_of
from prunestudy.study.records import Store

_OURS = COLOURS["magnitude_attention"]
_HIGHEST = 4.0  # of the attention's histograms


def layers_of(arrays: dict[str, np.ndarray]) -> list[str]:
    """Names of the layers that a trail speaks of."""
    return bytes(arrays["trail_layers"]).decode().replace(".weight", "").split("\n")


def flow(store: Store, run: str) -> Figure:
    """Weights that leave and return at each mask update; below, the kept share and the loss."""
    style()
    found = store.arrays(run)
    step, total = found["trail_step"], found["trail_size"].sum()
    method = store.load(run)["settings"]["method"]
    edges = [0, *step]  # an update changes what it found since the one before
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.2, 5), sharex=True, height_ratios=(3, 2))
    left, back = (100 * found[f"trail_{kind}"].sum(1) / total for kind in ("cut", "returned"))
    top.stairs(back, edges, fill=True, color=COLOURS["magnitude"], label="come back")
    top.stairs(-left, edges, fill=True, color=COLOURS[method], label="leave")
    top.axhline(0, color="black", lw=0.8)
    # A linear middle, so that the few that return can be seen beside the many that leave.
    top.set_yscale("symlog", linthresh=0.1)
    top.set_ylim(-2 * max(left.max(initial=0), 0.1), 3 * max(back.max(initial=0), 0.1))
    top.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    top.set(ylabel="% of the weights")
    top.legend(fontsize=8, loc="lower right", ncols=2)
    top.set_title(f"connections at each mask update, {title_of(method)}")
    bottom.plot(
        step, 100 * found["trail_kept"].sum(1) / total, color=COLOURS[method], label="kept, %"
    )
    bottom.plot(step, found["trail_loss"], color=COLOURS["dense"], lw=1, label="training loss")
    bottom.set(xlabel="training step", yscale="log")
    bottom.yaxis.set_major_formatter("{x:g}")
    bottom.legend(fontsize=8, loc="upper right", ncols=2)
    return figure


def layers_over_time(store: Store, run: str) -> Figure:
    """Kept share of each layer after each mask update."""
    style()
    found = store.arrays(run)
    names = layers_of(found)
    steps = np.concatenate([[0], found["trail_step"]])
    kept = np.vstack([found["trail_size"], found["trail_kept"]]) / found["trail_size"]
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(names)))
    for name, column, colour in zip(names, kept.T, colours, strict=True):
        axes.plot(steps, 100 * column, color=colour, label=name)
    whole = found["trail_kept"].sum(1) / found["trail_size"].sum()
    axes.plot(steps, 100 * np.concatenate([[1], whole]), "k--", lw=1.5, label="whole net")
    axes.set(xlabel="training step", ylabel="kept, %", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("where the weights stay, from mask to mask")
    axes.legend(fontsize=7, ncols=1 + len(names) // 12, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def attention_histograms(store: Store, run: str) -> Figure:
    """Histograms of A at the start, in the middle and at the end; kept weights stand out."""
    style()
    counts = store.arrays(run)["attention"]
    chosen = sorted({0, (len(counts) - 1) // 2, len(counts) - 1})
    edges = np.linspace(0, _HIGHEST, counts.shape[-1] + 1)
    figure, axes = plt.subplots(1, len(chosen), figsize=(3.2 * len(chosen), 3.2), sharey=True)
    for panel, epoch in zip(np.atleast_1d(axes), chosen, strict=True):
        every, kept = counts[epoch] / counts[epoch][0].sum()
        panel.stairs(every, edges, fill=True, color="#cccccc", label="all weights")
        panel.stairs(kept, edges, fill=True, color=_OURS, label="kept weights")
        when = f"after epoch {epoch}" if epoch else "at the start"
        panel.set(title=when, xlabel="attention A (4: and above)", yscale="log")
    np.atleast_1d(axes)[0].set_ylabel("share of the weights")
    np.atleast_1d(axes)[-1].legend(fontsize=8)
    return figure


def updates_by_layer(store: Store, runs: dict[str, str]) -> Figure:
    """Where the movement of weights fell: each layer's share, beside its share of kept weights.

    One panel per entry of `runs` (label -> run); the dark part is movement that is left in the
    final net, the dot the layer's share of all kept weights.
    """
    style()
    figure, axes = plt.subplots(
        1, len(runs), figsize=(3.6 * len(runs), 3.6), sharey=True, squeeze=False
    )
    for panel, (label, run) in zip(axes[0], runs.items(), strict=True):
        found = store.arrays(run)
        every, surviving = found["trail_movement"].sum(0).T
        kept, place = found["trail_kept"][-1], np.arange(len(found["trail_size"]))
        panel.bar(place, 100 * every / every.sum(), color="#cccccc", label="all movement")
        panel.bar(place, 100 * surviving / every.sum(), color=_OURS, label="on kept weights")
        panel.plot(place, 100 * kept / kept.sum(), "ko", ms=5, label="kept weights")
        panel.set_xticks(place, layers_of(found), rotation=60, ha="right", fontsize=7)
        panel.set_title(f"{label}: {surviving.sum() / every.sum():.0%} survive")
    axes[0, 0].set_ylabel("share by layer, %")
    axes[0, -1].legend(fontsize=8)
    return figure
