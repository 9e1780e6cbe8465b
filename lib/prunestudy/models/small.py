"""Classifiers of small images: (batch, channels, height, width) to logits (batch, num_classes).

Where no smallest size is given, any will do.
"""

import itertools
import math
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from prunestudy.errors import require

Shape = tuple[int, int, int]  # channels, height, width


def sequence(**layers: nn.Module) -> nn.Sequential:
    """The `layers` one after the other, by their names."""
    return nn.Sequential(OrderedDict(layers))


def numbered(kind: str, *layers: nn.Module) -> nn.Sequential:
    """The `layers` with ReLU between them: "fc1", "relu1", "fc2", ..., for `kind` "fc"."""
    named = {}
    for number, layer in enumerate(layers, 1):
        named |= {f"{kind}{number}": layer, f"relu{number}": nn.ReLU()}
    named.popitem()
    return sequence(**named)


def linear_layers(*widths: int) -> nn.Sequential:
    """Linear layers between `widths`, with ReLU between them: "fc1", "relu1", "fc2", ..."""
    return numbered("fc", *(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def lenet5(shape: Shape, num_classes: int) -> nn.Sequential:
    """Caffe's LeNet-5: two 5x5 convolutions (20, 50) with max pooling, then 500 hidden units.

    LeCun et al., "Gradient-based learning applied to document recognition", 1998, in the version
    of Caffe's `lenet_train_test.prototxt` that papers since Han et al. (2015) compress: no ReLU
    after the convolutions. Raises `InputError` for images below 16x16.
    """
    channels, *sides = shape
    require(min(sides) >= 16, "shape", shape, "lenet5 needs images of at least 16x16")
    height, width = (((side - 4) // 2 - 4) // 2 for side in sides)
    return sequence(
        conv1=nn.Conv2d(channels, 20, 5),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(50 * height * width, 500),
        relu1=nn.ReLU(),
        fc2=nn.Linear(500, num_classes),
    )


def lenet300(shape: Shape, num_classes: int) -> nn.Sequential:
    """LeNet-300-100 (LeCun et al., 1998): two hidden ReLU layers on the flattened image."""
    layers = linear_layers(math.prod(shape), 300, 100, num_classes)
    return sequence(flatten=nn.Flatten(), **dict(layers.named_children()))


def mlp(shape: Shape, num_classes: int) -> nn.Sequential:
    """Three hidden ReLU layers of 512, 256 and 128 units on the flattened image."""
    layers = linear_layers(math.prod(shape), 512, 256, 128, num_classes)
    return sequence(flatten=nn.Flatten(), layers=nn.Sequential(*layers))


def convnet(shape: Shape, num_classes: int) -> nn.Sequential:
    """Caffe's cifar10_full, the ConvNet of the Force Regularization paper.

    From `cifar10_full_train_test.prototxt`. Pooling rounds sizes up, as in Caffe: 32, 16, 8, 4.
    Raises `InputError` for images below 8x8.
    """
    channels, *sides = shape
    require(min(sides) >= 8, "shape", shape, "convnet needs images of at least 8x8")
    for _ in range(3):
        sides = [math.ceil((side - 3) / 2) + 1 for side in sides]
    return sequence(
        conv1=nn.Conv2d(channels, 32, 5, padding=2),
        pool1=nn.MaxPool2d(3, 2, ceil_mode=True),
        relu1=nn.ReLU(),
        norm1=_WithinChannelNorm(),
        conv2=nn.Conv2d(32, 32, 5, padding=2),
        relu2=nn.ReLU(),
        pool2=nn.AvgPool2d(3, 2, ceil_mode=True),
        norm2=_WithinChannelNorm(),
        conv3=nn.Conv2d(32, 64, 5, padding=2),
        relu3=nn.ReLU(),
        pool3=nn.AvgPool2d(3, 2, ceil_mode=True),
        flatten=nn.Flatten(),
        fc=nn.Linear(64 * math.prod(sides), num_classes),
    )


def vgg16_cifar(shape: Shape, num_classes: int) -> nn.Sequential:
    """VGG-16 for small images: 13 3x3 convolutions with batch norm, one linear layer.

    Configuration D of Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, in the
    version that pruning papers use on CIFAR. Pooling rounds sizes up, so that images below 32x32
    also fit; features of larger images are averaged.
    """
    layers, width = [], shape[0]
    for outputs, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [_conv3x3(width, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
            width = outputs
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return _with_head(num_classes, width, features=nn.Sequential(*layers))


def resnet(depth: int, shape: Shape, num_classes: int) -> nn.Sequential:
    """ResNet of `depth` 6 n + 2: three stages of n blocks, with 16, 32 and 64 channels.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, but the
    shortcut at a change of width is a 1x1 convolution without batch norm, as in the Force
    Regularization paper (He et al. pad with zeros). Raises `InputError` for another depth.
    """
    require(depth >= 8 and depth % 6 == 2, "depth", depth, "6 n + 2 with n of at least 1")
    return _with_head(
        num_classes,
        64,
        conv1=_conv3x3(shape[0], 16),
        bn1=nn.BatchNorm2d(16),
        relu=nn.ReLU(),
        **_stages(_Block, depth // 6, (16, 16, 32, 64)),
    )


def wide_resnet(depth: int, width: int, shape: Shape, num_classes: int) -> nn.Sequential:
    """Wide ResNet of `depth` 6 n + 4: three stages of n blocks, with `width` times 16, 32 and 64.

    Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, without dropout. Raises
    `InputError` for another depth.
    """
    require(depth >= 10 and depth % 6 == 4, "depth", depth, "6 n + 4 with n of at least 1")
    return _with_head(
        num_classes,
        64 * width,
        conv1=_conv3x3(shape[0], 16),
        **_stages(_PreactivationBlock, depth // 6, (16, 16 * width, 32 * width, 64 * width)),
        bn=nn.BatchNorm2d(64 * width),
        relu=nn.ReLU(),
    )


class _WithinChannelNorm(nn.Module):
    """Caffe's local response normalisation WITHIN_CHANNEL; torch's works across channels.

    y = x / (1 + 5e-5 m)^0.75, where m is the mean of x^2 over a 3x3 window padded with zeros.
    """

    alpha, beta = 5e-5, 0.75

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool2d(x * x, 3, stride=1, padding=1)
        return x * (1 + self.alpha * mean) ** -self.beta


class _Block(nn.Module):
    """Basic block of a ResNet: relu(branch(x) + shortcut(x)), 1 / stride as high and wide as x."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class _PreactivationBlock(nn.Module):
    """The same for a Wide ResNet: batch norm and ReLU come first, also ahead of the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normal = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(normal))))
        return y + (x if self.shortcut is None else self.shortcut(normal))


def _stages(block: type[nn.Module], count: int, widths: tuple[int, ...]) -> dict[str, nn.Module]:
    """Three stages of `count` blocks between `widths`; the later two halve the image."""
    stages = {}
    for number in (1, 2, 3):
        inputs, outputs = widths[number - 1 : number + 1]
        first = block(inputs, outputs, min(number, 2))
        rest = (block(outputs, outputs, 1) for _ in range(count - 1))
        stages[f"stage{number}"] = nn.Sequential(first, *rest)
    return stages


def _with_head(num_classes: int, width: int, **layers: nn.Module) -> nn.Sequential:
    """The `layers` and a classifier on their `width` averaged channels.

    Convolutions start as in He et al., "Delving Deep into Rectifiers", 2015: normal, by fan-out.
    """
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    net = sequence(**layers, **head, fc=nn.Linear(width, num_classes))
    for layer in net.modules():
        # On the meta device there is nothing to draw, and trying takes torch seconds.
        if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return net


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
