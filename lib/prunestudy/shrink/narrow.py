"""Removing channels for good: a smaller net in plain layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunestudy.shrink.factors import replace
from prunestudy.shrink.fold import copied
from prunestudy.shrink.groups import FOLLOWS, Group
from prunestudy.shrink.layers import (
    TRANSPOSED,
    Constant,
    channels_of,
    geometry_of,
    is_depthwise,
)


def narrow(dense: nn.Module, groups: Sequence[Group], kept: Sequence[Tensor]) -> nn.Module:
    """A copy of a plain net with only the channels `kept[g]` of each group g.

    It computes what `dense` does with the other channels' slices at zero in the layers that consume
    them; a layer norm takes its statistics over the channels left.
    """
    open_: dict[str, dict[str, Tensor]] = {}  # which places of each axis stay, by layer
    for group, stay in zip(groups, kept, strict=True):
        mask = torch.zeros(group.channels)
        mask[stay] = 1
        for m in group.members:
            axes, axis = open_.setdefault(m.layer, {}), FOLLOWS if m.role == FOLLOWS else m.axis
            axes[axis] = axes.get(axis, 1.0) * m.spread(mask)
    layers = {name: dense.get_submodule(name) for name in open_}
    cut = [t for layer in layers.values() for t in (*layer.parameters(), *layer.buffers())]
    small = copied(dense, cut)  # these are cut anew
    for name, axes in open_.items():
        places = {axis: mask.nonzero().flatten() for axis, mask in axes.items()}
        _fit(small.get_submodule(name), layers[name], places)
        _replace_emptied(small, name)
    return small


def axis_of(layer: nn.Module, axis: str) -> int:
    """The dimension of a weight along which the channels of `axis` ("in", "out", ...) lie."""
    return int((axis == "in") != isinstance(layer, TRANSPOSED)) if axis != FOLLOWS else 0


def _fit(layer: nn.Module, dense: nn.Module, stay: dict[str, Tensor]) -> None:
    """Make `layer` what is left of `dense` with the places `stay` of each axis."""
    for name, tensor in [*dense.named_parameters(), *dense.named_buffers()]:
        cut = tensor.detach().clone()
        for axis, places in stay.items():
            if cut.dim() and not (axis == "in" and name != "weight"):
                along = axis_of(dense, axis) if name == "weight" else 0
                # The groups of a grouped convolution go together: the first stands for all.
                here = places[places < cut.shape[along]].to(cut.device)
                cut = cut.index_select(along, here)
        if isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
        setattr(layer, name, cut)
    for axis, places in stay.items():
        _resize(layer, axis, len(places))


def _resize(layer: nn.Module, axis: str, size: int) -> None:
    """Write the new number of channels where the layer keeps it."""
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (size,)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = size * layer.num_groups // layer.num_channels
        layer.num_channels = size
    elif isinstance(layer, nn.Linear):
        setattr(layer, f"{axis}_features", size)
    elif axis != FOLLOWS:
        setattr(layer, f"{axis}_channels", size)
    elif is_depthwise(layer):
        layer.in_channels = layer.out_channels = layer.groups = size
    else:
        setattr(layer, "num_parameters" if isinstance(layer, nn.PReLU) else "num_features", size)


def _replace_emptied(small: nn.Module, name: str) -> None:
    layer = small.get_submodule(name)
    channels, bias = channels_of(layer, "out"), getattr(layer, "bias", None)
    if channels and channels_of(layer, "in"):
        return
    new = Constant(channels, geometry_of(layer), bias is not None and channels > 0)
    if new.bias is not None:
        new.bias = bias
    replace(small, name, new.train(layer.training))
