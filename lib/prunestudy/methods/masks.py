"""Masks on single weights: what the weight-level methods and their controls share."""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from prunestudy.errors import require
from prunestudy.methods.base import At, Context, Method, scalar
from prunestudy.shrink import folded, require_ordinary
from prunestudy.shrink.layers import LAYERS

Scope = Literal["auto", "convolutions", "all"]


class Masked(Method):
    """A method with one mask per weight tensor; one ranking over all of them says what is kept.

    `scope`: which layers are pruned, see `layers_in`. After `attach`, `names` (`conv1.weight`),
    `weights` (the stored dense ones, which are trained) and `masks` have one entry per tensor;
    `size` weights in all.
    `sparsity` is that of the masks in force, chosen after step `masked_at`.
    """

    counts = ("sparsity",)
    scope: Scope = "all"

    def check(self, model: nn.Module) -> None:
        """Refuse a `model` without layers in the scope, and a target that cuts no weight of it."""
        weights = [layer.weight for layer in layers_in(model, self.scope).values()]
        total = sum(weight.numel() for weight in weights)
        cuts, none = kept_count(total, self.target) < total, f"cuts none of {total} weights"
        require(cuts, "target", self.target, f"{none}: nothing to prune")
        if weights[0].is_meta:  # planning sees shapes only
            return
        zeros = 1 - sum(int(weight.count_nonzero()) for weight in weights) / total
        allowed = f"above {zeros:.4f}, the share of zeros at the start: nothing left to prune"
        require(zeros < self.target, "target", self.target, allowed)

    def attach(self, model: nn.Module, context: Context) -> None:
        """Put a mask of ones on every weight in the scope."""
        layers = layers_in(model, self.scope)
        super().attach(model, context)
        self.batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
        self.names = [f"{name}.weight".lstrip(".") for name in layers]
        self.weights = [layer.weight for layer in layers.values()]
        self.masks = [self.mask_for(weight) for weight in self.weights]
        self.size = sum(weight.numel() for weight in self.weights)
        self.start = self.mean_size()
        self.register_buffer("sparsity", scalar(0.0, "cpu"))
        self.register_buffer("masked_at", torch.tensor(0))
        for layer, mask in zip(layers.values(), self.masks, strict=True):
            parametrize.register_parametrization(layer, "weight", mask)

    def mask_for(self, weight: Tensor) -> "Mask":
        """The parametrisation of one layer's `weight`."""
        return Mask(weight)

    def scores(self) -> list[Tensor]:
        """What the ranking is by, one tensor per weight tensor: |w|."""
        return [weight.detach().abs() for weight in self.weights]

    @torch.no_grad()
    def cut(self, sparsity: float, step: int = 0) -> None:
        """Mask the share `sparsity` of the weights, those of lowest score; on the host."""
        for each, mask in zip(self.masks, top_masks(self.scores(), sparsity), strict=True):
            each.mask.copy_(mask)
        self.sparsity.fill_(sparsity)
        self.masked_at.fill_(step)

    def grow(self, at: At, period: int, end: float) -> None:
        """Every `period` steps, raise the sparsity; it reaches the target at step `end` of all."""
        if at.total_step - self.masked_at.item() >= period:
            self.cut(cubic_sparsity(self.target, at.total_step / end), at.total_step)

    @torch.no_grad()
    def bound(self, bounded: bool | None) -> None:
        """If `bounded`, scale gradients of cut weights down to those of their layer's kept ones.

        None: in a net with batch norm.
        In each filter (first dimension) their root mean square becomes at most that of all kept
        weights of the layer. A filter that is wholly cut puts out a constant, which batch norm
        divides by sqrt(eps): its gradient is hundreds of times that of others. Unbounded, it grows
        past the threshold at once and pushes other filters out of the mask, which then do the same.
        """
        if not (self.batch_norm if bounded is None else bounded):
            return
        for weight, each in zip(self.weights, self.masks, strict=True):
            if (gradient := weight.grad) is not None:
                kept, cut, inside = each.mask, 1 - each.mask, tuple(range(1, weight.dim()))
                squares, counts = gradient.square(), cut.sum(inside, keepdim=True).clamp(min=1)
                found = (squares * cut).sum(inside, keepdim=True) / counts
                allowed = (squares * kept).sum() / kept.sum().clamp(min=1)
                least = torch.finfo(found.dtype).tiny  # no 0 / 0
                gradient.mul_(kept + cut * (allowed / found.clamp(min=least)).clamp(max=1).sqrt())

    def finish(self, model: nn.Module, context: Context) -> nn.Module:
        """Reach the target, if the training was too short to, and fold the masks in."""
        if self.sparsity < self.target:
            self.cut(self.target)
        return folded(model, context.example)

    def kept(self) -> float:
        """The share of the weights that eval mode uses; on the host."""
        return sum(int(each.at_test().count_nonzero()) for each in self.masks) / self.size

    def log(self) -> dict[str, float]:
        """The share of the weights that is kept."""
        return {"kept": self.kept()}

    def grew(self) -> float:
        """Mean |w| of the stored weights, cut ones too, over that at the start."""
        return self.mean_size() / self.start

    def report(self) -> dict[str, float]:
        """What `grew` says."""
        return {"grew": self.grew()}

    @torch.no_grad()
    def mean_size(self) -> float:
        """The mean |w| over all weights; on the host."""
        total = sum(weight.abs().sum(dtype=torch.float64) for weight in self.weights)
        return (total / self.size).item()


class Mask(nn.Module):
    """Parametrisation `w -> w * mask`; the mask is a buffer of zeros and ones, first all ones.

    With `feedback` the gradient reaches the cut weights, too; otherwise it is masked as well. What
    `flags` names is part of the state.
    """

    flags: tuple[str, ...] = ("feedback",)

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
        """Take the flags back."""
        vars(self).update(state)


class _Multiply(torch.autograd.Function):
    """weight * z, in the memory layout of `weight`.

    The gradient w.r.t. `weight` uses `backward` (None: 1) in place of z. A `gate`, from which z was
    drawn, gets the gradient w.r.t. z (straight-through).
    """

    @staticmethod
    def forward(
        ctx, weight: Tensor, z: Tensor, backward: Tensor | None, gate: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(backward, weight if gate is not None else None)
        # A plain product loses channels_last where a kernel has one input channel, and the
        # convolution and all that follows it then run in the slower layout.
        return torch.mul(weight, z, out=torch.empty_like(weight))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor, weight = ctx.saved_tensors
        by_gate = None if weight is None else gradient * weight
        return gradient if factor is None else gradient * factor, None, None, by_gate


multiply = _Multiply.apply


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
        inside, every = (sum(m.weight.numel() for m in d.values()) for d in (convolutions, layers))
        scope = "convolutions" if 2 * inside >= every else "all"
    found = layers if scope == "all" else convolutions
    require(bool(found), "scope", scope, f"{kind} has no convolution; allowed are all, auto")
    return found


def kept_count(total: int, target: float) -> int:
    """Number of weights left of `total` when the share `target` is removed; at least 1."""
    return max(1, round(total * (1 - target)))


def top_masks(scores: list[Tensor], sparsity: float) -> list[Tensor]:
    """Return masks (floats, shaped as `scores`) that remove the share `sparsity`, at exactly that.

    One ranking over all layers; of equal scores the first in order stays. A score that is not a
    number counts as the highest.
    """
    flat = torch.cat([score.detach().flatten() for score in scores])
    flat.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    keep = kept_count(len(flat), sparsity)
    if flat.is_cuda:
        mask = highest(flat, keep)
    else:
        # numpy selects with vector instructions: 15 times faster than kthvalue.
        place = len(flat) - keep
        flat = flat.float() if flat.dtype == torch.bfloat16 else flat  # which numpy does not know
        least = torch.from_numpy(np.partition(flat.numpy(), place))[place]
        mask = flat >= least
        if spare := int(mask.count_nonzero()) - keep:
            mask[(flat == least).nonzero().flatten()[-spare:]] = False
    parts = mask.to(scores[0].dtype).split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def highest(flat: Tensor, keep: int) -> Tensor:
    """Boolean mask of the `keep` largest of `flat` (n,), ties to the first; no device sync.

    By sorting: kthvalue has no deterministic form on CUDA.
    """
    return flat.sort(descending=True, stable=True).indices.argsort() < keep


def cubic_sparsity(target: float, share: float) -> float:
    """s (1 - (1 - share)^3) at `share` (0-1) of the ramp: Zhu and Gupta 2017, equation 1."""
    return target * (1 - (1 - min(share, 1.0)) ** 3)
