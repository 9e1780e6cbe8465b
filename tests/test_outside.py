"""What comes in from outside: numbers, names, files and folders; each refusal is one line."""

import os
import resource
import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line, small_voc, tree
from PIL import Image

from prunestudy import datasets, models, shrink
from prunestudy.datasets import sources
from prunestudy.errors import InputError, writable_file, written_whole
from prunestudy.papers import RunRecipe as Recipe
from prunestudy.study import settings
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

REFUSED = [
    ({"lr": 1e308}, f"lr = 1e+308: {RANGE}"),
    ({"lr": 1e-308}, f"lr = 1e-308: {RANGE}"),
    ({"lr": 10**40}, f"lr = {10**40}: {RANGE}"),
    ({"lr": float("nan")}, "lr = nan: input should be a finite number"),
    ({"lr": 0}, "lr = 0: input should be greater than 0"),
    ({"lr": [0.1]}, "lr = [0.1]: input should be a valid number"),
    ({"weight_decay": 1e39}, f"weight_decay = 1e+39: {RANGE}"),
    ({"power": 5e-324}, f"power = 5e-324: {RANGE}"),
    ({"milestones": [0.5, 1e-300]}, f"milestones = [0.5, 1e-300]: {RANGE}"),
    ({"milestones": [0.5, 2]}, "milestones.1 = 2: input should be less than 1"),
    ({"epochs": 10**12}, f"epochs = {10**12}: {AT_MOST}1000000"),
    ({"epochs": 10**5000}, f"epochs = a number of thousands of digits: {AT_MOST}1000000"),
    ({"precision": "x" * 5000}, f"precision = '{'x' * 999}...: input should be 'fp32' or 'bf16'"),
    ({"epochs": None}, "epochs = None: input should be a valid integer"),
    ({"steps": 2**31}, f"steps = {2**31}: {AT_MOST}1000000000"),
    ({"batch_size": 10**30}, f"batch_size = {10**30}: {WHOLE}"),
    ({"batch_size": 10**9}, f"batch_size = {10**9}: at most 1237, the training images left"),
    ({"threads": 99999999999}, f"threads = 99999999999: {AT_MOST}1024"),
    ({"seed": 2**32}, f"seed = {2**32}: input should be less than {2**32}"),
    ({"seed": np.int64(-3)}, "seed = -3: input should be greater than or equal to 0"),
    ({"seed": 1.0}, "seed = 1.0: input should be a valid integer"),
    ({"threads": 0}, "threads = 0: input should be greater than or equal to 1"),
    ({"batch_size": 0}, "batch_size = 0: input should be greater than or equal to 1"),
    ({"shift": 8}, "shift = 8: below 8, the images' size in pixels"),
    ({"validation": 1437}, "validation = 1437: below 1437, the training images"),
    ({"validation": 2**40}, f"validation = {2**40}: {WHOLE}"),
    (
        {"nesterov": True, "momentum": 0},
        "nesterov = True: needs a momentum above 0",
    ),
    ({"target": 0.5}, "target = 0.5: dense takes no target"),
    *(
        (
            {"method": "magnitude", "target": target},
            f"target = {target!r}: {'magnitude takes ' * (target is None)}{OF_WEIGHTS}",
        )
        for target in (None, 0, 1, -0.1, 1.5, "half", float("nan"), True)
    ),
    (
        {"method": "scratch"},
        "parent = None: scratch needs the run whose shape it takes; see a card",
    ),
    (
        {"method": "l1", "target": 0.5, "params.ramp": 2},
        "params.ramp = 2: input should be less than or equal to 1",
    ),
    (
        {"method": "magnitude", "target": 1e-300},
        "target = 1e-300: the share of weights to remove, above 0 and below 1",
    ),
    (
        {"method": "gdp", "target": 50, "target_kind": "macs"},
        "target = 50: the share of MACs to remove, above 0 and below 1",
    ),
    (
        {"method": "gdp", "target": 0.5, "params.gate_lr": 1e-308},
        f"params.gate_lr = 1e-308: {RANGE}",
    ),
    (
        {"method": "gdp", "target": 0.5, "params.eps_end": 1.0},
        "params.eps_end = 1.0: at most eps_start, 0.1",
    ),
    (
        {"method": "gdp", "target": 0.5, "params.lr": 1},
        "params.lr = 1: allowed are eps_end, eps_share, eps_start, gate_lr, groups, pace, ramp",
    ),
    (
        {"method": "dpf", "target": 0.5, "params.period": 10**20},
        f"params.period = {10**20}: {WHOLE}",
    ),
    (
        {"method": "force", "target": 0.5, "params.strengths": {"fc1": 1e300}},
        f"params.strengths = {{'fc1': 1e+300}}: {RANGE}",
    ),
    (
        {"method": "force", "target": 0.5, "params.strengths": {"fc1": "a"}},
        "params.strengths.fc1 = 'a': input should be a valid number",
    ),
    (
        {"method": "force", "target": 0.5, "params.rounds": 10**6},
        f"params.rounds = {10**6}: {AT_MOST}1000",
    ),
    ({"params.gate_lr": 1}, "params.gate_lr = 1: none is allowed here"),
    ({"dataset": "folder:caf\udce9"}, None),
]


@pytest.mark.parametrize(("values", "line"), REFUSED)
def test_what_cannot_be_used_is_refused_as_it_was_typed(values, line):
    if line is None:
        with pytest.raises(InputError, match=r"^dataset = 'folder:caf\\udce9': ") as caught:
            own_settings(values)
        assert one_line(caught)
    else:
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


def test_a_recipe_that_is_no_table():
    says(lambda: settings.checked(Recipe, 5, "recipe"), "recipe = 5: " + NO_TABLE)
    says(lambda: settings.checked(Recipe, {"epochs": 1}), "lr: is missing")


NO_TABLE = "input should be a valid dictionary or instance of recipe"


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
    return "not .png, .jpg, .jpeg, .bmp in a class's folder: train/eel/test, train/eel/train"


def pipe(pets):
    os.mkfifo(pets / "train/cat/b.png")
    return "not .png, .jpg, .jpeg, .bmp in a class's folder: train/cat/b.png"


def line_break(pets):
    (pets / "train/cat/a\nb").mkdir()
    return "not .png, .jpg, .jpeg, .bmp in a class's folder: train/cat/a\\nb"


def file_for_a_split(pets):
    (pets / "test").rename(pets / "old")
    (pets / "test").write_text("")
    return f"there is no folder {pets}/test"


def giant(pets):
    # the header of an image of 60,000 x 60,000 pixels: Pillow takes it for an attack
    size = (60_000).to_bytes(4, "big")
    data = (pets / "train/cat/a.png").read_bytes()
    (pets / "train/cat/a.png").write_bytes(data[:16] + size + size + data[24:])
    return f"1 image cannot be read: {pets}/train/cat/a.png"


DAMAGE = [
    *(loop, in_itself, pipe, line_break, file_for_a_split, giant),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
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
    with pytest.raises(InputError, match=r"^data = .*: no list of images \(") as caught:
        datasets.load("voc", root)
    assert one_line(caught)


def test_the_fingerprint_of_a_folder_follows_its_images(pets, monkeypatch):
    loads = []
    real = sources.load
    monkeypatch.setattr(sources, "load", lambda *name: loads.append(name) or real(*name))
    found = [datasets.fingerprint("folder:pets", pets.parent) for _ in range(2)]
    assert found == [real("folder:pets", pets.parent).fingerprint] * 2
    assert len(loads) == 1
    version = datasets.info("folder:pets", pets.parent).version
    image = pets / "train/dog/a.png"
    before = image.stat()
    Image.new("L", (8, 8), 48).save(image)  # other pixels, as many bytes
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert datasets.info("folder:pets", pets.parent).version == version
    assert datasets.fingerprint("folder:pets", pets.parent) not in found
    assert len(loads) == 2
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
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none/net", tmp_path / "file/net", tmp_path / "a\0/net"):
        says(lambda path=path: writable_file(path), f"path = {str(path)!r}: " + IN_A_FOLDER)
    says(lambda: writable_file(tmp_path / ("x" * 256)), f"path = '{tmp_path}/{'x' * 256}': " + LONG)
    says(lambda: writable_file(f"{tmp_path}/"), f"path = {str(tmp_path)!r}: " + NO_FILE)
    longest = tmp_path / ("ü" * 127)
    with written_whole(longest) as part:
        part.write_text("whole")
    assert longest.read_text() == "whole"


IN_A_FOLDER = "a file in a folder that exists"
LONG = "File name too long"
NO_FILE = "a regular file, or a name that is not in use"


@pytest.fixture
def little_disk():
    """Files may grow to 2,000 bytes only."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, little_disk, monkeypatch):
    path = tmp_path / "net"
    path.write_text("old")
    net = models.build("lenet5", (1, 16, 16), 10)
    with pytest.raises(OSError, match=f"too large: '{path}'"):
        shrink.save(net, path)
    # torch's exporter takes ten seconds, and it is the writing that counts here
    graph = SimpleNamespace(inputs=[SimpleNamespace(shape=["batch"])], outputs=[])
    program = SimpleNamespace(model=SimpleNamespace(graph=graph))
    program.save = lambda part: part.write_bytes(bytes(3000))
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: program)
    with pytest.raises(OSError, match=f"too large: '{path}'"):
        shrink.export(net, path, torch.rand(2, 1, 16, 16))
    assert tree(tmp_path) == {"net": (b"old", path.stat().st_mtime_ns)}
