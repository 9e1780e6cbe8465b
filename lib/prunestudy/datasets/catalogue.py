"""What is known of each data set before it is read: sizes, statistics, checksums."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prunestudy.datasets import folders
from prunestudy.errors import require
from prunestudy.places import home

FOLDER = "folder:"
# Known sets that are image folders, by their folder below the data root.
IMAGE_FOLDERS = {"cifar10_jpeg": "cifar10-jpeg"}
# Sets that are too large for memory, by their folder below the data root.
STREAMED = {"imagenet": "imagenet", "voc": "VOCdevkit/VOC2012"}


@dataclass(frozen=True)
class DatasetInfo:
    """The facts about one data set.

    `mean` and `std` have one value per channel, of pixels scaled to 0..1, over all training images.
    They are empty for an image folder that has not been loaded: `load(...).info` has them.
    `checksums` maps the name of each unpacked file to its md5. `version` changes whenever the
    images or our split of them do. With `masks` each pixel has a label, 255 for none. Height and
    width of a streamed set are those that its images are cut to. `fingerprint` is what
    loading the set must give (see `Dataset`); empty where nobody has loaded it.
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
    checksums: Mapping[str, str] = field(default_factory=dict, hash=False)
    masks: bool = False
    fingerprint: str = ""


# What torchvision's pretrained nets expect.
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# Every mean and std below was computed from the training images; tests compute them again.
_KNOWN = {
    "digits": DatasetInfo(
        name="digits",
        title="Digits",
        version="1",
        channels=1,
        height=8,
        width=8,
        num_classes=10,
        train_images=1437,
        test_images=360,
        mean=(0.3054,),
        std=(0.3758,),
        fingerprint="82a84588fa0e0276844f84a52786720cfa5fa1aa7b71cd0e33d2ba23d3bad85e",
    ),
    "mnist": DatasetInfo(
        name="mnist",
        title="MNIST",
        version="1",
        channels=1,
        height=28,
        width=28,
        num_classes=10,
        train_images=60_000,
        test_images=10_000,
        mean=(0.1307,),
        std=(0.3081,),
        fingerprint="f9f06a0dd76ba0dd234d7126d2a7a40257f9e97a61831ac2811f3450d6b90d4a",
        checksums={
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
    ),
    "fashion_mnist": DatasetInfo(
        name="fashion_mnist",
        title="Fashion-MNIST",
        version="1",
        channels=1,
        height=28,
        width=28,
        num_classes=10,
        train_images=60_000,
        test_images=10_000,
        mean=(0.2860,),
        std=(0.3530,),
        fingerprint="145c7cc693ba9309a106bf85524ac71e85fcfb2e7d8183008ef3c512c60b6793",
        checksums={
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
    ),
    "cifar10": DatasetInfo(
        name="cifar10",
        title="CIFAR-10",
        version="1",
        channels=3,
        height=32,
        width=32,
        num_classes=10,
        train_images=50_000,
        test_images=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        # as torchvision has them
        checksums={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    "cifar10_jpeg": DatasetInfo(
        name="cifar10_jpeg",
        title="CIFAR-10 (JPEG copy)",
        version="d5fe09c730f6",
        channels=3,
        height=32,
        width=32,
        num_classes=10,
        train_images=50_000,
        test_images=10_000,
        mean=(0.4913, 0.4821, 0.4465),
        std=(0.2452, 0.2428, 0.2606),
        fingerprint="de8d27527f9de4ddd178ee079501bb87b8a3a9a7c11584fd9600e8ece860fd7d",
    ),
    "cifar100": DatasetInfo(
        name="cifar100",
        title="CIFAR-100",
        version="1",
        channels=3,
        height=32,
        width=32,
        num_classes=100,
        train_images=50_000,
        test_images=10_000,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        checksums={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
    ),
    "imagenet": DatasetInfo(
        name="imagenet",
        title="ImageNet",
        version="1",
        channels=3,
        height=224,
        width=224,
        num_classes=1000,
        train_images=1_281_167,
        test_images=50_000,
        **_IMAGENET,
    ),
    "voc": DatasetInfo(
        name="voc",
        title="Pascal VOC 2012",
        version="1",
        channels=3,
        height=513,
        width=513,
        num_classes=21,
        train_images=1464,
        test_images=1449,
        masks=True,
        **_IMAGENET,
    ),
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
    if name.startswith(FOLDER):
        return _folder_info(folder_layout(name, root))
    require(name in _KNOWN, "dataset", name, allowed)
    return _KNOWN[name]


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


def _folder_info(layout: folders.Layout) -> DatasetInfo:
    return DatasetInfo(
        name=FOLDER + layout.path.name,
        title=layout.path.name,
        version=layout.version,
        channels=layout.channels,
        height=layout.height,
        width=layout.width,
        num_classes=len(layout.classes),
        train_images=len(layout.files["train"]),
        test_images=len(layout.files["test"]),
        mean=(),
        std=(),
    )
