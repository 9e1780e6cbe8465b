"""Images on disk: listing and decoding those of image folders, ImageNet and Pascal VOC.

Each part of a set, training and test, is a dict from the name of an image's file, relative to the
set's folder, to its label or to the name of its mask.
"""

import hashlib
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image

from prunestudy.errors import InputError, quoted, require

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
UNLABELLED = 255  # in a mask
_GREY, _COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")


def list_images(
    dataset: str, path: Path, splits: tuple[str, str] = ("train", "test")
) -> tuple[list[dict[str, int]], int, str]:
    """Parts, number of classes and digest of `path`, which holds {splits}/<class>/<image>.

    Images are sorted by class and name, labels count the sorted classes, the digest covers the
    names and sizes of the files. Names that start with a dot are ignored. Raises `InputError`
    naming `dataset` for files that are not images, and for a class without images in a split.
    """
    try:
        folders = [entry for split in splits for entry in _visible(path / split)]
        entries = [entry for folder in folders if folder.is_dir() for entry in _visible(folder)]
        files = [e for e in entries if e.is_file() and e.name.lower().endswith(_SUFFIXES)]
        strays = {*(folder for folder in folders if not folder.is_dir()), *entries} - {*files}
        named = sorted(stray.path.removeprefix(f"{path}/") for stray in strays)
        kinds = f"not {', '.join(_SUFFIXES)} in a class's folder"
        require(not strays, "dataset", dataset, f"{kinds}: {quoted(named)}")
        sizes = {file.path.removeprefix(f"{path}/"): file.stat().st_size for file in files}
    except OSError as error:
        raise InputError(f"dataset = {dataset!r}: {path} cannot be read ({error})") from error
    classes = sorted({folder.name for folder in folders})
    filled = {name.rpartition("/")[0] for name in sizes}
    empty = [f"{s}/{c}" for c in classes or ["*"] for s in splits if f"{s}/{c}" not in filled]
    each = f"every class has images in {splits[0]} and in {splits[1]}"
    require(not empty, "dataset", dataset, f"no images in {quoted(empty)}; {each}")
    lines = sorted(f"{name} {size}\n" for name, size in sizes.items())
    digest = hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    labels = {name: label for label, name in enumerate(classes)}
    order = sorted(name.split("/") for name in sizes)
    parts = [{"/".join(at): labels[at[1]] for at in order if at[0] == split} for split in splits]
    return parts, len(classes), digest


def list_voc(folder: Path) -> tuple[list[dict[str, str]], str]:
    """Parts and digest of Pascal VOC; `OSError` for a file that is missing."""
    parts, digest = [], hashlib.sha256()
    for split in ("train", "val"):
        names = (folder / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        part = {f"JPEGImages/{name}.jpg": f"SegmentationClass/{name}.png" for name in names}
        for file in sorted([*part, *part.values()]):
            digest.update(f"{split} {file} {(folder / file).stat().st_size}\n".encode())
        parts.append(part)
    return parts, digest.hexdigest()


def decode(dataset: str, folder: Path, name: str) -> Image.Image:
    """Image `name` below `folder`; `InputError` for one that is broken or not 8 bits a channel."""
    try:
        with Image.open(folder / name) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise many kinds
        raise InputError(f"dataset = {dataset!r}: {name} cannot be read ({error})") from error
    right = image.mode in _GREY + _COLOUR
    require(right, "dataset", dataset, f"{name} has mode {image.mode}, not 8 bits a channel")
    return image


def require_whole_files(dataset: str, folder: Path, names: list[str]) -> None:
    """Raise `InputError` with the number and the first names of images that cannot be read.

    A JPEG file with a header and an end is taken as whole; others are decoded.
    """

    def is_whole(name: str) -> bool:
        try:
            with Image.open(folder / name) as image, (folder / name).open("rb") as file:
                file.seek(-2, os.SEEK_END)
                if image.format != "JPEG" or file.read() != b"\xff\xd9":
                    image.load()
                return image.mode in _GREY + _COLOUR
        except Exception:  # Pillow's decoders raise many kinds
            return False

    with ThreadPool(32) as pool:
        whole = pool.map(is_whole, names)
    broken = [name for name, right in zip(names, whole, strict=True) if not right]
    allowed = f"{len(broken)} images cannot be read: {quoted(broken[:8])}"
    require(not broken, "dataset", dataset, allowed)


def size_of(image: Image.Image) -> tuple[int, int, int]:
    """Channels (1 or 3), height and width."""
    return 1 if image.mode in _GREY else 3, image.height, image.width


def read(
    dataset: str, path: Path, parts: list[dict[str, int]], size: tuple[int, int, int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images (N, H, W, C) uint8 and labels (N,) int64 of each part; transparency is dropped.

    Raises `InputError` for an image that cannot be read or is not of `size` (channels, height,
    width); grey ones become coloured where channels are 3.
    """
    (channels, height, width), arrays = size, []
    for part in parts:
        images = np.zeros((len(part), height, width, channels), dtype=np.uint8)
        for row, name in enumerate(part):
            image = decode(dataset, path, name)
            found = size_of(image)
            right = found[0] <= channels and found[1:] == (height, width)
            allowed = f"(channels, height, width) {size} expected as in the first"
            require(right, "dataset", dataset, f"{name} has {found}, {allowed}")
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            images[row] = pixels.reshape(height, width, channels)
        arrays.append((images, np.array(list(part.values()), dtype=np.int64)))
    return arrays


def _visible(folder: Path | os.DirEntry) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:  # three times as fast as Path.iterdir
        return [entry for entry in entries if not entry.name.startswith(".")]
