"""Wraps a user's batches for the loop: moved to the device, and reproducible after a resume."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from prunestudy.datasets.batches import mix
from prunestudy.errors import InputError, require
from prunestudy.methods.base import Batch
from prunestudy.train.process import seed_default


def moved(batch: Any, device: torch.device) -> Any:
    """`batch` with all its tensors on `device`."""
    return tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


class Loader:
    """An iterable of batches (x, y) with a length, a DataLoader for instance.

    Whatever draws from torch's own generator (shuffling, augmentation, workers' seeds) depends on
    (seed, epoch, step) only. Raises `InputError` for what has no length or no batch.
    """

    def __init__(self, batches: Any, seed: int, device: torch.device, parameter: str) -> None:
        allowed = "batches (x, y) with a length, such as a DataLoader"
        require(hasattr(batches, "__iter__"), parameter, type(batches).__name__, allowed)
        try:
            self.steps, self.given = len(batches), batches
        except TypeError:  # also a DataLoader over an iterable dataset
            raise InputError(f"{parameter} = {type(batches).__name__!r}: {allowed}") from None
        require(self.steps > 0, parameter, f"{type(batches).__name__} of length 0", allowed)
        self._seed, self._device, self._parameter = seed, device, parameter

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch` (from 0), from batch `start` on."""
        first = epoch * self.steps
        seed_default(mix(self._seed, first), self._device)
        batches = iter(self.given)
        for step in range(self.steps):
            # The permutation is drawn with the first batch, and augmentation with each.
            seed_default(mix(self._seed, first + step), self._device)
            batch = self._next(batches, step)
            if step >= start:
                yield self._checked(batch)

    def ordered(self, size: int | None = None) -> Iterator[Batch]:  # noqa: ARG002
        """All batches once; their size is the loader's own."""
        seed_default(mix(self._seed, 0), self._device)
        batches = iter(self.given)
        for step in range(self.steps):
            yield self._checked(self._next(batches, step))

    def _next(self, batches: Iterator[Any], step: int) -> Any:
        batch, short = next(batches, None), f"ends after {step} batches, its length is {self.steps}"
        require(batch is not None, self._parameter, type(self.given).__name__, short)
        return batch

    def _checked(self, batch: Any) -> Batch:
        pair = isinstance(batch, list | tuple) and len(batch) == 2
        shown = f"a batch that is {type(batch).__name__}"
        require(pair, self._parameter, shown, "batches are pairs (x, y)")
        tensors, labels = map(tree_leaves, batch)
        shown = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in tensors]
        right = all(isinstance(t, Tensor) and t.dim() and len(t) for t in tensors)
        alike = right and len({len(t) for t in tensors}) == 1
        allowed = "x is a tensor (n, ...), or tensors of the same n of at least 1"
        require(alike, self._parameter, shown, allowed)
        number = any(isinstance(t, Tensor) and not t.dim() for t in labels)
        require(not number, self._parameter, "a y that is one number", "a y for each sample")
        return moved(tuple(batch), self._device)
