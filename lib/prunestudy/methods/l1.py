"""LASSO, the paper's counterpart: a penalty on the size of the weights instead of their number.

Proximal gradient: after each step w <- sign(w) max(|w| - lr * lambda, 0), which gives exact zeros
and shrinks every weight that is kept. lambda is steered to the target share as for the gates;
then exactly the target share of largest |w| is kept and fine-tuned.
"""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from prunestudy.methods.base import Params, Phase, Progress
from prunestudy.methods.magnitude import Magnitude
from prunestudy.methods.masks import dense_weights
from prunestudy.methods.steering import Steering


class L1Params(Params):
    """`ramp`: share of the penalty's phase in which the kept share falls to the target; `harden`:
    share of all steps after which the mask is fixed; `penalty_phase_lr`: learning rate until
    then, times the recipe's.
    """

    ramp: Annotated[float, Field(gt=0, le=1)] = 0.8
    harden: Annotated[float, Field(gt=0, lt=1)] = 0.55
    penalty_phase_lr: Annotated[float, Field(gt=0)] = 0.5


class L1(Magnitude):
    """Proximal L1 (LASSO) to a target share, then fine-tuning of what is left."""

    name: ClassVar[str] = "l1"
    title: ClassVar[str] = "L1 (LASSO)"
    Params: ClassVar[type[Params]] = L1Params

    def __init__(self, params: L1Params, *target: Any) -> None:
        super().__init__(params, *target)
        # A fifth more than the target, so that the mask never has to keep a zero.
        self.steering = Steering(min(1.0, 1.2 * (1 - self.target)), params.ramp)

    def phases(self) -> tuple[Phase, ...]:
        """The penalty, then fine-tuning without it."""
        p = self.params
        penalty = Phase("penalty", p.harden, lr_scale=p.penalty_phase_lr, schedule="constant")
        return penalty, Phase("fine_tune", 1 - p.harden, restart=True)

    def start(self, model: nn.Module, phase: str) -> None:
        """Nothing is cut at a start."""

    def end(self, model: nn.Module, phase: str) -> None:
        """Fix the mask at the end of the penalty."""
        if phase == "penalty":
            self.cut(model, self.target)

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: Progress, lr: float) -> None:
        """Soft-threshold every weight, then steer lambda."""
        if progress.phase != "penalty":
            return
        weights = dense_weights(model)
        total = sum(w.numel() for w in weights)
        # At first a thousandth of the mean |w| a step.
        self.steering.start(1e-3 * sum(w.abs().sum().item() for w in weights) / total / lr)
        for weight in weights:
            weight.copy_(torch.nn.functional.softshrink(weight, self.steering.strength * lr))
        step = progress.step + 1
        if self.steering.due(step):
            kept = sum(int(w.count_nonzero()) for w in weights) / total
            self.steering.update(kept, step, progress.steps)

    def finish(self, model: nn.Module) -> nn.Module:
        """Fix the mask, if no step did, and fold it in."""
        if super().kept_share(model) == 1.0:
            self.cut(model, self.target)
        return super().finish(model)

    def kept_share(self, model: nn.Module) -> float:
        """Share of weights that are not zero."""
        pairs = list(zip(dense_weights(model), self.masks, strict=True))
        kept = sum(int((w * m.mask).count_nonzero()) for w, m in pairs)
        return kept / sum(w.numel() for w, _ in pairs)

    def row(self, model: nn.Module) -> dict[str, float]:  # noqa: ARG002
        """The penalty's strength."""
        return {"lambda": self.steering.strength or 0.0}

    def state(self) -> dict[str, Any]:
        """The steering."""
        return {"steering": self.steering.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.steering.load_state(state["steering"])
