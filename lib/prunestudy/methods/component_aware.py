r"""Component-aware pruning with soft coefficients (Sundaram, Ulmen, Haider, Goerges; 2025).

"Application-Specific Component-Aware Structured Pruning of Deep Neural Networks via Soft
Coefficient Optimization", arXiv 2507.14882. Only what its abstract says could be read [P]; the
formulas below are our reading [O].

A trained net has components (encoder, decoder, ...). Its dependency groups lie inside one or
couple several (the latent vector). Group g gets a soft coefficient alpha_g: how strongly it is
pruned. Its n_g channels are ranked by importance, and those ranked below it are removed:

    channel j of g goes      <=>   p_gj < alpha_g + c,        p_gj = (rank of j - 1/2) / n_g

    maximise  metric(alpha)  subject to  |S(alpha) - rho| <= epsilon  and every limit of the user

S is the share of real parameters removed, c the common offset that meets rho. Two solvers:

*Grid search.* A product grid of `levels` values of each alpha_g; c shifts each point to rho (on a
coarse grid hardly any point is within epsilon otherwise). Points that differ by a common shift
are equivalent, and evaluated once. The cost of the search is recorded.

*Gradient descent.* Weights frozen, soft masks on what the channels feed, the temperature T
falling; a shortfall is that of a limit, in units of the limit:

    m_gj = sigmoid((p_gj - alpha_g) / T),    loss = L(m) / L(1) + mu sum max(0, shortfall)^2

The gradient's part along n = dS/dalpha is taken out, so that a step keeps S, and a Newton step
n (rho - S) / n^2 brings S back to rho [D]. `hold` "penalty" adds instead
mu max(0, |S(m) - rho| - epsilon)^2 to the loss; with many groups its stiffness slows the descent.
Where the metric has a smooth form, that takes the place of the loss. Every `check` steps the
coefficients are hardened (T = 0, the offset c by bisection) and judged on the same samples as a
grid point; the best such point counts.

| here | code |
|---|---|
| alpha | one number per coefficient; `_spread` gives one per group |
| p | `_Budget.positions` |
| m | `soft_masks` |
| S | 1 - `Channels.cost` / `Channels.dense` |
| rho, epsilon | `target`, `tolerance` |
| c | found in `_Budget.meet` |
| n, mu | `normal`, `strength` |

Also ours, and switchable: `coefficient` "multiplier" takes p_gj = log of the importance, so that
exp(-alpha_g) multiplies a group's importance in one global ranking; `per` "component" gives the
internal groups of a component one coefficient in common; the importance within a group is a
first-order Taylor term of the application's loss, or the group's L2 norm; with `recover` a net is
judged after some training. With frozen weights only the immediate loss counts, although training
can make up for a channel of a hidden layer, but not for one of the latent vector.
Unknown: all of this, the paper's nets and its numbers.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.methods.base import call, samples_in
from prunestudy.methods.search import Point, Search, placed
from prunestudy.shrink import Group, axis_of
from prunestudy.shrink.fold import copied, real_parameters, with_gradients
from prunestudy.shrink.groups import CONSUMES
from prunestudy.values import Positive


class ComponentAware(Search):
    """One soft coefficient per group, found by gradient descent or on a grid.

    `solver`, `coefficient` and `per` as above; `levels` of the grid for each coefficient. Of
    gradient descent: `steps` batches, Adam's `lr` falling to zero, `hot` and `cold` temperature at
    its ends (in units of p), how it is to `hold` the target, penalties' `strength` mu, `check`:
    steps between hardened points. `recover`: steps of training (Adam at `recover_lr`) before a net
    is judged; above 0, the weights are also trained during the descent.
    """

    name, title = "component_aware", "soft coefficients (ours)"
    solver: Literal["gradient", "grid"] = "gradient"
    coefficient: Literal["share", "multiplier"] = "share"
    per: Literal["group", "component"] = "group"
    levels: Annotated[int, Field(ge=2, le=1000)] = 9
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 150
    lr: Positive = 0.1
    hot: Positive = 0.1
    cold: Positive = 0.01
    hold: Literal["projection", "penalty"] = "projection"
    strength: Positive = 1e4
    check_every: Annotated[int, Field(ge=1, alias="check")] = 10  # `check` is a hook
    recover: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    recover_lr: Positive = 2e-3

    def solve(self) -> tuple[list[float], Point]:
        """One number per group, and the best point that the solver found."""
        self.order(placed(self.scores(), evenly=self.coefficient == "share"))
        keys = [
            each.place if self.per == "component" and len(each.components) == 1 else each.name
            for each in self.groups
        ]
        free = [k for k, each in zip(keys, self.groups, strict=True) if not each.protected]
        number = {key: i for i, key in enumerate(dict.fromkeys(free))}
        # The coefficient's number of each group; for a protected one any does.
        self.index, self.coefficients = [number.get(key, -1) for key in keys], len(number)
        self.best = None
        self._offer([0.0] * (len(number) + 1))
        if self.solver == "gradient":
            self._descend()
        else:
            self._try_grid()
        return self.best

    def _offer(self, alpha: Sequence[float]) -> None:
        """Take the point at `alpha`, shifted to the target, if it is better than all before."""
        numbers = [alpha[i] for i in self.index]
        point = self.judge(self.budget.meet(numbers, self.target))
        if self.best is None or self.rank(point) > self.rank(self.best[1]):
            self.best = numbers, point

    def _try_grid(self) -> None:
        low, high = (0.0, self.most) if self.coefficient == "share" else (-2.0, 2.0)
        levels = np.linspace(low, high, self.levels).tolist()
        for alpha in itertools.product(levels, repeat=self.coefficients):
            # Other points are the same as one with all coefficients a level lower.
            if min(alpha) <= low:
                self._offer(alpha)

    def _descend(self) -> None:
        """Try hardened points on the way of gradient descent."""
        start = self.budget.offset([0.0] * len(self.index), self.target)
        alpha = torch.full((self.coefficients,), start).requires_grad_()
        optimizer = torch.optim.Adam([alpha], lr=self.lr)
        # The range of the positions: 1 for ranks, else twice the interquartile range, as for ranks.
        scale = 1.0
        if self.coefficient == "multiplier":
            quarters = torch.tensor([0.25, 0.75]).double()
            low, high = torch.cat(self.budget.positions).quantile(quarters)
            scale = 2 * float(high - low)
        net, weights = copied(self.dense), None
        if self.recover:
            with_gradients(net)
            weights = torch.optim.Adam(net.parameters(), lr=self.recover_lr)
        for step in range(self.steps):
            done = step / self.steps
            optimizer.param_groups[0]["lr"] = self.lr * scale * (1 - done)
            temperature = scale * self.hot * (self.cold / self.hot) ** done
            loss, removed = self.soft_loss(net, alpha[self.index], temperature)
            if weights:
                weights.zero_grad()
                trained = [p for p in net.parameters() if p.requires_grad]
                loss.backward(retain_graph=True, inputs=trained)
            self.step(alpha, optimizer, loss, removed - self.target)
            if weights:
                weights.step()
            if self.coefficient == "share":
                alpha.data.clamp_(0, self.most)
            if (step + 1) % self.check_every == 0 or step + 1 == self.steps:
                self._offer(alpha.tolist())

    def step(
        self, alpha: Tensor, optimizer: torch.optim.Optimizer, loss: Tensor, over: Tensor
    ) -> None:
        """One step of `alpha` down `loss` that keeps S - rho, now `over`, or pulls it back to 0."""
        if self.hold == "penalty":
            off = torch.relu(over.abs() - self.tolerance).square()
            (alpha.grad,) = torch.autograd.grad(loss + self.strength * off, alpha)
            optimizer.step()
            return
        (normal,) = torch.autograd.grad(over, alpha, retain_graph=True)
        (downhill,) = torch.autograd.grad(loss, alpha)
        length = normal.square().sum().clamp(min=1e-12)
        alpha.grad = downhill - normal * (downhill @ normal) / length
        optimizer.step()
        alpha.data.sub_(normal * over.detach() / length)

    def candidate(self, kept: Sequence[int]) -> nn.Module:
        """With `recover`, the small net after its first steps of fine-tuning."""
        net = super().candidate(kept)
        if self.recover:
            net = with_gradients(copied(net))
            optimizer = torch.optim.Adam(net.parameters(), lr=self.recover_lr)
            for x, y in self.context.batches(self.recover):
                optimizer.zero_grad()
                self.context.loss(call(net, x), x, y).backward()
                optimizer.step()
                self.passes += 3 * samples_in(x)
        return net

    def soft_loss(
        self, net: nn.Module, numbers: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Loss at `numbers` (one per group) on the next training batch, and the share removed S."""
        x, y = self.batch()
        masks = self.soft_masks(numbers, temperature)
        output = masked_output(net, self.channels.groups, masks, x)
        smooth = self.metrics.smooth
        if self.goal in smooth:
            loss = -smooth[self.goal](output, x, y)
        else:
            loss = self.context.loss(output, x, y) / max(abs(self.dense_loss), 1e-12)
        for limit in self.limits:
            form = ({"loss": self.context.loss} | smooth).get(limit.metric)
            if form is not None:
                short = torch.relu(limit.share(form(output, x, y)))
                loss = loss + self.strength * short.square()
        require(bool(loss.isfinite()), "train", "a batch", "its loss is not finite")
        return loss, 1 - self.channels.cost(torch.cat(masks).cpu()) / self.channels.dense

    def soft_masks(self, numbers: Tensor, temperature: float) -> list[Tensor]:
        """m_gj = sigmoid((p_gj - alpha_g) / T), one (channels,) per group; ones where protected."""
        like = real_parameters(self.dense)[0]
        masks = []
        for each, position, number in zip(self.groups, self.budget.positions, numbers, strict=True):
            p = position.to(like)
            soft = torch.sigmoid((p - number.to(p)) / temperature)
            masks.append(torch.ones_like(p) if each.protected else soft)
        return masks


def masked_output(net: nn.Module, groups: Sequence[Group], masks: Sequence[Tensor], x: Any) -> Any:
    """Output of `net` for `x` with each channel times its mask where it is consumed.

    `masks` has one tensor (channels,) per group. At zeros and ones this is what the net without
    the zeros computes; differentiable in the masks.
    """
    # A copy on the same parameters, which keeps its weights for a checkpoint to compute with again.
    net = copied(net, (*net.parameters(), *net.buffers()))
    for group, mask in zip(groups, masks, strict=True):
        for member in group.members:
            layer = net.get_submodule(member.layer)
            if isinstance(layer, nn.LayerNorm):
                layer.register_forward_hook(partial(_masked_norm, member.spread(mask)))
            if member.role == CONSUMES:
                weight = layer.weight
                along, shape = axis_of(layer, "in"), [1] * weight.dim()
                shape[along] = -1
                spread = member.spread(mask)[: weight.shape[along]].to(weight.dtype)
                layer._parameters.pop("weight", None)
                layer.weight = weight * spread.view(shape)
    return call(net, x)


def _masked_norm(mask: Tensor, layer: nn.LayerNorm, given: tuple[Tensor], _: Tensor) -> Tensor:
    """A layer norm whose mean and variance weigh each feature by its mask."""
    x, mask = given[0], mask.to(given[0].dtype)
    total = mask.sum()
    mean = (x * mask).sum(-1, keepdim=True) / total
    variance = ((x - mean).square() * mask).sum(-1, keepdim=True) / total
    y = (x - mean) * (variance + layer.eps).rsqrt()
    y = y if layer.weight is None else y * layer.weight
    return y if layer.bias is None else y + layer.bias
