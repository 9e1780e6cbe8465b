r"""Hard concrete gates on channels: the stochastic control (Louizos, Welling, Kingma; ICLR 2018).

A gate is drawn anew at every step from a stretched and clipped concrete distribution:

    s = sigmoid((log u - log(1 - u) + log alpha) / beta),     u ~ Uniform(0, 1)
    z = min(1, max(0, s (zeta - gamma) + gamma))
    P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta))

with beta = 2/3, gamma = -0.1, zeta = 1.1. At test time z = clip(sigmoid(log alpha) (zeta - gamma)
+ gamma). The penalty is lambda times the expected cost: gates of different layers are independent,
so it is `Channels.cost` at P(z > 0).

Ours: gates start at sigmoid(log alpha) = 0.9; lambda is steered to the target as for the other
methods; after `harden` of the steps the gates of largest log alpha are kept, at exactly the
target, and what is left is fine-tuned. Gates sit on the same dependency groups, in the same place,
as those of GDP.
"""

import math
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.methods.base import Context, Method, Params, Phase, Progress
from prunestudy.methods.channels import Channels, agreement, scale_consumers
from prunestudy.methods.curve import LossCurve
from prunestudy.methods.steering import Steering
from prunestudy.shrink import fold

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


class ConcreteGates(nn.Module):
    """log alpha (N,) of a net's gates, the noise of the present step, and who is open."""

    def __init__(self, size: int, keep: float, like: Tensor) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(like.new_full((size,), math.log(keep / (1 - keep))))
        self.register_buffer("noise", like.new_full((size,), 0.5))
        self.register_buffer("mask", torch.ones(size, dtype=torch.bool, device=like.device))
        self.hard = False

    def forward(self) -> Tensor:
        """z (N,): drawn in training until hardened, else its value at test time."""
        if self.hard or not self.training:
            return self.at_test()
        return _stretched((self.noise.logit() + self.log_alpha) / BETA)

    def at_test(self) -> Tensor:
        """z (N,) without a draw; once hardened, 0 or at least 0.1."""
        z = _stretched(self.log_alpha)
        return torch.where(self.mask, z.clamp(min=0.1), 0.0) if self.hard else z

    def probability(self) -> Tensor:
        """P(z > 0), (N,)."""
        return torch.sigmoid(self.log_alpha - BETA * math.log(-GAMMA / ZETA))


def _stretched(logit: Tensor) -> Tensor:
    return (torch.sigmoid(logit) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class HardConcreteParams(Params):
    """`keep`: sigmoid(log alpha) at the start; `gate_lr` of Adam; `ramp`: share of the gate phase
    in which the expected cost falls to the target; `harden`: share of all steps after which
    gates are decided; `gate_phase_lr`: weights' learning rate until then, times the recipe's.
    """

    keep: Annotated[float, Field(gt=0, lt=1)] = 0.9
    gate_lr: Annotated[float, Field(gt=0)] = 0.02
    ramp: Annotated[float, Field(gt=0, le=1)] = 0.8
    harden: Annotated[float, Field(gt=0, lt=1)] = 0.5
    gate_phase_lr: Annotated[float, Field(gt=0)] = 1.0


class HardConcrete(Method):
    """Stochastic channel gates, to a target, then fine-tuning of what is left."""

    name: ClassVar[str] = "hard_concrete"
    title: ClassVar[str] = "hard concrete gates"
    target_kinds: ClassVar[tuple[str, ...]] = ("macs", "parameters")
    Params: ClassVar[type[Params]] = HardConcreteParams

    def __init__(self, params: HardConcreteParams, *target: Any) -> None:
        super().__init__(params, *target)
        self.steering, self.curve = Steering(1 - self.target, params.ramp), LossCurve()
        self.found: dict[str, float] = {}
        self.paths: list[Tensor] = []

    def phases(self) -> tuple[Phase, ...]:
        """Gates and weights together, then the kept channels alone."""
        p = self.params
        gates = Phase("gates", p.harden, lr_scale=p.gate_phase_lr, schedule="constant")
        return gates, Phase("fine_tune", 1 - p.harden, restart=True)

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:  # noqa: ARG002
        """Keep the generator of all draws."""
        self.generator = generator

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Put gates on every kernel that reads channels that may go."""
        self.context = context
        self.channels = Channels(model, context.shape, self.target_kind)
        like = next(model.parameters())
        self.gates = ConcreteGates(self.channels.size, self.params.keep, like)
        scale_consumers(model, self.channels, self.gates)
        self.first_cost = float(self.channels.cost(self.gates.probability().detach().cpu()))

    def start(self, model: nn.Module, phase: str) -> None:  # noqa: ARG002
        """Draw for the first step."""
        if phase == "gates":
            self._draw()

    def parameter_groups(self, model: nn.Module, phase: str) -> list[nn.Parameter]:  # noqa: ARG002
        """Everything but the gates."""
        return [p for p in model.parameters() if p.requires_grad and p is not self.gates.log_alpha]

    def own_optimizer(self, model: nn.Module, phase: str) -> torch.optim.Optimizer | None:  # noqa: ARG002
        """Adam for log alpha, as in the paper; no weight decay."""
        if phase != "gates":
            return None
        return torch.optim.Adam([self.gates.log_alpha], lr=self.params.gate_lr, betas=(0.9, 0.99))

    def after_backward(self, model: nn.Module, progress: Progress) -> None:  # noqa: ARG002
        """Add the gradient of lambda times the expected cost."""
        if progress.phase != "gates":
            return
        gradient, pull = self.gates.log_alpha.grad, self._pull()
        if self.steering.strength is None:
            self.steering.start(0.1 * float(gradient.abs().mean() / pull.mean()))
        gradient.add_(pull, alpha=self.steering.strength)

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: Progress, lr: float) -> None:  # noqa: ARG002
        """Steer lambda; draw for the next step."""
        if progress.total_step == 0:
            self.curve.begin(progress.total_steps)
        self.curve.add(progress.loss)
        done = progress.step + 1
        if progress.phase == "gates":
            if self.steering.due(done):
                expected = float(self.channels.cost(self.gates.probability().cpu()))
                self.steering.update(expected / self.first_cost, done, progress.steps)
            self._draw()

    def end(self, model: nn.Module, phase: str) -> None:
        """Decide the gates at the end of their phase."""
        if phase == "gates":
            self._harden(model)

    def finish(self, model: nn.Module) -> nn.Module:
        """Absorb the gates and remove what is closed; an ordinary smaller net."""
        if not self.gates.hard:
            self._harden(model)
        folded = fold(model)
        small = self.channels.smaller(folded, self._open())
        self.found["removal_gap"] = agreement(folded, small, self.context)["removal_gap"]
        return small

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of the MACs or parameters that the gates open at test time take."""
        return 1 - self.channels.removed(self._open())

    def row(self, model: nn.Module) -> dict[str, float]:  # noqa: ARG002
        """lambda, and the expected cost; keeps the gates for the arrays file."""
        self.paths.append(self.gates.at_test().detach().cpu().to(torch.float16))
        expected = float(self.channels.cost(self.gates.probability().detach().cpu()))
        return {
            "lambda": self.steering.strength or 0.0,
            "expected_cost": expected / self.channels.dense,
        }

    def measures(self, model: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        """Whether the target was met, how gates were before they were decided, how it trained."""
        removed = self.channels.removed(self._open())
        return self.found | {
            "target_met": float(removed >= self.target - 1e-9),
            "removed": removed,
            "roughness": self.curve.roughness(),
            "channels": self.channels.kept(self._open()),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Gates at test time by epoch, and the training loss."""
        paths = {"gate_paths": torch.stack(self.paths).numpy()} if self.paths else {}
        return paths | {"loss": self.curve.array()}

    def state(self) -> dict[str, Any]:
        """lambda, records; log alpha, noise and mask are the model's."""
        own = {"found": self.found, "paths": self.paths, "hard": self.gates.hard}
        return own | {"steering": self.steering.state(), "curve": self.curve.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        own = dict(state)
        self.steering.load_state(own.pop("steering"))
        self.curve.load_state(own.pop("curve"))
        self.gates.hard = own.pop("hard")
        self.gates.log_alpha.requires_grad_(not self.gates.hard)
        vars(self).update(own)

    def _pull(self) -> Tensor:
        """d cost(P) / d log alpha, over the dense cost."""
        p = self.gates.probability().detach()
        return self.channels.shares(p.cpu()).to(p) * p * (1 - p)

    def _draw(self) -> None:
        tiny = torch.finfo(self.gates.noise.dtype).eps
        self.gates.noise.uniform_(generator=self.generator).clamp_(tiny, 1 - tiny)

    def _open(self) -> Tensor:
        """Which channels are open at test time (N,), on the CPU."""
        return (self.gates.at_test().detach() > 0).cpu()

    def _harden(self, model: nn.Module) -> None:
        """Keep the gates of largest log alpha, at the target; note what that changes."""
        before, z = fold(model), self.gates.at_test().detach()
        self.found["polarised"] = float(((z == 0) | (z > 0.5)).double().mean())
        order = self.gates.log_alpha.detach().cpu().argsort(stable=True)
        everything = torch.ones(self.channels.size, dtype=torch.bool)
        self.gates.mask.copy_(self.channels.close(order, everything, self.target))
        self.gates.hard = True
        self.gates.log_alpha.requires_grad_(False)
        self.found["unchanged"] = agreement(before, fold(model), self.context)["unchanged"]
