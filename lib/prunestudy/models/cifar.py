"""The deeper nets for CIFAR: VGG-16, ResNets and Wide ResNets.

All map images (batch, channels, height, width), of any size, to logits (batch, num_classes). Their
convolutions have no bias and start as in He et al., "Delving Deep into Rectifiers", 2015.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from prunestudy.errors import require

Shape = tuple[int, int, int]  # channels, height, width


class _HeInitialised(nn.Module):
    """A net whose convolutions are drawn by He et al.'s rule; its constructor ends with that."""

    def initialise(self) -> None:
        """Draw the convolutions' weights from torch's global generator: normal, by fan-out."""
        for layer in self.modules():
            # On the meta device there is nothing to draw, and trying takes torch seconds.
            if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class VGG16(_HeInitialised):
    """VGG-16 for small images: 13 3x3 convolutions with batch norm, one linear layer.

    Configuration D of Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, in the
    version that pruning papers use on CIFAR. Pooling rounds sizes up, so that images below 32x32
    also fit; features of larger images are averaged.
    """

    def __init__(self, shape: Shape = (3, 32, 32), num_classes: int = 10):
        super().__init__()
        layers, width = [], shape[0]
        for outputs, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += [_conv3x3(width, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
                width = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        return self.fc(self.pool(self.features(x)).flatten(1))


class ResNet(_HeInitialised):
    """ResNet of `depth` 6 n + 2: three stages of n blocks, with 16, 32 and 64 channels.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, but the
    shortcut at a change of width is a 1x1 convolution without batch norm, as in the Force
    Regularization paper (He et al. pad with zeros). Raises `InputError` for another depth.
    """

    def __init__(self, depth: int, shape: Shape = (3, 32, 32), num_classes: int = 10):
        super().__init__()
        require(depth >= 8 and depth % 6 == 2, "depth", depth, "6 n + 2 with n of at least 1")
        self.conv1 = _conv3x3(shape[0], 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = _stage(_Block, 16, 16, depth // 6, 1)
        self.stage2 = _stage(_Block, 16, 32, depth // 6, 2)
        self.stage3 = _stage(_Block, 32, 64, depth // 6, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.pool(x).flatten(1))


class WideResNet(_HeInitialised):
    """Wide ResNet of `depth` 6 n + 4: three stages of n blocks, with `width` times 16, 32 and 64.

    Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, without dropout. Raises
    `InputError` for another depth.
    """

    def __init__(self, depth: int, width: int, shape: Shape = (3, 32, 32), num_classes: int = 10):
        super().__init__()
        require(depth >= 10 and depth % 6 == 4, "depth", depth, "6 n + 4 with n of at least 1")
        require(width >= 1, "width", width, "at least 1")
        self.conv1 = _conv3x3(shape[0], 16)
        self.stage1 = _stage(_PreactivationBlock, 16, 16 * width, depth // 6, 1)
        self.stage2 = _stage(_PreactivationBlock, 16 * width, 32 * width, depth // 6, 2)
        self.stage3 = _stage(_PreactivationBlock, 32 * width, 64 * width, depth // 6, 2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, num_classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        x = self.stage3(self.stage2(self.stage1(self.conv1(x))))
        return self.fc(self.pool(F.relu(self.bn(x))).flatten(1))


class _Block(nn.Module):
    """Basic block of a ResNet: relu(branch(x) + shortcut(x)).

    Maps (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride), sizes rounded up.
    """

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
    """Block of a Wide ResNet: batch norm and ReLU come before each convolution.

    A shortcut that changes the width reads the normalised input. Shapes as in `_Block`.
    """

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


def _stage(block: type, inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    first = block(inputs, outputs, stride)
    return nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(count - 1)))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
