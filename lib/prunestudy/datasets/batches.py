"""Batches of images in memory, each made by one gather on the device.

An image's place, shift and flip are the index of its first pixel and the direction of its rows.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from prunestudy.datasets.catalogue import DatasetInfo
from prunestudy.datasets.sources import ImageSet, require_whole
from prunestudy.errors import require


class Batches:
    """Normalised batches of `images`, augmented by random shifts and flips.

    `shift`: each image moves by a whole number of pixels, uniform in -shift..shift, in both
    directions, and black comes in from the border (torchvision's RandomCrop(size, padding=shift)).
    `flip`: each is mirrored left to right with probability 1/2. The images are copied to `device`
    once, as uint8. Raises `InputError` unless 1 <= `batch_size` <= number of images,
    0 <= `shift` < the image's size, and the images are as `info` says.
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
        known = len(info.mean) == len(info.std) == info.channels
        require(known, "info.mean", info.mean, "one value per channel, as in load(...).info")
        self.images, self.info, self.batch_size, self.shift = images, info, batch_size, shift
        self.flip, self.seed, self.device = flip, seed, torch.device(device)
        mean, std = (torch.tensor(part, dtype=torch.float64) for part in (info.mean, info.std))
        # repeated along a row: broadcasting over three channels alone is four times slower
        self._scale = (1 / (255 * std)).repeat(info.width).float().to(self.device)
        self._offset = (-mean / std).repeat(info.width).float().to(self.device)
        self._prepare()

    def _prepare(self) -> None:
        """Keep the images as a list of pixels, each image with a black border of `shift`."""
        height, width, channels = shape = self.info.height, self.info.width, self.info.channels
        require_whole("shift", self.shift, 0, min(height, width) - 1)
        found = tuple(self.images.images.shape[1:])
        allowed = f"{self.info.name} has (height, width, channels) {shape}"
        require(found == shape, "images", found, allowed)
        inner = (slice(self.shift, self.shift + size) for size in (height, width))
        self._height, self._width = height + 2 * self.shift, width + 2 * self.shift
        size = (len(self), self._height, self._width, channels)
        padded = torch.zeros(size, dtype=torch.uint8, device=self.device)
        padded[:, *inner] = self.images.images.to(self.device)
        # grey pixels as plain numbers: a gather of numbers is twice as fast as one of rows of one
        self._pixels = padded.view(-1, channels).squeeze(1)
        self._rows = torch.arange(height, device=self.device).view(-1, 1) * self._width
        self._columns = torch.arange(width, device=self.device)
        self.labels, self._most = self.images.labels.to(self.device), len(self)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def steps(self) -> int:
        """Number of full batches in an epoch; leftover images are not used in that epoch."""
        return len(self) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of epoch number `epoch` (from 0), from batch `start` on.

        Yields x (B, C, H, W) float32, channels_last, (pixel / 255 - mean) / std, and labels y (B,)
        int64, masks (B, H, W). All random choices depend on (seed, epoch) alone: a run resumed at
        `start` sees what an uninterrupted one does. Raises `InputError` unless 0 <= `epoch` and
        0 <= `start` <= `steps`.
        """
        return map(self.gather, self.places(epoch, start))

    def ordered(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order, not augmented, as `epoch` gives them; the last batch is short.

        `batch_size` is that of the training unless given. Raises `InputError` if it is below 1.
        """
        return map(self.gather, self._in_order(batch_size))

    def places(self, epoch: int, start: int = 0) -> list[Tensor]:
        """The arguments of `gather` for the batches of `epoch`, each (B, 3) int64 on the device."""
        require_whole("epoch", epoch, 0)
        require_whole("start", start, 0, self.steps)
        # drawn on the CPU, so that batches do not depend on the device
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(len(self), generator=generator)
        table, size = self._table(order, generator), self.batch_size
        return [table[at : at + size] for at in range(start * size, self.steps * size, size)]

    def _in_order(self, batch_size: int | None) -> tuple[Tensor, ...]:
        size = self.batch_size if batch_size is None else batch_size
        require_whole("batch_size", size, 1)
        return self._table(torch.arange(len(self))).split(min(size, self._most))

    def _table(self, order: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """First pixel, direction (1, -1) and number of the images in `order`: (N, 3) int64."""
        top, left = torch.full((2, len(self)), self.shift)
        mirrored = torch.zeros_like(order)
        if generator:
            top, left = torch.randint(0, 2 * self.shift + 1, (2, len(self)), generator=generator)
        if generator and self.flip:
            mirrored = torch.randint(0, 2, (len(self),), generator=generator)
        corner = (order * self._height + top) * self._width + left
        first = corner + mirrored * (self.info.width - 1)
        return torch.stack([first, 1 - 2 * mirrored, order], 1).to(self.device)

    def gather(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The batch for `places` (B, 3): first pixel, direction, number of each image."""
        first, direction, image = places.unbind(1)
        steps = direction.view(-1, 1, 1) * self._columns
        index = (first.view(-1, 1, 1) + self._rows) + steps
        pixels = self._pixels.index_select(0, index.view(-1))
        return self._normalise(pixels), self.labels[image]

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Pixels of whole images in order (B, H, W, C), in any shape, to (B, C, H, W) float32."""
        rows = pixels.view(-1, len(self._scale)).float().mul_(self._scale).add_(self._offset)
        shape = (-1, self.info.height, self.info.width, self.info.channels)
        return rows.view(shape).permute(0, 3, 1, 2)


def mix(*numbers: int) -> int:
    """A generator's seed for `numbers`; neighbouring tuples do not share one, as sums would."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    # 32 bits: torch's generator on the CPU uses no more of its seed
    return int.from_bytes(digest[:4], "big")
