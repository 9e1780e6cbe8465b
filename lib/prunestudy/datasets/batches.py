"""Batches out of a set that lies in memory, each by one gather.

An image's place, shift and flip become the index of its first pixel and the direction in which its
rows are read; all pixels of a batch are then fetched at once, on the device.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from prunestudy.datasets.catalogue import DatasetInfo
from prunestudy.datasets.sources import ImageSet
from prunestudy.errors import require


class Batches:
    """Normalised batches of `images`, augmented by random shifts and flips.

    `batch_size` images a batch; `shift`: each image moves by a whole number of pixels, uniform in
    -shift..shift, in both directions, black coming in from the border (torchvision's
    RandomCrop(size, padding=shift)); `flip`: each is mirrored left to right with probability 1/2.
    The set is copied to `device` once, as uint8.

    Raises `InputError` if `batch_size` is below 1 or above the number of images, if `shift` is
    negative or not below the image's size, and if the images are not as `info` says.
    """

    def __init__(
        self,
        images: ImageSet,
        info: DatasetInfo,
        batch_size: int,
        *,
        shift: int = 0,
        flip: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        require_whole("batch_size", batch_size, 1, len(images))
        require_whole("shift", shift, 0, min(info.height, info.width) - 1)
        shape = (info.height, info.width, info.channels)
        found = tuple(images.images.shape[1:])
        require(
            found == shape, "images", found, f"{info.name} has (height, width, channels) {shape}"
        )
        known = len(info.mean) == len(info.std) == info.channels
        require(known, "info.mean", info.mean, "one value per channel, as in load(...).info")
        self.info, self.batch_size, self.shift = info, batch_size, shift
        self.flip, self.seed, self.device = flip, seed, torch.device(device)
        self.labels = images.labels.to(self.device)
        self._pad(images.images)
        self._normalised = Normalised(info, self.device)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def steps(self) -> int:
        """Batches in an epoch; the images that do not fill a last one are left out of it."""
        return len(self) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of epoch number `epoch` (from 0), from batch `start` on.

        Yields x (B, C, H, W) float32, channels_last, (pixel / 255 - mean) / std, and labels y (B,)
        int64. All random choices depend on (seed, epoch) only: a run resumed at `start` sees what
        an undisturbed one does.

        Raises `InputError` unless 0 <= `epoch` and 0 <= `start` <= `steps`.
        """
        require_whole("epoch", epoch, 0)
        require_whole("start", start, 0, self.steps)
        order, first, direction = (part.to(self.device) for part in self._draw(epoch))
        return (
            (self._gather(first[batch], direction[batch]), self.labels[order[batch]])
            for batch in slices(self.steps, self.batch_size, start)
        )

    def ordered(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order, not augmented, as `epoch` gives them; last batch short.

        Raises `InputError` if `batch_size` (by default that of the training) is below 1.
        """
        size = self.batch_size if batch_size is None else batch_size
        require_whole("batch_size", size, 1)
        first = self._first_pixel(torch.arange(len(self)), self.shift, self.shift).to(self.device)
        direction = torch.ones_like(first)
        return (
            (self._gather(first[batch], direction[batch]), self.labels[batch])
            for batch in slices(-(-len(self) // size), size)
        )

    def _pad(self, images: Tensor) -> None:
        """Keep the images as a list of pixels, each image with a black border of `shift`."""
        n, height, width, channels = images.shape
        border = 2 * self.shift
        self._height, self._width = height + border, width + border
        padded = images.new_zeros((n, self._height, self._width, channels), device=self.device)
        inner = slice(self.shift, self.shift + height), slice(self.shift, self.shift + width)
        padded[:, *inner] = images.to(self.device)
        # grey pixels as plain numbers: a gather of numbers is twice as fast as one of rows of one
        self._pixels = padded.view(-1, channels).squeeze(1)
        self._rows = torch.arange(height, device=self.device).view(-1, 1) * self._width
        self._columns = torch.arange(width, device=self.device)

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image, first pixel and direction of reading (1 or -1) at each place of an epoch."""
        n = len(self)
        # drawn on the CPU, so that the batches do not depend on the device
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(n, generator=generator)
        top, left = torch.randint(0, 2 * self.shift + 1, (2, n), generator=generator)
        mirrored = torch.zeros(n, dtype=torch.int64)
        if self.flip:
            mirrored = torch.randint(0, 2, (n,), generator=generator)
        first = self._first_pixel(order, top, left) + mirrored * (self.info.width - 1)
        return order, first, 1 - 2 * mirrored

    def _first_pixel(self, image: Tensor, top: Tensor | int, left: Tensor | int) -> Tensor:
        return (image * self._height + top) * self._width + left

    def _gather(self, first: Tensor, direction: Tensor) -> Tensor:
        """Fetch and normalise a batch: first pixels (B,) and directions (B,) to (B, C, H, W)."""
        index = (first.view(-1, 1, 1) + self._rows) + direction.view(-1, 1, 1) * self._columns
        pixels = self._pixels.index_select(0, index.view(-1))
        return self._normalised(pixels)


class Normalised:
    """(pixel / 255 - mean) / std as pixel * scale + offset, for a whole row of pixels."""

    def __init__(self, info: DatasetInfo, device: torch.device) -> None:
        self.shape = (-1, info.height, info.width, info.channels)
        mean, std = (torch.tensor(part, dtype=torch.float64) for part in (info.mean, info.std))
        # repeated along the row: broadcasting over three channels alone is four times slower
        self.scale = (1 / (255 * std)).repeat(info.width).float().to(device)
        self.offset = (-mean / std).repeat(info.width).float().to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels of whole images in order (B, H, W, C), in any shape, to (B, C, H, W) float32."""
        rows = pixels.view(-1, len(self.scale)).float()
        return rows.mul_(self.scale).add_(self.offset).view(self.shape).permute(0, 3, 1, 2)


def mix(seed: int, number: int) -> int:
    """A generator's seed for (seed, epoch); neighbouring pairs do not share one, as sums would."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    # 32 bits: torch's generator on the CPU uses no more of its seed
    return int.from_bytes(digest[:4], "big")


def slices(steps: int, size: int, start: int = 0) -> list[slice]:
    """Places in an epoch of the batches from number `start` on."""
    return [slice(step * size, (step + 1) * size) for step in range(start, steps)]


def require_whole(parameter: str, value: int, least: int, most: int | None = None) -> None:
    """Raise `InputError` unless `value` is a whole number from `least` to `most`."""
    allowed = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    ok = type(value) is int and value >= least and (most is None or value <= most)
    require(ok, parameter, value, allowed)
