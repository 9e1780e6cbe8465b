"""What comes in from outside: numbers, names, files and folders; each refusal is one line."""

import os
import socket
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line, small_voc, tree
from PIL import Image

from prunestudy import datasets, models, shrink
from prunestudy.datasets import sources
from prunestudy.errors import InputError, writable_file, written_whole
from prunestudy.study import settings
from prunestudy.study.records import Store
from prunestudy.study.settings import own_settings

RANGE = "a number from 1e-18 to 1e+30, or 0 where that is allowed"
AT_MOST = "input should be less than or equal to "
OF_WEIGHTS = "the share of weights to remove, above 0 and below 1"
WHOLE = f"a whole number below {2**32}"


def says(call, line):
    """Whether `call` is refused with exactly `line`."""
    with pytest.raises(InputError) as caught:
        call()
    assert one_line(caught) == line


# --- numbers and keys

SHARES = (None, 0, 1, -0.1, "half", float("nan"), True)
REFUSED = [
    ({"lr": 1e308}, f"lr = 1e+308: {RANGE}"),
    ({"lr": 10**40}, f"lr = {10**40}: {RANGE}"),
    ({"lr": float("nan")}, "lr = nan: input should be a finite number"),
    ({"lr": 0}, "lr = 0: input should be greater than 0"),
    ({"lr": "abc"}, "lr = 'abc': input should be a valid number"),
    ({"milestones": [0.5, 1e-300]}, f"milestones = [0.5, 1e-300]: {RANGE}"),
    ({"milestones": [0.5, 2]}, "milestones.1 = 2: input should be less than 1"),
    ({"epochs": 0}, "epochs = 0: at least 1 for a run without a parent or pretrained weights"),
    ({"epochs": True}, "epochs = True: input should be a valid integer"),
    ({"epochs": 10**12}, f"epochs = {10**12}: {AT_MOST}1000000"),
    ({"epochs": 10**5000}, f"epochs = a number of thousands of digits: {AT_MOST}1000000"),
    ({"precision": "x" * 5000}, f"precision = '{'x' * 999}...: input should be 'fp32' or 'bf16'"),
    ({"batch_size": 10**30}, f"batch_size = {10**30}: {WHOLE}"),
    ({"batch_size": 1238}, "batch_size = 1238: at most 1237, the training images left"),
    ({"batch_size": 8, "pieces": 9}, "pieces = 9: at most 8, the images of a batch"),
    ({"threads": 99999999999}, f"threads = 99999999999: {AT_MOST}1024"),
    ({"seed": 2**32}, f"seed = {2**32}: input should be less than {2**32}"),
    ({"seed": np.int64(-3)}, "seed = -3: input should be greater than or equal to 0"),
    ({"shift": 8}, "shift = 8: below 8, the images' size in pixels"),
    ({"validation": 1437}, "validation = 1437: below 1437, the training images"),
    ({"nesterov": True, "momentum": 0}, "nesterov = True: needs a momentum above 0"),
    ({"target": 0.5}, "target = 0.5: dense takes no target"),
    *(
        ({"method": "magnitude", "target": target}, f"target = {target!r}: {OF_WEIGHTS}")
        for target in SHARES
    ),
    (
        {"method": "scratch"},
        "parent = None: scratch needs a parent run, whose architecture it trains; see a card",
    ),
    (
        {"pretrained": True},
        "pretrained = True: for a run without a parent, of a net that torchvision has weights of",
    ),
    (
        {"method": "gdp", "target": 50, "target_kind": "macs"},
        "target = 50: the share of MACs to remove, above 0 and below 1",
    ),
    (
        {"method": "gdp", "target": 0.5, "params.eps_end": 1.0},
        "eps_end = 1.0: at most eps_start, 0.1",
    ),
    (
        {"method": "gdp", "target": 0.5, "params.lr": 1},
        "params.lr = 1: allowed are "
        "average, bound, eps_end, eps_share, eps_start, gate_lr, groups, leave, pace, ramp, steer",
    ),
    (
        {"method": "force", "target": 0.5, "params.strengths": {"fc1": "a"}},
        "params.strengths.fc1 = 'a': input should be a valid number",
    ),
    ({"params.gate_lr": 1}, "params.gate_lr = 1: none is allowed here"),
]
# Of these the beginning: what follows lists all names that are allowed.
BEGIN = [
    ({"colour": "red"}, "setting = 'colour': allowed are batch_size"),
    ({"evaluate": "validation"}, "setting = 'evaluate': allowed are batch_size"),
    ({"model": "vgg"}, "model = 'vgg': allowed are alexnet"),
    ({"model": 5}, "model = 5: allowed are alexnet"),
    ({"model": "lenet5"}, "model = 'lenet5': not for digits: "),
    ({"method": "lasso"}, "method = 'lasso': allowed are component_aware, dense"),
    ({"dataset": "cifar"}, "dataset = 'cifar': allowed are digits"),
    ({"dataset": "folder:caf\udce9"}, "dataset = 'folder:caf\\udce9': "),
    ({"dataset": "folder:a\0b"}, "dataset = 'folder:a\\x00b': folder: is followed by the path"),
]


@pytest.mark.parametrize(("values", "start"), BEGIN)
def test_names_that_are_unknown_are_refused(values, start):
    with pytest.raises(InputError) as caught:
        own_settings(values)
    assert one_line(caught).startswith(start)


@pytest.mark.parametrize(("values", "line"), REFUSED)
def test_what_cannot_be_used_is_refused_as_it_was_typed(values, line):
    says(lambda: own_settings(values), line)


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 1e-18},
        {"lr": 1e30, "weight_decay": 0},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.0, "optimizer": "adam"},
        {"threads": 1024},
        {"seed": 2**32 - 1},
        {"milestones": [0.25]},
    ],
)
def test_what_lies_just_inside_is_taken(values):
    made = own_settings(values)
    assert settings.RunSettings.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize("scalar", [np.int32, np.int64, torch.tensor])
def test_scalars_of_numpy_and_torch_are_plain_numbers(scalar):
    plain = own_settings({"seed": 3, "epochs": 2, "lr": 0.25})
    given = own_settings({"seed": scalar(3), "epochs": scalar(2), "lr": np.float32(0.25)})
    assert given == plain
    assert given.run == plain.run
    assert type(given.seed) is int
    aim = own_settings({"method": "magnitude", "target": torch.tensor(0.5)})
    assert aim.run == own_settings({"method": "magnitude", "target": 0.5}).run


def test_a_long_path_of_a_folder_gives_a_name_that_a_folder_can_have():
    made = own_settings({}).model_copy(update={"dataset": "folder:" + "x/" * 3000})
    other = made.model_copy(update={"dataset": made.dataset + "y"})
    assert len(made.run) == len(other.run) == 213
    assert made.run != other.run


def test_a_line_with_bytes_and_breaks_of_a_file_name_is_one_printable_line():
    assert str(InputError("file = a\nb\x1b[0m\udcff é")) == "file = a\\nb\\x1b[0m\\udcff é"


# --- folders of images


@pytest.fixture
def pets(tmp_path):
    """An image folder of two classes, `pets` below a data root."""
    for split in ("train", "test"):
        for value, name in enumerate(("cat", "dog")):
            place = tmp_path / "pets" / split / name
            place.mkdir(parents=True)
            Image.new("L", (8, 8), 40 * value + 9).save(place / "a.png")
    return tmp_path / "pets"


def loop(pets):
    (pets / "train/eel").symlink_to("eel")
    return "eel"


def in_itself(pets):
    (pets / "train/eel").symlink_to("..")
    return "not .png, .jpg, .jpeg, .bmp in a class's folder: ['train/eel/test', 'train/eel/train']"


def pipe(pets):
    os.mkfifo(pets / "train/cat/b.png")
    return "not .png, .jpg, .jpeg, .bmp in a class's folder: ['train/cat/b.png']"


def line_break(pets):
    (pets / "train/cat/a\nb").mkdir()
    return "not .png, .jpg, .jpeg, .bmp in a class's folder: ['train/cat/a\\nb']"


def file_for_a_split(pets):
    (pets / "test").rename(pets / "old")
    (pets / "test").write_text("")
    return f"{pets} cannot be read ("


def giant(pets):
    # the header of an image of 60,000 x 60,000 pixels: Pillow takes it for an attack
    size = (60_000).to_bytes(4, "big")
    data = (pets / "train/cat/a.png").read_bytes()
    (pets / "train/cat/a.png").write_bytes(data[:16] + size + size + data[24:])
    return "train/cat/a.png cannot be read ("


DAMAGES = (loop, in_itself, pipe, line_break, file_for_a_split, giant)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_folder_that_cannot_be_used(pets, damage):
    words = damage(pets)
    for ask in (datasets.info, datasets.load, datasets.fingerprint):
        with pytest.raises(InputError) as caught:
            ask("folder:pets", pets.parent)
        line = one_line(caught)
        assert line.startswith("dataset = 'folder:pets': ")
        assert words in line


@pytest.mark.parametrize("name", ["pets ", "~no such user", "p{e}t's; $(x) #\n", "ü"])
def test_a_folder_of_any_name_is_taken(pets, name):
    pets.rename(pets.parent / name)
    values = {"dataset": f"folder:{name}", "validation": 1, "batch_size": 1}
    made = own_settings(values, str(pets.parent))
    assert datasets.load(made.dataset, pets.parent).info.title == name
    assert made.run.isprintable()
    assert "/" not in made.run


def test_names_of_files_need_not_be_text(pets):
    file = pets / "test/dog" / os.fsdecode(b"caf\xe9.png")
    Image.new("L", (8, 8)).save(file, format="png")
    for split in ("train", "test"):
        (pets / split / "dog").rename(pets / split / os.fsdecode(b"\xff"))
    data = datasets.load("folder:pets", pets.parent)
    assert len(data.test) == data.info.test_images
    assert data.test.labels.tolist() == [0, 1, 1]


def test_a_folder_that_may_not_be_read(pets, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot be read .*Permission denied"):
        datasets.load("folder:pets", pets.parent)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar10_jpeg", "imagenet", "voc"])
def test_a_data_root_that_cannot_be_one(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_DEBIAN", tmp_path / "absent")
    file = tmp_path / "file"
    file.write_text("no folder")
    for root in (file, tmp_path / ("x" * 300), tmp_path / "a\udcff"):
        monkeypatch.setenv("PRUNESTUDY_DATA", str(root))
        with pytest.raises(InputError, match=r"^data = ") as caught:
            datasets.load(name)
        assert one_line(caught).isprintable()
        with pytest.raises(InputError, match=r"^dataset = 'folder:x': "):
            datasets.load("folder:x")
    assert tree(tmp_path) == {"file": (b"no folder", file.stat().st_mtime_ns)}


def test_a_list_of_images_that_is_no_text(tmp_path, monkeypatch):
    root = small_voc(monkeypatch, tmp_path)
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"^data = .*: voc cannot be read .*decode") as caught:
        datasets.load("voc", root)
    assert one_line(caught)


def test_the_fingerprint_of_a_folder_follows_its_images(pets):
    found = datasets.fingerprint("folder:pets", pets.parent)
    assert found == datasets.load("folder:pets", pets.parent).fingerprint
    version = datasets.info("folder:pets", pets.parent).version
    Image.new("L", (8, 8), 48).save(pets / "train/dog/a.png")  # other pixels, as many bytes
    assert datasets.info("folder:pets", pets.parent).version == version
    assert datasets.fingerprint("folder:pets", pets.parent) != found
    assert datasets.fingerprint("imagenet") == ""


# --- files that are written


def fifo(path):
    os.mkfifo(path)


def full_device(path):
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))


def own_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def link_to_nothing(path):
    path.symlink_to("nothing")


def link_to_a_file(path):
    path.with_name("target").write_text("mine")
    path.symlink_to("target")


PLACES = [Path.mkdir, fifo, full_device, own_socket, link_to_nothing, link_to_a_file]


@pytest.mark.parametrize("make", PLACES, ids=lambda f: f.__name__)
def test_only_files_are_written_to(make, tmp_path):
    path = tmp_path / "net"
    try:
        make(path)
    except PermissionError:
        pytest.skip("only root makes devices")
    before = {p: p.lstat() for p in tmp_path.iterdir()}
    line = f"path = {str(path)!r}: a regular file, or a name that is not in use"
    net = models.build("lenet5", (1, 16, 16), 10)
    says(lambda: shrink.export(net, path, torch.rand(2, 1, 16, 16)), line)
    says(lambda: shrink.save(net, path), line)
    says(lambda: writable_file(str(path)), line)
    assert {p: p.lstat() for p in tmp_path.iterdir()} == before


def test_paths_that_no_file_can_have(tmp_path):
    why = "the path of a file, as text or a Path"
    says(lambda: Store("quick", "a\0"), f"results = 'a\\x00': {why}")
    says(lambda: datasets.load("mnist", "a\0"), f"data = 'a\\x00': {why}")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none/net", tmp_path / "file/net"):
        says(lambda path=path: writable_file(path), f"path = {str(path)!r}: " + IN_A_FOLDER)
    strange = tmp_path / "a\0/net"
    says(
        lambda: writable_file(strange), f"path = {strange!r}: the path of a file, as text or a Path"
    )
    says(lambda: writable_file(tmp_path / ("x" * 256)), f"path = '{tmp_path}/{'x' * 256}': " + LONG)
    says(lambda: writable_file(f"{tmp_path}/"), f"path = {str(tmp_path)!r}: " + NO_FILE)
    longest = tmp_path / ("ü" * 127)
    with written_whole(longest) as part:
        part.write_text("whole")
    assert longest.read_text() == "whole"


IN_A_FOLDER = "a file in a folder that exists"
LONG = "File name too long"
NO_FILE = "a regular file, or a name that is not in use"
