"""Networks as plain torch modules, and the registry that builds them by name."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from prunestudy.errors import InputError, require, require_one_of
from prunestudy.models.lenet import LeNet5, LeNet300

__all__ = ["LeNet5", "LeNet300", "build", "describe", "names", "task_of"]

Shape = tuple[int, int, int]
_SHAPE = "three positive integers (channels, height, width)"


class _Entry(NamedTuple):
    factory: Callable[[Shape, int], nn.Module]
    line: str
    task: str = "classify"


_REGISTRY = {
    "lenet5": _Entry(LeNet5, "Caffe's LeNet-5, 431,080 parameters on 1x28x28 and 10 classes"),
    "lenet300": _Entry(LeNet300, "LeNet-300-100, 266,610 parameters on 1x28x28 and 10 classes"),
}


def names() -> list[str]:
    """The names that `build` knows, sorted."""
    return sorted(_REGISTRY)


def describe() -> dict[str, str]:
    """One line about each network, by name."""
    return {name: _REGISTRY[name].line for name in names()}


def task_of(name: str) -> str:
    """What network `name` is trained for, a name of `measure.TASKS`."""
    require_one_of("model", name, names())
    return _REGISTRY[name].task


def build(name: str, shape: Shape, num_classes: int) -> nn.Module:
    """A freshly initialised network for images of `shape` (channels, height, width).

    It maps (batch, *shape) to logits (batch, num_classes), or to what its task says.
    Raises `InputError` for an unknown name, or a shape or class count that does not fit.
    """
    require_one_of("model", name, names())
    try:
        shape = tuple(shape)
    except TypeError:
        raise InputError(f"shape = {shape!r}: {_SHAPE}") from None
    require(
        len(shape) == 3 and all(type(n) is int and n > 0 for n in shape), "shape", shape, _SHAPE
    )
    require(type(num_classes) is int and num_classes > 0, "num_classes", num_classes, "at least 1")
    return _REGISTRY[name].factory(shape, num_classes)
