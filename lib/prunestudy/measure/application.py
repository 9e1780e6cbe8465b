"""What an application asks of a net: metrics, limits on them, and a judgement.

    app = Application(task_metrics(task, 10), ("psnr >= 20", "accuracy >= 0.95"))
    app.judge(model, data).broken          # which limits do not hold, and by how much
    app.recheck(model, new_data, before)   # the same model, later, on other data

`data` is a list of batches (x, y).
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from prunestudy.errors import InputError, require
from prunestudy.measure.boundary import IGNORED
from prunestudy.measure.tasks import Task

Data = Sequence[tuple[Any, Any]]


@dataclass(frozen=True)
class Metric:
    """`function` maps (model, data) to a number; `direction` says which way is better.

    `smooth`, where there is one, maps a batch's (output, x, y) to a differentiable tensor of the
    same unit and direction: gradient descent needs it to respect a limit.
    """

    name: str
    direction: Literal["higher", "lower"]
    function: Callable[[nn.Module, Data], float]
    smooth: Callable[[Any, Any, Any], Tensor] | None = None

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`; NaN never is, and anything is better than NaN."""
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return self.worse_by(a, b) < 0

    def worse_by(self, a: float | Tensor, b: float) -> float | Tensor:
        """By how much `a` is worse than `b`; negative where it is better."""
        return b - a if self.direction == "higher" else a - b


@dataclass(frozen=True)
class _Limit:
    """The worst `limit` that the metric of that name, `of`, may have."""

    metric: str
    limit: float
    of: Metric

    def shortfall(self, value: float) -> float:
        """By how much `value` breaks the limit; 0 or less where it holds, infinite for NaN."""
        return math.inf if math.isnan(value) else self.of.worse_by(value, self.limit)

    def share(self, value: float | Tensor) -> float | Tensor:
        """The shortfall of `value` in units of the limit's size; differentiable."""
        return self.of.worse_by(value, self.limit) / max(abs(self.limit), 1e-12)

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.of.direction == 'higher' else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Judgement:
    """`values` of all metrics, and the limits that are `broken`, each with its shortfall."""

    values: dict[str, float]
    broken: tuple[tuple[_Limit, float], ...]

    @property
    def holds(self) -> bool:
        """Whether every limit holds."""
        return not self.broken

    @property
    def shortfall(self) -> float:
        """Sum of the shortfalls, each in units of its limit's size; 0 where all hold."""
        return sum(c.share(self.values[c.metric]) if by < math.inf else by for c, by in self.broken)

    def __str__(self) -> str:
        if self.holds:
            return "every constraint holds"
        return ", ".join(
            f"{c} is broken by {by:.4g} ({c.metric} is {self.values[c.metric]:.4g})"
            for c, by in self.broken
        )


class RefusedError(InputError):
    """Says that no pruned model both meets its target and keeps the limits.

    `judgement` is that of the best one found, `closest` the largest share of the parameters that
    can be removed with every limit kept (0: not even the dense model keeps them).
    """

    def __init__(self, message: str, judgement: Judgement | None, closest: float) -> None:
        super().__init__(message)
        self.judgement, self.closest = judgement, closest


class Application:
    """Metrics and limits; the first metric, the `objective`, is to be as good as possible.

    Raises `InputError` for two metrics of one name, a constraint on an unknown metric, and one that
    limits its metric from the wrong side.
    """

    def __init__(self, metrics: Iterable[Metric], constraints: Iterable[str] = ()) -> None:
        listed = tuple(metrics)
        require(bool(listed), "metrics", listed, "at least one")
        self.metrics = {metric.name: metric for metric in listed}
        distinct = len(self.metrics) == len(listed)
        require(distinct, "metrics", [m.name for m in listed], "each name once")
        self.constraints = tuple(self._read(text) for text in constraints)
        self.objective = listed[0]

    def _read(self, text: str) -> _Limit:
        number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
        found = re.fullmatch(rf"\s*(\w+)\s*(>=|<=)\s*({number})\s*", str(text))
        allowed = "a metric, >= or <=, and a number, as in 'psnr >= 20'"
        require(found is not None, "constraint", text, allowed)
        name, sign, limit = found.groups()
        allowed = f"metrics are {', '.join(sorted(self.metrics))}"
        require(name in self.metrics, "constraint", text, allowed)
        metric = self.metrics[name]
        right = (sign == ">=") == (metric.direction == "higher")
        require(right, "constraint", text, f"{metric.direction} {name} is better")
        return _Limit(name, float(limit), metric)

    def judge(self, model: nn.Module, data: Data) -> Judgement:
        """Every metric of `model` on `data`, and which limits it breaks."""
        values = {name: metric.function(model, data) for name, metric in self.metrics.items()}
        short = [(c, c.shortfall(values[c.metric])) for c in self.constraints]
        return Judgement(values, tuple((c, by) for c, by in short if by > 0))

    def recheck(self, model: nn.Module, data: Data, before: Judgement) -> list[dict[str, Any]]:
        """Judge `model` again on new `data`: one row per metric, then and now, limit, holds.

        `before` is the judgement it was accepted with.
        """
        now = self.judge(model, data)
        return [
            {
                "metric": name,
                "then": before.values[name],
                "now": now.values[name],
                "worse by": loss,
                "limit": " and ".join(str(c) for c in self.constraints if c.metric == name),
                "holds": all(c.metric != name for c, _ in now.broken),
            }
            for name, loss in self.cost(before, now).items()
        ]

    def cost(self, before: Judgement, after: Judgement) -> dict[str, float]:
        """By how much `after` is worse than `before`, in each metric; negative where better."""
        return {n: m.worse_by(after.values[n], before.values[n]) for n, m in self.metrics.items()}


# Metrics of each task, by the names of its scores.
_METRICS = {
    "classify": {"accuracy": "top1"},
    "reconstruct": {"psnr": "psnr"},
    "reconstruct_and_classify": {"psnr": "psnr", "accuracy": "top1"},
    "segment": {"miou": "miou", "accuracy": "pixel_accuracy"},
}


def task_metrics(task: Task, num_classes: int | None) -> tuple[Metric, ...]:
    """The metrics of `task`, its own first; higher is better.

    psnr in dB (of the mean MSE); accuracy, of the images or of the pixels that have a label; miou.
    Smooth accuracy is the mean probability of the true class, smooth miou that of probabilities
    over the classes that occur.
    """

    def score(name: str) -> Callable[[nn.Module, Data], float]:
        def measured(model: nn.Module, data: Data) -> float:
            scores = task.evaluate(model, data, num_classes)
            return scores.metric if name == task.metric_name else scores.more[name]

        return measured

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
    scored = _METRICS.get(task.name, {task.metric_name: task.metric_name})
    known = task.name in _METRICS  # an own metric may be called accuracy, and be another
    return tuple(
        Metric(name, "higher", score(by), smooth[name] if known else None)
        for name, by in scored.items()
    )


def _labelled(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (n, classes) and true classes (n,) of all images or pixels with a label."""
    rows, true = logits.movedim(1, -1).flatten(0, -2), y.flatten()
    known = true != IGNORED
    return rows.softmax(1)[known], true[known]
