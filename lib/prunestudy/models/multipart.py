"""Nets of several components, their children, around one latent vector.

Layers take their sizes from their weights, so that channels can be removed.
"""

import math

import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.models.small import Shape, linear_layers, numbered


class Autoencoder(nn.Module):
    """Autoencoder of small images; the component-aware paper does not specify its own.

    Fully connected with `hidden` (256, 128) units, or `convolutional` with `hidden` (16, 32)
    channels; the decoder mirrors the encoder, and the latent vector is linear. With `head` > 0 a
    classifier with that many hidden units reads the latent vector. Maps images (batch, *shape) to
    reconstructions (batch, *shape), and with a classifier also to logits (batch, num_classes).
    Raises `InputError` if `convolutional` and height or width is no multiple of 4.
    """

    def __init__(
        self,
        shape: Shape = (1, 28, 28),
        num_classes: int = 10,
        hidden: tuple[int, ...] = (),
        latent: int = 32,
        head: int = 0,
        convolutional: bool = False,
    ):
        super().__init__()
        self.shape, self.convolutional = tuple(shape), convolutional
        if convolutional:
            channels, *sides = shape
            fits = all(side % 4 == 0 for side in sides)
            require(fits, "shape", shape, "height and width must be multiples of 4")
            first, second = hidden or (16, 32)
            # A kernel as large as the map is a linear layer whose input channels can be removed.
            whole, half = [side // 4 for side in sides], {"stride": 2, "padding": 1}
            down = [nn.Conv2d(channels, first, 4, **half), nn.Conv2d(first, second, 4, **half)]
            self.encoder = numbered("conv", *down, nn.Conv2d(second, latent, whole))
            up = [nn.ConvTranspose2d(latent, second, whole)]
            up += [nn.ConvTranspose2d(second, first, 4, **half)]
            self.decoder = numbered("conv", *up, nn.ConvTranspose2d(first, channels, 4, **half))
        else:
            widths = (math.prod(shape), *(hidden or (256, 128)), latent)
            self.encoder, self.decoder = linear_layers(*widths), linear_layers(*widths[::-1])
        self.classifier = linear_layers(latent, head, num_classes) if head else None

    def encode(self, x: Tensor) -> Tensor:
        """Latent vectors (batch, latent) of images (batch, *shape)."""
        return self.encoder(x).flatten(1) if self.convolutional else self.encoder(x.flatten(1))

    def decode(self, z: Tensor) -> Tensor:
        """Images (batch, *shape) of latent vectors (batch, latent)."""
        if self.convolutional:
            return self.decoder(z[:, :, None, None])
        return self.decoder(z).unflatten(1, self.shape)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Reconstructions (batch, *shape); with a classifier (reconstructions, logits)."""
        z = self.encode(x)
        return self.decode(z) if self.classifier is None else (self.decode(z), self.classifier(z))


class TDMPC(nn.Module):
    """The nets of a TD-MPC agent: encoder, dynamics, reward, policy and two value functions.

    Hansen et al., "Temporal Difference Learning for Model Predictive Control", ICML 2022: ELU,
    value functions with LayerNorm and tanh (as in the authors' code); the planner is left out.
    Input (batch, observation + action), the action last. Output: reward (batch, 1), policy
    (batch, action) at the current and at the next latent, and both values (batch, 2) of the next
    latent under the policy. The policy reads latents from the encoder and from the dynamics, so
    that removing a latent dimension touches every component.
    """

    def __init__(self, observation: int = 24, action: int = 6, hidden: int = 512, latent: int = 50):
        super().__init__()
        self.observation = observation
        first, last = nn.Linear(observation, hidden), nn.Linear(hidden, latent)
        self.encoder = nn.Sequential(first, nn.ELU(), last)
        self.dynamics = _Joint(latent, action, hidden, latent)
        self.reward = _Joint(latent, action, hidden, 1)
        self.policy = nn.Sequential(nn.Linear(latent, hidden), nn.ELU(), *_rest(hidden, action))
        self.value = nn.ModuleList(_Joint(latent, action, hidden, 1, norm=True) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reward, policy now, policy next, values next; shapes as in the class docstring."""
        x = x.flatten(1)
        observation, action = x[:, : self.observation], x[:, self.observation :]
        z = self.encoder(observation)
        after = self.dynamics(z, action)
        now, then = self.policy(z).tanh(), self.policy(after).tanh()
        values = torch.cat([value(after, then) for value in self.value], 1)
        return self.reward(z, action), now, then, values


class _Joint(nn.Module):
    """MLP on latent z and action a, W_z z + W_a a first: columns of W_z can be removed with z."""

    def __init__(self, latent: int, action: int, hidden: int, outputs: int, norm: bool = False):
        super().__init__()
        self.latent = nn.Linear(latent, hidden)
        self.action = nn.Linear(action, hidden, bias=False)
        first = [nn.LayerNorm(hidden), nn.Tanh()] if norm else [nn.ELU()]
        self.rest = nn.Sequential(*first, *_rest(hidden, outputs))

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        return self.rest(self.latent(z) + self.action(action))


def _rest(hidden: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(hidden, hidden), nn.ELU(), nn.Linear(hidden, outputs)]
