r"""Component-aware pruning with soft coefficients (Sundaram, Ulmen, Haider, Goerges; 2025).

"Application-Specific Component-Aware Structured Pruning of Deep Neural Networks via Soft
Coefficient Optimization", arXiv 2507.14882. Only what its abstract says could be read [P]; the
formulas below are our reading [O].

A trained net has components (encoder, decoder, ...). Its dependency groups lie inside one or
couple several (the latent vector). Group g gets a soft coefficient alpha_g: how strongly it is
pruned. Of its n_g channels, in order of importance, those go that stand below it:

    channel j of g goes      <=>   p_gj < alpha_g + c,        p_gj = (rank of j - 1/2) / n_g

    maximise  metric(alpha)  subject to  |S(alpha) - rho| <= epsilon  and every limit of the user

S is the share of real parameters removed, c the common offset that meets rho. Two solvers:

*Grid search.* A product grid of `levels` values of each alpha_g; c shifts each point to rho (of a
coarse grid hardly a point is within epsilon by itself). Points that differ by a common shift are
one, and are judged once; the cost that is reported counts the whole grid.

*Gradient descent.* Weights frozen, soft masks on what the channels feed, the temperature T
falling:

    m_gj = sigmoid((p_gj - alpha_g) / T)
    loss = L(m) / L(1) + mu max(0, |S(m) - rho| - epsilon)^2 + mu sum max(0, relative shortfall)^2

Every `check` steps the coefficients are hardened (T = 0, the offset c by bisection) and judged on
the same images as a grid point; the best such point counts.

| here | code |
|---|---|
| alpha | `numbers` (one per coefficient; `_spread` gives one per group) |
| p | `positions` |
| m | `soft_masks` |
| S | `Parameters.removed` |
| rho, epsilon | `target`, `tolerance` |
| c | found in `Budget.meet` |
| mu | `strength` |

Also ours, and switchable: `coefficient` "multiplier" takes p_gj = log of the importance, so that
exp(-alpha_g) multiplies a group's importance in one global ranking; `per` "component" gives the
internal groups of a component one coefficient in common; the importance within a group is a
first-order Taylor term of the application's loss, or the group's L2 norm. Unknown: all of this,
the paper's nets and its numbers.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from prunestudy.methods.base import Params
from prunestudy.methods.channel_choice import Choice, ChoiceParams, Point
from prunestudy.methods.channel_method import ChannelMethod
from prunestudy.shrink import Budget, axis_of, spread_out


class ComponentAwareParams(ChoiceParams):
    """`solver`, `coefficient` and `per` as above; `levels` of the grid for each coefficient.

    Of gradient descent: `steps` batches, Adam's `lr` falling to zero, `hot` and `cold` temperature
    at its ends (in units of p), penalty `strength` mu, `check`: steps between hardened points.
    """

    solver: Literal["gradient", "grid"] = "gradient"
    coefficient: Literal["share", "multiplier"] = "share"
    per: Literal["group", "component"] = "group"
    levels: Annotated[int, Field(ge=2)] = 9
    steps: Annotated[int, Field(ge=1)] = 150
    lr: Annotated[float, Field(gt=0)] = 0.03
    hot: Annotated[float, Field(gt=0)] = 0.1
    cold: Annotated[float, Field(gt=0)] = 0.01
    strength: Annotated[float, Field(gt=0)] = 1e4
    check: Annotated[int, Field(ge=1)] = 10


class ComponentAware(ChannelMethod):
    """One soft coefficient per group, found by gradient descent or on a grid."""

    name: ClassVar[str] = "component_aware"
    title: ClassVar[str] = "soft coefficients (ours)"
    Params: ClassVar[type[Params]] = ComponentAwareParams

    def solve(self, choice: Choice) -> tuple[Budget, Sequence[float], Point]:
        """Budget, one number per group, and the best point that the solver found."""
        scores = choice.scores()
        if self.params.coefficient == "share":
            positions = spread_out(scores)
        else:
            positions = [score.cpu().double().clamp(min=1e-30).log() for score in scores]
        budget, index = choice.budget(positions), _index(choice, self.params.per)
        solver = descend if self.params.solver == "gradient" else search_grid
        numbers, best, self.path = solver(choice, budget, index, self.params)
        self.coefficients = max(index) + 1
        return budget, numbers, best

    def measures(self, model: nn.Module) -> dict[str, Any]:
        """Besides: the number of coefficients, and the whole grid's cost in sample passes."""
        return super().measures(model) | {
            "coefficients": self.coefficients,
            "grid_passes": self.params.levels**self.coefficients * self.pruned.choice.samples,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Besides: the coefficients by step of the descent (steps + 1, coefficients)."""
        return super().arrays() | {"path": np.array(self.path, dtype=np.float32)}


Found = tuple[list[float], Point, list[list[float]]]


def search_grid(
    choice: Choice, budget: Budget, index: list[int], params: ComponentAwareParams
) -> Found:
    """The best point of the product grid, each shifted to the target; numbers per group."""
    low, high = (0.0, params.most) if params.coefficient == "share" else (-2.0, 2.0)
    levels = np.linspace(low, high, params.levels).tolist()
    best, at = choice.reach(budget, [0.0] * len(index)), [0.0] * len(index)
    for point in itertools.product(levels, repeat=max(index) + 1):
        if min(point) > low:
            continue  # the same as a point with all coefficients a level lower
        numbers = _spread(point, index)
        candidate = choice.reach(budget, numbers)
        if choice.better(candidate, best):
            best, at = candidate, numbers
    return at, best, [list(at)]


def descend(
    choice: Choice, budget: Budget, index: list[int], params: ComponentAwareParams
) -> Found:
    """The best hardened point on the way of gradient descent; numbers per group, and the way."""
    best = choice.reach(budget, [0.0] * len(index))
    start = budget.offset([0.0] * len(index), choice.target)
    alpha = torch.full((max(index) + 1,), start).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=params.lr)
    # Ranks are spread evenly over 0-1; other positions are scaled to the same width.
    scale = 1.0 if params.coefficient == "share" else _width(budget)
    at, path = _spread(alpha.tolist(), index), [alpha.tolist()]
    for step in range(params.steps):
        done = step / params.steps
        optimizer.param_groups[0]["lr"] = params.lr * scale * (1 - done)
        temperature = scale * params.hot * (params.cold / params.hot) ** done
        optimizer.zero_grad()
        soft_loss(choice, budget, alpha[index], temperature).backward()
        optimizer.step()
        if params.coefficient == "share":
            with torch.no_grad():
                alpha.clamp_(0, params.most)
        path.append(alpha.tolist())
        if (step + 1) % params.check == 0 or step + 1 == params.steps:
            numbers = _spread(alpha.tolist(), index)
            candidate = choice.reach(budget, numbers)
            if choice.better(candidate, best):
                best, at = candidate, numbers
    return at, best, path


def _index(choice: Choice, per: str) -> list[int]:
    """The coefficient's number of each group; -1 where it is protected."""
    keys = [
        each.place if per == "component" and len(each.components) == 1 else each.name
        for each in choice.groups
    ]
    free = [key for key, still in zip(keys, choice.frozen, strict=True) if not still]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(free))}
    return [-1 if still else numbers[k] for k, still in zip(keys, choice.frozen, strict=True)]


def _spread(alpha: Sequence[float], index: list[int]) -> list[float]:
    """The coefficient of each group; anything for a protected one."""
    return [alpha[i] for i in index]


def _width(budget: Budget) -> float:
    """Twice the interquartile range: 1 for positions that are spread evenly over 0-1."""
    quarters = torch.cat(budget.positions).quantile(torch.tensor([0.25, 0.75]).double())
    return 2 * float(quarters[1] - quarters[0])


def soft_loss(choice: Choice, budget: Budget, numbers: Tensor, temperature: float) -> Tensor:
    """The loss of the descent at `numbers` (one per group) on the next training batch."""
    x, y = choice.batch()
    choice.passes += 3 * len(x)
    masks = soft_masks(choice, budget, numbers, temperature)
    output = masked_output(choice, masks, x)
    short = abs(choice.count.removed([m.sum() for m in masks]) - choice.target)
    penalty = torch.relu(short - choice.params.tolerance).square()
    for constraint in choice.application.constraints:
        smooth = choice.application.metrics[constraint.metric].smooth
        if smooth is not None:
            penalty = penalty + torch.relu(constraint.share(smooth(output, x, y))).square()
    return choice.loss(output, x, y) / choice.dense_loss + choice.params.strength * penalty


def soft_masks(choice: Choice, budget: Budget, numbers: Tensor, temperature: float) -> list[Tensor]:
    """m_gj = sigmoid((p_gj - alpha_g) / T), one (channels,) per group; ones where frozen."""
    masks = []
    for i, position in enumerate(budget.positions):
        p = position.to(choice.data[0][0])
        soft = torch.sigmoid((p - numbers[i].to(p)) / temperature)
        masks.append(torch.ones_like(p) if choice.frozen[i] else soft)
    return masks


def masked_output(choice: Choice, masks: Sequence[Tensor], x: Tensor) -> Any:
    """Output of the dense net with each channel times its mask where it is consumed.

    At masks of zeros and ones this is what the net without the zeros computes.
    """
    net = choice.small.dense
    weights = dict(net.named_parameters())
    norms = []
    for group, mask in zip(choice.plain, masks, strict=True):
        for member in group.members:
            layer = net.get_submodule(member.layer)
            if isinstance(layer, nn.LayerNorm):
                norms.append((layer, member.spread(mask)))
            if member.role == "consumes":
                name, weight = f"{member.layer}.weight", weights[f"{member.layer}.weight"]
                along, shape = axis_of(layer, "in"), [1] * weight.dim()
                shape[along] = -1
                spread = member.spread(mask)[: weight.shape[along]]
                weights[name] = weight * spread.view(shape)
    with _masked_norms(norms):
        return functional_call(net, weights, (x,))


@contextmanager
def _masked_norms(norms: list[tuple[nn.LayerNorm, Tensor]]) -> Iterator[None]:
    """Layer norms whose mean and variance weigh each feature by its mask."""

    def hook(layer: nn.LayerNorm, mask: Tensor):
        def masked(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> Tensor:
            x, total = inputs[0], mask.sum()
            mean = (x * mask).sum(-1, keepdim=True) / total
            variance = ((x - mean).square() * mask).sum(-1, keepdim=True) / total
            return (x - mean) * (variance + layer.eps).rsqrt() * layer.weight + layer.bias

        return layer.register_forward_hook(masked)

    handles = [hook(layer, mask) for layer, mask in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
