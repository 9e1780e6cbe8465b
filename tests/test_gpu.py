"""A GPU gives what the CPU does."""

import copy

import pytest
import torch
from conftest import one_line, small_imagenet, small_run, toy_batches
from test_capture import Reads
from test_face import loader
from test_gang import three
from test_hooks import VARIANTS, StoppedError, made, pruned
from test_train import dropping, fit
from torch import nn

from prunestudy import datasets, measure, models, shrink
from prunestudy.errors import InputError
from prunestudy.methods import Method
from prunestudy.methods.channels import Channels
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner
from prunestudy.train import Recipe, capture, deterministic, gang, prune, pruning

# torch says in a thread of its own that it makes a CUDA context there.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPE = (3, 32, 32)


def test_onnx_runtime_on_another_device(tmp_path):
    net = models.build("mlp", (1, 8, 8), 10)
    shrink.export(net, tmp_path / "net.onnx", torch.rand(2, 1, 8, 8))
    with pytest.raises(InputError) as caught:
        shrink.OnnxNet(tmp_path / "net.onnx", device="tpu")
    assert one_line(caught) == "device = 'tpu': one that ONNX Runtime was built for"


# --- on a GPU as on the CPU


def both(tmp_path, device, method, target, **values):
    """Records and histories of one run on the CPU and on `device`."""
    settings, found = small_run(method, target, epochs=2, **values), []
    for place in ("cpu", device):
        store = Store("custom", tmp_path / f"{len(found)}")
        record = Runner(store, device=place).ensure(settings)
        found.append((record, store.history(settings.run)))
    return found


def test_a_run_is_the_same_twice(tmp_path):
    (here, history), (again, other) = both(tmp_path, "cpu", "magnitude_attention", 0.9)
    assert here["metrics"] == again["metrics"]
    assert history == other


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(
    ("method", "target", "model"),
    [
        ("dense", None, "lenet300"),
        ("dense", None, "resnet20"),
        ("magnitude_attention", 0.9, "lenet300"),
        ("sparse_gates", 0.9, "lenet300"),
        ("gdp", 0.5, "resnet20"),
        ("force", 0.05, "resnet20"),
    ],
)
def test_a_run_on_cuda_ends_as_on_the_cpu(tmp_path, method, target, model):
    (here, history), (there, other) = both(tmp_path, "cuda", method, target, model=model)
    assert there["cost"]["device_peak_mb"] > 0
    assert there["status"] == here["status"] == "done"
    assert there["metrics"]["parameters"] == pytest.approx(here["metrics"]["parameters"], rel=0.1)
    # Draws of gates are of another stream there; the rest differs by rounding alone.
    # Thresholds on gates magnify that.
    most = {"sparse_gates": 0.2, "gdp": 0.05}.get(method, 0.02)
    assert other[0]["train_loss"] == pytest.approx(history[0]["train_loss"], rel=most)
    assert there["metrics"]["metric"] == pytest.approx(here["metrics"]["metric"], abs=0.1)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", ["resnet20", "vgg16_cifar"])
def test_outputs_on_cuda_are_those_of_the_cpu(name):
    """Dense, without every other channel, and in half its rank; in float64."""
    dense = models.build(name, SHAPE, 10).eval()
    channels = Channels(dense, torch.zeros(2, *SHAPE), "macs")
    kept = torch.cat([torch.arange(group.channels) % 2 == 0 for group in channels.groups])
    ranks = {layer: max(1, full // 2) for layer, full in shrink.ranks_by_share(dense, 1.0).items()}
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    for net in (dense, channels.smaller(dense, kept), shrink.factorise(dense, ranks)):
        here = net.double()
        there = copy.deepcopy(here).cuda()
        with torch.inference_mode():
            expected, found = here(x), there(x.cuda()).cpu()
        assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


# --- captured steps


DRAWN = ("sparse_gates", "hard_concrete", "random", "scratch", "uniform")  # by the generator


def near(one, other, rel=1e-3):
    """Whether two trainings are the same but for rounding: losses, and the weights of the net."""
    for row, too in zip(one.history, other.history, strict=True):
        assert row["train_loss"] == pytest.approx(too["train_loss"], rel=rel, abs=1e-4)
        assert row["kept"] == pytest.approx(too["kept"], abs=0.02)


@pytest.fixture
def plainly(monkeypatch):
    """Makes a training whose steps are not captured."""

    def run(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(capture, "WARM", 10**9)
            return function(*args, **options)

    return run


@pytest.fixture
def graphs(monkeypatch):
    """The graphs captured so far."""
    found, capture_one = [], capture.cuda_graph

    def noted(*args):
        found.append(capture_one(*args))
        return found[-1]

    monkeypatch.setattr(capture, "cuda_graph", noted)
    return found


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_steps_of_every_method(variant, graphs, plainly, capsys):
    options = {"device": "cuda", "epochs": 5, "period": 3}
    with deterministic(1):
        ours = pruned(made(variant), **options)
        assert capsys.readouterr().err == ""
        assert graphs
        near(ours, plainly(pruned, made(variant), **options))
    here = pruned(made(variant), epochs=5, period=3)
    assert ours.status == here.status == "done"
    if variant.split()[0] not in DRAWN:
        near(ours, here, rel=0.05)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(
    "options",
    [
        {"net": dropping},
        {"recipe": Recipe(epochs=4, lr=0.01, optimizer="adam", warmup_steps=3)},
        {"recipe": Recipe(epochs=4, lr=0.01, nesterov=True, weight_decay=1e-3, pieces=2)},
        {"precision": "bf16"},
        {"batches": lambda: toy_batches(shift=1, flip=True, device="cuda")},
        {"batches": lambda: loader(count=70)},
    ],
)
def test_captured_steps(options, graphs, plainly, capsys):
    def once():
        own = {key: value() if callable(value) else value for key, value in options.items()}
        validation = toy_batches(seed=9, device="cuda")
        own.setdefault("batches", toy_batches(device="cuda"))
        return fit(device="cuda", validation=validation, **own)

    with deterministic(1):
        ours = once()
        assert len(graphs) == 1
        assert capsys.readouterr().err == ""
        near(ours, plainly(once), rel=0.02 if "precision" in options else 1e-3)


@pytest.mark.cuda
@needs_cuda
def test_what_cannot_be_captured_is_named(graphs, capsys):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Reads())
    batches = {name: toy_batches(device="cuda") for name in ("batches", "validation")}
    assert fit(net=net, device="cuda", **batches).status == "done"
    assert not graphs
    assert "in or after 2 (Reads), aten._local_scalar_dense" in capsys.readouterr().err


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("variant", ["gdp", "sparse_gates", "force", "magnitude_attention"])
def test_a_stopped_training_goes_on_on_cuda(variant, tmp_path):
    straight = pruned(made(variant), epochs=5, period=3, device="cuda")
    options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, "run": "r"}
    method = made(variant)

    def stopping(at):
        if at.total_step >= 18:
            raise StoppedError
        type(method).update(method, at)

    method.update = stopping
    with pytest.raises(StoppedError):
        pruned(method, epochs=5, period=3, device="cuda", **options)
    near(straight, pruned(made(variant), epochs=5, period=3, device="cuda", **options))


@pytest.mark.cuda
@needs_cuda
def test_a_gang_on_cuda_ends_as_each_alone():
    with deterministic(1):
        alone = [begin(prune) for begin in three(device="cuda")]
        found = list(gang([begin(pruning) for begin in three(device="cuda")], 4))
    order = lambda made: (made.method.name, len(made.history))  # noqa: E731
    for one, other in zip(sorted(alone, key=order), sorted(found, key=order), strict=True):
        near(one, other)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("variant", ["gdp", "hard_concrete", "network_slimming"])
def test_the_small_net_is_the_gated_one_on_cuda(variant):
    result = pruned(made(variant), epochs=5, period=3, device="cuda")
    x = torch.randn(8, 1, 8, 8)
    net = copy.deepcopy(result.model).cpu()
    with torch.inference_mode():
        torch.testing.assert_close(result.model(x.cuda()).cpu(), net(x), rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@needs_cuda
def test_segmentation_on_cuda(graphs):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, 16, 16, generator=generator)
    y = (x.sum(1) > 0).long()
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    task = measure.task("segment", (0.0,) * 3, (1.0,) * 3)
    options = {"loss": task.loss, "validation": batches}
    with deterministic(1):
        there = prune(net, Method(), batches, Recipe(epochs=3, lr=0.1), device="cuda", **options)
    here = prune(net, Method(), batches, Recipe(epochs=3, lr=0.1), **options)
    assert len(graphs) == 1
    near(there, here, rel=0.01)


@pytest.mark.cuda
@needs_cuda
def test_batches_of_files_on_cuda(monkeypatch, tmp_path):
    data = datasets.load("imagenet", small_imagenet(monkeypatch, tmp_path))
    ways = {"seed": 1, "workers": 1}
    found = [
        list(datasets.batches_of(data.train, data.info, 4, device=device, **ways).epoch(0))
        for device in ("cpu", "cuda")
    ]
    for (x, y), (there, labels) in zip(*found, strict=True):
        torch.testing.assert_close(there.cpu(), x)
        assert torch.equal(labels.cpu(), y)


@pytest.mark.cuda
@needs_cuda
def test_onnx_on_cuda(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime was not built for CUDA")
    net, x = models.build("mlp", (1, 8, 8), 10).eval(), torch.rand(2, 1, 8, 8)
    shrink.export(net, tmp_path / "net.onnx", x)
    found = shrink.OnnxNet(tmp_path / "net.onnx", device="cuda")(x)
    torch.testing.assert_close(found, net(x), rtol=1e-3, atol=1e-4)
