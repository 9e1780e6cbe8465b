"""What component-aware pruning and its controls share: a search for the channels that can go.

A trained net is pruned once to a share of its parameters, then the small net is fine-tuned.
Parameters are counted, not channels: half of all channels are three quarters of the parameters,
and a channel of one group may cost twenty times one of another.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from prunestudy import measure
from prunestudy.errors import InputError, require
from prunestudy.measure.forward import evaluating
from prunestudy.methods.base import Batch, Context, Method, mean_loss, samples_in
from prunestudy.methods.channel_controls import GroupL2, add_gradients, importance, taylor
from prunestudy.methods.channels import Channels, become
from prunestudy.shrink import component_groups, fold, narrow, remove_groups
from prunestudy.shrink.fold import copied, with_gradients
from prunestudy.values import Count, Part


class _Budget:
    """From one number per group to channels kept, at an exact share of the parameters removed.

    `positions[g]` (channels,) says where each channel of group g stands in the order of removal,
    lowest first; a channel goes when its position is below the group's number plus a common
    offset, but `least[g]` channels stay.
    """

    def __init__(self, channels: Channels, positions: list[Tensor], least: list[int]) -> None:
        self.channels, self.least = channels, least
        self.positions = [p.detach().cpu().double() for p in positions]
        self.full = [group.channels for group in channels.groups]
        self.order = [p.argsort(stable=True) for p in self.positions]
        self._sorted = [p[o].tolist() for p, o in zip(self.positions, self.order, strict=True)]

    def removed(self, kept: Sequence[int]) -> float:
        """Share (0-1) of the parameters that is gone with `kept` channels in each group."""
        return 1 - self.channels.cost_at(kept) / self.channels.dense

    def kept(self, numbers: list[float], offset: float = 0.0) -> list[int]:
        """Channels kept in each group at `numbers` plus `offset`."""
        return [
            max(least, len(p) - bisect_left(p, number + offset))
            for p, number, least in zip(self._sorted, numbers, self.least, strict=True)
        ]

    def indices(self, kept: Sequence[int]) -> list[Tensor]:
        """The channels kept of each group, ascending."""
        return [o[len(o) - k :].sort().values for o, k in zip(self.order, kept, strict=True)]

    def meet(self, numbers: list[float], target: float) -> list[int]:
        """Channels kept at the common offset that removes `target`; not one more could stay.

        Raises `InputError` if even the largest offset does not reach the target.
        """
        kept = self.kept(numbers, self.offset(numbers, target))
        most = f"at most {self.removed(self.least):.4f} of the parameters can be removed"
        require(self.removed(kept) >= target, "target", target, most)
        while True:  # give back what is not needed, the most expensive channel that fits first
            slack, fits = self.removed(kept) - target, {}
            for i, k in enumerate(kept):
                rest = self.removed([*kept[:i], k + 1, *kept[i + 1 :]]) - target
                if k < self.full[i] and 0 <= rest < slack:
                    fits[i] = rest
            if not fits:
                return kept
            kept[min(fits, key=fits.get)] += 1

    def offset(self, numbers: list[float], target: float, moving: Sequence[int] = ()) -> float:
        """Smallest common offset that removes `target`, or the largest there is; by bisection.

        Of all groups; or of the groups `moving` alone, while the others keep all.
        """

        def enough(offset: float) -> bool:
            kept = self.kept(numbers, offset)
            if moving:
                kept = [k if i in moving else self.full[i] for i, k in enumerate(kept)]
            return self.removed(kept) >= target

        ends = [p[0] for p in self._sorted] + [p[-1] for p in self._sorted] + list(numbers)
        high = 2 * (max(ends) - min(ends)) + 1.0
        low = -high
        if not enough(high):
            return high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


class Point(NamedTuple):
    """A candidate: channels kept of each group, share removed, metrics, and what limits miss."""

    kept: tuple[int, ...]
    removed: float
    values: dict[str, float]
    shortfall: float


class Search(Method, ABC):
    """Prunes once, in `attach`, what `solve` finds; a resumed run finds the same again.

    `importance` of the channels within a group, its gradients over `taylor_batches`; `most`:
    largest share of a group's channels that may go; `samples` that judge a candidate; `constraints`
    on metrics or the loss: "psnr >= 20"; `protect`: names of groups, layers, components, or
    "coupling"; `leave` as of `Channelled`; `refuse`: a broken constraint is an error, else it is
    recorded; `tolerance` of the share removed by soft masks.
    """

    counts = ("parameters",)
    importance: Literal["taylor", "group_l2"] = "taylor"
    taylor_batches: Count = 16
    most: Part = 0.95
    tolerance: Part = 0.01
    samples: Count = 256
    constraints: list[str] = []
    protect: list[str] = []
    leave: str = ""
    refuse: bool = True

    @abstractmethod
    def solve(self) -> tuple[list[float], Point]:
        """Call `order`; return one number per group, and the `Point` that they lead to."""

    def attach(self, model: nn.Module, context: Context) -> None:
        """Search on training and validation batches, then prune `model` in place."""
        with evaluating(model):
            self.begin(model, context)
            numbers, self.point = self.solve()
            if self.refuse and self.point.shortfall:
                self._refuse(numbers)
            kept = self.budget.indices(self.point.kept)
            small = remove_groups(model, self.channels.groups, kept, context.example)
        self.cost = {"search_passes": self.passes, "search_points": len(self.seen)}
        become(model, small)

    def begin(self, model: nn.Module, context: Context) -> None:
        """Read groups and limits, judge the dense net; `passes`: 1 a forward, 3 with backward."""
        require(context.loss is not None, "context.loss", None, "the search needs the task's loss")
        self.context, self.batches = context, context.stream()
        self.seen: dict[tuple[int, ...], Point] = {}
        self.channels = Channels(model, context.example, "parameters", norms=True, leave=self.leave)
        found = self.channels.groups
        self.groups = component_groups(model, context.example, self.protect, found)
        vars(self)["dense"] = fold(model)  # what candidates are made of: no part of the state
        self.data = context.samples(self.samples)
        self.judged_on = self.passes = sum(samples_in(x) for x, _ in self.data)
        self.dense_loss = mean_loss(self.dense, context.loss, self.data)
        alone = lambda net, data: {"loss": mean_loss(net, context.loss, data)}  # noqa: E731
        self.metrics = context.metrics or measure.Metrics(alone)
        values = self.metrics.values(self.dense, self.data)
        self.goal, self.limits = next(iter(values)), measure.limits(self.constraints, values)

    def batch(self) -> Batch:
        """The next training batch, for a forward and a backward pass."""
        x, y = next(self.batches)
        self.passes += 3 * samples_in(x)
        return x, y

    def scores(self) -> list[Tensor]:
        """The importance of each group's channels, mean 1 in each group."""
        net, total = with_gradients(copied(self.dense)), [0.0] * len(self.groups)
        if self.importance == "group_l2":
            score = importance(self.channels, net, GroupL2.measure)
            return list(score.split([group.channels for group in self.channels.groups]))
        for _ in range(self.taylor_batches):
            net.zero_grad()
            add_gradients(net, self.context.loss, [self.batch()])
            total = [a + b for a, b in zip(total, taylor(self.channels, net), strict=True)]
        return [score / self.taylor_batches for score in total]

    def order(self, positions: list[Tensor], couplings_stay: bool = False) -> None:
        """Begin a budget that removes channels in the order of `positions`."""
        least = []
        for each in self.groups:
            stays = each.protected or (couplings_stay and each.kind == "coupling")
            share = 1.0 if stays else 1 - self.most
            least.append(max(1, math.ceil(share * each.group.channels - 1e-9)))
        self.budget = _Budget(self.channels, positions, least)

    def candidate(self, kept: Sequence[int]) -> nn.Module:
        """The net with `kept` channels, as it is judged."""
        return narrow(self.dense, self.channels.groups, self.budget.indices(kept))

    def judge(self, kept: Sequence[int]) -> Point:
        """The point with `kept` channels; each is judged, and its passes counted, once."""
        key = tuple(kept)
        if key not in self.seen:
            values = dict(self.metrics.values(self.candidate(kept), self.data))
            shortfall = sum(limit.shortfall(values[limit.metric]) for limit in self.limits)
            self.passes += self.judged_on
            self.seen[key] = Point(key, self.budget.removed(kept), values, shortfall)
        return self.seen[key]

    def rank(self, point: Point) -> tuple[float, float]:
        """Sort key, larger is better: minus the shortfall, then the objective (NaN: -inf)."""
        lost = _lost(self.goal, 0.0, point.values[self.goal])
        return -point.shortfall, -math.inf if math.isnan(lost) else -lost

    def _refuse(self, numbers: list[float]) -> None:
        """Raise `InputError`, with the largest share found at `numbers` that keeps every limit."""
        low, high, closest = 0.0, self.target, 0.0
        for _ in range(10):
            middle = (low + high) / 2
            point = self.judge(self.budget.meet(numbers, middle))
            if point.shortfall:
                high = middle
            else:
                low, closest = middle, point.removed
        pairs = [(limit, self.point.values[limit.metric]) for limit in self.limits]
        lines = [limit.broken(value) for limit, value in pairs if limit.shortfall(value)]
        raise InputError(
            f"target = {self.target:g}: refused, {', '.join(lines)}; "
            f"within the limits at most {closest:.4f} of the parameters can be removed"
        )

    def log(self) -> dict[str, float]:
        """Share left of the parameters."""
        return {"kept": 1 - self.point.removed}

    def report(self) -> dict[str, Any]:
        """Shares removed; per group what is kept and what it alone loses; the search cost."""
        point, full, rows = self.point, self.budget.full, []
        nets = self.dense, Search.candidate(self, point.kept)  # as it is cut, before it is trained
        dense, left = (measure.macs(net, self.context.example) for net in nets)
        before = self.judge(full).values
        for i, (each, n, k) in enumerate(zip(self.groups, full, point.kept, strict=True)):
            about = {"group": each.name, "place": each.place, "kind": each.kind}
            alone = self.judge([*full[:i], k, *full[i + 1 :]]).values
            lost = {f"{m} lost alone": _lost(m, before[m], alone[m]) for m in before}
            rows.append(about | {"channels": n, "kept": k, "removed": 1 - k / n} | lost)
        return {
            "removed": point.removed,
            "macs_removed": 1 - left / dense,
            "groups": {row["group"]: row["kept"] / row["channels"] for row in rows},
            "report": rows,
            **self.cost,
            **{f"search_{name}": value for name, value in point.values.items()},
            "constraints_hold": float(not point.shortfall),
            "constraints_shortfall": point.shortfall,
        }


class Uniform(Search):
    """The controls: no coefficients, one common offset, no search.

    `ranking`: the same share of every group ("uniform"), one ranking of all channels by their
    importance ("global"), or a random one. With `aware` each component gives up the same share of
    its parameters and coupling groups stay; without, components are not looked at.
    """

    name, title = "uniform", "no coefficients"
    ranking: Literal["uniform", "global", "random"] = "uniform"
    importance: Literal["taylor", "group_l2"] = "group_l2"
    aware: bool = False

    def solve(self) -> tuple[list[float], Point]:
        """The point at zero coefficients; with `aware` each component has an offset of its own."""
        if self.ranking == "random":
            make, sizes = self.context.generator, [g.channels for g in self.channels.groups]
            positions = [torch.rand(n, generator=make, device=make.device) for n in sizes]
        else:
            positions = placed(self.scores(), evenly=self.ranking == "uniform")
        self.order(positions, couplings_stay=self.aware)
        numbers = [0.0] * len(self.groups)
        inner = dict.fromkeys(g.components for g in self.groups if g.kind == "internal")
        for component in inner if self.aware else ():
            inside = [i for i, each in enumerate(self.groups) if each.components == component]
            layers = {m.layer for i in inside for m in self.channels.groups[i].members}
            sizes = [measure.parameters(self.dense.get_submodule(n)) for n in layers]
            share = self.target * (sum(sizes) / self.channels.dense)
            offset = self.budget.offset(numbers, share, inside)
            numbers = [n + offset * (i in inside) for i, n in enumerate(numbers)]
        return numbers, self.judge(self.budget.meet(numbers, self.target))


def placed(scores: list[Tensor], evenly: bool) -> list[Tensor]:
    """Positions: each score's rank within its group, spread `evenly` over 0-1, or its logarithm."""
    if not evenly:
        return [score.cpu().double().clamp(min=1e-30).log() for score in scores]
    ranks = [score.cpu().argsort(stable=True).argsort() for score in scores]
    return [(rank.double() + 0.5) / len(rank) for rank in ranks]


def _lost(metric: str, before: float, after: float) -> float:
    """By how much `after` is worse."""
    return after - before if metric == "loss" else before - after
