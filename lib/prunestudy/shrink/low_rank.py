"""Low-rank factors across the filters of a layer: few basis filters, then a 1x1 layer that mixes.

Wen et al., "Coordinating Filters for Faster Deep Neural Networks", ICCV 2017:

    conv(N, C, k, k)  ->  conv(M, C, k, k, no bias)  +  conv(N, M, 1, 1, bias)
    W (N x D)         ~   A (N x M)  B (M x D),      D = (C / G) k^2 in each of G groups

The columns of A are the first M eigenvectors of W W^T (uncentred PCA of the filters), B = A^T W.
The variant "svd" shares each singular value between A and B, A = U S^1/2, B = S^1/2 V^T (how it is
shared is ours): the product is the same, its two halves have equal size. A linear layer is a
convolution with one position. `prunestudy.shrink.ranks` chooses M.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from prunestudy.errors import require, require_one_of
from prunestudy.shrink.fold import fold

Variant = Literal["pca", "svd"]
Layer = nn.Conv2d | nn.Linear


def layers_to_factorise(
    model: nn.Module, patterns: tuple[str, ...] = (), parameter: str = "layers"
) -> dict[str, Layer]:
    """Layers of `model` by name: those that match `patterns` (`stage*.conv1`, `fc`), in order.

    Without patterns all convolutions larger than 1x1. Raises `InputError`, naming `parameter`, for
    a pattern that matches no convolution and no linear layer, or if nothing is left.
    """
    every = {name: m for name, m in model.named_modules() if name and isinstance(m, Layer)}
    for pattern in patterns:
        known = any(fnmatchcase(name, pattern) for name in every)
        require(known, parameter, pattern, f"a layer of the net: {', '.join(every)}")
    chosen = {
        name: layer
        for name, layer in every.items()
        if any(fnmatchcase(name, p) for p in patterns) or (not patterns and _is_spatial(layer))
    }
    kind = "a net with convolutions larger than 1x1, or patterns that name layers"
    require(bool(chosen), parameter, patterns, kind)
    return chosen


def groups_of(layer: Layer) -> int:
    """Number of groups of a convolution; 1 for a linear layer."""
    return getattr(layer, "groups", 1)


def weight_matrix(layer: Layer) -> Tensor:
    """The filters of `layer` as rows, one matrix per group: (G, N / G, D); a view where it can."""
    weight = layer.weight.detach()
    return weight.reshape(groups_of(layer), len(weight) // groups_of(layer), -1)


def full_rank(layer: Layer) -> int:
    """Largest possible rank, G min(N / G, D)."""
    groups, filters, size = weight_matrix(layer).shape
    return groups * min(filters, size)


def speed_up(filters: int, channels: int, kernel: int, rank: int, groups: int = 1) -> float:
    """MACs of a `kernel` x `kernel` convolution over those of its two factors.

    N (C / G) k^2 / (M ((C / G) k^2 + N / G)), `rank` M being the total over the groups.
    """
    size = channels // groups * kernel**2
    return filters * size / (rank * (size + filters / groups))


def layer_speed_up(layer: Layer, rank: int) -> float:
    """MACs of `layer` over those of its factors at total rank `rank`; below 1 they cost more."""
    groups, filters, size = weight_matrix(layer).shape
    return groups * filters * size / (rank * (size + filters))


def factorise_layer(layer: Layer, rank: int, variant: Variant = "pca") -> nn.Sequential:
    """`layer` at total rank `rank`, as two plain layers: basis filters, then their mixture.

    Stride, padding and dilation go to the first, the bias to the second. Raises `InputError` for
    a rank below 1, above the full one or not the same in every group.
    """
    groups, full = groups_of(layer), full_rank(layer)
    allowed = f"a whole number from 1 to {full}, the full rank"
    require(type(rank) is int and 1 <= rank <= full, "rank", rank, allowed)
    require(rank % groups == 0, "rank", rank, f"a multiple of {groups}, the layer's groups")
    require_one_of("variant", variant, ("pca", "svd"))
    mixture, basis = _factors(weight_matrix(layer), rank // groups, variant)
    return _pair(layer, mixture, basis)


def factorise(model: nn.Module, ranks: Mapping[str, int], variant: Variant = "pca") -> nn.Module:
    """A plain copy of `model` with the layers named in `ranks` as pairs of these total ranks.

    In eval mode and without gradients, like `fold`. Raises `InputError` for a layer that does not
    exist or a rank that does not fit.
    """
    plain = fold(model)
    factorise_in_place(plain, ranks, variant)
    return plain.requires_grad_(False)


def factorise_in_place(
    model: nn.Module, ranks: Mapping[str, int], variant: Variant = "pca"
) -> None:
    """Replace the layers named in `ranks` by trainable pairs; `InputError` as `factorise`."""
    layers = {name: m for name, m in model.named_modules() if name and isinstance(m, Layer)}
    for name in ranks:
        require(name in layers, "ranks", name, f"a layer of the net: {', '.join(layers)}")
    pairs = {name: factorise_layer(layers[name], rank, variant) for name, rank in ranks.items()}
    for name, pair in pairs.items():
        model.set_submodule(name, pair)


def reduce_rank(pair: nn.Sequential, rank: int, variant: Variant = "pca") -> nn.Sequential:
    """A pair of total rank `rank` from a wider one: factors of the basis, mixture times theirs.

    The step of dynamic rank pruning. Raises `InputError` for a rank that does not fit.
    """
    basis, mixture = pair
    inner = factorise_layer(basis, rank, variant)
    mixed = weight_matrix(mixture).double() @ weight_matrix(inner[1]).double()
    return _pair(basis, mixed, weight_matrix(inner[0]), mixture.bias)


def merged(pair: nn.Sequential) -> Tensor:
    """The weight that `pair` stands for, in the shape of the layer that it replaced."""
    basis, mixture = pair
    whole = weight_matrix(mixture) @ weight_matrix(basis)
    return whole.reshape(len(mixture.weight), *basis.weight.shape[1:])


def pairs_of(model: nn.Module) -> dict[str, nn.Sequential]:
    """The factorised layers of `model`, by the name of the layer that each replaced."""
    return {name: m for name, m in model.named_modules() if name and _is_pair(m)}


def relative_error(layer: Layer, rank: int) -> float:
    """|W - A B|^2 / |W|^2 at total rank `rank`, in 0-1."""
    whole = layer.weight.detach().double()
    lost = whole - merged(factorise_layer(layer, rank)).double()
    return float(lost.square().sum() / whole.square().sum())


def _is_channels_last(weight: Tensor) -> bool:
    # By its strides: with one channel, or 1x1, torch says yes to both layouts.
    return weight.ndim == 4 and weight.stride(1) == 1 and weight.stride(3) == weight.shape[1]


def _is_spatial(layer: Layer) -> bool:
    return isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1


def _is_pair(module: nn.Module) -> bool:
    if type(module) is not nn.Sequential or len(module) != 2:
        return False
    first, second = module
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return first.bias is None
    both = isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    return both and first.bias is None and second.kernel_size == (1, 1)


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
        first = nn.Conv2d(
            layer.in_channels,
            rank,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            bias=False,
            padding_mode=layer.padding_mode,
        )
        second = nn.Conv2d(rank, filters, 1, groups=layer.groups, bias=bias is not None)
    pair = nn.Sequential(first, second).to(layer.weight.device, layer.weight.dtype)
    with torch.no_grad():
        first.weight.copy_(basis.reshape(first.weight.shape))
        second.weight.copy_(mixture.reshape(second.weight.shape))
        if bias is not None:
            second.bias.copy_(bias)
    if _is_channels_last(layer.weight):
        pair.to(memory_format=torch.channels_last)
    return pair.train(layer.training)
