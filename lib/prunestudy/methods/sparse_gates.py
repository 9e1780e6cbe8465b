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
| w | `parametrizations.weight.original` of a layer |
| g | `Gate.gate` |
| z | drawn in `Gate.draw` |
| lambda2 | `Steering.strength` |
| lambda1 | `Steering.strength * _bimodal(...)` |

What drives a gate: near a trained net w dL/dw is about 0, and with Bernoulli draws the expected
straight-through gradient is -(1 - g) w^2 H (H the curvature), so a gate rests at
1 - lambda2 / (w^2 H) and crosses 0.5 where w^2 H / 2 = lambda2: Optimal Brain Damage's saliency.
With the deterministic draw nothing answers lambda2 until a weight is cut.

Unknown in the paper, ours here: how gates start, their optimiser (Adam), that lambda2 is steered
to a target share, the ramp of lambda1, that at `harden` (share of the steps) exactly the
top-k gates are kept (ties by |w|) and the kept weights fine-tuned.
"""

import contextlib
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.methods.base import Method, Params, Phase, Progress
from prunestudy.methods.masks import (
    attach_each,
    dense_weights,
    kept_count,
    masked,
    product,
    top_masks,
)
from prunestudy.methods.steering import Steering

_BINS = 40


class _Multiply(torch.autograd.Function):
    """w * z, with the identity as the derivative of the draw z by the gate g."""

    @staticmethod
    def forward(ctx, weight: Tensor, gate: Tensor, z: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(weight, z)
        return product(weight, z)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, z = ctx.saved_tensors
        return gradient * z, gradient * weight, None


class Gate(nn.Module):
    """Parametrisation `w -> w z` of one layer's weight, with one gate per weight.

    Training draws z; eval uses z = 1[g >= 0.5]; once hardened, z is the fixed `mask`.
    """

    def __init__(self, weight: Tensor, initial: float, generator: torch.Generator) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full_like(weight, initial))
        self.register_buffer("mask", torch.ones_like(weight))
        self.generator = generator
        self.hard = self.bernoulli = self.sample_in_eval = False

    def forward(self, weight: Tensor) -> Tensor:
        """Return w z (same shape)."""
        if self.hard:
            return masked(weight, self.mask)
        return _Multiply.apply(weight, self.gate, self.draw())

    def draw(self) -> Tensor:
        """Return z, zeros and ones in the shape of the weight."""
        sampling = self.training or self.sample_in_eval
        if sampling and self.bernoulli:
            noise = torch.empty_like(self.gate).uniform_(generator=self.generator)
            return torch.lt(noise, self.gate.detach(), out=noise)
        return (self.gate >= 0.5).to(self.gate.dtype)

    def harden(self, mask: Tensor) -> None:
        """Fix z to `mask`; the gate is trained no more."""
        self.mask.copy_(mask)
        self.hard = True
        self.gate.requires_grad_(False)


class SparseGatesParams(Params):
    """Our readings of what the paper leaves open; shares are of the steps.

    `draw`: how z is drawn while gates train ("a_then_b": half of the time each); `initial` gate;
    `gate_optimizer`, `gate_lr`; `bimodal`: lambda1 / lambda2 at the end, 0 for none;
    `ramp`: share of the gate phase in which the kept share falls to the target; `harden`: share of
    all steps after which gates are decided; `gate_phase_lr`: weights' learning rate until then,
    times the recipe's.
    """

    draw: Literal[
        "bernoulli", "deterministic", "bernoulli_then_deterministic", "deterministic_then_bernoulli"
    ] = "bernoulli"
    initial: Annotated[float, Field(gt=0, le=1)] = 0.95
    gate_optimizer: Literal["adam", "sgd"] = "adam"
    gate_lr: Annotated[float, Field(gt=0)] = 0.02
    bimodal: Annotated[float, Field(ge=0)] = 4.0
    ramp: Annotated[float, Field(gt=0, le=1)] = 0.8
    harden: Annotated[float, Field(gt=0, lt=1)] = 0.55
    gate_phase_lr: Annotated[float, Field(gt=0)] = 0.5


class SparseGates(Method):
    """Gate variables on single weights, from a dense start, to an exact kept share."""

    name: ClassVar[str] = "sparse_gates"
    title: ClassVar[str] = "gate variables (ours)"
    target_kinds: ClassVar[tuple[str, ...]] = ("sparsity",)
    Params: ClassVar[type[Params]] = SparseGatesParams

    def __init__(self, params: SparseGatesParams, *target: Any) -> None:
        super().__init__(params, *target)
        self.gates: list[Gate] = []
        self.steering = Steering(1 - self.target, params.ramp)
        self._histograms: list[np.ndarray] = []

    def phases(self) -> tuple[Phase, ...]:
        """Gates and weights together, then the kept weights alone."""
        p = self.params
        gates = Phase("gates", p.harden, lr_scale=p.gate_phase_lr, schedule="constant")
        return gates, Phase("fine_tune", 1 - p.harden, restart=True)

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Put a gate on every weight of every convolution and linear layer."""
        self.gates = attach_each(model, lambda w: Gate(w, self.params.initial, generator))

    def parameter_groups(self, model: nn.Module, phase: str) -> list[nn.Parameter]:  # noqa: ARG002
        """Everything but the gates."""
        gates = {id(g.gate) for g in self.gates}
        return [p for p in model.parameters() if p.requires_grad and id(p) not in gates]

    def own_optimizer(self, model: nn.Module, phase: str) -> torch.optim.Optimizer | None:  # noqa: ARG002
        """The gates' own optimiser: no weight decay, and no momentum for SGD."""
        if phase != "gates":
            return None
        gates = [g.gate for g in self.gates]
        if self.params.gate_optimizer == "sgd":
            return torch.optim.SGD(gates, lr=self.params.gate_lr)
        # The second moment must follow the penalty as it grows: a shorter memory than usual.
        return torch.optim.Adam(
            gates, lr=self.params.gate_lr, betas=(0.9, 0.99), eps=1e-12, fused=True
        )

    def after_backward(self, model: nn.Module, progress: Progress) -> None:  # noqa: ARG002
        """Add the penalties' gradient lambda2 + lambda1 (1 - 2 g) to the gates'."""
        if progress.phase != "gates":
            return
        if self.steering.strength is None:
            self.steering.start(0.1 * _mean_abs([g.gate.grad for g in self.gates]))
        lambda2 = self.steering.strength
        lambda1 = lambda2 * self._bimodal(progress.step / progress.steps)
        for each in self.gates:
            each.gate.grad.add_(each.gate, alpha=-2 * lambda1).add_(lambda1 + lambda2)

    def after_step(self, model: nn.Module, progress: Progress, lr: float) -> None:  # noqa: ARG002
        """Clip gates to [0, 1]; steer lambda2; change the draw when it is time."""
        if progress.phase != "gates":
            return
        with torch.no_grad():
            for each in self.gates:
                each.gate.clamp_(0, 1)
        step = progress.step + 1
        if self.steering.due(step):
            self.steering.update(self.kept_share(model), step, progress.steps)
        if 2 * step >= progress.steps:
            self._set_draw(self.params.draw.split("_then_")[-1])

    def start(self, model: nn.Module, phase: str) -> None:  # noqa: ARG002
        """Begin with the first kind of draw."""
        self._set_draw(self.params.draw.split("_then_")[0])

    def end(self, model: nn.Module, phase: str) -> None:
        """Decide the gates at the end of their phase."""
        if phase == "gates":
            self._harden(model)

    def finish(self, model: nn.Module) -> nn.Module:
        """Leave only the products w z, in plain layers."""
        if not self.gates[0].hard:
            self._harden(model)
        return super().finish(model)

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of weights that eval mode uses."""
        kept = sum((g.mask if g.hard else g.gate >= 0.5).sum().item() for g in self.gates)
        return kept / sum(g.gate.numel() for g in self.gates)

    def views(self, model: nn.Module) -> dict[str, contextlib.AbstractContextManager]:  # noqa: ARG002
        """The sampled net, while gates are open."""
        return {} if self.gates[0].hard else {"sampled": self._sampled()}

    def row(self, model: nn.Module) -> dict[str, float]:  # noqa: ARG002
        """Gates neither below 0.05 nor above 0.95; sum of g; lambda2."""
        values = [g.mask if g.hard else g.gate.detach() for g in self.gates]
        flat = torch.cat([value.flatten() for value in values])
        counts = torch.histc(flat.cpu().float(), _BINS, 0, 1)
        self._histograms.append(counts.numpy())
        return {
            "undecided": ((flat > 0.05) & (flat < 0.95)).float().mean().item(),
            "expected_kept": flat.mean().item(),
            "lambda2": self.steering.strength or 0.0,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Histograms of the gates, (epochs, 40 bins over 0-1)."""
        return {"gate_histograms": np.stack(self._histograms)} if self._histograms else {}

    def state(self) -> dict[str, Any]:
        """Steering, draw, whether the gates are decided, histograms so far."""
        return {
            "steering": self.steering.state(),
            "hard": self.gates[0].hard,
            "bernoulli": self.gates[0].bernoulli,
            "histograms": [torch.from_numpy(h) for h in self._histograms],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.steering.load_state(state["steering"])
        self._histograms = [h.numpy() for h in state["histograms"]]
        for each in self.gates:
            each.bernoulli = state["bernoulli"]
            if state["hard"]:
                each.harden(each.mask)

    def _bimodal(self, share: float) -> float:
        """lambda1 / lambda2 at `share` of the gate phase.

        While the kept share falls the ratio stays below 1: above, gates at 1 are locked there
        (lambda2 < lambda1) and nothing can be cut any more. After that it rises to `bimodal`.
        """
        first, ramp, last = min(0.8, self.params.bimodal), self.params.ramp, self.params.bimodal
        if share <= ramp:
            return first * max(0.0, (share / ramp - 1 / 3) * 1.5)
        return first + (last - first) * (share - ramp) / (1 - ramp)

    def _set_draw(self, kind: str) -> None:
        for each in self.gates:
            each.bernoulli = kind == "bernoulli"

    @contextlib.contextmanager
    def _sampled(self):
        # Draws of its own: looking must not change the training.
        own = torch.Generator(self.gates[0].gate.device).manual_seed(0)
        before = [(g.generator, g.bernoulli) for g in self.gates]
        for each in self.gates:
            each.generator, each.bernoulli, each.sample_in_eval = own, True, True
        try:
            yield
        finally:
            for each, (generator, bernoulli) in zip(self.gates, before, strict=True):
                each.generator, each.bernoulli, each.sample_in_eval = generator, bernoulli, False

    def _harden(self, model: nn.Module) -> None:
        weights = dense_weights(model)
        largest = max(w.detach().abs().max().item() for w in weights) or 1.0
        scores = [
            # float64 holds the gate and, below its last digit, |w| for the ties at 0 and 1.
            g.gate.detach().double() + 1e-9 * w.detach().abs().double() / largest
            for g, w in zip(self.gates, weights, strict=True)
        ]
        keep = kept_count(sum(s.numel() for s in scores), self.target)
        for each, mask in zip(self.gates, top_masks(scores, keep), strict=True):
            each.harden(mask)


def _mean_abs(tensors: list[Tensor]) -> float:
    total = sum(t.abs().sum().item() for t in tensors)
    return total / sum(t.numel() for t in tensors)
