import copy
import math

import ptflops
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from ptflops.aten_ops import addmm_flop, conv_flop
from torch import nn
from torch.nn.utils import parametrize, prune
from torchmetrics.functional.classification import multiclass_f1_score
from torchmetrics.image import PeakSignalNoiseRatio

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


def test_psnr_is_that_of_torchmetrics():
    torch.manual_seed(0)
    task, theirs = measure.task("reconstruct", (0.3,), (0.4,)), PeakSignalNoiseRatio(data_range=1.0)
    x = torch.randn(40, 1, 8, 8)
    for part in x.split(7):
        theirs.update(part, part * 0.4 + 0.3)
    found = task.evaluate(Fixed(), [(part, None) for part in x.split(7)])
    assert (found.metric, found.count) == (float(theirs.compute()), 40)
    assert found.loss == pytest.approx(float(task.loss(x, x, None)), rel=1e-5)


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


def test_a_loss_and_a_metric_of_ones_own():
    x, y = torch.arange(6.0).view(3, 2), torch.ones(3, 2)
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]

    def worst(model, batches):
        assert not model.training
        return max(float((model(x) - y).abs().max()) for x, y in batches)

    own = measure.own_task(metric=worst)
    net = Fixed().train()
    for given in (batches, iter(batches)):
        found = own.evaluate(net, given)
        assert (found.metric, found.count, own.metric_name) == (4.0, 3, "worst")
        assert found.loss == pytest.approx(float(F.mse_loss(x, y)))
    assert net.training
    logits, labels = torch.eye(3), torch.tensor([0, 1, 1])
    by_loss = measure.own_task(lambda output, x, y: output.sum() + y.sum())
    found = by_loss.evaluate(Fixed(), [(logits, labels)])
    assert (found.metric, found.loss, by_loss.metric_name) == (2 / 3, 5.0, "top1")
    assert measure.top1(Fixed(), [(logits, labels)]) == 2 / 3
    assert measure.default_loss(logits, None, labels) == F.cross_entropy(logits, labels)
    assert measure.default_loss(logits, None, labels.byte()) == F.cross_entropy(logits, labels)
    many = torch.eye(200)[[0, 199]], torch.tensor([0, 199], dtype=torch.uint8)
    assert measure.top1(Fixed(), [many]) == 1.0
    refused(lambda: measure.default_loss((logits,), None, labels), "output = 'tuple'", "own loss")
    refused(lambda: measure.top1(Fixed(), batches), "labels = (torch.float32, (1, 2))")
    refused(lambda: own.evaluate(Fixed(), [(x, y[:, 0])]), "targets = (3,)", "(3, 2)")
    refused(lambda: own.evaluate(Fixed(), []), "batches = 0")


def test_batches_of_several_inputs():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    x = torch.eye(3), torch.zeros(3, 3)
    assert CLASSIFY.evaluate(Sum(), [(x, torch.tensor([0, 1, 0]))], 3).metric == 2 / 3


# counts


@pytest.mark.parametrize(
    ("name", "want"),
    [("lenet5", 288_000 + 1_600_000 + 400_000 + 5_000), ("lenet300", 266_200)],
)
def test_macs_of_the_papers_nets(name, want):
    net, example = models.build(name, (1, 28, 28), 10), torch.zeros(3, 1, 28, 28)
    assert measure.macs(net, example) == want
    assert sum(measure.layer_macs(net, example).values()) == want
    assert measure.nonzero_macs(net, example) == want


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
    assert measure.macs(net, torch.zeros(2, 2, 6, 6)) == 9 * 36 + 9 * 48 + 15 + 10
    by_layer = measure.layer_macs(net, torch.zeros(2, 2, 6, 6))
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
    assert measure.nonzero_macs(net, torch.zeros(2, 2, 6, 6)) == 9 * 27 + 9 * 32 + 15 + 10


def test_macs_of_shared_and_functional_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return F.linear(self.fc(self.fc(x)), torch.ones(2, 3), torch.ones(2))

    assert measure.layer_macs(Twice(), torch.zeros(2, 3)) == {"fc.weight": 18}
    assert measure.macs(Twice(), torch.zeros(2, 3)) == 9 + 9 + 6
    assert measure.macs(nn.Linear(3, 2), torch.zeros(2, 7, 3)) == 7 * 6
    assert measure.layer_macs(nn.Linear(3, 2), torch.zeros(2, 7, 3)) == {"weight": 7 * 6}


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
    assert measure.macs(net, torch.zeros(2, 4)) == 8
    assert measure.layer_macs(net, torch.zeros(2, 4)) == {"0.weight": 8}
    assert measure.nonzero_macs(net, torch.zeros(2, 4)) == 4
    assert measure.peak_memory_mb(net, torch.zeros(1, 4)) > 0
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not net._forward_hooks
    assert not net[0]._forward_hooks


def test_tied_weights_count_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3, bias=False), nn.Linear(3, 1))
    net[2].weight = net[0].weight
    with torch.no_grad():
        net[0].weight[0] = 0
    assert (measure.parameters(net), measure.nonzeros(net)) == (9 + 3 + 4, 6 + 3 + 4)
    assert measure.layer_sparsity(net) == {"0.weight": pytest.approx(1 / 3), "3.weight": 0}
    assert measure.removed_share(net, net) == 3 / 12
    assert measure.layer_macs(net, torch.ones(1, 3)) == {
        "0.weight": 9,
        "2.weight": 9,
        "3.weight": 3,
    }
    prune.l1_unstructured(net[3], "weight", amount=1)  # a copy keeps the tie
    assert measure.parameters(net) == 9 + 3 + 4


def hooked():
    """Nets of 10 numbers whose weight a hook or a parametrisation computes, with its nonzeros."""
    layers = [nn.Linear(4, 2) for _ in range(5)]
    prune.l1_unstructured(layers[0], "weight", amount=6)
    prune.random_unstructured(layers[1], "weight", amount=2)
    prune.l1_unstructured(layers[1], "weight", amount=3)
    prune.random_unstructured(layers[1], "bias", amount=1)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layers[2])
    with torch.no_grad():
        layers[2].weight_g[0] = 0
    nn.utils.parametrizations.weight_norm(layers[3])
    nn.utils.spectral_norm(layers[4])
    return zip(layers, (2 + 2, 3 + 1, 4 + 2, 8 + 2, 8 + 2), strict=True)


def test_nets_with_hooks_count_as_what_they_compute():
    for layer, left in hooked():
        net = nn.Sequential(layer, nn.ReLU()).train()
        net(torch.randn(3, 4)).sum().backward()
        names = list(net.state_dict())
        expected = net.eval()(torch.ones(3, 4))
        assert (measure.parameters(net), measure.nonzeros(net)) == (10, left)
        biases = int(expected.shape[1] if not hasattr(layer, "bias_mask") else 1)
        assert measure.layer_sparsity(net) == {"0.weight": 1 - (left - biases) / 8}
        assert measure.macs(net, torch.ones(3, 4)) == 8
        assert measure.nonzero_macs(net, torch.ones(3, 4)) == left - biases
        plain = shrink.fold(net)
        assert torch.equal(plain(torch.ones(3, 4)), expected)
        assert sorted(plain.state_dict()) == ["0.bias", "0.weight"]
        assert list(net.state_dict()) == names
        assert not plain[0]._forward_pre_hooks


def test_a_pruned_lstm_counts_as_what_it_computes():
    net = prune.random_unstructured(nn.LSTM(4, 3), "weight_hh_l0", amount=12)
    assert measure.parameters(net) == 12 * (4 + 3 + 2)
    assert measure.nonzeros(net) == 12 * (4 + 3 + 2) - 12
    x = torch.randn(5, 2, 4)
    assert torch.equal(shrink.fold(net)(x)[0], net.eval()(x)[0])


class Call(nn.Module):
    """A function of the inputs as a net."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def drawn(*shapes):
    return tuple(torch.ones(2, *shape) for shape in shapes)


def encoder(norm_first=False):
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)


ATTENTION = 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8  # projections, then scores and their use: 5 tokens of 8
MHA = nn.MultiheadAttention(8, 2, batch_first=True)
NARROW = nn.MultiheadAttention(8, 2, kdim=3, vdim=6, batch_first=True)
SDPA = F.scaled_dot_product_attention
OPERATIONS = {
    "attention": (Call(lambda x: MHA(x, x, x)), drawn((5, 8)), ATTENTION),
    "its fast path": (Call(lambda x: MHA(x, x, x, need_weights=False)), drawn((5, 8)), ATTENTION),
    "cross attention": (
        NARROW,
        drawn((5, 8), (7, 3), (7, 6)),
        5 * 8 * 8 + 7 * 3 * 8 + 7 * 6 * 8 + 2 * 5 * 7 * 8 + 5 * 8 * 8,
    ),
    "sdpa": (Call(SDPA), drawn((2, 5, 4), (2, 7, 4), (2, 7, 3)), 2 * 5 * 7 * (4 + 3)),
    "causal": (Call(lambda x: SDPA(x, x, x, is_causal=True)), drawn((2, 5, 4)), 2 * 5 * 5 * 8),
    "encoder": (encoder(), drawn((5, 8)), ATTENTION + 2 * 5 * 8 * 16),
    "encoder, norm first": (encoder(True), drawn((5, 8)), ATTENTION + 2 * 5 * 8 * 16),
    "encoders": (
        nn.TransformerEncoder(encoder(), 3, enable_nested_tensor=False),
        drawn((5, 8)),
        3 * (ATTENTION + 2 * 5 * 8 * 16),
    ),
    "lstm": (nn.LSTM(8, 6, batch_first=True), drawn((5, 8)), 5 * 4 * 6 * (8 + 6)),
    "lstm, wide": (
        nn.LSTM(8, 6, 2, bias=False, batch_first=True, bidirectional=True),
        drawn((5, 8)),
        5 * 2 * 4 * 6 * ((8 + 6) + (12 + 6)),
    ),
    "lstm, projected": (
        nn.LSTM(8, 6, batch_first=True, proj_size=3),
        drawn((5, 8)),
        5 * (4 * 6 * (8 + 3) + 6 * 3),
    ),
    "lstm in float64": (nn.LSTM(8, 6, batch_first=True).double(), drawn((5, 8)), 5 * 4 * 6 * 14),
    "gru": (nn.GRU(8, 6, batch_first=True), drawn((5, 8)), 5 * 3 * 6 * (8 + 6)),
    "rnn": (nn.RNN(8, 6, batch_first=True), drawn((5, 8)), 5 * 6 * (8 + 6)),
    "lstm cell": (nn.LSTMCell(8, 6), drawn((8,)), 4 * 6 * (8 + 6)),
    "matmul": (Call(torch.matmul), drawn((3, 5, 8), (3, 8, 4)), 3 * 5 * 8 * 4),
    "bmm": (Call(torch.bmm), drawn((5, 8), (8, 4)), 5 * 8 * 4),
    "baddbmm": (Call(torch.baddbmm), drawn((5, 4), (5, 8), (8, 4)), 5 * 8 * 4),
    "addbmm": (Call(lambda x: torch.addbmm(x[0], x, x)), drawn((4, 4)), 4 * 4 * 4),
    "einsum": (Call(lambda x: torch.einsum("nij,nkj->nik", x, x)), drawn((5, 8)), 5 * 5 * 8),
    "vector": (Call(lambda x: x @ torch.ones(8)), drawn((5, 8)), 5 * 8),
    "addmv": (Call(lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 0])), drawn((5, 8)), 5 * 8),
    "dot": (Call(lambda x: torch.dot(x[0], x[0])), drawn((8,)), 8),
    "bilinear": (nn.Bilinear(8, 6, 4), drawn((5, 8), (5, 6)), 5 * (8 * 6 * 4 + 6 * 4)),
    "conv1d": (
        Call(lambda x: F.conv1d(x, torch.ones(6, 2, 3), torch.ones(6), groups=2)),
        drawn((4, 9)),
        6 * 2 * 3 * 7,
    ),
    "conv3d": (nn.Conv3d(2, 3, 3), drawn((2, 5, 5, 5)), 2 * 3 * 27 * 27),
    "transposed": (nn.ConvTranspose1d(4, 6, 3, groups=2), drawn((4, 9)), 4 * 3 * 3 * 9),
    "linear": (Call(lambda x: F.linear(x, torch.ones(3, 8), torch.ones(3))), drawn((5, 8)), 120),
    "elementwise": (Call(lambda x: F.interpolate(x * x, scale_factor=2.0)), drawn((3, 4)), 0),
    "upsampling": (nn.Upsample(scale_factor=2, mode="bilinear"), drawn((3, 4, 4)), 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_macs_of_operations_are_the_closed_formulas(name):
    net, example, want = OPERATIONS[name]
    assert measure.macs(net, example) == want
    assert torch.backends.mha.get_fastpath_enabled()  # is put back
    assert torch.backends.mkldnn.enabled
    assert measure.macs(net, tuple(x[:1] for x in example)) == want


def test_macs_of_integer_tokens_and_several_inputs():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.fc = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, tokens, weights):
            return self.fc(self.embedding(tokens)) * weights[:, :, None]

    example = torch.full((2, 5), 9), torch.ones(2, 5, dtype=torch.float64)
    assert measure.macs(Tokens(), example) == 5 * 4 * 3
    assert measure.layer_macs(Tokens(), example) == {"fc.weight": 60}
    assert measure.peak_memory_mb(Tokens(), example) > 0
    assert measure.latency({"a": Tokens()}, example, rounds=1)["a"] > 0
    assert measure.macs(nn.Embedding(10, 4), example[0]) == 0


def test_nonzero_macs_count_other_products_whole():
    net = nn.Sequential(nn.Linear(4, 8), encoder())
    with torch.no_grad():
        net[0].weight[:2] = 0
        net[1].linear1.weight[0] = 0
    dense = 5 * 4 * 8 + ATTENTION + 2 * 5 * 8 * 16
    assert measure.macs(net, torch.ones(2, 5, 4)) == dense
    assert measure.nonzero_macs(net, torch.ones(2, 5, 4)) == dense - 5 * (8 + 8)


PTFLOPS = "lenet5 resnet20 autoencoder mobilenet_v2_cifar googlenet deeplabv3plus_resnet50".split()


@pytest.mark.parametrize("name", PTFLOPS)
def test_ptflops_counts_the_same(name):
    shape = (1, 28, 28) if name in ("lenet5", "autoencoder") else (3, 32, 32)
    net = models.build(name, shape, 10).eval()
    aten = torch.ops.aten
    hooks = {  # it counts a bias as one MAC per output
        aten.addmm: lambda args, out: addmm_flop([None, *args[1:]], out),
        aten.convolution: lambda args, out: conv_flop([*args[:2], None, *args[3:]], out),
    }
    with torch.no_grad():
        theirs, _ = ptflops.get_model_complexity_info(
            net, shape, backend="aten", as_strings=False, custom_modules_hooks=hooks,
            print_per_layer_stat=False,
        )  # fmt: skip
    assert measure.macs(net, torch.zeros(1, *shape)) == theirs


def test_counts_refuse():
    net = nn.Linear(4, 2)
    for count in (measure.macs, measure.layer_macs, measure.nonzero_macs):
        refused(lambda count=count: count(net, (4, 0)), "example = ['int', 'int']", "input batch")
        refused(lambda count=count: count(net, torch.ones(0, 4)), "example = [(0, 4)]")
        refused(
            lambda count=count: count(net, torch.ones(2, 3)), "example = [(1, 3)]: Linear", "mat1"
        )
        refused(lambda count=count: count(shrink.to_csr(net), torch.ones(1, 4)), "before to_csr")
    for count in (measure.parameters, measure.nonzeros, measure.layer_sparsity):
        refused(lambda count=count: count(shrink.to_csr(net)), "before to_csr")
    sparse = Call(lambda x: torch.sparse.mm(torch.eye(4).to_sparse(), x[0]))
    refused(lambda: measure.macs(sparse, torch.ones(2, 4, 4)), "'Call': MACs of", "_sparse_addmm")


def test_counting_leaves_the_example_alone():
    net, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), -torch.ones(2, 4)
    measure.macs(net, x)
    measure.layer_macs(net, x)
    measure.peak_memory_mb(net, x)
    measure.latency({"a": net}, x, rounds=1)
    assert x.sum() == -8


# memory


def test_peak_memory_by_hand():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.BatchNorm1d(2))
    weights = 4 * (12 + 3 + 6 + 2 + 2 + 2 + 2 + 2) + 8  # batch norm counts its batches in int64
    want = weights + 4 * 5 * (4 + 3 + 3)  # the input, and the ReLU's input and output
    assert measure.peak_memory_mb(net, torch.zeros(5, 4)) == want / 1e6
    assert measure.peak_memory_mb(net, torch.zeros(5, 4)) == want / 1e6


def test_peak_memory_of_views_and_pooling():
    net = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 4, 4)), nn.MaxPool2d(2))
    # Pooling also makes the int64 positions of its maxima.
    assert measure.peak_memory_mb(net, torch.zeros(3, 16)) == (4 * 3 * 16 + 3 * 4 * (4 + 8)) / 1e6
    inplace = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU(inplace=True))
    assert measure.peak_memory_mb(inplace, torch.zeros(2, 8)) == 4 * 16 / 1e6


def test_peak_memory_of_a_csr_net_counts_its_arrays():
    layer = nn.Linear(100, 100, bias=False)
    nn.init.zeros_(layer.weight).data[0, :10] = 1
    arrays = 4 * (101 + 10 + 10 + 100)
    found = measure.peak_memory_mb(shrink.to_csr(layer), torch.zeros(2, 100))
    assert found == (arrays + 4 * 2 * 200) / 1e6


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


def test_latency_puts_modes_and_threads_back():
    threads = torch.get_num_threads()
    seen, given = [], set()

    class Net(nn.Module):
        def forward(self, x, tokens):
            state = (torch.get_num_threads(), self.training, torch.is_inference_mode_enabled())
            seen.append((tuple(x.shape), x.dtype, *state))
            given.add((tuple(x[0].double().tolist()), tuple(tokens[:, 0].tolist())))
            return x

    nets = {"dense": Net().train(), "small": Net().eval()}
    example = torch.zeros(3, 4), torch.full((3, 2), 7)
    found = measure.latency(nets, example, rounds=3, threads=1)
    assert list(found) == ["dense", "small"]
    assert all(ms > 0 for ms in found.values())
    assert set(seen) == {((3, 4), torch.float32, 1, False, True)}
    ((numbers, tokens),) = given  # the same for every net and round
    assert (len(set(numbers)), tokens) == (4, (7, 7, 7))
    assert (nets["dense"].training, nets["small"].training) == (True, False)
    assert torch.get_num_threads() == threads
    measure.latency(nets, example, rounds=1)
    assert len(given) == 1
    half = {"a": nn.Linear(4, 2).double()}
    assert measure.latency(half, torch.zeros(3, 4), rounds=1)["a"] > 0


def test_latency_refuses():
    net, x = {"a": nn.Linear(4, 2)}, torch.zeros(1, 4)
    refused(lambda: measure.latency(net, x, threads=0), "threads = 0")
    refused(lambda: measure.latency(net, (4,)), "example = ['int']")
    refused(lambda: measure.latency(net, torch.zeros(1, 3)), "example = [(1, 3)]: Linear")
    refused(lambda: measure.latency(net, x, rounds=0), "rounds = 0")
    refused(lambda: measure.latency({}, x), "functions = {}")
    refused(lambda: measure.interleave({"a": print}, 1, warmup=-1), "warmup = -1")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measures_on_cuda():
    net = models.build("lenet5", (1, 28, 28), 10).cuda()
    assert measure.macs(net, torch.zeros(2, 1, 28, 28)) == 2_293_000
    dense = sum(p.numel() for p in net.parameters()) * 4 / 1e6
    assert measure.peak_memory_mb(net, torch.zeros(128, 1, 28, 28)) > dense
    assert measure.latency({"a": net}, torch.zeros(2, 1, 28, 28), rounds=2)["a"] > 0
    found = CLASSIFY.evaluate(net, [(torch.zeros(3, 1, 28, 28), torch.tensor([0, 1, 2]))], 10)
    assert found.count == 3
    assert next(net.parameters()).is_cuda
