"""Reading data sets: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR, image folders, streams.

What is read is verified by its fingerprint where that is known, CIFAR's files by torchvision.
"""

import gzip
import hashlib
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prunestudy.datasets import folders, streams
from prunestudy.datasets.catalogue import FOLDER, DatasetInfo, data_root, folder_layout, info
from prunestudy.errors import InputError, require

# Folders below the data root.
_PLACES = {
    "mnist": "MNIST/raw",
    "fashion_mnist": "FashionMNIST/raw",
    "cifar10": "cifar-10-batches-py",
    "cifar10_jpeg": "cifar10-jpeg",
    "cifar100": "cifar-100-python",
    "imagenet": "imagenet",
    "voc": "VOCdevkit/VOC2012",
}
# torchvision's classes.
_CLASSES = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
# Where Debian's package dataset-fashion-mnist puts the files.
_SYSTEM_FOLDERS = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}
_DIGITS_SEED = 0
_VALIDATION_SEED = 0


@dataclass(frozen=True)
class ImageSet:
    """Images (N, H, W, C) uint8 in 0..255 and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | slice) -> "ImageSet":
        """Images and labels at `indices`, in their order; `IndexError` for an absent one."""
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A data set in memory or on disk.

    `fingerprint` is the sha256 of all its images and labels, of a streamed set that of the names
    and sizes of its files.
    """

    info: DatasetInfo
    train: "ImageSet | streams.StreamSet"
    test: "ImageSet | streams.StreamSet"
    fingerprint: str


def load(name: str, root: str | Path | None = None) -> Dataset:
    """Read the data set `name`, one of `names()` or `folder:PATH`, from below the data root.

    - `digits`: 8x8 images of scikit-learn, their values 0..16 stretched to 0..255. It has no
      official split; ours takes each fifth image of each class in a fixed random order for the
      test (1,437 and 360 images). The same writers are in both parts.
    - `mnist`, `fashion_mnist`: the four idx files, plain or .gz, in `<root>/MNIST/raw`,
      `<root>/FashionMNIST/raw` or Debian's folder; fetched by torchvision if there is none of
      these.
    - `cifar10`, `cifar100`: the files of the Python version, in `<root>/cifar-10-batches-py` and
      `<root>/cifar-100-python`; fetched likewise.
    - `cifar10_jpeg`: a copy of CIFAR-10 as JPEG files, an image folder `<root>/cifar10-jpeg`.
    - `imagenet`: `<root>/imagenet/{train,val}/<class>/*.JPEG`; `voc`: `<root>/VOCdevkit/VOC2012`,
      the masks of the classes, trained on `train` and tested on `val`. These stay on disk: what is
      there is verified, see `streams.py`.
    - `folder:PATH`: see `info`; its `mean` and `std` are computed here.

    Raises `InputError` for an unknown name, missing files that cannot be downloaded, damaged or
    changed ones, what does not fit into memory, and, for folders, whatever is not a well-formed
    set of images of one size.
    """
    details, place = info(name, root), str(data_root(root))
    try:
        data = _read(details, name, root)
    except OSError as error:
        why = _one_line(error)
        raise InputError(f"data = {place!r}: {name} cannot be read ({why})") from error
    except MemoryError as error:
        raise InputError(f"dataset = {name!r}: does not fit into memory") from error
    right = details.fingerprint in ("", data.fingerprint)
    allowed = f"{name} has fingerprint {data.fingerprint}, {details.fingerprint} expected"
    require(right, "data", place, f"{allowed}; delete its files to fetch them again")
    return data


def _read(details: DatasetInfo, name: str, root: str | Path | None) -> Dataset:
    place = data_root(root) / _PLACES.get(name, "")
    if name in ("imagenet", "voc"):
        return Dataset(details, *streams.find(details, place))
    if name == "digits":
        arrays = _digits()
    elif name.startswith(FOLDER):
        arrays = folders.read(folder_layout(name, root))
    elif name == "cifar10_jpeg":
        there = f"{name} needs {place.name} in it"
        require(place.is_dir(), "data", str(place.parent), there)
        arrays = folders.read(folder_layout(f"{FOLDER}{place}", root))
    else:
        arrays = _read_files(name, data_root(root), place)
    train, test = (ImageSet(*map(torch.from_numpy, part)) for part in arrays)
    if not details.mean:
        mean, std = channel_statistics(train.images)
        details = replace(details, mean=mean, std=std)
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(repr(tuple(part.images.shape)).encode())
        digest.update(part.images.numpy())
        digest.update(part.labels.numpy())
    return Dataset(details, train, test, digest.hexdigest())


def split(
    train: "ImageSet | streams.StreamSet", validation: int
) -> tuple["ImageSet | streams.StreamSet", "ImageSet | streams.StreamSet"]:
    """Training images without the last `validation` of a fixed permutation, and those.

    The permutation depends on the number of images only, not on the seed of a run: all runs are
    tuned on the same validation images, and a smaller validation set is part of a larger one.

    Raises `InputError` unless 1 <= `validation` < len(train).
    """
    allowed = f"a number of images from 1 to {len(train) - 1}"
    right = type(validation) is int and 1 <= validation < len(train)
    require(right, "validation", validation, allowed)
    generator = torch.Generator().manual_seed(_VALIDATION_SEED)
    order = torch.randperm(len(train), generator=generator)
    return train.subset(order[:-validation]), train.subset(order[-validation:])


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in pixels of 0..1, of images (N, H, W, C) uint8.

    A constant channel has the deviation 1, so that it can be divided by.
    """
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[3]):
        # counts of the 256 values: exact, and no float copy of all images
        share = torch.bincount(images[..., channel].flatten(), minlength=256).numpy()
        share = share / share.sum()
        mean = float(share @ values)
        means.append(mean)
        deviations.append(float(np.sqrt(share @ (values - mean) ** 2)) or 1.0)
    return tuple(means), tuple(deviations)


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


def _read_files(name: str, root: Path, place: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of both parts of a set of torchvision's, downloaded first where needed."""
    import torchvision.datasets

    kind = getattr(torchvision.datasets, _CLASSES[name])
    system = _SYSTEM_FOLDERS.get(name, place)
    folder = system if system.is_dir() and not place.is_dir() else place
    if not folder.is_dir():
        _download(kind, name, root, place)
    if not name.startswith("cifar"):
        arrays = [
            [_idx(folder / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
            for part in ("train", "t10k")
        ]
        return [(images[..., None], labels.astype(np.int64)) for images, labels in arrays]
    try:
        parts = [kind(place.parent, train=train) for train in (True, False)]
    except RuntimeError as error:  # a file is missing, or its md5 is not the known one
        again = "delete it to download it again"
        raise InputError(f"data = {str(place)!r}: {_one_line(error)}; {again}") from error
    return [
        (np.ascontiguousarray(part.data), np.array(part.targets, dtype=np.int64)) for part in parts
    ]


def _idx(path: Path) -> np.ndarray:
    """The uint8 array of an idx file: 0, 0, type, dimensions; big-endian sizes; the values."""
    path = path if path.is_file() else path.with_name(f"{path.name}.gz")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        shape = np.frombuffer(data, dtype=">i4", count=data[3], offset=4)
        values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3])
        return values.reshape(shape).copy()  # a copy: bytes are not writable
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        why = f"cannot be read ({_one_line(error)}); delete {path.parent} to download it again"
        raise InputError(f"data = {str(path)!r}: {why}") from error


def _download(kind: type, name: str, root: Path, place: Path) -> None:
    """Fetch a set into a temporary folder below `root`, then move it to `place`: all or nothing."""
    allowed = f"{name} needs it, and there is no such folder"
    require(root.is_dir(), "data", str(root), allowed)
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
            kind(temporary, download=True)
            place.parent.mkdir(exist_ok=True)
            if not place.is_dir():  # another process may have been faster
                (Path(temporary) / place.relative_to(root)).replace(place)
    except Exception as error:  # no network, a mirror's answer, a full or read-only disk
        raise InputError(
            f"data = {str(root)!r}: {name} is not there and could not be downloaded "
            f"({_one_line(error)})"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
