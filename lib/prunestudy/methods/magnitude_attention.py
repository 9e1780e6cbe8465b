r"""MAP, Magnitude Attention-based Dynamic Pruning (Back, Ahn, Kim; arXiv 2306.05056, 2023).

The importance of a weight, its magnitude, is used in the forward *and* the backward pass of the
whole training, as a continuous attention instead of a 0/1 mask; the training first explores, then
exploits; the sparsity grows gradually (paper: abstract). The formulas are our reading:

    A  = (|W| / n)^alpha             attention; n: mean |W| of the net
    W~ = M * A * W                   forward; M keeps the largest |W| of the dense weights
    dW = A * dW~                     backward, exploring: cut weights are updated and may return
    dW = M * A * dW~                 backward, exploiting: M is frozen, kept weights alone move
    s(e) = s (1 - (1 - e / e_t)^3)   sparsity up to e_t, then s           (near paper: DCIL's code)

| symbol | code |
|---|---|
| W | `MagnitudeAttention.weights`, dense, never overwritten by zeros |
| M | `_Attention.mask` |
| A, n | `_Attention.attention`, `_Attention.scale` |
| e_t | `ramp`, a share of all steps; exploitation begins there |

With alpha = 0 and without exploitation this is DPF (weights.py), bit for bit. Only a net-wide n
lets A rank layers: batch norm cancels a layer's own factor in the forward pass. A is a constant in
the backward pass; differentiating through it (Powerpropagation) multiplies all gradients by
1 + alpha: `differentiate`. A weight at exactly 0 would stay there, so the dense ones are kept.

A step moves W~ by (1 + alpha) A^2 times what it would without attention, in the mean over normal
weights 1.5 at alpha = 0.5 and 3.1 at 1, more once only large ones are kept, and little if n is a
maximum: alpha is also a learning rate, which `normalise` takes out. Of a layer before batch norm,
whose gradient goes as 1 / |W~|, the direction turns 1 + alpha times as fast, whatever A. (Derived.)

Unknown in the paper, ours here: the formula of A, n, alpha, the period of the mask, where
exploitation begins, and that n and the values of cut weights freeze together with M: nothing that
a cut weight does reaches the output any more. `passes` leaves A out of one of the two passes.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.methods.base import At, Context, Phase
from prunestudy.methods.masks import Mask, Masked, Scope, layers_in, multiply
from prunestudy.values import Count, Share


class _Attention(Mask):
    """Parametrisation `w -> mask * (|w| / scale)^alpha * w` of one layer's weight.

    It has `feedback` while exploring; without, the mask is frozen.
    """

    def __init__(self, weight: Tensor, alpha: float, passes: str, *, differentiate: bool) -> None:
        super().__init__(weight, feedback=True)
        self.register_buffer("scale", torch.ones_like(weight.detach().flatten()[0]))
        self.alpha, self.passes, self.differentiate = alpha, passes, differentiate

    def attention(self, weight: Tensor) -> Tensor:
        """Return A, in the shape of `weight`."""
        return weight.detach().abs().div_(self.scale).pow_(self.alpha)

    def forward(self, weight: Tensor) -> Tensor:
        attention = self.attention(weight)
        forward = self.mask if self.passes == "backward" else attention * self.mask
        backward = None if self.passes == "forward" else attention
        if not self.feedback:
            backward = self.mask if backward is None else attention * self.mask
        if self.differentiate:
            backward = torch.ones_like(weight) if backward is None else backward
            backward = (1 + self.alpha) * backward
        return multiply(weight, forward, backward)


class MagnitudeAttention(Masked):
    """A mask with an attention by magnitude in both passes, which freezes in the last part.

    `scope`: which layers, see `layers_in`; `ramp`: e_t; `period`: steps between masks; `norm`: what
    n is; `exploitation`: whether the mask freezes at the end of `ramp`; `passes`: where A is used;
    `differentiate`: through A, too; `normalise`: divide gradients by `rate`, so that alphas are
    compared at one effective rate; `bounded`: whether cut weights' gradients are scaled down,
    see `Masked.bound`.
    """

    name, title = "magnitude_attention", "magnitude attention (ours)"
    scope: Scope = "auto"
    ramp: Share = 0.75
    period: Count = 16
    alpha: Annotated[float, Field(ge=0)] = 0.5
    norm: Literal["network_mean", "network_max", "layer_max"] = "network_mean"
    exploitation: bool = True
    passes: Literal["both", "forward", "backward"] = "both"
    differentiate: bool = False
    normalise: bool = False
    bounded: bool | None = None

    def __init__(self, target: float | None = None, of: str | None = None, **settings: Any) -> None:
        super().__init__(target, of, **settings)
        right = self.ramp < 1 or not self.exploitation
        require(right, "ramp", self.ramp, "below 1, since exploitation begins there")
        self.frozen_weights: list[Tensor] = []

    def phases(self) -> tuple[Phase, ...]:
        """Exploration, then exploitation; one learning-rate schedule over both."""
        if not self.exploitation:
            return (Phase("explore"),)
        return Phase("explore", self.ramp), Phase("exploit", 1 - self.ramp)

    def attach(self, model: nn.Module, context: Context) -> None:
        """Put the attention on every weight in the scope."""
        for name, layer in layers_in(model, self.scope).items():
            line = "must be trainable with attention"
            require(layer.weight.requires_grad, f"{name}.weight", "frozen", line)
        super().attach(model, context)
        # Summed in the order of a contiguous tensor, as in all earlier runs.
        self._set_scale([weight.contiguous() for weight in self.weights])

    def mask_for(self, weight: Tensor) -> _Attention:
        """The attention of one layer's `weight`."""
        return _Attention(weight, self.alpha, self.passes, differentiate=self.differentiate)

    @property
    def frozen(self) -> bool:
        """Whether exploitation has begun."""
        return not self.masks[0].feedback

    def after_backward(self, at: At) -> None:  # noqa: ARG002
        """Bound the feedback; match rates; remember weights as exploitation begins or resumes."""
        self.bound(self.bounded)
        if self.normalise:
            rate = self.rate()
            for weight in self.weights:
                if weight.grad is not None:
                    weight.grad.div_(rate)
        if self.frozen and not self.frozen_weights:
            self.frozen_weights = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def rate(self) -> Tensor:
        """How much further than without attention a step moves the kept W~, on average (0-d).

        A step of W is scaled by A, and moves W~ by its derivative (1 + alpha) A, n being constant.
        """
        forward, backward = self.passes != "backward", self.passes != "forward"
        factor = (1 + self.alpha) ** (forward + self.differentiate)
        pairs = list(zip(self.masks, self.weights, strict=True))
        moved = sum((m.mask * m.attention(w) ** (forward + backward)).sum() for m, w in pairs)
        return factor * moved / sum(m.mask.sum() for m, _ in pairs)

    @torch.no_grad()
    def after_step(self, at: At) -> None:  # noqa: ARG002
        """Set n while exploring; then undo what momentum and decay did to cut weights."""
        if not self.frozen:
            self._set_scale(self.weights)
            return
        for weight, each, held in zip(self.weights, self.masks, self.frozen_weights, strict=True):
            weight.copy_(torch.where(each.mask == 1, weight, held))

    def update(self, at: At) -> None:
        """Choose masks while exploring; freeze the mask, n and cut weights for exploitation."""
        if self.frozen:
            return
        self.grow(at, self.period, self.ramp * at.total_steps)
        ends = at.last or at.phase == "exploit"  # exploration may be too short for a step
        if ends and (self.exploitation or self.sparsity < self.target):
            self.cut(self.target, at.total_step)
        if ends and self.exploitation:
            for each in self.masks:
                each.feedback = False

    def log(self) -> dict[str, float]:
        """The share of weights kept; n of the first layer."""
        return super().log() | {"scale": self.masks[0].scale.item()}

    @torch.no_grad()
    def _set_scale(self, weights: list[Tensor]) -> None:
        mean = self.norm == "network_mean"
        sizes = torch.stack(torch._foreach_norm(weights, 1 if mean else torch.inf))
        if mean:
            sizes = sizes.sum() / self.size
        elif self.norm == "network_max":
            sizes = sizes.max()
        # A layer of zeros: A is 0 there, not 0 / 0.
        scales = sizes.clamp(min=torch.finfo(sizes.dtype).tiny).expand(len(weights))
        torch._foreach_copy_([each.scale for each in self.masks], scales.unbind())
