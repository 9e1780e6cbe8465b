"""A plain net of linear layers: no convolution, no batch norm, nothing to lean on."""

import math

from torch import Tensor, nn

_HIDDEN = (512, 256, 128)


class MLP(nn.Module):
    """Three hidden layers of 512, 256 and 128 units with ReLU, on the flattened image.

    Maps (batch, channels, height, width) of any size to logits (batch, num_classes).
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10):
        super().__init__()
        layers, width = [], math.prod(shape)
        for outputs in _HIDDEN:
            layers += [nn.Linear(width, outputs), nn.ReLU()]
            width = outputs
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        return self.layers(x.flatten(1))
