"""Batches of images on disk, decoded by the worker processes of torch's DataLoader.

torchvision's v2 transforms crop and flip each image as its reference recipes do, ImageNet for
classification, VOC for segmentation.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from prunestudy.datasets.batches import Batches, mix
from prunestudy.datasets.catalogue import DatasetInfo
from prunestudy.datasets.folders import UNLABELLED, decode
from prunestudy.datasets.sources import ImageSet, require_whole
from prunestudy.errors import InputError, require

_MOST_VALUES = 2**24  # in the images of a batch that is not trained on


def batches_of(images: ImageSet, info: DatasetInfo, batch_size: int, **options: Any) -> Batches:
    """`Batches` of images in memory, `Stream` of images on disk; `options` as theirs."""
    kind = Batches if images.folder is None else Stream
    return kind(images, info, batch_size, **options)


class Stream(Batches):
    """Normalised batches of images on disk; arguments as those of `Batches`, and `workers`.

    Training images are cropped at random, in size and place (`RandomResizedCrop`; with masks
    resized to 0.5-2 times the side, padded and cropped), and mirrored if `flip`; what is drawn for
    an image depends on (seed, epoch, image) alone. Other images are resized and cropped in the
    middle; with masks they are whole, and padded; batches of these are made no larger than what a
    net makes of them fits into memory. `workers` processes decode them (by default one a core, at
    most 8; 0: none). Raises `InputError` as `Batches` does, and for a `shift`; and while it is read
    for an image that cannot be decoded and a mask that does not fit its image.
    """

    gather = None  # decoded by the workers, not gathered on the device

    def __init__(self, *arguments: Any, workers: int | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        self.workers = min(8, len(usable(0))) if workers is None else workers
        require_whole("workers", self.workers, 0)

    def _prepare(self) -> None:
        allowed = f"0: images of {self.info.name} are cropped at random"
        require(self.shift == 0, "shift", self.shift, allowed)
        values = self.info.channels * self.info.height * self.info.width
        self._most = max(1, _MOST_VALUES // values)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As of `Batches`."""
        transforms = training_transforms(self.info, self.flip)
        return self._decoded(self.places(epoch, start), transforms, epoch)

    def ordered(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """As of `Batches`."""
        return self._decoded(self._in_order(batch_size), plain_transforms(self.info))

    def _table(self, order: Tensor, generator: Any = None) -> Tensor:  # noqa: ARG002
        return order

    def _decoded(
        self, places: Sequence[Tensor], transforms: Callable, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Decoded(self.images, self.info, transforms, self.seed),
            batch_sampler=([(epoch, n) for n in batch.tolist()] for batch in places),
            num_workers=min(self.workers, len(places)),
            collate_fn=_stacked,
            generator=torch.Generator(),  # else it would draw from torch's own
        )
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            pixels, labels = (torch.from_numpy(part).to(self.device) for part in batch)
            yield self._normalise(pixels), labels.long()


class _Decoded(torch.utils.data.Dataset):
    """Pixels (H, W, C) uint8 and a label or a mask (H, W), seeded by (seed, epoch, index).

    Errors are returned as values: DataLoader would add the worker's traceback to a raised one.
    """

    def __init__(self, images: ImageSet, info: DatasetInfo, transforms: Callable, seed: int):
        self.images, self.info, self.transforms, self.seed = images, info, transforms, seed

    def __getitem__(self, at: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | InputError:
        epoch, index = at
        folder, target = self.images.folder, self.images.labels[index]
        try:
            image = decode(self.info.name, folder, self.images.images[index]).convert("RGB")
            if self.info.masks:
                target = self._mask(decode(self.info.name, folder, target), target, image.size)
        except InputError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, epoch, index))
            image, target = self.transforms(image, target)
        return np.asarray(image), target[0].numpy() if self.info.masks else target

    def _mask(self, mask: Image.Image, name: str, size: tuple[int, int]) -> tv_tensors.Mask:
        used = {label for label, count in enumerate(mask.histogram()) if count}
        right = mask.mode in ("L", "P") and used <= {*range(self.info.num_classes), UNLABELLED}
        allowed = f"{name} needs a class or {UNLABELLED} for each of {size} pixels"
        require(right and mask.size == size, "dataset", self.info.name, allowed)
        return tv_tensors.Mask(mask)


def _stacked(items: list) -> list[np.ndarray] | InputError:
    """Stack into numpy arrays; tensors would use shared memory, which is scarce in containers."""
    errors = [item for item in items if isinstance(item, InputError)]
    return errors[0] if errors else [np.stack(part) for part in zip(*items, strict=True)]


def training_transforms(info: DatasetInfo, flip: bool) -> Callable:
    """torchvision's v2 transforms of (image, target) in training."""
    size = (info.height, info.width)
    mirrored = [v2.RandomHorizontalFlip()] if flip else []
    if not info.masks:
        return v2.Compose([v2.RandomResizedCrop(size), *mirrored])
    resized = v2.RandomResize(min(size) // 2, 2 * min(size))
    cropped = v2.RandomCrop(size, pad_if_needed=True, fill=_fill(info))
    return v2.Compose([resized, *mirrored, cropped])


def plain_transforms(info: DatasetInfo) -> Callable:
    """The same for images that are not trained on; nothing is random."""
    size = (info.height, info.width)
    if info.masks:
        return v2.Compose([partial(_pad, info), v2.CenterCrop(size)])
    return v2.Compose([v2.Resize(round(min(size) * 256 / 224)), v2.CenterCrop(size)])


def _pad(info: DatasetInfo, image: Image.Image, mask: Tensor) -> tuple[Image.Image, Tensor]:
    """Pad an image and its mask, to the right and below, to the size of `info`."""
    more = [0, 0, max(0, info.width - image.width), max(0, info.height - image.height)]
    return v2.Pad(more, fill=_fill(info))(image, mask)


def _fill(info: DatasetInfo) -> dict[Any, Any]:
    """What borders are filled with: the mean colour, and no label."""
    return {tv_tensors.Mask: UNLABELLED, "others": tuple(round(255 * m) for m in info.mean)}
