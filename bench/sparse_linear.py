"""From which width and share of zeros on a linear layer is faster from compressed rows (CSR)."""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn

from common import Row, main
from layers import forward
from prunestudy import shrink
from prunestudy.study.figures.papers import sparse_layers

WIDTHS, SPARSITIES, BATCHES = (512, 1024, 2048, 4096), (0.90, 0.95, 0.98, 0.99), (1, 128)


def rows(table: list[dict[str, float]]) -> dict[str, Row]:
    """A row per width and batch; what they measure also goes into `table`."""
    return {
        f"Linear layer {width} wide, batch {batch}: dense / sparse": partial(
            speed_up, table, width, batch
        )
        for width in WIDTHS
        for batch in BATCHES
    }


def speed_up(table: list[dict[str, float]], width: int, batch: int, seconds: float) -> str:
    """Time of a square layer over that of its sparse form; above 1 the sparse one is faster."""
    parts, generator = [], torch.Generator().manual_seed(0)
    for sparsity in SPARSITIES:
        dense = nn.Linear(width, width)
        dense.weight.data.mul_(torch.rand(width, width, generator=generator) >= sparsity)
        nets = {"dense": dense, "sparse": shrink.to_csr(dense)}
        ratio = forward(nets, (batch, width), "dense", "sparse", seconds / len(SPARSITIES))
        at = {"width": width, "sparsity": sparsity, "batch": batch}
        table.append(at | {"speed_up": ratio.median, "low": ratio.low, "high": ratio.high})
        parts.append(f"{sparsity:.0%} zeros: {ratio}")
    return "; ".join(parts)


def write(table: list[dict[str, float]], folder: Path) -> None:
    """Write sparse_linear.csv and its figure, which notebook 01 and readers use, into `folder`."""
    layers = pd.DataFrame(table).sort_values(["width", "sparsity", "batch"])
    layers.to_csv(
        folder / "sparse_linear.csv", index=False, float_format="%.5g", lineterminator="\n"
    )
    figure = sparse_layers(layers)
    figure.savefig(folder / "sparse_linear.png", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    measured: list[dict[str, float]] = []
    results = main(rows(measured))
    if results:
        write(measured, results)
