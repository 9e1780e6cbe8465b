"""What every measurement needs to call a net without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prunestudy.errors import require


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and each of its modules back into its former mode after."""
    former = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in former:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """The device of the first tensor of `model`; the CPU if it has none."""
    return next((t.device for t in _tensors(model)), torch.device("cpu"))


def zeros(model: nn.Module, shape: tuple[int, ...], batch: int) -> Tensor:
    """An input (batch, *shape) of zeros, on the device and in the precision of `model`.

    Raises `InputError` unless sizes and batch are positive integers.
    """
    right = isinstance(shape, list | tuple) and all(type(n) is int and n > 0 for n in shape)
    require(right and len(shape) > 0, "shape", shape, "positive integers, without the batch")
    require(type(batch) is int and batch > 0, "batch", batch, "a positive integer")
    dtype = next((t.dtype for t in _tensors(model) if t.is_floating_point()), torch.float32)
    return torch.zeros(batch, *shape, device=device_of(model), dtype=dtype)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
