"""Which ranks a layer's factors get: from the energy kept, the full rank or a budget of MACs.

Ours: a layer whose factors would cost as many MACs as the layer does stays whole.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import pairwise
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor, nn

from prunestudy.errors import require, require_one_of
from prunestudy.shrink.factors import (
    Layer,
    factorise_layer,
    full_rank,
    groups_of,
    layer_speed_up,
    layers_to_factorise,
    merged,
    weight_matrix,
)
from prunestudy.shrink.fold import fold

Variant = Literal["pca", "svd"]


def energy_shares(layer: Layer) -> Tensor:
    """Share of the squared energy in the first 1, 2, ... directions of each group; ends at 1.

    All ones for a layer of zeros. Raises `InputError` if a weight is not finite.
    """
    matrix = weight_matrix(layer).double()
    finite = bool(torch.isfinite(matrix).all())
    require(finite, "weight", "not finite", "finite numbers, to find a rank")
    kept = torch.linalg.svdvals(matrix).square().sum(0).cumsum(0)
    return kept / kept[-1] if kept[-1] > 0 else torch.ones_like(kept)


def rank_at(layer: Layer, ratio: float, variant: Variant = "pca") -> int:
    """Smallest rank that keeps `ratio` of the squared energy (0.95: 5% error); at 1 the full one.

    With the variant "svd", of the norm instead. Raises `InputError` for a ratio outside (0, 1].
    """
    _require_share("ratio", ratio)
    require_one_of("variant", variant, ("pca", "svd"))
    if ratio == 1:
        return full_rank(layer)
    return _rank(layer, energy_shares(layer), ratio if variant == "pca" else ratio**2)


def ranks_by_energy(
    model: nn.Module, ratio: float, patterns: tuple[str, ...] = (), variant: Variant = "pca"
) -> dict[str, int]:
    """`rank_at` of each layer that `patterns` choose."""
    chosen = layers_to_factorise(model, patterns)
    return {name: rank_at(layer, ratio, variant) for name, layer in chosen.items()}


def ranks_by_share(
    model: nn.Module, share: float, patterns: tuple[str, ...] = ()
) -> dict[str, int]:
    """`share` of each layer's full rank, at least 1 per group; `InputError` outside (0, 1]."""
    _require_share("share", share)
    chosen = layers_to_factorise(model, patterns)
    counts = {name: groups_of(layer) for name, layer in chosen.items()}
    return {n: g * max(1, round(share * full_rank(chosen[n]) / g)) for n, g in counts.items()}


def ranks_by_macs(
    model: nn.Module, macs: Mapping[str, int], share: float, patterns: tuple[str, ...] = ()
) -> dict[str, int]:
    """Ranks at which the net needs at most `share` of its MACs, `macs` as by `measure.layer_macs`.

    All layers keep the same share of their energy, the largest that fits the budget. Raises
    `InputError` for a share outside (0, 1] or below `least_share`.
    """
    chosen, budget = _within(model, macs, share, patterns)
    shares = {name: energy_shares(layer) for name, layer in chosen.items()}

    def at(ratio: float) -> dict[str, int]:
        return {name: _rank(layer, shares[name], ratio) for name, layer in chosen.items()}

    ratios = sorted({0.0, *torch.cat(list(shares.values())).tolist()})
    count = bisect_right(ratios, budget, key=lambda ratio: _cost(macs, chosen, at(ratio)))
    return cheaper(model, at(ratios[max(count, 1) - 1]))


def ranks_by_loss(
    model: nn.Module,
    macs: Mapping[str, int],
    share: float,
    loss: Callable[[nn.Module], float],
    patterns: tuple[str, ...] = (),
) -> dict[str, int]:
    """Ranks in the same budget, shared over the layers by what the net loses (ours).

    `loss(net)` is measured with one layer at a time at a few ranks: the largest that saves MACs,
    and half the one before down to 1; in between the layer's curve is convex. From the whole net
    ranks then go down one by one, where the loss rises least per MAC, and up again where the last
    step leaves room: no rank can be raised within the budget. Raises `InputError` as
    `ranks_by_macs`.
    """
    chosen, budget = _within(model, macs, share, patterns)
    trial, steps, cost = fold(model), [], sum(macs.values())
    base = _measured(trial, loss)
    for name, layer in chosen.items():
        whole, groups = macs[f"{name}.weight"], groups_of(layer)
        unit = round(whole / layer_speed_up(layer, groups))  # MACs of a rank in each group
        top = max(whole - 1, 0) // max(unit, 1)
        weight, points, rank = trial.get_submodule(name).weight, [(whole, base)], top
        while rank:
            weight.copy_(merged(factorise_layer(layer, rank * groups)))
            points.append((rank * unit, _measured(trial, loss)))
            rank //= 2
        weight.copy_(layer.weight.detach())
        slopes = _slopes(points)
        for rank in range(top, 0, -1):
            rate = next(rate for low, rate in slopes if low <= rank * unit)
            before, saved = (rank + 1, unit) if rank < top else (0, whole - top * unit)
            steps.append((rate, name, rank * groups, before * groups, saved))
    ranks, taken = {}, []
    for step in sorted(steps, key=itemgetter(0)):
        if cost <= budget:
            break
        _, name, ranks[name], _, saved = step
        cost -= saved
        taken.append(step)
    for _, name, rank, before, saved in reversed(taken):
        if ranks[name] == rank and cost + saved <= budget:
            ranks[name] = before
            cost += saved
    return {name: ranks[name] for name in chosen if ranks.get(name)}


def least_share(macs: Mapping[str, int], chosen: Mapping[str, Layer]) -> float:
    """The share of the net's MACs that is left at rank 1 in each group of the layers `chosen`."""
    ranks = {name: groups_of(layer) for name, layer in chosen.items()}
    return _cost(macs, chosen, ranks) / sum(macs.values())


def cheaper(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """Those of `ranks` at which the factors cost fewer MACs than the layer."""
    faster = {n: layer_speed_up(model.get_submodule(n), rank) for n, rank in ranks.items()}
    return {name: rank for name, rank in ranks.items() if faster[name] > 1}


def _within(
    model: nn.Module, macs: Mapping[str, int], share: float, patterns: tuple[str, ...]
) -> tuple[dict[str, Layer], float]:
    """The layers that `patterns` choose, and the MACs of which `share` is a budget they reach."""
    _require_share("share", share)
    chosen = layers_to_factorise(model, patterns)
    least = least_share(macs, chosen)
    require(least <= share, "share", share, f"at least {least:.4f}, that of rank 1 everywhere")
    return chosen, share * sum(macs.values())


def _cost(macs: Mapping[str, int], chosen: Mapping[str, Layer], ranks: Mapping[str, int]) -> float:
    """MACs of the net at `ranks` of the layers `chosen`, each whole where that is cheaper."""
    whole = {name: macs[f"{name}.weight"] for name in chosen}
    faster = {n: max(1.0, layer_speed_up(chosen[n], rank)) for n, rank in ranks.items()}
    return sum(macs.values()) - sum(whole.values()) + sum(whole[n] / faster[n] for n in whole)


def _slopes(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """What a MAC less costs in loss, on the convex curve below `points` (MACs, loss).

    From most MACs to fewest: the MACs at which a piece of the curve ends, and its slope.
    """

    def slope(a: tuple[int, float], b: tuple[int, float]) -> float:
        return (b[1] - a[1]) / (a[0] - b[0])

    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and slope(*hull[-2:]) >= slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(b[0], slope(a, b)) for a, b in pairwise(hull)]


def _measured(net: nn.Module, loss: Callable[[nn.Module], float]) -> float:
    """`loss(net)`; a loss that is not finite is just very large."""
    return found if math.isfinite(found := loss(net)) else 1e30


def _rank(layer: Layer, shares: Tensor, ratio: float) -> int:
    return groups_of(layer) * min(int((shares < ratio).sum()) + 1, len(shares))


def _require_share(parameter: str, value: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    require(ok, parameter, value, "above 0 and at most 1")
