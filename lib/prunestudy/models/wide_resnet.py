"""Wide residual nets for small images.

Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016: depth 6 n + 4, stages of 16 k, 32 k and
64 k channels, batch norm and ReLU ahead of each convolution. Where a block changes the width its
shortcut is a 1x1 convolution of the same normalised input. No dropout.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.models.initialise import HeInitialised

_WIDTHS = (16, 32, 64)


class WideBlock(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice, beside a shortcut.

    Maps (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride), sides rounded up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; see the class."""
        normal = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(normal))))
        return y + (x if self.shortcut is None else self.shortcut(normal))


class WideResNet(HeInitialised):
    """A wide residual net of `depth` = 6 n + 4 layers, `width` times as wide as a ResNet.

    Maps (batch, channels, height, width) to logits (batch, num_classes). Raises `InputError` for
    another depth.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        shape: tuple[int, int, int] = (3, 32, 32),
        num_classes: int = 10,
    ):
        super().__init__()
        require(depth >= 10 and depth % 6 == 4, "depth", depth, "6 n + 4 with n of at least 1")
        require(width >= 1, "width", width, "at least 1")
        self.conv1 = nn.Conv2d(shape[0], _WIDTHS[0], 3, padding=1, bias=False)
        inputs = _WIDTHS[0]
        for stage, channels in enumerate(_WIDTHS, 1):
            outputs = width * channels
            blocks = [WideBlock(inputs, outputs, 1 if stage == 1 else 2)]
            blocks += [WideBlock(outputs, outputs, 1) for _ in range((depth - 4) // 6 - 1)]
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
            inputs = outputs
        self.bn = nn.BatchNorm2d(inputs)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        x = self.stage3(self.stage2(self.stage1(self.conv1(x))))
        return self.fc(self.pool(F.relu(self.bn(x))).flatten(1))
