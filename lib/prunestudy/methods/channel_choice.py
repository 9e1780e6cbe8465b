"""Choosing channels for an application: what the paper's method and its controls share.

The trained net is pruned once, before any further training, to a share of its parameters. A
`Choice` knows the groups, their importance, the data of the search and what it has cost; a solver
turns it into channels kept. The controls are solvers that search nothing.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.measure import Application, Judgement, RefusedError
from prunestudy.methods.base import Params
from prunestudy.methods.channel_budget import Budget, require_target
from prunestudy.methods.channel_ranking import GroupL2, importance
from prunestudy.methods.channels import Channels
from prunestudy.shrink import ComponentGroup, Narrow, taylor

Loss = Callable[[Any, Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


class ChoiceParams(Params):
    """`importance` of the channels within a group; `taylor_batches` that its gradients are of.

    `most`: largest share of a group's channels that may go; `tolerance`: on the share of
    parameters removed; `samples`: validation images that a candidate is judged on; `constraints`
    such as "psnr >= 20"; `protect`: names of groups, layers, components, or "coupling". With
    `refuse` a result that breaks a constraint is an error, else it is recorded.
    """

    importance: Literal["taylor", "group_l2"] = "taylor"
    taylor_batches: Annotated[int, Field(ge=1)] = 16
    most: Annotated[float, Field(gt=0, lt=1)] = 0.95
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.01
    samples: Annotated[int, Field(ge=1)] = 256
    constraints: list[str] = []
    protect: list[str] = []
    refuse: bool = True


@dataclass(frozen=True)
class Point:
    """A candidate: channels kept in each group, the share of parameters removed, its judgement."""

    kept: tuple[int, ...]
    removed: float
    judgement: Judgement


@dataclass
class Choice:
    """The problem: which channels of `groups` go, so that `target` of the parameters is removed.

    `batches` gives training batches, over and over; `data` are those that candidates are judged
    on. `passes` counts samples: one forward is 1, forward and backward 3.
    """

    model: nn.Module
    groups: list[ComponentGroup]
    application: Application
    loss: Loss
    batches: Iterable[Batch]
    data: Sequence[Batch]
    target: float
    params: ChoiceParams
    passes: int = 0
    seen: dict[tuple[int, ...], Point] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_target(self.target, self.params.tolerance)
        name = type(self.model).__name__
        require(bool(self.groups), "model", name, "has no channels that could go")
        self.plain = [each.group for each in self.groups]
        self.frozen = [each.protected for each in self.groups]
        shape, names = tuple(self.data[0][0].shape[1:]), [each.name for each in self.groups]
        self.channels = Channels(self.model, shape, "parameters", names, norms=True)
        self.full = [group.channels for group in self.plain]
        self.small = Narrow(self.model, self.plain)
        self.samples = sum(len(x) for x, _ in self.data)
        self._stream = iter(self.batches)
        with torch.no_grad():
            losses = [self.loss(self.small.dense(x), x, y) * len(x) for x, y in self.data]
        self.dense_loss = float(sum(losses)) / self.samples
        self.passes += self.samples

    def batch(self) -> Batch:
        """The next training batch."""
        return next(self._stream)

    def scores(self) -> list[Tensor]:
        """The importance of each group's channels, mean 1 in each group."""
        if self.params.importance == "group_l2":
            score = importance(self.channels, self.small.dense, GroupL2.measure)
            return list(score.split(self.full))
        net, total = copy.deepcopy(self.small.dense).requires_grad_(True), None
        for _ in range(self.params.taylor_batches):
            x, y = self.batch()
            net.zero_grad()
            self.loss(net(x), x, y).backward()
            self.passes += 3 * len(x)
            scores = taylor(net, self.plain)
            total = scores if total is None else [a + b for a, b in zip(total, scores, strict=True)]
        return [score / self.params.taylor_batches for score in total]

    def budget(self, positions: Sequence[Tensor], frozen: Sequence[bool] = ()) -> Budget:
        """The budget of this problem with channels in the order of `positions`."""
        still = [a or b for a, b in zip(self.frozen, frozen or self.frozen, strict=True)]
        return Budget(self.channels, positions, self.params.most, still)

    def judge(self, budget: Budget, kept: Sequence[int]) -> Point:
        """The point with `kept` channels; each is judged, and its passes counted, once."""
        key = tuple(kept)
        if key not in self.seen:
            small = self.small(budget.indices(kept), own=False)
            judgement = self.application.judge(small, self.data)
            self.passes += self.samples
            self.seen[key] = Point(key, budget.removed(kept), judgement)
        return self.seen[key]

    def better(self, a: Point, b: Point | None) -> bool:
        """Whether `a` breaks its limits by less than `b`, or as little with a better objective."""
        if b is None or a.judgement.shortfall != b.judgement.shortfall:
            return b is None or a.judgement.shortfall < b.judgement.shortfall
        goal = self.application.objective
        return goal.better(a.judgement.values[goal.name], b.judgement.values[goal.name])

    def reach(self, budget: Budget, numbers: Sequence[float], parts: Sequence = ()) -> Point:
        """The point at `numbers` plus the offset that meets the target; refused if none does."""
        kept = budget.meet(numbers, self.target, parts)
        if kept is None:
            most = budget.removed(budget.least)
            raise RefusedError(
                f"target = {self.target:g}: at most {most:.4f} of the parameters can be removed",
                None,
                most,
            )
        return self.judge(budget, kept)

    def on_target(self, point: Point) -> bool:
        """Whether the share removed is within the tolerance."""
        return abs(point.removed - self.target) <= self.params.tolerance

    def closest(self, budget: Budget, numbers: Sequence[float]) -> float:
        """Largest share found that keeps every limit, by bisection of the offset at `numbers`."""
        low, high, found = 0.0, self.target, 0.0
        for _ in range(10):
            middle = (low + high) / 2
            point = self.judge(budget, budget.meet(numbers, middle))
            if point.judgement.holds:
                low, found = middle, max(found, point.removed)
            else:
                high = middle
        return found
