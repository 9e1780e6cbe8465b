"""What became of the weights that a net started with: how many are left, and how they changed."""

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy.measure.cost import prunable_weights


def removed_share(model: nn.Module, dense: nn.Module) -> float:
    """Share (0-1) of the prunable weights of `dense` that are zero in `model`, or gone."""
    left = sum(int(w.count_nonzero()) for _, w in prunable_weights(model))
    return 1 - left / sum(w.numel() for _, w in prunable_weights(dense))


def same_shapes(model: nn.Module, start: dict[str, Tensor]) -> bool:
    """Whether the prunable weights of `model` have the names and shapes of those in `start`."""
    shapes = {name: w.shape for name, w in prunable_weights(model)}
    return shapes == {name: w.shape for name, w in start.items()}


def kept_scale(model: nn.Module, start: dict[str, Tensor]) -> float:
    """Mean |w| of the weights that `model` kept, over the mean |w| of the same at the start.

    Below 1 the kept weights were shrunk, as by LASSO; near 1 they were only selected. NaN where
    none was kept.
    """
    now = then = 0.0
    for begin, end in _kept(model, start):
        now += end.abs().sum().item()
        then += begin.abs().sum().item()
    return now / then if then else float("nan")


def kept_sample(
    model: nn.Module, start: dict[str, Tensor], most: int = 2000
) -> dict[str, np.ndarray]:
    """At most `most` kept weights, evenly spaced, at the start and at the end."""
    begin, end = (torch.cat(weights) for weights in zip(*_kept(model, start), strict=True))
    step = -(-len(end) // most) or 1
    return {"kept_start": begin[::step].numpy(), "kept_end": end[::step].numpy()}


def _kept(model: nn.Module, start: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Per layer the weights that `model` kept: at the start, and now."""
    ends = [(name, w.detach().cpu()) for name, w in prunable_weights(model)]
    return [(start[name].cpu()[w != 0], w[w != 0]) for name, w in ends]
