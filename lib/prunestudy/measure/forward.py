"""Calling a net without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from prunestudy.errors import InputError
from prunestudy.values import inputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and afterwards each of its modules back into its former mode."""
    former = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in former:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer of `model`; the CPU if it has none."""
    tensors = chain(model.parameters(), model.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def inputs_for(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], first: bool = False
) -> tuple[Tensor, ...]:
    """A copy of `inputs(example)` on the device of `model`, floating-point ones in its precision.

    With `first` a batch of the first input alone.
    """
    tensors = chain(model.parameters(), model.buffers())
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
    given = [x[:1] if first else x for x in inputs(example)]
    to = partial(Tensor.to, device=device_of(model), copy=True)  # nets may work in place
    return tuple(to(x, dtype=dtype if x.is_floating_point() else None) for x in given)


def run(model: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Call `model`; raises `InputError`, with the reason, where it does not take such inputs."""
    try:
        model(*args)
    except InputError:
        raise
    except Exception as error:  # a net may raise anything
        shown, why = [tuple(x.shape) for x in args], str(error).partition("\n")[0]
        name = type(model).__name__
        raise InputError(f"example = {shown}: {name} does not take it: {why}") from error
