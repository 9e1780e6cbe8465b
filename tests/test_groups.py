from types import SimpleNamespace

import pytest
import torch
from conftest import BatchNormNet, one_line, refusal, refused
from matplotlib import pyplot as plt
from torch import nn
from torch.nn.utils import parametrizations

from prunestudy import models, shrink
from prunestudy.errors import InputError
from prunestudy.study.figures.groups import describe, draw


def sides(group, role):
    return [(m.layer, m.axis) for m in group.having(role)]


def only(net, shape=(1, 8, 8)):
    """The single group of a small net."""
    (group,) = shrink.groups(net, torch.zeros(2, *shape))
    return group


class Net(nn.Module):
    """A net of the given layers and the given forward pass of (layers, inputs)."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.way = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *x):
        return self.way(self, *x)


def test_lenet5_is_three_groups_and_flatten_takes_several_inputs():
    found = shrink.groups(models.build("lenet5", (1, 28, 28), 10), torch.zeros(2, *(1, 28, 28)))
    assert [(g.name, g.channels) for g in found] == [("conv1", 20), ("conv2", 50), ("fc1", 500)]
    assert [sides(g, "produces") for g in found] == [
        [(n, "out")] for n in ("conv1", "conv2", "fc1")
    ]
    assert [sides(g, "consumes") for g in found] == [[(n, "in")] for n in ("conv2", "fc1", "fc2")]
    flat = found[1].members[1]
    assert (flat.size, flat.indices[3]) == (800, tuple(range(48, 64)))
    assert not any(g.skippable for g in found)


def test_streams_of_a_resnet():
    found = shrink.groups(models.build("resnet20", (3, 32, 32), 10), torch.zeros(2, *(3, 32, 32)))
    streams = [g for g in found if not g.skippable]
    assert [(g.name, g.channels) for g in streams] == [
        ("conv1", 16),
        ("stage2.0.conv2", 32),
        ("stage3.0.conv2", 64),
    ]
    assert [len(g.having("produces")) for g in streams] == [4, 4, 4]
    last = shrink.find(found, "stage3.0.conv2")
    assert sides(last, "produces")[1] == ("stage3.0.shortcut", "out")
    assert sides(last, "consumes")[-1] == ("fc", "in")
    assert [m.layer for m in shrink.find(found, "stage1.0.conv1").members] == [
        "stage1.0.conv1",
        "stage1.0.bn1",
        "stage1.0.conv2",
    ]
    assert len(found) == 12


def test_concatenation_shifts_the_places():
    net = Net(
        lambda n, x: n.fc(torch.cat([n.a(x), n.b(x)], 1).mean((2, 3))),
        a=nn.Conv2d(1, 2, 3),
        b=nn.Conv2d(1, 3, 3),
        fc=nn.Linear(5, 4),
    )
    a, b = shrink.groups(net, torch.zeros(2, *(1, 8, 8)))
    assert (a.members[1].indices, b.members[1].indices) == (((0,), (1,)), ((2,), (3,), (4,)))
    assert a.members[1].channel_of.tolist() == [0, 1, -1, -1, -1]
    assert b.members[1].spread(torch.tensor([0.0, 2.0, 3.0])).tolist() == [1, 1, 0, 2, 3]
    assert a.skippable
    assert b.skippable


def test_channels_of_one_layer_in_two_groups():
    net = Net(
        lambda n, x: n.fc((torch.cat([n.a(x), n.b(x)], 1) + n.c(x)).mean((2, 3))),
        a=nn.Conv2d(1, 2, 3),
        b=nn.Conv2d(1, 3, 3),
        c=nn.Conv2d(1, 5, 3),
        fc=nn.Linear(5, 4),
    )
    first, second = shrink.groups(net, torch.zeros(2, *(1, 8, 8)))
    assert (first.name, second.name, first.channels, second.channels) == ("a", "b", 2, 3)
    assert shrink.find([first, second], "b").having("produces")[1].indices == ((2,), (3,), (4,))
    net = Net(
        lambda n, x: n.p(n.a(x)[:, :1]) + n.q(n.a(x)[:, 1:]),
        a=nn.Conv2d(1, 4, 3),
        p=nn.Conv2d(1, 2, 3),
        q=nn.Conv2d(3, 2, 3),
    )
    assert [(g.name, g.channels) for g in shrink.groups(net, torch.zeros(2, *(1, 8, 8)))] == [
        ("a", 1),
        ("a:1", 3),
    ]


def test_grouped_and_depthwise_convolutions():
    layers = {"a": nn.Conv2d(1, 4, 3), "b": nn.Conv2d(4, 6, 3, groups=2), "c": nn.Conv2d(6, 2, 1)}
    first, second = shrink.groups(
        Net(lambda n, x: n.c(n.b(n.a(x))), **layers), torch.zeros(2, *(1, 8, 8))
    )
    assert [m.indices for m in first.members] == [((0, 2), (1, 3))] * 2
    assert [m.indices for m in second.members] == [((0, 3), (1, 4), (2, 5))] * 2
    layers["b"] = nn.Conv2d(4, 4, 3, groups=4)
    layers["c"] = nn.Conv2d(4, 2, 1)
    group = only(Net(lambda n, x: n.c(n.b(n.a(x))), **layers))
    assert [(m.role, m.size) for m in group.members] == [
        ("produces", 4),
        ("follows", 4),
        ("consumes", 4),
    ]


def test_a_view_takes_several_outputs():
    layers = {"a": nn.Linear(64, 8), "b": nn.ConvTranspose2d(2, 1, 2)}
    group = only(Net(lambda n, x: n.b(n.a(x.flatten(1)).view(len(x), -1, 2, 2)), **layers))
    assert group.members[0].indices == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert group.members[1].indices == ((0,), (1,))


def test_input_and_output_are_never_cut():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    assert shrink.groups(Net(lambda n, x: n.a(x), a=conv), torch.zeros(2, *(3, 8, 8))) == []
    # The convolution's outputs are added to the image.
    net = Net(lambda n, x: n.b(x + n.a(x)), a=conv, b=nn.Conv2d(3, 2, 3))
    assert shrink.groups(net, torch.zeros(2, *(3, 8, 8))) == []
    net = Net(lambda n, x: n.b(torch.cat([x, n.a(x)], 1)), a=conv, b=nn.Conv2d(6, 2, 3))
    assert only(net, (3, 8, 8)).members[1].indices == ((3,), (4,), (5,))
    # Features that are returned too, a dictionary, a softmax over the classes.
    layers = {"a": nn.Conv2d(1, 4, 3), "b": nn.Conv2d(4, 2, 3)}
    net = Net(lambda n, x: {"features": n.a(x).relu(), "out": n.b(n.a(x).relu())}, **layers)
    assert shrink.groups(net, torch.zeros(2, *(1, 8, 8))) == []
    net = Net(lambda n, x: n.b(n.a(x).relu()).softmax(1), **layers)
    assert only(net).name == "a"


def test_gated_layers_and_modes_stay_as_they_are():
    net = BatchNormNet().train()
    parametrizations.weight_norm(net.conv1)
    net.requires_grad_(False)
    random = torch.get_rng_state()
    with torch.no_grad():
        found = shrink.groups(net, torch.zeros(2, *(1, 8, 8)))
    assert [g.name for g in found] == ["conv1", "conv2"]
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


def test_the_printed_view():
    text = describe(shrink.groups(BatchNormNet(), torch.zeros(2, *(1, 8, 8))))
    assert text.splitlines() == [
        "  1. conv1: 2 channels in 3 layers, at least one stays",
        "     conv1  (Conv2d) produces: makes them, 2 outputs each",
        "     norm1  (BatchNorm2d) follows: one value each",
        "     conv2  (Conv2d) consumes: 2 inputs each (grouped)",
        "  2. conv2: 3 channels in 3 layers, at least one stays",
        "     conv2  (Conv2d) produces: makes them, 2 outputs each",
        "     norm2  (BatchNorm2d) follows: one value each",
        "     fc     (Linear) consumes: 32 inputs each (flatten)",
    ]


def test_the_drawn_view():
    found = shrink.groups(models.build("resnet20", (3, 32, 32), 10), torch.zeros(2, *(3, 32, 32)))
    figure = draw(found)
    (axes,) = figure.axes
    marks = sum(len(drawn.get_offsets()) for drawn in axes.collections)
    assert marks == sum(len(group.members) for group in found)
    assert [t.get_text() for t in axes.get_yticklabels()][:2] == [
        "conv1 (16)",
        "stage1.0.conv1 (16)",
    ]
    assert [t.get_text() for t in axes.get_xticklabels()][:: 39 + 1] == ["conv1", "fc"]
    plt.close(figure)


class Shuffle(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Detach(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x).detach()


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        (Shuffle(), ["module = 'middle'", "invalid for input of size"]),
        (
            nn.Sequential(nn.Identity(), nn.PixelShuffle(2)),
            ["module = 'middle.1'", "pixel_shuffle"],
        ),
        (nn.LocalResponseNorm(3), ["module = 'middle'", "fewer channels of 'first'"]),
        (nn.Softmax(1), ["module = 'middle'", "computes something else"]),
        (Detach(), ["module = 'middle", "no gradient passes through it"]),
        (nn.Conv2d(5, 4, 1), ["module = 'middle'", "(2, 1, 8, 8)", "5 channels"]),
    ],
)
def test_what_cannot_be_traced_is_named(middle, words):
    last = nn.LazyConv2d(2, 3)
    net = Net(
        lambda n, x: n.last(n.middle(n.first(x))),
        first=nn.Conv2d(1, 4, 1),
        middle=middle,
        last=last,
    )
    if "5 channels" not in words:
        net(torch.zeros(1, 1, 8, 8))
    else:
        net.last = nn.Conv2d(4, 2, 3)
    refused(lambda: shrink.groups(net, torch.zeros(2, 1, 8, 8)), *words)


def test_layers_out_of_reach_are_named():
    net = BatchNormNet()
    net.unused = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"module = 'unused': .*does not depend on it"):
        shrink.groups(net, torch.zeros(2, 1, 8, 8))


def test_channels_through_other_parameters_stay():
    layers = {"a": nn.Conv2d(1, 4, 3), "b": nn.Conv2d(4, 6, 3), "c": nn.Conv2d(6, 2, 1)}
    net = Net(lambda n, x: n.c(n.b(n.a(x) * n.scale)), **layers)
    net.scale = nn.Parameter(torch.ones(4, 1, 1))
    assert only(net).name == "b"


@pytest.mark.parametrize("affine", [True, False])
def test_the_channels_of_one_group_of_a_group_norm_go_together(affine):
    layers = {"a": nn.Conv2d(1, 6, 3), "b": nn.Conv2d(6, 4, 3), "c": nn.Conv2d(4, 2, 1)}
    layers |= {"norm": nn.GroupNorm(3, 6, affine=affine), "whole": nn.GroupNorm(1, 4)}
    net, x = Net(lambda n, x: n.c(n.whole(n.b(n.norm(n.a(x))))), **layers), torch.zeros(2, 1, 8, 8)
    found = shrink.groups(net, x)
    assert [(g.name, g.channels) for g in found] == [("a", 3), ("b", 1)]
    assert found[0].members[0].indices == ((0, 1), (2, 3), (4, 5))
    small = shrink.remove(net, {"a": [0, 1, 4, 5]}, x)
    assert (small.norm.num_groups, small.norm.num_channels) == (2, 4)
    refused(lambda: shrink.remove(net, {"a": [0, 4, 5]}, x), "channels [0] go with others")
    refused(lambda: shrink.remove(net, {"b": []}, x), "no signal is left")


def test_a_group_that_does_not_exist():
    found = shrink.groups(BatchNormNet(), torch.zeros(2, *(1, 8, 8)))
    with pytest.raises(InputError) as error:
        shrink.find(found, "conv3")
    assert one_line(error) == "group = 'conv3': allowed are conv1, conv2"


@pytest.mark.parametrize("example", [8, (1, 8, 8), (), torch.zeros(0, 1, 8, 8)])
def test_inputs_that_are_no_batch(example):
    refused(lambda: shrink.groups(BatchNormNet(), example), "example = ", "an input batch (n, ...)")


def test_examples_and_outputs_without_dense_values():
    x = torch.zeros(2, 1, 8, 8)
    for odd, kind in (
        (x.to("meta"), "strided tensor on meta"),
        (x.to_sparse(), "sparse_coo tensor on cpu"),
    ):
        line = refusal(lambda odd=odd: shrink.groups(BatchNormNet(), odd))
        assert line == f"example = 'torch.{kind}': dense tensors with values"
    model = Net(
        lambda n, x: SimpleNamespace(logits=n.b(n.a(x))), a=nn.Linear(8, 4), b=nn.Linear(4, 2)
    )
    line = "model = 'Net': its output must be a tensor, or tensors in tuples, lists or dicts"
    assert refusal(lambda: shrink.groups(model, x)) == line
    assert refusal(lambda: shrink.folded(model, x)) == line
