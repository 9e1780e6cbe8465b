"""Networks as plain torch modules, and the registry that builds them by name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from prunestudy.errors import require, require_one_of
from prunestudy.models.cifar import VGG16, ResNet, WideResNet
from prunestudy.models.multipart import TDMPC, Autoencoder
from prunestudy.models.small import MLP, ConvNet, LeNet5, LeNet300
from prunestudy.models.torchvision_nets import (
    DeepLabV3Plus,
    alexnet_grouped,
    mobilenet_v2_cifar,
    torchvision_net,
    use_pretrained,
)

__all__ = [
    "MLP",
    "TDMPC",
    "VGG16",
    "Autoencoder",
    "ConvNet",
    "DeepLabV3Plus",
    "LeNet5",
    "LeNet300",
    "ResNet",
    "WideResNet",
    "build",
    "describe",
    "has_pretrained",
    "names",
    "task_of",
]


Shape = tuple[int, int, int]


class _Entry(NamedTuple):
    factory: Callable[[Shape, int], nn.Module]
    line: str
    task: str = "classify"
    weights: str = ""  # torchvision's net whose weights for ImageNet it can start from


_BOTH = "reconstruct_and_classify"
_REGISTRY = {
    # On 1x28x28 images.
    "autoencoder": _Entry(
        Autoencoder, "784-256-128-32 and back, 476,720 parameters", "reconstruct"
    ),
    "autoencoder_classifier": _Entry(
        partial(Autoencoder, head=64), "the same with a classifier, 479,482 parameters", _BOTH
    ),
    "conv_autoencoder": _Entry(
        partial(Autoencoder, convolutional=True),
        "16 and 32 filters, latent 32, 117,377 parameters",
        "reconstruct",
    ),
    "conv_autoencoder_classifier": _Entry(
        partial(Autoencoder, head=64, convolutional=True),
        "the convolutional one with a classifier, 120,139 parameters",
        _BOTH,
    ),
    "lenet5": _Entry(LeNet5, "Caffe's LeNet-5, 431,080 parameters on 1x28x28 and 10 classes"),
    "lenet300": _Entry(LeNet300, "LeNet-300-100, 266,610 parameters on 1x28x28 and 10 classes"),
    "mlp": _Entry(MLP, "784-512-256-128-10, 567,434 parameters on 1x28x28 and 10 classes"),
    "convnet": _Entry(ConvNet, "Caffe's cifar10_full, 89,578 parameters on 3x32x32"),
    "resnet20": _Entry(partial(ResNet, 20), "ResNet-20 for CIFAR, 272,282 parameters"),
    "resnet32": _Entry(partial(ResNet, 32), "ResNet-32 for CIFAR, 466,714 parameters"),
    "resnet56": _Entry(partial(ResNet, 56), "ResNet-56 for CIFAR, 855,578 parameters"),
    "wrn28_2": _Entry(partial(WideResNet, 28, 2), "WRN-28-2 for CIFAR, 1,467,610 parameters"),
    "vgg16_cifar": _Entry(VGG16, "VGG-16 with batch norm for CIFAR, 14,724,042 parameters"),
    "mobilenet_v2_cifar": _Entry(mobilenet_v2_cifar, "MobileNetV2 for CIFAR, 2,236,682 parameters"),
    # With 1,000 classes (DeepLabV3+: 21).
    "alexnet_grouped": _Entry(
        alexnet_grouped, "AlexNet with the groups of 2012, 60,965,224 parameters"
    ),
    "deeplabv3plus_resnet50": _Entry(
        DeepLabV3Plus, "DeepLabV3+ on ResNet-50, 40,352,181 parameters", "segment", "resnet50"
    ),
} | {
    name: _Entry(partial(torchvision_net, name), f"torchvision's {line} parameters", weights=name)
    for name, line in (
        ("alexnet", "AlexNet, 61,100,840"),
        ("googlenet", "GoogLeNet with batch norm, 6,624,904"),
        ("mobilenet_v2", "MobileNetV2, 3,504,872"),
        ("resnet50", "ResNet-50, 25,557,032"),
        ("vgg16", "VGG-16, 138,357,544"),
    )
}


def names() -> list[str]:
    """The names that `build` accepts, sorted."""
    return sorted(_REGISTRY)


def describe() -> dict[str, str]:
    """Each net's name and a line about it."""
    return {name: _REGISTRY[name].line for name in names()}


def task_of(name: str) -> str:
    """The task that net `name` is trained for, a key of `measure.TASKS`."""
    require_one_of("model", name, names())
    return _REGISTRY[name].task


def has_pretrained(name: str) -> bool:
    """Whether there are ImageNet weights for net `name`, or for its backbone."""
    require_one_of("model", name, names())
    return bool(_REGISTRY[name].weights)


def build(name: str, shape: Shape, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Build net `name`, freshly initialised, for images of `shape` (channels, height, width).

    A classifier maps (batch, *shape) to logits (batch, num_classes). With `pretrained` the net, or
    its backbone, starts from torchvision's weights for ImageNet. Raises `InputError` for an unknown
    name, a shape or number of classes that the net cannot have, and for weights that do not exist
    or cannot be downloaded.
    """
    require_one_of("model", name, names())
    allowed = "three positive integers (channels, height, width)"
    triple = isinstance(shape, tuple | list) and len(shape) == 3
    require(triple and all(type(n) is int and n > 0 for n in shape), "shape", shape, allowed)
    require(type(num_classes) is int and num_classes > 0, "num_classes", num_classes, "at least 1")
    require(not pretrained or has_pretrained(name), "pretrained", pretrained, f"none for {name}")
    net = _REGISTRY[name].factory(tuple(shape), num_classes)
    if pretrained:
        use_pretrained(net, _REGISTRY[name].weights)
    return net
