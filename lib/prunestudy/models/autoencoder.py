"""Autoencoders of small grey images, fully connected and convolutional, with named components.

The components are `encoder` and `decoder`, and `classifier` where there is one on the latent
vector. The paper's own autoencoder is not known; these are ours. All layers take their widths from
their weights, so that channels can be removed. Outputs are pixels, in 0-1 for a trained net.
"""

import itertools
import math
from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from prunestudy.errors import require

Shape = tuple[int, int, int]


class Autoencoder(nn.Module):
    """Fully connected: `hidden` units down to `latent`, and the same back up.

    Maps images (batch, *shape) to images of the same shape; `encode` gives the latent vector
    (batch, latent), which has no nonlinearity. 476,720 parameters on 1x28x28.
    """

    components: ClassVar[tuple[str, ...]] = ("encoder", "decoder")

    def __init__(
        self,
        shape: Shape = (1, 28, 28),
        num_classes: int = 10,  # noqa: ARG002
        hidden: tuple[int, ...] = (256, 128),
        latent: int = 32,
    ):
        super().__init__()
        self.shape = tuple(shape)
        widths = (math.prod(shape), *hidden, latent)
        self.encoder = _linear_stack(widths)
        self.decoder = _linear_stack(widths[::-1])

    def encode(self, x: Tensor) -> Tensor:
        """Latent vectors (batch, latent) of images (batch, *shape)."""
        return self.encoder(x.flatten(1))

    def decode(self, z: Tensor) -> Tensor:
        """Images (batch, *shape) of latent vectors (batch, latent)."""
        return self.decoder(z).unflatten(1, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions (batch, *shape)."""
        return self.decode(self.encode(x))


class ConvAutoencoder(Autoencoder):
    """Convolutional: two strided convolutions and one over what is left, and the same back up.

    A last kernel as large as the map is a linear layer on the flattened map, and keeps the
    removal of channels free of index arithmetic. 117,377 parameters on 1x28x28. Raises
    `InputError` unless height and width are multiples of 4.
    """

    def __init__(
        self,
        shape: Shape = (1, 28, 28),
        num_classes: int = 10,  # noqa: ARG002
        hidden: tuple[int, int] = (16, 32),
        latent: int = 32,
    ):
        nn.Module.__init__(self)
        self.shape = channels, height, width = tuple(shape)
        fits = height % 4 == width % 4 == 0
        require(fits, "shape", shape, "height and width must be multiples of 4")
        whole, (first, second) = (height // 4, width // 4), hidden
        self.encoder = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels, first, 4, stride=2, padding=1),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(first, second, 4, stride=2, padding=1),
                relu2=nn.ReLU(),
                conv3=nn.Conv2d(second, latent, whole),
            )
        )
        self.decoder = nn.Sequential(
            OrderedDict(
                conv1=nn.ConvTranspose2d(latent, second, whole),
                relu1=nn.ReLU(),
                conv2=nn.ConvTranspose2d(second, first, 4, stride=2, padding=1),
                relu2=nn.ReLU(),
                conv3=nn.ConvTranspose2d(first, channels, 4, stride=2, padding=1),
            )
        )

    def encode(self, x: Tensor) -> Tensor:
        """Latent vectors (batch, latent) of images (batch, *shape)."""
        return self.encoder(x).flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        """Images (batch, *shape) of latent vectors (batch, latent)."""
        return self.decoder(z[:, :, None, None])


class _WithClassifier:
    """A classifier with one hidden layer beside the decoder; both read the latent vector."""

    components: ClassVar[tuple[str, ...]] = ("encoder", "decoder", "classifier")

    def __init__(
        self,
        shape: Shape = (1, 28, 28),
        num_classes: int = 10,
        hidden: tuple[int, ...] | None = None,
        latent: int = 32,
        head: int = 64,
    ):
        sizes = {} if hidden is None else {"hidden": hidden}
        super().__init__(shape, num_classes, latent=latent, **sizes)
        self.classifier = _linear_stack((latent, head, num_classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions (batch, *shape) and logits (batch, num_classes)."""
        z = self.encode(x)
        return self.decode(z), self.classifier(z)


class AutoencoderClassifier(_WithClassifier, Autoencoder):
    """`Autoencoder` with a classifier on the latent vector."""


class ConvAutoencoderClassifier(_WithClassifier, ConvAutoencoder):
    """`ConvAutoencoder` with a classifier on the latent vector."""


def _linear_stack(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers fc1, fc2, ... of these widths, ReLU between them."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
        layers[f"fc{number}"] = nn.Linear(inputs, outputs)
        layers[f"relu{number}"] = nn.ReLU()
    layers.popitem()
    return nn.Sequential(layers)
