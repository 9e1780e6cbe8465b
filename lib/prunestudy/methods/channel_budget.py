"""How many channels of each group to remove, so that a stated share of the parameters is gone.

Counting channels misleads: half of all channels are three quarters of the parameters, and a
channel of one group may cost twenty times one of another. Here parameters are counted.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.methods.channels import Channels
from prunestudy.shrink import ComponentGroup


class Budget:
    """From one number per group to channels kept, at an exact share of the parameters removed.

    `positions[g]` (channels,) says where each channel of group g stands in the order of removal,
    lowest first; a channel goes when its position is below the group's number plus a common
    offset. At most the share `most` of a group goes, and of a `frozen` one nothing.
    """

    def __init__(
        self,
        channels: Channels,
        positions: Sequence[Tensor],
        most: float = 0.95,
        frozen: Sequence[bool] = (),
    ) -> None:
        self.channels, self.positions = channels, [p.detach().cpu().double() for p in positions]
        self.full = [group.channels for group in channels.groups]
        self.order = [p.argsort(stable=True) for p in self.positions]
        self._sorted = [p[o].tolist() for p, o in zip(self.positions, self.order, strict=True)]
        frozen = frozen or [False] * len(self.full)
        self.least = [
            n if still else max(1, math.ceil((1 - most) * n - 1e-9))
            for n, still in zip(self.full, frozen, strict=True)
        ]

    def removed(self, kept: Sequence[int]) -> float:
        """Share (0-1) of the parameters that is gone with `kept` channels in each group."""
        return 1 - self.channels.cost_at(kept) / self.channels.dense

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
        parts: Sequence[tuple[Sequence[int], float]] = (),
    ) -> list[int] | None:
        """Channels kept so that at least `target` of the parameters is removed, and hardly more.

        The common offset is found by bisection. Each of `parts` (groups, and the share of all
        parameters that their layers have) first gets an offset of its own that removes `target`
        of the part. None if even the largest offset does not reach the target.
        """
        numbers = list(numbers)
        for members, share in parts:
            offset = self.offset(numbers, target * share, set(members))
            numbers = [n + offset * (i in members) for i, n in enumerate(numbers)]
        offset = self.offset(numbers, target)
        kept = self.kept(numbers, offset)
        return self._shave(kept, target) if self.removed(kept) >= target else None

    def offset(
        self,
        numbers: Sequence[float],
        target: float,
        moving: Collection[int] = (),
    ) -> float:
        """Smallest common offset that removes `target`, or the largest there is.

        Of all groups; or of the groups `moving` alone, while the others keep all.
        """

        def enough(offset: float) -> bool:
            kept = self.kept([n + offset for n in numbers])
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

    def _shave(self, kept: list[int], target: float) -> list[int]:
        """Give back channels while the target still holds, the most expensive that fits first."""
        while True:
            slack = self.removed(kept) - target
            spare = {}
            for i, k in enumerate(kept):
                if k < self.full[i]:
                    more = [*kept[:i], k + 1, *kept[i + 1 :]]
                    spare[i] = self.removed(more) - target
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


def listing(
    model: nn.Module, shape: tuple[int, ...], found: Sequence[ComponentGroup]
) -> list[dict[str, Any]]:
    """One row per group: name, kind, place, channels, layers and the parameters at each channel."""
    channels = Channels(model, shape, "parameters", [each.name for each in found], norms=True)
    full = [group.channels for group in channels.groups]
    rows = []
    for i, each in enumerate(found):
        less = [n - (j == i) for j, n in enumerate(full)]
        rows.append(
            {
                "group": each.name,
                "kind": each.kind,
                "place": each.place,
                "channels": each.group.channels,
                "layers": len({m.layer for m in each.group.members}),
                "parameters a channel": round(channels.dense - channels.cost_at(less)),
                "protected": each.protected,
            }
        )
    return rows


def require_target(target: float, tolerance: float) -> None:
    """Raise `InputError` unless a share in (0, 1) and a tolerance above 0 are given."""
    right = isinstance(target, float) and 0 < target < 1
    require(right, "target", target, "the share of parameters to remove, above 0 and below 1")
    right = isinstance(tolerance, float) and 0 < tolerance < 1
    require(right, "tolerance", tolerance, "a share above 0 and below 1")
