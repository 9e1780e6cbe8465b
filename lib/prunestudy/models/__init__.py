"""Networks as plain torch modules, and the registry that builds them by name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from prunestudy.errors import InputError, require, require_one_of
from prunestudy.models.autoencoder import (
    Autoencoder,
    AutoencoderClassifier,
    ConvAutoencoder,
    ConvAutoencoderClassifier,
)
from prunestudy.models.convnet import ConvNet
from prunestudy.models.lenet import LeNet5, LeNet300
from prunestudy.models.mlp import MLP
from prunestudy.models.resnet import ResNet
from prunestudy.models.tdmpc import TDMPC
from prunestudy.models.torchvision_nets import (
    DeepLabV3Plus,
    alexnet_grouped,
    mobilenet_v2_cifar,
    torchvision_net,
    use_pretrained,
)
from prunestudy.models.vgg import VGG16
from prunestudy.models.wide_resnet import WideResNet

__all__ = [
    "MLP",
    "TDMPC",
    "VGG16",
    "Autoencoder",
    "AutoencoderClassifier",
    "ConvAutoencoder",
    "ConvAutoencoderClassifier",
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
_SHAPE = "three positive integers (channels, height, width)"


class _Entry(NamedTuple):
    factory: Callable[[Shape, int], nn.Module]
    line: str
    task: str = "classify"
    # What `use_pretrained` takes: weights, their classifier, and the part of the net they are for.
    weights: tuple[str, ...] = ()


_REGISTRY = {
    "autoencoder": _Entry(
        Autoencoder, "784-256-128-32 and back, 476,720 parameters on 1x28x28", "reconstruct"
    ),
    "autoencoder_classifier": _Entry(
        AutoencoderClassifier,
        "the autoencoder with a classifier on the latent vector, 479,482 parameters",
        "reconstruct_and_classify",
    ),
    "conv_autoencoder": _Entry(
        ConvAutoencoder, "16 and 32 filters, latent 32, 117,377 parameters", "reconstruct"
    ),
    "conv_autoencoder_classifier": _Entry(
        ConvAutoencoderClassifier,
        "the convolutional one with a classifier on the latent vector, 120,139 parameters",
        "reconstruct_and_classify",
    ),
    "convnet": _Entry(ConvNet, "Caffe's cifar10_full, 89,578 parameters on 3x32x32"),
    "lenet5": _Entry(LeNet5, "Caffe's LeNet-5, 431,080 parameters on 1x28x28 and 10 classes"),
    "lenet300": _Entry(LeNet300, "LeNet-300-100, 266,610 parameters on 1x28x28 and 10 classes"),
    "mlp": _Entry(MLP, "784-512-256-128-10, 567,434 parameters on 1x28x28 and 10 classes"),
    "resnet20": _Entry(partial(ResNet, 20), "ResNet-20 for CIFAR, 272,282 parameters"),
    "resnet32": _Entry(partial(ResNet, 32), "ResNet-32 for CIFAR, 466,714 parameters"),
    "resnet56": _Entry(partial(ResNet, 56), "ResNet-56 for CIFAR, 855,578 parameters"),
    "wrn28_2": _Entry(partial(WideResNet, 28, 2), "WRN-28-2 for CIFAR, 1,467,610 parameters"),
    "vgg16_cifar": _Entry(VGG16, "VGG-16 with batch norm for CIFAR, 14,724,042 parameters"),
    "mobilenet_v2_cifar": _Entry(
        mobilenet_v2_cifar, "MobileNetV2 for CIFAR, 2,236,682 parameters with 10 classes"
    ),
    # On 3x224x224 and 1,000 classes (DeepLabV3+: 21).
    "alexnet": _Entry(
        partial(torchvision_net, "alexnet"),
        "torchvision's AlexNet, 61,100,840 parameters",
        weights=("AlexNet_Weights.IMAGENET1K_V1", "classifier.6"),
    ),
    "alexnet_grouped": _Entry(
        alexnet_grouped, "AlexNet with two groups as in 2012, 60,965,224 parameters"
    ),
    "vgg16": _Entry(
        partial(torchvision_net, "vgg16"),
        "torchvision's VGG-16, 138,357,544 parameters",
        weights=("VGG16_Weights.IMAGENET1K_V1", "classifier.6"),
    ),
    "googlenet": _Entry(
        partial(torchvision_net, "googlenet"),
        "torchvision's GoogLeNet with batch norm, 6,624,904 parameters",
        weights=("GoogLeNet_Weights.IMAGENET1K_V1", "fc"),
    ),
    "resnet50": _Entry(
        partial(torchvision_net, "resnet50"),
        "torchvision's ResNet-50, 25,557,032 parameters",
        weights=("ResNet50_Weights.IMAGENET1K_V1", "fc"),
    ),
    "mobilenet_v2": _Entry(
        partial(torchvision_net, "mobilenet_v2"),
        "torchvision's MobileNetV2, 3,504,872 parameters",
        weights=("MobileNet_V2_Weights.IMAGENET1K_V1", "classifier.1"),
    ),
    "deeplabv3plus_resnet50": _Entry(
        DeepLabV3Plus,
        "DeepLabV3+ on ResNet-50, 40,352,181 parameters with 21 classes",
        "segment",
        ("ResNet50_Weights.IMAGENET1K_V1", "fc", "backbone"),
    ),
}


def names() -> list[str]:
    """The names that `build` knows, sorted."""
    return sorted(_REGISTRY)


def describe() -> dict[str, str]:
    """One line about each network, by name."""
    return {name: _REGISTRY[name].line for name in names()}


def task_of(name: str) -> str:
    """What network `name` is trained for, a name of `measure.TASKS`."""
    require_one_of("model", name, names())
    return _REGISTRY[name].task


def has_pretrained(name: str) -> bool:
    """Whether network `name`, or the backbone in it, can start from ImageNet's weights."""
    require_one_of("model", name, names())
    return bool(_REGISTRY[name].weights)


def build(name: str, shape: Shape, num_classes: int, pretrained: bool = False) -> nn.Module:
    """A freshly initialised network for images of `shape` (channels, height, width).

    It maps (batch, *shape) to logits (batch, num_classes), or to what its task says. With
    `pretrained` it starts from torchvision's weights for ImageNet, but for a classifier of other
    classes. Raises `InputError` for an unknown name, a shape or class count that does not fit,
    and for weights that do not exist or cannot be downloaded.
    """
    require_one_of("model", name, names())
    try:
        shape = tuple(shape)
    except TypeError:
        raise InputError(f"shape = {shape!r}: {_SHAPE}") from None
    require(
        len(shape) == 3 and all(type(n) is int and n > 0 for n in shape), "shape", shape, _SHAPE
    )
    require(type(num_classes) is int and num_classes > 0, "num_classes", num_classes, "at least 1")
    require(not pretrained or has_pretrained(name), "pretrained", pretrained, f"none for {name}")
    net = _REGISTRY[name].factory(shape, num_classes)
    if pretrained:
        use_pretrained(net, *_REGISTRY[name].weights)
    return net
