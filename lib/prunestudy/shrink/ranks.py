"""Which ranks a layer's factors get: from the energy kept, the full rank or a budget of MACs.

Ours: a layer whose factors would cost as many MACs as the layer does stays whole.
"""

import math
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
    """Share of the energy in the first 1, 2, ... directions of each group; ends at 1.

    All ones for a layer of zeros. Raises `InputError` if a weight is not finite.
    """
    matrix = weight_matrix(layer).double()
    finite = bool(torch.isfinite(matrix).all())
    require(finite, "weight", "not finite", "finite numbers, to find a rank")
    kept = torch.linalg.svdvals(matrix).square().sum(0).cumsum(0)
    return kept / kept[-1] if kept[-1] > 0 else torch.ones_like(kept)


def rank_at(layer: Layer, ratio: float, variant: Variant = "pca") -> int:
    """Smallest rank that keeps `ratio` of the energy (0.95: 5% error); at 1 the full one.

    With the variant "svd", of the norm instead. Raises `InputError` for a ratio outside (0, 1].
    """
    _require_share("ratio", ratio)
    require_one_of("variant", variant, ("pca", "svd"))
    if ratio == 1:
        return full_rank(layer)
    shares, least = energy_shares(layer), ratio if variant == "pca" else ratio**2
    return groups_of(layer) * min(int((shares < least).sum()) + 1, len(shares))


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
    model: nn.Module,
    macs: Mapping[str, int],
    share: float,
    patterns: tuple[str, ...] = (),
    loss: Callable[[nn.Module], float] | None = None,
) -> dict[str, int]:
    """Ranks at which the net needs at most `share` of its MACs, `macs` as by `measure.layer_macs`.

    From the whole net ranks go down one by one until the budget is met: of the layer that then
    keeps the largest share of its energy, so that all keep the same; or (ours) with `loss(net)`,
    where the loss rises least per MAC, as measured with one layer at a time at a few ranks. Raises
    `InputError` for a share outside (0, 1] or below `least_share`.
    """
    _require_share("share", share)
    chosen, cost = layers_to_factorise(model, patterns), sum(macs.values())
    least, budget, steps, ranks = least_share(macs, chosen), share * cost, [], {}
    require(least <= share, "share", share, f"at least {least:.4f}, that of rank 1 everywhere")
    trial = fold(model)

    def measured() -> float:
        found = loss(trial)
        return found if math.isfinite(found) else 1e30

    base = measured() if loss else 0.0
    for name, layer in chosen.items():
        whole, unit = _whole_and_unit(macs, name, layer)
        costs = [*range(unit, whole, unit or 1), whole]
        if loss:
            tried = trial.get_submodule(name).weight
            rates = _rises(layer, costs, tried, measured, base)
        else:
            rates = (1 - energy_shares(layer)).tolist()
        for i in reversed(range(len(costs) - 1)):
            rank = (i + 1) * groups_of(layer)
            steps.append((rates[i], name, rank, costs[i + 1] - costs[i]))
    for _, name, rank, saved in sorted(steps, key=itemgetter(0)):
        if cost <= budget:
            break
        ranks[name] = rank
        cost -= saved
    return {name: ranks[name] for name in chosen if name in ranks}


def least_share(macs: Mapping[str, int], chosen: Mapping[str, Layer]) -> float:
    """The share of the net's MACs that is left at rank 1 in each group of the layers `chosen`."""
    both = [_whole_and_unit(macs, name, layer) for name, layer in chosen.items()]
    return 1 - sum(max(0, whole - unit) for whole, unit in both) / sum(macs.values())


def cheaper(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """Those of `ranks` at which the factors cost fewer MACs than the layer."""
    faster = {n: layer_speed_up(model.get_submodule(n), rank) for n, rank in ranks.items()}
    return {name: rank for name, rank in ranks.items() if faster[name] > 1}


def _whole_and_unit(macs: Mapping[str, int], name: str, layer: Layer) -> tuple[int, int]:
    """MACs of the layer, and those of its factors for each rank that all groups have."""
    whole = macs[f"{name}.weight"]
    return whole, round(whole / layer_speed_up(layer, groups_of(layer)))


@torch.no_grad()
def _rises(
    layer: Layer, costs: list[int], tried: Tensor, measured: Callable[[], float], base: float
) -> list[float]:
    """How much the loss rises per MAC saved on the way to ranks 1, 2, ... of the layer.

    `costs` are the MACs at these ranks and, last, of the whole layer, which has the loss `base`.
    The weight `tried` takes the largest rank, half of it, and so on down to 1, and is whole again
    afterwards; between them the curve of losses is the convex one below.
    """
    points, rank = [(costs[-1], base)], len(costs) - 1
    while rank:
        tried.copy_(merged(factorise_layer(layer, rank * groups_of(layer))))
        points.append((costs[rank - 1], measured()))
        rank //= 2
    tried.copy_(layer.weight)
    slopes = _slopes(points)
    return [next(rate for low, rate in slopes if low <= cost) for cost in costs[:-1]]


def _slopes(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The rise of the loss per MAC saved, on the lower convex hull of `points` (MACs, loss).

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


def _require_share(parameter: str, value: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    require(ok, parameter, value, "above 0 and at most 1")
