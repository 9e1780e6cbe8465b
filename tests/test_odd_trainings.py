"""Losses, nets and contexts out of the ordinary: a right result, or one line that says why not."""

import copy
import pickle
import random
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import one_line
from torch import nn
from torch.utils.checkpoint import checkpoint

import prunestudy as ps
from prunestudy.errors import InputError
from prunestudy.shrink import require_ordinary
from prunestudy.train.score import top1

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


class Placed(nn.Module):
    """Adds a buffer of five dimensions to images."""

    def __init__(self):
        super().__init__()
        self.a, self.c, self.o = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        self.register_buffer("place", torch.zeros(1, 2, 1, 8, 8))

    def forward(self, x):
        return self.o(F.relu(self.c(F.relu(self.a(x + self.place.mean(1))))).mean((2, 3)))


IMAGES = [(torch.randn(8, 1, 8, 8), torch.arange(8) % 4)] * 2


@pytest.mark.parametrize("method", [ps.GDP(0.3), ps.SparseGates(0.5)], ids=lambda m: m.name)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tensors_of_five_dimensions_beside_kernels_of_four(method, layout):
    model = Placed()
    model.a.to(memory_format=layout)
    assert train(model, copy.deepcopy(method), data=IMAGES).status == "done"


@pytest.mark.parametrize("method", [ps.GDP(0.3), ps.SparseGates(0.5)], ids=lambda m: m.name)
def test_frozen_parameters_stay_as_they_are_and_frozen(method):
    model = Placed()
    model.o.requires_grad_(False)
    small = train(model, copy.deepcopy(method), data=IMAGES).model
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {"o.weight", "o.bias"}
    assert torch.equal(small.o.bias, model.o.bias)


class Changed(nn.Module):
    """Does something with its input, and with its output."""

    def __init__(self, before, after=F.relu):
        super().__init__()
        self.before, self.after = before, after
        self.net = net()

    def forward(self, x):
        return self.after(self.net(self.before(x)))


MASKED = [ps.Method, ps.SparseGates, ps.MagnitudeAttention, ps.GradualMagnitude, ps.L1]


def method_of(kind):
    return kind(0.5) if kind.counts else kind()


@pytest.mark.parametrize("kind", MASKED, ids=lambda kind: kind.name)
def test_what_cannot_be_folded_is_refused_before_any_training(kind):
    calls = []

    def loss(output, y):
        calls.append(output)
        return getattr(output, "logits", output).sum()

    for model, line in (
        (Changed(F.relu, lambda y: SimpleNamespace(logits=y)), "its output must be a"),
        (Changed(lambda x: x + random.random()), "cannot be folded: its output differs from call"),
    ):
        calls.clear()
        says(lambda m=model: train(m, method_of(kind), loss=loss), f"model = 'Changed': {line}")
        assert len(calls) == 1  # which finds out whether it is a loss


@pytest.mark.parametrize("kind", MASKED, ids=lambda kind: kind.name)
def test_a_net_that_takes_no_random_inputs_is_folded_on_the_example(kind):
    def roots(x):
        assert (x > 5).all()
        return x - 5

    high = [(x.abs() + 6, y) for x, y in DATA]
    assert train(Changed(roots), method_of(kind), data=high).status == "done"
    if kind.counts:
        ps.shrink_to(Changed(roots), 0.5, high[0][0], of="sparsity", by="magnitude")


class Late(nn.Module):
    """Makes its second layer in the first forward pass."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), None

    def forward(self, x):
        self.b = self.b or nn.Linear(8, 4)
        return self.b(F.relu(self.a(x)))


def test_layers_that_the_first_pass_makes_are_asked_for():
    line = "module = 'b': is made in the first forward pass"
    says(lambda: train(Late(), ps.SparseGates(0.5)), line)
    says(lambda: ps.shrink_to(Late(), 0.5, X, of="sparsity", by="magnitude"), line)
    model = Late()
    model(X)
    assert "b.weight" in train(model, ps.SparseGates(0.5)).report()


class Mixes(nn.Module):
    """Multiplies its input by a sparse buffer."""

    def __init__(self):
        super().__init__()
        self.net = net()
        self.register_buffer("mix", torch.eye(6).roll(1, 0).to_sparse())

    def forward(self, x):
        return self.net(torch.sparse.mm(self.mix, x.t()).t())


def test_products_that_have_no_formula_leave_the_rest_of_the_report():
    unknown = "model = 'Mixes': MACs of aten._sparse_addmm are unknown"
    report = train(Mixes(), ps.SparseGates(0.5), validation=DATA).report()
    assert f"MACs: not counted: {unknown}" in report
    assert "nonzero parameters" in report
    assert "validation loss" in report
    says(lambda: train(Mixes(), ps.GDP(0.3)), unknown)


class Couples(nn.Module):
    """A step of a flow: half of the input changes by what a net says of the other."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 6))

    def forward(self, x):
        for _ in range(2):
            a, b = x.chunk(2, 1)
            scale, shift = self.net(a).chunk(2, 1)
            x = torch.cat([b * scale.exp() + shift, a], 1)
        return x


def test_joined_parts_of_an_input_are_refused_in_plain_words():
    begin = "module = 'the net itself': cannot be traced: joins parts of its input"
    says(lambda: ps.groups(Couples(), X), begin)


# --- labels and batches


def test_labels_that_the_loss_ignores_are_not_scored():
    y = torch.tensor([0, 1, -100, -100])
    output = torch.eye(4)[[0, 2, 1, 1]]
    assert top1(nn.Identity(), [(output, y)]) == {"top1": 0.5}
    y = torch.tensor([0, 156, 1, 1], dtype=torch.uint8)
    assert top1(nn.Identity(), [(output, y)]) == {"top1": 0.75}


class Feed:
    """Batches by `make`, called at each pass, with attributes of a user's own."""

    epoch, ordered = 0, True

    def __init__(self, make, length):
        self.make, self.length = make, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(self.make())


def test_as_many_batches_are_read_as_the_length_says():
    endless, plain = Feed(lambda: cycle(DATA), 3), Feed(lambda: DATA, 3)
    expected = train(net(), ps.Method(), 2, validation=DATA).history
    for feed in (endless, plain):
        assert train(net(), ps.Method(), 2, feed, validation=feed).history == expected
    once = iter(DATA * 10)
    line = "validation = 'Feed': ends after 29 batches, its length is 30"
    says(lambda: train(net(), ps.Method(), validation=Feed(lambda: once, 30)), line)


@pytest.mark.parametrize("kind", [ps.GDP, ps.Force, ps.SparseGates], ids=lambda kind: kind.name)
def test_methods_can_be_pickled(kind):
    again = pickle.loads(pickle.dumps(kind(0.5)))
    assert type(again) is kind
    assert again.settings == kind(0.5).settings


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
