import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from prunestudy import measure, models, shrink
from prunestudy.measure import cost


class Half(nn.Module):
    """Zeroes the first half of a weight; in training everything."""

    def forward(self, weight):
        mask = torch.arange(weight.numel()) >= weight.numel() // 2
        return weight * mask.view_as(weight) * (not self.training)


def test_macs_of_the_papers_nets():
    papers = {"lenet5": 288_000 + 1_600_000 + 400_000 + 5_000, "lenet300": 266_200}
    for name, want in papers.items():
        net, example = models.build(name, (1, 28, 28), 10), torch.zeros(3, 1, 28, 28)
        assert measure.macs(net, example) == measure.nonzero_macs(net, example) == want
        assert sum(measure.layer_macs(net, example).values()) == want


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
    by_layer = {"0.weight": 9 * 36, "3.weight": 9 * 48, "6.weight": 15, "7.weight": 10}
    assert measure.layer_macs(net, torch.zeros(2, 2, 6, 6)) == by_layer
    with torch.no_grad():
        net[0].weight[0] = 0  # 9 of 36
        net[3].weight[:, 0] = 0  # 16 of 48
        net[6].bias[:] = 0
        net[1].bias[:] = 1
    assert measure.nonzeros(net) == (27 + 4) + 8 + 32 + 15 + 10
    assert measure.removed_share(net, net) == pytest.approx(25 / 109, rel=1e-12)
    want = {"0.weight": 1 / 4, "3.weight": 1 / 3, "6.weight": 0.0, "7.weight": 0.0}
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
    nn.init.ones_(net[0].weight), nn.init.ones_(net[0].bias)
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


def test_tied_weights_count_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3, bias=False), nn.Linear(3, 1))
    net[2].weight = net[0].weight
    with torch.no_grad():
        net[0].weight[0] = 0
    assert (measure.parameters(net), measure.nonzeros(net)) == (9 + 3 + 4, 6 + 3 + 4)
    assert measure.layer_sparsity(net) == {"0.weight": pytest.approx(1 / 3), "3.weight": 0}
    assert measure.removed_share(net, net) == 3 / 12
    assert list(measure.layer_macs(net, torch.ones(1, 3)).values()) == [9, 9, 3]
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
        assert torch.equal(shrink.fold(net)(torch.ones(3, 4)), expected)
        assert list(net.state_dict()) == names
    net = prune.random_unstructured(nn.LSTM(4, 3), "weight_hh_l0", amount=12)
    assert (measure.parameters(net), measure.nonzeros(net)) == (12 * 9, 12 * 9 - 12)
    x = torch.randn(5, 2, 4)
    assert torch.equal(shrink.fold(net)(x)[0], net.eval()(x)[0])


class Call(nn.Module):
    """A function of the inputs as a net."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def encoder(norm_first=False):
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)


def recurrent(kind, *sizes, **options):
    return kind(*sizes, batch_first=True, **options)


ATTENTION = 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8  # projections, then scores and their use: 5 tokens of 8
CROSS = 5 * 8 * 8 + 7 * 3 * 8 + 7 * 6 * 8 + 2 * 5 * 7 * 8 + 5 * 8 * 8
ENCODER = ATTENTION + 2 * 5 * 8 * 16
WIDE = {"bias": False, "bidirectional": True}
MHA = nn.MultiheadAttention(8, 2, batch_first=True)
NARROW = nn.MultiheadAttention(8, 2, kdim=3, vdim=6, batch_first=True)
SDPA = F.scaled_dot_product_attention
OPERATIONS = {  # a net or a function, its MACs, the shapes of its inputs without the batch
    "attention": (lambda x: MHA(x, x, x), ATTENTION, (5, 8)),
    "its fast path": (lambda x: MHA(x, x, x, need_weights=False), ATTENTION, (5, 8)),
    "cross attention": (NARROW, CROSS, (5, 8), (7, 3), (7, 6)),
    "sdpa": (SDPA, 2 * 5 * 7 * (4 + 3), (2, 5, 4), (2, 7, 4), (2, 7, 3)),
    "causal": (lambda x: SDPA(x, x, x, is_causal=True), 2 * 5 * 5 * 8, (2, 5, 4)),
    "encoder": (encoder(), ENCODER, (5, 8)),
    "encoder, norm first": (encoder(True), ENCODER, (5, 8)),
    "encoders": (nn.Sequential(encoder(), encoder(), encoder()), 3 * ENCODER, (5, 8)),
    "lstm": (recurrent(nn.LSTM, 8, 6), 5 * 4 * 6 * (8 + 6), (5, 8)),
    "lstm, wide": (recurrent(nn.LSTM, 8, 6, 2, **WIDE), 5 * 2 * 4 * 6 * (14 + 18), (5, 8)),
    "lstm, projected": (recurrent(nn.LSTM, 8, 6, proj_size=3), 5 * (4 * 6 * 11 + 6 * 3), (5, 8)),
    "lstm in float64": (recurrent(nn.LSTM, 8, 6).double(), 5 * 4 * 6 * 14, (5, 8)),
    "gru": (recurrent(nn.GRU, 8, 6), 5 * 3 * 6 * (8 + 6), (5, 8)),
    "rnn": (recurrent(nn.RNN, 8, 6), 5 * 6 * (8 + 6), (5, 8)),
    "lstm cell": (nn.LSTMCell(8, 6), 4 * 6 * (8 + 6), (8,)),
    "matmul": (torch.matmul, 3 * 5 * 8 * 4, (3, 5, 8), (3, 8, 4)),
    "bmm": (torch.bmm, 5 * 8 * 4, (5, 8), (8, 4)),
    "baddbmm": (torch.baddbmm, 5 * 8 * 4, (5, 4), (5, 8), (8, 4)),
    "addbmm": (lambda x: torch.addbmm(x[0], x, x), 4 * 4 * 4, (4, 4)),
    "einsum": (lambda x: torch.einsum("nij,nkj->nik", x, x), 5 * 5 * 8, (5, 8)),
    "vector": (lambda x: x @ torch.ones(8), 5 * 8, (5, 8)),
    "addmv": (lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 0]), 5 * 8, (5, 8)),
    "dot": (lambda x: torch.dot(x[0], x[0]), 8, (8,)),
    "bilinear": (nn.Bilinear(8, 6, 4), 5 * (8 * 6 * 4 + 6 * 4), (5, 8), (5, 6)),
    "conv1d": (lambda x: F.conv1d(x, torch.ones(6, 2, 3), groups=2), 6 * 2 * 3 * 7, (4, 9)),
    "conv3d": (nn.Conv3d(2, 3, 3), 2 * 3 * 27 * 27, (2, 5, 5, 5)),
    "transposed": (nn.ConvTranspose1d(4, 6, 3, groups=2), 4 * 3 * 3 * 9, (4, 9)),
    "linear": (lambda x: F.linear(x, torch.ones(3, 8), torch.ones(3)), 120, (5, 8)),
    "elementwise": (lambda x: F.interpolate(x * x, scale_factor=2.0), 0, (3, 4)),
    "upsampling": (nn.Upsample(scale_factor=2, mode="bilinear"), 0, (3, 4, 4)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_macs_of_operations_are_the_closed_formulas(name):
    net, want, *shapes = OPERATIONS[name]
    net = net if isinstance(net, nn.Module) else Call(net)
    for batch in (1, 2):
        assert measure.macs(net, tuple(torch.ones(batch, *shape) for shape in shapes)) == want
    assert torch.backends.mha.get_fastpath_enabled()  # is put back


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
    dense = measure.macs(net, torch.ones(2, 5, 4))
    assert dense == 5 * 4 * 8 + ENCODER
    assert measure.nonzero_macs(net, torch.ones(2, 5, 4)) == dense - 5 * (8 + 8)


@pytest.mark.parametrize("name", ["autoencoder", "mobilenet_v2_cifar", "deeplabv3plus_resnet50"])
def test_torch_counts_the_same(name):
    example = torch.zeros(1, 1, 28, 28) if name == "autoencoder" else torch.zeros(1, 3, 32, 32)
    net = models.build(name, tuple(example.shape[1:]), 10).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        net(example)
    assert measure.macs(net, example) == theirs.get_total_flops() // 2


def test_counts_refuse(monkeypatch):
    net = nn.Linear(4, 2).train()
    for count in (measure.macs, measure.layer_macs, measure.nonzero_macs):
        refused(lambda count=count: count(net, (4, 0)), "example = ['int', 'int']", "input batch")
        refused(lambda count=count: count(net, torch.ones(0, 4)), "example = [(0, 4)]")
        refused(lambda count=count: count(net, torch.ones(2, 3)), "[(1, 3)]: Linear", "mat1")
        assert net.training
        assert not net._forward_hooks
        assert not net._forward_pre_hooks
        refused(lambda count=count: count(shrink.to_csr(net), torch.ones(1, 4)), "before to_csr")
    for count in (measure.parameters, measure.nonzeros, measure.layer_sparsity):
        refused(lambda count=count: count(shrink.to_csr(net)), "before to_csr")
    sparse = Call(lambda x: torch.sparse.mm(torch.eye(4).to_sparse(), x[0]))
    refused(lambda: measure.macs(sparse, torch.ones(2, 4, 4)), "'Call': MACs of", "_sparse_addmm")
    monkeypatch.setitem(cost._TORCH, torch.ops.aten.addmm, lambda *_, **__: 14)
    refused(lambda: measure.macs(net, torch.ones(1, 4)), "aten.addmm", "count [7, 8] MACs")


def test_counting_leaves_net_and_example_alone():
    net, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)).train(), -torch.ones(2, 4)
    for count in (measure.macs, measure.layer_macs, measure.nonzero_macs, measure.peak_memory_mb):
        count(net, x)
        assert (x.sum(), net.training, net[1].training, len(net[1]._forward_hooks)) == (-8, 1, 1, 0)
    measure.latency({"a": net}, x, rounds=1)
    assert x.sum() == -8


def test_peak_memory_by_hand():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.BatchNorm1d(2))
    weights = 4 * (12 + 3 + 6 + 2 + 2 + 2 + 2 + 2) + 8  # batch norm counts its batches in int64
    want = weights + 4 * 5 * (4 + 3 + 3)  # the input, and the ReLU's input and output
    assert measure.peak_memory_mb(net, torch.zeros(5, 4)) == want / 1e6
    # Views add nothing; pooling also makes the int64 positions of its maxima.
    net = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 4, 4)), nn.MaxPool2d(2))
    assert measure.peak_memory_mb(net, torch.zeros(3, 16)) == (4 * 3 * 16 + 3 * 4 * (4 + 8)) / 1e6
    inplace = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU(inplace=True))
    assert measure.peak_memory_mb(inplace, torch.zeros(2, 8)) == 4 * 16 / 1e6
    layer = nn.Linear(100, 100, bias=False)
    nn.init.zeros_(layer.weight).data[0, :10] = 1
    arrays = 4 * (101 + 10 + 10 + 100)
    found = measure.peak_memory_mb(shrink.to_csr(layer), torch.zeros(2, 100))
    assert found == (arrays + 4 * 2 * 200) / 1e6


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
    assert measure.peak_memory_mb(net, torch.zeros(128, 1, 28, 28)) > measure.parameters(net) * 4e-6
    assert measure.latency({"a": net}, torch.zeros(2, 1, 28, 28), rounds=2)["a"] > 0
    found = measure.Task().evaluate(net, [(torch.zeros(3, 1, 28, 28), torch.tensor([0, 1, 2]))], 10)
    assert found.count == 3
