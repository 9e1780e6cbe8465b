"""Choosing channels for an application: what the paper's method and its controls share.

The trained net is pruned once, before any further training, to a share of its parameters. A
`Choice` knows the groups, their importance, the data of the search and what it has cost; a solver
turns it into channels kept. The controls are solvers that search nothing.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy import measure
from prunestudy.errors import InputError
from prunestudy.measure import Application, Judgement, RefusedError
from prunestudy.measure.forward import evaluating
from prunestudy.methods.base import Context, Method, Params
from prunestudy.shrink import (
    Budget,
    ComponentGroup,
    Narrow,
    Parameters,
    component_groups,
    group_l2,
    require_target,
    spread_out,
    taylor,
)

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
        self.plain = [each.group for each in self.groups]
        self.frozen = [each.protected for each in self.groups]
        self.count = Parameters(self.model, self.plain)
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
            return group_l2(self.small.dense, self.plain)
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
        return Budget(self.count, positions, self.params.most, still)

    def judge(self, budget: Budget, kept: Sequence[int]) -> Point:
        """The point with `kept` channels; each is judged, and its passes counted, once."""
        key = tuple(kept)
        if key not in self.seen:
            small = self.small(budget.indices(kept), own=False)
            judgement = self.application.judge(small, self.data)
            self.passes += self.samples
            self.seen[key] = Point(key, self.count.removed(kept), judgement)
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
            most = self.count.removed(budget.least)
            raise RefusedError(
                f"target = {self.target:g}: at most {most:.4f} of the parameters can be removed",
                None,
                most,
            )
        return self.judge(budget, kept)

    def accept(self, budget: Budget, numbers: Sequence[float], best: Point) -> Point:
        """Return `best` if it is on target and keeps every limit; refuse it otherwise.

        The refusal names the largest share found that keeps the limits, by bisection on the
        target along the same numbers.
        """
        over = best.removed - self.target
        if abs(over) > self.params.tolerance:
            why = f"the nearest whole channels remove {best.removed:.4f}, {over:+.4f}"
            raise RefusedError(f"target = {self.target:g}: {why}", best.judgement, best.removed)
        if best.judgement.holds or not self.params.refuse:
            return best
        closest = self._closest(budget, numbers)
        raise RefusedError(
            f"target = {self.target:g}: refused, {best.judgement}; "
            f"the closest that holds removes {closest:.4f} of the parameters",
            best.judgement,
            closest,
        )

    def _closest(self, budget: Budget, numbers: Sequence[float]) -> float:
        low, high, found = 0.0, self.target, 0.0
        for _ in range(12):
            middle = (low + high) / 2
            point = self.judge(budget, budget.meet(numbers, middle))
            if point.judgement.holds:
                low, found = middle, max(found, point.removed)
            else:
                high = middle
        return found


@dataclass
class Pruned:
    """A pruned net with all that led to it; `undo` gives the dense one back, bit for bit."""

    model: nn.Module
    point: Point
    dense: nn.Module
    choice: Choice
    budget: Budget

    def undo(self) -> nn.Module:
        """The dense net as it was, whatever has been done to the small one since."""
        return copy.deepcopy(self.dense)

    def report(self) -> list[dict[str, Any]]:
        """One row per group: where it lies, what was removed, what that alone costs."""
        full = list(self.choice.count.full)
        before = self.choice.judge(self.budget, full).judgement
        rows = []
        for i, (each, kept) in enumerate(zip(self.choice.groups, self.point.kept, strict=True)):
            alone = self.choice.judge(self.budget, [*full[:i], kept, *full[i + 1 :]]).judgement
            costs = self.choice.application.cost(before, alone)
            rows.append(
                {
                    "group": each.name,
                    "place": each.place,
                    "kind": each.kind,
                    "channels": full[i],
                    "kept": kept,
                    "removed": 1 - kept / full[i],
                    **{f"{name} lost alone": cost for name, cost in costs.items()},
                }
            )
        return rows


class ChannelMethod(Method, ABC):
    """A method that prunes channels in `prepare`; what is then trained is the small net."""

    target_kinds: ClassVar[tuple[str, ...]] = ("parameters",)
    Params: ClassVar[type[Params]] = ChoiceParams

    @abstractmethod
    def solve(self, choice: Choice) -> tuple[Budget, Sequence[float], Point]:
        """The budget and numbers found, and the point there."""

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:  # noqa: ARG002
        """Remember where random numbers come from."""
        self.generator = generator

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Search on training and validation images, then prune `model` in place."""
        shape, classes = context.shape, context.train.info.num_classes
        metrics = measure.task_metrics(context.task, classes)
        application = Application(metrics, self.params.constraints)
        x, y = next(context.validation.ordered(min(self.params.samples, len(context.validation))))
        with evaluating(model):
            groups = component_groups(model, shape, protect=self.params.protect)
            self.pruned = self.prune(
                model, groups, application, context.task.loss, _endless(context.train), [(x, y)]
            )
        for name, child in self.pruned.model.named_children():
            model.add_module(name, child.requires_grad_(True))

    def prune(
        self,
        model: nn.Module,
        groups: list[ComponentGroup],
        application: Application,
        loss: Loss,
        batches: Iterable[Batch],
        data: Sequence[Batch],
    ) -> Pruned:
        """Prune a copy of `model`: the way in for an application of one's own.

        `loss` maps (output, x, y) to a scalar, `batches` never ends, `data` is what candidates are
        judged on. Raises `RefusedError` (an `InputError`) for a target that cannot be met.
        """
        choice = Choice(model, groups, application, loss, batches, data, self.target, self.params)
        budget, numbers, best = self.solve(choice)
        point = choice.accept(budget, numbers, best)
        small = choice.small(budget.indices(point.kept))
        real = 1 - measure.parameters(small) / measure.parameters(model)
        if abs(real - self.target) > self.params.tolerance:
            raise InputError(f"target = {self.target:g}: {real:.4f} of the parameters were removed")
        return Pruned(small, point, copy.deepcopy(model), choice, budget)

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of the parameters left."""
        return 1 - self.pruned.point.removed

    def measures(self, model: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        """Share removed, channels kept by group, what the search saw and cost."""
        pruned = self.pruned
        judgement = pruned.point.judgement
        return {
            "removed": pruned.point.removed,
            "groups": {
                each.name: kept / full
                for each, kept, full in zip(
                    pruned.choice.groups, pruned.point.kept, pruned.choice.count.full, strict=True
                )
            },
            "search_passes": pruned.choice.passes,
            "search_points": len(pruned.choice.seen),
            **{f"search_{name}": value for name, value in judgement.values.items()},
            "constraints_hold": float(judgement.holds),
            "constraints_shortfall": judgement.shortfall,
        }


class UniformParams(ChoiceParams):
    """`ranking`: the same share of every group ("uniform"), one ranking of all channels by their
    importance ("global"), or a random one. With `aware` each component gives up the same share of
    its parameters and coupling groups stay; without, components are not looked at.
    """

    ranking: Literal["uniform", "global", "random"] = "uniform"
    importance: Literal["taylor", "group_l2"] = "group_l2"
    aware: bool = False


class Uniform(ChannelMethod):
    """The controls: no coefficients, one common offset."""

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "uniform share of channels"
    Params: ClassVar[type[Params]] = UniformParams

    def solve(self, choice: Choice) -> tuple[Budget, Sequence[float], Point]:
        """The point at zero coefficients."""
        coupling = [len(each.components) > 1 for each in choice.groups]
        budget = choice.budget(self._positions(choice), coupling if self.params.aware else ())
        zero, parts = [0.0] * len(choice.groups), []
        for name in _components(choice.groups) if self.params.aware else ():
            inside = [i for i, each in enumerate(choice.groups) if each.components == (name,)]
            layers = {m.layer for i in inside for m in choice.plain[i].members}
            parts.append((inside, Parameters(choice.model, choice.plain, layers.__contains__)))
        return budget, zero, choice.reach(budget, zero, [part for part in parts if part[0]])

    def _positions(self, choice: Choice) -> list[Tensor]:
        if self.params.ranking == "random":
            make = self.generator
            return [
                torch.rand(n, generator=make, device=make.device).cpu() for n in choice.count.full
            ]
        scores = choice.scores()
        if self.params.ranking == "uniform":
            return spread_out(scores)
        return [score.cpu().double().clamp(min=1e-30).log() for score in scores]

    def arrays(self) -> dict[str, np.ndarray]:
        """Channels kept in each group."""
        return {"kept": np.array(self.pruned.point.kept)}


def _components(groups: list[ComponentGroup]) -> list[str]:
    return list(dict.fromkeys(name for each in groups for name in each.components))


def _endless(batches: Any) -> Iterable[Batch]:
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1
