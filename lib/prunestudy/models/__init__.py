"""Networks as plain torch modules, and the registry that builds them by name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from prunestudy.errors import require, require_one_of
from prunestudy.models import small
from prunestudy.models.multipart import TDMPC, Autoencoder
from prunestudy.models.small import Shape, resnet, wide_resnet

__all__ = ["TDMPC", "Autoencoder", "build", "describe", "has_pretrained", "names", "resnet"]
__all__ += ["task_of", "title", "wide_resnet"]


class _Net(NamedTuple):
    factory: Callable[[Shape, int], nn.Module]
    line: str
    weights: str = ""  # torchvision's net whose weights for ImageNet it can start from
    task: str = "classify"


def _torchvision(name: str, shape: Shape, num_classes: int) -> nn.Module:
    from prunestudy.models import torchvision_nets  # late: it takes seconds to import

    return torchvision_nets.build(name, shape, num_classes)


_convolutional = partial(Autoencoder, convolutional=True)
_ONE, _BOTH, _MORE = "reconstruct", "reconstruct_and_classify", "the same with a classifier"
_REGISTRY = {
    "autoencoder": _Net(Autoencoder, "784-256-128-32 and back, 476,720 parameters", task=_ONE),
    "autoencoder_classifier": _Net(
        partial(Autoencoder, head=64), f"{_MORE}, 479,482 parameters", task=_BOTH
    ),
    "conv_autoencoder": _Net(_convolutional, "with 16, 32 filters, 117,377 parameters", task=_ONE),
    "conv_autoencoder_classifier": _Net(
        partial(_convolutional, head=64), f"{_MORE}, 120,139 parameters", task=_BOTH
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
} | {
    name: _Net(partial(_torchvision, name), f"{line} parameters", *more)
    for name, line, *more in (
        ("mobilenet_v2_cifar", "MobileNetV2 for CIFAR, 2,236,682"),
        # The others are for ImageNet, DeepLabV3+ for Pascal VOC.
        ("alexnet_grouped", "AlexNet with groups, 60,965,224"),
        ("deeplabv3plus_resnet50", "DeepLabV3+ on ResNet-50, 40,352,181", "resnet50", "segment"),
        ("alexnet", "torchvision's AlexNet, 61,100,840", "alexnet"),
        ("googlenet", "torchvision's GoogLeNet with batch norm, 6,624,904", "googlenet"),
        ("mobilenet_v2", "torchvision's MobileNetV2, 3,504,872", "mobilenet_v2"),
        ("resnet50", "torchvision's ResNet-50, 25,557,032", "resnet50"),
        ("vgg16", "torchvision's VGG-16, 138,357,544", "vgg16"),
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

    With `pretrained` the net, or its backbone, starts from torchvision's weights for ImageNet.
    Raises `InputError` for an unknown name, a shape or number of classes that the net cannot have,
    and for weights that do not exist or cannot be downloaded.
    """
    net = _net(name)
    allowed = "three positive integers (channels, height, width)"
    triple = isinstance(shape, tuple | list) and len(shape) == 3
    require(triple and all(type(n) is int and n > 0 for n in shape), "shape", shape, allowed)
    require(type(num_classes) is int and num_classes > 0, "num_classes", num_classes, "at least 1")
    require(not pretrained or net.weights != "", "pretrained", pretrained, f"none for {name}")
    made = net.factory(tuple(shape), num_classes)
    if pretrained:
        from prunestudy.models import torchvision_nets

        torchvision_nets.use_pretrained(made, net.weights)
    return made


def _net(name: str) -> _Net:
    require_one_of("model", name, _REGISTRY)
    return _REGISTRY[name]
