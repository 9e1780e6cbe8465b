"""Magnitude pruning and a random mask: the controls that every weight-level method must beat.

- `magnitude`: the smallest |w| of the trained parent are cut at once, then fine-tuned
  (Han et al. 2015, one round).
- `gradual_magnitude`: the cut share grows cubically, the mask is recomputed on the way and cut
  weights get no gradient (Zhu and Gupta 2017).
- `random`: a mask that knows nothing, then the same fine-tuning.

All rank over the whole net at once and keep exactly the target share.
"""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.methods.base import Method, Params, Phase, Progress
from prunestudy.methods.masks import (
    Mask,
    attach_each,
    cubic_sparsity,
    dense_weights,
    kept_count,
    set_masks,
    top_masks,
)


class Magnitude(Method):
    """One-shot global magnitude pruning of the start weights, then fine-tuning."""

    name: ClassVar[str] = "magnitude"
    title: ClassVar[str] = "one-shot magnitude"
    target_kinds: ClassVar[tuple[str, ...]] = ("sparsity",)

    def __init__(self, params: Params, *target: Any) -> None:
        super().__init__(params, *target)
        self.masks: list[Mask] = []
        self.generator: torch.Generator | None = None

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Put an all-ones mask on every convolution and linear layer."""
        self.masks, self.generator = attach_each(model, Mask), generator

    def start(self, model: nn.Module, phase: str) -> None:  # noqa: ARG002
        """Cut at once."""
        self.cut(model, self.target)

    def cut(self, model: nn.Module, sparsity: float) -> None:
        """Keep the weights of highest score; all others are masked."""
        scores = self.scores(model)
        keep = kept_count(sum(score.numel() for score in scores), sparsity)
        set_masks(self.masks, top_masks(scores, keep))

    def scores(self, model: nn.Module) -> list[Tensor]:
        """What the ranking is by, one tensor per layer: |w| of the weights in use, -1 if cut."""
        pairs = zip(dense_weights(model), self.masks, strict=True)
        return [torch.where(mask.mask == 1, w.detach().abs(), -1.0) for w, mask in pairs]

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of the masks that is one."""
        return sum(m.mask.sum().item() for m in self.masks) / sum(
            m.mask.numel() for m in self.masks
        )


class Random(Magnitude):
    """A random mask of the target share from the start, then fine-tuning."""

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "random"

    def scores(self, model: nn.Module) -> list[Tensor]:
        """Uniform noise."""
        return [
            torch.rand(w.shape, generator=self.generator, device=w.device)
            for w in dense_weights(model)
        ]


class GradualParams(Params):
    """`harden`: share of all steps after which the mask is fixed; `ramp`: share of that phase in
    which the sparsity grows; `period`: steps between masks; `prune_phase_lr`: learning rate until
    then, times the recipe's.
    """

    harden: Annotated[float, Field(gt=0, lt=1)] = 0.7
    ramp: Annotated[float, Field(gt=0, le=1)] = 0.8
    period: Annotated[int, Field(ge=1)] = 16
    prune_phase_lr: Annotated[float, Field(gt=0)] = 1.0


class GradualMagnitude(Magnitude):
    """Cubic sparsity schedule; a weight once cut has no gradient and stays at zero."""

    name: ClassVar[str] = "gradual_magnitude"
    title: ClassVar[str] = "gradual magnitude"
    Params: ClassVar[type[Params]] = GradualParams

    def phases(self) -> tuple[Phase, ...]:
        """The sparsity grows, then the mask stays."""
        p = self.params
        prune = Phase("prune", p.harden, lr_scale=p.prune_phase_lr, schedule="constant")
        return prune, Phase("fine_tune", 1 - p.harden, restart=True)

    def start(self, model: nn.Module, phase: str) -> None:
        """Nothing is cut at a start."""

    def after_step(self, model: nn.Module, progress: Progress, lr: float) -> None:  # noqa: ARG002
        """Raise the sparsity every `period` steps while pruning."""
        p, done = self.params, progress.step + 1
        if progress.phase == "prune" and done % p.period == 0:
            self.cut(model, cubic_sparsity(self.target, done / (p.ramp * progress.steps)))

    def end(self, model: nn.Module, phase: str) -> None:
        """Reach the target exactly at the end of the pruning."""
        if phase == "prune":
            self.cut(model, self.target)

    def finish(self, model: nn.Module) -> nn.Module:
        """Reach the target, if the pruning was too short for a step, and fold the mask in."""
        if self.kept_share(model) == 1.0:
            self.cut(model, self.target)
        return super().finish(model)
