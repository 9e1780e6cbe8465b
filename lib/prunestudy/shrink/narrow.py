"""Removing channels for good: a smaller net in plain layers."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunestudy.shrink.fold import fold
from prunestudy.shrink.groups import FOLLOWS, Group
from prunestudy.shrink.layers import (
    TRANSPOSED,
    Constant,
    channels_of,
    geometry_of,
    is_depthwise,
)


class Narrow:
    """Makes copies of `model`, folded, with fewer channels in the given groups.

    `narrow(kept)` has only the channels `kept[g]` of each group g, and computes what `model` does
    with the other channels' slices at zero in the layers that consume them; a layer norm takes its
    statistics over the channels left. It is in eval mode, without gradients. `dense` is the folded
    net that the channels are taken from; `model` is left untouched.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.dense = fold(model)
        self._shared: nn.Module | None = None
        self._full = [group.channels for group in groups]
        self._axes: dict[str, dict[str, tuple[int, list]]] = {}
        for number, group in enumerate(groups):
            for m in group.members:
                axis = FOLLOWS if m.role == FOLLOWS else m.axis
                of = self._axes.setdefault(m.layer, {}).setdefault(axis, (m.size, []))
                of[1].append((number, torch.tensor(m.indices)))

    def __call__(self, kept: Sequence[Tensor], own: bool = True) -> nn.Module:
        """The smaller net; without `own` the last one is reused, and no group may be emptied."""
        if own or self._shared is None:
            # All but the tensors that are cut anew is copied.
            layers = [self.dense.get_submodule(name) for name in self._axes]
            cut = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
            self._shared = copy.deepcopy(self.dense, {id(tensor): tensor for tensor in cut})
        small, gone = self._shared, [torch.ones(n, dtype=torch.bool) for n in self._full]
        for lost, stay in zip(gone, kept, strict=True):
            lost[stay] = False
        for name, axes in self._axes.items():
            stay = {axis: self._stay(*of, gone) for axis, of in axes.items()}
            _fit(small.get_submodule(name), self.dense.get_submodule(name), stay)
        if own:
            self._shared = None
            for name in self._axes:
                _replace_emptied(small, name)
        return small

    def _stay(self, size: int, parts: list, gone: list[Tensor]) -> Tensor:
        here = torch.ones(size, dtype=torch.bool)
        for number, indices in parts:
            here[indices[gone[number]].flatten()] = False
        return here.nonzero().flatten()


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
    parent, _, child = name.rpartition(".")
    setattr(small.get_submodule(parent), child, new.train(layer.training))
