import itertools
from functools import partial

import pytest
import torch
from test_torchvision_nets import COLOURED

from prunestudy import models
from prunestudy.errors import InputError


@pytest.mark.parametrize(("name", "parameters"), [("lenet5", 431_080), ("lenet300", 266_610)])
def test_parameters_of_the_papers_nets(name, parameters):
    net = models.build(name, (1, 28, 28), 10)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (2, 17, 30)])
@pytest.mark.parametrize(
    "name", [n for n in models.names() if models.task_of(n) == "classify" and n not in COLOURED]
)
def test_any_shape_that_fits(name, shape):
    assert models.build(name, shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


def test_lenet5_has_no_relu_after_convolutions():
    net = models.build("lenet5", (1, 16, 16), 2)
    seen = []
    net.fc1.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    torch.nn.init.constant_(net.conv2.weight, 0.0)
    torch.nn.init.constant_(net.conv2.bias, -1.0)
    net(torch.zeros(1, 1, 16, 16))
    assert seen[0].tolist() == [[-1.0] * 50]


def test_names_and_lines():
    assert models.names() == sorted(models.names())
    assert {"lenet5", "lenet300"} <= set(models.names())
    assert list(models.describe()) == models.names()
    assert all(line and "\n" not in line for line in models.describe().values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lenet6", (1, 28, 28), 10), ["model = 'lenet6'", "lenet300, lenet5, mlp"]),
        (("lenet5", (1, 15, 28), 10), ["shape = (1, 15, 28)", "16x16"]),
        (("lenet5", (28, 28), 10), ["shape = (28, 28)", "three"]),
        (("lenet300", (1, 28, 0), 10), ["shape = (1, 28, 0)", "positive"]),
        (("lenet300", 28, 10), ["shape = 28", "three"]),
        (("lenet300", (1, 28, 28), 0), ["num_classes = 0", "at least 1"]),
        (("lenet300", (1, 28, 28), 10.0), ["num_classes = 10.0"]),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    with pytest.raises(InputError) as error:
        models.build(*arguments)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def layer_sizes(widths):
    """Parameters of linear layers between `widths`, biases included."""
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


def resnet_size(blocks, channels, classes):
    """conv1 and blocks of two 3x3 convolutions, each with batch norm; two projections; linear."""
    size = 9 * channels * 16 + 2 * 16
    for inputs, width in [(16, 16), (16, 32), (32, 64)]:
        size += 9 * width * (inputs + (2 * blocks - 1) * width) + 2 * blocks * 2 * width
        size += inputs * width if inputs != width else 0
    return size + layer_sizes([64, classes])


def wide_size(blocks, factor, channels, classes):
    """conv1, blocks of two 3x3 convolutions with a batch norm ahead of each, three projections."""
    size, inputs = 9 * channels * 16, 16
    for width in (16 * factor, 32 * factor, 64 * factor):
        size += 9 * width * (inputs + (2 * blocks - 1) * width)
        size += 2 * (inputs + (2 * blocks - 1) * width) + inputs * width
        inputs = width
    return size + 2 * inputs + layer_sizes([inputs, classes])


def vgg_size(channels, classes):
    widths = [channels, *[64] * 2, *[128] * 2, *[256] * 3, *[512] * 6]
    return sum(9 * a * b + 2 * b for a, b in itertools.pairwise(widths)) + (512 + 1) * classes


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mlp", lambda c, n: layer_sizes([c * 32 * 32, 512, 256, 128, n])),
        ("resnet20", partial(resnet_size, 3)),
        ("resnet32", partial(resnet_size, 5)),
        ("resnet56", partial(resnet_size, 9)),
        ("vgg16_cifar", vgg_size),
        ("wrn28_2", partial(wide_size, 4, 2)),
    ],
)
def test_parameters_in_closed_form(name, size):
    for channels, classes in [(3, 10), (1, 100)]:
        net = models.build(name, (channels, 32, 32), classes)
        assert sum(p.numel() for p in net.parameters()) == size(channels, classes)


@pytest.mark.parametrize("name", ["mlp", "resnet20", "vgg16_cifar"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28)])
def test_small_grey_images(name, shape):
    net = models.build(name, shape, 10)
    assert net(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize(("name", "convolutions"), [("resnet20", 19 + 2), ("vgg16_cifar", 13)])
def test_layers_of_the_cifar_nets(name, convolutions):
    net = models.build(name, (3, 32, 32), 10)
    kinds = [type(layer) for layer in net.modules()]
    assert kinds.count(torch.nn.Conv2d) == convolutions
    # He et al.: all convolutions but the projections have a batch norm, and none a bias.
    assert kinds.count(torch.nn.BatchNorm2d) == min(19, convolutions)
    assert all(m.bias is None for m in net.modules() if isinstance(m, torch.nn.Conv2d))


def test_a_block_halves_the_image_and_adds_its_shortcut():
    block = models.build("resnet20", (3, 32, 32), 10).stage2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert block(x).shape == (1, 32, 4, 4)
    assert torch.equal(block(x), block.shortcut(x).relu())


def test_a_wide_block_normalises_ahead_of_both_branches():
    net = models.build("wrn28_2", (3, 32, 32), 10)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert (len(convolutions), sum(p.numel() for p in net.parameters())) == (28, 1_467_610)
    first, second = net.stage2[:2].eval()
    for block in (first, second):
        torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    y = first(x)
    assert torch.equal(y, first.shortcut(first.bn1(x).relu()))
    assert y.shape == (1, 64, 4, 4)
    assert torch.equal(second(y), y)
    with pytest.raises(InputError, match=r"depth = 20: 6 n \+ 4"):
        models.WideResNet(20, 2)
    with pytest.raises(InputError, match="width = 0: at least 1"):
        models.WideResNet(28, 0)


def test_depth_of_a_resnet():
    with pytest.raises(InputError, match=r"depth = 21: 6 n \+ 2"):
        models.ResNet(21)
