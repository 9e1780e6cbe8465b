"""Data sets in memory: what is read, what is refused, and batches bit by bit."""

import gzip
import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import one_line, refusal
from PIL import Image

import prunestudy
from prunestudy import datasets
from prunestudy.datasets import Batches, DatasetInfo, ImageSet, catalogue, sources
from prunestudy.errors import InputError

ALL = "digits, mnist, fashion_mnist, cifar10, cifar10_jpeg, cifar100, imagenet, voc"


def image_set(n, height=2, width=3, channels=1):
    count = n * height * width * channels
    images = (torch.arange(count) % 255 + 1).to(torch.uint8).view(n, height, width, channels)
    return ImageSet(images, torch.arange(n))


def plain(images, mean=None, std=None):
    """Info with which normalising gives the pixels back (0..255), unless told otherwise."""
    height, width, channels = images.images.shape[1:]
    mean, std = mean or (0.0,) * channels, std or (1 / 255,) * channels
    n = len(images)
    return DatasetInfo("tiny", "Tiny", "1", channels, height, width, 2, n, n, mean, std)


def pixels(x):
    return x.permute(0, 2, 3, 1).round().to(torch.uint8)


def refused(name, root):
    return refusal(lambda: datasets.load(name, root))


# --- what is known of a set


def test_known_sets_need_neither_disk_nor_torch():
    code = (
        "import sys; from prunestudy import datasets; "
        "print(datasets.names(), datasets.info('mnist', '/nowhere').train_images, "
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tuple(ALL.split(', '))} 60000 False\n"


def test_unknown_names_are_refused():
    for name in ("mnits", "", None):
        with pytest.raises(InputError) as caught:
            datasets.info(name)
        assert one_line(caught) == (f"dataset = {name!r}: allowed are {ALL}, folder:PATH")
    with pytest.raises(AttributeError, match="nothing"):
        _ = datasets.nothing


def test_data_root(monkeypatch):
    monkeypatch.setenv("PRUNESTUDY_DATA", "/from/env")
    assert datasets.data_root("/given") == Path("/given")
    assert datasets.data_root() == Path("/from/env")
    monkeypatch.delenv("PRUNESTUDY_DATA")
    assert datasets.data_root() == Path(prunestudy.__file__).parents[2] / "data"


# --- splits


def test_split_is_fixed_and_complete():
    images = image_set(20)
    train, validation = datasets.split(images, 5)
    assert (len(train), len(validation)) == (15, 5)
    assert sorted(train.labels.tolist() + validation.labels.tolist()) == list(range(20))
    assert torch.equal(train.images, images.images[train.labels])
    torch.manual_seed(99)
    assert torch.equal(datasets.split(images, 5)[0].labels, train.labels)
    smaller = datasets.split(images, 3)[1]
    assert smaller.labels.tolist() == validation.labels.tolist()[-3:]


@pytest.mark.parametrize("validation", [0, 20, 2.0, True])
def test_split_refuses(validation):
    with pytest.raises(InputError) as caught:
        datasets.split(image_set(20), validation)
    assert one_line(caught) == f"validation = {validation!r}: a whole number from 1 to 19"


# --- digits


def test_digits():
    data = datasets.load("digits")
    assert data.info is datasets.info("digits")
    assert data.train.images.shape == (1437, 8, 8, 1)
    assert data.test.images.shape == (360, 8, 8, 1)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.test.labels.bincount().tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    assert set(data.train.images.unique().tolist()) == {round(v * 255 / 16) for v in range(17)}
    assert data.fingerprint == datasets.fingerprint("digits") == data.info.fingerprint
    assert data.fingerprint.startswith("82a84588fa0e")
    mean, std = sources.channel_statistics(data.train.images)
    assert (round(mean[0], 4), round(std[0], 4)) == (data.info.mean[0], data.info.std[0])


# --- MNIST and CIFAR, read by torchvision


def idx(array):
    array = np.asarray(array, dtype=np.uint8)
    sizes = np.array(array.shape, dtype=">i4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


MNIST = {
    "train-images-idx3-ubyte": idx(np.arange(12).reshape(3, 2, 2)),
    "train-labels-idx1-ubyte": idx([2, 0, 1]),
    "t10k-images-idx3-ubyte": idx(np.arange(100, 108).reshape(2, 2, 2)),
    "t10k-labels-idx1-ubyte": idx([1, 1]),
}


@pytest.fixture
def tiny(monkeypatch):
    """MNIST and Fashion-MNIST shrunk to three and two images, and no network."""
    for name in ("mnist", "fashion_mnist"):
        small = replace(datasets.info(name), height=2, width=2, fingerprint="")
        monkeypatch.setitem(catalogue._KNOWN, name, small)
    monkeypatch.setattr(sources, "_DEBIAN", Path("/nowhere"))
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)


def no_network(*args, **kwargs):
    raise URLError("Name or service\nnot known")


def put(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def check_tiny(data):
    assert data.train.images.tolist() == np.arange(12).reshape(3, 2, 2, 1).tolist()
    assert data.train.labels.tolist() == [2, 0, 1]
    assert data.test.images.flatten().tolist() == list(range(100, 108))
    assert data.test.labels.tolist() == [1, 1]
    assert data.train.labels.dtype == torch.int64


def test_idx_files(tmp_path, tiny, monkeypatch):
    put(tmp_path / "MNIST/raw", MNIST)
    check_tiny(datasets.load("mnist", tmp_path))
    packed = {f"{name}.gz": gzip.compress(data) for name, data in MNIST.items()}
    system = put(tmp_path / "debian", packed)
    monkeypatch.setattr(sources, "_DEBIAN", system)
    check_tiny(datasets.load("fashion_mnist", tmp_path / "no-such-root"))


def test_a_set_of_another_fingerprint_is_refused(tmp_path, tiny, monkeypatch):
    put(tmp_path / "MNIST/raw", MNIST)
    found = datasets.load("mnist", tmp_path).fingerprint
    info = replace(datasets.info("mnist"), fingerprint=found)
    monkeypatch.setitem(catalogue._KNOWN, "mnist", info)
    assert datasets.load("mnist", tmp_path).fingerprint == found
    assert datasets.fingerprint("mnist", "/nowhere") == found
    put(tmp_path / "MNIST/raw", {"t10k-labels-idx1-ubyte": idx([1, 0])})
    line = refused("mnist", tmp_path)
    assert line.startswith(f"data = {str(tmp_path)!r}: mnist has fingerprint ")
    assert line.endswith(f", {found} expected; delete its files to download them again")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda _: b"", None])
def test_what_is_damaged_or_missing_is_refused(tmp_path, tiny, damage):
    name = "train-images-idx3-ubyte"
    put(tmp_path / "MNIST/raw", MNIST | ({name: damage(MNIST[name])} if damage else {}))
    if damage is None:
        (tmp_path / "MNIST/raw" / name).unlink()
    line = refused("mnist", tmp_path)
    assert line.startswith(f"data = {str(tmp_path)!r}: mnist cannot be read or downloaded (")
    assert damage or "Name or service not known" in line
    shutil.rmtree(tmp_path / "MNIST")
    refused("mnist", tmp_path)
    assert [*tmp_path.iterdir()] == []
    nowhere = tmp_path / "absent"
    assert refused("mnist", nowhere) == f"data = {str(nowhere)!r}: mnist needs this folder"
    assert not nowhere.exists()


class Cifar:
    """What torchvision gives for CIFAR: pixel p of channel c of image n is 3 n + c."""

    def __init__(self, root, train, download):
        self.targets = [3, 1, 7] if train else [9]
        rows = [np.repeat(np.arange(3) + 3 * n, 32 * 32) for n in range(len(self.targets))]
        self.data = np.array(rows, dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    monkeypatch.setattr(f"torchvision.datasets.{name.upper()}", Cifar)
    data = datasets.load(name, tmp_path)
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([3, 1, 7], [9])
    assert data.train.images.shape == (3, 32, 32, 3)
    assert (data.train.images[2] == torch.tensor([6, 7, 8])).all()


def test_the_jpeg_copy(tmp_path, monkeypatch):
    place = tmp_path / "cifar10-jpeg"
    for part, name in itertools.product(("train", "test"), ("airplane", "bird")):
        save(place / part / name / "0.jpg", (60, 9, 9), (32, 32))
    fingerprint = datasets.load(f"folder:{place}").fingerprint
    known = replace(datasets.info("cifar10_jpeg"), fingerprint=fingerprint)
    monkeypatch.setitem(catalogue._KNOWN, "cifar10_jpeg", known)
    data = datasets.load("cifar10_jpeg", tmp_path)
    assert (data.info, data.train.images.shape) == (known, (2, 32, 32, 3))
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 1]
    save(place / "test/bird/1.jpg", (60, 9, 9), (32, 32))
    assert "cifar10_jpeg has fingerprint" in refused("cifar10_jpeg", tmp_path)
    absent = refused("cifar10_jpeg", tmp_path / "absent")
    assert absent.endswith("cifar10-jpeg': cifar10_jpeg needs this folder")


# --- image folders


def save(path, value, size=(3, 2), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pets"
    save(root / "train/cat/b.png", (2, 4, 6))
    save(root / "train/cat/a.PNG", (0, 0, 0))
    save(root / "train/dog/a.bmp", (255, 255, 255))
    save(root / "test/cat/a.png", (1, 1, 1))
    save(root / "test/dog/a.png", 7, mode="L")
    (root / "train/.hidden").write_text("ignored")
    return root


def test_folder(folder, tmp_path):
    data = datasets.load("folder:pets", tmp_path)
    assert data.train.images.shape == (3, 2, 3, 3)
    assert data.train.images[:, 1, 2].tolist() == [[0, 0, 0], [2, 4, 6], [255, 255, 255]]
    assert data.train.labels.tolist() == [0, 0, 1]
    assert data.test.images[:, 0, 0].tolist() == [[1, 1, 1], [7, 7, 7]]
    assert data.test.labels.tolist() == [0, 1]
    assert data.info.mean == pytest.approx([257 / 765, 259 / 765, 261 / 765])
    assert data.info.std[0] == pytest.approx(np.std([0, 2 / 255, 1]))
    known = datasets.info("folder:pets", tmp_path)
    assert known == replace(data.info, mean=(), std=())
    assert (known.name, known.title, known.num_classes) == ("folder:pets", "pets", 2)
    assert (known.channels, known.height, known.width) == (3, 2, 3)
    assert (known.train_images, known.test_images) == (3, 2)
    assert datasets.info(f"folder:{folder}", "/nowhere") == known


def test_grey_folder(tmp_path):
    for split, name in itertools.product(("train", "test"), ("x", "y")):
        save(tmp_path / f"g/{split}/{name}/1.jpg", 51, mode="L")
    data = datasets.load("folder:g", tmp_path)
    assert data.train.images.shape == (2, 2, 3, 1)
    assert data.info.channels == 1
    assert data.info.mean == pytest.approx((0.2,))
    assert data.info.std == (1.0,)  # constant images: nothing to divide by
    save(tmp_path / "g/train/y/2.png", (1, 2, 3))
    assert refused("folder:g", tmp_path) == (
        "dataset = 'folder:g': train/y/2.png has (3, 2, 3), (channels, height, width) (1, 2, 3) "
        "expected as in the first"
    )


def another_size(folder):
    save(folder / "test/dog/z.png", (0, 0, 0), size=(4, 2))
    expected = "(channels, height, width) (3, 2, 3) expected as in the first"
    return f"test/dog/z.png has (3, 2, 4), {expected}"


def no_image(folder):
    (folder / "train/cat/c.jpg").write_bytes(b"no image")
    return "train/cat/c.jpg cannot be read ("


def half_an_image(folder):
    whole = (folder / "train/cat/b.png").read_bytes()
    (folder / "test/dog/a.png").write_bytes(whole[:-25])
    return "test/dog/a.png cannot be read ("


def deep_image(folder):
    Image.new("I;16", (3, 2)).save(folder / "test/dog/b.png")
    return "test/dog/b.png has mode I;16, not 8 bits a channel"


def missing_and_empty_classes(folder):
    save(folder / "train/eel/a.png", (0, 0, 0))
    save(folder / "test/fox/a.png", (0, 0, 0))
    (folder / "train/gnu").mkdir()
    empty = ["test/eel", "train/fox", "train/gnu", "test/gnu"]
    return f"no images in {empty}; every class has images in train and in test"


def other_files(folder):
    (folder / "train/cat/photo.tif").write_bytes(b"")
    (folder / "test/stray.png").write_bytes(b"")
    (folder / "train/dog/deeper").mkdir()
    strays = ["test/stray.png", "train/cat/photo.tif", "train/dog/deeper"]
    return f"not .png, .jpg, .jpeg, .bmp in a class's folder: {strays}"


def no_test_images(folder):
    (folder / "test").rename(folder / "old")
    return f"{folder} cannot be read ([Errno 2] No such file or directory: '{folder}/test')"


def no_classes(folder):
    for part in ("train", "test"):
        (folder / part).rename(folder / f"old {part}")
        (folder / part).mkdir()
    return "no images in ['train/*', 'test/*']; every class has images in train and in test"


DAMAGE = [
    *(another_size, no_image, half_an_image, deep_image),
    *(missing_and_empty_classes, other_files, no_test_images, no_classes),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_a_folder_that_is_refused(folder, tmp_path, damage):
    why = damage(folder)
    line = refused("folder:pets", tmp_path)
    assert line.startswith(f"dataset = 'folder:pets': {why}")
    assert line.endswith(why.rpartition("(")[2] or ")")


@pytest.mark.parametrize("path", [" ", "\udcff"])
def test_a_folder_without_a_path(tmp_path, path):
    needs = "folder: is followed by the path of an image folder, in UTF-8"
    assert refused(f"folder:{path}", tmp_path).endswith(f": {needs}")


# --- batches


def test_epoch_is_a_permutation_of_full_batches():
    images = image_set(10)
    batches = Batches(images, plain(images), 3, seed=4)
    assert (len(batches), batches.steps) == (10, 3)
    seen = []
    for x, y in batches.epoch(0):
        assert x.shape == (3, 1, 2, 3)
        assert x.dtype == torch.float32
        assert torch.equal(pixels(x), images.images[y])
        seen += y.tolist()
    assert len(set(seen)) == 9
    assert seen != sorted(seen)


def test_normalisation_and_memory_format():
    images = ImageSet(
        torch.tensor([0, 51, 255, 102, 204, 153]).to(torch.uint8).view(1, 1, 2, 3),
        torch.tensor([1]),
    )
    info = plain(images, (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    x, y = next(Batches(images, info, 1).ordered())
    assert x.shape == (1, 3, 1, 2)
    assert x[0].flatten().tolist() == pytest.approx([-1, -0.2, -0.2, 2.2, 0.5, 0.3], abs=1e-6)
    assert y.tolist() == [1]
    wide = image_set(4, 5, 6, 3)
    for x, _ in Batches(wide, plain(wide), 2, shift=1, flip=True).epoch(0):
        assert x.is_contiguous(memory_format=torch.channels_last)


def reference(images, image, top, left, flip, shift):
    h, w, c = images.shape[1:]
    padded = np.zeros((h + 2 * shift, w + 2 * shift, c), dtype=np.uint8)
    padded[shift : shift + h, shift : shift + w] = images[image]
    crop = padded[top : top + h, left : left + w]
    return crop[:, ::-1] if flip else crop


@pytest.mark.parametrize("channels", [1, 3])
def test_every_batch_is_a_shifted_and_flipped_image(channels):
    shift, images = 2, image_set(40, 4, 5, channels)
    source, counts, flips = images.images.numpy(), np.zeros((5, 5), dtype=int), 0
    batches = Batches(images, plain(images), 8, shift=shift, flip=True, seed=3)
    for epoch in range(10):
        for x, y in batches.epoch(epoch):
            for got, image in zip(pixels(x).numpy(), y.tolist(), strict=True):
                found = [
                    (top, left, flip)
                    for top, left, flip in itertools.product(range(5), range(5), (False, True))
                    if np.array_equal(got, reference(source, image, top, left, flip, shift))
                ]
                assert len(found) == 1
                counts[found[0][:2]] += 1
                flips += found[0][2]
    # 400 draws: 80 of each shift with sd 8, 200 flips with sd 10; 4 sd allowed
    assert np.all(np.abs(counts.sum(0) - 80) < 32)
    assert np.all(np.abs(counts.sum(1) - 80) < 32)
    assert abs(flips - 200) < 40


def same(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(left, right, strict=True)
    )


def test_resumed_epoch_is_the_tail_of_the_full_one():
    images = image_set(23)
    settings = {"shift": 1, "flip": True, "seed": 5}
    full = list(Batches(images, plain(images), 4, **settings).epoch(7))
    torch.manual_seed(1)  # the global generator plays no part
    resumed = Batches(images, plain(images), 4, **settings)
    list(resumed.epoch(2))  # nor do epochs before
    for start in range(6):
        assert same(resumed.epoch(7, start), full[start:])


def test_seeds_and_epochs_differ():
    images = image_set(50)

    def labels(seed, epoch):
        return torch.cat([y for _, y in Batches(images, plain(images), 10, seed=seed).epoch(epoch)])

    drawn = [labels(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for left, right in itertools.combinations(drawn, 2):
        assert not torch.equal(left, right)


@pytest.mark.parametrize(("size", "lengths"), [(None, [4, 4, 2]), (3, [3, 3, 3, 1]), (99, [10])])
def test_ordered(size, lengths):
    images = image_set(10, channels=3)
    found = list(Batches(images, plain(images), 4, shift=1, flip=True).ordered(size))
    assert [len(y) for _, y in found] == lengths
    assert torch.equal(torch.cat([pixels(x) for x, _ in found]), images.images)
    assert torch.cat([y for _, y in found]).tolist() == list(range(10))


def test_batches_refuse():
    images = image_set(5)
    known, whole = plain(images), "a whole number from"
    batches = Batches(images, known, 2)
    for call, message in (
        (lambda: Batches(images, known, 0), f"batch_size = 0: {whole} 1 to 5"),
        (lambda: Batches(images, known, 6), f"batch_size = 6: {whole} 1 to 5"),
        (lambda: Batches(images, known, 2.0), f"batch_size = 2.0: {whole} 1 to 5"),
        (lambda: Batches(images, known, 2, shift=2), f"shift = 2: {whole} 0 to 1"),
        (
            lambda: Batches(images, replace(known, width=2), 2),
            "images = (2, 3, 1): tiny has (height, width, channels) (2, 2, 1)",
        ),
        (
            lambda: Batches(images, replace(known, mean=(), std=()), 2),
            "info.mean = (): one value per channel, as in load(...).info",
        ),
        (lambda: batches.epoch(-1), f"epoch = -1: {whole} 0"),
        (lambda: batches.epoch(0, start=3), f"start = 3: {whole} 0 to 2"),
        (lambda: batches.ordered(0), f"batch_size = 0: {whole} 1"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert one_line(caught) == message


@pytest.mark.cuda
def test_batches_do_not_depend_on_the_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = image_set(20, 6, 6, 3)
    here, there = (
        Batches(images, plain(images), 4, shift=2, flip=True, device=device).epoch(1)
        for device in ("cpu", "cuda")
    )
    for (x, y), (x_there, y_there) in zip(here, there, strict=True):
        assert x_there.is_cuda
        assert torch.equal(y, y_there.cpu())
        assert torch.equal(pixels(x), pixels(x_there.cpu()))


# --- the real files


@pytest.mark.mnist
def test_mnist():
    root = Path(os.environ.get("PRUNESTUDY_DATA") or "unset")
    if not (root / "MNIST/raw").is_dir():
        pytest.skip("no MNIST/raw below PRUNESTUDY_DATA")
    check_real("mnist", root, [5, 0, 4], [7, 2, 1])


def test_fashion_mnist():
    if not sources._DEBIAN.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    check_real("fashion_mnist", "/nowhere", [9, 0, 0], [9, 2, 1])


def check_real(name, root, train_labels, test_labels):
    data = datasets.load(name, root)
    assert data.train.images.shape == (60_000, 28, 28, 1)
    assert data.test.images.shape == (10_000, 28, 28, 1)
    assert data.train.labels[:3].tolist() == train_labels
    assert data.test.labels[:3].tolist() == test_labels
    mean, std = sources.channel_statistics(data.train.images)
    assert (round(mean[0], 4), round(std[0], 4)) == (data.info.mean[0], data.info.std[0])


@pytest.mark.mnist
def test_the_real_jpeg_copy_has_the_known_files():
    root = Path(os.environ.get("PRUNESTUDY_DATA") or "unset")
    if not (root / "cifar10-jpeg").is_dir():
        pytest.skip("no cifar10-jpeg below PRUNESTUDY_DATA")
    found, known = datasets.info("folder:cifar10-jpeg", root), datasets.info("cifar10_jpeg")
    same = ("version", "channels", "height", "width", "num_classes", "train_images", "test_images")
    assert [getattr(found, key) for key in same] == [getattr(known, key) for key in same]
