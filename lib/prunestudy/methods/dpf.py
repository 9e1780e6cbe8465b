r"""Dynamic Model Pruning with Feedback (Lin, Stich, Barba, Dmitriev, Jaggi; ICLR 2020): a control.

    forward   W~ = M * W                   M: the largest |W| of the *dense* weights, over the net
    backward  dW = dW~                     straight through: cut weights are updated, too

M is recomputed every `period` steps, to the end of the training, so a weight that was cut may
come back. The sparsity grows by the cubic schedule s (1 - (1 - e / e_t)^3) and stays at s.

| DPF | code |
|---|---|
| w (dense model) | `parametrizations.weight.original` of a layer |
| m | `StraightThrough.mask` |
| p (reparametrisation period) | `DpfParams.period` |

Ours: e_t, and which layers (`scope`), as in the paper that this is the control of.
"""

import math
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy import measure
from prunestudy.errors import require
from prunestudy.methods.base import Context, Method, Params, Phase, Progress
from prunestudy.methods.masks import (
    Mask,
    Scope,
    attach_each,
    cubic_sparsity,
    dense_weights,
    kept_count,
    layer_names,
    layers_in,
    product,
    set_masks,
    top_masks,
)
from prunestudy.methods.trail import Trail


class _StraightThrough(torch.autograd.Function):
    """weight * mask; the gradient passes as it is."""

    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG004
        return product(weight, mask)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


class StraightThrough(Mask):
    """Parametrisation `w -> w * mask` whose gradient reaches the cut weights as well."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight (same shape)."""
        return _StraightThrough.apply(weight, self.mask)


class DpfParams(Params):
    """`ramp`: e_t, the share of all steps in which the sparsity grows; `period`: steps between
    masks; `scope`: which layers ("auto": the convolutions, but all where linear layers hold most).
    """

    ramp: Annotated[float, Field(gt=0, le=1)] = 0.75
    period: Annotated[int, Field(ge=1)] = 16
    scope: Scope = "auto"


class Dpf(Method):
    """A global mask by |w| of dense weights that are trained on; cut weights may return."""

    name: ClassVar[str] = "dpf"
    title: ClassVar[str] = "dynamic pruning with feedback"
    target_kinds: ClassVar[tuple[str, ...]] = ("sparsity",)
    Params: ClassVar[type[Params]] = DpfParams

    def __init__(self, params: DpfParams, *target: Any) -> None:
        super().__init__(params, *target)
        self.masks: list[Mask] = []
        self.trail: Trail | None = None
        self.explored = 0  # steps in which cut weights were updated
        self._cut = 0.0  # sparsity of the mask in force
        self._step, self._loss = 0, math.nan
        self._told = 0  # updates that the history has
        self._macs: dict[str, int] = {}

    def phases(self) -> tuple[Phase, ...]:
        """One: the mask never freezes."""
        return (Phase("explore"),)

    def check(self, model: nn.Module) -> None:
        """Refuse a `model` without weights in the scope, or a target that cuts none of them."""
        total = sum(layer.weight.numel() for layer in layers_in(model, self.params.scope))
        cut = total - kept_count(total, self.target)
        require(cut > 0, "target", self.target, f"cuts none of {total} weights: nothing to prune")

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:  # noqa: ARG002
        """Put an all-ones mask on every weight in the scope; refuse a net that is sparse enough."""
        self.check(model)
        self.masks = attach_each(model, self.parametrisation, self.params.scope)
        weights = dense_weights(model)
        zeros = 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
        allowed = f"above {zeros:.4f}, the share of zeros at the start: nothing left to prune"
        require(zeros < self.target, "target", self.target, allowed)
        self.trail = Trail(layer_names(model), weights)

    def parametrisation(self, weight: Tensor) -> Mask:
        """What goes on one layer's `weight`."""
        return StraightThrough(weight)

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Count the layers' multiplications, for the cost of training."""
        self._macs = measure.layer_macs(model, torch.zeros(1, *context.shape))
        # Once more: now the weights are on their device.
        self.trail = Trail(layer_names(model), dense_weights(model))

    def after_step(self, model: nn.Module, progress: Progress, lr: float) -> None:  # noqa: ARG002
        """Recompute the mask every `period` steps while exploring."""
        self._step, self._loss = progress.total_step + 1, progress.loss
        exploring = progress.phase == "explore"
        self.explored += exploring
        if self._step % self.params.period:
            return
        self.trail.move(dense_weights(model))
        if exploring:
            ramp = self.params.ramp * progress.total_steps
            self.update(model, cubic_sparsity(self.target, self._step / ramp))

    @torch.no_grad()
    def update(self, model: nn.Module, sparsity: float) -> None:
        """Keep the largest |w| of the stored dense weights; write the change into the trail."""
        sizes = [w.abs() for w in dense_weights(model)]
        before = [m.mask.clone() for m in self.masks]
        keep = kept_count(sum(size.numel() for size in sizes), sparsity)
        set_masks(self.masks, top_masks(sizes, keep))
        self._cut = sparsity
        after = [m.mask for m in self.masks]
        self.trail.record(self._step, self._loss, sizes, before, after)

    def end(self, model: nn.Module, phase: str) -> None:
        """Reach the target, if the last update did not."""
        if phase == "explore" and self._cut < self.target:
            self.update(model, self.target)

    def finish(self, model: nn.Module) -> nn.Module:
        """Reach the target, if the training was too short for a step, and fold the mask in."""
        if self._cut < self.target:
            self.update(model, self.target)
        self.trail.move(dense_weights(model))
        self.trail.close([m.mask for m in self.masks])
        return super().finish(model)

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of the masks that is one."""
        kept = sum(m.mask.sum().item() for m in self.masks)
        return kept / sum(m.mask.numel() for m in self.masks)

    def row(self, model: nn.Module) -> dict[str, float]:  # noqa: ARG002
        """Threshold of the last mask; how many weights left and came back in this epoch."""
        updates = self.trail.updates
        new, self._told = updates[self._told :], len(updates)
        return {
            "threshold": updates[-1].threshold if updates else 0.0,
            "cut": sum(sum(u.cut) for u in new),
            "returned": sum(sum(u.returned) for u in new),
        }

    def measures(self, model: nn.Module) -> dict[str, float]:  # noqa: ARG002
        """What the trail comes to.

        `scope_weights`, `scope_sparsity`: of the layers that are pruned. `returns`: how often a
        weight came back, on average. `surviving`: share of all movement of weights that fell on
        weights kept in the end, in all and by part of the training. `layer_focus`: density of the
        layer in which a movement falls, over the net's (1: updates do not prefer dense layers).
        `train_cost`: see `_train_cost`.
        """
        sizes = np.array(self.trail.sizes)
        kept = np.array([int(m.mask.count_nonzero()) for m in self.masks])
        density, overall = kept / sizes, kept.sum() / sizes.sum()
        movement = self.trail.movement()
        every, surviving = movement.sum(0).T
        parts = zip(("explore", "exploit"), movement.sum(1), strict=False)
        found = {
            "scope_weights": int(sizes.sum()),
            "scope_sparsity": float(1 - overall),
            "returns": sum(sum(u.returned) for u in self.trail.updates) / int(sizes.sum()),
            "surviving": _share(surviving.sum(), every.sum()),
            **{f"surviving_{part}": _share(kept, total) for part, (total, kept) in parts},
            "layer_focus": _share(every @ density, every.sum() * overall),
        }
        return found | ({"train_cost": self._train_cost()} if self._macs and self._step else {})

    def _train_cost(self) -> float:
        """Multiplications of the training, as a share of the dense net's, if zeros were skipped.

        Sparse forward pass and gradient by the input; the gradient by the weights is dense while
        cut weights are updated and sparse after that. Layers outside the scope count as dense.
        """
        steps, macs = self._step, dict(self._macs)
        sizes = np.array(self.trail.sizes)
        inside = np.array([macs.pop(name) for name in self.trail.names])
        kept = self.trail.kept_steps(steps)
        late = kept - self.trail.kept_steps(self.explored)
        passes = (2 * kept + late) / sizes + self.explored
        dense = 3 * steps * (inside.sum() + sum(macs.values()))
        return float(1 - (inside @ (3 * steps - passes)) / dense)

    def arrays(self) -> dict[str, np.ndarray]:
        """The trail; see `Trail.arrays`."""
        return self.trail.arrays()

    def per_weight(self) -> dict[str, np.ndarray]:
        """When and at what magnitude each weight was cut; see `Trail.per_weight`."""
        return self.trail.per_weight([m.mask for m in self.masks])

    def state(self) -> dict[str, Any]:
        """The trail, and how far the schedule is."""
        return {"trail": self.trail.state(), **{key: getattr(self, key) for key in _PLAIN}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.trail.load_state(state["trail"])
        for key in _PLAIN:
            setattr(self, key, state[key])


_PLAIN = ("explored", "_cut", "_step", "_loss", "_told")


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
