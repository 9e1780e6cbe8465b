"""The two LeNets of the pruning literature.

LeCun et al., "Gradient-based learning applied to document recognition", 1998, in the form of
Caffe's example `lenet_train_test.prototxt`, which papers since Han et al. (2015) compress.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from prunestudy.errors import require


class LeNet5(nn.Module):
    """Caffe's LeNet-5: 20 and 50 filters of 5x5, each with max-pooling, then 500 hidden units.

    Maps (batch, channels, height, width) to logits (batch, num_classes). As in Caffe there is no
    ReLU after the convolutions. Raises `InputError` below 16x16, where the second pooling has
    nothing left.
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
    """LeNet-300-100: two hidden layers with ReLU on the flattened image, of any size.

    Maps (batch, channels, height, width) to logits (batch, num_classes).
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
