"""Removing channels for good: a smaller net in plain layers.

A layer that loses all its inputs or outputs becomes `Constant`. What is left of a residual branch
is the bias of its last convolution, of which a batch norm after it makes
beta + gamma (b - mean) / sqrt(var + eps): no multiplication.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.shrink.fold import fold, require_net
from prunestudy.shrink.groups import FOLLOWS, Group
from prunestudy.shrink.layers import TRANSPOSED, channels_of, is_depthwise

Geometry = Mapping[str, Sequence[int]] | str | None
_NUMBERS = ("kernel_size", "stride", "padding", "dilation", "output_padding")


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
            self._shared = self._copy()
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

    def _copy(self) -> nn.Module:
        """A copy of the dense net but for the tensors that are cut anew."""
        layers = [self.dense.get_submodule(name) for name in self._axes]
        cut = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
        return copy.deepcopy(self.dense, {id(tensor): tensor for tensor in cut})

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


class Constant(nn.Module):
    """In place of a layer that lost all inputs or outputs: a bias (channels,), zeros, or nothing.

    Maps (batch, any, *places) to (batch, channels, *places of the layer's output). `geometry` is
    as in `geometry_of`: None for a layer that keeps the places (batch norm), "linear" for a linear
    one, which has the channels last.
    """

    def __init__(self, channels: int, geometry: Geometry, bias: bool = True) -> None:
        super().__init__()
        known = isinstance(geometry, dict) and set(geometry) == {*_NUMBERS, "transposed"}
        if not (known or geometry in (None, "linear")):
            raise ValueError(f"geometry = {geometry!r}: what geometry_of gives")
        if type(channels) is not int or channels < 0:
            raise ValueError(f"channels = {channels!r}: at least 0")
        self.channels, self.geometry = channels, geometry
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def reset_parameters(self) -> None:
        """Set the bias to zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The constant at every place; see the class."""
        shape = self._shape(x)
        if self.bias is None:
            return x.new_zeros(shape)
        places = 0 if self.geometry == "linear" else len(shape) - 2
        # A copy: what follows may work in place.
        return self.bias.view(-1, *[1] * places).expand(shape).clone()

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"{self.channels}, bias={self.bias is not None}, {self.geometry}"

    def _shape(self, x: Tensor) -> list[int]:
        if self.geometry == "linear":
            return [*x.shape[:-1], self.channels]
        places = list(x.shape[2:])
        if self.geometry is not None:
            rows = zip(*(self.geometry[name] for name in _NUMBERS), strict=True)
            back = self.geometry["transposed"][0]
            places = [_after(n, *row, back) for n, row in zip(places, rows, strict=True)]
        return [x.shape[0], self.channels, *places]  # not len: ONNX keeps the batch open


def _after(n: int, k: int, stride: int, pad: int, dilation: int, more: int, transposed: int) -> int:
    """Places behind a convolution on `n` places."""
    reach = dilation * (k - 1)
    if transposed:
        return (n - 1) * stride - 2 * pad + reach + more + 1
    return (n + 2 * pad - reach - 1) // stride + 1


def geometry_of(layer: nn.Module) -> Geometry:
    """How the places of the output of `layer` follow from those of its input, as plain values."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if not hasattr(layer, "kernel_size") or layer.padding == "same":
        return None
    values = {name: getattr(layer, name) for name in _NUMBERS}
    if values["padding"] == "valid":
        values["padding"] = (0,) * len(layer.kernel_size)
    numbers = {name: list(value) for name, value in values.items()}
    return numbers | {"transposed": [int(isinstance(layer, TRANSPOSED))]}


def require_whole(model: nn.Module) -> None:
    """Raise `InputError` for a net with a branch that was removed: its constant cannot be cut."""
    require_net(model)
    for name, module in model.named_modules():
        gone = isinstance(module, Constant)
        require(not gone, "module", name, "a branch was removed here, no more can be")
