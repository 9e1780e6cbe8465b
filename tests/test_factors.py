import copy
import math

import pytest
import torch
from conftest import BatchNormNet, apart, one_line, pairs_of, randomise, speed_up_at
from torch import nn
from torch.nn.utils import prune

from prunestudy import measure, models, shrink
from prunestudy.errors import InputError
from prunestudy.shrink import factors, ranks

# conv1 and 18 block convolutions of ResNet-20: filters, channels, output positions.
RESNET20 = (
    [(16, 3, 1024)]
    + [(16, 16, 1024)] * 6
    + [(32, 16, 256)]
    + [(32, 32, 256)] * 5
    + [(64, 32, 64)]
    + [(64, 64, 64)] * 5
)
NO_FORCE = [8, 13, 13, 14, 14, 14, 13, 23, 26, 27, 28, 28, 28, 47, 54, 56, 55, 56, 31]
L2_FORCE = [8, 9, 10, 10, 10, 9, 10, 8, 9, 9, 10, 9, 8, 2, 1, 1, 1, 1, 1]


def layer(kind="conv", groups=1, dtype=torch.float64, seed=0, **values):
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Linear(12, 7, dtype=dtype, **values)
    return nn.Conv2d(6, 8, 3, groups=groups, dtype=dtype, **values)


def images(dtype=torch.float64, side=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 6, side, side, dtype=dtype, generator=generator)


def diagonal(values, dtype=torch.float64):
    """A linear layer whose singular values are `values`."""
    net = nn.Sequential(nn.Linear(len(values), len(values), dtype=dtype))
    net[0].weight.data = torch.diag(torch.tensor(values, dtype=dtype))
    return net


def lost(whole, rank):
    """The share of the squared energy that factors of `rank` lose."""
    rest = (whole.weight - factors.merged(shrink.factorise_layer(whole, rank))).detach()
    return float(rest.square().sum() / whole.weight.detach().square().sum())


# --- published speed-ups from published ranks


@pytest.mark.parametrize(
    ("shape", "rank", "published"),
    [
        ((384, 256, 1), 184, 1.79),
        ((384, 384, 2), 201, 1.72),
        ((256, 384, 2), 146, 1.63),
        ((384, 256, 1), 124, 2.65),
        ((384, 384, 2), 106, 3.26),
        ((256, 384, 2), 129, 1.85),
    ],
)
def test_the_theory_column_of_the_alexnet_table(shape, rank, published):
    filters, channels, groups = shape
    whole = nn.Conv2d(channels, filters, 3, groups=groups)
    assert shrink.layer_speed_up(whole, rank) == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize(("found", "derived"), [(NO_FORCE, 1.09), (L2_FORCE, 2.87)])
def test_the_speed_up_of_resnet20_from_the_authors_ranks(found, derived):
    net = models.build("resnet20", (3, 32, 32), 10)
    names = list(factors.layers_to_factorise(net))
    assert [net.get_submodule(n).weight.shape[:2] for n in names] == [r[:2] for r in RESNET20]
    macs = measure.layer_macs(net, torch.zeros(1, 3, 32, 32))
    got = speed_up_at(net, macs, dict(zip(names, found, strict=True)))
    dense = sum(n * c * 9 * at for n, c, at in RESNET20)
    low = sum(m * (c * 9 + n) * at for (n, c, at), m in zip(RESNET20, found, strict=True))
    assert got == pytest.approx(dense / low, rel=1e-12)
    assert got == pytest.approx(derived, abs=0.01)


# --- factors


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"bias": False},
        {"groups": 2},
        {"stride": 2, "padding": 1, "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_at_full_rank_a_convolution_equals_its_factors(values, dtype, most):
    whole = layer(dtype=dtype, **values)
    full = factors.full_rank(whole)
    pair = shrink.factorise_layer(whole, full)
    assert full == 8
    assert [type(part) for part in pair] == [nn.Conv2d, nn.Conv2d]
    assert pair[0].bias is None
    assert (pair[1].bias is None) == (whole.bias is None)
    x = images(dtype)
    assert apart(pair(x), whole(x)) < most
    assert apart(factors.merged(pair), whole.weight) < most


def test_at_full_rank_a_linear_layer_equals_its_factors():
    whole = layer("linear")
    pair = shrink.factorise_layer(whole, 7)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert apart(pair(x), whole(x)) < 1e-9
    assert [tuple(p.shape) for p in pair.parameters()] == [(7, 12), (7, 7), (7,)]


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_in_one_and_three_dimensions_equal_their_factors(kind, groups):
    torch.manual_seed(0)
    places = [9] * (1 if kind is nn.Conv1d else 3)
    settings = {"stride": 2, "padding": 1, "groups": groups, "padding_mode": "circular"}
    whole = kind(6, 8, 3, **settings, dtype=torch.float64)
    pair = shrink.factorise_layer(whole, 8)
    x = torch.randn(2, 6, *places, dtype=torch.float64)
    assert apart(pair(x), whole(x)) < 1e-9
    assert [type(part) for part in pair] == [kind, kind]
    net = shrink.factorise(nn.Sequential(whole), shrink.ranks_by_energy(nn.Sequential(whole), 0.7))
    assert list(pairs_of(net)) == ["0"]
    rank = len(net[0][0].weight)
    assert shrink.layer_speed_up(whole, rank) == 8 * whole.weight[0].numel() / (
        rank * (whole.weight[0].numel() + 8 / groups)
    )


def test_full_rank_is_bounded_by_filters_and_by_what_they_see():
    assert factors.full_rank(nn.Conv2d(1, 64, 5)) == 25
    assert factors.full_rank(nn.Conv2d(4, 64, 1, groups=2)) == 4
    assert factors.full_rank(nn.Linear(300, 100)) == 100


def test_the_mixture_is_orthonormal_and_the_basis_has_the_energy():
    pair = shrink.factorise_layer(diagonal([4.0, 1.0, 0.25])[0], 2)
    wanted = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    assert torch.allclose(factors.merged(pair), wanted, atol=1e-12)
    assert torch.allclose(pair[0].weight.norm(dim=1), wanted.diag()[:2])
    assert torch.allclose(pair[1].weight.norm(dim=0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.95, 0.99])
def test_the_energy_lost_at_a_ratio_is_at_most_its_rest_and_one_rank_less_loses_more(ratio, groups):
    whole = layer(groups=groups, seed=3)
    rank = shrink.rank_at(whole, ratio)
    assert lost(whole, rank) <= 1 - ratio
    if rank > groups:
        assert lost(whole, rank - groups) > 1 - ratio


def test_rank_by_energy_on_known_singular_values():
    whole = diagonal([2.0, 1.0, 1.0, 0.0])[0]  # squares 4, 1, 1: shares 2/3, 5/6, 1
    shares = torch.tensor([2 / 3, 5 / 6, 1, 1], dtype=torch.float64)
    assert torch.allclose(shrink.energy_shares(whole), shares)
    found = [shrink.rank_at(whole, r) for r in (0.6, 0.7, 0.83, 0.84, 1)]
    assert found == [1, 2, 2, 3, 4]
    # the norm reaches 0.7 where the energy reaches 0.49
    assert [shrink.rank_at(whole, r, "svd") for r in (0.7, 0.8, 0.85)] == [1, 1, 2]


def test_groups_share_a_rank_and_never_mix():
    whole = nn.Conv2d(4, 4, 1, groups=2, bias=False, dtype=torch.float64)
    # the first group has one direction, the second has two of equal energy
    rows = [[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    whole.weight.data = torch.tensor(rows, dtype=torch.float64).view(4, 2, 1, 1)
    assert shrink.energy_shares(whole).tolist() == pytest.approx([6 / 7, 1])
    assert shrink.rank_at(whole, 0.85) == 2
    assert shrink.rank_at(whole, 0.9) == 4
    pair = shrink.factorise_layer(whole, 2)
    assert [part.groups for part in pair] == [2, 2]
    assert torch.allclose(factors.merged(pair)[:2], whole.weight[:2])
    assert lost(whole, 2) == pytest.approx(1 / 7)


def test_a_layer_of_zeros_has_rank_one_and_a_broken_one_none():
    net = diagonal([0.0, 0.0])
    assert shrink.rank_at(net[0], 0.95) == 1
    assert not factors.merged(shrink.factorise_layer(net[0], 1)).any()
    net[0].weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"^weight = 'not finite'"):
        shrink.rank_at(net[0], 0.95)


def test_narrowing_a_pair_keeps_what_its_basis_keeps():
    whole = layer(groups=2, seed=5)
    wide = shrink.factorise_layer(whole, 8)
    direct = shrink.factorise_layer(whole, 4)
    narrowed = shrink.reduce_rank(wide, 4)
    # the mixture of a PCA has orthonormal columns, so the basis has the energy of the whole
    assert torch.allclose(factors.merged(narrowed), factors.merged(direct), atol=1e-12)
    assert torch.equal(narrowed[1].bias, whole.bias)
    assert [tuple(p.shape) for p in narrowed.parameters()] == [(4, 3, 3, 3), (8, 2, 1, 1), (8,)]


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_pair_lies_in_memory_as_its_layer_does(channels, kernel, layout):
    whole = nn.Conv2d(channels, 8, kernel).to(memory_format=layout)
    pair = shrink.factorise_layer(whole, 1)
    for part in pair:
        like = nn.Conv2d(*part.weight.shape[1::-1], part.kernel_size).to(memory_format=layout)
        assert part.weight.stride() == like.weight.stride()


# --- whole nets


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["lenet5", "convnet", "resnet20", "batch_norm"])
def test_a_net_factorised_at_full_rank_equals_the_net(name, dtype, most):
    side = 8 if name in ("batch_norm", "convnet") else 16
    torch.manual_seed(0)
    made = BatchNormNet() if name == "batch_norm" else models.build(name, (1, side, side), 10)
    net = made if name == "convnet" else randomise(made)  # its LRN takes no such numbers
    net = net.to(dtype).eval()
    before = copy.deepcopy(net.state_dict())
    every = ("conv*", "*fc*") if name != "resnet20" else ("stage*.conv?", "*shortcut*", "fc")
    small = shrink.factorise(net, shrink.ranks_by_share(net, 1.0, every))
    x = torch.randn(4, 1, side, side, dtype=dtype)
    assert len(pairs_of(small)) >= 3
    assert apart(small(x), net(x)) < most
    assert not small.training
    assert not any(p.requires_grad for p in small.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_by_default_convolutions_larger_than_1x1_are_factorised():
    net = models.build("resnet20", (1, 16, 16), 10)
    assert len(factors.layers_to_factorise(net)) == 19
    assert list(factors.layers_to_factorise(net, ("*shortcut", "fc"))) == [
        "stage2.0.shortcut",
        "stage3.0.shortcut",
        "fc",
    ]


def test_a_share_of_the_rank_is_the_same_for_every_net_of_a_kind():
    nets = [models.build("lenet5", (1, 16, 16), 10) for _ in range(2)]
    found = [shrink.ranks_by_share(net, 0.34) for net in nets]
    assert found[0] == found[1] == {"conv1": 7, "conv2": 17}
    assert shrink.ranks_by_share(nets[0], 0.001, ("conv*", "fc2")) == {
        "conv1": 1,
        "conv2": 1,
        "fc2": 1,
    }


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.99])
def test_a_budget_of_macs_is_kept_and_shared_at_one_ratio_of_energy(share):
    torch.manual_seed(0)
    net, shape = models.build("convnet", (1, 8, 8), 10), (1, 8, 8)
    found = shrink.ranks_by_macs(net, measure.layer_macs(net, torch.zeros(1, *shape)), share)
    x = torch.zeros(1, *shape)
    assert measure.macs(shrink.factorise(net, found), x) <= share * measure.macs(net, x)
    # all layers keep the same share of energy, and a little more of it breaks the budget
    least = min(float(shrink.energy_shares(net.get_submodule(n))[m - 1]) for n, m in found.items())
    assert ranks.cheaper(net, shrink.ranks_by_energy(net, least)) == found
    more = ranks.cheaper(net, shrink.ranks_by_energy(net, least + 1e-12))
    assert measure.macs(shrink.factorise(net, more), x) > share * measure.macs(net, x)


def squared_error(net, *names, weights=()):
    """A loss of nets like `net`: what the squared energy of the named layers has lost."""
    known = {n: net.get_submodule(n).weight.detach().clone() for n in names}
    scale = dict(zip(names, weights or [1.0] * len(names), strict=True))

    def loss(other):
        rest = {n: other.get_submodule(n).weight - w for n, w in known.items()}
        return sum(scale[n] * float(r.square().sum()) for n, r in rest.items())

    return loss


def test_ranks_by_loss_of_three_layers_by_hand():
    rows = [[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0, 0.0]]
    net = nn.Sequential(*(diagonal(values)[0] for values in rows))
    macs = measure.layer_macs(net, torch.zeros(1, 5, dtype=torch.float64))
    assert macs == {f"{i}.weight": 25 for i in range(3)}  # rank 2 costs 20 MACs, rank 1 costs 10
    # Loss per MAC from whole to rank 2 to rank 1: layer 0: 14 / 5, 16 / 10, on a convex curve
    # 30 / 15 each; layer 1: 0 and 0; layer 2: 0 and 9 / 10.
    for budget, wanted in {
        75: {},
        74: {"1": 2},
        60: {"1": 1},
        56: {"1": 1, "2": 2},
        52: {"1": 1, "2": 1},
        44: {"0": 2, "1": 1, "2": 1},
        30: {"0": 1, "1": 1, "2": 1},
    }.items():
        loss = squared_error(net, "0", "1", "2")
        assert shrink.ranks_by_macs(net, macs, budget / 75, ("*",), loss) == wanted


def test_a_rank_at_which_the_loss_is_not_finite_is_passed_over():
    """At ranks 7, 3 and 1 layer 0 loses inf, 4.5 and 5.5, layer 1 next to nothing."""
    net = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(2)))
    whole = [layer.weight.detach().clone() for layer in net]
    lost = ({7: math.inf, 3: 4.5, 1: 5.5}, {7: 0.01, 3: 0.1, 1: 0.2})

    def loss(other):
        ranks = [int(torch.linalg.matrix_rank(layer.weight)) for layer in other]
        same = [torch.equal(a.weight, b) for a, b in zip(other, whole, strict=True)]
        rows = zip(same, lost, ranks, strict=True)
        return 0.5 + sum(0.0 if each else table[rank] for each, table, rank in rows)

    macs = {"0.weight": 256, "1.weight": 256}
    assert shrink.ranks_by_macs(net, macs, 0.6, ("*",), loss) == {"1": 1}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.65, 0.8, 0.99])
def test_a_budget_by_loss_is_kept_to_one_rank(share):
    torch.manual_seed(0)
    net, x = models.build("convnet", (1, 8, 8), 10), torch.zeros(1, 1, 8, 8)
    before, macs = copy.deepcopy(net.state_dict()), measure.layer_macs(net, x)
    names, limit = ("conv1", "conv2", "conv3"), share * measure.macs(net, x)
    loss = squared_error(net, *names, weights=(1.0, 5.0, 2.0))
    found = shrink.ranks_by_macs(net, macs, share, (), loss)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert ranks.cheaper(net, found) == found
    assert measure.macs(shrink.factorise(net, found), x) <= limit
    # The rank that was taken last did not fit.
    higher = [ranks.cheaper(net, found | {name: found[name] + 1}) for name in found]
    assert max(measure.macs(shrink.factorise(net, more), x) for more in higher) > limit


def test_a_layer_that_the_loss_sees_is_the_last_to_lose_rank():
    torch.manual_seed(0)
    net, x = models.build("convnet", (1, 8, 8), 10), torch.zeros(1, 1, 8, 8)
    macs = measure.layer_macs(net, x)
    for seen, rest in (("conv2", "conv3"), ("conv3", "conv2")):
        found = shrink.ranks_by_macs(net, macs, 0.75, (), squared_error(net, seen))
        assert seen not in found
        assert found[rest] < 30
    # A loss that is not finite is one to stay away from.
    broken = lambda other: math.nan if squared_error(net, "conv2")(other) else 1.0  # noqa: E731
    assert "conv2" not in shrink.ranks_by_macs(net, macs, 0.75, (), broken)


def test_speed_up_from_ranks_is_that_of_the_factors():
    net, x = models.build("lenet5", (1, 16, 16), 10), torch.zeros(1, 1, 16, 16)
    found = {"conv1": 5, "conv2": 11, "fc1": 30}
    whole, part = (measure.layer_macs(n, x) for n in (net, shrink.factorise(net, found)))
    low = sum(macs for name, macs in part.items() if name.count(".") == 2)
    expected = sum(whole[f"{n}.weight"] for n in found) / low
    assert speed_up_at(net, whole, found) == pytest.approx(expected, rel=1e-12)


def test_layers_that_factors_would_not_help_stay_out():
    net = models.build("lenet5", (1, 16, 16), 10)  # conv1: 500 MACs a position, 45 for each rank
    assert ranks.cheaper(net, {"conv1": 11, "conv2": 50}) == {"conv1": 11}
    assert ranks.cheaper(net, {"conv1": 12, "conv2": 45}) == {"conv2": 45}


class Owners(nn.Module):
    """Layers that others read, that have two names, or that share a parameter."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.twice = self.again = nn.Linear(8, 8)
        self.tied, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.tied.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.masked = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)

    def forward(self, x):
        x = self.encoder(self.attention(x, x, x, need_weights=False)[0])
        return self.masked(self.normed(self.other(self.tied(self.again(self.twice(x))))))


def test_layers_that_others_read_are_left_out_and_those_with_two_names_replaced_once():
    torch.manual_seed(0)
    net = Owners().double().eval()
    names = ["twice", "tied", "other", "normed", "masked"]
    assert list(factors.layers_to_factorise(net, ("*",))) == names
    small = shrink.factorise(net, {"twice": 8, "normed": 8})
    assert small.twice is small.again
    assert list(pairs_of(small)) == ["twice", "normed"]
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert apart(small(x), net(x)) < 1e-9
    line = r"^layers = 'attention\.\*': a layer for factors: twice, tied"
    with pytest.raises(InputError, match=line):
        shrink.ranks_by_energy(net, 0.9, ("attention.*",))
    with pytest.raises(InputError, match=r"^ranks = 'attention.out_proj': a layer for factors"):
        shrink.factorise(net, {"attention.out_proj": 2})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tied", "shares a parameter with another layer; factors cannot"),
        ("normed", "its weight is computed from other tensors; make it a plain parameter first"),
        ("masked", "its weight is computed from other tensors; make it a plain parameter first"),
    ],
)
def test_weights_that_are_not_a_layers_own_are_refused(name, why):
    net = Owners()
    before = str(net)
    with pytest.raises(InputError) as caught:
        factors.factorise_in_place(net, {"twice": 2, name: 2})
    assert one_line(caught) == f"module = {name!r}: {why}"
    assert str(net) == before


# --- bad input


@pytest.mark.parametrize("rank", [0, -1, 9, 100, 2.0, True, "4"])
def test_a_rank_that_does_not_fit_is_refused(rank):
    with pytest.raises(InputError) as caught:
        shrink.factorise_layer(layer(), rank)
    assert one_line(caught) == f"rank = {rank!r}: a whole number from 1 to 8, the full rank"


def test_a_rank_that_groups_cannot_share_is_refused():
    with pytest.raises(InputError) as caught:
        shrink.factorise_layer(layer(groups=2), 3)
    assert one_line(caught) == "rank = 3: a multiple of 2, the layer's groups"


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.01, math.nan, math.inf, None, "a", True])
def test_a_ratio_outside_zero_to_one_is_refused(ratio):
    net = models.build("lenet5", (1, 16, 16), 10)
    for name, call in {
        "ratio": lambda: shrink.ranks_by_energy(net, ratio),
        "share": lambda: shrink.ranks_by_share(net, ratio),
    }.items():
        with pytest.raises(InputError) as caught:
            call()
        assert one_line(caught) == f"{name} = {ratio!r}: above 0 and at most 1"
    with pytest.raises(InputError, match="above 0 and at most 1"):
        shrink.ranks_by_macs(net, measure.layer_macs(net, torch.zeros(1, 1, 16, 16)), ratio)


def test_a_layer_that_does_not_exist_is_refused_and_the_net_is_left_alone():
    net = models.build("lenet5", (1, 16, 16), 10)
    before = [name for name, _ in net.named_modules()]
    for call in (
        lambda: shrink.factorise(net, {"conv1": 3, "conv9": 3}),
        lambda: factors.factorise_in_place(net, {"conv1": 3, "conv9": 3}),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert one_line(caught).startswith("ranks = 'conv9': a layer for factors: conv1, conv2")
    with pytest.raises(InputError, match=r"^layers = 'conv9\*': a layer for factors: conv1"):
        shrink.ranks_by_energy(net, 0.9, ("conv1", "conv9*"))
    with pytest.raises(InputError, match="a net with convolutions larger than 1x1"):
        shrink.ranks_by_energy(models.build("lenet300", (1, 8, 8), 10), 0.9)
    assert [name for name, _ in net.named_modules()] == before


def test_a_budget_below_rank_one_and_an_unknown_variant_are_refused():
    net = models.build("lenet5", (1, 16, 16), 10)
    macs = measure.layer_macs(net, torch.zeros(1, 1, 16, 16))
    for call in (
        lambda: shrink.ranks_by_macs(net, macs, 0.05),
        lambda: shrink.ranks_by_macs(net, macs, 0.05, (), lambda _: 0.0),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert one_line(caught).startswith("share = 0.05: at least 0.")
    with pytest.raises(InputError, match=r"^variant = 'qr': allowed are pca, svd"):
        shrink.rank_at(net.conv1, 0.5, "qr")
