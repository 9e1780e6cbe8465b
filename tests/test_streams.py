"""Sets that stay on disk: what is refused, and batches that depend on (seed, epoch) alone."""

import itertools
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import one_line, refusal, small_imagenet, small_voc
from PIL import Image

from prunestudy import datasets
from prunestudy.datasets import ImageSet, Stream, batches_of, streams
from prunestudy.errors import InputError
from prunestudy.study.settings import own_settings


@pytest.fixture
def imagenet(monkeypatch, tmp_path):
    return small_imagenet(monkeypatch, tmp_path)


@pytest.fixture
def voc(monkeypatch, tmp_path):
    return small_voc(monkeypatch, tmp_path)


def refused(name, root):
    return refusal(lambda: datasets.load(name, root))


def stream(data, size=4, part="train", **options):
    return batches_of(getattr(data, part), data.info, size, **options)


def equal(found, expected):
    pairs = itertools.zip_longest(found, expected)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


# --- batches


def test_an_epoch_has_every_image_once(imagenet):
    data = datasets.load("imagenet", imagenet)
    batches = stream(data, 5, seed=1, workers=0)
    assert (type(batches), len(batches), batches.steps) == (Stream, 12, 2)
    seen = list(batches.epoch(0))
    assert [tuple(x.shape) for x, _ in seen] == [(5, 3, 32, 32)] * 2
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in seen)
    assert {x.dtype for x, _ in seen} == {torch.float32}
    (_, labels), *rest = stream(data, 12, workers=0).epoch(3)
    assert (labels.bincount().tolist(), rest) == ([4, 4, 4], [])


@pytest.mark.parametrize("name", ["imagenet", "voc"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_depend_on_seed_and_epoch_alone(name, workers, request):
    data = datasets.load(name, request.getfixturevalue(name))
    options = {"size": 2, "flip": True, "seed": 3}
    torch.manual_seed(0)
    expected = list(stream(data, workers=0, **options).epoch(1))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = stream(data, workers=workers, **options)
    assert equal(again.epoch(1), expected)
    assert equal(again.epoch(1, start=1), expected[1:])
    assert list(again.epoch(1, start=len(expected))) == []
    assert torch.equal(before, torch.get_rng_state())
    if workers == 0:
        assert not equal(again.epoch(0), expected)
        assert not equal(stream(data, workers=0, size=2, flip=True).epoch(1), expected)
        assert not equal(stream(data, workers=0, size=2, seed=3).epoch(1), expected)


def test_images_that_are_looked_at_are_resized_and_cut_in_the_middle(imagenet):
    data = datasets.load("imagenet", imagenet)
    (x, y), *rest = stream(data, 6, "test", workers=0).ordered()
    assert (x.shape, y.tolist(), rest) == ((6, 3, 32, 32), [0, 0, 1, 1, 2, 2], [])
    with Image.open(imagenet / "imagenet/val/n01/1.JPEG") as image:
        # The shorter side, 37, becomes 32 * 256 / 224 = 37; the middle is 32x32.
        pixels = np.asarray(image)[2:34, 4:36]
    assert image.size == (41, 37)
    mean, std = np.array(data.info.mean), np.array(data.info.std)
    np.testing.assert_allclose(
        x[3].permute(1, 2, 0), (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-6
    )
    sizes = [len(y) for _, y in stream(data, 5, "test", workers=0).ordered(4)]
    assert sizes == [4, 2]


def test_batches_to_look_at_stay_small(monkeypatch, imagenet):
    monkeypatch.setattr("prunestudy.datasets.streams._MOST_VALUES", 3 * 3 * 32 * 32)
    data = datasets.load("imagenet", imagenet)
    assert [len(y) for _, y in stream(data, 6, "test", workers=0).ordered(512)] == [3, 3]


def test_image_and_mask_move_together(voc):
    """Where the mask says 1 it is red, where 2 blue, where nothing was it is the mean colour."""
    data = datasets.load("voc", voc)
    seen = set()
    for epoch in range(6):
        for x, y in stream(data, 4, flip=True, workers=0).epoch(epoch):
            assert (x.shape, y.shape, y.dtype) == ((4, 3, 32, 32), (4, 32, 32), torch.int64)
            red, blue = x[:, 0] > x[:, 2] + 1, x[:, 2] > x[:, 0] + 1
            # Resizing blends the column where the colours meet, and not so the labels.
            assert (red & (y == 2)).float().mean() < 0.05
            assert (blue & (y == 1)).float().mean() < 0.05
            assert (y == 1).sum() > 0
            border = (x.abs().amax(1) < 0.02) & (y == 255)
            seen.add(bool(border.any()))
            assert set(y.unique().tolist()) <= {1, 2, 255}
    assert True in seen


def test_masks_that_are_looked_at_are_whole(voc):
    data = datasets.load("voc", voc)
    ((x, y),) = stream(data, 2, "test", workers=0).ordered()
    for i in range(2):
        mask = y[i, :20, :30]
        assert mask[0].tolist() == [255] * 30
        assert mask[1:].eq(1).sum(1).tolist() == [8 + 4 * i] * 19
        assert mask[1:].eq(2).sum(1).tolist() == [22 - 4 * i] * 19
        assert (y[i] != 255).sum() == 19 * 30
        assert x[i, :, 20:].abs().max() < 0.02


def test_split_takes_the_images_that_it_takes_of_others(imagenet):
    data = datasets.load("imagenet", imagenet)
    train, validation = datasets.split(data.train, 5)
    assert (len(train), len(validation)) == (7, 5)
    both = sorted([*train.images.tolist(), *validation.images.tolist()])
    assert both == sorted(data.train.images.tolist())
    assert [name.split("/")[1] for name in train.images] == [f"n{y:02}" for y in train.labels]


def test_memory_does_not_grow(monkeypatch):
    """Batches as large as ImageNet's, 19 MB as floats: all of them would be 4 GB."""
    blank = np.zeros((224, 224, 3), np.uint8)
    monkeypatch.setattr(streams._Decoded, "__getitem__", lambda *_: (blank, 0))
    images = ImageSet(np.array(["1.jpg"] * 3200), np.zeros(3200, int), Path())
    batches = batches_of(images, datasets.info("imagenet"), 32, workers=2)
    process, sizes = psutil.Process(), []
    for epoch in range(2):
        for _ in batches.epoch(epoch):
            sizes.append(process.memory_info().rss)
    assert len(sizes) == 200
    assert max(sizes) - sizes[0] < 1e9
    # An epoch that kept its batches would need 2 GB more; some are on their way at any time.
    assert max(sizes[100:]) - max(sizes[:100]) < 400e6


def test_an_image_is_drawn_by_seed_epoch_and_index(imagenet):
    data = datasets.load("imagenet", imagenet)
    transforms = streams.training_transforms(data.info, flip=True)
    twice = data.train.subset(np.array([5, 5]))

    def drawn(seed, epoch, index):
        return streams._Decoded(twice, data.info, transforms, seed)[epoch, index][0]

    every = [drawn(*key) for key in [(3, 1, 0), (3, 1, 1), (3, 2, 0), (4, 1, 0)]]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(every, 2))
    assert np.array_equal(drawn(3, 1, 0), every[0])
    normal = (every[0] / 255 - data.info.mean) / data.info.std
    images = [x[0] for x, _ in stream(data, 1, flip=True, seed=3, workers=0).epoch(1)]
    assert not any(np.allclose(x.permute(1, 2, 0), normal, atol=1e-5) for x in images)
    images = [x[0] for x, _ in batches_of(twice, data.info, 1, flip=True, seed=3).epoch(1)]
    assert sum(np.allclose(x.permute(1, 2, 0), normal, atol=1e-5) for x in images) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 13}, "batch_size = 13: a whole number from 1 to 12"),
        ({"shift": 2}, "shift = 2: 0: images of imagenet are cropped at random"),
        ({"workers": -1}, "workers = -1: a whole number from 0"),
    ],
)
def test_bad_options_of_a_stream(imagenet, options, message):
    data = datasets.load("imagenet", imagenet)
    with pytest.raises(InputError) as caught:
        stream(data, **options)
    assert one_line(caught) == message
    with pytest.raises(InputError, match="start = 4: a whole number from 0 to 3"):
        next(stream(data, workers=0).epoch(0, start=4))
    with pytest.raises(InputError, match="batch_size = 0"):
        next(stream(data, workers=0).ordered(0))


# --- what is refused before a training


def test_what_is_known_and_found(imagenet):
    data = datasets.load("imagenet", imagenet)
    assert (len(data.train), len(data.test), len(data.fingerprint)) == (12, 6, 64)
    assert datasets.load("imagenet", imagenet).fingerprint == data.fingerprint
    target = imagenet / "imagenet/train/n00/0.JPEG"
    Image.new("RGB", (50, 40)).save(target)
    assert datasets.load("imagenet", imagenet).fingerprint != data.fingerprint


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_named_in_one_line(imagenet, workers):
    data = datasets.load("imagenet", imagenet)
    (imagenet / "imagenet/train/n01/2.JPEG").write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        list(stream(data, workers=workers).epoch(0))
    assert one_line(caught).startswith("dataset = 'imagenet': train/n01/2.JPEG cannot be read (")


@pytest.mark.parametrize("rest", [b"no image", b"", None])
def test_broken_images_are_counted_and_named_before_a_training(imagenet, rest):
    for name in ("train/n01/2.JPEG", "val/n00/0.JPEG"):
        file = imagenet / "imagenet" / name
        file.write_bytes(file.read_bytes()[:-20] if rest is None else rest)
    with pytest.raises(InputError) as caught:
        datasets.load("imagenet", imagenet)
    names = "['train/n01/2.JPEG', 'val/n00/0.JPEG']"
    assert one_line(caught) == f"dataset = 'imagenet': 2 images cannot be read: {names}"


def test_missing_classes_and_images(imagenet):
    folder = imagenet / "imagenet"
    held = (folder / "val/n01").rename(folder / "held")
    assert refused("imagenet", imagenet) == (
        "dataset = 'imagenet': no images in ['val/n01']; every class has images in train and in val"
    )
    held.rename(folder / "val/n01")
    (folder / "train/n02/3.JPEG").unlink()
    assert refused("imagenet", imagenet) == (
        f"data = {str(folder)!r}: (3, 11, 6) classes, training and test images, (3, 12, 6) expected"
    )
    nowhere = imagenet / "nowhere"
    assert refused("imagenet", nowhere) == (
        f"data = {str(nowhere / 'imagenet')!r}: imagenet needs this folder"
    )


@pytest.mark.parametrize("mask", [("L", (30, 21)), ("L", (30, 20), 3), ("RGB", (30, 20))])
def test_masks_that_do_not_fit(voc, mask):
    Image.new(*mask).save(voc / "VOCdevkit/VOC2012/SegmentationClass/train_2.png")
    batches = stream(datasets.load("voc", voc), workers=0)
    with pytest.raises(InputError) as caught:
        list(batches.ordered())
    file, size = "SegmentationClass/train_2.png", (30, 20)
    needs = f"{file} needs a class or 255 for each of {size} pixels"
    assert one_line(caught) == f"dataset = 'voc': {needs}"


def test_files_that_are_missing(voc):
    (voc / "VOCdevkit/VOC2012/JPEGImages/train_3.jpg").unlink()
    line = refused("voc", voc)
    assert line.startswith(f"data = {str(voc)!r}: voc cannot be read or downloaded (")
    assert "JPEGImages/train_3.jpg" in line


# --- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "voc", "model": "resnet50"}, "model = 'resnet50': voc has masks"),
        (
            {"dataset": "imagenet", "model": "deeplabv3plus_resnet50"},
            "model = 'deeplabv3plus_resnet50': imagenet has one label an image",
        ),
    ],
)
def test_nets_for_masks_need_masks(values, message):
    with pytest.raises(InputError) as caught:
        own_settings(values)
    assert one_line(caught) == message


def test_planning_needs_no_data():
    assert own_settings({"dataset": "imagenet", "model": "resnet50"}).dataset_version == "1"
    voc = {"dataset": "voc", "model": "deeplabv3plus_resnet50", "pretrained": True}
    assert own_settings(voc).run.startswith("dense-deeplabv3plus_resnet50-voc-")
