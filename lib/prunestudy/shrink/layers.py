"""Which modules have channels that can be removed, and how many."""

from torch import nn

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
