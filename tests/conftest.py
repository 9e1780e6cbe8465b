"""What several test files share: one thread, small nets, a small card, quick runs."""

import compileall
import json
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import nn

from prunestudy import papers, places
from prunestudy.datasets import Batches, DatasetInfo, ImageSet, catalogue, info
from prunestudy.errors import InputError
from prunestudy.shrink import layer_speed_up
from prunestudy.study import runs
from prunestudy.study.lines import FORMAT, digest, line_of, place, write_text
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner
from prunestudy.study.select import chosen, comparisons, index
from prunestudy.study.settings import own_settings

CARD = """
    id = "toy"
    notebook = "99_toy"
    title = "A toy"
    authors = "Nobody"
    venue = "Nowhere"
    year = 2000
    arxiv = "0000.00000"
    published = []
    unknown = []

    [[claims]]
    id = "better"
    text = "Magnitude is better than chance."
    mark = "O"
    place = "here"

    [[claims.tests]]
    kind = "superiority"
    method = "magnitude"
    against = "random"

    [profiles.quick]
    time = "a second"

    [[profiles.quick.experiments]]
    name = "digits"
    dataset = "digits"
    model = "lenet300"
    start = { epochs = 1, lr = 0.05 }
    recipe = { epochs = 1, lr = 0.05 }
    targets = [0.9]
    seeds = 1
    validation = 200
    methods = [{ method = "dense" }, { method = "magnitude" }, { method = "random" }]
"""

# A name that any line of shell, YAML, Python or Snakemake would take for something else.
NASTY = "x'; touch OWNED; echo 'y \"$(touch OWNED)\" `touch OWNED` {b} a: #1 % \\ \u00e9\n*"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Here and in every process that a test starts: more would fight for the cores."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def store(tmp_path):
    return Store("custom", tmp_path / "results")


@pytest.fixture
def runner(store):
    return Runner(store, device="cpu")


@pytest.fixture
def card_file(tmp_path, monkeypatch):
    """Write a card's text into a folder that takes the place of the project's own cards."""
    folder = tmp_path / "cards"
    folder.mkdir()
    monkeypatch.setattr(papers, "files", lambda _: folder)

    def write(text=CARD, name="toy"):
        path = folder / f"{name}.toml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


@pytest.fixture
def toy_card(card_file):
    """The card of a toy paper (dense start, dense, magnitude, random on digits) and no other."""
    return card_file()


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """A copy of lib/, compiled: processes start there in half of the time."""
    folder, ignored = tmp_path_factory.mktemp("library"), shutil.ignore_patterns("__py*", "*.ipynb")
    shutil.copytree(places.checkout() / "lib", folder / "lib", ignore=ignored)
    by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
    assert compileall.compile_dir(folder / "lib", quiet=1, invalidation_mode=by_hash)
    return folder / "lib"


@pytest.fixture
def checkout(tmp_path, library):
    """A copy of the checkout whose one card is the toy paper's."""
    place, root = tmp_path / "checkout", places.checkout()
    shutil.copytree(library, place / "lib", ignore=shutil.ignore_patterns("*.toml"))
    shutil.copytree(root / "profiles", place / "profiles")
    shutil.copy(root / "pyproject.toml", place)
    (place / "lib/prunestudy/papers/toy.toml").write_text(textwrap.dedent(CARD))
    (place / "notebooks").mkdir()
    source = 'profile = "quick"\nresults = ""\ndata = ""'
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": source}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}}
    notebook["cells"] = [cell | {"outputs": [], "execution_count": None}]
    (place / "notebooks/99_toy.ipynb").write_text(json.dumps(notebook))
    return place


@pytest.fixture
def start(checkout, tmp_path):
    """Start `prunestudy WORD ...` of that checkout; whatever still runs afterwards is ended."""
    env = os.environ | {"PYTHONPATH": str(checkout / "lib")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    streams |= {"start_new_session": True}
    begun = []

    def run(*words, **options):
        cache = "cache" if "--executor" in words else "my cache"  # clusters take no space
        own = env | {"XDG_CACHE_HOME": str(tmp_path / cache)}
        options = {"env": own, "cwd": tmp_path} | streams | options
        begun.append(subprocess.Popen(["prunestudy", *words], **options))
        return begun[-1]

    yield run
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def no_data(tmp_path, monkeypatch):
    """An empty data root, and no download."""
    root = tmp_path / "empty"
    root.mkdir()
    monkeypatch.setenv("PRUNESTUDY_DATA", str(root))

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", refuse)
    runs._data.cache_clear()
    return root


def compared(card, planned, profile="quick"):
    """Every comparison of the card's claims among its planned runs."""
    runs, best = index(item for item in planned if item.paper == card.id), chosen(card, profile)
    rules = [rule for claim in card.claims for rule in claim.tests]
    rules = [rule for rule in rules if rule.kind != "by_construction"]
    return [c for rule in rules for c in comparisons(rule, runs, best)]


def small_run(method="dense", target=None, **values):
    """Settings of a run of one epoch on digits, a fraction of a second; `p_NAME` is params.NAME."""
    flat = {"epochs": 1, "batch_size": 64, "method": method}
    flat |= {k.replace("p_", "params.", 1) if k.startswith("p_") else k: values[k] for k in values}
    return own_settings(flat | ({} if target is None else {"target": target}))


def child_run(method="magnitude", target=0.9, parent=None, **values):
    """The same with a dense parent."""
    made = small_run(method, target if method != "dense" else None, **values)
    return made.model_copy(update={"parent": parent or small_run(seed=made.seed)})


def put_record(
    store, settings, metric=0.9, *, latency=None, device="cpu", arrays=None, folder=True, **metrics
):
    """Write a made-up record of a finished run into its folder in `store`, and return it.

    Without a `metric` it diverged; `metrics` are more of them, `latency` is milliseconds by name.
    Of all files that training leaves there are the `arrays` only. Without `folder` nothing is
    written.
    """
    removed, arrays = settings.target.value if settings.target else 0.0, arrays or {}
    size, left = 50_610, round(50_200 * (1 - removed))
    known = info(settings.dataset)
    record = {
        "format": FORMAT,
        "run": settings.run,
        "parent": settings.parent.run if settings.parent else None,
        "status": "diverged" if metric is None else "done",
        "settings": settings.kept(),
        "data": {"name": known.name, "version": known.version, "fingerprint": known.fingerprint},
        "metrics": {"dense_parameters": size, "dense_macs": 50_200},
        "validation": {"top1": metric, "loss": 0.1},
        "history": {"epoch": [1], "validation_top1": [metric]},
        "latency": latency and {"ms": latency, "threads": 1, "rounds": 30, "form": "dense"},
        "cost": {"train_seconds": 1.5, "seconds": 2.5},
        "environment": {"device": device, "commit": "unknown", "tree": "", "torch": "2"},
        "files": {"arrays": {k: digest(a) for k, a in arrays.items()}, "weights": "0" * 64},
    }
    if metric is not None:
        record["metrics"] |= {
            "metric_name": "top1",
            "metric": metric,
            "macro_f1": metric - 0.01,
            "loss": 0.1,
            "images": 360,
            "sparsity": removed,
            "parameters": size,
            "nonzeros": left + 410,
            "macs": 50_200,
            "nonzero_macs": left,
            "peak_memory_mb": 0.5,
            "bytes": 1000,
        } | metrics
    if folder:
        where = store.runs / place(record)
        write_text(where / "record.json", line_of(record) + "\n")
        save_file(arrays, where / "arrays.safetensors")
    return record


def tree(folder):
    """Every path below `folder` with its bytes and time of change: a snapshot to compare."""
    folder = Path(folder)
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def one_line(caught):
    """The text of a caught error, which must be one line."""
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


def refusal(call):
    """The one line that `call` is refused with."""
    with pytest.raises(InputError) as caught:
        call()
    return one_line(caught)


def refused(call, *words):
    """`call` raises one line that has these words in it."""
    text = refusal(call)
    assert all(word in text for word in words), text


def apart(found, expected):
    """Largest difference relative to the largest output."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def speed_up_at(model, macs, ranks):
    """MACs of the layers in `ranks` over those of their factors; `macs` by `layer_macs`."""
    whole = {name: macs[f"{name}.weight"] for name in ranks}
    low = (whole[n] / layer_speed_up(model.get_submodule(n), rank) for n, rank in ranks.items())
    return sum(whole.values()) / sum(low)


def pairs_of(net):
    """The factorised layers of `net`: a basis without biases, then 1x1 filters that mix it."""
    pairs = {name: m for name, m in net.named_modules() if type(m) is nn.Sequential}
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {
        name: pair
        for name, pair in pairs.items()
        if name
        and len(pair) == 2
        and all(type(part) in layers for part in pair)
        and pair[0].bias is None
        and set(getattr(pair[1], "kernel_size", (1,))) == {1}
    }


class BatchNormNet(nn.Module):
    """Convolution, batch norm, convolution, linear: 1x8x8 to 10 classes."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, groups=2)
        self.norm2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 4 * 4, 10)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().flatten(1))


def randomise(net, seed=0):
    """Random weights, and random batch-norm statistics and affine parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise)
    return net


def toy_batches(count=64, batch_size=16, side=8, seed=0, **values):
    """Batches of random grey images of 10 classes; 4 steps an epoch unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, side, side, 1), generator=generator, dtype=torch.uint8)
    info = DatasetInfo("toy", "Toy", "1", 1, side, side, 10, count, count, (0.5,), (0.29,))
    images = ImageSet(pixels, torch.randint(0, 10, (count,), generator=generator))
    return Batches(images, info, batch_size, seed=seed, **values)


def narrowed(factory, by=8):
    """`factory` with 1 / `by` of the channels wherever `by` divides them: images and classes stay.

    Layers, skips and branches are those of the whole net, at a fraction of the time.
    """

    def part(number):
        return number // by if type(number) is int and number % by == 0 else number

    def narrow(init):
        def made(self, *sizes, **options):
            groups = {"groups": part(options["groups"])} if "groups" in options else {}
            init(self, *map(part, sizes), **options | groups)

        return made

    def make(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            for layer in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
                patch.setattr(layer, "__init__", narrow(layer.__init__))
            return factory(*arguments)

    return make


def small_imagenet(monkeypatch, root, side=32, classes=3, train=4, test=2, seed=0):
    """ImageNet of a few classes and noisy JPEGs a little larger than `side`, below `root`."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", test)):
        for name in [f"n{c:02}" for c in range(classes)]:
            folder = root / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (side + 5, side + 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    counts = {"train_images": classes * train, "test_images": classes * test}
    sizes = {"height": side, "width": side, "num_classes": classes}
    known = replace(catalogue.info("imagenet"), **counts, **sizes)
    monkeypatch.setitem(catalogue._KNOWN, "imagenet", known)
    return root


def small_voc(monkeypatch, root, side=32, classes=3, train=4, test=2):
    """Pascal VOC of 20x30 images below `root`: left of a column class 1, right of it class 2.

    Class 1 is red, class 2 blue, one row is without a label.
    """
    folder = root / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for split, count in (("train", train), ("val", test)):
        names = [f"{split}_{i}" for i in range(count)]
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            mask = np.full((20, 30), 1, dtype=np.uint8)
            mask[:, 8 + 4 * i :] = 2
            colours = np.array([[0, 0, 0], [250, 0, 0], [0, 0, 250]], dtype=np.uint8)
            Image.fromarray(colours[mask]).save(
                folder / f"JPEGImages/{name}.jpg", quality=95, subsampling=0
            )
            mask[0] = 255
            Image.fromarray(mask).save(folder / f"SegmentationClass/{name}.png")
    counts = {"train_images": train, "test_images": test}
    sizes = {"height": side, "width": side, "num_classes": classes}
    known = replace(catalogue.info("voc"), **counts, **sizes)
    monkeypatch.setitem(catalogue._KNOWN, "voc", known)
    return root
