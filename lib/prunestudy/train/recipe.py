"""How the weights are trained: epochs, batches, optimiser and learning-rate schedule."""

import math
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn

from prunestudy.errors import InputError
from prunestudy.values import Values, first_wrong

_Within = Annotated[float, Field(gt=0, lt=1)]


class Recipe(Values):
    """Settings of a training; each phase of a method runs its own schedule from `lr` downwards.

    `epochs` may be 0 where nothing is trained; `steps` ends the training within its last epoch (0:
    whole epochs). With `optimizer` "adam", `momentum` is its first decay rate. The first
    `warmup_steps` rise from `warmup_from` (share of `lr`) to `lr`; `milestones` (of a step
    schedule) are shares of the phase, `shift` is in pixels. A batch goes through the net in
    `pieces` where memory is short; the step is the whole batch's, but batch norm sees each piece by
    itself. `period`: steps between host-side updates (masks, closing, steering, losses); 0: steps /
    200, in 1 to 16. With `one_schedule` it runs over all phases, and a method's own rates,
    schedules and restarts count for nothing.
    """

    epochs: Annotated[int, Field(ge=0, le=1_000_000)]
    steps: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    lr: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(ge=1)] = 128
    pieces: Annotated[int, Field(ge=1)] = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine", "step", "poly"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    warmup_from: Annotated[float, Field(ge=0, le=1)] = 0.0
    milestones: Annotated[tuple[_Within, ...], Field(strict=False)] = (0.5, 0.75)  # or a list
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    power: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    period: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    one_schedule: bool = False

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(first_wrong(error, type(self))) from None

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise ValueError("nesterov = True: needs a momentum above 0")
        return self

    def over(self, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of `weights`."""
        common = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "adam":
            return torch.optim.Adam(weights, betas=(self.momentum, 0.999), **common)
        sgd = {"momentum": self.momentum, "nesterov": self.nesterov}
        return torch.optim.SGD(weights, **common, **sgd)

    def rate(self, phases: Any, ends: list[int], index: int, step: int) -> float:
        """Learning rate of step `step` (from 0) of all, in phase `index`; `ends`: `boundaries`."""
        first = max((i for i in range(index + 1) if phases[i].restart), default=0)
        last = next((i for i in range(index + 1, len(phases)) if phases[i].restart), len(phases))
        begin, here = (ends[first - 1] if first else 0), phases[index]
        return self.lr_at(step - begin, ends[last - 1] - begin, here.schedule) * here.lr_scale

    def lr_at(self, step: int, steps: int, schedule: str | None = None) -> float:
        """Learning rate of step `step` (from 0) of `steps`, by `schedule` or the recipe's own."""
        if step < self.warmup_steps:
            first = self.lr * self.warmup_from
            return first + (self.lr - first) * (step + 1) / self.warmup_steps
        done = step / steps
        match schedule or self.schedule:
            case "cosine":
                return self.lr * 0.5 * (1 + math.cos(math.pi * done))
            case "step":
                return self.lr * self.gamma ** sum(done >= m for m in self.milestones)
            case "poly":
                return self.lr * (1 - done) ** self.power
        return self.lr
