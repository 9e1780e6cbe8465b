"""The nets of the paper profile: their size, what they refuse, and pretrained weights."""

from functools import partial
from urllib.error import URLError

import pytest
import torch
import torchvision
from conftest import refused
from torch import nn

from prunestudy import measure, models

IMAGENET = ("alexnet", "alexnet_grouped", "vgg16", "googlenet", "resnet50", "mobilenet_v2")
COLOURED = (*IMAGENET, "mobilenet_v2_cifar", "deeplabv3plus_resnet50")
PRETRAINED = {"alexnet", "vgg16", "googlenet", "resnet50", "mobilenet_v2", "deeplabv3plus_resnet50"}


def shapes_only(name, side, classes):
    with torch.device("meta"):
        return models.build(name, (3, side, side), classes)


@pytest.mark.parametrize(
    ("name", "giga", "parameters"),
    [
        ("vgg16", 15.47, 138_357_544),
        ("resnet50", 4.09, 25_557_032),
        ("mobilenet_v2", 0.30, 3_504_872),
        ("alexnet", 0.71, 61_100_840),
        ("alexnet_grouped", 0.724, 60_965_224),
        ("googlenet", 1.50, 6_624_904),
    ],
)
def test_macs_and_parameters_are_the_known_ones(name, giga, parameters):
    net = shapes_only(name, 224, 1000)
    assert measure.macs(net, torch.zeros(1, 3, 224, 224)) == pytest.approx(giga * 1e9, rel=0.01)
    assert measure.parameters(net) == parameters


def test_parameters_of_deeplab_by_its_parts():
    net = shapes_only("deeplabv3plus_resnet50", 65, 21)
    aspp = 2048 * 256 * (1 + 3 * 9 + 1) + 5 * 256 * 256 + 6 * 2 * 256
    decoder = (256 * 48 + 2 * 48) + 9 * 256 * (304 + 256) + 2 * 2 * 256 + 257 * 21
    assert measure.parameters(net) == (25_557_032 - 2049 * 1000) + aspp + decoder == 40_352_181


def test_deeplab_sees_a_sixteenth_and_answers_in_full():
    net = shapes_only("deeplabv3plus_resnet50", 65, 4)
    seen = {}
    for name in ("aspp", "low", "decoder"):
        module = net.get_submodule(name)
        module.register_forward_hook(lambda m, x, y, n=name: seen.update({n: tuple(y.shape)}))
    assert net(torch.zeros(2, 3, 65, 51, device="meta")).shape == (2, 4, 65, 51)
    assert seen == {"aspp": (2, 256, 5, 4), "low": (2, 48, 17, 13), "decoder": (2, 4, 17, 13)}
    assert models.task_of("deeplabv3plus_resnet50") == "segment"


def test_mobilenet_for_cifar_leaves_four_by_four():
    net = shapes_only("mobilenet_v2_cifar", 32, 10)
    assert net.features(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 1280, 4, 4)
    wide = shapes_only("mobilenet_v2", 32, 10)
    assert measure.parameters(net) == measure.parameters(wide) == 2_236_682


def test_alexnet_of_2012_has_three_convolutions_in_two_groups():
    modules = shapes_only("alexnet_grouped", 224, 9).modules()
    found = [(m.out_channels, m.groups) for m in modules if isinstance(m, nn.Conv2d)]
    assert found == [(96, 1), (256, 2), (384, 1), (384, 2), (256, 2)]


@pytest.mark.parametrize(("name", "places"), [("vgg16", 7), ("alexnet", 6)])
def test_the_last_pooling_is_left_out_where_it_changes_nothing(name, places):
    net = shapes_only(name, 224, 2)
    assert isinstance(net.avgpool, nn.Identity)
    assert net.features(torch.zeros(1, 3, 224, 224, device="meta")).shape[2:] == (places, places)
    assert isinstance(shapes_only(name, 96, 2).avgpool, nn.AdaptiveAvgPool2d)


@pytest.mark.parametrize(
    ("name", "least"), [("vgg16", 32), ("googlenet", 15), ("alexnet", 63), ("alexnet_grouped", 63)]
)
def test_the_smallest_images(name, least):
    net, small = shapes_only(name, least, 3), (3, least - 1, least - 1)
    assert net(torch.zeros(2, 3, least, least, device="meta")).shape == (2, 3)
    words = f"shape = {small}: ", f"at least {least}x{least} pixels"
    refused(lambda: models.build(name, small, 3), *words)


@pytest.mark.parametrize("name", COLOURED)
def test_grey_images_are_refused(name):
    grey = partial(models.build, name, (1, 224, 224), 10)
    refused(grey, "shape = (1, 224, 224): ", " needs 3 channels")


def test_which_nets_have_pretrained_weights():
    assert {name for name in models.names() if models.has_pretrained(name)} == PRETRAINED
    build = partial(models.build, "lenet5", (1, 28, 28), 10, pretrained=True)
    refused(build, "pretrained = True: none for lenet5")


def test_pretrained_weights_that_cannot_be_had(monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("Name or service\nnot known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    why = "MobileNet_V2_Weights.IMAGENET1K_V1 are not there and could not be downloaded ("
    refused(
        partial(models.build, "mobilenet_v2", (3, 32, 32), 10, pretrained=True),
        f"pretrained = True: torchvision's {why}",
        "Name or service not known",
    )


@pytest.fixture
def served(monkeypatch):
    """The state of another net of torchvision's, given out as if it had been downloaded."""
    nets = {}

    def give(weights, **kwargs):
        name = {"MobileNet_V2_Weights": "mobilenet_v2", "ResNet50_Weights": "resnet50"}
        torch.manual_seed(5)
        made = torchvision.models.get_model(name[type(weights).__name__], weights=None)
        nets["net"] = made
        return made.state_dict()

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", give)
    return nets


@pytest.mark.parametrize("classes", [10, 1000])
def test_pretrained_weights_but_for_another_classifier(served, classes):
    torch.manual_seed(0)
    found = models.build("mobilenet_v2", (3, 32, 32), classes, pretrained=True).state_dict()
    torch.manual_seed(0)
    fresh = models.build("mobilenet_v2", (3, 32, 32), classes).state_dict()
    given = served["net"].state_dict()
    kept = {name for name in given if not torch.equal(found[name], fresh[name])}
    own = {name for name in given if given[name].shape != fresh[name].shape}
    assert own == ({"classifier.1.weight", "classifier.1.bias"} if classes == 10 else set())
    assert "features.0.0.weight" in kept
    assert all(torch.equal(found[name], (fresh if name in own else given)[name]) for name in given)


def test_the_backbone_of_deeplab_takes_those_of_resnet50(served):
    net = models.build("deeplabv3plus_resnet50", (3, 33, 33), 3, pretrained=True)
    given = {k: v for k, v in served["net"].state_dict().items() if not k.startswith("fc.")}
    found = net.backbone.state_dict()
    assert set(found) == set(given)
    assert all(torch.equal(found[name], given[name]) for name in given)
