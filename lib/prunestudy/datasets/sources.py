"""Reading data sets: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR, image folders, streams.

What is read is verified by its fingerprint where that is known, CIFAR's files by torchvision.
"""

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
# Sets that torchvision reads and downloads, by its class.
_CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
_CLASSES |= {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
# Fashion-MNIST, packed, of Debian's package dataset-fashion-mnist.
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_DIGITS_SEED = _VALIDATION_SEED = 0


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

    - `digits`: scikit-learn's 8x8 images, their values 0..16 stretched to 0..255. Every fifth image
      of a class, in a fixed random order, is a test image; the parts share their writers.
    - `mnist`, `fashion_mnist`, `cifar10`, `cifar100`: as torchvision stores them below `<root>`,
      Fashion-MNIST also as Debian's package does; torchvision downloads what is missing.
    - `cifar10_jpeg`: a copy of CIFAR-10 as JPEG files, an image folder `<root>/cifar10-jpeg`.
    - `imagenet`: `<root>/imagenet/{train,val}/<class>/*.JPEG`; `voc`: `<root>/VOCdevkit/VOC2012`
      with class masks, trained on `train` and tested on `val`. Both stay on disk.
    - `folder:PATH`: see `info`; `mean` and `std` are computed here.

    Raises `InputError` for an unknown name, for missing, damaged or changed files, and for images
    in memory that cannot be read or differ in size.
    """
    details, place = info(name, root), str(data_root(root))
    try:
        data = _read(details, name, root)
    except InputError:
        raise
    except Exception as error:  # no network, a full disk, a damaged file, little memory
        why = " ".join(str(error).split())[:300] or type(error).__name__
        line = f"data = {place!r}: {name} cannot be read or downloaded ({why})"
        raise InputError(line) from error
    right = details.fingerprint in ("", data.fingerprint)
    allowed = f"{name} has fingerprint {data.fingerprint}, {details.fingerprint} expected"
    require(right, "data", place, f"{allowed}; delete its files to download them again")
    return data


def split(train: ImageSet, validation: int) -> tuple[ImageSet, ImageSet]:
    """Take the last `validation` images of a fixed permutation out of the training images.

    The permutation depends on the number of images alone: all runs are tuned on the same
    validation images, whatever their seed, and a smaller validation set is part of a larger one.
    Returns the remaining training images and the validation images. Raises `InputError` unless both
    have images.
    """
    require_whole("validation", validation, 1, len(train) - 1)
    generator = torch.Generator().manual_seed(_VALIDATION_SEED)
    order = torch.randperm(len(train), generator=generator)
    return train.subset(order[:-validation]), train.subset(order[-validation:])


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel, in 0..1, of images (N, H, W, C) uint8; 1 for a std of 0."""
    values, means, deviations = np.arange(256) / 255, [], []
    for channel in images.unbind(3):
        # counts of the 256 values: exact, and no float copy of all images
        share = torch.bincount(channel.flatten(), minlength=256).numpy() / channel.numel()
        means.append(float(share @ values))
        deviations.append(float(np.sqrt(share @ (values - means[-1]) ** 2)) or 1.0)
    return tuple(means), tuple(deviations)


def _read(details: DatasetInfo, name: str, root: str | Path | None) -> Dataset:
    place = folder_path(name, root) if name.startswith(FOLDER) else data_root(root)
    if name in _PLACES:
        place /= _PLACES[name]
        require(place.is_dir(), "data", str(place), f"{name} needs this folder")
    if name in ("imagenet", "voc"):
        return _listed(details, place)
    if name == "digits":
        arrays = _digits()
    elif name in _CLASSES:
        arrays = _read_files(name, place)
    else:
        size = (details.channels, details.height, details.width)
        arrays = folders.read(name, place, folders.list_images(name, place)[0], size)
    train, test = (ImageSet(*map(torch.as_tensor, part)) for part in arrays)
    if not details.mean:
        mean, std = channel_statistics(train.images)
        details = replace(details, mean=mean, std=std)
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(repr(tuple(part.images.shape)).encode())
        digest.update(part.images.numpy())
        digest.update(part.labels.numpy())
    return Dataset(details, train, test, digest.hexdigest())


def _listed(details: DatasetInfo, place: Path) -> Dataset:
    """ImageNet or Pascal VOC: the names of the files, each seen on disk."""
    classes = details.num_classes
    if details.masks:
        parts, digest = folders.list_voc(place)
    else:
        parts, classes, digest = folders.list_images(details.name, place, ("train", "val"))
    found = (classes, *map(len, parts))
    wanted = (details.num_classes, details.train_images, details.test_images)
    allowed = f"{found} classes, training and test images, {wanted} expected"
    require(found == wanted, "data", str(place), allowed)
    files = [*parts[0], *parts[1]]
    masks = [mask for part in parts for mask in part.values()] if details.masks else []
    folders.require_whole_files(details.name, place, [*files, *masks])
    columns = [map(np.array, (list(part), list(part.values()))) for part in parts]
    return Dataset(details, *(ImageSet(*column, place) for column in columns), digest)


def _digits() -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    # RandomState: its stream is frozen for ever, that of newer generators is not
    order = np.random.RandomState(_DIGITS_SEED).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    test = np.zeros(len(labels), dtype=bool)
    test[by_class[::5]] = True
    return [(images[part], labels[part]) for part in (~test, test)]


def _read_files(name: str, root: Path) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of both parts of a set that torchvision reads, and downloads if missing."""
    import torchvision.datasets

    kind, raw = getattr(torchvision.datasets, _CLASSES[name]), "FashionMNIST/raw"
    with tempfile.TemporaryDirectory() as temporary:
        if name == "fashion_mnist" and _DEBIAN.is_dir() and not (root / raw).is_dir():
            root = Path(temporary)
            (root / raw).mkdir(parents=True)
            for file in _DEBIAN.glob("*.gz"):
                (root / raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        require(root.is_dir(), "data", str(root), f"{name} needs this folder")
        parts = [kind(root, train=train, download=True) for train in (True, False)]
    images = [torch.as_tensor(part.data).contiguous() for part in parts]
    images = [pixels.view(*pixels.shape[:3], -1) for pixels in images]
    return list(zip(images, (torch.as_tensor(part.targets) for part in parts), strict=True))


def require_whole(parameter: str, value: int, least: int, most: int | None = None) -> None:
    """Raise `InputError` unless `value` is a whole number from `least` to `most`."""
    allowed = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    ok = type(value) is int and value >= least and (most is None or value <= most)
    require(ok, parameter, value, allowed)
