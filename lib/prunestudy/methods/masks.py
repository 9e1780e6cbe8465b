"""Masks on single weights, shared by the weight-level methods and their controls."""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunestudy.errors import InputError, require
from prunestudy.shrink.trace import LAYERS

Scope = Literal["auto", "convolutions", "all"]


def product(weight: Tensor, z: Tensor) -> Tensor:
    """Return weight * z in the memory layout of `weight`.

    A plain product loses channels_last where a kernel has one input channel, and the
    convolution and all that follows it then runs in the slower layout.
    """
    return torch.mul(weight, z, out=torch.empty_like(weight))


class _Masked(torch.autograd.Function):
    """weight * mask; the gradient is masked, too."""

    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return product(weight, mask)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


class Mask(nn.Module):
    """Parametrisation `w -> w * mask`; the mask is a buffer of zeros and ones, first all ones."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight (same shape)."""
        return masked(weight, self.mask)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """Return weight * mask, differentiable by the weight, in the weight's layout."""
    return _Masked.apply(weight, mask)


def prunable_layers(model: nn.Module) -> list[nn.Module]:
    """Return the convolutions and linear layers of `model`, in order; at least one."""
    layers = [layer for layer in model.modules() if isinstance(layer, LAYERS)]
    if not layers:
        raise InputError(f"model = {type(model).__name__}: has no convolution or linear layer")
    return layers


def layers_in(model: nn.Module, scope: Scope) -> list[nn.Module]:
    """Return the layers of `model` whose weights are pruned, in order; at least one.

    `scope`: "all" convolutions and linear layers; "convolutions" without the linear layers;
    "auto": the convolutions, but all where the linear layers hold more than half of the weights.
    """
    layers = prunable_layers(model)
    convolutions = [layer for layer in layers if not isinstance(layer, nn.Linear)]
    if scope == "auto":
        inside = sum(layer.weight.numel() for layer in convolutions)
        most = 2 * inside >= sum(layer.weight.numel() for layer in layers)
        scope = "convolutions" if most else "all"
    if scope == "all":
        return layers
    name = type(model).__name__
    require(bool(convolutions), "params.scope", scope, f"{name} has no convolution: all, auto")
    return convolutions


def attach_each(model: nn.Module, make, scope: Scope = "all") -> list[nn.Module]:
    """Put `make(weight)` as a parametrisation on each weight in `scope`; return them in order."""
    made = []
    for layer in layers_in(model, scope):
        made.append(make(layer.weight))
        parametrize.register_parametrization(layer, "weight", made[-1])
    return made


def dense_weights(model: nn.Module) -> list[Tensor]:
    """Return the stored weights under the parametrisations, in order."""
    pruned = [m for m in prunable_layers(model) if parametrize.is_parametrized(m, "weight")]
    return [m.parametrizations.weight.original for m in pruned]


def layer_names(model: nn.Module) -> list[str]:
    """Names (`conv1.weight`) of the weights under the parametrisations, in order."""
    names = {layer: name for name, layer in model.named_modules()}
    pruned = [m for m in prunable_layers(model) if parametrize.is_parametrized(m, "weight")]
    return [f"{names[layer]}.weight".lstrip(".") for layer in pruned]


def kept_count(total: int, target: float) -> int:
    """Number of weights left of `total` when the share `target` is removed; at least 1."""
    return max(1, round(total * (1 - target)))


def top_masks(scores: list[Tensor], keep: int) -> list[Tensor]:
    """Return masks (floats, shaped as `scores`) of exactly the `keep` highest scores over all.

    One ranking over all layers; of equal scores the first in order stays. A score that is not a
    number counts as the highest.
    """
    flat = torch.cat([score.detach().flatten() for score in scores])
    flat.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    if keep <= 0:
        mask = torch.zeros_like(flat)
    else:
        least = kth_highest(flat, keep)
        mask = flat >= least
        spare = int(mask.count_nonzero()) - keep
        if spare:
            ties = (flat == least).nonzero().flatten()
            mask[ties[-spare:]] = False
        mask = mask.to(flat.dtype)
    parts = mask.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def kth_highest(flat: Tensor, k: int) -> Tensor:
    """Return the `k`-th highest of the values `flat` (k from 1), a scalar tensor."""
    if flat.is_cuda:
        # kthvalue has no deterministic form there, and a sort takes no longer.
        return flat.sort().values[-k]
    # numpy selects with vector instructions: 15 times faster than kthvalue.
    return torch.from_numpy(np.partition(flat.numpy(), len(flat) - k))[len(flat) - k]


def set_masks(masks: list[Mask], values: list[Tensor]) -> None:
    """Copy `values` into `masks`, in order."""
    for mask, value in zip(masks, values, strict=True):
        mask.mask.copy_(value)


def cubic_sparsity(target: float, share: float) -> float:
    """Sparsity of the gradual schedule at `share` (0-1) of its ramp: s (1 - (1 - share)^3).

    Zhu and Gupta 2017, equation 1, from zero.
    """
    return target * (1 - (1 - min(share, 1.0)) ** 3)
