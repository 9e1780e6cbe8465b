"""Low-rank factors of a layer: a few basis filters, then a 1x1 layer that mixes them.

Wen et al., "Coordinating Filters for Faster Deep Neural Networks", ICCV 2017:

    conv(N, C, k, k)  ->  conv(M, C, k, k, no bias)  +  conv(N, M, 1, 1, bias)
    W (N x D)         ~   A (N x M)  B (M x D),      D = (C / G) k^2 in each of G groups

The columns of A are the first M eigenvectors of W W^T (uncentred PCA of the filters), B = A^T W.
The variant "svd" splits each singular value evenly, A = U S^1/2, B = S^1/2 V^T (the split is
ours); the product is the same. A linear layer is a convolution with one position. Ranks are totals
over the groups, which all get the same.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from prunestudy.errors import InputError, require, require_one_of
from prunestudy.shrink.fold import fold
from prunestudy.shrink.runs import first_line

Variant = Literal["pca", "svd"]
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def layers_to_factorise(
    model: nn.Module, patterns: tuple[str, ...] = (), parameter: str = "layers"
) -> dict[str, Layer]:
    """Layers of `model` by first name: those that match `patterns` (`stage*.conv1`, `fc`).

    Without patterns, all convolutions larger than 1x1. Raises `InputError`, naming `parameter`,
    for a pattern that matches no layer that factors can replace, or if no layer is left.
    """
    every = replaceable(model)
    for pattern in patterns:
        known = any(fnmatchcase(name, pattern) for names in every.values() for name in names)
        require(known, parameter, pattern, _allowed(every))

    found = {
        names[0]: layer
        for layer, names in every.items()
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
        or (not patterns and prod(getattr(layer, "kernel_size", ())) > 1)
    }
    kind = "a net with convolutions larger than 1x1, or patterns that name layers"
    require(bool(found), parameter, "", kind)
    return found


def groups_of(layer: Layer) -> int:
    """Number of groups of a convolution; 1 for a linear layer."""
    return getattr(layer, "groups", 1)


def weight_matrix(layer: Layer) -> Tensor:
    """The filters of `layer` as rows, one matrix per group: (G, N / G, D); a view if possible."""
    weight = layer.weight.detach()
    return weight.reshape(groups_of(layer), len(weight) // groups_of(layer), -1)


def full_rank(layer: Layer) -> int:
    """Largest possible rank, G min(N / G, D)."""
    groups, filters, size = weight_matrix(layer).shape
    return groups * min(filters, size)


def layer_speed_up(layer: Layer, rank: int) -> float:
    """MACs of `layer` over those of its factors, N D / (M (D + N / G)); below 1 they cost more."""
    groups, filters, size = weight_matrix(layer).shape
    return groups * filters * size / (rank * (size + filters))


def factorise_layer(layer: Layer, rank: int, variant: Variant = "pca") -> nn.Sequential:
    """The factors of `layer` at `rank`: basis filters, then their mixture, as two plain layers.

    The first takes stride, padding and dilation, the second the bias. Raises `InputError` for a
    rank below 1, above the full one or not the same in every group.
    """
    groups, full = groups_of(layer), full_rank(layer)
    allowed = f"a whole number from 1 to {full}, the full rank"
    require(type(rank) is int and 1 <= rank <= full, "rank", rank, allowed)
    require(rank % groups == 0, "rank", rank, f"a multiple of {groups}, the layer's groups")
    require_one_of("variant", variant, ("pca", "svd"))
    mixture, basis = _factors(weight_matrix(layer), rank // groups, variant)
    return _pair(layer, mixture, basis)


def factorise(model: nn.Module, ranks: Mapping[str, int], variant: Variant = "pca") -> nn.Module:
    """A folded copy of `model` with factors of these `ranks`: see `factorise_in_place`."""
    plain = fold(model)
    factorise_in_place(plain, ranks, variant)
    return plain.requires_grad_(False)


def factorise_in_place(
    model: nn.Module, ranks: Mapping[str, int], variant: Variant = "pca"
) -> None:
    """Replace the layers named in `ranks` by trainable factors, under every name that they have.

    Raises `InputError` as `require_factorisable` and `factorise_layer`, before any is replaced.
    """
    require_factorisable(model, ranks)
    pairs = {n: factorise_layer(model.get_submodule(n), m, variant) for n, m in ranks.items()}
    for name, pair in pairs.items():
        replace(model, name, pair)


def require_factorisable(
    model: nn.Module, names: Iterable[str], example: tuple[Tensor, ...] | None = None
) -> None:
    """Raise `InputError` for the first of `names` that factors cannot replace in `model`.

    Such a layer is not there, is read by its owner (see `replaceable`), shares a parameter with
    another one, or its weight is computed (weight norm, pruning masks). With an `example`
    the net is run with factors: it fails where forward reads a weight or a size of a layer.
    """
    every = replaceable(model)
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name in names:
        layer = next((m for m, known in every.items() if name in known), None)
        require(layer is not None, "ranks", name, _allowed(every))
        own = dict(layer.named_parameters())
        plain = "its weight is computed from other tensors; make it a plain parameter first"
        require("weight" in own and set(own) <= {"weight", "bias"}, "module", name, plain)
        alone = all(uses[id(p)] == 1 for p in own.values())
        require(alone, "module", name, "shares a parameter with another layer; factors cannot")
    if example:
        trial = fold(model)
        for name in names:
            matrix = weight_matrix(layer := trial.get_submodule(name))
            replace(trial, name, _pair(layer, matrix[..., :1], matrix[:, :1]))
            try:
                with torch.no_grad():
                    trial(*example)
            except Exception as error:  # whatever a net may raise
                why = f"module = {name!r}: fails as factors: {first_line(error)}"
                raise InputError(why) from error


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in place of the module `name` of `model`, under every name that it has there."""
    old = model.get_submodule(name)
    for each, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(each, new)


def reduce_rank(pair: nn.Sequential, rank: int, variant: Variant = "pca") -> nn.Sequential:
    """Factors of a lower total rank: those of the basis, the mixture multiplied by theirs."""
    basis, mixture = pair
    inner = factorise_layer(basis, rank, variant)
    mixed = weight_matrix(mixture).double() @ weight_matrix(inner[1]).double()
    return _pair(basis, mixed, weight_matrix(inner[0]), mixture.bias)


def merged(pair: nn.Sequential) -> Tensor:
    """The product of the factors, in the shape of the weight that they replaced."""
    basis, mixture = pair
    whole = weight_matrix(mixture) @ weight_matrix(basis)
    return whole.reshape(len(mixture.weight), *basis.weight.shape[1:])


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
    per_group = {n: share * full_rank(m) / groups_of(m) for n, m in chosen.items()}
    return {n: groups_of(m) * max(1, round(per_group[n])) for n, m in chosen.items()}


def ranks_by_macs(
    model: nn.Module, macs: Mapping[str, int], share: float, patterns: tuple[str, ...] = ()
) -> dict[str, int]:
    """Ranks at which the net needs at most `share` of its MACs, `macs` as by `measure.layer_macs`.

    All layers keep the same share of their energy; those that factors would not make cheaper are
    left out. Raises `InputError` for a share outside (0, 1] or below `least_share`.
    """
    _require_share("share", share)
    chosen, total = layers_to_factorise(model, patterns), sum(macs.values())
    least = least_share(macs, chosen)
    require(least <= share, "share", share, f"at least {least:.4f}, that of rank 1 everywhere")
    shares = {name: energy_shares(layer) for name, layer in chosen.items()}

    def at(ratio: float) -> dict[str, int]:
        return {name: _rank(layer, shares[name], ratio) for name, layer in chosen.items()}

    ratios = sorted({0.0, *torch.cat(list(shares.values())).tolist()})
    count = bisect_right(ratios, share * total, key=lambda ratio: _cost(macs, chosen, at(ratio)))
    return cheaper(model, at(ratios[max(count, 1) - 1]))


def least_share(macs: Mapping[str, int], chosen: Mapping[str, Layer]) -> float:
    """The share of the net's MACs that is left at rank 1 in each group of the layers `chosen`."""
    ranks = {name: groups_of(layer) for name, layer in chosen.items()}
    return _cost(macs, chosen, ranks) / sum(macs.values())


def _cost(macs: Mapping[str, int], chosen: Mapping[str, Layer], ranks: Mapping[str, int]) -> float:
    """MACs of the net at `ranks` of the layers `chosen`, each whole where that is cheaper."""
    whole = {name: macs[f"{name}.weight"] for name in chosen}
    faster = {n: max(1.0, layer_speed_up(chosen[n], rank)) for n, rank in ranks.items()}
    return sum(macs.values()) - sum(whole.values()) + sum(whole[n] / faster[n] for n in whole)


def cheaper(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """Those of `ranks` at which the factors cost fewer MACs than the layer."""
    faster = {n: layer_speed_up(model.get_submodule(n), rank) for n, rank in ranks.items()}
    return {name: rank for name, rank in ranks.items() if faster[name] > 1}


def speed_up_at(model: nn.Module, macs: Mapping[str, int], ranks: Mapping[str, int]) -> float:
    """MACs of the layers in `ranks` over those of their factors; `macs` as in `ranks_by_macs`."""
    whole = {name: macs[f"{name}.weight"] for name in ranks}
    low = (whole[n] / layer_speed_up(model.get_submodule(n), rank) for n, rank in ranks.items())
    return sum(whole.values()) / sum(low)


def replaceable(model: nn.Module) -> dict[Layer, list[str]]:
    """All names of each layer that factors can replace.

    Not those whose weight their owner reads: subclasses (attention's `out_proj`), and the linear
    layers of a TransformerEncoderLayer, in eval mode.
    """
    owners = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    read = {layer for owner in owners for layer in owner.children()}
    names: dict[Layer, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if name and type_before_parametrizations(layer) in _KINDS and layer not in read:
            names.setdefault(layer, []).append(name)
    return names


def _allowed(every: Mapping[Layer, list[str]]) -> str:
    return f"a layer of the net: {', '.join(names[0] for names in every.values()) or 'it has none'}"


def _rank(layer: Layer, shares: Tensor, ratio: float) -> int:
    return groups_of(layer) * min(int((shares < ratio).sum()) + 1, len(shares))


def _require_share(parameter: str, value: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    require(ok, parameter, value, "above 0 and at most 1")


def _factors(matrix: Tensor, rank: int, variant: Variant) -> tuple[Tensor, Tensor]:
    """Mixture (G, N / G, rank) and basis (G, rank, D) of `matrix` (G, N / G, D), in float64."""
    left, size, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    left, size, right = left[..., :rank], size[..., :rank], right[:, :rank]
    if variant == "pca":
        return left, size[..., None] * right
    root = size.sqrt()
    return left * root[:, None], root[..., None] * right


def _pair(
    layer: Layer, mixture: Tensor, basis: Tensor, bias: Tensor | None = None
) -> nn.Sequential:
    """Two layers in place of `layer`, with the weights `mixture` and `basis`."""
    bias = layer.bias if bias is None else bias
    filters, rank = mixture.shape[0] * mixture.shape[1], basis.shape[0] * basis.shape[1]
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False)
        second = nn.Linear(rank, filters, bias=bias is not None)
    else:
        kind = type_before_parametrizations(layer)
        same = "kernel_size stride padding dilation groups padding_mode".split()
        settings = {name: getattr(layer, name) for name in same}
        first = kind(layer.in_channels, rank, bias=False, **settings)
        second = kind(rank, filters, 1, groups=layer.groups, bias=bias is not None)
    weight = layer.weight
    pair = nn.Sequential(first, second).to(weight.device, weight.dtype)
    with torch.no_grad():
        first.weight.copy_(basis.reshape(first.weight.shape))
        second.weight.copy_(mixture.reshape(second.weight.shape))
        if bias is not None:
            second.bias.copy_(bias)
    # By its strides: with one channel, or 1x1, torch says yes to both layouts.
    if weight.ndim == 4 and weight.stride(1) == 1 and weight.stride(3) == weight.shape[1]:
        pair.to(memory_format=torch.channels_last)
    return pair.train(layer.training)
