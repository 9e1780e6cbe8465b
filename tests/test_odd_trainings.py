"""Losses, nets and contexts out of the ordinary: a right result, or one line that says why not."""

import pytest
import torch
import torch.nn.functional as F
from conftest import one_line
from torch import nn
from torch.utils.checkpoint import checkpoint

import prunestudy as ps
from prunestudy.errors import InputError
from prunestudy.shrink import require_ordinary

DATA = [(torch.randn(8, 6), torch.randint(0, 4, (8,))) for _ in range(3)]
X = DATA[0][0]


def net():
    torch.manual_seed(0)
    relu = nn.ReLU
    return nn.Sequential(nn.Linear(6, 32), relu(), nn.Linear(32, 32), relu(), nn.Linear(32, 4))


def train(model, method, epochs=1, data=DATA, **more):
    return ps.prune(model, method, data, ps.Recipe(epochs=epochs, lr=0.05), **more)


def says(call, begin, end=""):
    with pytest.raises(InputError) as caught:
        call()
    line = one_line(caught)
    assert line.startswith(begin)
    assert line.endswith(end)


def cross_entropy(output, x, y):
    return F.cross_entropy(output, y)


# --- losses


@pytest.mark.parametrize("offset", [0, 10, -10])
def test_the_descent_goes_down_a_loss_of_any_sign(offset):
    """A constant in the loss changes the length of the slope, never its direction."""
    slopes = []
    for more in (0, offset):
        method = ps.ComponentAware(0.5, steps=1)
        loss = lambda o, x, y, c=more: cross_entropy(o, x, y) + c  # noqa: E731
        each = {"train": lambda _: DATA, "validation": lambda: DATA}
        method.attach(net(), ps.Context(example=(X,), loss=loss, **each))
        numbers = torch.full((2,), 0.3).requires_grad_()
        method.batches = method.context.stream()
        found = torch.autograd.grad(method.soft_loss(method.dense, numbers, 0.1)[0], numbers)
        slopes.append(found[0] / found[0].norm())
    assert torch.allclose(*slopes, atol=1e-4)


class Heads(nn.Module):
    """Two outputs; `direct` reads the input, and no channel of a removable group leads to it."""

    def __init__(self):
        super().__init__()
        self.a, self.m = nn.Linear(6, 16), nn.Linear(16, 16)
        self.b, self.aux, self.direct = nn.Linear(16, 4), nn.Linear(16, 3), nn.Linear(6, 4)

    def forward(self, x):
        h = F.relu(self.m(F.relu(self.a(x))))
        return self.b(h), self.aux(h), self.direct(x)


@pytest.mark.parametrize("kind", [ps.ComponentAware, ps.TaylorChannels])
def test_a_head_that_the_loss_does_not_read(kind):
    settings = {"steps": 5} if kind is ps.ComponentAware else {}
    result = train(Heads(), kind(0.3, **settings), loss=lambda o, y: F.cross_entropy(o[0], y))
    assert len(result.model(X)) == 3
    assert 0.2 < result.method.report()["removed"] < 0.4


def test_gates_that_the_loss_does_not_read():
    loss = lambda o, y: F.cross_entropy(o[2], y)  # noqa: E731
    assert train(Heads(), ps.HardConcrete(0.3), loss=loss).status == "done"


# --- layers and parameters


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}])
def test_soft_coefficients_take_a_layer_norm_without_bias_or_weight(options):
    norm = nn.LayerNorm(16, **options)
    layers = nn.Linear(6, 16), norm, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    model = nn.Sequential(*layers)
    result = train(model, ps.ComponentAware(0.3, steps=5))
    assert result.model[0].out_features < 16 or result.model[3].out_features < 16


class Picks(nn.Module):
    """Reads its inputs in an order that is a parameter of whole numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.order = nn.Parameter(torch.arange(6), requires_grad=False)

    def forward(self, x):
        return self.b(F.relu(self.a(x[:, self.order])))


@pytest.mark.parametrize(
    "method",
    [
        ps.SparseGates(0.5),
        ps.Magnitude(0.5),
        ps.Snip(0.5),
        ps.GDP(0.3),
        ps.TaylorChannels(0.3),
        ps.ComponentAware(0.3, steps=5, recover=1),
        ps.Force(0.5, "rank", factorise="a", layers="a"),
    ],
    ids=lambda method: method.name,
)
def test_a_parameter_of_whole_numbers(method):
    result = train(Picks(), method)
    assert result.model.order.tolist() == [*range(6)]
    grads = {n: p.requires_grad for n, p in result.model.named_parameters()}
    assert not grads.pop("order")
    assert all(grads.values())


def test_a_parameter_of_whole_numbers_without_training():
    assert ps.remove(Picks(), {"a": [0, 1, 5]}, X).a.out_features == 3
    assert ps.shrink_to(Picks(), 0.3, X).a.out_features < 8


class Caches(nn.Module):
    """Keeps a table that grows with the batch, as caches of positions do."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.table = nn.Linear(6, 16), nn.Linear(16, 4), torch.zeros(0)

    def forward(self, x):
        if len(self.table) < len(x):
            self.table = torch.ones(len(x), 1)
        return self.b(F.relu(self.a(x) * self.table[: len(x)]))


def test_what_a_net_keeps_of_the_validation_can_be_trained_with():
    larger = [(torch.randn(16, 6), torch.randint(0, 4, (16,)))]
    assert train(Caches(), ps.SparseGates(0.5), 2, validation=larger).status == "done"


def test_a_batch_of_one_under_batch_norm_is_refused_in_one_line():
    norm = nn.BatchNorm1d(16)
    one = [(x[:1], y[:1]) for x, y in DATA]
    for epochs, method in (
        (1, ps.Snip(0.5)),
        (0, ps.PlainLowRank(0.2, "rank", factorise="*", recalibrate=2)),
    ):
        model = nn.Sequential(nn.Linear(6, 16), norm, nn.ReLU(), nn.Linear(16, 4))
        call = lambda m=model, k=method, e=epochs: train(m, k, e, one)  # noqa: E731
        says(call, "context.train = 'batch 0': cannot be used: Expected more than 1 value")


class Mixed(nn.Module):
    """A first layer in float64, the others in float32, and a complex parameter."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.a, self.norm = nn.Linear(6, 16, dtype=torch.float64), nn.LayerNorm(16)
        self.b, self.c = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6)
        x = F.relu(self.norm(self.a(x.to(self.a.weight)).to(self.norm.weight)))
        return self.c(F.relu(self.b(x)))


KINDS = [ps.SparseGates, ps.GDP, ps.HardConcrete, ps.ComponentAware, ps.MagnitudeAttention, ps.L1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_parameters_of_several_types(kind, tmp_path):
    settings = {"steps": 5, "recover": 1} if kind is ps.ComponentAware else {}
    result = train(Mixed(), kind(0.3, **settings))
    assert result.model.a.weight.dtype == torch.float64
    result.save(tmp_path / "net")
    assert torch.equal(ps.load(tmp_path / "net", Mixed())(X), result.model(X))
    model = net()
    model[2] = nn.Linear(32, 32, dtype=torch.complex64)
    context = ps.Context((X,), cross_entropy)
    says(lambda: kind(0.3).attach(model, context), "module = '2': its weight is torch.complex64")


class Recomputed(nn.Module):
    """Computes its first layers again in the backward pass, if asked to, and `b` twice."""

    def __init__(self, again=None, times=1):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.again, self.times = again, times

    def forward(self, x):
        for layer in (self.a, *[self.b] * self.times):
            part = lambda x, layer=layer: F.relu(layer(x))  # noqa: E731
            x = part(x) if self.again is None else checkpoint(part, x, use_reentrant=self.again)
        return self.c(x)


AGAIN = [(kind, False) for kind in (ps.SparseGates, ps.Snip, ps.ComponentAware, ps.GDP)]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("kind", "again"), [*AGAIN, (ps.SparseGates, True), (ps.Snip, True)], ids=str
)
def test_activation_checkpoints_change_no_number(kind, again):
    data = [(x.clone().requires_grad_(), y) for x, y in DATA]
    nets = [train(Recomputed(each), kind(0.5), 3, data).model for each in (None, again)]
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)


def test_a_layer_called_twice_is_not_drawn_for_under_a_checkpoint():
    assert train(Recomputed(times=2), ps.SparseGates(0.5)).status == "done"
    line = "model = 'activation checkpointing': not with Bernoulli draws for a layer that is called"
    says(lambda: train(Recomputed(False, 2), ps.SparseGates(0.5)), line)


def test_soft_coefficients_of_a_net_in_a_wrapper():
    result = train(nn.DataParallel(net()), ps.ComponentAware(0.3, steps=5))
    assert ps.measure.parameters(result.model) <= 0.7 * ps.measure.parameters(net())


# --- contexts


def test_what_a_search_needs_of_a_context_is_asked_for():
    none = "context.train = 'no batch': batches (x, y)"
    context = ps.Context(example=(X,), loss=cross_entropy, validation=lambda: DATA)
    says(lambda: ps.ComponentAware(0.3, steps=2).attach(net(), context), none)
    context = ps.Context(example=(X,), train=lambda _: DATA)
    line = "context.loss = None: "
    says(lambda: ps.ComponentAware(0.3).attach(net(), context), line)
    low_rank = ps.PlainLowRank(0.05, "macs", by="loss", factorise="2")
    says(lambda: low_rank.attach(net(), context), line)


@pytest.mark.parametrize(
    ("values", "smooth"),
    [
        (lambda m, b: {}, {}),
        (lambda m, b: 1 / 0, {}),
        (lambda m, b: {"q": 0.5}, {"q": lambda o, x, y: 1 / 0}),
        (lambda m, b: {"q": 0.5}, {"q": lambda o, x, y: 1.0}),
    ],
)
def test_metrics_that_fail_are_refused_in_one_line(values, smooth):
    method = ps.ComponentAware(0.3, steps=2)
    says(lambda: train(net(), method, metrics=ps.Metrics(values, smooth)), "metrics = ")


def test_a_single_number_is_a_metric():
    metrics = ps.Metrics(lambda m, b: 0.5)
    assert train(net(), ps.ComponentAware(0.3, steps=2), metrics=metrics).status == "done"


def test_a_frozen_weight_is_refused_before_anything_is_put_on_the_net():
    model = net()
    model[0].requires_grad_(False)
    context = ps.Context(example=(X,))
    line = "must be trainable with attention"
    says(lambda: ps.MagnitudeAttention(0.3).attach(model, context), "0.weight = 'frozen'", line)
    require_ordinary(model)


# --- a checkpoint's run, the history, files


@pytest.mark.parametrize("kind", [ps.SparseGates, ps.GDP], ids=lambda kind: kind.name)
def test_a_named_run_goes_on_with_its_own_settings_only(kind, tmp_path):
    def go(target=0.5, epochs=2, **more):
        saved = {"checkpoint": tmp_path / "ck", "checkpoint_seconds": 0, "run": "mine"}
        return train(net(), kind(target), epochs, **saved, **more)

    history = go().history
    assert go().history == history
    begin, end = "checkpoint = 'ck': of another method, recipe or seed; ", "this run again"
    for other in ({"epochs": 4}, {"epochs": 1}, {"target": 0.4}, {"seed": 3}):
        says(lambda more=other: go(**more), begin, end)


def test_the_history_of_a_low_rank_net_says_how_much_of_the_rank_is_left():
    method = ps.PlainLowRank(0.6, "rank", factorise="*", fine_tune=0.5)
    result = train(net(), method, 4)
    full = {"0": 6, "2": 32, "4": 4}
    left = sum((method.ranks or {}).get(name, n) for name, n in full.items()) / sum(full.values())
    assert [row["kept"] for row in result.history] == pytest.approx([1.0, left, left, left])
    assert left < 1


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_files_and_reports_of_nets_without_numbers(tmp_path):
    empty = nn.Linear(4, 0)
    ps.save(empty, tmp_path / "z")
    assert ps.load(tmp_path / "z", empty).weight.shape == (0, 4)
    says(lambda: ps.save(net(), "a\ud800"), "path = ", "the path of a file, as text or a Path")
    norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6))
    assert "dense" in train(norm, ps.Method(), loss=lambda o, y: o.sum()).report()
