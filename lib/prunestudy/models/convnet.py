"""Caffe's small net for CIFAR-10, the ConvNet of the Force Regularization paper.

`examples/cifar10/cifar10_full_train_test.prototxt` of Caffe: three convolutions of 5x5, one max and
two average poolings of 3x3 with stride 2, two local response normalisations within channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from prunestudy.errors import require


class WithinChannelNorm(nn.Module):
    """Local response normalisation over a `size` x `size` window of each channel by itself.

    y = x / (1 + alpha * mean of x^2 in the window)^beta, zeros beyond the border included in the
    mean, as Caffe's LRN with norm_region WITHIN_CHANNEL; torch's LocalResponseNorm goes across
    channels instead. Keeps the shape (batch, channels, height, width).
    """

    def __init__(self, size: int = 3, alpha: float = 5e-5, beta: float = 0.75):
        super().__init__()
        require(size % 2 == 1, "size", size, "an odd number of pixels")
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        """Normalised values, in the shape of `x`."""
        mean = F.avg_pool2d(x * x, self.size, stride=1, padding=self.size // 2)
        return x * (1 + self.alpha * mean) ** -self.beta

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"size={self.size}, alpha={self.alpha:g}, beta={self.beta:g}"


class ConvNet(nn.Module):
    """Caffe's cifar10_full: 32, 32 and 64 filters of 5x5, then one linear layer.

    Maps (batch, channels, height, width) to logits (batch, num_classes). Poolings round sizes up,
    as Caffe's do: 32x32 becomes 16x16, 8x8, 4x4. Raises `InputError` below 8x8, where a pooling
    window no longer fits.
    """

    def __init__(self, shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10):
        super().__init__()
        channels, *sides = shape
        require(min(sides) >= 8, "shape", shape, "convnet needs images of at least 8x8")
        height, width = (_halved(side) for side in sides)
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.norm1 = WithinChannelNorm()
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.norm2 = WithinChannelNorm()
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.max_pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.mean_pool = nn.AvgPool2d(3, 2, ceil_mode=True)
        self.fc = nn.Linear(64 * height * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        x = self.norm1(F.relu(self.max_pool(self.conv1(x))))
        x = self.norm2(self.mean_pool(F.relu(self.conv2(x))))
        x = self.mean_pool(F.relu(self.conv3(x)))
        return self.fc(x.flatten(1))


def _halved(side: int, times: int = 3) -> int:
    """`side` after `times` poolings of width 3 and stride 2, sizes rounded up."""
    for _ in range(times):
        side = -(-(side - 3) // 2) + 1
    return side
