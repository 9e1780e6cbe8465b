"""Reading data sets: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR, image folders, streams.

Every byte of a downloaded set is verified by md5 at each loading.
"""

import gzip
import hashlib
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prunestudy.datasets import cifar, folders, streams
from prunestudy.datasets.catalogue import (
    FOLDER,
    IMAGE_FOLDERS,
    STREAMED,
    DatasetInfo,
    data_root,
    folder_layout,
    info,
)
from prunestudy.errors import InputError, require

# Name of torchvision's class, and its folder below the data root.
_TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
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

    def subset(self, indices: Tensor | Sequence[int] | slice) -> "ImageSet":
        """Images and labels at `indices`, in their order: copies, but views for a slice.

        Raises `IndexError` for an index that is not there.
        """
        if not isinstance(indices, slice):
            indices = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        return ImageSet(self.images[indices], self.labels[indices])

    def to(self, device: str | torch.device) -> "ImageSet":
        """The same images and labels on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device))


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


def load(name: str, root: str | Path | None = None, download: bool = True) -> Dataset:
    """Read the data set `name`, one of `names()` or `folder:PATH`, from below the data root.

    - `digits`: 8x8 images of scikit-learn, their values 0..16 stretched to 0..255. It has no
      official split; ours takes each fifth image of each class in a fixed random order for the
      test (1,437 and 360 images). The same writers are in both parts.
    - `mnist`, `fashion_mnist`: the four idx files, plain or .gz, in `<root>/MNIST/raw`,
      `<root>/FashionMNIST/raw` or Debian's folder; fetched by torchvision if they are in none of
      these and `download`.
    - `cifar10`, `cifar100`: the files of the Python version, in `<root>/cifar-10-batches-py` and
      `<root>/cifar-100-python`; fetched likewise.
    - `cifar10_jpeg`: a copy of CIFAR-10 as JPEG files, an image folder `<root>/cifar10-jpeg`.
    - `imagenet`: `<root>/imagenet/{train,val}/<class>/*.JPEG`; `voc`: `<root>/VOCdevkit/VOC2012`,
      the masks of the classes, trained on `train` and tested on `val`. These stay on disk: what is
      there is verified, see `streams.py`.
    - `folder:PATH`: see `info`; its `mean` and `std` are computed here.

    Raises `InputError` for an unknown name, missing files that cannot be downloaded, a wrong md5
    or fingerprint, what does not fit into memory, and, for folders, whatever is not a well-formed
    set of images of one size.
    """
    details, place = info(name, root), str(data_root(root))
    try:
        data = _read(details, name, root, download)
    except OSError as error:
        why = _one_line(error)
        raise InputError(f"data = {place!r}: {name} cannot be read ({why})") from error
    except MemoryError as error:
        raise InputError(f"dataset = {name!r}: does not fit into memory") from error
    right = details.fingerprint in ("", data.fingerprint)
    allowed = f"{name} has fingerprint {data.fingerprint}, {details.fingerprint} expected"
    require(right, "data", place, allowed)
    return data


def _read(details: DatasetInfo, name: str, root: str | Path | None, download: bool) -> Dataset:
    if name in STREAMED:
        train, test, fingerprint = streams.find(details, data_root(root) / STREAMED[name])
        return Dataset(details, train, test, fingerprint)
    if name == "digits":
        train, test = _digits()
    elif name.startswith(FOLDER):
        arrays = folders.read(folder_layout(name, root))
        train, test = (ImageSet(*map(torch.from_numpy, arrays[part])) for part in folders.SPLITS)
        mean, std = channel_statistics(train.images)
        details = replace(details, mean=mean, std=std)
    elif name in IMAGE_FOLDERS:
        train, test = _known_folder(details, root)
    else:
        files = _read_files(details, data_root(root), download)
        arrays = cifar.parse(files) if name.startswith("cifar") else _parse_idx_files(files)
        train, test = (ImageSet(*map(torch.from_numpy, arrays[part])) for part in folders.SPLITS)
    return Dataset(details, train, test, _fingerprint(train, test))


def split(
    train: "ImageSet | streams.StreamSet", validation: int
) -> tuple["ImageSet | streams.StreamSet", "ImageSet | streams.StreamSet"]:
    """Training images without the last `validation` of a fixed permutation, and those.

    The permutation depends on the number of images only, not on the seed of a run: all runs are
    tuned on the same validation images, and a smaller validation set is part of a larger one.

    Raises `InputError` unless 1 <= `validation` < len(train).
    """
    require(
        type(validation) is int and 1 <= validation < len(train),
        "validation",
        validation,
        f"a number of images from 1 to {len(train) - 1}",
    )
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


def _fingerprint(*parts: ImageSet) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(tuple(part.images.shape)).encode())
        digest.update(part.images.numpy())
        digest.update(part.labels.numpy())
    return digest.hexdigest()


def _digits() -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8)).unsqueeze(3)
    whole = ImageSet(images, torch.from_numpy(digits.target.astype(np.int64)))
    # RandomState: its stream is frozen for ever, that of newer generators is not
    order = np.random.RandomState(_DIGITS_SEED).permutation(len(whole))
    by_class = order[np.argsort(digits.target[order], kind="stable")]
    test = np.zeros(len(whole), dtype=bool)
    test[by_class[::5]] = True
    return whole.subset(np.flatnonzero(~test)), whole.subset(np.flatnonzero(test))


def _known_folder(details: DatasetInfo, root: str | Path | None) -> tuple[ImageSet, ImageSet]:
    """Train and test images of a folder whose files' names and sizes are known."""
    place = data_root(root) / IMAGE_FOLDERS[details.name]
    require(place.is_dir(), "data", str(place.parent), f"{details.name} needs {place.name} in it")
    layout = folder_layout(f"{FOLDER}{place}", root)
    allowed = f"files of version {details.version} expected; some are missing, changed or added"
    require(layout.version == details.version, "data", str(place), allowed)
    arrays = folders.read(layout)
    train, test = (ImageSet(*map(torch.from_numpy, arrays[part])) for part in folders.SPLITS)
    return train, test


def _read_files(details: DatasetInfo, root: Path, download: bool) -> dict[str, bytes]:
    """The verified files of a set of torchvision's, by name, downloaded first where needed."""
    raw = root / _TORCHVISION[details.name][1]
    places = [raw, *([_SYSTEM_FOLDERS[details.name]] if details.name in _SYSTEM_FOLDERS else [])]
    folder = next((place for place in places if _has_all(place, details)), None)
    if folder is None:
        absent = f"{details.name} is not there (no files in {', '.join(map(str, places))})"
        require(download, "data", str(root), absent)
        _download(details, root)
        folder = raw
    return {file: _verified(folder, file, details) for file in details.checksums}


def _parse_idx_files(files: dict[str, bytes]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, H, W, 1) uint8 and labels (N,) int64 of both parts."""
    arrays = {file: _parse_idx(data) for file, data in files.items()}
    return {
        part: (
            arrays[f"{prefix}-images-idx3-ubyte"][..., None],
            arrays[f"{prefix}-labels-idx1-ubyte"].astype(np.int64),
        )
        for part, prefix in zip(folders.SPLITS, ("train", "t10k"), strict=True)
    }


def _has_all(folder: Path, details: DatasetInfo) -> bool:
    return all(
        (folder / file).is_file() or (folder / f"{file}.gz").is_file() for file in details.checksums
    )


def _verified(folder: Path, file: str, details: DatasetInfo) -> bytes:
    """The unpacked bytes of one file, plain or .gz, if they have the md5 that they should have."""
    path = folder / file
    if not path.is_file():
        path = folder / f"{file}.gz"
    expected = details.checksums[file]
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"data = {str(path)!r}: cannot be read ({_one_line(error)}), "
            f"contents of md5 {expected} expected"
        ) from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    require(
        found == expected,
        "data",
        str(path),
        f"has md5 {found}, {expected} expected; delete it to download it again",
    )
    return data


def _parse_idx(data: bytes) -> np.ndarray:
    """The uint8 array of an idx file: 0, 0, type, dimensions; big-endian sizes; the values."""
    dimensions = data[3]
    shape = np.frombuffer(data, dtype=">i4", count=dimensions, offset=4)
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions)
    return values.reshape(shape).copy()  # a copy: bytes are not writable


def _download(details: DatasetInfo, root: Path) -> None:
    """Fetch the files into a temporary folder below `root`, verify, move: all or nothing."""
    allowed = f"{details.name} needs it, and there is no such folder"
    require(root.is_dir(), "data", str(root), allowed)
    name, place = _TORCHVISION[details.name]
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
            import torchvision.datasets

            getattr(torchvision.datasets, name)(temporary, download=True)
            fetched, raw = Path(temporary, place), root / place
            for file in details.checksums:
                _verified(fetched, file, details)
            raw.mkdir(parents=True, exist_ok=True)
            for file in details.checksums:
                (fetched / file).replace(raw / file)
    except Exception as error:  # no network, a mirror's answer, a full or read-only disk
        raise InputError(
            f"data = {str(root)!r}: {details.name} is not there and could not be downloaded "
            f"({_one_line(error)})"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
