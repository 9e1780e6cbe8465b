"""What is known of each data set before it is read: sizes, statistics, fingerprints."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from prunestudy.datasets import folders
from prunestudy.errors import require
from prunestudy.places import home

FOLDER = "folder:"


@dataclass(frozen=True)
class DatasetInfo:
    """The facts about one data set.

    `mean` and `std` have one value per channel, of pixels scaled to 0..1, over all training images.
    They are empty for an image folder that has not been loaded: `load(...).info` has them.
    `version` changes whenever the images or our split of them do. With `masks` each pixel has a
    label, 255 for none. Height and width of a streamed set are those that its images are cut to.
    `fingerprint` is what loading the set must give (see `Dataset`); empty where nobody has loaded
    it.
    """

    name: str
    title: str
    version: str
    channels: int
    height: int
    width: int
    num_classes: int
    train_images: int
    test_images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    masks: bool = False
    fingerprint: str = ""


# Title, version, channels, height, width, classes, training images and test images.
_SIZES = {
    "digits": ("Digits", "1", 1, 8, 8, 10, 1437, 360),
    "mnist": ("MNIST", "1", 1, 28, 28, 10, 60_000, 10_000),
    "fashion_mnist": ("Fashion-MNIST", "1", 1, 28, 28, 10, 60_000, 10_000),
    "cifar10": ("CIFAR-10", "1", 3, 32, 32, 10, 50_000, 10_000),
    "cifar10_jpeg": ("CIFAR-10 (JPEG copy)", "d5fe09c730f6", 3, 32, 32, 10, 50_000, 10_000),
    "cifar100": ("CIFAR-100", "1", 3, 32, 32, 100, 50_000, 10_000),
    "imagenet": ("ImageNet", "1", 3, 224, 224, 1000, 1_281_167, 50_000),
    "voc": ("Pascal VOC 2012", "1", 3, 513, 513, 21, 1464, 1449),
}
# Mean and std, computed from the training images; tests compute them again.
_STATISTICS = {
    "digits": ((0.3054,), (0.3758,)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar10_jpeg": ((0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# What torchvision's pretrained nets expect.
_PHOTOS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_FINGERPRINTS = {
    "digits": "82a84588fa0e0276844f84a52786720cfa5fa1aa7b71cd0e33d2ba23d3bad85e",
    "mnist": "f9f06a0dd76ba0dd234d7126d2a7a40257f9e97a61831ac2811f3450d6b90d4a",
    "fashion_mnist": "145c7cc693ba9309a106bf85524ac71e85fcfb2e7d8183008ef3c512c60b6793",
    "cifar10_jpeg": "de8d27527f9de4ddd178ee079501bb87b8a3a9a7c11584fd9600e8ece860fd7d",
}
_KNOWN = {
    name: DatasetInfo(
        name,
        *sizes,
        *_STATISTICS.get(name, _PHOTOS),
        masks=name == "voc",
        fingerprint=_FINGERPRINTS.get(name, ""),
    )
    for name, sizes in _SIZES.items()
}


def names() -> tuple[str, ...]:
    """Names of the data sets that come with the project; `folder:PATH` is allowed besides."""
    return tuple(_KNOWN)


def data_root(root: str | Path | None = None) -> Path:
    """Folder below which data sets lie: `root`, else `PRUNESTUDY_DATA`, else `data/` of the study.

    Whether it exists is not asked here.
    """
    return _home(root or os.environ.get("PRUNESTUDY_DATA") or home() / "data")


def info(name: str, root: str | Path | None = None) -> DatasetInfo:
    """Facts about the data set `name`: one of `names()`, or `folder:PATH`.

    The known sets need no disk. PATH is absolute or below the data root, with images in
    PATH/{train,test}/<class>/; the layout is listed and the first image's header read. A folder's
    version is a digest of its file names and sizes, and its name has only the last part of PATH.

    Raises `InputError` for an unknown name and for a folder that is not laid out so.
    """
    allowed = f"allowed are {', '.join(names())}, folder:PATH"
    require(isinstance(name, str), "dataset", name, allowed)
    if not name.startswith(FOLDER):
        require(name in _KNOWN, "dataset", name, allowed)
        return _KNOWN[name]
    layout = folder_layout(name, root)
    title, images = layout.path.name, [len(layout.files[split]) for split in folders.SPLITS]
    facts = (title, layout.version, *layout.size, len(layout.classes), *images)
    return DatasetInfo(FOLDER + title, *facts, mean=(), std=())


def folder_layout(name: str, root: str | Path | None) -> folders.Layout:
    """List the image folder `folder:PATH`, an absolute path or one below the data root."""
    path = name.removeprefix(FOLDER)
    allowed = "folder: is followed by the path of an image folder"
    require(path.strip() != "", "dataset", name, allowed)
    return folders.scan(name, data_root(root) / _home(path))


def fingerprint(name: str, root: str | Path | None = None) -> str:
    """The fingerprint that loading the data set `name` gives today; "" where it is not known.

    Needs no disk for the known sets. A folder is loaded, again only when a file of it changed.
    Raises `InputError` as `load` does.
    """
    if not str(name).startswith(FOLDER):
        return info(name).fingerprint
    layout = folder_layout(name, root)
    files = [file for split in folders.SPLITS for file, _ in layout.files[split]]
    states = [(layout.path / file).stat() for file in files]
    stamps = tuple((file, s.st_size, s.st_mtime_ns) for file, s in zip(files, states, strict=True))
    return _loaded(f"{FOLDER}{layout.path.absolute()}", stamps)


@functools.lru_cache(maxsize=8)
def _loaded(name: str, _: tuple[tuple[str, int, int], ...]) -> str:
    from prunestudy.datasets.sources import load  # late: it needs torch

    return load(name).fingerprint


def _home(path: str | Path) -> Path:
    # os.path's leaves "~nobody" as it is, where pathlib's raises
    return Path(os.path.expanduser(path))  # noqa: PTH111
