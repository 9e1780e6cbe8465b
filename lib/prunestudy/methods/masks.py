"""Masks on single weights, shared by the weight-level methods and their controls."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunestudy.errors import InputError
from prunestudy.measure import prunable_weights


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
    names = [name.rpartition(".")[0] for name, _ in prunable_weights(model)]
    if not names:
        raise InputError(f"model = {type(model).__name__}: has no convolution or linear layer")
    return [model.get_submodule(name) for name in names]


def attach_each(model: nn.Module, make) -> list[nn.Module]:
    """Put `make(weight)` as a parametrisation on each prunable weight; return them in order."""
    made = []
    for layer in prunable_layers(model):
        made.append(make(layer.weight))
        parametrize.register_parametrization(layer, "weight", made[-1])
    return made


def dense_weights(model: nn.Module) -> list[Tensor]:
    """Return the stored weights under the parametrisations, in order."""
    return [m.parametrizations.weight.original for m in prunable_layers(model)]


def kept_count(total: int, target: float) -> int:
    """Number of weights left of `total` when the share `target` is removed; at least 1."""
    return max(1, round(total * (1 - target)))


def top_masks(scores: list[Tensor], keep: int) -> list[Tensor]:
    """Return masks (floats, shaped as `scores`) of exactly the `keep` highest scores over all.

    One ranking over all layers; of equal scores the first in order stays.
    """
    flat = torch.cat([score.detach().flatten() for score in scores])
    order = torch.argsort(flat, descending=True, stable=True)
    mask = torch.zeros_like(flat)
    mask[order[:keep]] = 1.0
    parts = mask.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def set_masks(masks: list[Mask], values: list[Tensor]) -> None:
    """Copy `values` into `masks`, in order."""
    for mask, value in zip(masks, values, strict=True):
        mask.mask.copy_(value)


def cubic_sparsity(target: float, share: float) -> float:
    """Sparsity of the gradual schedule at `share` (0-1) of its ramp: s (1 - (1 - share)^3).

    Zhu and Gupta 2017, equation 1, from zero.
    """
    return target * (1 - (1 - min(share, 1.0)) ** 3)
