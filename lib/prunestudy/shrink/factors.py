"""Low-rank factors of a layer: a few basis filters, then a 1x1 layer that mixes them.

Wen et al., "Coordinating Filters for Faster Deep Neural Networks", ICCV 2017:

    conv(N, C, k, k)  ->  conv(M, C, k, k, no bias)  +  conv(N, M, 1, 1, bias)
    W (N x D)         ~   A (N x M)  B (M x D),      D = (C / G) k^2 in each of G groups

The columns of A are the first M eigenvectors of W W^T (uncentred PCA of the filters), B = A^T W.
A linear layer is a convolution with one position. Ranks are totals over the groups, which all get
the same.
"""

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from prunestudy.errors import InputError, first_line, require
from prunestudy.shrink.fold import fold

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
    chosen = {m for m in every if not patterns and prod(getattr(m, "kernel_size", ())) > 1}
    for pattern in patterns:
        matching = {layer for layer, names in every.items() if fnmatch.filter(names, pattern)}
        require(bool(matching), parameter, pattern, _allowed(every))
        chosen |= matching
    kind = "a net with convolutions larger than 1x1, or patterns that name layers"
    require(bool(chosen), parameter, "", kind)
    return {first: layer for layer, (first, *_) in every.items() if layer in chosen}


def groups_of(layer: Layer) -> int:
    """Number of groups of a layer."""
    return getattr(layer, "groups", 1)


def weight_matrix(layer: Layer) -> Tensor:
    """The filters of `layer` as rows, one matrix per group: (G, N / G, D); a view if possible."""
    return layer.weight.detach().unflatten(0, (groups_of(layer), -1)).flatten(2)


def full_rank(layer: Layer) -> int:
    """Largest possible rank, G min(N / G, D)."""
    groups, filters, size = weight_matrix(layer).shape
    return groups * min(filters, size)


def layer_speed_up(layer: Layer, rank: int) -> float:
    """MACs of `layer` over those of its factors, N D / (M (D + N / G)); below 1 they cost more."""
    groups, filters, size = weight_matrix(layer).shape
    return groups * filters * size / (rank * (size + filters))


def factorise_layer(layer: Layer, rank: int) -> nn.Sequential:
    """The factors of `layer` at `rank`: basis filters, then their mixture, as two plain layers.

    The first takes stride, padding and dilation, the second the bias. Raises `InputError` for a
    rank below 1, above the full one or not the same in every group.
    """
    groups, full = groups_of(layer), full_rank(layer)
    whole = type(rank) is int and 1 <= rank <= full
    require(whole, "rank", rank, f"a whole number from 1 to {full}, the full rank")
    require(rank % groups == 0, "rank", rank, f"a multiple of {groups}, the layer's groups")
    kept = rank // groups
    left, size, right = torch.linalg.svd(weight_matrix(layer).double(), full_matrices=False)
    return _pair(layer, left[..., :kept], size[..., :kept, None] * right[:, :kept])


def factorise(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """A folded copy of `model` with factors of these `ranks`; see `factorise_in_place`."""
    plain = fold(model)
    factorise_in_place(plain, ranks)
    return plain.requires_grad_(False)


def factorise_in_place(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Replace the layers named in `ranks` by trainable factors; `InputError` before any is."""
    require_factorisable(model, ranks)
    pairs = {n: factorise_layer(model.get_submodule(n), m) for n, m in ranks.items()}
    for name, pair in pairs.items():
        replace(model, name, pair)


def require_factorisable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise `InputError` for the first of `names` that factors cannot replace in `model`.

    It is none of `replaceable`, shares a parameter with another layer, or its weight is computed.
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


def require_called(model: nn.Module, names: Iterable[str], example: tuple[Tensor, ...]) -> None:
    """Raise `InputError` for a layer whose weight or sizes the forward pass of `model` reads.

    Also if the pass still calls the layer when factors have its place: the net has it elsewhere.
    """
    trial = fold(model)
    for name in names:
        matrix = weight_matrix(layer := trial.get_submodule(name))
        replace(trial, name, _pair(layer, matrix[..., :1], matrix[:, :1]))
        layer._parameters.clear()
        try:
            with torch.no_grad():
                trial(*example)
        except Exception as error:  # whatever a net may raise
            line = f"fails as factors: {first_line(error)}"
            raise InputError(f"module = {name!r}: {line}") from error


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in place of the module `name` of `model`, under every name, with its hooks."""
    old = model.get_submodule(name)
    vars(new).update({key: hooks for key, hooks in vars(old).items() if "ward_" in key})
    for each, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(each, new)


def reduce_rank(pair: nn.Sequential, rank: int) -> nn.Sequential:
    """Factors of a lower total rank: those of the basis, the mixture multiplied by theirs."""
    basis, mixture = pair
    inner = factorise_layer(basis, rank)
    mixed = weight_matrix(mixture).double() @ weight_matrix(inner[1]).double()
    return _pair(basis, mixed, weight_matrix(inner[0]), mixture.bias)


def merged(pair: nn.Sequential) -> Tensor:
    """The product of the factors, in the shape of the weight that they replaced."""
    basis, mixture = pair
    whole = weight_matrix(mixture) @ weight_matrix(basis)
    return whole.reshape(len(mixture.weight), *basis.weight.shape[1:])


def replaceable(model: nn.Module) -> dict[Layer, list[str]]:
    """All names of each layer that factors can replace.

    Not those whose weight their owner reads: subclasses (attention's `out_proj`), and the linear
    layers of a TransformerEncoderLayer, in eval mode.
    """
    owners = (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer))
    read = {layer for owner in owners for layer in owner.children()}
    names: dict[Layer, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if name and type_before_parametrizations(layer) in _KINDS and layer not in read:
            names.setdefault(layer, []).append(name)
    return names


def _allowed(every: Mapping[Layer, list[str]]) -> str:
    names = ", ".join(first for first, *_ in every.values())
    return f"a layer for factors: {names or 'the net has none'}"


def _pair(
    layer: Layer, mixture: Tensor, basis: Tensor, bias: Tensor | None = None
) -> nn.Sequential:
    """Two layers in place of `layer`: `mixture` (G, N / G, M / G) of a `basis` (G, M / G, D)."""
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
