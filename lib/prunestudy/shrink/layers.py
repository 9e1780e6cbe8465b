"""Which modules have channels that can be removed, how many, and what is left without any."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Geometry = Mapping[str, Sequence[int]] | str | None
_NUMBERS = ("kernel_size", "stride", "padding", "dilation", "output_padding")

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
# One value (or none) for each channel, whatever the other channels are.
# (A layer norm's statistics are of all of them, so that they change with those removed; those of a
# group norm are of one of its groups, which goes or stays.)
FOLLOWERS = (*NORMS, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each channel of a convolution has a kernel of its own."""
    if not isinstance(layer, LAYERS[:-1]):
        return False
    return layer.groups == layer.in_channels == layer.out_channels > 1


def is_follower(layer: nn.Module) -> bool:
    """Whether a layer's channels come and go with those before it."""
    return is_depthwise(layer) or isinstance(layer, FOLLOWERS)


def channels_of(layer: nn.Module, side: str) -> int:
    """Number of channels (features) of `layer` at side "in" or "out"."""
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1]
    numbers = ("num_features", "num_channels", "num_parameters")
    for name in (f"{side}_channels", f"{side}_features", *numbers):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise TypeError(type(layer).__name__)


def is_layer(module: nn.Module) -> bool:
    """Whether channels of `module` can be removed: see `LAYERS` and `FOLLOWERS`."""
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return False
    if isinstance(module, nn.LayerNorm):  # others say on which axis only in their code
        return type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    return isinstance(module, (*LAYERS, *FOLLOWERS))


def is_one_node(module: nn.Module) -> bool:
    """Whether a module's operations are traced as one: layers, and others of torch's own."""
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return False
    own = type(module).__module__.startswith("torch.nn.") and any(
        p is not None for p in module._parameters.values()
    )
    return own or isinstance(module, (*LAYERS, *FOLLOWERS))


class Constant(nn.Module):
    """In place of a layer that lost all inputs or outputs: a bias (channels,), zeros, or nothing.

    Maps (batch, any, *places) to (batch, channels, *places of the layer's output). `geometry` is
    as in `geometry_of`: None for a layer that keeps the places (batch norm), "linear" for a linear
    one, which has the channels last.

    What is left of a residual branch is the bias of its last convolution, of which a batch norm
    after it makes beta + gamma (b - mean) / sqrt(var + eps): no multiplication.
    """

    def __init__(self, channels: int, geometry: Geometry, bias: bool = True) -> None:
        super().__init__()
        if geometry not in (None, "linear") and set(geometry) != {*_NUMBERS, "transposed"}:
            raise ValueError(f"geometry = {geometry!r}: what geometry_of gives")
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
            rows = zip(places, *(self.geometry[name] for name in _NUMBERS), strict=True)
            back = self.geometry["transposed"][0]
            places = [_after(*row, transposed=back) for row in rows]
        return [x.shape[0], self.channels, *places]  # not len: ONNX keeps the batch open


def _after(
    n: int, kernel: int, stride: int, pad: int, dilation: int, more: int, *, transposed: int
) -> int:
    """Places behind a convolution on `n` places."""
    reach = dilation * (kernel - 1)
    back = (n - 1) * stride - 2 * pad + reach + more + 1
    return back if transposed else (n + 2 * pad - reach - 1) // stride + 1


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
