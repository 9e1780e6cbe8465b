"""What takes the place of layers in a branch that lost all its channels.

A layer without outputs becomes `Nothing`, one without inputs `Constant`: its output is its bias,
and a batch norm after it makes of that beta + gamma (b - mean) / sqrt(var + eps). What is left of
a residual branch is that constant, and no multiplication.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.shrink.fold import require_net
from prunestudy.shrink.trace import TRANSPOSED

Geometry = Mapping[str, Sequence[int]] | str | None
_NUMBERS = ("kernel_size", "stride", "padding", "dilation", "output_padding")


class Nothing(nn.Module):
    """In place of a layer all of whose outputs were removed: no channel, at the layer's size.

    Maps (batch, any, *places) to (batch, 0, *places of the layer's output). `geometry` as in
    `geometry_of`; None for a layer that keeps the places (batch norm), "linear" for a linear one.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        _require_geometry(geometry)
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        """An empty tensor; see the class."""
        return x.new_zeros(_output_shape(x, self.geometry, 0))

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"{self.geometry}"


class Constant(nn.Module):
    """In place of a layer all of whose inputs were removed: a bias (channels,), or zero.

    Maps (batch, any, *places) to (batch, channels, *places of the layer's output).
    """

    def __init__(self, channels: int, geometry: Geometry, bias: bool = True) -> None:
        super().__init__()
        _require_geometry(geometry)
        if type(channels) is not int or channels < 1:
            raise ValueError(f"channels = {channels!r}: at least 1")
        self.channels, self.geometry = channels, geometry
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def reset_parameters(self) -> None:
        """Set the bias to zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The constant at every place; see the class."""
        shape = _output_shape(x, self.geometry, self.channels)
        if self.bias is None:
            return x.new_zeros(shape)
        places = 0 if self.geometry == "linear" else len(shape) - 2
        values = self.bias.view(-1, *[1] * places).expand(shape)
        return values.clone()  # what follows may work in place

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"{self.channels}, bias={self.bias is not None}, {self.geometry}"


def require_whole(model: nn.Module) -> None:
    """Raise `InputError` for a net with a branch that was removed: its constant cannot be cut."""
    require_net(model)
    for name, module in model.named_modules():
        gone = isinstance(module, Constant | Nothing)
        require(not gone, "module", name, "a branch was removed here, no more can be")


def geometry_of(layer: nn.Module) -> Geometry:
    """How the places of the output of `layer` follow from those of its input, as plain values."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if not hasattr(layer, "kernel_size"):
        return None
    values = {name: getattr(layer, name) for name in _NUMBERS}
    if isinstance(values["padding"], str):
        if values["padding"] == "same":
            return None
        values["padding"] = (0,) * len(layer.kernel_size)
    numbers = {name: list(value) for name, value in values.items()}
    return numbers | {"transposed": [int(isinstance(layer, TRANSPOSED))]}


def _output_shape(x: Tensor, geometry: Geometry, channels: int) -> list[int]:
    if geometry == "linear":
        return [*x.shape[:-1], channels]
    places = list(x.shape[2:])
    if geometry is not None:
        rows = zip(*(geometry[name] for name in _NUMBERS), strict=True)
        back = geometry["transposed"][0]
        places = [_after(n, *row, back) for n, row in zip(places, rows, strict=True)]
    return [x.shape[0], channels, *places]  # not len: ONNX keeps the batch open


def _after(n: int, k: int, stride: int, pad: int, dilation: int, more: int, transposed: int) -> int:
    """Places behind a convolution on `n` places."""
    reach = dilation * (k - 1)
    if transposed:
        return (n - 1) * stride - 2 * pad + reach + more + 1
    return (n + 2 * pad - reach - 1) // stride + 1


def _require_geometry(geometry: Geometry) -> None:
    names = {*_NUMBERS, "transposed"}
    right = isinstance(geometry, dict) and set(geometry) == names
    if not (right or geometry in (None, "linear")):
        raise ValueError(f"geometry = {geometry!r}: what geometry_of gives")
