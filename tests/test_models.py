import itertools
from functools import partial

import pytest
import torch
from conftest import refused
from test_torchvision_nets import COLOURED
from torch import nn

from prunestudy import measure, models

GREY, COLOUR = (1, 28, 28), (3, 32, 32)


def size(net):
    return sum(p.numel() for p in net.parameters())


def test_names_and_lines():
    assert models.names() == sorted(models.names()) == list(models.describe())
    assert all(line and "\n" not in line for line in models.describe().values())


def test_bad_input_is_one_line():
    for arguments, *words in (
        (("lenet6", GREY, 10), "model = 'lenet6'", "lenet300, lenet5, mlp"),
        (("lenet5", (1, 15, 28), 10), "shape = (1, 15, 28)", "16x16"),
        (("convnet", (3, 7, 32), 10), "shape = (3, 7, 32): convnet needs images of"),
        (("conv_autoencoder", (1, 30, 28), 10), "shape = (1, 30, 28): ", "multiples of 4"),
        (("lenet5", (28, 28), 10), "shape = (28, 28)", "three"),
        (("lenet300", (1, 28, 0), 10), "shape = (1, 28, 0)", "positive"),
        (("lenet300", 28, 10), "shape = 28", "three"),
        (("lenet300", GREY, 0), "num_classes = 0", "at least 1"),
        (("lenet300", GREY, 10.0), "num_classes = 10.0"),
    ):
        refused(partial(models.build, *arguments), *words)
    refused(lambda: models.ResNet(21), "depth = 21: 6 n + 2")
    refused(lambda: models.WideResNet(20, 2), "depth = 20: 6 n + 4")
    refused(lambda: models.WideResNet(28, 0), "width = 0: at least 1")
    refused(lambda: models.TDMPC(3, 2, 4, 0), "latent = 0: a positive integer")


@pytest.mark.parametrize("shape", [COLOUR, (1, 16, 16), (2, 17, 30)])
@pytest.mark.parametrize(
    "name", [n for n in models.names() if models.task_of(n) == "classify" and n not in COLOURED]
)
def test_any_shape_that_fits(name, shape):
    assert models.build(name, shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["mlp", "resnet20", "vgg16_cifar"])
def test_images_of_eight_pixels(name):
    assert models.build(name, (1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def linear(*widths):
    """Parameters of linear layers between `widths`, biases included."""
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


def resnet_size(blocks, channels, classes):
    """conv1 and blocks of two 3x3 convolutions, each with batch norm; two projections; linear."""
    total = 9 * channels * 16 + 2 * 16
    for inputs, width in [(16, 16), (16, 32), (32, 64)]:
        total += 9 * width * (inputs + (2 * blocks - 1) * width) + 2 * blocks * 2 * width
        total += inputs * width if inputs != width else 0
    return total + linear(64, classes)


def wide_size(blocks, factor, channels, classes):
    """conv1, blocks of two 3x3 convolutions with a batch norm ahead of each, three projections."""
    total, inputs = 9 * channels * 16, 16
    for width in (16 * factor, 32 * factor, 64 * factor):
        total += 9 * width * (inputs + (2 * blocks - 1) * width)
        total += 2 * (inputs + (2 * blocks - 1) * width) + inputs * width
        inputs = width
    return total + 2 * inputs + linear(inputs, classes)


def vgg_size(channels, classes):
    widths = [channels, *[64] * 2, *[128] * 2, *[256] * 3, *[512] * 6]
    return sum(9 * a * b + 2 * b for a, b in itertools.pairwise(widths)) + linear(512, classes)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("mlp", lambda c, n: linear(c * 32 * 32, 512, 256, 128, n)),
        ("resnet20", partial(resnet_size, 3)),
        ("resnet32", partial(resnet_size, 5)),
        ("resnet56", partial(resnet_size, 9)),
        ("vgg16_cifar", vgg_size),
        ("wrn28_2", partial(wide_size, 4, 2)),
    ],
)
def test_parameters_in_closed_form(name, formula):
    for channels, classes in [(3, 10), (1, 100)]:
        net = models.build(name, (channels, 32, 32), classes)
        assert size(net) == formula(channels, classes)


def test_known_numbers_of_parameters():
    shapes = {"lenet5": GREY, "lenet300": GREY, "wrn28_2": COLOUR, "convnet": COLOUR}
    found = {name: size(models.build(name, shape, 10)) for name, shape in shapes.items()}
    known = {"lenet5": 431_080, "lenet300": 266_610, "wrn28_2": 1_467_610, "convnet": 89_578}
    assert found == known


def test_lenet5_has_no_relu_after_convolutions():
    net, seen = models.build("lenet5", (1, 16, 16), 2), []
    net.fc1.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    nn.init.constant_(net.conv2.weight, 0.0)
    nn.init.constant_(net.conv2.bias, -1.0)
    net(torch.zeros(1, 1, 16, 16))
    assert seen[0].tolist() == [[-1.0] * 50]


# --- CIFAR


@pytest.mark.parametrize(
    ("name", "convolutions", "norms"),
    [("resnet20", 19 + 2, 19), ("vgg16_cifar", 13, 13), ("wrn28_2", 1 + 24 + 3, 25)],
)
def test_layers_of_the_cifar_nets(name, convolutions, norms):
    layers = list(models.build(name, COLOUR, 10).modules())
    kinds = [type(layer) for layer in layers]
    # ResNet and VGG: every convolution but the projections has a batch norm; none has a bias
    assert (kinds.count(nn.Conv2d), kinds.count(nn.BatchNorm2d)) == (convolutions, norms)
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Conv2d))


def test_a_block_halves_the_image_and_adds_its_shortcut():
    block = models.build("resnet20", COLOUR, 10).stage2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert block(x).shape == (1, 32, 4, 4)
    assert torch.equal(block(x), block.shortcut(x).relu())


def test_a_wide_block_normalises_ahead_of_both_branches():
    first, second = models.build("wrn28_2", COLOUR, 10).stage2[:2].eval()
    for block in (first, second):
        nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    y = first(x)
    assert torch.equal(y, first.shortcut(first.bn1(x).relu()))
    assert y.shape == (1, 64, 4, 4)
    assert torch.equal(second(y), y)


# --- Caffe's ConvNet


def test_maps_and_macs_of_caffes_cifar10_full():
    net, seen = models.build("convnet", COLOUR, 10), []
    for layer in (net.conv1, net.conv2, net.conv3):
        layer.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape[1:])))
    net(torch.zeros(1, *COLOUR))
    assert seen == [(32, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert net.fc.in_features == 64 * 4 * 4
    # one product per weight and position
    macs = 1024 * 32 * 75 + 256 * 32 * 800 + 64 * 64 * 800 + 10 * 1024
    assert measure.macs(net, COLOUR) == macs == 12_298_240


def test_normalisation_is_within_a_channel_and_counts_the_border_as_zeros():
    norm = models.build("convnet", COLOUR, 10).norm1
    x = torch.full((1, 1, 3, 3), 100.0, dtype=torch.float64)
    assert float(norm(x)[0, 0, 1, 1]) == pytest.approx(100 * (1 + 5e-5 * 100**2) ** -0.75)
    norm.alpha, norm.beta = 9.0, 1.0
    x = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    x[0, 0], x[0, 1, 1, 1] = 1.0, 2.0
    y = norm(x)
    # corners see 4 ones of 9 cells, edges 6, the centre 9: 1 / (1 + 9 * count / 9)
    corner, edge, centre = 1 / 5, 1 / 7, 1 / 10
    wanted = [[corner, edge, corner], [edge, centre, edge], [corner, edge, corner]]
    assert torch.allclose(y[0, 0], torch.tensor(wanted, dtype=torch.float64))
    assert y[0, 1].flatten().tolist() == pytest.approx([0] * 4 + [2 / 5] + [0] * 4)
    assert not torch.allclose(y, nn.LocalResponseNorm(3, alpha=9.0, beta=1.0)(x))


# --- autoencoders and TD-MPC


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("autoencoder", linear(784, 256, 128, 32, 128, 256, 784)),
        ("conv_autoencoder", 2 * (16**2 + 16 * 32 * 16 + 32 * 32 * 49) + 16 + 32 + 32 + 48 + 1),
    ],
)
def test_autoencoders_with_and_without_a_classifier(name, parameters):
    plain, both = (models.build(n, GREY, 10) for n in (name, f"{name}_classifier"))
    assert (size(plain), size(both)) == (parameters, parameters + linear(32, 64, 10))
    tasks = [models.task_of(n) for n in (name, f"{name}_classifier")]
    assert tasks == ["reconstruct", "reconstruct_and_classify"]
    for shape in [(1, 8, 8), (3, 16, 12)]:
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        plain, both = (models.build(n, shape, 7) for n in (name, f"{name}_classifier"))
        z = plain.encode(x)
        assert (z.shape, plain(x).shape) == ((2, 32), x.shape)
        assert torch.equal(plain(x), plain.decode(z))
        images, logits = both(x)
        assert (images.shape, logits.shape) == (x.shape, (2, 7))
        assert torch.equal(logits, both.classifier(both.encode(x)))


def test_components_are_the_children():
    parts = [name for name, _ in models.build("autoencoder", GREY, 10).named_children()]
    assert parts == ["encoder", "decoder"]
    parts = [name for name, _ in models.TDMPC(3, 2, 4, 3).named_children()]
    assert parts == ["encoder", "dynamics", "reward", "policy", "value"]


def test_tdmpc_has_the_published_widths():
    net = models.TDMPC(24, 6)
    assert net.encoder[-1].out_features == net.dynamics.rest[-1].out_features == 50
    norms = [m.normalized_shape for m in net.modules() if isinstance(m, nn.LayerNorm)]
    assert norms == [(512,), (512,)]
    assert [tuple(part.shape) for part in net(torch.zeros(3, 30))] == [
        (3, 1),
        (3, 6),
        (3, 6),
        (3, 2),
    ]


def test_tdmpc_computes_what_its_parts_say():
    torch.manual_seed(0)
    net, x = models.TDMPC(3, 2, 8, 4), torch.randn(5, 5)
    z, action = net.encoder(x[:, :3]), x[:, 3:]
    joint = torch.cat([net.dynamics.latent.weight, net.dynamics.action.weight], 1)
    hidden = torch.cat([z, action], 1) @ joint.T + net.dynamics.latent.bias
    after = net.dynamics.rest(hidden)
    then = net.policy(after).tanh()
    reward, now, later, values = net(x)
    torch.testing.assert_close(later, then)
    torch.testing.assert_close(now, net.policy(z).tanh())
    torch.testing.assert_close(reward, net.reward(z, action))
    torch.testing.assert_close(values[:, 1:], net.value[1](after, then))
