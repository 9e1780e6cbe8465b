"""Images on disk: which there are, and whether every one can be read.

Nothing is skipped silently: stray files, empty classes and unreadable images are refused by name.
Only names that start with a dot are ignored. Each part of a set, training and test, is a dict from
the name of an image's file, relative to the set's folder, to its label or its mask's file.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prunestudy.errors import InputError, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
UNLABELLED = 255  # in a mask
_CHANNELS = {
    **dict.fromkeys(("1", "L", "LA"), 1),
    **dict.fromkeys(("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"), 3),
}
_NAMED_AT_MOST = 10
_THREADS = 16  # which read files: most of the time goes into waiting for the disk


def list_images(
    dataset: str, path: Path, splits: tuple[str, str] = ("train", "test")
) -> tuple[list[dict[str, int]], int, str]:
    """Parts, number of classes and digest of an image folder, {splits}/<class>/<image>.

    Images are sorted by class and name, labels count the sorted classes, the digest is of file
    names and sizes. Raises `InputError` naming `dataset` for missing folders, for classes without
    images in one of the `splits`, and for files that are not images.
    """
    classes, strays, sizes = set(), [], {}
    try:
        for split in splits:
            folder = path / split
            require(folder.is_dir(), "dataset", dataset, f"there is no folder {folder}")
            for entry in _visible(folder):
                if not entry.is_dir():
                    strays.append(f"{split}/{entry.name}")
                    continue
                classes.add(entry.name)
                for file in _visible(entry.path):
                    name = f"{split}/{entry.name}/{file.name}"
                    if file.is_file() and name.lower().endswith(SUFFIXES):
                        sizes[name] = file.stat().st_size
                    else:
                        strays.append(name)
        kinds = f"not {', '.join(SUFFIXES)} in a class's folder"
        require(not strays, "dataset", dataset, f"{kinds}: {_some(sorted(strays))}")
        lines = sorted(f"{name} {size}\n" for name, size in sizes.items())
        dataset.encode()
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    except OSError as error:
        raise InputError(f"dataset = {dataset!r}: {path} cannot be read ({error})") from error
    except UnicodeEncodeError as error:
        name = error.object[: error.end].rpartition("\n")[2]
        raise InputError(f"dataset = {dataset!r}: not a name in UTF-8: {name}") from error
    none = f"{path}/{splits[0]} has no sub-folders, one per class"
    require(bool(classes), "dataset", dataset, none)
    labels = {name: label for label, name in enumerate(sorted(classes))}
    parts: dict[str, dict[str, int]] = {split: {} for split in splits}
    empty = {f"{split}/{name}": None for name in labels for split in splits}
    for name in sorted(sizes, key=lambda name: name.split("/")):
        split, class_name, _ = name.split("/")
        parts[split][name] = labels[class_name]
        empty.pop(f"{split}/{class_name}", None)
    each = f"every class has images in {splits[0]} and in {splits[1]}"
    require(not empty, "dataset", dataset, f"no images in {_some(empty)}; {each}")
    return list(parts.values()), len(labels), digest


def size_of(dataset: str, path: Path) -> tuple[int, int, int]:
    """Channels (1 or 3), height and width of an image; `InputError` if its header is broken."""
    try:
        with Image.open(path) as image:
            return _channels(image), image.height, image.width
    except Exception as error:  # Pillow's decoders raise many kinds
        raise InputError(f"dataset = {dataset!r}: 1 image cannot be read: {path}") from error


def read(
    dataset: str, path: Path, parts: Sequence[dict[str, int]], shape: tuple[int, int, int]
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
                    found, colour = (image.height, image.width), _channels(image) > channels
                    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            except Exception:  # Pillow's decoders raise many kinds
                broken.append(name)
                continue
            size = f"{height}x{width} (height x width) expected, the size of the first image"
            named = f"{name} is {found[0]}x{found[1]} pixels"
            require(found == (height, width), "dataset", dataset, f"{named}, {size}")
            allowed = f"{name} is in colour, grey expected as in the first image"
            require(not colour, "dataset", dataset, allowed)
            images[row] = pixels.reshape(shape)
        arrays.append((images, np.array(list(part.values()), dtype=np.int64)))
    _refuse_broken(dataset, broken)
    return arrays


def find_streamed(
    details: Any, folder: Path
) -> tuple[list[dict[str, int]] | list[dict[str, str]], str]:
    """Parts and digest of ImageNet or Pascal VOC (`details`: its `DatasetInfo`), all files opened.

    Raises `InputError` for a missing folder, class or file, another number of classes or images,
    unreadable images, and masks with other labels or of another size than their image.
    """
    name, classes = details.name, details.num_classes
    require(folder.is_dir(), "data", str(folder), f"{name} needs this folder")
    if details.masks:
        parts, digest = _list_voc(folder)
    else:
        parts, found, digest = list_images(name, folder, ("train", "val"))
        allowed = f"{found} classes in train and val, {classes} expected"
        require(found == classes, "data", str(folder), allowed)
    wanted = {"training": details.train_images, "test": details.test_images}
    for part, (kind, count) in zip(parts, wanted.items(), strict=True):
        allowed = f"{len(part)} {kind} images, {count} expected"
        require(len(part) == count, "data", str(folder), allowed)
    images = [image for part in parts for image in part]
    masks = [part[image] for part in parts for image in part] if details.masks else []
    with ThreadPool(_THREADS) as pool:
        seen = pool.map(partial(_look, folder, 0), images)
        seen_masks = pool.map(partial(_look, folder, classes), masks)
    looked = zip([*images, *masks], [*seen, *seen_masks], strict=True)
    _refuse_broken(name, [file for file, what in looked if what is None])
    for image, (size, _), (own, strange) in zip(images, seen, seen_masks, strict=bool(masks)):
        mask = f"the mask of {image}"
        allowed = f"{mask} is {own} pixels, {size} expected as the image"
        require(own == size, "dataset", name, allowed)
        allowed = f"{mask} has labels {strange}, 0..{classes - 1} or {UNLABELLED} expected"
        require(not strange, "dataset", name, allowed)
    return parts, digest


def _list_voc(folder: Path) -> tuple[list[dict[str, str]], str]:
    parts, digest = [], hashlib.sha256()
    for split in ("train", "val"):
        try:
            names = (folder / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        except (OSError, ValueError) as error:  # it may not be text
            raise InputError(f"data = {str(folder)!r}: no list of images ({error})") from error
        part = {f"JPEGImages/{name}.jpg": f"SegmentationClass/{name}.png" for name in names}
        files = sorted([*part, *part.values()])
        absent = [file for file in files if not (folder / file).is_file()]
        many = f"{len(absent)} files are missing: {_some(absent)}"
        require(not absent, "data", str(folder), many)
        for file in files:
            digest.update(f"{split} {file} {(folder / file).stat().st_size}\n".encode())
        parts.append(part)
    return parts, digest.hexdigest()


def _look(folder: Path, classes: int, name: str) -> tuple[str, str] | None:
    """Size of an image, and of a mask the first label that is none of the `classes`.

    None for a file that cannot be read. A JPEG file that ends as it should is not decoded.
    """
    try:
        with Image.open(folder / name) as image:
            _channels(image)
            if image.format != "JPEG" or not _ends_as_jpeg(folder / name):
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


def _refuse_broken(dataset: str, broken: Sequence[str]) -> None:
    count = f"{len(broken)} image{'s' * (len(broken) > 1)} cannot be read"
    require(not broken, "dataset", dataset, f"{count}: {_some(broken)}")


def _some(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    items = list(items)
    rest = len(items) - _NAMED_AT_MOST
    return ", ".join(items[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def _channels(image: Image.Image) -> int:
    if image.mode not in _CHANNELS:
        raise ValueError(f"mode {image.mode} is not 8 bits a channel")
    return _CHANNELS[image.mode]


def _visible(folder: str | Path) -> list[os.DirEntry]:
    # scandir: one call to the system per file, where Path.iterdir needs two
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
