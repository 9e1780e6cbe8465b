"""How many channels of each group to remove, so that a stated share of the parameters is gone.

Counting channels misleads: half of all channels are three quarters of the parameters, and a
channel of one group may cost twenty times one of another. Here parameters are counted.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.shrink.groups import FOLLOWS, Group


class Parameters:
    """The parameters of a net as a function of the channels kept in each group.

    A layer's count is a product of what is left of its two axes; as a function it is exact for
    whole channels and differentiable for soft ones. `layers` restricts it to some.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        layers: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self.full = [group.channels for group in groups]
        sides, followers = defaultdict(lambda: defaultdict(list)), set()
        for number, group in enumerate(groups):
            for m in group.members:
                sides[m.layer][m.axis].append((number, len(m.indices[0]), m.size))
                followers |= {m.layer} if m.role == FOLLOWS else set()
        self._terms, self._fixed = [], 0
        for name, module in model.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                if not layers(name):
                    continue
                both = kind == "weight" and name not in followers
                axes = [sides[name][a] for a in (("out", "in") if both else ("out",))]
                axes = [axis for axis in axes if axis]
                if axes:
                    self._terms.append((parameter.numel(), axes))
                else:
                    self._fixed += parameter.numel()
        self.total = self.of(self.full)

    def of(self, kept: Sequence[float | Tensor]) -> float | Tensor:
        """Parameters left with `kept` channels in each group."""
        left = self._fixed
        for size, axes in self._terms:
            shares = (
                1 - sum((self.full[g] - kept[g]) * each / width for g, each, width in axis)
                for axis in axes
            )
            left = left + size * math.prod(shares)
        return left

    def removed(self, kept: Sequence[float | Tensor]) -> float | Tensor:
        """Share (0-1) of the parameters removed."""
        return 1 - self.of(kept) / self.total


class Budget:
    """From one number per group to channels kept, at an exact share of the parameters removed.

    `positions[g]` (channels,) says where each channel of group g stands in the order of removal,
    lowest first; a channel goes when its position is below the group's number plus a common
    offset. At most the share `most` of a group goes, and of a `frozen` one nothing.
    """

    def __init__(
        self,
        count: Parameters,
        positions: Sequence[Tensor],
        most: float = 0.95,
        frozen: Sequence[bool] = (),
    ) -> None:
        self.count, self.positions = count, [p.detach().cpu().double() for p in positions]
        self.order = [p.argsort(stable=True) for p in self.positions]
        self._sorted = [p[o].tolist() for p, o in zip(self.positions, self.order, strict=True)]
        frozen = frozen or [False] * len(count.full)
        self.least = [
            n if still else max(1, math.ceil((1 - most) * n - 1e-9))
            for n, still in zip(count.full, frozen, strict=True)
        ]

    def kept(self, numbers: Sequence[float], offset: float = 0.0) -> list[int]:
        """Channels kept in each group at `numbers` plus `offset`."""
        return [
            max(least, len(p) - bisect_left(p, number + offset))
            for p, number, least in zip(self._sorted, numbers, self.least, strict=True)
        ]

    def indices(self, kept: Sequence[int]) -> list[Tensor]:
        """The channels kept of each group, ascending."""
        return [o[len(o) - k :].sort().values for o, k in zip(self.order, kept, strict=True)]

    def meet(
        self,
        numbers: Sequence[float],
        target: float,
        parts: Sequence[tuple[Sequence[int], Parameters]] = (),
    ) -> list[int] | None:
        """Channels kept so that at least `target` of the parameters is removed, and hardly more.

        The common offset is found by bisection. Each of `parts` (groups and the count of its own
        layers) first gets an offset of its own that removes `target` of the part. None if even
        the largest offset does not reach the target.
        """
        numbers = list(numbers)
        for members, count in parts:
            offset = self.offset(numbers, target, count, set(members))
            numbers = [n + offset * (i in members) for i, n in enumerate(numbers)]
        offset = self.offset(numbers, target)
        kept = self.kept(numbers, offset)
        return self._shave(kept, target) if self.count.removed(kept) >= target else None

    def offset(
        self,
        numbers: Sequence[float],
        target: float,
        count: Parameters | None = None,
        moving: Collection[int] | None = None,
    ) -> float:
        """Smallest common offset that removes `target` of `count`, or the largest there is.

        By default of all parameters, and of all groups; else of the groups `moving` alone.
        """
        count = count or self.count

        def enough(offset: float) -> bool:
            moved = [n + offset * (moving is None or i in moving) for i, n in enumerate(numbers)]
            return count.removed(self.kept(moved)) >= target

        ends = [p[0] for p in self._sorted] + [p[-1] for p in self._sorted] + list(numbers)
        high = 2 * (max(ends) - min(ends)) + 1.0
        low = -high
        if not enough(high):
            return high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    def _shave(self, kept: list[int], target: float) -> list[int]:
        """Give back channels while the target still holds, the most expensive that fits first."""
        while True:
            slack = self.count.removed(kept) - target
            spare = {}
            for i, k in enumerate(kept):
                if k < self.count.full[i]:
                    more = [*kept[:i], k + 1, *kept[i + 1 :]]
                    spare[i] = self.count.removed(more) - target
            fits = {i: rest for i, rest in spare.items() if 0 <= rest < slack}
            if not fits:
                return kept
            kept = list(kept)
            kept[min(fits, key=fits.get)] += 1


def spread_out(scores: Sequence[Tensor]) -> list[Tensor]:
    """Positions in (0, 1): the rank of each score within its group, evenly spaced."""
    made = []
    for score in scores:
        position = torch.empty(len(score), dtype=torch.float64)
        ranks = (torch.arange(len(score), dtype=torch.float64) + 0.5) / len(score)
        position[score.cpu().argsort(stable=True)] = ranks
        made.append(position)
    return made


def require_target(target: float, tolerance: float) -> None:
    """Raise `InputError` unless a share in (0, 1) and a tolerance above 0 are given."""
    right = isinstance(target, float) and 0 < target < 1
    require(right, "target", target, "the share of parameters to remove, above 0 and below 1")
    right = isinstance(tolerance, float) and 0 < tolerance < 1
    require(right, "tolerance", tolerance, "a share above 0 and below 1")
