"""Reading data sets, verified by their fingerprints where these are known."""

import contextlib
import gzip
import hashlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prunestudy.datasets import folders
from prunestudy.datasets.catalogue import FOLDER, DatasetInfo, data_root, folder_path, info
from prunestudy.errors import InputError, require

# Folders below the data root.
_PLACES = {"cifar10_jpeg": "cifar10-jpeg", "imagenet": "imagenet", "voc": "VOCdevkit/VOC2012"}
_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}  # its classes
_TORCHVISION |= {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # packed, of dataset-fashion-mnist


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their labels, in memory or on disk.

    In memory: `images` (N, H, W, C) uint8 and `labels` (N,) int64. On disk: `images` (N,) are names
    of files below `folder`, and `labels` (N,) numbers or names of masks; both are numpy arrays,
    because lists would be copied into every worker.
    """

    images: Tensor | np.ndarray
    labels: Tensor | np.ndarray
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | slice) -> "ImageSet":
        """Images and labels at `indices`, in their order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """`fingerprint`: sha256 of images and labels; of files that stay on disk, names and sizes."""

    info: DatasetInfo
    train: ImageSet
    test: ImageSet
    fingerprint: str


def load(name: str, root: str | Path | None = None) -> Dataset:
    """Read the data set `name`, one of `names()` or `folder:PATH`, from below the data root.

    - `digits`: scikit-learn's; every fifth of a class, drawn once, is a test image. Both parts have
      the same writers.
    - `mnist`, `fashion_mnist`, `cifar10`, `cifar100`: as torchvision stores them below `<root>`,
      Fashion-MNIST also as Debian's package does; torchvision downloads what is missing.
    - `cifar10_jpeg`: a copy of CIFAR-10 as JPEG files, an image folder `<root>/cifar10-jpeg`.
    - `imagenet`: `<root>/imagenet/{train,val}/<class>/*.JPEG`; `voc`: `<root>/VOCdevkit/VOC2012`
      with class masks, trained on `train` and tested on `val`. Both stay on disk.
    - `folder:PATH`: see `info`; `mean` and `std` are computed here.

    Raises `InputError` for an unknown name, and for missing, damaged or changed files.
    """
    known, place = info(name, root), str(data_root(root))
    try:
        data = _read(known, name, root)
    except InputError:
        raise
    except Exception as error:  # no network, a full disk, a damaged file, little memory
        why = " ".join(str(error).split())[:300] or type(error).__name__
        line = f"data = {place!r}: {name} cannot be read or downloaded ({why})"
        raise InputError(line) from error
    allowed = f"{name} has fingerprint {data.fingerprint}, {known.fingerprint} expected"
    allowed += "; delete its files to download them again"
    require(known.fingerprint in ("", data.fingerprint), "data", place, allowed)
    return data


def split(train: ImageSet, validation: int) -> tuple[ImageSet, ImageSet]:
    """Take the last `validation` images of a fixed permutation out of the training images.

    The permutation depends on the number of images alone, not on a run's seed, and a smaller
    validation set is part of a larger one. Returns the remaining training images and the validation
    images. Raises `InputError` unless both have images.
    """
    require_whole("validation", validation, 1, len(train) - 1)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train.subset(order[:-validation]), train.subset(order[-validation:])


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel, in 0..1, of images (N, H, W, C) uint8; 1 for a std of 0."""
    values, found = np.arange(256) / 255, []
    for channel in images.unbind(3):
        # counts of the 256 values: exact, and no float copy of all images
        share = torch.bincount(channel.flatten(), minlength=256).numpy() / channel.numel()
        mean = float(share @ values)
        found.append((mean, float(np.sqrt(share @ (values - mean) ** 2)) or 1.0))
    return tuple(zip(*found, strict=True))


def _read(known: DatasetInfo, name: str, root: str | Path | None) -> Dataset:
    place = folder_path(name, root) if name.startswith(FOLDER) else data_root(root)
    if name in _PLACES:
        place /= _PLACES[name]
        require(place.is_dir(), "data", str(place), f"{name} needs this folder")
    if name in ("imagenet", "voc"):
        return _listed(known, place)
    if name == "digits":
        arrays = _digits()
    elif name in _TORCHVISION:
        arrays = _read_files(name, place)
    else:
        size = (known.channels, known.height, known.width)
        arrays = folders.read(name, place, folders.list_images(name, place)[0], size)
    train, test = (ImageSet(*map(torch.as_tensor, part)) for part in arrays)
    if not known.mean:
        mean, std = channel_statistics(train.images)
        known = replace(known, mean=mean, std=std)
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(repr(tuple(part.images.shape)).encode())
        digest.update(part.images.numpy())
        digest.update(part.labels.numpy())
    return Dataset(known, train, test, digest.hexdigest())


def _listed(known: DatasetInfo, place: Path) -> Dataset:
    """ImageNet or Pascal VOC: the names of the files, each seen on disk."""
    classes, files = known.num_classes, []
    if known.masks:
        parts, digest = folders.list_voc(place)
        files = [mask for part in parts for mask in part.values()]
    else:
        parts, classes, digest = folders.list_images(known.name, place, ("train", "val"))
    found = (classes, *map(len, parts))
    wanted = (known.num_classes, known.train_images, known.test_images)
    allowed = f"{found} classes, training and test images, {wanted} expected"
    require(found == wanted, "data", str(place), allowed)
    folders.require_whole_files(known.name, place, [*parts[0], *parts[1], *files])
    columns = [map(np.array, (list(part), list(part.values()))) for part in parts]
    return Dataset(known, *(ImageSet(*column, place) for column in columns), digest)


def _digits() -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    # RandomState: its stream is frozen for ever, that of newer generators is not
    order = np.random.RandomState(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    test = np.zeros(len(labels), dtype=bool)
    test[by_class[::5]] = True
    return [(images[part], labels[part]) for part in (~test, test)]


def _read_files(name: str, root: Path) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of both parts of a set that torchvision reads, and downloads if missing."""
    import torchvision.datasets

    kind = getattr(torchvision.datasets, _TORCHVISION[name])
    raw = Path(kind.__name__, "raw")
    with tempfile.TemporaryDirectory() as temporary:
        if name == "fashion_mnist" and _DEBIAN.is_dir() and not any((root / raw).glob("*")):
            root = Path(temporary)
            (root / raw).mkdir(parents=True)
            for file in _DEBIAN.glob("*.gz"):
                (root / raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        require(root.is_dir(), "data", str(root), f"{name} needs this folder")
        try:
            parts = [kind(root, train=train, download=True) for train in (True, False)]
        finally:
            with contextlib.suppress(OSError):  # what a failed download leaves empty
                (root / raw).rmdir()
                (root / raw.parent).rmdir()
    images = [torch.as_tensor(part.data).contiguous() for part in parts]
    labels = [torch.as_tensor(part.targets) for part in parts]
    return [(x.view(*x.shape[:3], -1), y) for x, y in zip(images, labels, strict=True)]


def require_whole(parameter: str, value: int, least: int, most: int | None = None) -> None:
    """Raise `InputError` unless `value` is a whole number from `least` to `most`."""
    allowed = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    ok = type(value) is int and value >= least and (most is None or value <= most)
    require(ok, parameter, value, allowed)
