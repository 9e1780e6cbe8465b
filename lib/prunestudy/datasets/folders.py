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
    """What lies in an image folder, whose images have the `size` (channels, height, width).

    `files` maps a split to (path relative to the folder, label) pairs, sorted by class and name;
    labels count the sorted `classes`. `version` is a digest of file names and sizes.
    """

    dataset: str
    path: Path
    classes: tuple[str, ...]
    files: Mapping[str, tuple[tuple[str, int], ...]]
    size: tuple[int, int, int]
    version: str


def scan(dataset: str, path: Path) -> Layout:
    """List the image folder `path` and read the header of its first training image.

    `dataset` is what the user asked for; errors name it. Raises `InputError` for a missing folder,
    a class without images in one of the splits, files that are no images, a broken first image.
    """
    classes, files, digest = list_files(dataset, path)
    first = path / files["train"][0][0]
    try:
        with Image.open(first) as image:
            size = (channels_of(image), image.height, image.width)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise InputError(f"dataset = {dataset!r}: 1 image cannot be read: {first}") from error
    return Layout(dataset, path, classes, files, size, digest[:12])


def list_files(
    dataset: str, path: Path, splits: tuple[str, str] = SPLITS
) -> tuple[tuple[str, ...], dict[str, tuple[tuple[str, int], ...]], str]:
    """Classes, files and the digest of `Layout`, of sub-folders called `splits`.

    Raises `InputError` as `scan` does.
    """
    classes: set[str] = set()
    images: list[tuple[str, str, str, int]] = []  # split, class, file, bytes
    strays: list[str] = []
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
                    if file.is_file() and file.name.lower().endswith(SUFFIXES):
                        images.append((split, entry.name, file.name, file.stat().st_size))
                    else:
                        strays.append(f"{split}/{entry.name}/{file.name}")
        kinds = f"not {', '.join(SUFFIXES)} in a class's folder"
        require(not strays, "dataset", dataset, f"{kinds}: {some(sorted(strays))}")
        dataset.encode()
        lines = sorted(f"{split}/{name}/{file} {size}\n" for split, name, file, size in images)
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    except OSError as error:
        raise InputError(f"dataset = {dataset!r}: {path} cannot be read ({error})") from error
    except UnicodeEncodeError as error:
        name = error.object[: error.end].rpartition("\n")[2]
        raise InputError(f"dataset = {dataset!r}: not a name in UTF-8: {name}") from error
    train, test = splits
    none = f"{path}/{train} has no sub-folders, one per class"
    require(bool(classes), "dataset", dataset, none)
    filled = {(split, name) for split, name, *_ in images}
    labels = {name: label for label, name in enumerate(sorted(classes))}
    empty = [f"{s}/{name}" for name in labels for s in splits if (s, name) not in filled]
    allowed = f"no images in {some(empty)}; every class has images in {train} and in {test}"
    require(not empty, "dataset", dataset, allowed)
    files: dict[str, list[tuple[str, int]]] = {split: [] for split in splits}
    for split, name, file, _ in sorted(images):
        files[split].append((f"{split}/{name}/{file}", labels[name]))
    return tuple(labels), {split: tuple(pairs) for split, pairs in files.items()}, digest


def read(layout: Layout) -> list[tuple[np.ndarray, np.ndarray]]:
    """Decode every image once: for each split images (N, H, W, C) uint8 and labels (N,) int64.

    Transparency is dropped. Raises `InputError` for an image of another size, for a colour image
    where the first one is grey, and, counting and naming them, for images that cannot be read.
    """
    broken: list[str] = []
    arrays = [_read_split(layout, split, broken) for split in SPLITS]
    refuse_broken(layout.dataset, broken)
    return arrays


def refuse_broken(dataset: str, broken: Sequence[str]) -> None:
    """Raise `InputError`, counting and naming them, if there are files that cannot be read."""
    count = f"{len(broken)} image{'s' * (len(broken) > 1)} cannot be read"
    require(not broken, "dataset", dataset, f"{count}: {some(broken)}")


def some(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    items = list(items)
    rest = len(items) - _NAMED_AT_MOST
    return ", ".join(items[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def channels_of(image: Image.Image) -> int:
    """1 or 3; `ValueError` for an image that has not 8 bits a channel."""
    if image.mode not in _CHANNELS:
        raise ValueError(f"mode {image.mode} is not 8 bits a channel")
    return _CHANNELS[image.mode]


def _visible(folder: str | Path) -> list[os.DirEntry]:
    # scandir: one call to the system per file, where Path.iterdir needs two
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _read_split(layout: Layout, split: str, broken: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Decode one split, adding the names of unreadable files to `broken`."""
    files, (channels, height, width) = layout.files[split], layout.size
    images = np.zeros((len(files), height, width, channels), dtype=np.uint8)
    for row, (file, _) in enumerate(files):
        try:
            with Image.open(layout.path / file) as image:
                colour, found = channels_of(image) > channels, (image.height, image.width)
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except Exception:  # Pillow's decoders raise many kinds
            broken.append(file)
            continue
        size = f"{height}x{width} (height x width) expected, the size of the first image"
        named = f"{file} is {found[0]}x{found[1]} pixels"
        require(found == (height, width), "dataset", layout.dataset, f"{named}, {size}")
        allowed = f"{file} is in colour, grey expected as in the first image"
        require(not colour, "dataset", layout.dataset, allowed)
        images[row] = pixels.reshape(height, width, channels)
    return images, np.array([label for _, label in files], dtype=np.int64)
