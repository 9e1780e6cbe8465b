import copy

import pytest
import torch
from conftest import BatchNormNet, one_line, randomise
from torch import nn

from prunestudy import shrink
from prunestudy.errors import InputError
from prunestudy.methods.channels import Channels
from prunestudy.models import TDMPC, Autoencoder
from prunestudy.shrink import component_groups, narrow

SMALL = (1, 8, 8)
IMAGES = torch.zeros(2, *SMALL)


def nets():
    return [
        (Autoencoder(SMALL, 10, (12, 8), 5, head=64), SMALL),
        (Autoencoder(SMALL, 10, (4, 6), 5, convolutional=True), SMALL),
        (TDMPC(5, 2, 8, 4), (7,)),
        (BatchNormNet(), SMALL),
    ]


def plain(net, shape):
    return shrink.groups(net, torch.zeros(2, *shape))


def test_groups_inside_a_component_and_across_an_interface():
    net = Autoencoder(SMALL, 10, (12, 8), 5, head=64)
    found = [(g.name, g.kind, g.place) for g in component_groups(net, IMAGES)]
    assert found == [
        ("encoder.fc1", "internal", "encoder"),
        ("encoder.fc2", "internal", "encoder"),
        ("encoder.fc3", "coupling", "encoder > decoder > classifier"),
        ("decoder.fc1", "internal", "decoder"),
        ("decoder.fc2", "internal", "decoder"),
        ("classifier.fc1", "internal", "classifier"),
    ]
    # The same groups as without components: they are told apart, not changed.
    assert [g.group for g in component_groups(net, IMAGES)] == plain(net, SMALL)


def test_the_latent_of_tdmpc_couples_all_five_components():
    found = component_groups(TDMPC(5, 2, 8, 4), torch.zeros(2, 7))
    coupling = [g for g in found if g.kind == "coupling"]
    assert [g.name for g in coupling] == ["encoder.2"]
    five = {"encoder", "dynamics", "reward", "policy", "value"}
    assert set(coupling[0].components) == five
    assert len({m.layer for m in coupling[0].group.members}) == 7
    assert {g.place for g in found if g.kind == "internal"} == five


def test_components_of_ones_own():
    net = nn.Sequential(BatchNormNet())
    net.components = ["0.conv1", "0.norm1", "0.conv2", "0.norm2", "0.fc"]
    assert component_groups(net, IMAGES)[1].components == ("0.conv2", "0.norm2", "0.fc")
    # Without any said, the children of the net are its components.
    del net.components
    found = [(g.name, g.place) for g in component_groups(net, IMAGES)]
    assert found == [("0.conv1", "0"), ("0.conv2", "0")]


@pytest.mark.parametrize(
    ("name", "protected"),
    [
        ("encoder.fc1", ["encoder.fc1"]),
        ("encoder.fc2", ["encoder.fc1", "encoder.fc2"]),
        ("decoder.fc3", ["decoder.fc2"]),
        ("encoder", ["encoder.fc1", "encoder.fc2"]),
        ("coupling", ["encoder.fc3"]),
    ],
)
def test_protected_by_group_layer_component_or_coupling(name, protected):
    net = Autoencoder(SMALL, 10, (12, 8), 5)
    found = component_groups(net, IMAGES, protect=[name])
    assert [g.name for g in found if g.protected] == protected


@pytest.mark.parametrize(
    ("components", "protect", "words"),
    [
        ([], ["head"], "protect = 'head': protectable are coupling, decoder, .*encoder"),
        (5, [], "components = 5: a list of names of modules"),
        ("encoder", [], "components = 'encoder': a list of names of modules"),
        (["encoder"], [], r"components = \['encoder'\]: layer decoder.fc1 is in none"),
        (["encoder", "decodr"], [], "components = 'decodr': allowed are modules, as encoder, "),
        (nn.ModuleList([nn.ReLU()]), [], r"components = ReLU\(\): allowed are modules, as "),
    ],
)
def test_bad_components_are_refused(components, protect, words):
    with pytest.raises(InputError, match=words) as caught:
        net = Autoencoder(SMALL, 10, (12, 8), 5)
        net.components = components
        component_groups(net, IMAGES, protect)
    assert one_line(caught)


@pytest.mark.parametrize("number", range(4))
def test_parameters_are_those_of_the_small_net(number):
    net, shape = nets()[number]
    channels = Channels(net, torch.zeros(2, *shape), "parameters", norms=True)
    groups = channels.groups
    assert groups == plain(net, shape)
    assert channels.dense == sum(p.numel() for p in net.parameters())
    generator = torch.Generator().manual_seed(number)
    for _ in range(3):
        kept = [int(torch.randint(1, g.channels + 1, (), generator=generator)) for g in groups]
        small = narrow(net, groups, [torch.arange(k) for k in kept])
        assert channels.cost_at(kept) == sum(p.numel() for p in small.parameters())
        soft = [
            torch.full((g.channels,), k / g.channels) for g, k in zip(groups, kept, strict=True)
        ]
        assert float(channels.cost(torch.cat(soft))) == pytest.approx(channels.cost_at(kept))


@pytest.mark.parametrize("number", range(4))
def test_the_small_net_computes_what_the_masked_one_does(number):
    net, shape = nets()[number]
    net = randomise(net, number).double().eval()
    groups, generator = plain(net, shape), torch.Generator().manual_seed(number)
    kept = [torch.randperm(g.channels, generator=generator)[: g.channels // 2] for g in groups]
    small = narrow(net, groups, [k.sort().values for k in kept])
    masked = copy.deepcopy(net)
    for group, stay in zip(groups, kept, strict=True):
        mask = torch.zeros(group.channels, dtype=torch.float64)
        mask[stay] = 1
        mask_consumers(masked, group, mask)
    x = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    for a, b in zip(flat(masked(x)), flat(small(x)), strict=True):
        assert (a - b).abs().max() <= 1e-9 * a.abs().max()
        assert a.abs().max() > 0


def mask_consumers(net, group, mask):
    """Zeros where masked channels are read; a layer norm is told which of its features count."""
    for m in group.members:
        layer = net.get_submodule(m.layer)
        if m.role == "consumes":
            axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
            form = [1] * layer.weight.dim()
            spread = m.spread(mask)[: layer.weight.shape[axis]]
            form[axis] = -1
            layer.weight.data *= spread.view(form)
        elif isinstance(layer, nn.LayerNorm):
            keep = m.spread(mask).bool()

            def forward(x, layer=layer, keep=keep):
                out = torch.zeros_like(x)
                size = (int(keep.sum()),)
                some = (x[:, keep], size, layer.weight[keep], layer.bias[keep], layer.eps)
                out[:, keep] = nn.functional.layer_norm(*some)
                return out

            layer.forward = forward


def flat(output):
    return [output] if torch.is_tensor(output) else list(output)


def test_narrow_leaves_the_net_alone():
    net = Autoencoder(SMALL, 10, (6, 4), 3)
    before = copy.deepcopy(net.state_dict())
    groups, x = plain(net, SMALL), torch.randn(2, *SMALL)
    assert narrow(net, groups, [torch.tensor([0]) for _ in groups])(x).shape == x.shape
    whole = narrow(net, groups, [torch.arange(g.channels) for g in groups])
    torch.testing.assert_close(whole(x), net(x), rtol=0, atol=0)
    whole.encoder.fc1.weight.data.zero_()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
