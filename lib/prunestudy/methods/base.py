"""What the training loop asks of a method."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.measure import Task
from prunestudy.shrink import fold
from prunestudy.values import Values

if TYPE_CHECKING:
    from prunestudy.datasets import Batches


# What a target may be a share of.
TARGETS = {
    "sparsity": "weights",
    "macs": "MACs",
    "parameters": "parameters",
    "rank": "rank",
    "energy": "energy",
}


class Params(Values):
    """Settings of a method."""


@dataclass(frozen=True)
class Phase:
    """A named part of the training: `share` of all steps, learning rates times `lr_scale`.

    `restart` begins the learning-rate schedule anew; otherwise it runs on from the phase before.
    `schedule` replaces the recipe's.
    """

    name: str
    share: float = 1.0
    lr_scale: float = 1.0
    restart: bool = False
    schedule: str | None = None


@dataclass(frozen=True)
class Progress:
    """Where the training is: `step` of `steps` (from 0) within `phase`, and over all phases.

    `loss` is that of the step, known from its backward pass on.
    """

    phase: str
    step: int
    steps: int
    total_step: int
    total_steps: int
    loss: float = math.nan


@dataclass(frozen=True)
class Context:
    """What a method may look at before training: images, task, device. Never the test images.

    `weight_decay` is the recipe's, which SGD adds to the gradient after `after_backward`.
    """

    train: "Batches"
    validation: "Batches"
    task: Task
    device: torch.device
    weight_decay: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        info = self.train.info
        return info.channels, info.height, info.width


class Method:
    """A method is what it does at the loop's hooks; this base does nothing: dense training.

    Order of the hooks: `attach` once; `prepare` once, with data; `start` at each phase; then per
    step `extra_loss`, `after_backward`, the optimisers, `after_step`; `end` at the end of each
    phase; `finish` once, then `measures` and `others`.

    `target_kinds` says of what the target is a share (of the weights, the MACs, ...); empty for a
    method without a target. With `from_scratch` only the shape of the parent is taken, so that
    its epochs do not count.
    """

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "dense"
    revision: ClassVar[int] = 1
    target_kinds: ClassVar[tuple[str, ...]] = ()
    from_scratch: ClassVar[bool] = False
    Params: ClassVar[type[Params]] = Params

    def __init__(
        self, params: Params, target: float | None = None, target_kind: str | None = None
    ) -> None:
        kinds = self.target_kinds
        if target_kind is None and kinds:
            target_kind = kinds[0]
        allowed = f"{self.name} takes {', '.join(kinds) or 'no target'}"
        require(target_kind in (kinds or (None,)), "target_kind", target_kind, allowed)
        if kinds:
            ok = isinstance(target, float) and 0 < target < 1
            what = TARGETS[target_kind]
            require(ok, "target", target, f"the share of {what} to remove, above 0 and below 1")
        else:
            require(target is None, "target", target, f"{self.name} takes no target")
        self.params, self.target, self.target_kind = params, target, target_kind

    def phases(self) -> tuple[Phase, ...]:
        """Parts of the training in order; their shares sum to 1."""
        return (Phase("train"),)

    def check(self, model: nn.Module) -> None:
        """Raise `InputError` for a net that the method cannot take; `model` is only looked at."""

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Put gates or masks on `model`, in place; random draws come from `generator`."""

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Look at data, where the method needs to; `model` is on its device."""

    def start(self, model: nn.Module, phase: str) -> None:
        """Prepare `model` for `phase`."""

    def end(self, model: nn.Module, phase: str) -> None:
        """Conclude `phase`."""

    def parameter_groups(self, model: nn.Module, phase: str) -> list[nn.Parameter]:  # noqa: ARG002
        """Parameters that the loop's SGD trains in `phase`."""
        return [p for p in model.parameters() if p.requires_grad]

    def own_optimizer(self, model: nn.Module, phase: str) -> torch.optim.Optimizer | None:
        """Optimiser of the method's own variables in `phase`, if it has any."""

    def extra_loss(self, model: nn.Module, progress: Progress) -> Tensor | None:
        """Term added to the task loss, or None."""

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        """Change gradients before the optimisers step."""

    def after_step(self, model: nn.Module, progress: Progress, lr: float) -> None:
        """Change weights, gates or masks after a step made at learning rate `lr`."""

    def finish(self, model: nn.Module) -> nn.Module:
        """Return an ordinary module without gates, masks or hooks that equals `model` in eval."""
        return fold(model)

    def measures(self, model: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        """More metrics of the finished net `model`, for the record."""
        return {}

    def others(self, model: nn.Module) -> dict[str, nn.Module]:  # noqa: ARG002
        """Other nets to score beside the finished `model`: `metric_NAME` of the record, by name."""
        return {}

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of the prunable weights that eval mode uses."""
        return 1.0

    def views(self, model: nn.Module) -> dict[str, AbstractContextManager]:  # noqa: ARG002
        """Other ways to look at `model` during validation, by name (a sampled net, say)."""
        return {}

    def row(self, model: nn.Module) -> dict[str, float]:  # noqa: ARG002
        """More columns of the history, at the end of an epoch."""
        return {}

    def arrays(self) -> dict[str, np.ndarray]:
        """What figures need of the run (small: 1 MB in all)."""
        return {}

    def per_weight(self) -> dict[str, np.ndarray]:
        """What is known of single weights; kept beside the weights, of any size, not tracked."""
        return {}

    def state(self) -> dict[str, Any]:
        """Everything not in the model's state that a resumed run needs (tensors, plain values)."""
        return {}

    def reshape(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Give `model` the layers it had when `state` was saved; its tensors are loaded next."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
