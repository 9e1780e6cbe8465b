"""The nets of a TD-MPC agent: encoder, dynamics, reward, policy and two value functions.

Hansen et al., "Temporal Difference Learning for Model Predictive Control", 2022: hidden 512,
latent 50, ELU; the value functions begin with LayerNorm and Tanh (the authors' public code). Here
only the nets, without the planning around them: they are what is grouped and pruned.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from prunestudy.errors import require


class TDMPC(nn.Module):
    """Five components that share one latent vector.

    Input (batch, observation + action), or any shape of as many numbers, the action last. Output:
    reward (batch, 1), policy (batch, action) at the latent and at the next one, and both values
    (batch, 2) of the next latent under the policy. The policy sees the latent that the encoder
    makes as well as the one that the dynamics make: removing one of its numbers touches them all.
    """

    components: ClassVar[tuple[str, ...]] = ("encoder", "dynamics", "reward", "policy", "value")

    def __init__(self, observation: int = 24, action: int = 6, hidden: int = 512, latent: int = 50):
        super().__init__()
        sizes = {"observation": observation, "action": action, "hidden": hidden, "latent": latent}
        for name, size in sizes.items():
            require(type(size) is int and size > 0, name, size, "a positive integer")
        self.observation = observation
        self.encoder = nn.Sequential(
            nn.Linear(observation, hidden), nn.ELU(), nn.Linear(hidden, latent)
        )
        self.dynamics = _Joint(latent, action, [nn.ELU()], hidden, latent)
        self.reward = _Joint(latent, action, [nn.ELU()], hidden, 1)
        self.policy = nn.Sequential(nn.Linear(latent, hidden), *_rest([nn.ELU()], hidden, action))
        self.value = nn.ModuleList(
            _Joint(latent, action, [nn.LayerNorm(hidden), nn.Tanh()], hidden, 1) for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reward, policy now, policy next, values next: see the class."""
        x = x.flatten(1)
        observation, action = x[:, : self.observation], x[:, self.observation :]
        z = self.encoder(observation)
        after = self.dynamics(z, action)
        now, then = self.policy(z).tanh(), self.policy(after).tanh()
        values = torch.cat([value(after, then) for value in self.value], 1)
        return self.reward(z, action), now, then, values


class _Joint(nn.Module):
    """A net on latent and action: W [z, a] = W_z z + W_a a, so that z can lose columns alone."""

    def __init__(self, latent: int, action: int, between: list, hidden: int, outputs: int):
        super().__init__()
        self.latent = nn.Linear(latent, hidden)
        self.action = nn.Linear(action, hidden, bias=False)
        self.rest = nn.Sequential(*_rest(between, hidden, outputs))

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        return self.rest(self.latent(z) + self.action(action))


def _rest(between: list[nn.Module], hidden: int, outputs: int) -> list[nn.Module]:
    return [*between, nn.Linear(hidden, hidden), nn.ELU(), nn.Linear(hidden, outputs)]
