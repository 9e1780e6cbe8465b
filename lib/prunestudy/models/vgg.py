"""VGG-16 for small images, the form that pruning papers use on CIFAR.

Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, configuration D, with a batch
norm after each of the 13 convolutions (so these have no bias) and one linear layer instead of
three.
"""

from torch import Tensor, nn

from prunestudy.models.initialise import HeInitialised

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(HeInitialised):
    """13 convolutions of 3x3 with batch norm and ReLU, five poolings, one linear layer.

    Maps (batch, channels, height, width) to logits (batch, num_classes), for images of any size:
    poolings round up, so that an 8x8 image is 1x1 after three of them and stays so, and what is
    left of images above 32x32 is averaged.
    """

    def __init__(self, shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10):
        super().__init__()
        layers, width = [], shape[0]
        for stage in _STAGES:
            for outputs in stage:
                conv = nn.Conv2d(width, outputs, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
                width = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, channels, height, width)."""
        return self.fc(self.pool(self.features(x)).flatten(1))
