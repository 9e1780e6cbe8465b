"""What `make gpu` measures, on the CPU where there is no CUDA device."""

import pandas as pd
import pytest
import torch
from conftest import one_line, small_run

from prunestudy import measure, models, shrink
from prunestudy.errors import InputError
from prunestudy.study import gpu
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPE = (3, 32, 32)


def test_gated_and_smaller_nets_are_the_same_function_at_a_fraction_of_the_cost():
    forms = gpu.forms_of("resnet20", SHAPE, 10)
    x = torch.randn(3, *SHAPE)
    with torch.inference_mode():
        out = {name: net(x) for name, net in forms.items()}
    assert (out["gated"] - out["smaller"]).abs().max() < 1e-5 * out["gated"].abs().max()
    assert (out["gated"] - out["dense"]).abs().max() > 1e-2 * out["dense"].abs().max()
    macs = {name: measure.macs(net, SHAPE) for name, net in forms.items()}
    assert macs["gated"] == macs["dense"]
    assert 0.2 < macs["smaller"] / macs["dense"] < 0.3
    assert macs["smaller"] < macs["factors"] < macs["dense"]


def test_rows_of_the_comparison():
    table = gpu.compare("resnet20", SHAPE, 10, 2, CPU, rounds=1)
    assert list(table["form"]) == ["dense", "gated", "smaller", "factors"]
    assert set(table["difference"]) == {"0.0e+00"}
    first = table.iloc[0]
    assert first["inference"] == first["training step"] == "1.00 [1.00, 1.00]"
    assert first["ONNX Runtime"] == "1.00"
    assert float(first["peak MB"]) > float(table.iloc[2]["peak MB"])


def test_a_short_study_writes_records_and_a_page(tmp_path, monkeypatch, capsys):
    row = {"net": "resnet20", "form": "dense"}
    monkeypatch.setattr(gpu, "compare", lambda *args: pd.DataFrame([row]))
    monkeypatch.setattr(gpu, "NETS", {"resnet20": (SHAPE, 10, 2)})
    monkeypatch.setattr(gpu, "EPOCHS", 1)
    monkeypatch.setattr(gpu, "METHODS", {"dense": None, "gdp": 0.5})
    monkeypatch.setattr(gpu, "cifar_of", lambda root: "digits")
    gpu.run(str(tmp_path), device="cpu", quick=True)
    planned, store = gpu.short_study("digits"), Store("gpu", tmp_path)
    start, dense, gdp = (store.read(item.settings) for item in planned)
    assert start["status"] == dense["status"] == gdp["status"] == "done"
    assert dense["parent"] == gdp["parent"] == start["run"]
    page = (store.folder / "gpu.md").read_text()
    assert capsys.readouterr().out == page + "\n"
    assert "| resnet20 | dense |" in page
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| gdp-")]
    top1 = [record["metrics"]["metric"] for record in (gdp, dense)]
    share = gdp["metrics"]["macs"] / gdp["metrics"]["dense_macs"]
    assert cells[0][1:5] == [
        "2",
        "done",
        f"{100 * top1[0]:.2f}",
        f"{100 * (top1[0] - top1[1]):+.2f}",
    ]
    assert cells[0][6] == f"{share:.2f}"


def test_the_jpeg_copy_is_taken_where_it_is(tmp_path):
    assert gpu.cifar_of(str(tmp_path)) == "cifar10"
    (tmp_path / "cifar10-jpeg").mkdir()
    assert gpu.cifar_of(str(tmp_path)) == "cifar10_jpeg"


def test_without_data_nothing_is_written(no_data, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(InputError) as caught:
        gpu.run(str(tmp_path / "results"), device="cpu")
    assert one_line(caught).startswith("data = ")
    assert not (tmp_path / "results").exists()


def test_onnx_runtime_on_another_device(tmp_path):
    net = models.build("mlp", (1, 8, 8), 10)
    shrink.export_onnx(net, tmp_path / "net.onnx", (1, 8, 8))
    with pytest.raises(InputError) as caught:
        shrink.OnnxNet(tmp_path / "net.onnx", device="tpu")
    assert one_line(caught) == "device = 'tpu': one that ONNX Runtime was built for"
    assert shrink.onnx_runs_on("cpu")


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
    for form, net in gpu.forms_of(name, SHAPE, 10).items():
        assert gpu.difference(net, SHAPE, torch.device("cuda")) < 1e-9, form
