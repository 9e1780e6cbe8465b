r"""GDP: Gates with Differentiable Polarization.

Guo, Yuan, Tan, Wang, Yang, Liu; ICCV 2021, arXiv 2109.02220. A gate in front of each regular
convolution and linear layer switches the channels that the layer consumes:

    g(t) = t^2 / (t^2 + eps),       g' = 2 t eps / (t^2 + eps)^2,     t = 1 at the start    ([O])

g'(0) = 0: at t = 0 a channel is off for good. g' is largest, 3 sqrt(3) / (8 sqrt(eps)), at
t = sqrt(eps / 3). The gate scales the kernel W that consumes the channel, so that exactly

    g dL/dg = <W_c, dL/dW_c>                                                                ([D])

and layers tied by a skip connection share one t ([S]). The cost of a net is bilinear in the gates
of neighbouring layers ([S]; see `channels.py`). After each step of the gates' optimiser

    t <- sign(t) max(|t| - lr lambda c, 0),      c = (d cost / dg) / dense cost           ([N], [D])

with the other factor of c held fixed. While -dL/dg > 1.54 lambda c sqrt(eps) a gate can hold
itself near t = (2 eps |dL/dg| / (lambda c))^(1/3). eps shrinks geometrically, so that gates that
hold go to g = 1 while the others have fallen to exactly 0: the polarization ([D]).

| paper | code |
|---|---|
| t, g | `_Gates.t`, `_Gates.forward` |
| eps | `_Gates.eps` |
| lambda | `GDP.steering.strength` |
| c | `Channels.shares` |
| FLOPs(g) | `Channels.cost` |

Ours ([O], ablated where the card says so):
- lambda is steered (dual ascent) so that cost(g) falls to the target over `ramp` of the steps,
  after it the cost of the open channels. Once enough have closed, lambda is 0 and t is frozen:
  before a batch norm the sum of g dL/dg over a layer is 0, no gate has a resting point, and all
  would fall ([D]). The step that meets the target closes the smallest gates first, and no more than
  needed.
- g' is largest at g = 1/4, and below that no gate can hold itself. As soon as the gates below 1/4
  are enough for the target, they alone feel the threshold, the smallest first and no more than
  needed, and lambda grows until they have closed; the others are free and rise (`steer` "decided").
- t follows a running mean of its gradients (`average`), and no gate moves by more than `bound` in
  one step, or 4 / (steps of the ramp) in a short training; 0 for neither.
- Each gate's learning rate is divided by its share c of the dense net (`pace` "equal"), so that
  benefit per cost decides. With one rate for all ("by_share") the expensive channels are gone
  before a cheap one has moved.
- If the target is not met when eps reaches its floor, the channels nearest to closing go as well
  (`closed_late`).
- An earlier way is kept for comparison: `steer` "closed" leaves all gates under the threshold to
  the end, and lifts those that would end below 1/2 (`lifted`).
- One channel stays wherever no skip carries the signal, even if the target is then out of reach.

A gate that reaches 0 between two updates keeps its value, without gradient, until the next.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.methods.base import At, Context, scalar
from prunestudy.methods.channels import Channelled, Channels
from prunestudy.methods.polarity import Polarity
from prunestudy.methods.scaled import scale_consumers
from prunestudy.methods.steering import Steering
from prunestudy.shrink import folded
from prunestudy.shrink.fold import real_parameters
from prunestudy.values import Positive, Share

_GROWTH = 1.02  # of lambda, an update, for gates that are to close


def gate(t: Tensor, eps: Tensor | float) -> Tensor:
    """g(t) = t^2 / (t^2 + eps), elementwise."""
    square = t.square()
    return square / (square + eps)


class _Gates(nn.Module):
    """All gates of a net: t (N,), at 1 in the beginning, and eps."""

    def __init__(self, size: int, eps: float, like: Tensor) -> None:
        super().__init__()
        self.t = nn.Parameter(like.new_ones(size))
        self.register_buffer("eps", scalar(eps, like.device))

    def forward(self) -> Tensor:
        return gate(self.t, self.eps)


class GDP(Channelled):
    """Gates that polarise to exactly 0 or close to 1, to a target in one run.

    `gate_lr`: the learning rate of t; `eps_start`, `eps_end`: eps falls geometrically between them
    over `eps_share` of the steps; `average`: share of the running mean of the gradients that a step
    keeps; `bound`: the largest move of a gate in one step; `ramp`, `steer`, `pace`: see above;
    `groups`: names of the dependency groups to gate, separated by spaces, all if empty.
    """

    name, title, part = "gdp", "GDP (ours)", "gates"
    unnamed: ClassVar[dict[str, Any]] = {"average": 0.0, "bound": 0.0, "steer": "closed"}
    gate_lr: Positive = 0.05
    eps_start: Positive = 0.1
    eps_end: Positive = 1e-4
    eps_share: Share = 0.5
    average: Annotated[float, Field(ge=0, lt=1)] = 0.9
    ramp: Share = 0.3
    steer: Literal["decided", "closed"] = "decided"
    pace: Literal["equal", "by_share"] = "equal"
    groups: str = ""
    bound: Annotated[float, Field(ge=0, lt=1)] = 0.09

    def __init__(self, target: float | None = None, of: str | None = None, **settings: Any) -> None:
        super().__init__(target, of, **settings)
        falls = self.eps_end <= self.eps_start
        require(falls, "eps_end", self.eps_end, f"at most eps_start, {self.eps_start}")

    def attach(self, model: nn.Module, context: Context) -> None:
        """Find the dependency groups and scale every kernel that consumes gated channels."""
        only = self.groups.split()
        self.channels = Channels(model, context.example, self.of, only, leave=self.leave)
        self.reach = self.channels.most_removable()
        size, like = self.channels.size, real_parameters(model)[0]
        self.gates = _Gates(size, self.eps_start, like)
        scale_consumers(model, self.channels, self.gates)
        self.first_cost = self._soft_cost()
        self.steering = Steering(1 - self.target, self.ramp).to(like.device)
        share = self.channels.shares(like.new_ones(size))
        rate = share.max() / share if self.pace == "equal" else torch.ones_like(share)
        # If no step is made, channels are closed by their index in the group.
        place = torch.cat([torch.arange(g.channels) / g.channels for g in self.channels.groups])
        self.polarity = Polarity(self.gates())
        self.register_buffer("rate", rate.to(like))
        self.register_buffer("steps_left", place.to(like))
        self.register_buffer("mean_gradient", torch.zeros_like(self.gates.t))
        self.register_buffer("before", self.gates.t.detach().clone())
        self.register_buffer("falling", torch.ones_like(share, dtype=torch.bool))
        self.register_buffer("reached", torch.zeros_like(share, dtype=torch.bool))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool, device=like.device))
        for name, value in {"met_at": math.nan, "closed_late": 0.0, "lifted": 0.0}.items():
            self.register_buffer(name, scalar(value, like.device))

    def optimizer(self) -> torch.optim.Optimizer:
        """Plain gradient steps for t: momentum would carry it through zero."""
        self.gates.t.requires_grad_(not self.frozen)  # a resumed run asks here, too
        return torch.optim.SGD([self.gates.t], lr=self.gate_lr)

    def after_backward(self, at: At) -> None:  # noqa: ARG002
        """Give each gate its own learning rate; those frozen, closed or to be closed have none."""
        if (gradient := self.gates.t.grad) is not None:
            self.mean_gradient.lerp_(gradient, 1 - self.average)
            still = self.frozen | self.reached | (self.gates.t == 0)
            gradient.copy_(self.mean_gradient).mul_(self.rate).masked_fill_(still, 0)
            self.before.copy_(self.gates.t)

    @torch.no_grad()
    def after_step(self, at: At) -> None:
        """Soft-threshold t; a gate that reaches 0 keeps its value until `update` closes it."""
        t = self.gates.t
        if not t.requires_grad:
            return
        falls = self.gate_lr * self.rate * self.channels.shares(self.gates()).to(t)
        # With this lambda the fastest gate reaches 0 at the end of the ramp, if nothing holds it.
        self.steering.start(1 / (falls.max().double() * self.ramp * at.steps))
        threshold = torch.where(self.falling, self.steering.strength * falls, 0)
        after = torch.sign(t) * (t.abs() - threshold).clamp(min=0)
        if self.bound:
            after = self._bounded(after, max(self.bound, 4 / (self.ramp * at.steps)))
            t.copy_(self.before)
        self.steps_left.copy_(torch.where(self.reached, self.steps_left, t.abs() / falls))
        self.reached.logical_or_((t != 0) & (after == 0))
        t.copy_(torch.where(self.frozen | self.reached, t, after))
        self.polarity.step(self.gates(), ~(self.frozen | self.reached), at)

    @torch.no_grad()
    def update(self, at: At) -> None:
        """Close gates that reached 0, up to the target; steer lambda, shrink eps, freeze."""
        if not self.frozen:
            if self.steer == "decided" and self.falling.all():
                self._decide()
            late = at.step >= self.eps_share * at.steps
            before = self.gates.t.clone()
            removed = self._close(late)
            closing = (before != 0) & (self.gates.t == 0)
            if closing.any():
                self.polarity.judge(self.gates.t, closing, self.gates.eps, at)
            if late or removed >= min(self.target, self.reach) - 1e-12:
                self._freeze()
                self.met_at.fill_(at.step / at.steps)
            elif not self.falling.all():
                self.steering.strength.mul_(_GROWTH)
            elif at.step <= self.ramp * at.steps:  # these answer at once
                self.steering.update(lambda: self._soft_cost() / self.first_cost, at)
            else:  # in the end only closed ones count
                self.steering.update(lambda: 1 - removed, at)
        share = min(1.0, at.step / (self.eps_share * at.steps))
        self.gates.eps.fill_(self.eps_start * (self.eps_end / self.eps_start) ** share)

    def finish(self, model: nn.Module, context: Context) -> nn.Module:
        """Absorb the gates, remove closed channels and emptied blocks; an ordinary smaller net."""
        if not self.frozen:
            with torch.no_grad():
                self._close(late=True)
                self._freeze()
            self.gates.eps.fill_(self.eps_end)
        return self.channels.smaller(folded(model, context.example), self.open())

    def open(self) -> Tensor:
        """Which channels are open (N,), on the CPU."""
        return (self.gates.t.detach() != 0).cpu()

    def log(self) -> dict[str, float]:
        """Share left with the open channels, lambda, eps, channels open, cost of the soft gates."""
        return super().log() | {
            "lambda": 0.0 if self.frozen else float(self.steering.strength.nan_to_num()),
            "eps": float(self.gates.eps),
            "channels": float(self.open().sum()),
            "soft_cost": 1 - self.channels.removed(self.gates().detach().cpu()),
        }

    def report(self) -> dict[str, Any]:
        """Whether and when the target was met, and what had to be closed or lifted for it."""
        counted = {name: float(getattr(self, name)) for name in ("met_at", "closed_late", "lifted")}
        return super().report() | {"most_removable": self.reach} | counted | self.polarity.report()

    def _soft_cost(self) -> float:
        return float(self.channels.cost(self.gates().detach().cpu()))

    def _bounded(self, after: Tensor, bound: float) -> Tensor:
        """t (N,) between `before` and `after`: no gate moves by more or passes zero."""
        eps, g = self.gates.eps, gate(self.before, self.gates.eps)
        wanted = torch.where(after * self.before > 0, gate(after, eps), 0)
        most = torch.minimum(torch.maximum(wanted, g - bound), g + bound)
        there = torch.sign(self.before) * (eps * most / (1 - most)).sqrt()
        return torch.where((most == wanted) & (wanted > 0), after, there)

    def _decide(self) -> None:
        """Let only gates below 1/4 fall on, once they meet the target."""
        g, kept = self.gates().detach().cpu(), self.open()
        order = g.argsort(stable=True)
        kept = self.channels.close(order[(kept & (g < 0.25))[order]], kept, self.target)
        if self.channels.removed(kept) >= min(self.target, self.reach) - 1e-12:
            self.falling.copy_(~kept)

    def _close(self, late: bool) -> float:
        """Close gates that reached 0 and, if `late`, more up to target; return removed share."""
        order = self.steps_left.cpu().argsort(stable=True)
        reached = order[self.reached.cpu()[order]]
        kept = self.channels.close(reached, self.open(), self.target)
        if late:
            now = self.channels.close(order, kept, self.target)
            self.closed_late.fill_(int(kept.sum() - now.sum()))
            kept = now
        # A gate that has to stay, or is one too many, keeps its value.
        self.gates.t.masked_fill_(~kept.to(self.gates.t.device), 0)
        self.reached.zero_()
        return self.channels.removed(kept)

    def _freeze(self) -> None:
        """End the thresholds and the gradient; as eps falls, the gates of the survivors rise."""
        t = self.gates.t
        if self.steer == "closed":
            least = 3 * math.sqrt(self.eps_end)
            low = (t != 0) & (t.square() <= self.eps_end)
            t.copy_(torch.where(low, torch.copysign(torch.full_like(t, least), t), t))
            self.lifted.fill_(int(low.sum()))
        self.frozen.fill_(True)
        t.requires_grad_(False)
