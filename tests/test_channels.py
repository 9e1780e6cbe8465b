"""Channels numbered over the whole net: what they cost, who may go, and rankings of them."""

import copy
import math

import pytest
import torch
from conftest import BatchNormNet, one_line, randomise, toy_batches
from torch import nn
from torch.nn.utils import parametrize

from prunestudy import measure, methods, models
from prunestudy.errors import InputError
from prunestudy.measure import Task
from prunestudy.methods.base import Context
from prunestudy.methods.channel_ranking import importance
from prunestudy.methods.channels import Channels, become
from prunestudy.methods.network_slimming import scale_sizes
from prunestudy.methods.scratch import reinitialise
from prunestudy.train import Recipe, train


class DepthwiseNet(nn.Module):
    """A regular, a depth-wise and a regular convolution, a concatenation and a linear layer."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.project = nn.Conv2d(6, 4, 1)
        self.beside = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.fc = nn.Linear(7, 10)

    def forward(self, x):
        y = self.project(self.depth(self.norm(self.expand(x)).relu()).relu())
        both = torch.cat([y, self.beside(x)], 1).relu()
        return self.fc(both.mean((2, 3)))


NETS = {
    "lenet5": (lambda: models.build("lenet5", (1, 16, 16), 10), 16),
    "mlp": (lambda: models.build("mlp", (1, 8, 8), 10), 8),
    "resnet8": (lambda: models.ResNet(8, (1, 8, 8), 10), 8),
    "batch_norm": (BatchNormNet, 8),
    "depthwise": (DepthwiseNet, 8),
}
STRUCTURED = ["gdp", "hard_concrete", "l1_filter", "group_l2", "random", "network_slimming"]


def net_of(name):
    torch.manual_seed(0)
    return NETS[name][0]()


def shape_of(name):
    return (1, NETS[name][1], NETS[name][1])


class Images:
    """Batches in the precision of the net."""

    def __init__(self, side=8, dtype=torch.float32):
        self.inner, self.dtype = toy_batches(side=side), dtype
        self.info = self.inner.info

    def ordered(self, size):
        for x, y in self.inner.ordered(size):
            yield x.to(self.dtype), y


def context_of(name="mlp", dtype=torch.float32):
    images = Images(NETS[name][1], dtype)
    return Context(images, images, Task(), torch.device("cpu"))


def halves(channels, seed=0):
    """Open channels: each with probability one half, but what must stay stays."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(channels.size, generator=generator)
    closing = order[torch.rand(channels.size, generator=generator) < 0.5]
    return channels.close(closing, torch.ones(channels.size, dtype=torch.bool), 1.0)


# --- what channels cost


def test_bilinear_cost_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    macs = Channels(net, (1, 2, 2), "macs")
    assert [g.name for g in macs.groups] == ["1"]
    g = torch.tensor([0.5, 1.0, 0.0])
    assert (macs.dense, float(macs.cost(g))) == (18.0, 4 * 1.5 + 1.5 * 2)
    assert macs.shares(g).tolist() == pytest.approx([6 / 18] * 3)
    assert macs.removed(g > 0) == pytest.approx(1 / 3)
    parameters = Channels(net, (1, 2, 2), "parameters")
    # 4 weights, a bias and 2 weights of the next layer each; 2 biases of the output stay
    assert (parameters.dense, float(parameters.cost(g))) == (23.0, 7 * 1.5 + 2)


def test_a_share_depends_on_the_neighbours():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2))
    channels = Channels(net, (4,), "macs")
    g = torch.tensor([1.0, 0.5, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
    # MACs(g) = 4 a + a b + 2 b with a = 2, b = 2.5
    assert float(channels.cost(g)) == 8 + 5 + 5
    assert channels.shares(g).tolist() == pytest.approx([6.5 / 37] * 3 + [4 / 37] * 5)


def test_costs_of_lenet5():
    channels = Channels(models.build("lenet5", (1, 28, 28), 10), (1, 28, 28), "macs")
    share = channels.shares(torch.ones(570)) * 2_293_000
    assert channels.dense == 2_293_000
    # conv1: 24*24*25 of its own, 8*8*25*50 in conv2; conv2: 8*8*25*20, 16*500; fc1: 800, 10
    expected = [14_400 + 80_000] * 20 + [32_000 + 8_000] * 50 + [810] * 500
    assert share.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_closed_form_is_what_is_counted_on_the_smaller_net(name, kind):
    net, shape = net_of(name), shape_of(name)

    def count(model):
        return measure.macs(model, shape) if kind == "macs" else measure.parameters(model)

    channels = Channels(net, shape, kind)
    assert channels.dense == count(net)
    for seed in range(2):
        open_ = halves(channels, seed)
        assert not open_.all()
        small = channels.smaller(net, open_)
        assert float(channels.cost(open_)) == count(small)


@pytest.mark.parametrize("name", NETS)
def test_shares_are_the_derivative_of_the_cost(name):
    channels = Channels(net_of(name), shape_of(name), "macs")
    generator = torch.Generator().manual_seed(0)
    g = torch.rand(channels.size, generator=generator).double().requires_grad_(True)
    (by_autograd,) = torch.autograd.grad(channels.cost(g), g)
    torch.testing.assert_close(channels.shares(g.detach()), by_autograd / channels.dense)


# --- which may go


def test_one_channel_stays_where_no_skip_carries_the_signal():
    channels = Channels(net_of("lenet5"), shape_of("lenet5"), "macs")
    everything = torch.ones(channels.size, dtype=torch.bool)
    left = channels.close(torch.arange(channels.size), everything, 1.0)
    assert channels.kept(left) == {"conv1": 1, "conv2": 1, "fc1": 1}
    assert everything.all()
    assert channels.most_removable() == channels.removed(left)


def test_blocks_may_go_but_streams_may_not():
    channels = Channels(net_of("resnet8"), shape_of("resnet8"), "macs")
    everything = torch.ones(channels.size, dtype=torch.bool)
    kept = channels.kept(channels.close(torch.arange(channels.size), everything, 1.0))
    streams = {"conv1", "stage2.0.conv2", "stage3.0.conv2"}
    assert {name: count for name, count in kept.items() if count} == dict.fromkeys(streams, 1)


def test_of_two_branches_one_must_stay():
    channels = Channels(net_of("depthwise"), shape_of("depthwise"), "macs")
    everything = torch.ones(channels.size, dtype=torch.bool)
    assert [g.skippable for g in channels.groups] == [True, True, True]
    kept = channels.kept(channels.close(torch.arange(channels.size), everything, 1.0))
    assert kept == {"expand": 0, "project": 0, "beside": 1}


def test_a_silent_branch_closes_what_only_it_hears():
    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(4))
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.fc((x + self.c(self.b(self.a(x).relu()).relu())).mean((2, 3)))

    channels = Channels(Bottleneck(), (4, 2, 2), "macs")
    assert [g.name for g in channels.groups] == ["stem", "a", "b"]
    for closing in (range(4, 8), range(8, 12)):
        open_ = torch.ones(12, dtype=torch.bool)
        left = channels.close(torch.tensor(list(closing)), open_, 1.0)
        assert channels.kept(left) == {"stem": 4, "a": 0, "b": 0}


@pytest.mark.parametrize("target", [0.01, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("name", NETS)
def test_closing_stops_at_the_channel_that_meets_the_target(name, target):
    channels = Channels(net_of(name), shape_of(name), "macs")
    target *= channels.most_removable()
    everything = torch.ones(channels.size, dtype=torch.bool)
    order = torch.randperm(channels.size, generator=torch.Generator().manual_seed(3))
    left = channels.close(order, everything, target)
    removed = channels.removed(left)
    assert removed >= target
    last = order[~left[order]][-1]
    assert removed - float(channels.shares(left.double())[last]) < target


def test_groups_that_do_not_exist_and_nets_that_cannot_be_traced_are_refused():
    with pytest.raises(InputError) as caught:
        Channels(net_of("lenet5"), shape_of("lenet5"), "macs", ["conv1", "conv7"])
    assert one_line(caught) == "group = 'conv7': allowed are conv1, conv2, fc1"
    only = Channels(net_of("lenet5"), shape_of("lenet5"), "macs", ["conv2"])
    assert (only.size, only.dense) == (50, measure.macs(net_of("lenet5"), shape_of("lenet5")))

    class Sorting(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x.flatten(1)).sort(1).values)

    with pytest.raises(InputError) as caught:
        Channels(Sorting(nn.Linear(64, 8), nn.Linear(8, 10)), (1, 8, 8), "macs")
    assert "with fewer channels of '0'" in one_line(caught)
    with pytest.raises(InputError, match="has no channels that could go"):
        Channels(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (1, 8, 8), "macs")


# --- rankings


def two_layers():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[1].weight.data = torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]])
    net[2].weight.data = torch.tensor([1.0, -2.0, 0.0])
    net[3].weight.data = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 3.0, 0.0]])
    return net


def test_importance_by_hand():
    net = two_layers()
    channels = Channels(net, (1, 1, 2), "macs")
    l1, l2 = (methods.method_class(name).measure for name in ("l1_filter", "group_l2"))
    first = torch.tensor([3.0, 0.5, 4.0])
    torch.testing.assert_close(importance(channels, net, l1), first / first.mean())
    # squares of the linear layer's rows, the scales, the next layer's columns
    squares = torch.tensor([5.0 + 1 + 2, 0.25 + 4 + 9, 10.0 + 0 + 4]) / 3
    torch.testing.assert_close(importance(channels, net, l2), squares / squares.mean())
    assert scale_sizes(channels, net).tolist() == [1.0, 2.0, 0.0]


def test_channels_without_batch_norm_are_not_slimmed():
    net = net_of("depthwise")
    sizes = scale_sizes(Channels(net, (1, 8, 8), "macs"), net)
    assert sizes.isfinite().tolist() == [True] * 6 + [False] * 7


@pytest.mark.parametrize(
    ("name", "kept"), [("l1_filter", [0, 2]), ("group_l2", [1, 2]), ("network_slimming", [0, 1])]
)
def test_the_lowest_of_the_ranking_goes(name, kept):
    net = two_layers()
    weight = net[1].weight.detach()[kept].clone()
    method = methods.build(name, {}, 0.3, "macs")
    method.attach(net, torch.Generator())
    method.shape = (1, 1, 2)
    for phase in method.phases():
        method.start(net, phase.name)
    assert torch.equal(net[1].weight, weight)
    assert net[1].weight.requires_grad
    assert (net[2].num_features, net[3].in_features) == (2, 2)
    assert method.kept_share(net) == pytest.approx(2 / 3)
    assert method.measures(net) == {
        "target_met": 1.0,
        "removed": pytest.approx(1 / 3),
        "channels": {"1": 2},
    }


def test_slimming_adds_the_sign_of_the_scales_and_refuses_nets_without():
    net = two_layers()
    method = methods.build("network_slimming", {"strength": 0.25}, 0.3, "macs")
    net[2].weight.grad = torch.tensor([1.0, 1.0, 1.0])
    method.after_backward(net, methods.Progress("slim", 0, 1, 0, 1))
    assert net[2].weight.grad.tolist() == [1.25, 0.75, 1.0]
    method.after_backward(net, methods.Progress("fine_tune", 0, 1, 0, 1))
    assert net[2].weight.grad.tolist() == [1.25, 0.75, 1.0]
    for refuse in (method.check, lambda net: method.attach(net, torch.Generator())):
        with pytest.raises(InputError) as caught:
            refuse(net_of("lenet5"))
        why = "network_slimming needs a net with batch norm"
        assert one_line(caught) == f"model = 'LeNet5': {why}"


def test_random_serves_weights_and_channels():
    shapes = {}
    for kind in ("sparsity", "macs", "parameters"):
        net = net_of("mlp")
        made = fit("random", net, kind=kind).model
        shapes[kind] = sorted(tuple(p.shape) for p in made.parameters())
        if kind == "sparsity":
            assert measure.removed_share(made, made) == pytest.approx(0.6, abs=1e-4)
    full = sorted(tuple(p.shape) for p in net_of("mlp").parameters())
    assert shapes["sparsity"] == full
    assert shapes["macs"] != full != shapes["parameters"]


def test_a_scope_is_of_weights():
    with pytest.raises(InputError) as caught:
        methods.build("random", {"scope": "convolutions"}, 0.5, "macs")
    assert one_line(caught) == "params.scope = 'convolutions': all, where channels are removed"


def test_become_keeps_the_object():
    net, small = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 1))
    inner = small[0]
    become(net, small.requires_grad_(False))
    assert net[0] is inner
    assert inner.weight.requires_grad


# --- in training


def fit(name, net, target=0.6, kind="macs", params=None, epochs=2, seed=3, **options):
    side = options.pop("side", 8)
    method = methods.build(name, params or {}, target, kind)
    batches = options.pop("batches", None) or toy_batches(side=side)
    recipe = Recipe(epochs=epochs, lr=0.02)
    made = train(net, method, recipe, batches, toy_batches(side=side, seed=9), seed=seed, **options)
    made.method = method
    return made


@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("net", ["mlp", "resnet8", "batch_norm"])
@pytest.mark.parametrize("name", STRUCTURED)
def test_the_target_is_met_to_a_channel(name, net, kind):
    if name == "network_slimming" and net == "mlp":
        pytest.skip("has no batch norm")
    shape, dense = shape_of(net), net_of(net)
    channels = Channels(dense, shape, kind)
    made = fit(name, net_of(net), kind=kind)
    assert made.status == "done"

    def count(model):
        return measure.macs(model, shape) if kind == "macs" else measure.parameters(model)

    removed = 1 - count(made.model) / count(dense)
    largest = float(channels.shares(torch.ones(channels.size)).max())
    assert 0.6 <= removed < 0.6 + largest
    found = made.method.measures(made.model)
    assert found["target_met"] == 1.0
    assert found["removed"] == pytest.approx(removed, abs=1e-12)
    assert made.history[-1]["kept"] == pytest.approx(1 - removed, abs=1e-12)


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("net", ["mlp", "resnet8", "batch_norm", "depthwise"])
def test_the_finished_net_is_the_net_that_trained(name, net, dtype, tolerance):
    if name == "network_slimming" and net == "mlp":
        pytest.skip("has no batch norm")
    model, (side, context) = (
        randomise(net_of(net).to(dtype)),
        (NETS[net][1], context_of(net, dtype)),
    )
    dense, method = copy.deepcopy(model).eval(), methods.build(name, {}, 0.5, "macs")
    method.attach(model, torch.Generator().manual_seed(0))
    method.prepare(model, context)
    for phase in method.phases():
        method.start(model, phase.name)
        if name == "gdp":
            # Random gates of either sign, about half of them closed.
            t = torch.randn(method.channels.size, generator=torch.Generator().manual_seed(1))
            method.gates.t.data = t.to(dtype) * halves(method.channels)
        method.end(model, phase.name)
    small = method.finish(model)
    x = torch.randn(7, 1, side, side, generator=torch.Generator().manual_seed(2), dtype=dtype)
    with torch.no_grad():
        expected, found, before = model.eval()(x), small(x), dense(x)
    scale = expected.abs().max()
    assert (found - expected).abs().max() / scale <= tolerance
    assert (before - expected).abs().max() / scale > 0.01
    assert measure.parameters(small) < measure.parameters(dense)
    assert not any(map(parametrize.is_parametrized, small.modules()))
    assert not small.training


@pytest.mark.parametrize("name", ["random", "gdp"])
def test_an_unreachable_target_is_said_so_in_the_record(name):
    made = fit(name, net_of("mlp"), target=0.9999)
    found = made.method.measures(made.model)
    assert found["target_met"] == 0.0
    # one unit in each hidden layer is left: 64 + 1 + 1 + 10 of 197,888
    assert found["removed"] == pytest.approx(1 - 76 / 197_888)
    assert set(found["channels"].values()) == {1}
    assert math.isfinite(made.history[-1]["validation_loss"])


# --- from scratch


@pytest.mark.parametrize(
    "name", ["lenet5", "lenet300", "mlp", "resnet20", "wrn28_2", "vgg16_cifar"]
)
def test_reinitialised_is_freshly_built(name):
    torch.manual_seed(5)
    fresh = models.build(name, (1, 16, 16), 10)
    model = randomise(models.build(name, (1, 16, 16), 10))
    reinitialise(model, 5)
    for key, value in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_scratch_keeps_the_shape_and_nothing_else():
    parent = fit("group_l2", net_of("mlp")).model
    shapes = [tuple(p.shape) for p in parent.parameters()]
    nets = []
    for seed in (3, 3, 4):
        method = methods.build("scratch", {})
        net = copy.deepcopy(parent).requires_grad_(True)
        method.attach(net, torch.Generator().manual_seed(seed))
        nets.append(net)
    assert [tuple(p.shape) for p in nets[0].parameters()] == shapes
    weights = [net.layers[0].weight for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], parent.layers[0].weight)
    assert methods.method_class("scratch").from_scratch
