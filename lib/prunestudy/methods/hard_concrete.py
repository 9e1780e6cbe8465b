r"""Hard concrete gates on channels: the stochastic control (Louizos, Welling, Kingma; ICLR 2018).

At every step each gate is drawn anew from a stretched and clipped concrete distribution:

    s = sigmoid((log u - log(1 - u) + log alpha) / beta),     u ~ Uniform(0, 1)
    z = min(1, max(0, s (zeta - gamma) + gamma))
    P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta))

with beta = 2/3, gamma = -0.1, zeta = 1.1. At test time z = clip(sigmoid(log alpha) (zeta - gamma)
+ gamma). The penalty is lambda times the expected cost. Gates of different layers are independent,
so that is `Channels.cost` at P(z > 0).

Ours: gates start at sigmoid(log alpha) = 0.9. lambda is steered to the target as for the other
methods. After `harden` of the steps the gates of largest log alpha are kept, at exactly the
target, and the net is fine-tuned. Gates are on the same dependency groups, in the same place, as
those of GDP.
"""

import math

import torch
from torch import Tensor, nn

from prunestudy.methods.base import At, Context, Phase, then_fine_tune
from prunestudy.methods.channels import Channelled, Channels
from prunestudy.methods.scaled import scale_consumers
from prunestudy.methods.steering import Steering
from prunestudy.shrink import folded
from prunestudy.shrink.fold import real_parameters
from prunestudy.values import Part, Positive, Share

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


class _Gates(nn.Module):
    """log alpha (N,) of a net's gates, the noise u of the present step, and what is decided.

    Once `hard`, the gates of `mask` are open and all others closed.
    """

    def __init__(self, size: int, keep: float, like: Tensor) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(like.new_full((size,), math.log(keep / (1 - keep))))
        self.register_buffer("noise", like.new_full((size,), 0.5))
        self.register_buffer("mask", torch.ones(size, dtype=torch.bool, device=like.device))
        self.register_buffer("hard", torch.zeros((), dtype=torch.bool, device=like.device))

    def forward(self) -> Tensor:
        """z (N,): drawn in training until decided, else its value at test time."""
        if not self.training:
            return self.at_test()
        drawn = _stretched((self.noise.logit() + self.log_alpha) / BETA)
        return torch.where(self.hard, self.at_test(), drawn)

    def at_test(self) -> Tensor:
        """z (N,) without a draw; once decided, 0 or at least 0.1."""
        z = _stretched(self.log_alpha)
        return torch.where(self.hard, torch.where(self.mask, z.clamp(min=0.1), 0.0), z)

    def probability(self) -> Tensor:
        return torch.sigmoid(self.log_alpha - BETA * math.log(-GAMMA / ZETA))

    def draw(self, generator: torch.Generator) -> None:
        tiny = torch.finfo(self.noise.dtype).eps
        self.noise.uniform_(generator=generator).clamp_(tiny, 1 - tiny)


def _stretched(logit: Tensor) -> Tensor:
    return (torch.sigmoid(logit) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class HardConcrete(Channelled):
    """Stochastic channel gates, to a target, then fine-tuning of what is left.

    `keep`: sigmoid(log alpha) at the start; `gate_lr` of Adam; `ramp`, `harden`, `gate_phase_lr`:
    as for `SparseGates`, of the expected cost.
    """

    name, title = "hard_concrete", "hard concrete gates"
    keep: Part = 0.9
    gate_lr: Positive = 0.02
    ramp: Share = 0.8
    harden: Part = 0.5
    gate_phase_lr: Positive = 1.0

    def phases(self) -> tuple[Phase, ...]:
        """Gates and weights together, then the kept channels alone."""
        return then_fine_tune("gates", self.harden, self.gate_phase_lr)

    def attach(self, model: nn.Module, context: Context) -> None:
        """Put gates on every kernel that consumes channels that may go; the first draw."""
        self.generator = context.generator
        self.channels = Channels(model, context.example, self.of, leave=self.leave)
        like = real_parameters(model)[0]
        self.gates = _Gates(self.channels.size, self.keep, like)
        scale_consumers(model, self.channels, self.gates)
        self.first_cost = self._expected_cost()
        self.steering = Steering(1 - self.target, self.ramp).to(like.device)
        self._pull()  # takes the cost's tables to the device
        self.gates.draw(self.generator)

    def optimizer(self) -> torch.optim.Optimizer | None:
        """Adam for log alpha until the gates are decided, as in the paper; no weight decay."""
        if self.gates.hard:
            self.gates.log_alpha.requires_grad_(False)
            return None
        return torch.optim.Adam([self.gates.log_alpha], lr=self.gate_lr, betas=(0.9, 0.99))

    def after_backward(self, at: At) -> None:
        """Add the gradient of lambda times the expected cost, over the dense cost."""
        if at.phase == "gates" and self.gates.log_alpha.grad is not None:
            gradient, pull = self.gates.log_alpha.grad, self._pull()
            self.steering.start(0.1 * (gradient.abs().mean() / pull.mean()).double())
            gradient.addcmul_(pull, self.steering.strength.to(pull))

    @torch.no_grad()
    def after_step(self, at: At) -> None:
        """Draw for the next step."""
        if at.phase == "gates":
            self.gates.draw(self.generator)

    @torch.no_grad()
    def update(self, at: At) -> None:
        """Steer lambda; decide the gates at the end of their phase."""
        if at.phase == "gates":
            self.steering.update(lambda: self._expected_cost() / self.first_cost, at)
            if at.last:
                self._decide()

    def finish(self, model: nn.Module, context: Context) -> nn.Module:
        """Absorb the gates and remove closed channels; an ordinary smaller net."""
        if not self.gates.hard:
            self._decide()
        return self.channels.smaller(folded(model, context.example), self.open())

    def open(self) -> Tensor:
        """Which channels are open at test time (N,), on the CPU."""
        return (self.gates.at_test().detach() != 0).cpu()

    def log(self) -> dict[str, float]:
        """Share left with the channels open at test time, lambda, and the expected cost."""
        return super().log() | {
            "lambda": float(self.steering.strength.nan_to_num()),
            "expected_cost": self._expected_cost() / self.channels.dense,
        }

    def _expected_cost(self) -> float:
        return float(self.channels.cost(self.gates.probability().detach().cpu()))

    def _pull(self) -> Tensor:
        """d cost(P) / d log alpha, over the dense cost."""
        p = self.gates.probability().detach()
        return self.channels.shares(p).to(p) * p * (1 - p)

    def _decide(self) -> None:
        """Keep the gates of largest log alpha, at the target."""
        order = self.gates.log_alpha.detach().cpu().argsort(stable=True)
        everything = torch.ones(self.channels.size, dtype=torch.bool)
        self.gates.mask.copy_(self.channels.close(order, everything, self.target))
        self.gates.hard.fill_(True)
