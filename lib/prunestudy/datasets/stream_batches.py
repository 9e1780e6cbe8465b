"""Batches of images that are on disk, decoded by worker processes.

torchvision's v2 transforms cut and flip each image (of ImageNet as its reference recipes for
classification do, of VOC as those for segmentation). What is drawn for an image depends on (seed,
epoch, place in the epoch) alone, so that batches do not depend on the number of workers, nor on
where in an epoch a run goes on. Workers write pixels into memory that they share with the main
process and that is used again and again. Normalisation is done on the device.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, default_convert

from prunestudy.datasets.batches import Batches, Normalised, mix, require_whole, slices
from prunestudy.datasets.catalogue import DatasetInfo
from prunestudy.datasets.streams import UNLABELLED, StreamSet, cores
from prunestudy.errors import InputError, require

_MOST_VALUES = 2**24  # in the images of one batch that is only looked at
_MOST_WORKERS = 8
_AHEAD = 2  # batches that each worker is ahead
_SHARED = Path("/dev/shm")  # shared memory, on Linux


def batches_of(
    images: Any, info: DatasetInfo, batch_size: int, **options: Any
) -> "Batches | StreamBatches":
    """`Batches` of an `ImageSet`, `StreamBatches` of a `StreamSet`; `options` as theirs."""
    kind = StreamBatches if isinstance(images, StreamSet) else Batches
    return kind(images, info, batch_size, **options)


class StreamBatches:
    """Normalised batches of a `StreamSet`; the interface is that of `Batches`.

    Training images are cut out at random, in size and place (`RandomResizedCrop`; with masks
    resized to 0.5-2 times the side, padded and cropped), with `flip` mirrored with probability
    1/2. `workers` processes decode them (by default one a core, at most 8; 0: none), fewer where
    shared memory is short.

    Raises `InputError` if `batch_size` does not fit, and for a `shift`.
    """

    def __init__(
        self,
        images: StreamSet,
        info: DatasetInfo,
        batch_size: int,
        *,
        shift: int = 0,
        flip: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
        workers: int | None = None,
    ) -> None:
        require_whole("batch_size", batch_size, 1, len(images))
        require(shift == 0, "shift", shift, f"0: images of {info.name} are cut out at random")
        self.workers = min(_MOST_WORKERS, cores()) if workers is None else workers
        require_whole("workers", self.workers, 0)
        self.images, self.info, self.batch_size = images, info, batch_size
        self.flip, self.seed, self.device = flip, seed, torch.device(device)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def steps(self) -> int:
        """Batches in an epoch; the images that do not fill a last one are left out of it."""
        return len(self) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of epoch number `epoch` (from 0), from batch `start` on.

        Yields x (B, 3, H, W) float32, channels_last, normalised, and labels y (B,), or masks
        (B, H, W), int64. Raises `InputError` unless 0 <= `epoch` and 0 <= `start` <= `steps`, and
        for an image that cannot be decoded.
        """
        require_whole("epoch", epoch, 0)
        require_whole("start", start, 0, self.steps)
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(len(self), generator=generator)
        seeds = torch.randint(2**31, (len(self),), generator=generator)
        transforms = training_transforms(self.info, self.flip)
        return self._read(order, seeds, slices(self.steps, self.batch_size, start), transforms)

    def ordered(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order, their middle cut out; with masks the whole image, padded.

        `batch_size` (by default that of the training) is a wish: batches are as small as it takes
        to keep what a net makes of them in memory. The last one may be short. Raises `InputError`
        as `epoch` does.
        """
        size = self.batch_size if batch_size is None else batch_size
        require_whole("batch_size", size, 1)
        values = self.info.channels * self.info.height * self.info.width
        size = min(size, max(1, _MOST_VALUES // values))
        order = torch.arange(len(self))
        at = slices(math.ceil(len(self) / size), size)
        return self._read(order, torch.zeros_like(order), at, looking_transforms(self.info))

    def _read(
        self, order: Tensor, seeds: Tensor, at: list[slice], transforms: Callable
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the images `order`, decoded with their `seeds`, for each slice of `at`."""
        places = [(n, order.numpy()[part], seeds.numpy()[part]) for n, part in enumerate(at)]
        normalised = Normalised(self.info, self.device)
        size = max((len(images) for _, images, _ in places), default=1)
        shape = (size, self.info.height, self.info.width, self.info.channels)
        workers = min(self.workers, len(places), _workers_that_fit(math.prod(shape)))
        slots = _slots(shape, workers)
        loader = DataLoader(
            _Decoded(self.images, transforms, slots),
            batch_sampler=places,
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            collate_fn=default_convert,  # as it is
            generator=torch.Generator(),  # else it would draw from torch's own
        )
        for step, batch in enumerate(loader):
            if isinstance(batch, InputError):
                raise batch
            x = self._moved(slots[step % len(slots), : len(batch)])
            x = _floats(x) if x.device.type == "cpu" else x
            yield normalised(x), self._moved(batch).long()

    def _moved(self, part: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return part.to(self.device)
        return part.pin_memory().to(self.device, non_blocking=True)


def _slots(shape: tuple[int, ...], workers: int) -> Tensor:
    """Room for the images of all batches on their way: (slots, B, H, W, C) uint8.

    The loader asks for a batch when it gives out the one that lies `_AHEAD * workers` before: one
    slot more, and none is written to before its images were read.
    """
    slots = torch.empty((_AHEAD * workers + 1, *shape), dtype=torch.uint8)
    return slots.share_memory_() if workers else slots


def _workers_that_fit(size: int) -> int:
    """Workers for whose batches of `size` bytes shared memory has room: containers have little."""
    if not _SHARED.is_dir():
        return _MOST_WORKERS
    free = shutil.disk_usage(_SHARED).free // 2  # the rest for labels, masks and other processes
    return max(0, free // size - 1) // _AHEAD


def training_transforms(info: DatasetInfo, flip: bool) -> Callable:
    """torchvision's v2 transforms of (image, target) in training."""
    from torchvision.transforms import v2

    size = (info.height, info.width)
    mirrored = [v2.RandomHorizontalFlip()] if flip else []
    if not info.masks:
        return v2.Compose([v2.RandomResizedCrop(size), *mirrored])
    side = min(size)
    resized = v2.RandomResize(side // 2, 2 * side)
    cropped = v2.RandomCrop(size, pad_if_needed=True, fill=_fill(info))
    return v2.Compose([resized, *mirrored, cropped])


def looking_transforms(info: DatasetInfo) -> Callable:
    """The same for images that are only looked at; draws nothing."""
    from torchvision.transforms import v2

    size = (info.height, info.width)
    if info.masks:
        return v2.Compose([partial(_pad, info), v2.CenterCrop(size)])
    larger = v2.Resize(round(min(size) * 256 / 224))
    return v2.Compose([larger, v2.CenterCrop(size)])


class _Decoded(torch.utils.data.Dataset):
    """What a worker does: images into a slot, (B, H, W, C) uint8; labels or masks are handed on.

    A batch is its number, which says in which slot it belongs, its images and their seeds. An error
    is handed on as a value: raised, it would grow a traceback.
    """

    def __init__(self, images: StreamSet, transforms: Callable, slots: Tensor) -> None:
        self.images, self.transforms, self.slots = images, transforms, slots

    def __getitems__(self, batch: tuple[int, np.ndarray, np.ndarray]) -> Tensor | InputError:
        number, order, seeds = batch
        slot = self.slots[number % len(self.slots), : len(order)].numpy()
        places = zip(order.tolist(), seeds.tolist(), slot, strict=True)
        try:
            return default_collate([self._decode(*place) for place in places])
        except InputError as error:
            return error

    def _decode(self, index: int, seed: int, pixels: np.ndarray) -> Tensor | int:
        """Write the image at `index` into `pixels` (H, W, C); gives its target."""
        pair = self.images.read(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the transforms draw from it
            image, target = self.transforms(*pair)
        np.copyto(pixels, np.asarray(image))
        return target if isinstance(target, int) else target[0].as_subclass(Tensor)


def _pad(info: DatasetInfo, image: Image.Image, mask: Tensor) -> tuple[Image.Image, Tensor]:
    """Pad an image and its mask, to the right and below, to the size of `info`."""
    from torchvision.transforms.v2 import functional as tv

    sizes = zip((info.width, info.height), image.size, strict=True)
    more = [0, 0, *(max(0, want - have) for want, have in sizes)]
    fill = _fill(info)
    return tv.pad(image, more, fill=fill["others"]), tv.pad(mask, more, fill=fill[type(mask)])


def _fill(info: DatasetInfo) -> dict[Any, Any]:
    """What borders are filled with: the mean colour, and no label."""
    from torchvision import tv_tensors

    return {tv_tensors.Mask: UNLABELLED, "others": tuple(round(255 * m) for m in info.mean)}


def _floats(pixels: Tensor) -> Tensor:
    """Pixels as float32 in memory of numpy's, whose place the next batches take again.

    glibc's aligned allocation, which torch uses, often finds no place among those that were freed:
    the process grew by a batch a step, by 2 GB in 128 steps of 32 images.
    """
    size, align = 4 * pixels.numel(), 64  # bytes; as torch aligns, since sums can depend on it
    room = np.empty(size + align, np.uint8)
    start = -room.ctypes.data % align
    values = torch.from_numpy(room[start : start + size].view(np.float32))
    return values.view(pixels.shape).copy_(pixels)
