"""What an application asks of a net: metrics of its own, limits on them, a verdict.

A metric is a function of (model, data) with a name and a direction; data is a list of batches
(x, y), so that it can be read again. A constraint is a limit on a metric: "psnr >= 20".

    app = Application(task_metrics(task, 10), ("psnr >= 20", "accuracy >= 0.95"))
    app.judge(model, data).broken          # which limits do not hold, and by how much
    app.recheck(model, new_data, before)   # the same model, later, on other data
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

Data = Sequence[tuple[Tensor, Tensor]]
_LIMIT = re.compile(r"\s*(\w+)\s*(>=|<=)\s*(\S+)\s*")


@dataclass(frozen=True)
class Metric:
    """`function` maps (model, data) to a number; `direction` says which way is better.

    `smooth`, where there is one, maps a batch's (output, x, y) to a differentiable tensor of the
    same unit and direction: gradient descent needs it to respect a limit on the way.
    """

    name: str
    direction: Literal["higher", "lower"]
    function: Callable[[nn.Module, Data], float]
    smooth: Callable[[object, Tensor, Tensor], Tensor] | None = None

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`; NaN never is, and anything is better than NaN."""
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return a > b if self.direction == "higher" else a < b


@dataclass(frozen=True)
class Constraint:
    """A limit on the metric of that name: `sign` is ">=" or "<="."""

    metric: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Constraint":
        """Read a limit such as "psnr >= 20"; `InputError` if it is not one."""
        found = _LIMIT.fullmatch(text) if isinstance(text, str) else None
        allowed = "a metric, >= or <=, and a number, as in 'psnr >= 20'"
        require(found is not None, "constraint", text, allowed)
        try:
            limit = float(found[3])
        except ValueError:
            limit = math.nan
        require(math.isfinite(limit), "constraint", text, allowed)
        return cls(found[1], found[2], limit)

    def shortfall(self, value: float) -> float:
        """By how much `value` breaks the limit; 0 or less where it holds, infinite for NaN."""
        by = self.limit - value if self.sign == ">=" else value - self.limit
        return math.inf if math.isnan(value) else by

    def share(self, value: float | Tensor) -> float | Tensor:
        """The shortfall of `value` in units of the limit's size; differentiable."""
        by = self.limit - value if self.sign == ">=" else value - self.limit
        return by / max(abs(self.limit), 1e-12)

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.limit:g}"


@dataclass(frozen=True)
class Judgement:
    """`values` of all metrics, and the limits that are `broken`, each with its shortfall."""

    values: dict[str, float]
    broken: tuple[tuple[Constraint, float], ...]

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
    """A pruned model that breaks a limit or misses its target is not handed out.

    `judgement` says what the best point found does, `closest` the largest share of the parameters
    that could be removed with every limit kept (0: not even the dense model keeps them).
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

    def _read(self, text: str) -> Constraint:
        constraint = Constraint.parse(text)
        allowed = f"metrics are {', '.join(sorted(self.metrics))}"
        require(constraint.metric in self.metrics, "constraint", text, allowed)
        direction = self.metrics[constraint.metric].direction
        right = (constraint.sign == ">=") == (direction == "higher")
        require(right, "constraint", text, f"{direction} {constraint.metric} is better")
        return constraint

    def judge(self, model: nn.Module, data: Data) -> Judgement:
        """Every metric of `model` on `data`, and which limits it breaks."""
        values = {name: metric.function(model, data) for name, metric in self.metrics.items()}
        short = [(c, c.shortfall(values[c.metric])) for c in self.constraints]
        return Judgement(values, tuple((c, by) for c, by in short if by > 0))

    def recheck(self, model: nn.Module, data: Data, before: Judgement) -> list[dict[str, Any]]:
        """Judge `model` again on new `data`: one row per metric, then and now, limit, holds.

        `before` is the judgement it was accepted with; a metric that got worse has drifted.
        """
        now = self.judge(model, data)
        return [
            {
                "metric": name,
                "then": before.values[name],
                "now": value,
                "worse by": loss,
                "limit": " and ".join(str(c) for c in self.constraints if c.metric == name),
                "holds": not any(c.metric == name for c, _ in now.broken),
            }
            for (name, value), loss in zip(
                now.values.items(), self.cost(before, now).values(), strict=True
            )
        ]

    def cost(self, before: Judgement, after: Judgement) -> dict[str, float]:
        """By how much `after` is worse than `before`, in each metric; negative where better."""
        rises = {name: after.values[name] - before.values[name] for name in self.metrics}
        lower = {name for name, metric in self.metrics.items() if metric.direction == "lower"}
        return {name: rise if name in lower else -rise for name, rise in rises.items()}


def task_metrics(task: Task, num_classes: int) -> tuple[Metric, ...]:
    """The metrics of a `measure.task`, its own first.

    psnr in dB (of the mean MSE); accuracy, of the images or of the pixels that have a label; miou.
    """

    def score(name: str) -> Callable[[nn.Module, Data], float]:
        def measured(model: nn.Module, data: Data) -> float:
            scores = task.evaluate(model, data, num_classes)
            return scores.metric if name == task.metric_name else scores.more[name]

        return measured

    def smooth_psnr(output: object, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
        images = output[0] if task.name == "reconstruct_and_classify" else output
        return -10 * (images - task.pixels(x)).square().mean().log10()

    def smooth_accuracy(output: object, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
        logits = output[1] if task.name == "reconstruct_and_classify" else output
        # The probability of the true class stands in for being right, which has no gradient.
        chances, true = _labelled(logits, y)
        return chances.gather(1, true[:, None]).mean()

    def smooth_miou(output: object, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
        # As the metric, of probabilities: of the classes that occur.
        chances, true = _labelled(output, y)
        here = nn.functional.one_hot(true, num_classes).to(chances.dtype)
        both = (chances * here).sum(0)
        shares = both / (chances.sum(0) + here.sum(0) - both)
        return shares[here.sum(0) > 0].mean()

    smooth = {"psnr": smooth_psnr, "miou": smooth_miou, "accuracy": smooth_accuracy}
    return tuple(
        Metric(name, "higher", score(scored), smooth[name])
        for name, scored in _METRICS[task.name].items()
    )


# Metrics of each task, by the names of its scores.
_METRICS = {
    "classify": {"accuracy": "top1"},
    "reconstruct": {"psnr": "psnr"},
    "reconstruct_and_classify": {"psnr": "psnr", "accuracy": "top1"},
    "segment": {"miou": "miou", "accuracy": "pixel_accuracy"},
}


def _labelled(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (n, classes) and true classes (n,) of all images or pixels with a label."""
    rows, true = logits.movedim(1, -1).flatten(0, -2), y.flatten()
    known = true != IGNORED
    return rows.softmax(1)[known], true[known]
