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
falling; a shortfall is that of a limit, in units of the limit:

    m_gj = sigmoid((p_gj - alpha_g) / T),    loss = L(m) / L(1) + mu sum max(0, shortfall)^2

The gradient's part along n = dS/dalpha is taken out, so that a step keeps S, and a Newton step
n (rho - S) / n^2 brings S back to rho [D]. `hold` "penalty" adds instead
mu max(0, |S(m) - rho| - epsilon)^2 to the loss; with many groups its stiffness slows the descent.
Every `check` steps the coefficients are hardened (T = 0, the offset c by bisection) and judged on
the same images as a grid point; the best such point counts.

| here | code |
|---|---|
| alpha | `numbers` (one per coefficient; `_spread` gives one per group) |
| p | `positions` |
| m | `soft_masks` |
| S | 1 - `Channels.cost` / `Channels.dense` |
| rho, epsilon | `target`, `tolerance` |
| c | found in `Budget.meet` |
| n, mu | `normal`, `strength` |

Also ours, and switchable: `coefficient` "multiplier" takes p_gj = log of the importance, so that
exp(-alpha_g) multiplies a group's importance in one global ranking; `per` "component" gives the
internal groups of a component one coefficient in common; the importance within a group is a
first-order Taylor term of the application's loss, or the group's L2 norm. Unknown: all of this,
the paper's nets and its numbers.
"""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.methods.base import Params
from prunestudy.methods.channel_budget import Budget, spread_out
from prunestudy.methods.channel_choice import Choice, ChoiceParams, Point
from prunestudy.methods.channel_method import ChannelMethod
from prunestudy.methods.soft_channels import masked_output


class ComponentAwareParams(ChoiceParams):
    """`solver`, `coefficient` and `per` as above; `levels` of the grid for each coefficient.

    Of gradient descent: `steps` batches, Adam's `lr` falling to zero, `hot` and `cold` temperature
    at its ends (in units of p), how it is to `hold` the target, penalties' `strength` mu, `check`:
    steps between hardened points.
    """

    solver: Literal["gradient", "grid"] = "gradient"
    coefficient: Literal["share", "multiplier"] = "share"
    per: Literal["group", "component"] = "group"
    levels: Annotated[int, Field(ge=2, le=1000)] = 9
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 150
    lr: Annotated[float, Field(gt=0)] = 0.1
    hot: Annotated[float, Field(gt=0)] = 0.1
    cold: Annotated[float, Field(gt=0)] = 0.01
    hold: Literal["projection", "penalty"] = "projection"
    strength: Annotated[float, Field(gt=0)] = 1e4
    check: Annotated[int, Field(ge=1)] = 10


class ComponentAware(ChannelMethod):
    """One soft coefficient per group, found by gradient descent or on a grid."""

    name: ClassVar[str] = "component_aware"
    title: ClassVar[str] = "soft coefficients (ours)"
    Params: ClassVar[type[Params]] = ComponentAwareParams
    before_and_after: ClassVar[bool] = True

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
        grid = self.params.levels**self.coefficients * self.pruned.choice.samples
        return super().measures(model) | {
            "coefficients": self.coefficients,
            "grid_passes": grid,
            "search_saving": 1 - self.passes / grid,
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
        loss, removed = soft_loss(choice, budget, alpha[index], temperature)
        descend_step(alpha, optimizer, loss, removed - choice.target, params)
        if params.coefficient == "share":
            alpha.data.clamp_(0, params.most)
        path.append(alpha.tolist())
        if (step + 1) % params.check == 0 or step + 1 == params.steps:
            numbers = _spread(alpha.tolist(), index)
            candidate = choice.reach(budget, numbers)
            if choice.better(candidate, best):
                best, at = candidate, numbers
    return at, best, path


def descend_step(
    alpha: Tensor,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    over: Tensor,
    params: ComponentAwareParams,
) -> None:
    """One step of `alpha` down `loss` that keeps S - rho, now `over`, or is pulled back to it."""
    if params.hold == "penalty":
        off = torch.relu(over.abs() - params.tolerance).square()
        (alpha.grad,) = torch.autograd.grad(loss + params.strength * off, alpha)
        optimizer.step()
        return
    (normal,) = torch.autograd.grad(over, alpha, retain_graph=True)
    (downhill,) = torch.autograd.grad(loss, alpha)
    length = normal.square().sum().clamp(min=1e-12)
    alpha.grad = downhill - normal * (downhill @ normal) / length
    optimizer.step()
    alpha.data.sub_(normal * over.detach() / length)


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


def soft_loss(
    choice: Choice, budget: Budget, numbers: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss at `numbers` (one per group) on the next training batch, and the share removed S."""
    x, y = choice.batch()
    choice.passes += 3 * len(x)
    masks = soft_masks(choice, budget, numbers, temperature)
    output = masked_output(choice.small.dense, choice.plain, masks, x)
    goal = choice.application.objective
    if goal.smooth is None:
        loss = choice.loss(output, x, y) / choice.dense_loss
    else:
        loss = goal.smooth(output, x, y) * (1 if goal.direction == "lower" else -1)
    for constraint in choice.application.constraints:
        if constraint.smooth is not None:
            short = torch.relu(constraint.share(constraint.smooth(output, x, y)))
            loss = loss + choice.params.strength * short.square()
    return loss, 1 - choice.channels.cost(torch.cat(masks).cpu()) / choice.channels.dense


def soft_masks(choice: Choice, budget: Budget, numbers: Tensor, temperature: float) -> list[Tensor]:
    """m_gj = sigmoid((p_gj - alpha_g) / T), one (channels,) per group; ones where frozen."""
    masks = []
    for i, position in enumerate(budget.positions):
        p = position.to(choice.data[0][0])
        soft = torch.sigmoid((p - numbers[i].to(p)) / temperature)
        masks.append(torch.ones_like(p) if choice.frozen[i] else soft)
    return masks
