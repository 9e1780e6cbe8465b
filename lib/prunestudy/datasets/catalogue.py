"""What is known of each data set before it is read: sizes, statistics, fingerprints."""

import os
from dataclasses import dataclass
from pathlib import Path

from prunestudy.datasets import folders
from prunestudy.errors import path_of, require
from prunestudy.places import home

FOLDER = "folder:"


@dataclass(frozen=True)
class DatasetInfo:
    """The facts about one data set.

    `mean` and `std`: one value per channel, of training pixels scaled to 0..1; empty for an image
    folder until `load` computes them. `version` changes with the images and with our split of them.
    `masks`: every pixel has a label, 255 for none. Images of a streamed set are cropped to `height`
    and `width`. `fingerprint` is the one that `load` must find, empty where it is not known.
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

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.height, self.width


# Title, version, channels, height, width, classes, training images, test images.
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
# Mean and std of the training images; the tests compute them again.
_STATISTICS = {
    "digits": ((0.3054,), (0.3758,)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar10_jpeg": ((0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_PRETRAINED = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # torchvision's nets expect these
_FINGERPRINTS = {
    "digits": "82a84588fa0e0276844f84a52786720cfa5fa1aa7b71cd0e33d2ba23d3bad85e",
    "mnist": "f9f06a0dd76ba0dd234d7126d2a7a40257f9e97a61831ac2811f3450d6b90d4a",
    "fashion_mnist": "145c7cc693ba9309a106bf85524ac71e85fcfb2e7d8183008ef3c512c60b6793",
    "cifar10_jpeg": "de8d27527f9de4ddd178ee079501bb87b8a3a9a7c11584fd9600e8ece860fd7d",
}
_KNOWN = {}
for _name, _sizes in _SIZES.items():
    _facts = (*_sizes, *_STATISTICS.get(_name, _PRETRAINED), _name == "voc")
    _KNOWN[_name] = DatasetInfo(_name, *_facts, _FINGERPRINTS.get(_name, ""))


def names() -> tuple[str, ...]:
    """Names of the data sets of the project; `folder:PATH` is allowed besides."""
    return tuple(_KNOWN)


def data_root(root: str | Path | None = None) -> Path:
    """Folder of the data sets: `root`, else `PRUNESTUDY_DATA`, else the study's `data/`."""
    place = root or os.environ.get("PRUNESTUDY_DATA") or home() / "data"
    place = os.path.expanduser(path_of(place, "data"))  # noqa: PTH111
    return Path(place)  # pathlib's own raises for "~nobody"


def info(name: str, root: str | Path | None = None) -> DatasetInfo:
    """Facts about the data set `name`, one of `names()` (read nowhere) or `folder:PATH`.

    PATH is absolute or below the data root and holds images as {train,test}/<class>/<image>: they
    are listed, and the first one gives the size. A folder's version is a digest of its file names
    and sizes, its name the last part of PATH. Raises `InputError` for another layout or name.
    """
    allowed = f"allowed are {', '.join(names())}, folder:PATH"
    require(isinstance(name, str), "dataset", name, allowed)
    if not name.startswith(FOLDER):
        require(name in _KNOWN, "dataset", name, allowed)
        return _KNOWN[name]
    path = folder_path(name, root)
    (train, test), classes, digest = folders.list_images(name, path)
    size = folders.size_of(folders.decode(name, path, next(iter(train))))
    facts = (path.name, digest[:12], *size, classes, len(train), len(test))
    return DatasetInfo(FOLDER + path.name, *facts, mean=(), std=())


def folder_path(name: str, root: str | Path | None) -> Path:
    """Path of the image folder `folder:PATH`; `InputError` for an empty or undecodable PATH."""
    path = name.removeprefix(FOLDER)
    right = path.strip() != "" and path == path.replace("\0", "").encode(errors="ignore").decode()
    require(right, "dataset", name, "folder: is followed by the path of an image folder, in UTF-8")
    return data_root(root) / os.path.expanduser(path)  # noqa: PTH111


def fingerprint(name: str, root: str | Path | None = None) -> str:
    """The known fingerprint of a built-in set ("" if there is none), or a folder's current one.

    Nothing is read for one of `names()`, a folder is loaded. Raises `InputError` as `load` does.
    """
    if not str(name).startswith(FOLDER):
        return info(name).fingerprint
    from prunestudy.datasets.sources import load  # late: it needs torch

    return load(name, root).fingerprint
