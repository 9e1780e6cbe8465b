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

    Input (batch, observation + action) or any shape with as many numbers, the action last; output
    is reward (batch, 1), policy (batch, action) at the latent and at the next one, and both values
    (batch, 2) of the next latent under the policy. Policy and value see the latent that the encoder
    makes as well as the one that the dynamics make: removing one of its numbers touches them all.
    """

    components: ClassVar[tuple[str, ...]] = ("encoder", "dynamics", "reward", "policy", "value")

    def __init__(self, observation: int = 24, action: int = 6, hidden: int = 512, latent: int = 50):
        super().__init__()
        sizes = {"observation": observation, "action": action, "hidden": hidden, "latent": latent}
        for name, size in sizes.items():
            require(type(size) is int and size > 0, name, size, "a positive integer")
        self.observation, both = observation, latent + action
        self.encoder = nn.Sequential(
            nn.Linear(observation, hidden), nn.ELU(), nn.Linear(hidden, latent)
        )
        self.dynamics = _mlp(both, hidden, latent)
        self.reward = _mlp(both, hidden, 1)
        self.policy = _mlp(latent, hidden, action)
        self.value = nn.ModuleList(_value(both, hidden) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reward, policy now, policy next, values next: see the class."""
        x = x.flatten(1)
        observation, action = x[:, : self.observation], x[:, self.observation :]
        z = self.encoder(observation)
        state = torch.cat([z, action], 1)
        after = self.dynamics(state)
        now, then = self.policy(z).tanh(), self.policy(after).tanh()
        judged = torch.cat([after, then], 1)
        values = torch.cat([value(judged) for value in self.value], 1)
        return self.reward(state), now, then, values


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ELU(),
        nn.Linear(hidden, hidden),
        nn.ELU(),
        nn.Linear(hidden, outputs),
    )


def _value(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.LayerNorm(hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.ELU(),
        nn.Linear(hidden, 1),
    )
