import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from torch import nn
from torch.nn.utils import parametrize
from torchmetrics.functional.classification import multiclass_f1_score

from prunestudy import measure, models, shrink


class Fixed(nn.Module):
    """Returns its input: the logits are what the test puts in."""

    def forward(self, x):
        return x


class Half(nn.Module):
    """Zeroes the first half of a weight; in training everything."""

    def forward(self, weight):
        mask = torch.ones(weight.numel())
        mask[: weight.numel() // 2] = 0
        return weight * mask.view_as(weight) * (not self.training)


CLASSIFY = measure.task("classify")

# quality


def logits_of(predictions, classes):
    return 5.0 * F.one_hot(torch.tensor(predictions), classes)


def test_quality_by_hand():
    batches = [
        (
            torch.tensor([[0.0, 0.0, -math.inf], [0.0, math.log(3), -math.inf]]),
            torch.tensor([0, 1]),
        ),
        (torch.tensor([[0.0, math.log(3), -math.inf]]), torch.tensor([0])),
    ]
    found = CLASSIFY.evaluate(Fixed(), batches, 3)
    assert (found.metric, found.count) == (2 / 3, 3)
    assert found.loss == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3, rel=1e-6)
    assert found.more["macro_f1"] == pytest.approx(2 / 3, rel=1e-12)


def test_top5_by_hand():
    falling = torch.arange(7, 0, -1.0).repeat(4, 1)  # the likeliest class is 0, then 1, ...
    found = CLASSIFY.evaluate(Fixed(), [(falling, torch.tensor([0, 4, 5, 6]))], 7)
    assert (found.metric, found.more["top5"]) == (0.25, 0.5)
    few = [(falling[:, :5], torch.tensor([0, 1, 3, 4]))]
    assert "top5" not in CLASSIFY.evaluate(Fixed(), few, 5).more


@pytest.mark.parametrize("classes", [3, 10])
def test_macro_f1_is_that_of_torchmetrics(classes):
    torch.manual_seed(0)
    for seen in (2, classes - 1, classes):
        y = torch.randint(seen, (40,))
        logits = torch.randn(40, classes)
        found = CLASSIFY.evaluate(Fixed(), zip(logits.split(7), y.split(7), strict=True), classes)
        want = multiclass_f1_score(logits, y, classes, average="macro")
        assert found.more["macro_f1"] == pytest.approx(float(want), rel=1e-6)
        assert found.metric == pytest.approx(float((logits.argmax(1) == y).float().mean()))
        assert found.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-6)


def test_evaluate_puts_every_mode_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), nn.BatchNorm1d(2))
    net.train()
    net[2].eval()
    CLASSIFY.evaluate(net, [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))], 2)
    assert [m.training for m in net.modules()] == [True, True, True, False]
    refused(lambda: CLASSIFY.evaluate(net, [], 2), "batches = 0")
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert net[2].num_batches_tracked == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite(value):
    found = CLASSIFY.evaluate(Fixed(), [(torch.full((4, 3), value), torch.tensor([0, 1, 2, 2]))], 3)
    assert not math.isfinite(found.loss)
    assert 0 <= found.metric <= 1
    assert found.count == 4


@pytest.mark.parametrize(
    ("logits", "labels", "classes", "word"),
    [
        (logits_of([0, 1], 2), [0, 2], 2, "labels = (0, 2)"),
        (logits_of([0, 1], 2), [-1, 0], 2, "labels = (-1, 0)"),
        (logits_of([0, 1], 3), [0, 1], 2, "output = (2, 3)"),
        (logits_of([0, 1], 2), [0, 1], 0, "num_classes = 0"),
    ],
)
def test_evaluate_refuses(logits, labels, classes, word):
    refused(lambda: CLASSIFY.evaluate(Fixed(), [(logits, torch.tensor(labels))], classes), word)


# counts


@pytest.mark.parametrize(
    ("name", "want"),
    [("lenet5", 288_000 + 1_600_000 + 400_000 + 5_000), ("lenet300", 266_200)],
)
def test_macs_of_the_papers_nets(name, want):
    net = models.build(name, (1, 28, 28), 10)
    assert measure.macs(net, (1, 28, 28)) == want
    assert sum(measure.layer_macs(net, (1, 28, 28)).values()) == want
    assert measure.nonzero_macs(net, (1, 28, 28)) == want


def tiny():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 5),
        nn.Linear(5, 2, bias=False),
    )


def test_counts_by_hand():
    net = tiny()
    assert measure.parameters(net) == (36 + 4) + 8 + 48 + (15 + 5) + 10
    assert measure.macs(net, (2, 6, 6)) == 9 * 36 + 9 * 48 + 15 + 10
    by_layer = measure.layer_macs(net, (2, 6, 6))
    assert sum(by_layer.values()) == 9 * 36 + 9 * 48 + 15 + 10
    assert list(by_layer) == [name for name, _ in measure.prunable_weights(net)]
    with torch.no_grad():
        net[0].weight[0] = 0  # 9 of 36
        net[3].weight[:, 0] = 0  # 16 of 48
        net[6].bias[:] = 0
        net[1].bias[:] = 1
    assert measure.nonzeros(net) == (27 + 4) + 8 + 32 + 15 + 10
    assert measure.removed_share(net, net) == pytest.approx(25 / 109, rel=1e-12)
    want = {"0.weight": 9 / 36, "3.weight": 16 / 48, "6.weight": 0.0, "7.weight": 0.0}
    assert measure.layer_sparsity(net) == pytest.approx(want)
    assert measure.nonzero_macs(net, (2, 6, 6)) == 9 * 27 + 9 * 32 + 15 + 10


def test_macs_of_shared_and_functional_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return F.linear(self.fc(self.fc(x)), torch.ones(2, 3), torch.ones(2))

    assert measure.layer_macs(Twice(), (3,)) == {"fc.weight": 18}
    assert measure.macs(Twice(), (3,)) == 9 + 9 + 6
    assert measure.macs(nn.Linear(3, 2), (7, 3)) == 7 * 6
    assert measure.layer_macs(nn.Linear(3, 2), (7, 3)) == {"weight": 7 * 6}


def test_prunable_weights_are_the_layers_own_memory():
    net = tiny()
    found = dict(measure.prunable_weights(net))
    assert list(found) == ["0.weight", "3.weight", "6.weight", "7.weight"]
    assert not any(w.requires_grad for w in found.values())
    found["6.weight"].zero_()
    assert int(net[6].weight.count_nonzero()) == 0
    assert [name for name, _ in measure.prunable_weights(nn.Linear(2, 1))] == ["weight"]


def test_parametrised_nets_count_as_what_they_compute():
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU()).train()
    nn.init.ones_(net[0].weight)
    nn.init.ones_(net[0].bias)
    parametrize.register_parametrization(net[0], "weight", Half())
    before = copy.deepcopy(net.state_dict())
    assert measure.parameters(net) == 10
    assert measure.nonzeros(net) == 4 + 2
    assert measure.layer_sparsity(net) == {"0.weight": 0.5}
    assert measure.prunable_weights(net)[0][1].tolist() == [[0.0] * 4, [1.0] * 4]
    assert measure.macs(net, (4,)) == 8
    assert measure.layer_macs(net, (4,)) == {"0.weight": 8}
    assert measure.nonzero_macs(net, (4,)) == 4
    assert measure.peak_memory_mb(net, (4,), 1) > 0
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not net._forward_hooks
    assert not net[0]._forward_hooks


def test_macs_print_nothing_and_explain_a_failure(capfd):
    net = models.build("lenet300", (1, 28, 28), 10)
    measure.macs(net, (1, 28, 28))
    with pytest.raises(
        RuntimeError, match=r"ptflops could not count LeNet300 on \(1, 9\).*mat1"
    ) as e:
        measure.macs(net, (1, 9))
    assert "\n" not in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_counts_refuse():
    net = nn.Linear(4, 2)
    for count in (measure.macs, measure.layer_macs, measure.nonzero_macs):
        refused(lambda count=count: count(net, (4, 0)), "shape = (4, 0)", "positive")
        refused(lambda count=count: count(net, 4), "shape = 4", "positive")
        refused(lambda count=count: count(shrink.to_csr(net), (4,)), "before to_csr")
    for count in (measure.parameters, measure.nonzeros, measure.layer_sparsity):
        refused(lambda count=count: count(shrink.to_csr(net)), "before to_csr")


# memory


def test_peak_memory_by_hand():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.BatchNorm1d(2))
    weights = 4 * (12 + 3 + 6 + 2 + 2 + 2 + 2 + 2) + 8  # batch norm counts its batches in int64
    want = weights + 4 * 5 * (4 + 3 + 3)  # the input, and the ReLU's input and output
    assert measure.peak_memory_mb(net, (4,), 5) == want / 1e6
    assert measure.peak_memory_mb(net, (4,), 5) == want / 1e6


def test_peak_memory_of_views_and_pooling():
    net = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 4, 4)), nn.MaxPool2d(2))
    # Pooling also makes the int64 positions of its maxima.
    assert measure.peak_memory_mb(net, (16,), 3) == (4 * 3 * 16 + 3 * 4 * (4 + 8)) / 1e6
    inplace = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU(inplace=True))
    assert measure.peak_memory_mb(inplace, (8,), 2) == 4 * 16 / 1e6


def test_peak_memory_of_a_csr_net_counts_its_arrays():
    layer = nn.Linear(100, 100, bias=False)
    nn.init.zeros_(layer.weight).data[0, :10] = 1
    arrays = 4 * (101 + 10 + 10 + 100)
    found = measure.peak_memory_mb(shrink.to_csr(layer), (100,), 2)
    assert found == (arrays + 4 * 2 * 200) / 1e6


def test_peak_memory_refuses():
    refused(lambda: measure.peak_memory_mb(nn.Linear(4, 2), (4,), 0), "batch = 0")
    refused(lambda: measure.peak_memory_mb(nn.Linear(4, 2), ()), "shape = ()")


# latency


def test_interleave_calls_each_once_a_round():
    calls = []
    found = measure.interleave({k: lambda k=k: calls.append(k) for k in "abc"}, rounds=8, warmup=2)
    rounds = [calls[i : i + 3] for i in range(0, 30, 3)]
    assert len(calls) == 30
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 2
    assert {k: len(v) for k, v in found.items()} == {"a": 8, "b": 8, "c": 8}
    assert all(t >= 0 for v in found.values() for t in v)


def test_ratio():
    exact = measure.ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (exact.median, exact.low, exact.high) == (2.0, 2.0, 2.0)
    found = measure.ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, seed=3)
    assert found == measure.ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, seed=3)
    assert (found.median, found.low, found.high) == (3.0, 1.0, 5.0)


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([], [], "(0, 0)"),
        ([1.0], [1.0, 2.0], "(1, 2)"),
        ([1.0], [0.0], "b = 0.0"),
        ([math.nan], [1.0], "a = nan"),
    ],
)
def test_ratio_refuses(a, b, word):
    refused(lambda: measure.ratio(a, b), word)


def test_latency_puts_modes_and_threads_back():
    threads = torch.get_num_threads()
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            state = (torch.get_num_threads(), self.training, torch.is_inference_mode_enabled())
            seen.append((tuple(x.shape), *state))
            return x

    nets = {"dense": Net().train(), "small": Net().eval()}
    found = measure.latency(nets, (4,), batch=3, rounds=3, threads=1)
    assert list(found) == ["dense", "small"]
    assert all(ms > 0 for ms in found.values())
    assert set(seen) == {((3, 4), 1, False, True)}
    assert (nets["dense"].training, nets["small"].training) == (True, False)
    assert torch.get_num_threads() == threads


def test_latency_refuses():
    net = {"a": nn.Linear(4, 2)}
    refused(lambda: measure.latency(net, (4,), 1, threads=0), "threads = 0")
    refused(lambda: measure.latency(net, (4,), 0), "batch = 0")
    refused(lambda: measure.latency(net, (4,), 1, rounds=0), "rounds = 0")
    refused(lambda: measure.latency({}, (4,), 1), "functions = {}")
    refused(lambda: measure.interleave({"a": print}, 1, warmup=-1), "warmup = -1")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measures_on_cuda():
    net = models.build("lenet5", (1, 28, 28), 10).cuda()
    assert measure.macs(net, (1, 28, 28)) == 2_293_000
    dense = sum(p.numel() for p in net.parameters()) * 4 / 1e6
    assert measure.peak_memory_mb(net, (1, 28, 28)) > dense
    assert measure.latency({"a": net}, (1, 28, 28), 2, rounds=2)["a"] > 0
    found = CLASSIFY.evaluate(net, [(torch.zeros(3, 1, 28, 28), torch.tensor([0, 1, 2]))], 10)
    assert found.count == 3
    assert next(net.parameters()).is_cuda
