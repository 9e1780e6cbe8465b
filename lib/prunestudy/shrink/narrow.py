"""Removing channels for good: a smaller net in plain layers."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunestudy.shrink.fold import fold
from prunestudy.shrink.groups import FOLLOWS, Group
from prunestudy.shrink.trace import TRANSPOSED, is_depthwise


def narrow(model: nn.Module, groups: Sequence[Group], kept: Sequence[Tensor]) -> nn.Module:
    """A copy of `model`, folded, with only the channels `kept[g]` of each group g.

    In eval mode the copy computes what `model` does with the other channels' slices at zero in
    the layers that consume them; a layer norm takes its mean over the channels left. `model` is
    left untouched.
    """
    return Narrow(model, groups)(kept)


class Narrow:
    """`narrow` many times: each call fits the same copy anew, or with `own` makes a new one."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.dense = fold(model)
        self._shared = copy.deepcopy(self.dense)
        self._full = [group.channels for group in groups]
        self._axes: dict[str, dict[str, tuple[int, list]]] = {}
        for number, group in enumerate(groups):
            for m in group.members:
                axis = FOLLOWS if m.role == FOLLOWS else m.axis
                of = self._axes.setdefault(m.layer, {}).setdefault(axis, (m.size, []))
                of[1].append((number, torch.tensor(m.indices)))

    def __call__(self, kept: Sequence[Tensor], own: bool = True) -> nn.Module:
        """The net with only the channels `kept[g]` of each group g, in eval mode."""
        small = copy.deepcopy(self.dense) if own else self._shared
        gone = [torch.ones(n, dtype=torch.bool) for n in self._full]
        for lost, stay in zip(gone, kept, strict=True):
            lost[stay] = False
        for name, axes in self._axes.items():
            stay = {axis: self._stay(*of, gone) for axis, of in axes.items()}
            _fit(small.get_submodule(name), self.dense.get_submodule(name), stay)
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
        cut = tensor.detach()
        for axis, places in stay.items():
            if cut.dim() and not (axis == "in" and name != "weight"):
                along = axis_of(dense, axis) if name == "weight" else 0
                # The groups of a grouped convolution go together: the first stands for all.
                here = places[places < cut.shape[along]].to(cut.device)
                cut = cut.index_select(along, here)
        if isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
        setattr(layer, name, cut)
    for axis in stay:
        _resize(layer, axis)


def _resize(layer: nn.Module, axis: str) -> None:
    """Write the new size where the layer keeps it."""
    size = len(layer.weight) if axis == FOLLOWS else layer.weight.shape[axis_of(layer, axis)]
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (size,)
    elif isinstance(layer, nn.Linear):
        setattr(layer, f"{axis}_features", size)
    elif is_depthwise(layer):
        layer.in_channels = layer.out_channels = layer.groups = size
    elif axis == FOLLOWS:
        setattr(layer, "num_parameters" if isinstance(layer, nn.PReLU) else "num_features", size)
    else:
        grouped = layer.groups if axis_of(layer, axis) == 1 else 1
        setattr(layer, f"{axis}_channels", size * grouped)
