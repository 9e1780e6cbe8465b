"""Sets that are too large for memory: ImageNet and Pascal VOC, as files on disk.

Only their names are kept. Nothing is skipped silently: `find` opens every file before a training
and refuses, counting and naming them, those that cannot be read. A JPEG file that ends as it should
is not decoded for that.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from prunestudy.datasets import folders
from prunestudy.datasets.catalogue import DatasetInfo
from prunestudy.errors import InputError, require

UNLABELLED = 255  # in a mask
_AT_ONCE = 10_000


@dataclass(frozen=True)
class StreamSet:
    """Images on disk: `files` (N,) below `folder`, and `targets` (N,), labels or files of masks.

    Names are bytes, in arrays: lists of strings would be copied into each worker bit by bit.
    """

    dataset: str
    folder: Path
    files: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: Tensor | np.ndarray) -> "StreamSet":
        """Files and targets at `indices`, in their order."""
        at = np.asarray(indices)
        return replace(self, files=self.files[at], targets=self.targets[at])

    def read(self, index: int) -> tuple[Image.Image, Any]:
        """Decode one image, and its mask where there are masks; else its label as an int.

        Raises `InputError` naming the file that cannot be read.
        """
        image = self._open(self.files[index]).convert("RGB")
        if self.targets.dtype.kind != "S":
            return image, int(self.targets[index])
        from torchvision import tv_tensors

        return image, tv_tensors.Mask(self._open(self.targets[index]))

    def _open(self, name: bytes) -> Image.Image:
        try:
            with Image.open(self.folder / name.decode()) as image:
                image.load()
                return image
        except Exception as error:  # Pillow's decoders raise many kinds
            raise InputError(
                f"dataset = {self.dataset!r}: 1 image cannot be read: {name.decode()}"
            ) from error


def find(details: DatasetInfo, folder: Path) -> tuple[StreamSet, StreamSet, str]:
    """Training and test images of a streamed set in `folder`, and their fingerprint, verified.

    Raises `InputError` for a missing folder, class or file, another number of classes or images,
    images that cannot be read, masks of another size than their image or with other classes.
    """
    require(folder.is_dir(), "data", str(folder), f"{details.name} needs this folder")
    *sets, fingerprint = (_find_masks if details.masks else _find_labels)(details, folder)
    for images, wanted, part in zip(
        sets, (details.train_images, details.test_images), ("training", "test"), strict=True
    ):
        allowed = f"{len(images)} {part} images, {wanted} expected"
        require(len(images) == wanted, "data", str(folder), allowed)
    seen, broken = [], []
    for images in sets:
        for names, classes in ((images.files, 0), (images.targets, details.num_classes)):
            if names.dtype.kind == "S":
                seen.append(_each(names, partial(_look, folder, classes)))
                pairs = zip(names, seen[-1], strict=True)
                broken += [name.decode() for name, looked in pairs if looked is None]
    folders.refuse_broken(details.name, broken)
    if details.masks:
        for images, files, masks in zip(sets, seen[::2], seen[1::2], strict=True):
            _check_masks(images, details, files, masks)
    return *sets, fingerprint


def _find_labels(details: DatasetInfo, folder: Path) -> tuple[StreamSet, StreamSet, str]:
    classes, files, digest = folders.list_files(details.name, folder, ("train", "val"))
    allowed = f"{len(classes)} classes in train and val, {details.num_classes} expected"
    require(len(classes) == details.num_classes, "data", str(folder), allowed)
    sets = []
    for pairs in files.values():
        names, labels = zip(*pairs, strict=True)
        sets.append(StreamSet(details.name, folder, _bytes(names), np.array(labels)))
    return *sets, digest


def _find_masks(details: DatasetInfo, folder: Path) -> tuple[StreamSet, StreamSet, str]:
    from torchvision.datasets import VOCSegmentation

    sets, digest = [], hashlib.sha256()
    for split in ("train", "val"):
        try:
            found = VOCSegmentation(folder.parents[1], image_set=split)
        except (OSError, ValueError) as error:  # it may not be text
            why = " ".join(str(error).split())
            raise InputError(f"data = {str(folder)!r}: no list of images ({why})") from error
        pairs = [[os.path.relpath(p, folder) for p in part] for part in (found.images, found.masks)]
        absent = [name for part in pairs for name in part if not (folder / name).is_file()]
        many = f"{len(absent)} files are missing: {folders.some(absent)}"
        require(not absent, "data", str(folder), many)
        for name in sorted(name for part in pairs for name in part):
            digest.update(f"{split} {name} {(folder / name).stat().st_size}\n".encode())
        sets.append(StreamSet(details.name, folder, *map(_bytes, pairs)))
    return *sets, digest.hexdigest()


def _check_masks(images: StreamSet, details: DatasetInfo, files: list, masks: list) -> None:
    """Refuse masks of another size than their image, and labels that are no class."""
    for name, (size, _), (own, strange) in zip(images.files, files, masks, strict=True):
        named = f"the mask of {name.decode()}"
        allowed = f"{named} is {own} pixels, {size} expected as the image"
        require(own == size, "dataset", details.name, allowed)
        allowed = f"{named} has labels {strange}, 0..{details.num_classes - 1} or 255 expected"
        require(not strange, "dataset", details.name, allowed)


def _each(names: np.ndarray, look: Callable[[bytes], Any]) -> list[Any]:
    """What `look` says of each file, several at a time."""
    seen = []
    with ThreadPoolExecutor(min(32, 4 * cores())) as pool:
        for begin in range(0, len(names), _AT_ONCE):  # each waiting call takes a kilobyte
            seen += pool.map(look, names[begin : begin + _AT_ONCE])
    return seen


def _look(folder: Path, classes: int, name: bytes) -> tuple[str, str] | None:
    """Size of an image, height x width, and of a mask the first label that is none of `classes`.

    None for a file that is no image or is cut short.
    """
    path = folder / name.decode()
    try:
        with Image.open(path) as image:
            folders.channels_of(image)
            if image.format != "JPEG" or not _ends_as_jpeg(path):
                image.load()
            size = f"{image.height}x{image.width}"
            if classes and image.mode not in ("P", "L"):
                return size, f"of mode {image.mode}"
            labels = np.unique(np.asarray(image)) if classes else np.array([])
            strange = labels[(labels >= classes) & (labels != UNLABELLED)]
            return size, str(strange[0]) if len(strange) else ""
    except Exception:  # Pillow's decoders raise many kinds
        return None


def _ends_as_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read() == b"\xff\xd9"


def _bytes(names: Any) -> np.ndarray:
    return np.array([name.encode() for name in names])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
