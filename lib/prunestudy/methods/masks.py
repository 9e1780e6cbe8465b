"""Masks on single weights: what the weight-level methods and their controls share."""

import math
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunestudy.errors import require
from prunestudy.methods.base import At, Context, Method, scalar
from prunestudy.shrink import folded, require_ordinary
from prunestudy.shrink.layers import LAYERS

Scope = Literal["auto", "convolutions", "all"]


class Masked(Method):
    """A method with one mask per weight tensor; one ranking over all of them says what is kept.

    `scope`: which layers are pruned, see `layers_in`. After `attach`, `names` (`conv1.weight`),
    `weights` (the stored dense ones, which are trained) and `masks` have one entry per tensor.
    `sparsity` is that of the masks in force, chosen after step `masked_at`.
    """

    counts: ClassVar[tuple[str, ...]] = ("sparsity",)
    scope: Scope = "all"

    def __init__(self, target: float | None = None, of: str | None = None, **settings: Any) -> None:
        super().__init__(target, of, **settings)
        self.names: list[str] = []
        self.weights: list[Tensor] = []
        self.masks: list[Mask] = []
        self.register_buffer("sparsity", scalar(0.0, "cpu"))
        self.register_buffer("masked_at", torch.tensor(0))

    def check(self, model: nn.Module) -> None:
        """Refuse a `model` without layers in the scope, and a target that cuts no weight of it."""
        weights = [layer.weight for layer in layers_in(model, self.scope).values()]
        total = sum(weight.numel() for weight in weights)
        cut = total - kept_count(total, self.target)
        require(cut > 0, "target", self.target, f"cuts none of {total} weights: nothing to prune")
        if weights[0].is_meta:  # planning sees shapes only
            return
        zeros = 1 - sum(int(weight.count_nonzero()) for weight in weights) / total
        allowed = f"above {zeros:.4f}, the share of zeros at the start: nothing left to prune"
        require(zeros < self.target, "target", self.target, allowed)

    def attach(self, model: nn.Module, context: Context) -> None:  # noqa: ARG002
        """Put a mask of ones on every weight in the scope."""
        self.names, self.weights, self.masks = attach_each(model, self.mask_for, self.scope)

    def mask_for(self, weight: Tensor) -> "Mask":
        """The parametrisation of one layer's `weight`."""
        return Mask(weight)

    def scores(self) -> list[Tensor]:
        """What the ranking is by, one tensor per weight tensor: |w|."""
        return [weight.detach().abs() for weight in self.weights]

    @torch.no_grad()
    def cut(self, sparsity: float, step: int = 0) -> None:
        """Keep the weights of highest score and mask the share `sparsity`; on the host."""
        scores = self.scores()
        keep = kept_count(sum(score.numel() for score in scores), sparsity)
        for each, mask in zip(self.masks, top_masks(scores, keep), strict=True):
            each.mask.copy_(mask)
        self.sparsity.fill_(sparsity)
        self.masked_at.fill_(step)

    def grow(self, at: At, period: int, end: float) -> None:
        """Every `period` steps, raise the sparsity; it reaches the target at step `end` of all."""
        if at.total_step - self.masked_at.item() >= period:
            self.cut(cubic_sparsity(self.target, at.total_step / end), at.total_step)

    def finish(self, model: nn.Module, context: Context) -> nn.Module:
        """Reach the target, if the training was too short to, and fold the masks in."""
        if self.sparsity < self.target:
            self.cut(self.target)
        return folded(model, context.example)

    def kept(self) -> float:
        """The share of the weights that eval mode uses; on the host."""
        kept = sum(int(each.at_test().count_nonzero()) for each in self.masks)
        return kept / sum(each.mask.numel() for each in self.masks)

    def log(self) -> dict[str, float]:
        """The share of weights that is kept."""
        return {"kept": self.kept()}


class Mask(nn.Module):
    """Parametrisation `w -> w * mask`; the mask is a buffer of zeros and ones, first all ones.

    With `feedback` the gradient reaches the cut weights, too; otherwise it is masked as well. The
    `flags` of a mask are part of its state.
    """

    flags: ClassVar[tuple[str, ...]] = ("feedback",)

    def __init__(self, weight: Tensor, *, feedback: bool = False) -> None:
        super().__init__()
        self.feedback = feedback
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight (same shape)."""
        return multiply(weight, self.mask, None if self.feedback else self.mask)

    def at_test(self) -> Tensor:
        """The zeros and ones of eval mode."""
        return self.mask

    def get_extra_state(self) -> dict[str, bool]:
        """The flags by name."""
        return {name: getattr(self, name) for name in self.flags}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Take back what `get_extra_state` returned."""
        vars(self).update(state)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, forward: Tensor, backward: Tensor | None) -> Tensor:
        ctx.save_for_backward(backward)
        return product(weight, forward)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return gradient if factor is None else gradient * factor, None, None


def multiply(weight: Tensor, forward: Tensor, backward: Tensor | None) -> Tensor:
    """Return weight * `forward`; the gradient is multiplied by `backward` (None: by 1) instead."""
    return _Multiply.apply(weight, forward, backward)


def product(weight: Tensor, z: Tensor) -> Tensor:
    """Return weight * z in the memory layout of `weight`.

    A plain product loses channels_last where a kernel has one input channel, and the
    convolution and all that follows it then run in the slower layout.
    """
    return torch.mul(weight, z, out=torch.empty_like(weight))


def layers_in(model: nn.Module, scope: Scope) -> dict[str, nn.Module]:
    """The layers of `model` whose weights are pruned, by name, in order; at least one.

    `scope`: "all" convolutions and linear layers; "convolutions" without the linear layers;
    "auto": the convolutions, but all where the linear layers hold more than half of the weights.
    Raises `InputError` if there is none, and for weights that are shared or made of others.
    """
    require_ordinary(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS)}
    kind = type(model).__name__
    require(bool(layers), "model", kind, "has no convolution or linear layer")
    convolutions = {n: each for n, each in layers.items() if not isinstance(each, nn.Linear)}
    if scope == "auto":
        inside = sum(layer.weight.numel() for layer in convolutions.values())
        most = 2 * inside >= sum(layer.weight.numel() for layer in layers.values())
        scope = "convolutions" if most else "all"
    found = layers if scope == "all" else convolutions
    require(bool(found), "scope", scope, f"{kind} has no convolution: all, auto")
    return found


def attach_each(model: nn.Module, make, scope: Scope = "all") -> tuple[list, list, list]:
    """Put `make(weight)` as a parametrisation on each weight in `scope`.

    Returns the weights' names (`conv1.weight`), the stored weights under the parametrisations and
    the parametrisations, in order.
    """
    names, weights, made = [], [], []
    for name, layer in layers_in(model, scope).items():
        names.append(f"{name}.weight".lstrip("."))
        weights.append(layer.weight)
        made.append(make(layer.weight))
        parametrize.register_parametrization(layer, "weight", made[-1])
    return names, weights, made


def kept_count(total: int, target: float) -> int:
    """Number of weights left of `total` when the share `target` is removed; at least 1."""
    return max(1, round(total * (1 - target)))


def top_masks(scores: list[Tensor], keep: int) -> list[Tensor]:
    """Return masks (floats, shaped as `scores`) of the `keep` highest scores, at least one, of all.

    One ranking over all layers; of equal scores the first in order stays. A score that is not a
    number counts as the highest.
    """
    flat = torch.cat([score.detach().flatten() for score in scores])
    flat.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    least = _kth_highest(flat, keep)
    mask = flat >= least
    spare = int(mask.count_nonzero()) - keep
    if spare:
        mask[(flat == least).nonzero().flatten()[-spare:]] = False
    parts = mask.to(flat.dtype).split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def _kth_highest(flat: Tensor, k: int) -> Tensor:
    if flat.is_cuda:
        # kthvalue has no deterministic form there, and a sort takes no longer.
        return flat.sort().values[-k]
    # numpy selects with vector instructions: 15 times faster than kthvalue.
    return torch.from_numpy(np.partition(flat.numpy(), len(flat) - k))[len(flat) - k]


def cubic_sparsity(target: float, share: float) -> float:
    """Sparsity of the gradual schedule at `share` (0-1) of its ramp: s (1 - (1 - share)^3).

    Zhu and Gupta 2017, equation 1, from zero.
    """
    return target * (1 - (1 - min(share, 1.0)) ** 3)
