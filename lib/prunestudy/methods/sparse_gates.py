r"""Training Sparse Neural Networks (Srinivas, Subramanya, Babu; arXiv 1611.06694, 2016).

Each weight gets a gate variable, the probability that the weight is used:

    effective weight = w z,   z ~ Bernoulli(g),   g in [0, 1]                          (paper)
    loss = task loss + lambda2 * sum g + lambda1 * sum g (1 - g)                       (paper; [S])

The sum of g is the expected number of non-zeros: the number of weights is regularised, not their
size (equivalent to a spike-and-slab prior). The bi-modal term pushes gates to 0 or 1. Through the
draw the backward pass is the identity (straight through), so

    dL/dg = w * dL/d(w z) + lambda2 + lambda1 (1 - 2 g),     dL/dw = z * dL/d(w z)

At test time z = 1[g >= 0.5]; in the end only the products w z are left.

| paper | code |
|---|---|
| w | `SparseGates.weights` |
| g | `_Gate.gate` |
| z | drawn in `_Gate.draw` |
| lambda2 | `Steering.strength` |
| lambda1 | `Steering.strength * bimodal_ratio(...)` |

What drives a gate: near a trained net w dL/dw is about 0, and with Bernoulli draws the expected
straight-through gradient is -(1 - g) w^2 H (H the curvature), so a gate rests at
1 - lambda2 / (w^2 H) and crosses 0.5 where w^2 H / 2 = lambda2: Optimal Brain Damage's saliency.
With the deterministic draw nothing answers lambda2 until a weight is cut.

Unknown in the paper, ours here: all settings of `SparseGates`, that lambda2 is steered to a target
share, and that at `harden` exactly the top-k gates are kept (ties by |w|).
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.methods.base import At, Context, Phase, then_fine_tune
from prunestudy.methods.masks import Mask, Masked, multiply
from prunestudy.methods.steering import Steering
from prunestudy.values import Part, Positive, Share


class _Gate(Mask):
    """Parametrisation `w -> w z` of one layer's weight, with one gate per weight.

    Training draws z, by `bernoulli` or not; eval uses z = 1[g >= 0.5]; once `hard`, z is the mask.
    """

    flags = ("hard", "bernoulli")

    def __init__(self, weight: Tensor, initial: float, generator: torch.Generator) -> None:
        super().__init__(weight)
        self.gate = nn.Parameter(torch.full_like(weight, initial))
        self.generator = generator
        self.hard = self.bernoulli = False
        self.forget()

    def forget(self) -> None:
        """Let the last z go: no backward pass needs it any more."""
        self.z, self.draws = None, 0

    def forward(self, weight: Tensor) -> Tensor:
        if self.hard:
            return super().forward(weight)
        z = self.draw()
        return multiply(weight, z, z, self.gate)

    def draw(self) -> Tensor:
        """Return z, zeros and ones in the shape of the weight."""
        if not (self.training and self.bernoulli):
            return self.at_test()
        if torch._C._current_graph_task_id() >= 0:  # a backward pass: a checkpoint computes again
            line = "not with Bernoulli draws for a layer that is called twice"
            require(self.draws < 2, "model", "activation checkpointing", line)
            self.draws = 0
            return self.z
        noise = torch.empty_like(self.gate).uniform_(generator=self.generator)
        self.z, self.draws = torch.lt(noise, self.gate.detach(), out=noise), self.draws + 1
        return self.z

    def at_test(self) -> Tensor:
        """Return the z of eval mode."""
        return self.mask if self.hard else (self.gate.detach() >= 0.5).to(self.gate.dtype)


class SparseGates(Masked):
    """Gate variables on single weights, from a dense start, to an exact kept share.

    Shares are of the steps. `scope`: which layers, see `layers_in`; `draw`: how z is drawn while
    gates train ("a_then_b": half of the time each); `initial` gate; `gate_optimizer`, `gate_lr`;
    `bimodal`: lambda1 / lambda2 at the end, 0 for none; `ramp`: share of the gate phase in which
    the kept share falls to the target; `harden`: share of all steps after which gates are decided;
    `gate_phase_lr`: weights' learning rate until then, times the recipe's.
    """

    name, title = "sparse_gates", "gate variables (ours)"
    draw: Literal[
        "bernoulli", "deterministic", "bernoulli_then_deterministic", "deterministic_then_bernoulli"
    ] = "bernoulli"
    initial: Share = 0.95
    gate_optimizer: Literal["adam", "sgd"] = "adam"
    gate_lr: Positive = 0.02
    bimodal: Annotated[float, Field(ge=0)] = 4.0
    ramp: Share = 0.8
    harden: Part = 0.55
    gate_phase_lr: Positive = 0.5

    def phases(self) -> tuple[Phase, ...]:
        """Gates and weights together, then the kept weights alone."""
        return then_fine_tune("gates", self.harden, self.gate_phase_lr)

    def attach(self, model: nn.Module, context: Context) -> None:
        """Put a gate on every weight in the scope."""
        self.generator, self.steering = context.generator, Steering(1 - self.target, self.ramp)
        super().attach(model, context)
        self._set_draw(self.draw.split("_then_")[0])

    def mask_for(self, weight: Tensor) -> _Gate:
        """The gates of one layer's `weight`."""
        return _Gate(weight, self.initial, self.generator)

    @property
    def hard(self) -> bool:
        """Whether the gates are decided."""
        return self.masks[0].hard

    def optimizer(self) -> torch.optim.Optimizer | None:
        """The gates' own: no weight decay, and no momentum for SGD."""
        if self.hard:
            return None
        gates = [each.gate for each in self.masks]
        if self.gate_optimizer == "sgd":
            return torch.optim.SGD(gates, lr=self.gate_lr)
        # The second moment must follow the penalty as it grows: a shorter memory than usual.
        return torch.optim.Adam(gates, lr=self.gate_lr, betas=(0.9, 0.99), eps=1e-12, fused=True)

    def after_backward(self, at: At) -> None:
        """Add the penalties' gradient lambda2 + lambda1 (1 - 2 g) to the gates'."""
        gates = [each.gate for each in self.masks if each.gate.grad is not None]
        if self.hard or not gates:
            return
        if at.first:
            total = sum(gate.grad.abs().sum().double() for gate in gates)
            self.steering.start(0.1 * (total / sum(gate.numel() for gate in gates)))
        lambda2 = self.steering.strength
        lambda1 = lambda2 * self.bimodal_ratio(at.share)
        gradients = [gate.grad for gate in gates]
        both, middle = (value.to(gradients[0]) for value in (lambda1 + lambda2, -2 * lambda1))
        torch._foreach_add_(gradients, torch._foreach_mul([g.detach() for g in gates], middle))
        for gradient in gradients:
            gradient.add_(both)

    @torch.no_grad()
    def after_step(self, at: At) -> None:  # noqa: ARG002
        """Clip gates to [0, 1]."""
        for each in self.masks:
            each.forget()
        if not self.hard:
            gates = [each.gate for each in self.masks]
            torch._foreach_clamp_min_(gates, 0.0)
            torch._foreach_clamp_max_(gates, 1.0)

    def update(self, at: At) -> None:
        """Steer lambda2; change the draw when it is time; decide the gates at the end."""
        if self.hard:
            return
        self.steering.update(self.kept, at)
        if 2 * at.step >= at.steps:
            self._set_draw(self.draw.split("_then_")[-1])
        if at.last:
            self.cut(self.target, at.total_step)

    def scores(self) -> list[Tensor]:
        """The gates plus a tiny multiple of |w|, in float64, to break ties at 0 and 1."""
        largest = max(w.detach().abs().max().item() for w in self.weights) or 1.0
        pairs = zip(self.masks, self.weights, strict=True)
        return [g.gate.double() + 1e-9 * w.abs().double() / largest for g, w in pairs]

    def cut(self, sparsity: float, step: int = 0) -> None:
        """Keep the largest gates for good."""
        super().cut(sparsity, step)
        for each in self.masks:
            each.hard = True

    def log(self) -> dict[str, float]:
        """Share kept in eval mode; share of gates in 0.05-0.95; mean of g; lambda2."""
        flat = torch.cat([value.flatten() for value in self.values()])
        return super().log() | {
            "undecided": ((flat > 0.05) & (flat < 0.95)).float().mean().item(),
            "expected_kept": flat.mean().item(),
            "lambda2": self.steering.strength.nan_to_num().item(),
        }

    def values(self) -> list[Tensor]:
        """The gates, one tensor per layer; once they are decided, the masks."""
        return [each.mask if each.hard else each.gate.detach() for each in self.masks]

    def bimodal_ratio(self, share: Tensor) -> Tensor:
        """lambda1 / lambda2 at `share` of the gate phase, both 0-d.

        While the kept share falls the ratio stays below 1: above, gates at 1 are locked there
        (lambda2 < lambda1) and nothing can be cut any more. After that it rises to `bimodal`.
        """
        first, ramp, last = min(0.8, self.bimodal), self.ramp, self.bimodal
        early = first * ((share / ramp - 1 / 3) * 1.5).clamp(min=0.0)
        late = first + (last - first) * (share - ramp) / (1 - ramp)
        return torch.where(share <= ramp, early, late)

    def _set_draw(self, kind: str) -> None:
        for each in self.masks:
            each.bernoulli = kind == "bernoulli"
