"""Controls on single weights, which all rank over the net at once and keep exactly the target."""

from typing import Any

import torch
from torch import Tensor, nn

from prunestudy.errors import refused, require
from prunestudy.methods.base import At, Context, Phase, call, then_fine_tune
from prunestudy.methods.masks import Mask, Masked, Scope, kept_count, layers_in
from prunestudy.methods.steering import Steering
from prunestudy.shrink.fold import copied, with_gradients
from prunestudy.values import Count, Part, Positive, Share


class Magnitude(Masked):
    """The smallest |w| of the start weights are cut at once; what is left is fine-tuned.

    Han et al., "Learning both Weights and Connections", NeurIPS 2015, in one round.
    """

    name, title = "magnitude", "one-shot magnitude"

    def attach(self, model: nn.Module, context: Context) -> None:
        """Put masks on the weights and cut at once."""
        super().attach(model, context)
        self.cut(self.target)


class GradualMagnitude(Masked):
    """The sparsity grows cubically; a weight once cut has no gradient and stays at zero.

    Zhu and Gupta, "To prune, or not to prune", 2017. `harden`: share of all steps after which the
    mask is fixed; `ramp`: share of that phase in which the sparsity grows; `period`: steps between
    masks; `prune_phase_lr`: learning rate until then, times the recipe's.
    """

    name, title = "gradual_magnitude", "gradual magnitude"
    harden: Part = 0.7
    ramp: Share = 0.8
    period: Count = 16
    prune_phase_lr: Positive = 1.0

    def phases(self) -> tuple[Phase, ...]:
        """The sparsity grows, then the mask stays."""
        return then_fine_tune("prune", self.harden, self.prune_phase_lr)

    def scores(self) -> list[Tensor]:
        """|w| of the weights in use, -1 of those cut."""
        pairs = zip(self.masks, super().scores(), strict=True)
        return [torch.where(each.mask == 1, size, -1.0) for each, size in pairs]

    def update(self, at: At) -> None:
        """Raise the sparsity every `period` steps, and to the target at the end of the phase."""
        if at.phase == "prune":
            self.grow(at, self.period, self.ramp * at.steps)
            if at.last:
                self.cut(self.target, at.total_step)


class L1(Masked):
    """LASSO: a penalty on the size of the weights, where gates penalise their number.

    Proximal gradient: after each step w <- sign(w) max(|w| - lr lambda, 0), which gives exact
    zeros and shrinks every weight that is kept. lambda is steered to the target share as for the
    gates; then exactly the target share of largest |w| is kept and fine-tuned. `ramp`, `harden`,
    `penalty_phase_lr`: as for `SparseGates`, of the penalty's phase. A threshold that would leave
    fewer weights than the target is not applied: the mask would have to keep zeros, and those
    whose input is always 0 (the border of MNIST) would stay zero.
    """

    name, title = "l1", "L1 (LASSO)"
    revision = 2  # 1 could leave fewer weights than the target
    ramp: Share = 0.8
    harden: Part = 0.55
    penalty_phase_lr: Positive = 0.5

    def __init__(self, target: float | None = None, of: str | None = None, **settings: Any) -> None:
        super().__init__(target, of, **settings)
        # A fifth more than the target, so that the mask need not keep a zero.
        self.steering = Steering(min(1.0, 1.2 * (1 - self.target)), self.ramp)

    def phases(self) -> tuple[Phase, ...]:
        """The penalty, then fine-tuning without it."""
        return then_fine_tune("penalty", self.harden, self.penalty_phase_lr)

    @torch.no_grad()
    def after_step(self, at: At) -> None:
        """Soft-threshold every weight; at first by a thousandth of the mean |w|."""
        if at.phase != "penalty":
            return
        if at.first:
            total = sum(weight.abs().sum().double() for weight in self.weights)
            self.steering.start(1e-3 * total / self.size / at.lr)
        threshold = self.steering.strength * at.lr
        left = sum((weight.abs() > threshold).sum() for weight in self.weights)
        threshold = torch.where(left < kept_count(self.size, self.target), 0.0, threshold)
        for weight in self.weights:
            if weight.requires_grad:  # a frozen one may be cut, not shrunk
                weight.sub_(weight.clamp(-threshold, threshold))

    def update(self, at: At) -> None:
        """Steer lambda; fix the mask at the end of the penalty."""
        if at.phase == "penalty":
            self.steering.update(self.kept, at)
            if at.last:
                self.cut(self.target, at.total_step)

    @torch.no_grad()
    def kept(self) -> float:
        """The share of weights that are not zero."""
        pairs = zip(self.weights, self.masks, strict=True)
        return sum(int((w * each.mask).count_nonzero()) for w, each in pairs) / self.size

    def log(self) -> dict[str, float]:
        """The share of weights that are not zero; lambda."""
        return super().log() | {"lambda": self.steering.strength.nan_to_num().item()}


class Snip(Masked):
    """The most sensitive connections are kept before any training, then trained.

    Lee, Ajanthan, Torr, "SNIP", ICLR 2019. The sensitivity of a connection is |dL / dc| at c = 1
    of the net with weights c w, |w dL/dw|, L being the task's loss on the first training batch.
    """

    name, title = "snip", "SNIP"

    def attach(self, model: nn.Module, context: Context) -> None:
        """Put masks on the weights; measure the sensitivity and cut at once."""
        require(context.loss is not None, "context.loss", None, "SNIP needs the task's loss")
        ((x, y),) = context.batches(1)
        # A copy: batch norm must not count this batch, and frozen weights are rated as well.
        net = with_gradients(copied(model).train())
        weights = [layer.weight for layer in layers_in(net, self.scope).values()]
        with refused("context.train", "batch 0"):  # some checkpoints refuse `torch.autograd.grad`
            context.loss(call(net, x), x, y).backward()
        pairs = [(w.detach(), torch.zeros_like(w) if w.grad is None else w.grad) for w in weights]
        self.sensitivity = [(w * s).abs() for w, s in pairs]
        super().attach(model, context)
        self.cut(self.target)

    def scores(self) -> list[Tensor]:
        """The sensitivities."""
        return self.sensitivity


class Dpf(Masked):
    r"""A mask by |w| of dense weights that are all trained on, so that cut weights may return.

    Lin, Stich, Barba, Dmitriev, Jaggi, "Dynamic Model Pruning with Feedback", ICLR 2020:

        forward   W~ = M * W     M: the largest |W| of the *dense* weights, over the net
        backward  dW = dW~       straight through: cut weights are updated, too

    M is chosen anew every `period` steps, to the end of the training. The sparsity grows by the
    cubic schedule s (1 - (1 - e / e_t)^3) and stays at s. Ours: `ramp`, e_t as a share of all
    steps, and `scope`, as in the paper that this is the control of (magnitude attention);
    `bounded`: whether cut weights' gradients are scaled down, see `Masked.bound`.
    """

    name, title, part = "dpf", "dynamic pruning with feedback", "explore"
    scope: Scope = "auto"
    ramp: Share = 0.75
    period: Count = 16
    bounded: bool | None = None

    def mask_for(self, weight: Tensor) -> Mask:
        """A mask that lets the gradient through."""
        return Mask(weight, feedback=True)

    def after_backward(self, at: At) -> None:  # noqa: ARG002
        """Bound the feedback to cut weights."""
        self.bound(self.bounded)

    def update(self, at: At) -> None:
        """Choose the mask anew every `period` steps; reach the target at the end."""
        self.grow(at, self.period, self.ramp * at.total_steps)
        if at.last and self.sparsity < self.target:
            self.cut(self.target, at.total_step)
