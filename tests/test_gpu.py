"""A GPU gives what the CPU does."""

import copy

import pytest
import torch
from conftest import one_line, small_run

from prunestudy import models, shrink
from prunestudy.errors import InputError
from prunestudy.methods.channels import Channels
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner

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
    most = 0.2 if method == "sparse_gates" else 0.02
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
