"""What a net is judged by: the loss and the metric, a user's or the default ones."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunestudy.errors import InputError, refused, require
from prunestudy.measure import Metrics
from prunestudy.measure.forward import evaluating
from prunestudy.methods.base import Batch, call, mean_loss
from prunestudy.shrink.fold import copied

Metric = Callable[[nn.Module, Any], float | Mapping[str, float]]
Batches = Sequence[Batch]


class Score:
    """The validation's numbers of a net: the loss, and those of the metric."""

    def __init__(self, loss: Callable[..., Tensor], metric: Metric | None, batches: Any) -> None:
        self.loss, self.metric, self.batches = loss, metric, batches

    def __call__(self, model: nn.Module, batches: Batches | None = None) -> dict[str, float]:
        """All numbers by name, the one to judge by first, of validation or of other `batches`."""
        if batches is None and self.batches is None:
            return {}
        read = (lambda: self.batches.ordered(512)) if batches is None else lambda: batches
        found = {}
        # Not inference_mode: a net may keep tensors that it made here, and train with them.
        with evaluating(model), torch.no_grad():
            if self.metric:
                with _tried("metric", self.metric):
                    found = _numbers(self.metric(model, read()))
            if "loss" not in found:
                with _tried("loss", self.loss):
                    found["loss"] = mean_loss(model, self.loss, read())
        return found

    def try_first(self, model: nn.Module) -> None:
        """Raise `InputError` for validation or a metric that cannot be used; it changes nothing."""
        with torch.random.fork_rng(devices=[]), evaluating(net := copied(model)):
            batch = next(iter(self.batches.ordered(512)))
            try:
                self(net, [batch])
            except InputError:  # the batch may be wrong; and a metric may need more than one
                with _tried("validation", getattr(self.batches, "given", self.batches)):
                    if self.metric in (None, top1):
                        mean_loss(net, self.loss, [batch])
                    else:
                        call(net, batch[0])
                self(net)


def top1(model: nn.Module, batches: Any) -> dict[str, float]:
    """The share (0-1) of right labels: of outputs (n, classes, ...), the largest along classes.

    Labels of -100 do not count, as in torch's cross-entropy.
    """
    right = count = 0
    for x, y in batches:
        right += int((call(model, x).argmax(1) == y).sum())
        count += int((y.long() != -100).sum())
    return {"top1": right / count}


def default_metric(net: nn.Module, x: Any, y: Any) -> Metric | None:
    """`top1` where the net gives scores of classes and `y` are labels."""
    with evaluating(net), torch.no_grad():
        output = call(net, x)
    scores = _are_labels(y) and isinstance(output, Tensor) and output.dim() > 1
    return top1 if scores and output.argmax(1).shape == y.shape else None


def checked_metrics(metrics: Metrics) -> Metrics:
    """`metrics` whose failures on a batch are one line."""

    def values(model: nn.Module, batches: Any) -> dict[str, float]:
        with _tried("metrics", metrics.values):
            return _numbers(metrics.values(model, batches))

    def smooth(name: str, output: Any, x: Any, y: Any) -> Tensor:
        with _tried("metrics", metrics.smooth[name]):
            value = metrics.smooth[name](output, x, y)
        allowed = "smooth: a function that gives a tensor"
        require(isinstance(value, Tensor), "metrics", name, allowed)
        return value

    return Metrics(values, {name: partial(smooth, name) for name in metrics.smooth})


def _numbers(found: Any) -> dict[str, float]:
    """What a metric gave, as numbers by name."""
    found = {"metric": found} if not isinstance(found, Mapping) else found
    if not found:
        raise ValueError("gives no number")
    return {str(name): float(value) for name, value in found.items()}


def _tried(parameter: str, given: Any) -> AbstractContextManager[None]:
    """Turns what `given`, a user's object, raises inside into `InputError`."""
    return refused(parameter, _name(given), "fails on a batch")


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _shapes(x: Any) -> Any:
    return tree_map(lambda t: tuple(t.shape) if isinstance(t, Tensor) else t, x)


def _squared(output: Tensor, y: Any) -> Tensor:
    """Mean squared error, of equal shapes only: torch would repeat the smaller."""
    require(isinstance(y, Tensor), "y", type(y).__name__, "a tensor; of others, give the loss")
    shapes = tuple(output.shape), tuple(y.shape)
    require(shapes[0] == shapes[1], "y", shapes[1], f"the shape of the output, {shapes[0]}")
    return F.mse_loss(output, y)


def _cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y.long())


def _are_labels(y: Any) -> bool:
    return isinstance(y, Tensor) and not y.is_floating_point()


def checked_loss(loss: Any, net: nn.Module, x: Any, y: Any) -> Callable[[Any, Any, Any], Tensor]:
    """The loss as a function of (output, x, y), tried on a few samples."""
    loss = loss or (_cross_entropy if _are_labels(y) else _squared)
    name, allowed = _name(loss), "a function of (output, y) or (output, x, y)"
    require(callable(loss), "loss", name, allowed)
    try:
        form = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except ValueError:  # of functions written in C
        raise InputError(f"loss = {name!r}: {allowed}, in Python") from None
    needed = [p for p in form.parameters.values() if p.default is p.empty]
    function = loss
    if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed) < 3:
        function = lambda output, _, y: loss(output, y)  # noqa: E731
        function.__name__ = name
    with evaluating(net), torch.no_grad():
        with refused("train", _shapes(x), "the net does not take a batch"):
            output = call(net, x)
        with _tried("loss", loss):
            value = function(output, x, y)
    scalar = isinstance(value, Tensor) and value.dim() == 0
    require(scalar, "loss", name, "a function that gives one number, a 0-d tensor")
    return function
