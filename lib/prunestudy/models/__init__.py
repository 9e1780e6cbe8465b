"""Networks as plain torch modules, and the registry that builds them by name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from prunestudy.errors import require, require_one_of
from prunestudy.models import small
from prunestudy.models import torchvision_nets as tv
from prunestudy.models.multipart import TDMPC, Autoencoder
from prunestudy.models.small import Shape, resnet, wide_resnet

__all__ = ["TDMPC", "Autoencoder", "build", "describe", "has_pretrained", "names", "resnet"]
__all__ += ["task_of", "title", "wide_resnet"]


class _Net(NamedTuple):
    factory: Callable[[Shape, int], nn.Module]
    line: str
    task: str = "classify"
    weights: str = ""  # torchvision's net whose weights for ImageNet it can start from


_convolutional = partial(Autoencoder, convolutional=True)
_ONE, _BOTH = "reconstruct", "reconstruct_and_classify"
_REGISTRY = {
    "autoencoder": _Net(Autoencoder, "784-256-128-32 and back, 476,720 parameters", _ONE),
    "autoencoder_classifier": _Net(
        partial(Autoencoder, head=64), "the same with a classifier, 479,482 parameters", _BOTH
    ),
    "conv_autoencoder": _Net(_convolutional, "with 16, 32 filters, 117,377 parameters", _ONE),
    "conv_autoencoder_classifier": _Net(
        partial(_convolutional, head=64), "the same with a classifier, 120,139 parameters", _BOTH
    ),
    "lenet5": _Net(small.lenet5, "Caffe's LeNet-5 for MNIST, 431,080 parameters"),
    "lenet300": _Net(small.lenet300, "LeNet-300-100 for MNIST, 266,610 parameters"),
    "mlp": _Net(small.mlp, "784-512-256-128-10 for MNIST, 567,434 parameters"),
    "convnet": _Net(small.convnet, "Caffe's cifar10_full for CIFAR, 89,578 parameters"),
    "resnet20": _Net(partial(resnet, 20), "ResNet-20 for CIFAR, 272,282 parameters"),
    "resnet32": _Net(partial(resnet, 32), "ResNet-32 for CIFAR, 466,714 parameters"),
    "resnet56": _Net(partial(resnet, 56), "ResNet-56 for CIFAR, 855,578 parameters"),
    "wrn28_2": _Net(partial(wide_resnet, 28, 2), "WRN-28-2 for CIFAR, 1,467,610 parameters"),
    "vgg16_cifar": _Net(small.vgg16_cifar, "VGG-16 for CIFAR, 14,724,042 parameters"),
    "mobilenet_v2_cifar": _Net(
        tv.mobilenet_v2_cifar, "MobileNetV2 for CIFAR, 2,236,682 parameters"
    ),
    # The others are for ImageNet, DeepLabV3+ for Pascal VOC.
    "alexnet_grouped": _Net(tv.alexnet_grouped, "AlexNet with groups, 60,965,224 parameters"),
    "deeplabv3plus_resnet50": _Net(
        tv.DeepLabV3Plus,
        "DeepLabV3+ on ResNet-50, 40,352,181 parameters",
        "segment",
        "resnet50",
    ),
} | {
    name: _Net(partial(tv.torchvision_net, name), f"torchvision's {line} parameters", weights=name)
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


def title(name: str) -> str:
    """The name of net `name` for people: "LeNet-5"; names that are words already stay."""
    first = _net(name).line.split(" for ")[0].split(",")[0].split("'s ")[-1]
    return first if first[0].isupper() else name.replace("_", " ")


def task_of(name: str) -> str:
    """The task that net `name` is trained for, a name that `measure.task` takes."""
    return _net(name).task


def has_pretrained(name: str) -> bool:
    """Whether there are ImageNet weights for net `name`, or for its backbone."""
    return bool(_net(name).weights)


def build(name: str, shape: Shape, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Build net `name`, freshly initialised, for images of `shape` (channels, height, width).

    A classifier maps (batch, *shape) to logits (batch, num_classes). With `pretrained` the net, or
    its backbone, starts from torchvision's weights for ImageNet. Raises `InputError` for an unknown
    name, a shape or number of classes that the net cannot have, and for weights that do not exist
    or cannot be downloaded.
    """
    net = _net(name)
    allowed = "three positive integers (channels, height, width)"
    triple = isinstance(shape, tuple | list) and len(shape) == 3
    require(triple and all(type(n) is int and n > 0 for n in shape), "shape", shape, allowed)
    require(type(num_classes) is int and num_classes > 0, "num_classes", num_classes, "at least 1")
    require(not pretrained or net.weights != "", "pretrained", pretrained, f"none for {name}")
    made = net.factory(tuple(shape), num_classes)
    if pretrained:
        tv.use_pretrained(made, net.weights)
    return made


def _net(name: str) -> _Net:
    require_one_of("model", name, _REGISTRY)
    return _REGISTRY[name]
