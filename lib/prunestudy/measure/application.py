"""What an application asks of a net: metrics, limits on them, and a judgement.

    app = Application(task_metrics(task, 10), ("psnr >= 20", "accuracy >= 0.95"))
    app.judge(model, data).broken     # which limits do not hold, and by how much

`data` is a list of batches (x, y).
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from prunestudy.errors import InputError, require
from prunestudy.measure.boundary import IGNORED
from prunestudy.measure.tasks import Task

Data = Sequence[tuple[Any, Any]]


@dataclass(frozen=True)
class Metric:
    """`function` maps (model, data) to a number; `limit` is the worst that is allowed.

    `smooth` maps (output, x, y) to a differentiable tensor of the same unit, by which gradient
    descent respects the limit.
    """

    name: str
    direction: Literal["higher", "lower"]
    function: Callable[[nn.Module, Data], float]
    smooth: Callable[[Any, Any, Any], Tensor] | None = None
    limit: float = math.nan

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`; NaN never is, and anything is better than NaN."""
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return self.worse_by(a, b) < 0

    def worse_by(self, a: float | Tensor, b: float) -> float | Tensor:
        """By how much `a` is worse than `b`; negative where it is better."""
        return b - a if self.direction == "higher" else a - b

    def share(self, value: float | Tensor) -> float | Tensor:
        """By how much `value` breaks the limit, in units of its size; 0 or less where it holds."""
        return self.worse_by(value, self.limit) / max(abs(self.limit), 1e-12)

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.direction == 'higher' else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Judgement:
    """`values` of all metrics, and those whose limit is `broken`, with by how much (NaN: inf)."""

    values: dict[str, float]
    broken: tuple[tuple[Metric, float], ...]

    @property
    def holds(self) -> bool:
        """Whether every limit holds."""
        return not self.broken

    @property
    def shortfall(self) -> float:
        """Sum of the shortfalls, each in units of its limit's size; 0 where all hold."""
        return sum(m.share(self.values[m.name]) if by < math.inf else by for m, by in self.broken)

    def __str__(self) -> str:
        if self.holds:
            return "every constraint holds"
        return ", ".join(
            f"{m} is broken by {by:.4g} ({m.name} is {self.values[m.name]:.4g})"
            for m, by in self.broken
        )


class RefusedError(InputError):
    """No pruned model both meets the target and keeps the limits.

    `judgement` is that of the best one found, `closest` the largest share of the parameters that
    can be removed with every limit kept (0: not even the dense model keeps them).
    """

    def __init__(self, message: str, judgement: Judgement | None, closest: float) -> None:
        super().__init__(message)
        self.judgement, self.closest = judgement, closest


class Application:
    """Metrics, of which the first is the `objective`, and `constraints` such as "psnr >= 20".

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

    def _read(self, text: str) -> Metric:
        number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
        found = re.fullmatch(rf"\s*(\w+)\s*(>=|<=)\s*({number})\s*", str(text))
        right = found is not None and math.isfinite(float(found[3]))
        require(right, "constraint", text, "a metric, >= or <=, and a number, as in 'psnr >= 20'")
        name, sign, limit = found.groups()
        allowed = f"metrics are {', '.join(sorted(self.metrics))}"
        require(name in self.metrics, "constraint", text, allowed)
        metric = self.metrics[name]
        right = (sign == ">=") == (metric.direction == "higher")
        require(right, "constraint", text, f"{metric.direction} {name} is better")
        return replace(metric, limit=float(limit))

    def judge(self, model: nn.Module, data: Data) -> Judgement:
        """Every metric of `model` on `data`, and which limits it breaks."""
        values = {name: metric.function(model, data) for name, metric in self.metrics.items()}
        short = [(m, m.worse_by(values[m.name], m.limit)) for m in self.constraints]
        broken = [(m, math.inf if math.isnan(by) else by) for m, by in short if not by <= 0]
        return Judgement(values, tuple(broken))

    def cost(self, before: Judgement, after: Judgement) -> dict[str, float]:
        """By how much `after` is worse than `before`, in each metric; negative where better."""
        return {n: m.worse_by(after.values[n], before.values[n]) for n, m in self.metrics.items()}


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

    known = {  # by the names of the scores
        "classify": {"top1": ("accuracy", accuracy)},
        "reconstruct": {"psnr": ("psnr", psnr)},
        "reconstruct_and_classify": {"psnr": ("psnr", psnr), "top1": ("accuracy", accuracy)},
        "segment": {"miou": ("miou", miou), "pixel_accuracy": ("accuracy", accuracy)},
    }
    found = known.get(task.name, {task.metric_name: (task.metric_name, None)})
    return tuple(Metric(n, "higher", score(by), smooth) for by, (n, smooth) in found.items())


def _labelled(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (n, classes) and true classes (n,) of all images or pixels with a label."""
    rows, true = logits.movedim(1, -1).flatten(0, -2), y.flatten()
    known = true != IGNORED
    return rows.softmax(1)[known], true[known]
