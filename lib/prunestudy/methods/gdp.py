r"""GDP: Gates with Differentiable Polarization.

Guo, Yuan, Tan, Wang, Yang, Liu; ICCV 2021, arXiv 2109.02220. A gate before each regular
convolution and linear layer switches the channels that it reads:

    g(t) = t^2 / (t^2 + eps),       g' = 2 t eps / (t^2 + eps)^2,     t = 1 at the start    ([O])

g'(0) = 0: at t = 0 a channel is off for good. g' is largest, 3 sqrt(3) / (8 sqrt(eps)), at
t = sqrt(eps / 3). The gate is scaled into the kernel W that reads the channel, so that exactly

    g dL/dg = <W_c, dL/dW_c>                                                                ([D])

and layers tied by a skip connection share one t ([S]). What a net costs is bilinear in the gates
of neighbouring layers ([S]; see `channels.py`). After each step of the gates' optimiser

    t <- sign(t) max(|t| - lr lambda c, 0),      c = (d cost / dg) / dense cost           ([N], [D])

with the other factor of c held for the step. While -dL/dg > 1.54 lambda c sqrt(eps) a gate can
hold itself near t = (2 eps |dL/dg| / (lambda c))^(1/3); eps shrinks geometrically, so that those
that hold go to g = 1 and the others have fallen to exactly 0: the polarization ([D]).

| paper | code |
|---|---|
| t, g | `Gates.t`, `Gates.forward` |
| eps | `Gates.eps` (a buffer: it is saved, and changes with steps of training only) |
| lambda | `GDP.steering.strength` |
| c | `Channels.shares` |
| FLOPs(g) | `Channels.cost` |

Ours ([O], ablated where the card says so):
- lambda is steered (dual ascent) so that cost(g) falls to the target over `ramp` of the steps; once
  the target is met lambda is 0 and t frozen: where a batch norm follows, the sum of g dL/dg over a
  layer is 0, no gate has a resting point, and all would fall ([D]). The step that meets the target
  closes the smallest gates first, no more than needed.
- Each gate's learning rate is divided by its share c of the dense net (`pace` "equal"): gates
  that nothing holds then fall together, and what decides is benefit per cost. With the same rate
  for all ("by_share"), the expensive channels are gone before a cheap one has moved.
- If the target is not met when eps reaches its floor, one last threshold with the lambda it takes
  closes what is missing; channels closed so are counted in the record.
- One channel stays wherever no skip carries the signal. A frozen gate that would end below 1/2 is
  lifted (counted, too). What is out of reach is said in the record (`target_met`).
"""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from prunestudy.methods.base import Context, Method, Params, Phase, Progress
from prunestudy.methods.channels import Channels, agreement, scale_consumers
from prunestudy.methods.curve import LossCurve
from prunestudy.methods.steering import Steering
from prunestudy.shrink import fold

_BYTES = 800_000  # of the gates' paths in the arrays file


def gate(t: Tensor, eps: Tensor | float) -> Tensor:
    """g(t) = t^2 / (t^2 + eps), elementwise."""
    square = t.square()
    return square / (square + eps)


class Gates(nn.Module):
    """All gates of a net: t (N,), at 1 in the beginning, and eps."""

    def __init__(self, size: int, eps: float, like: Tensor) -> None:
        super().__init__()
        self.t = nn.Parameter(like.new_ones(size))
        self.register_buffer("eps", torch.tensor(eps, dtype=torch.float64, device=like.device))

    def forward(self) -> Tensor:
        """g (N,)."""
        return gate(self.t, self.eps)


class GDPParams(Params):
    """Our readings; shares are of the steps.

    `gate_lr`: the learning rate of t (no momentum, no weight decay); `eps_start`, `eps_end`: eps
    falls geometrically between them over `eps_share`; `ramp`: share in which the cost is to fall
    to the target; `pace`: how the gates' learning rates differ, see above; `groups`: names of the
    dependency groups to gate, with spaces between, all if empty.
    """

    gate_lr: Annotated[float, Field(gt=0)] = 0.05
    eps_start: Annotated[float, Field(gt=0)] = 0.1
    eps_end: Annotated[float, Field(gt=0)] = 1e-4
    eps_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    ramp: Annotated[float, Field(gt=0, le=1)] = 0.3
    pace: Literal["equal", "by_share"] = "equal"
    groups: str = ""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.eps_end > self.eps_start:
            raise ValueError(f"eps_end = {self.eps_end}: at most eps_start, {self.eps_start}")
        return self


class GDP(Method):
    """Gates that polarise to exactly 0 or close to 1, to a target in one run."""

    name: ClassVar[str] = "gdp"
    title: ClassVar[str] = "GDP (ours)"
    target_kinds: ClassVar[tuple[str, ...]] = ("macs", "parameters")
    Params: ClassVar[type[Params]] = GDPParams

    def __init__(self, params: GDPParams, *target: Any) -> None:
        super().__init__(params, *target)
        self.steering = Steering(1 - self.target, params.ramp)
        self.curve = LossCurve()
        self.frozen, self.frozen_at, self.late, self.lifted = False, math.nan, 0, 0
        self.paths: list[tuple[int, Tensor, float, float]] = []
        self.deaths: list[tuple[int, int]] = []
        self.found: dict[str, float] = {}

    def phases(self) -> tuple[Phase, ...]:
        """One phase: gates fall while the weights train, and the weights train on."""
        return (Phase("gates"),)

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Find the dependency groups and scale every kernel that reads gated channels."""
        p = self.params
        self.context = context
        self.channels = Channels(model, context.shape, self.target_kind, p.groups.split())
        self.reach = self.channels.most_removable()
        like = next(model.parameters())
        self.gates = Gates(self.channels.size, p.eps_start, like)
        scale_consumers(model, self.channels, self.gates)
        share = self.channels.shares(torch.ones(self.channels.size))
        pace = share.max() / share if p.pace == "equal" else torch.ones_like(share)
        self.pace = pace.to(like)
        self.first_cost = float(self.channels.cost(self.gates().detach().cpu()))

    def parameter_groups(self, model: nn.Module, phase: str) -> list[nn.Parameter]:  # noqa: ARG002
        """Everything but the gates."""
        return [p for p in model.parameters() if p.requires_grad and p is not self.gates.t]

    def own_optimizer(self, model: nn.Module, phase: str) -> torch.optim.Optimizer:  # noqa: ARG002
        """Plain gradient steps for t: momentum would carry it through zero."""
        return torch.optim.SGD([self.gates.t], lr=self.params.gate_lr)

    def after_backward(self, model: nn.Module, progress: Progress) -> None:  # noqa: ARG002
        """Give each gate its own learning rate."""
        if not self.frozen:
            self.gates.t.grad.mul_(self.pace)

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: Progress, lr: float) -> None:  # noqa: ARG002
        """Soft-threshold t, steer lambda, shrink eps; freeze when the target is met."""
        self._record(progress)
        if not self.frozen:
            share = self.channels.shares(self.gates().cpu()).to(self.pace)
            self._threshold(self.params.gate_lr * self.pace * share, progress)
        self._shrink_eps(progress)

    def finish(self, model: nn.Module) -> nn.Module:
        """Absorb the gates, remove closed channels and emptied blocks; an ordinary smaller net."""
        folded = fold(model)
        small = self.channels.smaller(folded, self.open())
        self.found = agreement(folded, small, self.context)
        return small

    def open(self) -> Tensor:
        """Which channels are open (N,), on the CPU."""
        return (self.gates.t.detach() != 0).cpu()

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of the MACs or parameters that channels with an open gate take."""
        return 1 - self.channels.removed(self.open())

    def row(self, model: nn.Module) -> dict[str, float]:  # noqa: ARG002
        """lambda, eps, channels open, and the cost of the soft gates."""
        return {
            "lambda": 0.0 if self.frozen else self.steering.strength or 0.0,
            "eps": float(self.gates.eps),
            "channels": float(self.open().sum()),
            "soft_cost": 1 - self.channels.removed(self.gates().detach().cpu()),
        }

    def measures(self, model: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        """Whether the target was met and when, how gates ended, what removal changed."""
        g, removed = self.gates().detach(), self.channels.removed(self.open())
        return self.found | {
            "target_met": float(removed >= self.target - 1e-9),
            "removed": removed,
            "most_removable": self.reach,
            "met_at": self.frozen_at,
            "closed_late": float(self.late),
            "lifted": float(self.lifted),
            "smallest_gate": float(g[g > 0].min()),
            "polarised": float(((g == 0) | (g > 0.5)).double().mean()),
            "roughness": self.curve.roughness(),
            "jump": self.curve.jump([step for step, _ in self.deaths]),
            "channels": self.channels.kept(self.open()),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Paths of all gates and of the cost, who closed when, and the training loss."""
        if not self.paths:
            return {}
        steps, paths, soft, hard = zip(*self.paths, strict=True)
        return {
            "gate_steps": np.array(steps, np.int32),
            "gate_paths": torch.stack(paths).numpy(),
            "final_gates": self.gates().detach().cpu().to(torch.float16).numpy(),
            "gate_groups": self.channels.group_of.numpy().astype(np.int16),
            "cost_path": np.array([soft, hard], np.float32),
            "closed": np.array(self.deaths, np.int32).reshape(-1, 2),
            "loss": self.curve.array(),
        }

    def state(self) -> dict[str, Any]:
        """lambda and its error, what is frozen, and the records; t and eps are the model's."""
        kept = ("frozen", "frozen_at", "late", "lifted", "paths", "deaths")
        own = {name: getattr(self, name) for name in kept}
        return own | {"steering": self.steering.state(), "curve": self.curve.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        own = dict(state)
        self.steering.load_state(own.pop("steering"))
        self.curve.load_state(own.pop("curve"))
        vars(self).update(own)
        self.gates.t.requires_grad_(not self.frozen)

    def _threshold(self, falls: Tensor, progress: Progress) -> None:
        """One proximal step; `falls` (N,) is what lambda = 1 takes off each |t|."""
        steps, done = progress.steps, progress.step + 1
        if self.steering.strength is None:
            # With this lambda the fastest gate reaches 0 at the end of the ramp, if nothing holds.
            self.steering.start(1 / (float(falls.max()) * self.params.ramp * steps))
        t, before = self.gates.t, self.open()
        after = torch.sign(t) * (t.abs() - self.steering.strength * falls).clamp(min=0)
        order = self._order(falls)
        falling = order[(before & (after == 0).cpu())[order]]
        kept = self.channels.close(falling, before, self.target)
        if done >= self.params.eps_share * steps:
            now = self.channels.close(order, kept, self.target)
            self.late = int(kept.sum() - now.sum())
            kept = now
        # A gate that had to stay, or was one too many, is not moved by this step.
        t.copy_(torch.where(kept.to(t.device), torch.where(after == 0, t, after), 0.0))
        self.deaths += [(progress.step, int(i)) for i in (before & ~kept).nonzero()]
        met = self.channels.removed(kept) >= min(self.target, self.reach) - 1e-12
        if met or done >= self.params.eps_share * steps:
            self._freeze(progress)
        elif self.steering.due(done):
            self._steer(done, steps)

    def _order(self, falls: Tensor) -> Tensor:
        """Channels by how many steps their gate is from 0."""
        return (self.gates.t.abs() / falls).cpu().argsort(stable=True)

    def _steer(self, done: int, steps: int) -> None:
        hard = 1 - self.channels.removed(self.open())
        soft = float(self.channels.cost(self.gates().cpu())) / self.first_cost
        # Soft gates answer lambda at once; in the end only closed ones count.
        kept = soft if done <= self.params.ramp * steps else hard
        self.steering.update(kept, done, steps)

    def _freeze(self, progress: Progress) -> None:
        """No threshold and no gradient any more; survivors end above one half as eps falls."""
        t, least = self.gates.t, 3 * math.sqrt(self.params.eps_end)
        low = (t != 0) & (t.square() <= self.params.eps_end)
        t.copy_(torch.where(low, torch.copysign(torch.full_like(t, least), t), t))
        self.lifted = int(low.sum())
        self.frozen, self.frozen_at = True, (progress.step + 1) / progress.steps
        t.requires_grad_(False)

    def _shrink_eps(self, progress: Progress) -> None:
        p = self.params
        share = min(1.0, (progress.step + 1) / (p.eps_share * progress.steps))
        self.gates.eps.fill_(p.eps_start * (p.eps_end / p.eps_start) ** share)

    def _record(self, progress: Progress) -> None:
        if not self.curve.values and progress.step == 0:
            self.curve.begin(progress.steps)
        self.curve.add(progress.loss)
        most = max(2, min(200, _BYTES // (2 * self.channels.size)))
        every = -(-progress.steps // most)
        if progress.step % every == 0 or progress.step + 1 == progress.steps:
            g = self.gates().cpu()
            soft = float(self.channels.cost(g)) / self.channels.dense
            hard = 1 - self.channels.removed(self.open())
            self.paths.append((progress.step, g.to(torch.float16), soft, hard))
