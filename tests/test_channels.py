"""Channels numbered over the whole net: what they cost, which may go, controls that rank them."""

import copy
import math

import pytest
import torch
from conftest import BatchNormNet, one_line, randomise, refused, toy_batches
from torch import nn
from torch.nn.utils import parametrize

import prunestudy as ps
from prunestudy import measure, methods, models
from prunestudy.methods import Context
from prunestudy.methods.channel_controls import GroupL2, L1Filter, importance, scale_sizes
from prunestudy.methods.channels import Channels, become
from prunestudy.train import Recipe, prune


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
    "resnet8": (lambda: models.resnet(8, (1, 8, 8), 10), 8),
    "batch_norm": (BatchNormNet, 8),
    "depthwise": (DepthwiseNet, 8),
}
ONE_SHOT = ["l1_filter", "group_l2", "random", "taylor_channels"]
STRUCTURED = ["gdp", "hard_concrete", "network_slimming", *ONE_SHOT]


def net_of(name):
    torch.manual_seed(0)
    return NETS[name][0]()


def example_of(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    side = NETS[name][1]
    return torch.randn(2, 1, side, side, generator=generator, dtype=torch.float64).to(dtype)


def channels_of(name, kind="macs", only=()):
    return Channels(net_of(name), example_of(name), kind, only)


def context_of(example, seed=0):
    """A context with two batches of noise, like `example`, for training and validation."""
    generator = torch.Generator().manual_seed(7)
    shape = (4, *example.shape[1:])
    x = [torch.randn(shape, generator=generator, dtype=example.dtype) for _ in range(2)]
    batches = [(each, torch.arange(4) % 2) for each in x]
    context = Context((example,), lambda output, _, y: nn.functional.cross_entropy(output, y))
    context.train = context.validation = lambda epoch=0: iter(batches)
    context.generator = torch.Generator().manual_seed(seed)
    return context


def count(model, kind, example):
    return measure.macs(model, example) if kind == "macs" else measure.parameters(model)


def halves(channels, seed=0):
    """Open channels: each with probability one half, but what must stay stays."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(channels.size, generator=generator)
    closing = order[torch.rand(channels.size, generator=generator) < 0.5]
    return channels.close(closing, torch.ones(channels.size, dtype=torch.bool), 1.0)


# --- what channels cost


def test_bilinear_cost_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    macs = Channels(net, torch.zeros(2, 1, 2, 2), "macs")
    assert [g.name for g in macs.groups] == ["1"]
    g = torch.tensor([0.5, 1.0, 0.0])
    assert (macs.dense, float(macs.cost(g))) == (18.0, 4 * 1.5 + 1.5 * 2)
    assert macs.shares(g).tolist() == pytest.approx([6 / 18] * 3)
    assert macs.removed(g > 0) == pytest.approx(1 / 3)
    parameters = Channels(net, torch.zeros(2, 1, 2, 2), "parameters")
    # 4 weights, a bias and 2 weights of the next layer each; 2 biases of the output stay
    assert (parameters.dense, float(parameters.cost(g))) == (23.0, 7 * 1.5 + 2)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_closed_form_is_what_is_counted_on_the_smaller_net(name, kind):
    net, example = net_of(name), example_of(name)
    channels = Channels(net, example, kind)
    assert channels.dense == count(net, kind, example)
    for seed in range(2):
        open_ = halves(channels, seed)
        assert not open_.all()
        small = channels.smaller(net, open_)
        assert float(channels.cost(open_)) == count(small, kind, example)
        each = [channels.kept(open_)[group.name] for group in channels.groups]
        assert channels.cost_at(each) == pytest.approx(float(channels.cost(open_)), rel=1e-12)
    g = torch.rand(channels.size, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (by_autograd,) = torch.autograd.grad(channels.cost(g), g)
    torch.testing.assert_close(channels.shares(g.detach()).float(), by_autograd / channels.dense)


# --- which may go


STAYS = {
    "lenet5": {"conv1": 1, "conv2": 1, "fc1": 1},
    # the streams stay, blocks may go
    "resnet8": {"conv1": 1, "stage2.0.conv2": 1, "stage3.0.conv2": 1},
    # of two branches one must stay
    "depthwise": {"beside": 1},
}


class Words(nn.Module):
    """An embedding and a recurrent layer, which stay as they are, before two linear layers."""

    def __init__(self):
        super().__init__()
        self.words, self.state = nn.Embedding(50, 8), nn.GRU(8, 6, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.fc2(self.fc1(self.state(self.words(x))[0][:, -1]).relu())


@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_what_is_in_no_group_counts_in_the_whole(kind):
    """Parameters: 400 + 288 of embedding and GRU; 7 inputs of 6 * 3 * (8 + 6) MACs each."""
    net, x = Words(), torch.randint(50, (2, 7))
    channels = Channels(net, x, kind)
    assert channels.dense == (400 + 288 + 140 + 63 if kind == "parameters" else 1764 + 120 + 60)
    open_ = torch.arange(20) < 5
    counted = measure.macs if kind == "macs" else lambda net, _: measure.parameters(net)
    left = counted(channels.smaller(net, open_), x)
    assert channels.removed(open_) == pytest.approx(1 - left / channels.dense, abs=1e-12)
    with pytest.raises(ps.InputError) as caught:
        ps.shrink_to(net, 0.5, x, of=kind)
    most = 1 - (left - 4 * (9 if kind == "macs" else 10)) / channels.dense
    assert one_line(caught) == f"target = 0.5: at most {most:.4f} can go by this rule"


@pytest.mark.parametrize("name", STAYS)
def test_one_channel_stays_where_no_skip_carries_the_signal(name):
    channels = channels_of(name)
    everything = torch.ones(channels.size, dtype=torch.bool)
    left = channels.close(torch.arange(channels.size), everything, 1.0)
    assert {group: count for group, count in channels.kept(left).items() if count} == STAYS[name]
    assert everything.all()
    assert channels.most_removable() == channels.removed(left)


def test_an_emptied_branch_closes_what_only_it_consumes():
    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(4))
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.fc((x + self.c(self.b(self.a(x).relu()).relu())).mean((2, 3)))

    channels = Channels(Bottleneck(), torch.zeros(2, 4, 2, 2), "macs")
    assert [g.name for g in channels.groups] == ["stem", "a", "b"]
    for closing in (range(4, 8), range(8, 12)):
        open_ = torch.ones(12, dtype=torch.bool)
        left = channels.close(torch.tensor(list(closing)), open_, 1.0)
        assert channels.kept(left) == {"stem": 4, "a": 0, "b": 0}


@pytest.mark.parametrize("target", [0.01, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("name", NETS)
def test_closing_stops_at_the_channel_that_meets_the_target(name, target):
    channels = channels_of(name)
    target *= channels.most_removable()
    everything = torch.ones(channels.size, dtype=torch.bool)
    order = torch.randperm(channels.size, generator=torch.Generator().manual_seed(3))
    left = channels.close(order, everything, target)
    removed = channels.removed(left)
    assert removed >= target
    last = order[~left[order]][-1]
    assert removed - float(channels.shares(left.double())[last]) < target


def test_groups_that_do_not_exist_and_nets_that_cannot_be_traced_are_refused():
    with pytest.raises(ps.InputError) as caught:
        channels_of("lenet5", only=["conv1", "conv7"])
    assert one_line(caught) == "group = 'conv7': allowed are conv1, conv2, fc1"
    only = channels_of("lenet5", only=["conv2"])
    assert (only.size, only.dense) == (50, count(net_of("lenet5"), "macs", example_of("lenet5")))

    class Sorting(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x.flatten(1)).sort(1).values)

    net, x = Sorting(nn.Linear(64, 8), nn.Linear(8, 10)), torch.zeros(2, 1, 8, 8)
    refused(lambda: Channels(net, x, "macs"), "with fewer channels of '0'")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    refused(lambda: Channels(net, x, "macs"), "has no channels that could go")


class Upsampled(nn.Module):
    """What `up` says becomes pixels, four channels to one: torch-pruning does not follow."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 6, 2, stride=2), nn.Conv2d(6, 8, 1)
        self.last, self.fc = nn.Conv2d(2, 5, 3), nn.Linear(5, 10)

    def forward(self, x):
        x = nn.functional.pixel_shuffle(self.up(self.down(x).relu()), 2)
        return self.fc(self.last(x).relu().mean((2, 3)))


@pytest.mark.parametrize("name", [*STRUCTURED, "component_aware", "uniform"])
def test_layers_may_be_left_whole_where_they_cannot_be_pruned(name):
    torch.manual_seed(0)
    net, made = Upsampled(), methods.method_class(name)

    def fit(**leave):
        method = made(0.3, "parameters", **leave)
        return prune(net, method, toy_batches(), Recipe(epochs=1, lr=0.01))

    if name == "network_slimming":
        net.last = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5))
    refused(fit, "cannot be pruned: ", "`leave` can exclude layers from pruning")
    refused(lambda: fit(leave="u* nope"), "leave = 'nope': no such layer among down, ", "up")
    small = fit(leave="up").model
    assert (small.up.out_channels, small.up.in_channels) == (8, small.down.out_channels)
    assert small.down.out_channels + small.fc.in_features < 6 + 5


def test_the_halves_of_a_gated_linear_unit_are_ranked_together():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 3))
    net[0].weight.data[[2, 6]] /= 100
    for by in ("l1_filter", "group_l2"):
        small = ps.shrink_to(net, 0.2, torch.randn(2, 6), of="parameters", by=by)
        assert (small[0].weight == net[0].weight[[0, 1, 3, 4, 5, 7]]).all()
        assert (small[2].weight == net[2].weight[:, [0, 1, 3]]).all()


def test_what_stays_whole_needs_no_proof():
    """Neither for single channels by name, nor in one line."""
    net, x = Upsampled(), torch.randn(2, 1, 8, 8)
    assert ps.remove(net, {"last": [0, 3]}, x).fc.in_features == 2
    refused(lambda: ps.remove(net, {"up": [0, 1, 2, 3, 4]}, x), "cannot be pruned: ")
    small = ps.shrink_to(net, 0.2, x, leave="up")
    assert small.up.out_channels == 8 and small.last.out_channels < 5


# --- rankings


class Steps(nn.Module):
    """A convolutional LSTM."""

    def __init__(self):
        super().__init__()
        self.gates, self.out = nn.Conv2d(6, 16, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 4, 8, 8)
        for each in x.unbind(1):
            i, f, o, g = self.gates(torch.cat([each, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h.mean((2, 3)))


def test_a_convolution_of_inputs_and_its_own_state_is_refused():
    line = "module = 'gates': cannot be pruned: it does not work on fewer channels of 'gates'"
    refused(lambda: ps.shrink_to(Steps(), 0.1, torch.randn(2, 3, 2, 8, 8)), line)


def two_layers():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[1].weight.data = torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]])
    net[2].weight.data = torch.tensor([1.0, -2.0, 0.0])
    net[3].weight.data = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 3.0, 0.0]])
    return net


def test_importance_by_hand():
    net = two_layers()
    channels = Channels(net, torch.zeros(2, 1, 1, 2), "macs")
    first = torch.tensor([3.0, 0.5, 4.0])
    found = importance(channels, net, L1Filter.measure)
    torch.testing.assert_close(found, first / first.mean())
    # squares of the linear layer's rows, the scales, the next layer's columns
    squares = torch.tensor([5.0 + 1 + 2, 0.25 + 4 + 9, 10.0 + 0 + 4]) / 3
    found = importance(channels, net, GroupL2.measure)
    torch.testing.assert_close(found, squares / squares.mean())
    assert scale_sizes(channels, net).tolist() == [1.0, 2.0, 0.0]
    # channels without batch norm are not slimmed
    sizes = scale_sizes(channels_of("depthwise"), net_of("depthwise"))
    assert sizes.isfinite().tolist() == [True] * 6 + [False] * 7


def test_importance_of_grouped_convolutions_by_hand():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 1), nn.ConvTranspose2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1)
    )
    channels = Channels(net, torch.zeros(2, 1, 4, 4), "macs")
    first, second, third = (layer.weight.detach() for layer in net)

    def even(score):
        return score / score.mean()

    # a channel is at one place of each group; those of the first group are two, of the second three
    squares = even(first.square().sum((1, 2, 3)) + second.square().sum((1, 2, 3)))
    filters = second.square().unflatten(0, (4, 2)).sum((1, 3, 4)).flatten()
    both = even(filters + third.square().sum((0, 2, 3)))
    expected = torch.cat([squares.view(4, 2).mean(0), both.view(4, 3).mean(0)])
    found = importance(channels, net, GroupL2.measure)
    torch.testing.assert_close(found, expected)
    sums = even(second.abs().sum((0, 2, 3)))
    torch.testing.assert_close(importance(channels, net, L1Filter.measure)[2:], sums)


@pytest.mark.parametrize("name", ["l1_filter", "group_l2", "taylor_channels"])
def test_rankings_take_channel_multipliers_other_precisions_and_no_grad(name):
    layers = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 2, 1), nn.Flatten()
    net, x = nn.Sequential(*layers, nn.Linear(8, 2)), torch.randn(2, 1, 4, 4)
    method, context = methods.build(name, {}, 0.3), context_of(x)
    context.example = (x.double(),)
    with torch.set_grad_enabled(name == "taylor_channels"):
        method.attach(net, context)
    assert method.report()["target_met"]
    assert net[1].out_channels == 8


def test_taylor_by_hand():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    net[1].weight.data = torch.tensor([[2.0, 1.0]])
    context = Context((torch.zeros(2, 2),), lambda output, _, y: (output * y).sum())
    context.train = lambda epoch: iter([(torch.tensor([[1.0, 1.0]]), 1.0)] * 3)
    method = methods.build("taylor_channels", {"batches": 2}, 0.4)
    method.channels = Channels(net, torch.zeros(2, 2), "macs")
    # two batches, y = w2 (W1 x): both slices of a channel have |sum w dL/dw| = 2 |its part of y|
    expected = torch.tensor([2 * 3.0, 2.0])
    found = method.scores(net, context)
    torch.testing.assert_close(found, expected / expected.mean())
    method.attach(net, context)
    assert net[0].weight.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("name", "kept"), [("l1_filter", [0, 2]), ("group_l2", [1, 2]), ("network_slimming", [0, 1])]
)
def test_the_lowest_of_the_ranking_goes(name, kept):
    net = two_layers()
    net[3].bias.requires_grad_(False)
    weight = net[1].weight.detach()[kept].clone()
    method, loss = methods.build(name, {}, 0.3, "macs"), torch.tensor(0.0)
    method.attach(net, context_of(torch.zeros(2, 1, 1, 2)))
    if name == "network_slimming":
        assert method.log() == {"kept": 1.0, "scale": 1.0}
        for step in (4, 5, 6):
            assert net[1].out_features == 3
            method.update(method.at(step, 12, loss))
        method.update(method.at(12, 12, loss))
    assert torch.equal(net[1].weight, weight)
    assert [p.requires_grad for p in net.parameters()] == [True] * 5 + [False]
    assert (net[2].num_features, net[3].in_features) == (2, 2)
    assert method.log()["kept"] == pytest.approx(2 / 3)
    expected = {"target_met": 1.0, "removed": pytest.approx(1 / 3), "channels": {"1": 2}}
    assert method.report() == expected


def test_slimming_adds_the_sign_of_the_scales_and_refuses_nets_without():
    net = two_layers()
    method = methods.build("network_slimming", {"strength": 0.25}, 0.3, "macs")
    method.attach(net, context_of(torch.zeros(2, 1, 1, 2)))
    net[2].weight.grad = torch.tensor([1.0, 1.0, 1.0])
    for step in (1, 12):  # of fine-tuning, nothing is added
        method.after_backward(method.at(step, 12, torch.tensor(0.0)))
        assert net[2].weight.grad.tolist() == [1.25, 0.75, 1.0]
    why = "model = 'Sequential': network_slimming needs a net with batch norm"
    refused(lambda: method.check(net_of("lenet5")), why)
    refused(lambda: method.attach(net_of("lenet5"), None), why)


def test_random_serves_weights_and_channels():
    shapes = {}
    for kind in ("sparsity", "macs", "parameters"):
        made = fit("random", net_of("mlp"), kind=kind)
        shapes[kind] = sorted(tuple(p.shape) for p in made.model.parameters())
        if kind == "sparsity":
            weights = [m.weight for m in made.model.modules() if isinstance(m, nn.Linear)]
            total = sum(w.numel() for w in weights)
            assert sum(int(w.count_nonzero()) for w in weights) == round(0.4 * total)
            assert made.history[-1]["kept"] == pytest.approx(0.4, abs=1e-5)
            assert made.method.report() == {}
    full = sorted(tuple(p.shape) for p in net_of("mlp").parameters())
    assert shapes["sparsity"] == full
    assert shapes["macs"] != full != shapes["parameters"]


def test_random_masks_follow_the_seed_and_not_the_weights():
    def mask(seed, weights):
        net = nn.Sequential(nn.Linear(100, 1, bias=False))
        net[0].weight.data = torch.tensor([weights])
        method = methods.build("random", {}, 0.7)
        method.attach(net, context_of(torch.zeros(2, 100), seed))
        return (net[0].weight != 0).flatten().tolist()

    up, down = [1.0 + i for i in range(100)], [100.0 - i for i in range(100)]
    assert mask(1, up) == mask(1, down)
    assert mask(1, up) != mask(2, up)
    assert sum(mask(2, up)) == 30


def test_a_scope_is_of_weights_and_weights_must_be_there():
    with pytest.raises(ps.InputError) as caught:
        methods.build("random", {"scope": "convolutions"}, 0.5, "macs")
    assert one_line(caught) == "scope = 'convolutions': all, where channels are removed"
    method = methods.build("random", {}, 0.5)
    refused(lambda: method.check(nn.Flatten()), "has no convolution or linear layer")
    refused(lambda: method.check(nn.Linear(1, 1)), "target = 0.5: cuts none of 1 weights")


def test_become_keeps_the_object_its_mode_layout_and_what_is_trained():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3)).to(
        memory_format=torch.channels_last
    )
    net[1].bias.requires_grad_(False)
    small = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 3, 3)).eval().requires_grad_(False)
    inner = small[0]
    become(net.train(), small)
    assert net[0] is inner
    assert net[0].training
    assert [p.requires_grad for p in net.parameters()] == [True, True, True, False]
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last)


# --- in training


def fit(name, net, target=0.6, kind="macs", params=None, epochs=2, seed=3, **options):
    side = options.pop("side", 8)
    method = methods.build(name, params or {}, target, kind)
    batches = options.pop("batches", None) or toy_batches(side=side)
    recipe = Recipe(epochs=epochs, lr=0.02, period=options.pop("period", 1))
    options = {"validation": toy_batches(side=side, seed=9), "seed": seed} | options
    return prune(net, method, batches, recipe, probe=methods.probe_of(name), **options)


@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("net", ["mlp", "resnet8", "batch_norm"])
@pytest.mark.parametrize("name", STRUCTURED)
def test_the_target_is_met_to_a_channel(name, net, kind):
    if name == "network_slimming" and net == "mlp":
        pytest.skip("has no batch norm")
    dense, example = net_of(net), example_of(net)
    channels = Channels(dense, example, kind)
    largest = float(channels.shares(torch.ones(channels.size)).max())
    made = fit(name, net_of(net), kind=kind)
    assert made.status == "done"
    removed = 1 - count(made.model, kind, example) / count(dense, kind, example)
    assert 0.6 <= removed < 0.6 + largest
    found = made.method.report()
    assert found["target_met"] == 1.0
    assert found["removed"] == pytest.approx(removed, abs=1e-12)
    assert made.history[-1]["kept"] == pytest.approx(1 - removed, abs=1e-12)


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("net", ["mlp", "resnet8", "batch_norm", "depthwise"])
def test_the_finished_net_is_the_net_that_trained(name, net, dtype, tolerance):
    if name == "network_slimming" and net == "mlp":
        pytest.skip("has no batch norm")
    model, example = randomise(net_of(net).to(dtype)), example_of(net, dtype)
    dense, method = copy.deepcopy(model).eval(), methods.build(name, {}, 0.5, "macs")
    context = context_of(example)
    method.attach(model, context)
    if name == "gdp":
        # Random gates of either sign, about half of them closed.
        t = torch.randn(method.channels.size, generator=torch.Generator().manual_seed(1))
        method.gates.t.data = t.to(dtype) * halves(method.channels)
        method.frozen.fill_(True)
    if name in ("hard_concrete", "network_slimming"):
        method.update(method.at(6, 12, torch.tensor(0.0)))
    small = method.finish(model, context)
    x = torch.cat([each for each, _ in context.validation()])
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
    found = made.method.report()
    assert found["target_met"] == 0.0
    # one unit in each hidden layer is left: 64 + 1 + 1 + 10 of 197,888
    assert found["removed"] == pytest.approx(1 - 76 / 197_888)
    assert set(found["channels"].values()) == {1}
    assert math.isfinite(made.history[-1]["validation_loss"])
