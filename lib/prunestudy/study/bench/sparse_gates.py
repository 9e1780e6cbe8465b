"""Training Sparse Neural Networks: what gates cost, what sparse layers gain."""

from pathlib import Path

import pandas as pd
import torch
from torch import nn

from prunestudy import measure, methods, shrink
from prunestudy.study.bench import Row, step_cost

WIDTHS, SPARSITIES, BATCHES = (512, 1024, 2048, 4096), (0.90, 0.95, 0.98, 0.99), (1, 128)


def gate_step(quick: bool = False) -> Row:
    """A LeNet-5 training step, batch 128, with gates over a dense one."""
    method = methods.build("sparse_gates", {}, 0.95)
    cost = step_cost("lenet5", (1, 28, 28), method, rounds=20 if quick else 300, warmup=5)
    return "LeNet-5 training step: with gates / dense", cost


def sparse_linear(quick: bool = False) -> pd.DataFrame:
    """Dense over compressed-row time of square linear layers; above 1 sparse is faster."""
    widths = WIDTHS[:1] if quick else WIDTHS
    rows = []
    generator = torch.Generator().manual_seed(0)
    for width in widths:
        for sparsity in SPARSITIES:
            dense = nn.Linear(width, width)
            keep = torch.rand(dense.weight.shape, generator=generator) >= sparsity
            dense.weight.data.mul_(keep)
            nets = {"dense": dense, "sparse": shrink.to_csr(dense)}
            for batch in BATCHES:
                rounds = 20 if quick else 100
                seconds = measure.timings(nets, (width,), batch, rounds=rounds, threads=1)
                ratio = measure.ratio(seconds["dense"], seconds["sparse"])
                rows.append((width, sparsity, batch, ratio.median, ratio.low, ratio.high))
    return pd.DataFrame(rows, columns=["width", "sparsity", "batch", "speed_up", "low", "high"])


def draw(sparse: pd.DataFrame, folder: Path) -> None:
    """Draw `sparse_linear` into `folder`."""
    import matplotlib.pyplot as plt

    from prunestudy.study import figures

    figures.style()
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(9, 3.4), sharey=True)
    for panel, batch in zip(axes, BATCHES, strict=True):
        for width, rows in sparse[sparse.batch == batch].groupby("width"):
            error = [rows.speed_up - rows.low, rows.high - rows.speed_up]
            panel.errorbar(rows.sparsity, rows.speed_up, error, marker="o", label=f"{width} wide")
        panel.axhline(1, color="black", ls="--", lw=1)
        panel.set(title=f"batch {batch}", xlabel="share of zero weights", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("dense time / sparse time")
    axes[0].legend(fontsize=8)
    figures.save_to(figure, folder, "sparse_linear")
    plt.close(figure)


ROWS = (gate_step,)
