"""Low-rank factors of a layer: a few basis filters, then a 1x1 layer that mixes them.

Wen et al., "Coordinating Filters for Faster Deep Neural Networks", ICCV 2017:

    conv(N, C, k, k)  ->  conv(M, C, k, k, no bias)  +  conv(N, M, 1, 1, bias)
    W (N x D)         ~   A (N x M)  B (M x D),      D = (C / G) k^2 in each of G groups

The columns of A are the first M eigenvectors of W W^T (uncentred PCA of the filters), B = A^T W.
The variant "svd" splits each singular value evenly (ours): A = U S^1/2, B = S^1/2 V^T, the same
product. A linear layer is a convolution with one position. Ranks are totals over the groups.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from prunestudy.errors import require, require_one_of
from prunestudy.shrink.fold import fold

Variant = Literal["pca", "svd"]
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
_KINDS = get_args(Layer)


def layers_to_factorise(
    model: nn.Module, patterns: tuple[str, ...] = (), parameter: str = "layers"
) -> dict[str, Layer]:
    """Layers of `model` by name: those that match `patterns` (`stage*.conv1`, `fc`), in order.

    Without patterns, all convolutions larger than 1x1. Raises `InputError`, naming `parameter`,
    for a pattern that matches no layer that can be factorised, or if none is left.
    """
    every = plain_layers(model)
    for pattern in patterns:
        known = any(fnmatchcase(name, pattern) for name in every)
        require(known, parameter, pattern, f"a layer of the net: {', '.join(every)}")
    if patterns:
        return {n: m for n, m in every.items() if any(fnmatchcase(n, p) for p in patterns)}
    large = {n: m for n, m in every.items() if prod(getattr(m, "kernel_size", ())) > 1}
    kind = "a net with convolutions larger than 1x1, or patterns that name layers"
    require(bool(large), parameter, patterns, kind)
    return large


def plain_layers(model: nn.Module) -> dict[str, Layer]:
    """The convolutions and linear layers of `model` that may be replaced, by their first name.

    Not those whose weight another module reads: subclasses (attention's `out_proj`), and the
    linear layers of a TransformerEncoderLayer, which reads them in eval mode.
    """
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    read = {id(part) for encoder in encoders for part in encoder.children()}
    every = ((n, m) for n, m in model.named_modules() if n and id(m) not in read)
    return {name: m for name, m in every if type_before_parametrizations(m) in _KINDS}


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
    each = rank // groups
    left, size, right = torch.linalg.svd(weight_matrix(layer).double(), full_matrices=False)
    left, size, right = left[..., :each], size[..., :each], right[:, :each]
    if variant == "pca":
        return _pair(layer, left, size[..., None] * right, layer.bias)
    root = size.sqrt()
    return _pair(layer, left * root[:, None], root[..., None] * right, layer.bias)


def factorise(model: nn.Module, ranks: Mapping[str, int], variant: Variant = "pca") -> nn.Module:
    """A folded copy of `model`, without gradients, after `factorise_in_place`."""
    plain = fold(model)
    factorise_in_place(plain, ranks, variant)
    return plain.requires_grad_(False)


def factorise_in_place(
    model: nn.Module, ranks: Mapping[str, int], variant: Variant = "pca"
) -> None:
    """Replace the layers named in `ranks` by trainable factors, under every name that they have.

    Raises `InputError`, before anything is replaced, for a layer that does not exist or that
    another module reads, for weights that are shared or computed (weight norm, parametrisations,
    pruning masks), and for a rank that does not fit.
    """
    layers = plain_layers(model)
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name in ranks:
        require(name in layers, "ranks", name, f"a layer of the net: {', '.join(layers)}")
        own = dict(layers[name].named_parameters())
        plain = "its weight is computed from other tensors; make it a plain parameter first"
        require("weight" in own and set(own) <= {"weight", "bias"}, "module", name, plain)
        alone = all(uses[id(p)] == 1 for p in own.values())
        require(alone, "module", name, "shares a parameter with another layer; factors cannot")
    pairs = {name: factorise_layer(layers[name], rank, variant) for name, rank in ranks.items()}
    for name, pair in pairs.items():
        replace(model, name, pair)


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in place of the module `name` of `model`, under every name that it has there."""
    old = model.get_submodule(name)
    for each, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(each, new)


def reduce_rank(pair: nn.Sequential, rank: int, variant: Variant = "pca") -> nn.Sequential:
    """Factors of a lower total rank: those of the basis, the mixture multiplied by theirs.

    The step of dynamic rank pruning. Raises `InputError` for a rank that does not fit.
    """
    basis, mixture = pair
    inner = factorise_layer(basis, rank, variant)
    mixed = weight_matrix(mixture).double() @ weight_matrix(inner[1]).double()
    return _pair(basis, mixed, weight_matrix(inner[0]), mixture.bias)


def merged(pair: nn.Sequential) -> Tensor:
    """The product of the factors, in the shape of the weight that they replaced."""
    basis, mixture = pair
    shape = len(mixture.weight), *basis.weight.shape[1:]
    return (weight_matrix(mixture) @ weight_matrix(basis)).reshape(shape)


def pairs_of(model: nn.Module) -> dict[str, nn.Sequential]:
    """The factorised layers of `model`, by the name of the layer that each replaced."""
    return {name: m for name, m in model.named_modules() if name and _is_pair(m)}


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
    """Smallest rank that keeps `ratio` of the squared energy (0.95: 5% error).

    With the variant "svd", of the norm instead. All groups get the same rank; a ratio of 1 gives
    the full rank. Raises `InputError` for a ratio outside (0, 1].
    """
    _require_ratio("ratio", ratio)
    require_one_of("variant", variant, ("pca", "svd"))
    kept = ratio if variant == "pca" else ratio**2
    return full_rank(layer) if ratio == 1 else _rank(layer, energy_shares(layer), kept)


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
    _require_ratio("share", share)
    chosen = layers_to_factorise(model, patterns).items()
    per_group = {n: max(1, round(share * full_rank(m) / groups_of(m))) for n, m in chosen}
    return {name: rank * groups_of(model.get_submodule(name)) for name, rank in per_group.items()}


def ranks_by_macs(
    model: nn.Module, macs: Mapping[str, int], share: float, patterns: tuple[str, ...] = ()
) -> dict[str, int]:
    """Ranks at which the net needs at most `share` of its MACs, `macs` as by `measure.layer_macs`.

    All layers keep the same share of their energy, the largest that fits the budget. A layer
    whose factors would cost as much as the layer is left out. Raises `InputError` for a share
    outside (0, 1], and for one that rank 1 everywhere exceeds.
    """
    _require_ratio("share", share)
    chosen, total = layers_to_factorise(model, patterns), sum(macs.values())
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


def cheaper(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """Those of `ranks` at which the factors cost fewer MACs than the layer."""
    return {n: m for n, m in ranks.items() if layer_speed_up(model.get_submodule(n), m) > 1}


def speed_up_at(model: nn.Module, macs: Mapping[str, int], ranks: Mapping[str, int]) -> float:
    """MACs of the layers in `ranks` over those of their factors; `macs` as in `ranks_by_macs`."""
    whole = {name: macs[f"{name}.weight"] for name in ranks}
    low = (whole[n] / layer_speed_up(model.get_submodule(n), m) for n, m in ranks.items())
    return sum(whole.values()) / sum(low)


def speed_up_of_pairs(model: nn.Module, macs: Mapping[str, int]) -> float:
    """MACs of the layers that the factors in `model` replaced, over those of the factors."""
    whole = own = 0.0
    for name, (basis, mixture) in pairs_of(model).items():
        first = macs[f"{name}.0.weight"]
        whole += first * len(mixture.weight) / len(basis.weight)
        own += first + macs[f"{name}.1.weight"]
    return whole / own


def _is_pair(module: nn.Module) -> bool:
    if type(module) is not nn.Sequential or len(module) != 2:
        return False
    first, second = module
    kinds = type(first) is type(second) and type(first) in _KINDS and first.bias is None
    ones = kinds and prod(getattr(second, "kernel_size", ())) == 1
    return ones and groups_of(first) == groups_of(second)


def _rank(layer: Layer, shares: Tensor, ratio: float) -> int:
    return groups_of(layer) * min(int((shares < ratio).sum()) + 1, len(shares))


def _require_ratio(parameter: str, value: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    require(ok, parameter, value, "above 0 and at most 1")


def _pair(layer: Layer, mixture: Tensor, basis: Tensor, bias: Tensor | None) -> nn.Sequential:
    """Two layers in place of `layer`: weights (G, M / G, D) and (G, N / G, M / G), and the bias."""
    kind, weight = type_before_parametrizations(layer), layer.weight
    filters, rank = mixture.shape[0] * mixture.shape[1], basis.shape[0] * basis.shape[1]
    if kind is nn.Linear:
        first = kind(layer.in_features, rank, bias=False)
        second = kind(rank, filters, bias=bias is not None)
    else:
        same = "kernel_size stride padding dilation groups padding_mode".split()
        settings = {name: getattr(layer, name) for name in same}
        first = kind(layer.in_channels, rank, bias=False, **settings)
        second = kind(rank, filters, 1, groups=layer.groups, bias=bias is not None)
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
