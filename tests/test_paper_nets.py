"""One run of two steps for each net and kind of data of the paper profile, to its record.

Random images of a few classes, two a batch, as small as the net allows, and an eighth of the
channels: what is tested is the way from the data through the method, the small net and its measures
to the disk.
"""

import pytest
from conftest import narrowed, small_imagenet, small_voc

from prunestudy import models
from prunestudy.study.runs import Runner, _data, stored_net
from prunestudy.study.settings import own_settings

# At 32 the last batch norms of ResNet-50 would see two values a channel, which may be equal.
SIDES = {"alexnet": 63, "alexnet_grouped": 63, "resnet50": 64}
RUNS = [
    ("imagenet", "alexnet", "sparse_gates", 0.5),
    ("imagenet", "vgg16", "sparse_gates", 0.5),
    ("imagenet", "alexnet_grouped", "force", 0.1),
    ("imagenet", "googlenet", "force", 0.1),
    ("imagenet", "resnet50", "gdp", 0.3),
    ("imagenet", "resnet50", "magnitude_attention", 0.9),
    ("imagenet", "mobilenet_v2", "gdp", 0.3),
    ("folder:imagenet", "wrn28_2", "magnitude_attention", 0.9),
    ("folder:imagenet", "mobilenet_v2_cifar", "gdp", 0.3),
    ("voc", "deeplabv3plus_resnet50", "gdp", 0.3),
]


@pytest.fixture
def two_steps(monkeypatch, tmp_path, store):
    """Run a method for two steps; return its settings, its record and the net it left."""
    _data.cache_clear()

    def run(dataset, model, method, target):
        side, entry = SIDES.get(model, 32), models._REGISTRY[model]
        small = entry._replace(factory=narrowed(entry.factory))
        monkeypatch.setitem(models._REGISTRY, model, small)
        if dataset == "voc":
            root = small_voc(monkeypatch, tmp_path, side, classes=3, train=6, test=2)
        else:
            root = small_imagenet(monkeypatch, tmp_path, side, classes=6, train=1, test=1)
            (root / "imagenet/test").symlink_to(root / "imagenet/val")
        values = {"dataset": dataset, "model": model, "method": method, "validation": 2}
        values |= {"epochs": 1, "batch_size": 2, "lr": 0.001, "flip": True}
        settings = own_settings(values | {"target": target}, root=str(root))
        record = Runner(store, data=root, device="cpu").ensure(settings)
        return settings, record, stored_net(store.weights(settings.run))[0]

    yield run
    _data.cache_clear()


@pytest.mark.parametrize(("dataset", "model", "method", "target"), RUNS)
def test_two_steps_to_the_record(two_steps, dataset, model, method, target):
    settings, record, net = two_steps(dataset, model, method, target)
    metrics = record["metrics"]
    assert (record["status"], record["data"]["train"]) == ("done", 4)
    assert metrics["images"] == record["data"]["test"] == (2 if dataset == "voc" else 6)
    assert metrics["metric_name"] == ("miou" if dataset == "voc" else "top1")
    assert 0 <= metrics["metric"] <= 1
    assert ("top5" in metrics) == (dataset != "voc")
    assert ("boundary_f1" in metrics) == (dataset == "voc")
    if settings.target.kind == "macs":
        assert metrics["macs"] <= (1 - target) * metrics["dense_macs"]
    elif method == "magnitude_attention":
        assert metrics["sparsity"] == pytest.approx(target, abs=0.01)
    assert sum(p.numel() for p in net.parameters()) == metrics["parameters"]
    assert metrics["bytes"] > 0
    assert models.task_of(model) == ("segment" if dataset == "voc" else "classify")
