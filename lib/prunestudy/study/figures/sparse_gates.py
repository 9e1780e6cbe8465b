"""Figures of Training Sparse Neural Networks."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prunestudy.study.figures import look
from prunestudy.study.records import Store


def gate_histograms(store: Store, run: str) -> Figure:
    """Histogram of the gates at the first, a middle and the last epoch in which they train."""
    counts, rows = store.arrays(run)["gate_histograms"], store.history(run)
    training = [i for i, row in enumerate(rows) if row["phase"] == "gates"] or [0]
    chosen = sorted({training[0], training[len(training) // 2], training[-1]})
    figure, axes = look.canvas(len(chosen), (3 * len(chosen), 3), sharey=True)
    edges = np.linspace(0, 1, counts.shape[1] + 1)
    for panel, epoch in zip(axes, chosen, strict=True):
        look.histogram(panel, counts[epoch], edges, fill=True, color=look.COLOURS["sparse_gates"])
        panel.set(title=f"after epoch {epoch + 1}", xlabel="gate g", yscale="log")
    axes[0].set_ylabel("share of the weights")
    return figure


def undecided(store: Store, run: str) -> Figure:
    """Undecided and kept shares, and accuracy of the sampled and the thresholded net, by epoch."""
    rows = pd.DataFrame(store.history(run))
    figure, (left, right) = look.canvas(2, (9, 3.4))
    left.plot(rows.epoch, 100 * rows.kept, marker="o", label="g >= 0.5 (kept)")
    left.plot(rows.epoch, 100 * rows.undecided, marker="s", label="0.05 < g < 0.95 (undecided)")
    left.set(ylabel="share of the weights, %", yscale="symlog", ylim=(-0.2, 150))
    look.plain_ticks(left.yaxis)
    right.plot(rows.epoch, 100 * rows.validation_top1, marker="o", label="thresholded")
    if "validation_top1_sampled" in rows:
        sampled = pd.to_numeric(rows.validation_top1_sampled, errors="coerce")
        right.plot(rows.epoch, 100 * sampled, marker="s", label="sampled")
    right.set_ylabel("validation accuracy, %")
    for panel in (left, right):
        panel.set_xlabel("epoch")
        panel.legend(fontsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def kept_against_start(store: Store, runs: dict[str, str]) -> Figure:
    """|w| of kept weights at the end against the start, one panel per method (name -> run)."""
    figure, axes = look.canvas(len(runs), (3.6 * len(runs), 3.6), sharex=True, sharey=True)
    for panel, (method, run) in zip(axes, runs.items(), strict=True):
        arrays, scale = store.arrays(run), store.load(run)["metrics"]["kept_scale"]
        start, end = np.abs(arrays["kept_start"]), np.abs(arrays["kept_end"])
        panel.plot(start, end, ".", ms=3, alpha=0.5, color=look.COLOURS.get(method))
        limit = 1.05 * max(start.max(initial=0), end.max(initial=0), 1e-6)
        panel.plot([0, limit], [0, limit], "k--", lw=1)
        panel.set(title=f"{look.title_of(method)}: x{scale:.2f}", xlabel="|w| of the dense start")
    axes[0].set_ylabel("|w| in the sparse net")
    return figure
