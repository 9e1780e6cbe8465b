"""Anybody's batches, as the loop reads them: on the device, and the same again after a resume."""

from collections.abc import Iterator
from typing import Any

import torch

from prunestudy.datasets.batches import mix
from prunestudy.errors import require
from prunestudy.methods.base import Batch, moved
from prunestudy.train.deterministic import seed_default


class Loader:
    """An iterable of batches (x, y) with a length, a DataLoader for instance.

    Whatever draws from torch's own generator (shuffling, augmentation, workers' seeds) depends on
    (seed, epoch, step) only. Raises `InputError` for what has no length or no batch.
    """

    def __init__(self, batches: Any, seed: int, device: torch.device, parameter: str) -> None:
        allowed = "batches (x, y) with a length, such as a DataLoader"
        right = hasattr(batches, "__len__") and hasattr(batches, "__iter__")
        require(right, parameter, type(batches).__name__, allowed)
        self.steps, self._batches = len(batches), batches
        require(self.steps > 0, parameter, f"{type(batches).__name__} of length 0", allowed)
        self._seed, self._device, self._parameter = seed, device, parameter

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch` (from 0), from batch `start` on."""
        first = epoch * self.steps
        seed_default(mix(self._seed, first), self._device)
        batches = iter(self._batches)
        for step in range(self.steps):
            # The permutation is drawn with the first batch, and augmentation with each.
            seed_default(mix(self._seed, first + step), self._device)
            batch = next(batches, None)
            if batch is None:
                return
            if step >= start:
                yield self._checked(batch)

    def ordered(self, size: int | None = None) -> Iterator[Batch]:  # noqa: ARG002
        """All batches once; their size is the loader's own."""
        seed_default(mix(self._seed, 0), self._device)
        yield from map(self._checked, self._batches)

    def _checked(self, batch: Any) -> Batch:
        pair = isinstance(batch, list | tuple) and len(batch) == 2
        shown = f"a batch that is {type(batch).__name__}"
        require(pair, self._parameter, shown, "batches are pairs (x, y)")
        return moved(tuple(batch), self._device)
