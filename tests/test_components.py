import copy

import pytest
import torch
import torch_pruning
from conftest import BatchNormNet, one_line, randomise
from torch import nn

from prunestudy import measure, models, shrink
from prunestudy.errors import InputError
from prunestudy.methods.channel_budget import Budget, listing, require_target, spread_out
from prunestudy.methods.channel_ranking import GroupL2, importance
from prunestudy.methods.channels import Channels
from prunestudy.models import TDMPC, Autoencoder
from prunestudy.shrink import Narrow, component_groups, narrow

SMALL = (1, 8, 8)


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
    found = [(g.name, g.kind, g.place) for g in component_groups(net, torch.zeros(2, *SMALL))]
    assert found == [
        ("encoder.fc1", "internal", "encoder"),
        ("encoder.fc2", "internal", "encoder"),
        ("encoder.fc3", "coupling", "encoder > decoder > classifier"),
        ("decoder.fc1", "internal", "decoder"),
        ("decoder.fc2", "internal", "decoder"),
        ("classifier.fc1", "internal", "classifier"),
    ]
    # The same groups as without components: they are told apart, not changed.
    assert [g.group for g in component_groups(net, torch.zeros(2, *SMALL))] == plain(net, SMALL)


def test_the_latent_of_tdmpc_couples_all_five_components():
    found = component_groups(TDMPC(5, 2, 8, 4), torch.zeros(2, 7))
    coupling = [g for g in found if g.kind == "coupling"]
    assert [g.name for g in coupling] == ["encoder.2"]
    five = {"encoder", "dynamics", "reward", "policy", "value"}
    assert set(coupling[0].components) == five
    assert len({m.layer for m in coupling[0].group.members}) == 7
    assert {g.place for g in found if g.kind == "internal"} == five


def test_listing_counts_what_a_channel_costs():
    net = Autoencoder(SMALL, 10, (12, 8), 5)
    rows = {
        row["group"]: row
        for row in listing(net, SMALL, component_groups(net, torch.zeros(2, *SMALL)))
    }
    assert rows["encoder.fc1"]["parameters a channel"] == 64 + 1 + 8
    assert rows["encoder.fc3"] == {
        "group": "encoder.fc3",
        "kind": "coupling",
        "place": "encoder > decoder",
        "channels": 5,
        "layers": 2,
        "parameters a channel": 8 + 1 + 8,
        "protected": False,
    }


def test_components_of_ones_own():
    net = BatchNormNet()
    parts = {"eyes": ["conv1", "norm1"], "rest": ["conv2", "norm2", "fc"]}
    found = component_groups(net, torch.zeros(2, *SMALL), parts)
    assert [(g.name, g.place) for g in found] == [("conv1", "eyes > rest"), ("conv2", "rest")]
    # Without any said, the children of the net are its components.
    assert component_groups(net, torch.zeros(2, *SMALL))[1].components == ("conv2", "norm2", "fc")


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
    found = component_groups(net, torch.zeros(2, *SMALL), protect=[name])
    assert [g.name for g in found if g.protected] == protected


@pytest.mark.parametrize(
    ("components", "protect", "words"),
    [
        (None, ["head"], "protect = 'head': protectable are coupling, decoder, .*encoder"),
        ({"encoder": ["coder"]}, [], "component encoder = 'coder': a module of the model, as"),
        ({"all": [""]}, [], "component all = '': a module"),
        (
            {"encoder": ["encoder"], "first": ["encoder.fc1"]},
            [],
            "component first = 'encoder.fc1': overlaps encoder of component encoder",
        ),
        ({"encoder": ["encoder"]}, [], "components = .*layer decoder.fc1 is in none"),
    ],
)
def test_bad_components_are_refused(components, protect, words):
    with pytest.raises(InputError, match=words) as caught:
        component_groups(
            Autoencoder(SMALL, 10, (12, 8), 5), torch.zeros(2, *SMALL), components, protect
        )
    assert one_line(caught)


@pytest.mark.parametrize("number", range(4))
def test_parameters_are_those_of_the_small_net(number):
    net, shape = nets()[number]
    channels = Channels(net, shape, "parameters", norms=True)
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


def test_narrow_fits_one_copy_again_and_again_and_leaves_the_net_alone():
    net = Autoencoder(SMALL, 10, (6, 4), 3)
    before = copy.deepcopy(net.state_dict())
    make = Narrow(net, plain(net, SMALL))
    full = [torch.arange(g.channels) for g in plain(net, SMALL)]
    x = torch.randn(2, *SMALL)
    assert make([torch.tensor([0]) for _ in full], own=False)(x).shape == x.shape
    torch.testing.assert_close(make(full, own=False)(x), net(x), rtol=0, atol=0)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_importance_is_torch_prunings():
    net = randomise(Autoencoder(SMALL, 10, (4, 6), 5, convolutional=True))
    groups = plain(net, SMALL)
    x = torch.randn(3, *SMALL)
    net(x).square().mean().backward()
    graph = torch_pruning.DependencyGraph().build_dependency(net, x, verbose=False)
    theirs = torch_pruning.importance.GroupTaylorImportance()
    for group, score in zip(groups, shrink.taylor(net, groups), strict=True):
        layer = net.get_submodule(group.name)
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        every = graph.get_pruning_group(layer, cut, list(range(group.channels)))
        torch.testing.assert_close(score, theirs(every))
        assert score.mean().item() == pytest.approx(1, rel=1e-5)


def test_the_group_norm_of_a_latent_channel_by_hand():
    net, shape = Autoencoder(SMALL, 10, (12, 8), 5, head=64), SMALL
    channels = Channels(net, shape, "parameters", ["encoder.fc3"])
    read = [net.decoder.fc1.weight, net.classifier.fc1.weight]
    sums = [net.encoder.fc3.weight.square().sum(1), *(w.square().sum(0) for w in read)]
    expected = torch.stack(sums).mean(0).detach()
    score = importance(channels, net, GroupL2.measure)
    torch.testing.assert_close(score, expected / expected.mean())


def budget(numbers=(4, 3), **values):
    net = nn.Sequential(
        nn.Linear(2, numbers[0]),
        nn.ReLU(),
        nn.Linear(numbers[0], numbers[1]),
        nn.Linear(numbers[1], 2),
    )
    positions = spread_out([torch.arange(n).float() for n in numbers])
    return Budget(Channels(net, (2,), "parameters"), positions, **values)


def test_positions_are_even_ranks():
    (position,) = spread_out([torch.tensor([0.3, 0.1, 0.2, 9.0])])
    assert position.tolist() == [0.625, 0.125, 0.375, 0.875]


def test_channels_below_the_number_go_and_one_stays():
    made = budget()
    assert made.kept([0.0, 0.0]) == [4, 3]
    # Ranks 1/8, 3/8, ... of the first group, 1/6, 1/2, 5/6 of the second.
    assert made.kept([0.4, 0.4]) == [2, 2]
    assert made.kept([9.0, 0.0]) == [1, 3]
    assert budget(most=0.5).kept([9.0, 9.0]) == [2, 2]
    assert budget(frozen=[True, False]).kept([9.0, 9.0]) == [4, 1]
    assert [i.tolist() for i in made.indices([2, 1])] == [[2, 3], [2]]


def test_the_target_is_met_from_above_and_hardly():
    made = budget()
    assert made.channels.dense == 12 + 15 + 8
    kept = made.meet([0.0, 0.0], 0.3)
    assert made.removed(kept) >= 0.3
    for i, k in enumerate(kept):
        more = [*kept[:i], k + 1, *kept[i + 1 :]]
        assert k == made.full[i] or made.removed(more) < 0.3
    assert made.meet([0.0, 0.0], 0.9) is None
    assert made.meet([0.9, 0.0], 0.3)[0] < made.meet([0.0, 0.9], 0.3)[0]


def test_every_part_gives_up_the_target_of_its_own():
    net = models.build("autoencoder", (1, 28, 28), 10)
    channels = Channels(net, (1, 28, 28), "parameters")
    positions = spread_out([torch.rand(group.channels) for group in channels.groups])
    made = Budget(channels, positions, frozen=[False, False, True, False, False])
    sizes = [measure.parameters(part) for part in (net.encoder, net.decoder)]
    inside = [0, 1], [3, 4]
    parts = [(part, n / channels.dense) for part, n in zip(inside, sizes, strict=True)]
    kept = made.meet([0.5, 0.0, 0.0, 0.0, 0.0], 0.6, parts)
    assert kept[2] == 32
    small = narrow(net, channels.groups, made.indices(kept))
    left = [measure.parameters(part) for part in (small.encoder, small.decoder)]
    assert [1 - a / b for a, b in zip(left, sizes, strict=True)] == pytest.approx(
        [0.6] * 2, abs=0.01
    )
    assert 0 <= made.removed(kept) - 0.6 < 1e-3


def test_parameters_of_soft_channels_are_differentiable():
    soft = torch.full((7,), 0.5, requires_grad=True)
    budget().channels.cost(soft).backward()
    # Two inputs, a bias and half of three outputs; of the other group half of four inputs more.
    assert soft.grad.tolist() == pytest.approx([2 + 1 + 1.5] * 4 + [2 + 1 + 2] * 3)


@pytest.mark.parametrize("target", [0.0, 1.0, 1, -0.1, 1.5, None, float("nan")])
def test_targets_outside_zero_to_one_are_refused(target):
    with pytest.raises(InputError, match=r"target = .*share of parameters to remove"):
        require_target(target, 0.01)


def test_a_tolerance_of_zero_is_refused():
    with pytest.raises(InputError, match=r"tolerance = 0.0: a share above 0"):
        require_target(0.5, 0.0)
