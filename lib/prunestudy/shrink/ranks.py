"""How many basis filters each layer keeps: by energy, by a share of the rank, by a MACs budget."""

from bisect import bisect_right
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunestudy.errors import require, require_one_of
from prunestudy.shrink.low_rank import (
    Layer,
    Variant,
    full_rank,
    groups_of,
    layer_speed_up,
    layers_to_factorise,
    pairs_of,
    weight_matrix,
)


def full_ranks(model: nn.Module, patterns: tuple[str, ...] = ()) -> dict[str, int]:
    """Full rank of each layer that `patterns` choose; see `layers_to_factorise`."""
    return {name: full_rank(layer) for name, layer in _chosen(model, patterns).items()}


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
    """Smallest total rank whose share of the squared energy reaches `ratio` (0.95: 5% error).

    The variant "svd" asks it of the norm, not of its square. All groups get the same rank; a
    ratio of 1 gives the full rank. Raises `InputError` for a ratio outside (0, 1].
    """
    _require_ratio("ratio", ratio)
    require_one_of("variant", variant, ("pca", "svd"))
    if ratio == 1:
        return full_rank(layer)
    return _rank(layer, energy_shares(layer), ratio if variant == "pca" else ratio**2)


def ranks_by_energy(
    model: nn.Module, ratio: float, patterns: tuple[str, ...] = (), variant: Variant = "pca"
) -> dict[str, int]:
    """`rank_at` of each layer that `patterns` choose."""
    chosen = _chosen(model, patterns)
    return {name: rank_at(layer, ratio, variant) for name, layer in chosen.items()}


def ranks_by_share(
    model: nn.Module, share: float, patterns: tuple[str, ...] = ()
) -> dict[str, int]:
    """`share` of the full rank in each layer, at least one per group: equal for equal nets.

    Raises `InputError` for a share outside (0, 1].
    """
    _require_ratio("share", share)
    ranks = {}
    for name, layer in _chosen(model, patterns).items():
        groups = groups_of(layer)
        ranks[name] = groups * max(1, round(share * full_rank(layer) / groups))
    return ranks


def ranks_by_macs(
    model: nn.Module, macs: Mapping[str, int], share: float, patterns: tuple[str, ...] = ()
) -> dict[str, int]:
    """Ranks with which the net needs at most `share` of its MACs, `macs` by `measure.layer_macs`.

    The budget is shared so that all layers keep the same share of their energy, the largest that
    fits. A layer whose factors would cost as much as itself stays out of the answer. Raises
    `InputError` for a share outside (0, 1] and for one that rank 1 everywhere does not reach.
    """
    _require_ratio("share", share)
    chosen, total = _chosen(model, patterns), sum(macs.values())
    shares = {name: energy_shares(layer) for name, layer in chosen.items()}
    fixed = total - sum(macs[f"{name}.weight"] for name in chosen)

    def at(ratio: float) -> dict[str, int]:
        return {name: _rank(layer, shares[name], ratio) for name, layer in chosen.items()}

    def cost(ratio: float) -> float:
        faster = {n: max(1.0, layer_speed_up(chosen[n], m)) for n, m in at(ratio).items()}
        return fixed + sum(macs[f"{n}.weight"] / times for n, times in faster.items())

    ratios = sorted({0.0, *torch.cat(list(shares.values())).tolist()})
    count = bisect_right(ratios, share * total, key=cost)
    least = cost(0.0) / total
    require(count > 0, "share", share, f"at least {least:.4f}, the share at rank 1 everywhere")
    return cheaper(model, at(ratios[count - 1]))


def cheaper(model: nn.Module, ranks: dict[str, int]) -> dict[str, int]:
    """Those of `ranks` at which the two factors cost fewer MACs than the layer itself."""
    return {
        name: rank
        for name, rank in ranks.items()
        if layer_speed_up(model.get_submodule(name), rank) > 1
    }


def speed_up_at(model: nn.Module, macs: Mapping[str, int], ranks: Mapping[str, int]) -> float:
    """MACs of the layers in `ranks` over those of factors so wide; `macs` as in `ranks_by_macs`."""
    whole = {name: macs[f"{name}.weight"] for name in ranks}
    low = (whole[n] / layer_speed_up(model.get_submodule(n), rank) for n, rank in ranks.items())
    return sum(whole.values()) / sum(low)


def speed_up_of_pairs(model: nn.Module, macs: Mapping[str, int]) -> float:
    """The same for the factorised layers that `model` has: MACs they stand for over their own."""
    whole = own = 0.0
    for name, (basis, mixture) in pairs_of(model).items():
        first, second = (macs[f"{name}.{part}.weight"] for part in (0, 1))
        whole += first * len(mixture.weight) / len(basis.weight)
        own += first + second
    return whole / own


def _rank(layer: Layer, shares: Tensor, ratio: float) -> int:
    return groups_of(layer) * min(int((shares < ratio).sum()) + 1, len(shares))


def _chosen(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, Layer]:
    return layers_to_factorise(model, patterns)


def _require_ratio(parameter: str, value: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    require(ok, parameter, value, "above 0 and at most 1")
