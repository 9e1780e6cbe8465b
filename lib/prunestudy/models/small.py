"""Small nets without skip connections: LeNet-5, LeNet-300-100, an MLP and Caffe's ConvNet."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from prunestudy.errors import require


class LeNet5(nn.Module):
    """Caffe's LeNet-5: two 5x5 convolutions (20, 50) with max pooling, then 500 hidden units.

    LeCun et al., "Gradient-based learning applied to document recognition", 1998, in the version
    of Caffe's `lenet_train_test.prototxt` that papers since Han et al. (2015) compress: no ReLU
    after the convolutions. Maps (batch, channels, height, width) to logits (batch, num_classes).
    Raises `InputError` for images below 16x16.
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10):
        super().__init__()
        channels, *sides = shape
        require(min(sides) >= 16, "shape", shape, "lenet5 needs images of at least 16x16")
        height, width = (((side - 4) // 2 - 4) // 2 for side in sides)
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * height * width, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        x = self.pool(self.conv1(x))
        x = self.pool(self.conv2(x))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class LeNet300(nn.Module):
    """LeNet-300-100 (LeCun et al., 1998): two hidden ReLU layers on the flattened image.

    Maps (batch, channels, height, width), of any size, to logits (batch, num_classes).
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10):
        super().__init__()
        self.fc1 = nn.Linear(math.prod(shape), 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class MLP(nn.Module):
    """Three hidden ReLU layers of 512, 256 and 128 units on the flattened image.

    Maps (batch, channels, height, width), of any size, to logits (batch, num_classes).
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(math.prod(shape), 512), nn.ReLU()),
            *(nn.Linear(512, 256), nn.ReLU()),
            *(nn.Linear(256, 128), nn.ReLU()),
            nn.Linear(128, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        return self.layers(x.flatten(1))


class ConvNet(nn.Module):
    """Caffe's cifar10_full, the ConvNet of the Force Regularization paper.

    From `cifar10_full_train_test.prototxt`: 5x5 convolutions with 32, 32 and 64 filters, each
    followed by 3x3 pooling of stride 2 (max, mean, mean), the first two also by local response
    normalisation; then one linear layer. Maps (batch, channels, height, width) to logits
    (batch, num_classes). Pooling rounds sizes up, as in Caffe: 32, 16, 8, 4. Raises `InputError`
    for images below 8x8.
    """

    def __init__(self, shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10):
        super().__init__()
        channels, *sides = shape
        require(min(sides) >= 8, "shape", shape, "convnet needs images of at least 8x8")
        for _ in range(3):
            sides = [math.ceil((side - 3) / 2) + 1 for side in sides]
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.norm1 = _WithinChannelNorm()
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.norm2 = _WithinChannelNorm()
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.max_pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.mean_pool = nn.AvgPool2d(3, 2, ceil_mode=True)
        self.fc = nn.Linear(64 * math.prod(sides), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        x = self.norm1(F.relu(self.max_pool(self.conv1(x))))
        x = self.norm2(self.mean_pool(F.relu(self.conv2(x))))
        x = self.mean_pool(F.relu(self.conv3(x)))
        return self.fc(x.flatten(1))


class _WithinChannelNorm(nn.Module):
    """Local response normalisation within each channel, Caffe's WITHIN_CHANNEL with its defaults.

    y = x / (1 + 5e-5 m)^0.75, where m is the mean of x^2 over a 3x3 window padded with zeros.
    (torch's LocalResponseNorm works across channels.) Shape (batch, channels, height, width).
    """

    alpha, beta = 5e-5, 0.75

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool2d(x * x, 3, stride=1, padding=1)
        return x * (1 + self.alpha * mean) ** -self.beta
