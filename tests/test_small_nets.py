"""Gated nets and the small ones they leave: the same function, in memory, on disk, in ONNX.

The nets are those that pruning papers use, large ones with a fraction of their channels, and with
random gates of which about half are zero.
Batch norms are random too, but such that no signal dies out on its way to the output.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torchvision
from conftest import apart, narrowed
from torch import nn

from prunestudy import measure, models, shrink
from prunestudy.methods.channels import Channels
from prunestudy.methods.scaled import scale_consumers
from prunestudy.shrink.factors import layers_to_factorise


class Autoencoder(nn.Sequential):
    """Convolutions down to 3x3 and transposed ones up again to 1x13x13."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.PReLU(12),
            nn.ConvTranspose2d(12, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, stride=2, padding=1, output_padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(6, 1, 1),
        )


def registered(name, side, by=1, channels=3):
    shape, build = (channels, side, side), narrowed(models.build, by)
    return lambda: build(name, shape, 10), shape


def densenet():
    return torchvision.models.DenseNet(4, (2, 3, 2), 8, num_classes=10)


NETS = {
    "lenet5": registered("lenet5", 16, channels=1),
    "mlp": registered("mlp", 8, channels=1),
    "vgg16_cifar": registered("vgg16_cifar", 8, 8),
    "resnet20": registered("resnet20", 8),
    "wrn28_2": registered("wrn28_2", 8, 4),
    "mobilenet_v2_cifar": registered("mobilenet_v2_cifar", 16, 4),
    "resnet50": registered("resnet50", 32, 8),
    "mobilenet_v2": registered("mobilenet_v2", 32, 4),
    "googlenet": registered("googlenet", 32, 4),
    "alexnet": registered("alexnet", 63, 8),
    "alexnet_grouped": registered("alexnet_grouped", 63, 8),
    "vgg16": registered("vgg16", 32, 8),
    "deeplabv3plus_resnet50": registered("deeplabv3plus_resnet50", 32, 8),
    "densenet": (densenet, (3, 32, 32)),
    "autoencoder": (Autoencoder, (1, 13, 13)),
    "emptied_branches": (lambda: models.resnet(14, (3, 32, 32), 10), (3, 8, 8)),
}
EMPTIED = {"emptied_branches": ("stage1.1.conv1", "stage2.0.conv1", "stage3.1.conv1")}
IN_ONNX = ("lenet5", "autoencoder", "emptied_branches")


class Gates(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.register_buffer("values", values)

    def forward(self):
        return self.values


@dataclass
class Case:
    """A net with `gates` (N,) in its kernels, and the small net that they leave; float64."""

    dense: nn.Module
    gated: nn.Module
    small: nn.Module
    gates: torch.Tensor
    macs: Channels
    shape: tuple[int, int, int]


@cache
def case(name):
    torch.manual_seed(0)
    build, shape = NETS[name]
    dense = lively(build().double(), shape)
    channels = Channels(dense, torch.zeros(2, *shape).double(), "macs")
    gates = random_gates(channels, EMPTIED.get(name, ()))
    gated = shrink.fold(dense)
    scale_consumers(gated, channels, Gates(gates))
    return Case(dense, gated, channels.smaller(gated, gates != 0), gates, channels, shape)


def random_gates(channels, emptied):
    """Gates in 1-2, about half of them zero, all those of the groups `emptied`."""
    gates = (1 + torch.rand(channels.size, dtype=torch.float64)) * torch.randint(
        0, 2, (channels.size,)
    )
    for group, part in zip(channels.groups, channels.slices, strict=True):
        gates[part.start] = 1.5
        if group.name in emptied:
            gates[part] = 0
    return gates


@torch.no_grad()
def lively(net, shape):
    """`net` in eval mode with random weights and batch norms, its output varied."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # one batch gives the statistics
    net.train()(torch.randn(8, *shape, dtype=torch.float64))
    for norm in norms:
        norm.running_mean += 0.2 * torch.randn_like(norm.running_mean)
        norm.running_var *= 0.5 + torch.rand_like(norm.running_var)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    return net.eval()


def images(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype)


def output(net, x):
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize("name", NETS)
def test_the_small_net_is_the_gated_one(name):
    it = case(name)
    x = images(it.shape, torch.float64)
    expected = output(it.gated, x)
    assert apart(output(it.small, x), expected) < 1e-9
    assert expected.std(0).max() / expected.abs().max() > 1e-2  # no signal died on its way
    assert apart(output(it.dense, x), expected) > 0.1  # and the gates do matter
    assert {type(m).__module__.partition(".")[0] for m in it.small.modules()} <= {
        "torch",
        "torchvision",
        "prunestudy",
        __name__,
    }


@pytest.mark.parametrize("name", NETS)
def test_its_cost_is_the_closed_form_of_the_gates(name):
    it = case(name)
    parameters = Channels(it.dense, torch.zeros(2, *it.shape).double(), "parameters")
    for channels, count in [
        (it.macs, measure.macs(it.small, torch.zeros(1, *it.shape))),
        (parameters, measure.parameters(it.small)),
    ]:
        assert float(channels.cost((it.gates != 0).double())) == pytest.approx(count, rel=1e-12)
        assert count < 0.6 * channels.dense


FACTORISED = sorted(set(NETS) - {"mlp", "emptied_branches", "autoencoder", "densenet"})


@pytest.mark.parametrize("name", FACTORISED)
def test_at_full_rank_factors_are_the_net(name):
    it = case(name)
    layers = layers_to_factorise(it.small)
    pairs = shrink.factorise(it.small, shrink.ranks_by_share(it.small, 1.0, tuple(layers)))
    assert all(type(pairs.get_submodule(name)) is nn.Sequential for name in layers)
    x = images(it.shape, torch.float64)
    assert apart(output(pairs, x), output(it.small, x)) < 1e-9


class TwoPaths(nn.Module):
    """Two paths that meet in a concatenation, each with activations that work in place."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(True), nn.Conv2d(3, 2, 1), nn.ReLU(True)
        )
        self.right = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(True))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


@pytest.mark.parametrize("emptied", ["left.0", "left.2", "right.0"])
def test_what_follows_a_constant_may_work_in_place(emptied):
    net, shape = lively(TwoPaths().double(), (1, 6, 6)), (1, 6, 6)
    small = shrink.remove(net, {emptied: []}, torch.zeros(2, *shape))
    member = shrink.find(shrink.groups(net, torch.zeros(2, *shape)), emptied).having("consumes")[0]
    net.get_submodule(member.layer).weight.data[:, [i for p in member.indices for i in p]] = 0
    x = images(shape, torch.float64)
    expected = output(net, x)
    for _ in range(2):  # nor may what works in place change the constant
        assert apart(output(small, x), expected) < 1e-9


@pytest.mark.parametrize("name", NETS)
def test_it_comes_back_from_disk_bit_for_bit(name, tmp_path):
    it, build = case(name), NETS[name][0]
    small = shrink.fold(it.small).float()
    shrink.save(small, tmp_path / "net")
    loaded = shrink.load(tmp_path / "net", build())
    x = images(it.shape, torch.float32)
    assert torch.equal(output(loaded, x), output(small, x))


@pytest.mark.parametrize("name", IN_ONNX)
def test_onnx_runtime_computes_the_same(name, tmp_path):
    it = case(name)
    example = images(it.shape, torch.float32)
    shrink.export(shrink.fold(it.small).float(), tmp_path / "net.onnx", example)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    expected = output(it.gated, images(it.shape, torch.float64))
    for count in (1, 3):
        x = images(it.shape, torch.float32)[:count]
        assert apart(shrink.OnnxNet(tmp_path / "net.onnx")(x), expected[:count]) < 1e-4


def test_latency_in_onnx_runtime():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    found = measure.onnx_latency({"a": net, "b": net}, torch.zeros(2, 1, 2, 2), rounds=3)
    assert list(found) == ["a", "b"]
    assert all(ms > 0 for ms in found.values())
