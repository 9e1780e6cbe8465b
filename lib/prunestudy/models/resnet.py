"""The residual nets for small images.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2: depth
6 n + 2, stages of 16, 32 and 64 channels. Where a stage changes the width, the shortcut is a 1x1
convolution without batch norm and without bias, as in the Force Regularization paper's recipe
(He et al. pad with zeros there). Weights start as in He et al., 2015.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.models.initialise import HeInitialised

_WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut: relu(branch(x) + shortcut(x)).

    Maps (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride), sides rounded up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; see the class."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(HeInitialised):
    """A residual net of `depth` = 6 n + 2 layers, for images of any size.

    Maps (batch, channels, height, width) to logits (batch, num_classes). Raises `InputError` for
    another depth.
    """

    def __init__(
        self, depth: int, shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10
    ):
        super().__init__()
        require(depth >= 8 and depth % 6 == 2, "depth", depth, "6 n + 2 with n of at least 1")
        self.conv1 = nn.Conv2d(shape[0], _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        count, width = (depth - 2) // 6, _WIDTHS[0]
        for stage, outputs in enumerate(_WIDTHS, 1):
            blocks = [Block(width, outputs, 1 if outputs == width else 2)]
            blocks += [Block(outputs, outputs, 1) for _ in range(count - 1)]
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
            width = outputs
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.pool(x).flatten(1))
