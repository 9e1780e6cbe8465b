"""Images on disk: which there are, and whether every one can be read.

Nothing is skipped silently: stray files, empty classes and unreadable images are refused by name.
Each part of a set, training and test, is a dict from the name of an image's file, relative to the
set's folder, to its label or to the name of its mask.
"""

import hashlib
import os
from collections.abc import Iterable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prunestudy.errors import InputError, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
UNLABELLED = 255  # in a mask
_GREY, _COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")
_NAMED_AT_MOST = 10
_THREADS = 16  # they mostly wait for the disk


def list_images(
    dataset: str, path: Path, splits: tuple[str, str] = ("train", "test")
) -> tuple[list[dict[str, int]], int, str]:
    """Parts, number of classes and digest of `path`, which holds {splits}/<class>/<image>.

    Images are sorted by class and name, labels count the sorted classes, the digest covers the
    names and sizes of the files. Names that start with a dot are ignored. Raises `InputError`
    naming `dataset` for files that are not images, and for a class without images in a split.
    """
    try:
        for split in splits:
            there = f"there is no folder {path / split}"
            require((path / split).is_dir(), "dataset", dataset, there)
        folders = [entry for split in splits for entry in _visible(path / split)]
        entries = [entry for folder in folders if folder.is_dir() for entry in _visible(folder)]
        files = [e for e in entries if e.is_file() and e.name.lower().endswith(SUFFIXES)]
        strays = {*(folder for folder in folders if not folder.is_dir()), *entries} - {*files}
        named = sorted(stray.path.removeprefix(f"{path}/") for stray in strays)
        kinds = f"not {', '.join(SUFFIXES)} in a class's folder"
        require(not strays, "dataset", dataset, f"{kinds}: {_some(named)}")
        sizes = {file.path.removeprefix(f"{path}/"): file.stat().st_size for file in files}
    except OSError as error:
        raise InputError(f"dataset = {dataset!r}: {path} cannot be read ({error})") from error
    classes = sorted({folder.name for folder in folders})
    none = f"{path}/{splits[0]} has no sub-folders, one per class"
    require(bool(classes), "dataset", dataset, none)
    filled = {name.rpartition("/")[0] for name in sizes}
    empty = [f"{s}/{c}" for c in classes for s in splits if f"{s}/{c}" not in filled]
    each = f"every class has images in {splits[0]} and in {splits[1]}"
    require(not empty, "dataset", dataset, f"no images in {_some(empty)}; {each}")
    lines = sorted(f"{name} {size}\n" for name, size in sizes.items())
    digest = hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    labels = {name: label for label, name in enumerate(classes)}
    order = sorted(name.split("/") for name in sizes)
    parts = [{"/".join(at): labels[at[1]] for at in order if at[0] == split} for split in splits]
    return parts, len(classes), digest


def size_of(dataset: str, path: Path) -> tuple[int, int, int]:
    """Channels (1 or 3), height and width of an image; `InputError` if its header is broken."""
    try:
        with Image.open(path) as image:
            return _channels(image), image.height, image.width
    except Exception as error:  # Pillow's decoders raise many kinds
        raise InputError(f"dataset = {dataset!r}: 1 image cannot be read: {path}") from error


def read(
    dataset: str, path: Path, parts: list[dict[str, int]], shape: tuple[int, int, int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images (N, H, W, C) uint8 and labels (N,) int64 of each part; transparency is dropped.

    Raises `InputError` for an image that is not of `shape`, (H, W, C), for a colour image where C
    is 1, and, counting and naming them, for images that cannot be read.
    """
    (height, width, channels), broken, arrays = shape, [], []
    for part in parts:
        images = np.zeros((len(part), *shape), dtype=np.uint8)
        for row, name in enumerate(part):
            try:
                with Image.open(path / name) as image:
                    found = _channels(image), image.height, image.width
                    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            except Exception:  # Pillow's decoders raise many kinds
                broken.append(name)
                continue
            right = found[0] <= channels and found[1:] == (height, width)
            expected = f"{(channels, height, width)} expected as in the first"
            allowed = f"{name} has {found}, (channels, height, width) {expected}"
            require(right, "dataset", dataset, allowed)
            images[row] = pixels.reshape(shape)
        arrays.append((images, np.array(list(part.values()), dtype=np.int64)))
    _refuse_broken(dataset, broken)
    return arrays


def find_streamed(details: Any, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Parts and digest of ImageNet or Pascal VOC (`details`: its `DatasetInfo`), every file seen.

    Raises `InputError` for missing folders, classes and files, another number of classes or images,
    unreadable images, and masks that have other labels or another size than their image.
    """
    dataset, classes = details.name, details.num_classes
    require(folder.is_dir(), "data", str(folder), f"{dataset} needs this folder")
    if details.masks:
        parts, digest = _list_voc(folder)
    else:
        parts, found, digest = list_images(dataset, folder, ("train", "val"))
        allowed = f"{found} classes in train and val, {classes} expected"
        require(found == classes, "data", str(folder), allowed)
    wanted = {"training": details.train_images, "test": details.test_images}
    for part, (kind, count) in zip(parts, wanted.items(), strict=True):
        allowed = f"{len(part)} {kind} images, {count} expected"
        require(len(part) == count, "data", str(folder), allowed)
    masks = {image: mask for part in parts for image, mask in part.items() if details.masks}
    files = [*(image for part in parts for image in part), *masks.values()]
    with ThreadPool(_THREADS) as pool:
        seen = dict(zip(files, pool.map(partial(_look, folder), files), strict=True))
    _refuse_broken(dataset, [file for file in files if not seen[file]])
    for image, mask in masks.items():
        (size, _), (own, labels) = seen[image], seen[mask]
        allowed = f"the mask of {image} is {own} pixels, {size} expected as the image"
        require(own == size, "dataset", dataset, allowed)
        strange = labels - {*range(classes), UNLABELLED}
        allowed = f"labels {_some(strange)}, 0..{classes - 1} or {UNLABELLED} expected"
        require(not strange, "dataset", dataset, f"the mask of {image} has {allowed}")
    return parts, digest


def _list_voc(folder: Path) -> tuple[list[dict[str, str]], str]:
    parts, digest = [], hashlib.sha256()
    for split in ("train", "val"):
        try:
            names = (folder / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        except (OSError, ValueError) as error:  # it may not be text
            raise InputError(f"data = {str(folder)!r}: no list of images ({error})") from error
        part = {f"JPEGImages/{name}.jpg": f"SegmentationClass/{name}.png" for name in names}
        files = {file: folder / file for file in sorted([*part, *part.values()])}
        absent = [file for file, path in files.items() if not path.is_file()]
        missing = f"{len(absent)} files are missing: {_some(absent)}"
        require(not absent, "data", str(folder), missing)
        lines = [f"{split} {file} {path.stat().st_size}\n" for file, path in files.items()]
        digest.update("".join(lines).encode())
        parts.append(part)
    return parts, digest.hexdigest()


def _look(folder: Path, name: str) -> tuple[str, frozenset] | None:
    """Size and labels of an image, read as a mask; None for a file that cannot be read.

    A JPEG file that ends as it should is not decoded, and gives no labels.
    """
    try:
        with Image.open(folder / name) as image, (folder / name).open("rb") as file:
            _channels(image)
            file.seek(-2, os.SEEK_END)
            size, labels = f"{image.height}x{image.width}", frozenset()
            if image.format != "JPEG" or file.read() != b"\xff\xd9":
                is_mask, values = image.mode in ("P", "L"), np.unique(np.asarray(image)).tolist()
                labels = frozenset(values if is_mask else [f"of mode {image.mode}"])
            return size, labels
    except Exception:  # Pillow's decoders raise many kinds
        return None


def _refuse_broken(dataset: str, broken: list[str]) -> None:
    count = f"{len(broken)} image{'s' * (len(broken) > 1)} cannot be read"
    require(not broken, "dataset", dataset, f"{count}: {_some(broken)}")


def _some(items: Iterable[Any]) -> str:
    """The first few items, and how many more there are."""
    names = [str(item) for item in items]
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def _channels(image: Image.Image) -> int:
    if image.mode not in _GREY + _COLOUR:
        raise ValueError(f"mode {image.mode} is not 8 bits a channel")
    return 1 if image.mode in _GREY else 3


def _visible(folder: Path | os.DirEntry) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:  # three times as fast as Path.iterdir
        return [entry for entry in entries if not entry.name.startswith(".")]
