"""What an application asks of a net: metrics by name, their smooth forms, and limits on them.

A net is judged by `Metrics.values`; gradient descent, which needs a slope, by the smooth forms.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.measure.boundary import IGNORED
from prunestudy.measure.tasks import METRICS, Batches, Task


@dataclass(frozen=True)
class Metrics:
    """`values(model, batches)` gives numbers by name, to be judged by the first.

    Higher is better, but for "loss". `smooth` has differentiable forms of some of them, functions
    of a batch's (output, x, y), in the same unit.
    """

    values: Callable[[nn.Module, Batches], Mapping[str, float]]
    smooth: Mapping[str, Callable[[Any, Any, Any], Tensor]] = field(default_factory=dict)


class _Limit(NamedTuple):
    """The worst `value` that a metric may have: the least (`sign` 1) or the largest (-1)."""

    metric: str
    sign: int
    value: float

    def share(self, value: float | Tensor) -> float | Tensor:
        """By how much `value` breaks the limit, in units of its size; differentiable."""
        return self.sign * (self.value - value) / max(abs(self.value), 1e-12)

    def shortfall(self, value: float) -> float:
        """The same, 0 where the limit holds and infinite for NaN."""
        return math.inf if math.isnan(value) else max(0, self.share(value))

    def broken(self, value: float) -> str:
        """A line on how `value` breaks the limit."""
        by = self.sign * (self.value - value)
        return f"{self} is broken by {by:.4g} ({self.metric} is {value:.4g})"

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.sign > 0 else '<='} {self.value:g}"


def limits(constraints: Iterable[str], known: Collection[str]) -> list[_Limit]:
    """Read constraints such as "psnr >= 20" on metrics that are `known` by name.

    Raises `InputError` for another form or name.
    """
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    made = []
    for text in constraints:
        found = re.fullmatch(rf"\s*(\w+)\s*(>=|<=)\s*({number})\s*", text)
        allowed = "a metric, >= or <=, and a number, as in 'psnr >= 20'"
        require(found is not None, "constraint", text, allowed)
        name, sign, limit = found.groups()
        require(name in known, "constraint", text, f"metrics are {', '.join(sorted(known))}")
        made.append(_Limit(name, 1 if sign == ">=" else -1, float(limit)))
    return made


def task_metrics(task: Task, num_classes: int | None) -> Metrics:
    """The metrics of `task`, its own first.

    psnr in dB (of the mean MSE); accuracy, of the images or of the pixels that have a label; miou.
    Smooth accuracy is the mean probability of the true class, smooth miou that of probabilities
    over the classes that occur.
    """
    names = METRICS[task.name]

    def values(model: nn.Module, batches: Batches) -> dict[str, float]:
        scores = task.evaluate(model, batches, num_classes)
        found = scores.more | {task.metric_name: scores.metric}
        return {name: found[by] for name, by in names.items()}

    def psnr(output: Any, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
        images = output[0] if isinstance(output, tuple) else output
        return -10 * (images - task.pixels(x)).square().mean().log10()

    def accuracy(output: Any, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
        chances, true = _labelled(output[1] if isinstance(output, tuple) else output, y)
        return chances.gather(1, true[:, None]).mean()

    def miou(output: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
        chances, true = _labelled(output, y)
        here = nn.functional.one_hot(true, chances.shape[1]).to(chances.dtype)
        both = (chances * here).sum(0)
        shares = both / (chances.sum(0) + here.sum(0) - both)
        return shares[here.sum(0) > 0].mean()

    smooth = {"psnr": psnr, "miou": miou, "accuracy": accuracy}
    return Metrics(values, {name: smooth[name] for name in names})


def constant_psnr(train: Tensor, test: Tensor) -> dict[str, float]:
    """PSNR in dB, on `test`, of two answers that look at no image: black, and the mean of `train`.

    Of the mean MSE, as a net's; images are uint8 (N, H, W, C).
    """
    pixels, mean = test.double() / 255, train.sum(0, dtype=torch.float64) / (255 * len(train))
    answers = {"black image": torch.zeros_like(mean), "mean image": mean}
    return {n: float(-10 * (pixels - a).square().mean().log10()) for n, a in answers.items()}


def _labelled(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (n, classes) and true classes (n,) of all images or pixels with a label."""
    rows, true = logits.movedim(1, -1).flatten(0, -2), y.flatten()
    known = true != IGNORED
    return rows.softmax(1)[known], true[known]
