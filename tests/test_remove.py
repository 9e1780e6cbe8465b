"""Channels and branches removed for good, and nets of another shape stored and read."""

import pytest
import torch
from conftest import randomise, refusal
from torch import nn

from prunestudy import models, shrink
from prunestudy.methods.channels import Channels
from prunestudy.shrink import Constant
from prunestudy.shrink.layers import geometry_of

BLOCKS = {
    "identity": {"stage1.1.conv1": []},
    "strided, with a convolution as shortcut": {"stage2.0.conv1": []},
    "two": {"stage1.2.conv1": [], "stage3.1.conv1": [], "stage3.2.conv1": [3, 5]},
}


def resnet(dtype=torch.float64):
    return randomise(models.build("resnet20", (1, 8, 8), 10).to(dtype)).eval()


def images(shape, dtype=torch.float64):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def muted(net, shape, keep):
    """`net` with the slices of all other channels at zero where they are read."""
    for group in shrink.groups(net, torch.zeros(2, *shape)):
        gone = set(range(group.channels)) - set(keep.get(group.name, range(group.channels)))
        for m in group.having("consumes"):
            layer = net.get_submodule(m.layer)
            places = [place for channel in gone for place in m.indices[channel]]
            inside = [place for place in places if place < layer.weight.shape[1]]
            layer.weight.data[:, inside] = 0
    return net


@pytest.mark.parametrize("blocks", BLOCKS)
def test_an_emptied_block_leaves_its_constant_and_costs_nothing(blocks):
    net, keep = resnet(), BLOCKS[blocks]
    small = shrink.remove(net, keep, torch.zeros(2, *(1, 8, 8)))
    x = images((1, 8, 8))
    with torch.no_grad():
        expected, found = muted(net, (1, 8, 8), keep)(x), small(x)
    assert (found - expected).abs().max() / expected.abs().max() < 1e-9
    name = next(iter(keep)).removesuffix(".conv1")
    block = small.get_submodule(name)
    kinds = [type(m) for m in (block.conv1, block.bn1, block.conv2, block.bn2)]
    assert kinds == [Constant, Constant, Constant, nn.BatchNorm2d]
    assert [m.channels for m in (block.conv1, block.bn1)] == [0, 0]
    inner = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert inner == [block.shortcut] * isinstance(block.shortcut, nn.Conv2d)


def test_the_constant_by_hand():
    net = resnet()
    block = shrink.remove(net, {"stage1.1.conv1": []}, torch.zeros(2, *(1, 8, 8))).stage1[1]
    norm = net.stage1[1].bn2
    x = images((16, 8, 8)).abs()
    constant = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        expected = (x + constant[:, None, None]).relu()
        torch.testing.assert_close(block(x), expected)


class Biased(nn.Module):
    """A residual branch of two layers with a bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


def test_a_branch_without_inputs_leaves_its_bias():
    net, x = nn.Sequential(nn.Linear(2, 3), Biased(), nn.Linear(3, 2)), torch.ones(5, 2)
    small = shrink.remove(net, {"1.first": []}, x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net[2](net[0](x) + net[1].second.bias))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2), (2, 2, 11, 9)),
        (nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 5, 6)),
        (nn.Conv2d(2, 3, 3, padding="valid"), (2, 2, 5, 6)),
        (nn.Conv1d(2, 3, 4, stride=3), (2, 2, 11)),
        (nn.ConvTranspose2d(2, 3, 3, 2, padding=1, output_padding=1), (2, 2, 4, 5)),
        (nn.Linear(2, 3), (2, 7, 2)),
        (nn.BatchNorm2d(3), (2, 3, 4, 5)),
    ],
)
def test_places_behind_a_layer_that_is_gone(layer, x):
    like = layer(torch.zeros(x))
    where = geometry_of(layer)
    empty = torch.zeros((*x[:-1], 0) if isinstance(layer, nn.Linear) else (x[0], 0, *x[2:]))
    linear = isinstance(layer, nn.Linear)
    nothing = (*like.shape[:-1], 0) if linear else (like.shape[0], 0, *like.shape[2:])
    assert Constant(0, where, bias=False)(empty).shape == nothing
    constant = Constant(3, where)
    constant.bias.data = torch.tensor([1.0, 2.0, 3.0])
    found = constant(empty)
    assert found.shape == like.shape
    channel = found if linear else found.movedim(1, -1)
    assert (channel == torch.tensor([1.0, 2.0, 3.0])).all()
    assert Constant(3, where, bias=False)(empty).count_nonzero() == 0


# --- stored and read


def smaller():
    keep = {"stage1.1.conv1": [], "stage2.0.conv2": [1, 2, 30], "stage3.2.conv1": [5]}
    return shrink.remove(resnet(torch.float32), keep, torch.zeros(2, *(1, 8, 8)))


def test_a_smaller_net_may_be_made_smaller_again_unless_a_branch_is_gone(tmp_path):
    x = torch.zeros(2, 1, 8, 8)
    net = shrink.remove(resnet(torch.float32), {"stage1.1.conv1": [3, 4]}, x)
    net = shrink.remove(net, {"conv1": [0, 1], "stage1.1.conv1": [1]}, x)
    shrink.save(net, tmp_path / "net")
    block = shrink.load(tmp_path / "net", resnet(torch.float32)).stage1[1]
    assert (block.conv1.in_channels, block.conv1.out_channels) == (2, 1)
    for again in (
        lambda net: shrink.remove(net, {"conv1": [0]}, x),
        lambda net: Channels(net, x, "macs"),
    ):
        why = "a branch was removed here, no more can be"
        assert refusal(lambda a=again: a(smaller())) == f"module = 'stage1.1.conv1': {why}"
