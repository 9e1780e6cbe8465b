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
| W | `parametrizations.weight.original` of a layer, dense, never overwritten by zeros |
| M | `Attention.mask` |
| A, n | `Attention.attention`, `Attention.scale` |
| alpha | `MagnitudeAttentionParams.alpha` |
| e_t | `ramp`, a share of all steps; exploitation begins there or at `exploit_from` |

With alpha = 0 and without exploitation this is DPF (dpf.py), bit for bit. Only a net-wide n lets A
rank layers: batch norm cancels a layer's own factor in the forward pass (derived). A maximum makes
A small, and with it every update (derived). A is a constant in the backward pass; differentiating
through it as well (Powerpropagation) multiplies all gradients by 1 + alpha when n is constant
(derived), so it acts as a learning rate: `differentiate`. A weight at exactly 0 would stay there,
which is why the dense weights are kept.

Unknown in the paper, ours here: the formula of A, n, alpha, the period of the mask, where
exploitation begins, and that n and the values of cut weights freeze together with M: nothing that
a cut weight does reaches the output any more. `passes` leaves A out of one of the two passes.
"""

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.methods.base import Phase, Progress
from prunestudy.methods.dpf import Dpf, DpfParams
from prunestudy.methods.masks import Mask, dense_weights, product

# Histograms of A: bins of 0.05, the last one with all above.
_BINS, _HIGHEST = 80, 4.0


class _Attend(torch.autograd.Function):
    """weight * forward; the gradient is multiplied by `backward` (None: by 1)."""

    @staticmethod
    def forward(ctx, weight: Tensor, forward: Tensor, backward: Tensor | None) -> Tensor:
        ctx.save_for_backward(backward)
        return product(weight, forward)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return gradient if factor is None else gradient * factor, None, None


class Attention(Mask):
    """Parametrisation `w -> mask * (|w| / scale)^alpha * w` of one layer's weight."""

    def __init__(self, weight: Tensor, params: "MagnitudeAttentionParams") -> None:
        super().__init__(weight)
        self.register_buffer("scale", torch.ones_like(weight.detach().flatten()[0]))
        self.params, self.frozen = params, False

    def attention(self, weight: Tensor) -> Tensor:
        """Return A, in the shape of `weight`."""
        return weight.detach().abs().div_(self.scale).pow_(self.params.alpha)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the effective weight (same shape)."""
        p, attention = self.params, self.attention(weight)
        forward = self.mask if p.passes == "backward" else attention * self.mask
        backward = None if p.passes == "forward" else attention
        if self.frozen:
            backward = self.mask if backward is None else attention * self.mask
        if p.differentiate:
            backward = (1 + p.alpha) * (torch.ones_like(weight) if backward is None else backward)
        return _Attend.apply(weight, forward, backward)


class MagnitudeAttentionParams(DpfParams):
    """Our readings of what the paper leaves open; shares are of all steps.

    `alpha`: strength of the attention; `norm`: what n is; `exploitation`: whether the mask freezes,
    at `exploit_from` (None: at the end of `ramp`); `passes`: where A is used; `differentiate`: the
    derivative through A, too.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.5
    norm: Literal["network_mean", "network_max", "layer_max"] = "network_mean"
    exploitation: bool = True
    exploit_from: Annotated[float, Field(gt=0)] | None = None
    passes: Literal["both", "forward", "backward"] = "both"
    differentiate: bool = False


class MagnitudeAttention(Dpf):
    """DPF with an attention by magnitude in both passes, and a last part with a frozen mask."""

    name: ClassVar[str] = "magnitude_attention"
    title: ClassVar[str] = "magnitude attention (ours)"
    Params: ClassVar[type[DpfParams]] = MagnitudeAttentionParams

    def __init__(self, params: MagnitudeAttentionParams, *target: Any) -> None:
        super().__init__(params, *target)
        begin, own = params.ramp, params.exploit_from
        if not params.exploitation:
            allowed = "nothing where exploitation is off"
            require(own is None, "params.exploit_from", own, allowed)
        elif own is None:
            require(begin < 1, "params.ramp", begin, "below 1, where exploitation begins then")
        else:
            allowed = f"from ramp = {begin:g} on and before the last epoch (below 1)"
            require(begin <= own < 1, "params.exploit_from", own, allowed)
            begin = own
        self.begin = begin
        self._held: list[Tensor] = []
        self._histograms: list[Tensor] = []

    def phases(self) -> tuple[Phase, ...]:
        """Exploration, then exploitation; one learning-rate schedule over both."""
        if not self.params.exploitation:
            return super().phases()
        return Phase("explore", self.begin), Phase("exploit", 1 - self.begin)

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Put the attention on every weight in the scope."""
        super().attach(model, generator)
        self._set_scale(model)
        self._histograms = [self._histogram(model)]

    def parametrisation(self, weight: Tensor) -> Mask:
        """What goes on one layer's `weight`."""
        return Attention(weight, self.params)

    def start(self, model: nn.Module, phase: str) -> None:
        """Freeze the mask, n and the cut weights where exploitation begins."""
        if phase == "exploit":
            if self._cut < self.target:
                self.update(model, self.target)
            self.trail.move(dense_weights(model))
            self.trail.close([m.mask for m in self.masks])
            self._freeze()

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        """Remember the weights as they are when exploitation begins, or is resumed."""
        if progress.phase == "exploit" and not self._held:
            self._held = [w.detach().clone() for w in dense_weights(model)]

    def after_step(self, model: nn.Module, progress: Progress, lr: float) -> None:
        """Mask and n while exploring; then undo what momentum and decay did to cut weights."""
        if progress.phase == "exploit":
            self._hold(model)
        super().after_step(model, progress, lr)
        if progress.phase == "explore":
            self._set_scale(model)

    def end(self, model: nn.Module, phase: str) -> None:
        """Choose the mask that exploitation will keep."""
        updates = self.trail.updates
        due = not updates or updates[-1].step < self._step
        if phase == "explore" and self.params.exploitation and due:
            self.update(model, self.target)
        super().end(model, phase)

    def row(self, model: nn.Module) -> dict[str, float]:
        """DPF's columns, and n of the first layer; counts the attention of all and kept weights."""
        self._histograms.append(self._histogram(model))
        return super().row(model) | {"scale": self.masks[0].scale.item()}

    def arrays(self) -> dict[str, np.ndarray]:
        """The trail; `attention` (epochs + 1, 2, 80): histograms of A over all and kept weights."""
        counts = torch.stack(self._histograms).numpy().astype(np.int32)
        return super().arrays() | {"attention": counts}

    def state(self) -> dict[str, Any]:
        """DPF's state, whether the mask is frozen, histograms so far."""
        own = {"frozen": self.masks[0].frozen, "histograms": self._histograms}
        return super().state() | own

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned; the cut weights lie in the model."""
        super().load_state(state)
        self._histograms = list(state["histograms"])
        if state["frozen"]:
            self._freeze()

    @torch.no_grad()
    def _set_scale(self, model: nn.Module) -> None:
        weights = dense_weights(model)
        if self.params.norm == "network_mean":
            sums = torch.stack([torch.linalg.vector_norm(w, 1) for w in weights])
            scales = [sums.sum() / sum(w.numel() for w in weights)] * len(weights)
        else:
            scales = [torch.linalg.vector_norm(w, torch.inf) for w in weights]
            if self.params.norm == "network_max":
                scales = [torch.stack(scales).max()] * len(scales)
        for each, scale in zip(self.masks, scales, strict=True):
            # A layer of zeros: A is 0 there, not 0 / 0.
            each.scale.copy_(scale.clamp(min=torch.finfo(scale.dtype).tiny))

    def _freeze(self) -> None:
        for each in self.masks:
            each.frozen = True

    @torch.no_grad()
    def _hold(self, model: nn.Module) -> None:
        for weight, each, held in zip(dense_weights(model), self.masks, self._held, strict=True):
            weight.copy_(torch.where(each.mask == 1, weight, held))

    @torch.no_grad()
    def _histogram(self, model: nn.Module) -> Tensor:
        pairs = list(zip(dense_weights(model), self.masks, strict=True))
        every = torch.cat([m.attention(w).flatten() for w, m in pairs]).cpu().float()
        kept = torch.cat([m.mask.flatten() for _, m in pairs]).cpu() == 1
        every.clamp_(max=_HIGHEST)
        return torch.stack([torch.histc(a, _BINS, 0, _HIGHEST) for a in (every, every[kept])])
