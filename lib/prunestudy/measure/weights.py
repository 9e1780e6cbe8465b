"""The weights of a net: how many there are, how many are zero, and what became of those kept.

All counts are of the net as it computes in eval mode: a parametrised weight, or one that a hook of
`torch.nn.utils` computes, counts as its value, and gates or masks are no parameters.
"""

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.shrink import CsrLinear, fold
from prunestudy.shrink.fold import is_plain
from prunestudy.shrink.trace import LAYERS


def parameters(model: nn.Module) -> int:
    """Number of weights, biases, and scales and shifts of norms; a shared one counts once."""
    return sum(p.numel() for p in plain_net(model).parameters())


def nonzeros(model: nn.Module) -> int:
    """Number of `parameters`, biases included, that are not exactly zero."""
    return sum(int(p.count_nonzero()) for p in plain_net(model).parameters())


def prunable_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Name (`conv1.weight`) and weight of each convolution, transposed ones too, and linear layer.

    In order of registration, detached; a weight that several layers share, once. Those of a plain
    net share memory with it, others are values in eval mode.
    """
    weights = {}  # names by weight
    for name, layer in layers_of(plain_net(model)):
        weights.setdefault(layer.weight, f"{name}.weight".lstrip("."))
    return [(name, weight.detach()) for weight, name in weights.items()]


def layer_sparsity(model: nn.Module) -> dict[str, float]:
    """Share (0-1) of exact zeros in each prunable weight, by its name in `prunable_weights`."""
    return {n: 1 - int(w.count_nonzero()) / w.numel() for n, w in prunable_weights(model)}


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


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the convolutions and linear layers of `model`."""
    _refuse_csr(model)
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LAYERS)]


def plain_net(model: nn.Module, copy: bool = False) -> nn.Module:
    """`model` folded; itself where it is plain already, unless a `copy` is asked for."""
    _refuse_csr(model)
    return fold(model) if copy or not is_plain(model) else model


def _kept(model: nn.Module, start: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Per layer the weights that `model` kept: at the start, and now."""
    ends = [(name, w.detach().cpu()) for name, w in prunable_weights(model)]
    return [(start[name].cpu()[w != 0], w[w != 0]) for name, w in ends]


def _refuse_csr(model: nn.Module) -> None:
    # CSR layers have neither parameters nor a weight: every count would silently miss them.
    csr = any(isinstance(module, CsrLinear) for module in model.modules())
    require(not csr, "model", type(model).__name__, "count the net before to_csr")
