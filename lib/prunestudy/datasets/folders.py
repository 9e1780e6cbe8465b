"""Image folders laid out as {train,test}/<class>/*.{png,jpg,jpeg,bmp}.

Every image must have the size and the kind (grey or colour) of the first one. Nothing is skipped
silently: a file that is no such image is refused. Only names starting with a dot are ignored.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from prunestudy.errors import InputError, require

SPLITS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_CHANNELS = {
    **dict.fromkeys(("1", "L", "LA"), 1),
    **dict.fromkeys(("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"), 3),
}
_NAMED_AT_MOST = 10


@dataclass(frozen=True)
class Layout:
    """What lies in an image folder.

    `files` maps a split to (path relative to the folder, label) pairs, sorted by class and name;
    labels count the sorted `classes`. `version` is a digest of file names and sizes.
    """

    dataset: str
    path: Path
    classes: tuple[str, ...]
    files: Mapping[str, tuple[tuple[str, int], ...]]
    channels: int
    height: int
    width: int
    version: str


def scan(dataset: str, path: Path) -> Layout:
    """List the image folder `path` and read the header of its first training image.

    `dataset` is what the user asked for; errors name it. Raises `InputError` for a missing folder,
    a class without images in one of the splits, files that are no images, a broken first image.
    """
    classes, files, digest = list_files(dataset, path)
    channels, height, width = _header(dataset, path / files["train"][0][0])
    return Layout(dataset, path, classes, files, channels, height, width, digest[:12])


def list_files(
    dataset: str, path: Path, splits: tuple[str, str] = SPLITS
) -> tuple[tuple[str, ...], dict[str, tuple[tuple[str, int], ...]], str]:
    """Classes, files and the digest of `Layout`, of sub-folders called `splits`.

    Raises `InputError` as `scan` does.
    """
    try:
        sizes = {split: _list_split(dataset, path, split) for split in splits}
        dataset.encode()
        digest = _digest(sizes)
    except OSError as error:
        raise InputError(f"dataset = {dataset!r}: {path} cannot be read ({error})") from error
    except UnicodeEncodeError as error:
        name = error.object[: error.end].rpartition("\n")[2]
        raise InputError(f"dataset = {dataset!r}: not a name in UTF-8: {name}") from error
    train, test = splits
    classes = tuple(sorted(set(sizes[train]) | set(sizes[test])))
    none = f"{path}/{train} has no sub-folders, one per class"
    require(classes != (), "dataset", dataset, none)
    empty = [
        f"{split}/{name}" for name in classes for split in splits if not sizes[split].get(name)
    ]
    require(
        not empty,
        "dataset",
        dataset,
        f"no images in {some(empty)}; every class has images in {train} and in {test}",
    )
    files = {
        split: tuple(
            (f"{split}/{name}/{file}", label)
            for label, name in enumerate(classes)
            for file in sorted(sizes[split][name])
        )
        for split in splits
    }
    return classes, files, digest


def read(layout: Layout) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Decode every image once: {split: (images (N, H, W, C) uint8, labels (N,) int64)}.

    Transparency is dropped. Raises `InputError` for an image of another size, for a colour image
    where the first one is grey, and, counting and naming them, for images that cannot be read.
    """
    broken: list[str] = []
    arrays = {split: _read_split(layout, split, broken) for split in SPLITS}
    refuse_broken(layout.dataset, broken)
    return arrays


def refuse_broken(dataset: str, broken: Sequence[str]) -> None:
    """Raise `InputError`, counting and naming them, if there are files that cannot be read."""
    count = f"{len(broken)} image{'s' * (len(broken) > 1)} cannot be read"
    require(not broken, "dataset", dataset, f"{count}: {some(broken)}")


def _list_split(dataset: str, path: Path, split: str) -> dict[str, dict[str, int]]:
    """Size in bytes of each file of each class of a split; strays are refused."""
    folder = path / split
    require(folder.is_dir(), "dataset", dataset, f"there is no folder {folder}")
    listing: dict[str, dict[str, int]] = {}
    strays = []
    for entry in _visible(folder):
        if not entry.is_dir():
            strays.append(f"{split}/{entry.name}")
            continue
        images = listing[entry.name] = {}
        for file in _visible(entry.path):
            if file.is_file() and file.name.lower().endswith(SUFFIXES):
                images[file.name] = file.stat().st_size
            else:
                strays.append(f"{split}/{entry.name}/{file.name}")
    require(
        not strays,
        "dataset",
        dataset,
        f"not {', '.join(SUFFIXES)} in a class's folder: {some(sorted(strays))}",
    )
    return listing


def _visible(folder: str | Path) -> list[os.DirEntry]:
    # scandir: one call to the system per file, where Path.iterdir needs two
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _digest(sizes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    lines = sorted(
        f"{split}/{name}/{file} {size}\n"
        for split, classes in sizes.items()
        for name, images in classes.items()
        for file, size in images.items()
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _header(dataset: str, file: Path) -> tuple[int, int, int]:
    """Channels, height and width of one image, without decoding it."""
    try:
        with Image.open(file) as image:
            return channels_of(image), image.height, image.width
    except Exception as error:  # Pillow's decoders raise many kinds
        raise InputError(f"dataset = {dataset!r}: 1 image cannot be read: {file}") from error


def channels_of(image: Image.Image) -> int:
    """1 or 3; `ValueError` for an image that has not 8 bits a channel."""
    if image.mode not in _CHANNELS:
        raise ValueError(f"mode {image.mode} is not 8 bits a channel")
    return _CHANNELS[image.mode]


def _read_split(layout: Layout, split: str, broken: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Decode one split, adding the names of unreadable files to `broken`."""
    files = layout.files[split]
    shape = (len(files), layout.height, layout.width, layout.channels)
    images = np.zeros(shape, dtype=np.uint8)
    for row, (file, _) in enumerate(files):
        try:
            with Image.open(layout.path / file) as image:
                channels, size = channels_of(image), (image.height, image.width)
                pixels = np.asarray(image.convert("L" if layout.channels == 1 else "RGB"))
        except Exception:  # Pillow's decoders raise many kinds
            broken.append(file)
            continue
        _check(layout, file, channels, size)
        images[row] = pixels.reshape(shape[1:])
    return images, np.array([label for _, label in files], dtype=np.int64)


def _check(layout: Layout, file: str, channels: int, size: tuple[int, int]) -> None:
    expected = (layout.height, layout.width)
    require(
        size == expected,
        "dataset",
        layout.dataset,
        f"{file} is {size[0]}x{size[1]} pixels, {expected[0]}x{expected[1]} (height x width) "
        "expected, the size of the first image",
    )
    require(
        channels <= layout.channels,
        "dataset",
        layout.dataset,
        f"{file} is in colour, grey expected as in the first image",
    )


def some(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    items = list(items)
    rest = len(items) - _NAMED_AT_MOST
    return ", ".join(items[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
