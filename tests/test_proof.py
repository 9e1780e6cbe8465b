"""Nets that dependency graphs get wrong: the small net is the gated one, or the module is named."""

import copy
import random
import re
import warnings

import pytest
import torch
from conftest import BatchNormNet, apart, one_line, refusal, refused
from test_groups import Net
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from prunestudy import shrink
from prunestudy.errors import InputError

IMAGE = torch.zeros(2, 1, 8, 8)
ROW = torch.zeros(2, 16)
TOKENS = torch.zeros(3, 5, 8)
WORDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
SERIES = torch.zeros(2, 6, 12)


def conv(a, b, k=1, **options):
    return nn.Conv2d(a, b, k, **options)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 1e6 else -x


class NoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(8, 8)

    def forward(self, x):
        with torch.no_grad():
            return self.conv(x)


class Unread(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(1, 8, 3), conv(8, 4)

    def forward(self, x):
        x = self.a(x)
        self.b(x)
        return x


class Buffered(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("scale", torch.arange(1.0, channels + 1).view(-1, 1, 1))

    def forward(self, x):
        return x * self.scale


class Only(nn.Module):
    """Runs a function, as a module of the net."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


class InTraining(Only):
    """Runs it in training mode alone."""

    def forward(self, x):
        return self.function(x) if self.training else x


class Auxiliary(nn.Module):
    """In training mode it returns features as well."""

    def __init__(self, head):
        super().__init__()
        self.a, self.b, self.head = conv(1, 8, 3), conv(8, 4), head

    def forward(self, x):
        x = self.a(x).relu()
        return [self.b(x), self.head(x)] if self.training else self.b(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.b, self.c, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out((x + self.c(self.b(x).relu())).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.a, self.cell = nn.Linear(8, 6), kind(6, 7, batch_first=True)
        self.b, self.out = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.b(self.cell(self.a(x))[0][:, -1]).relu())


def net(forward, **layers):
    return lambda: Net(forward, **layers)


def after_a(middle, channels=8, last=None, first=None):
    """Convolution a, `middle`, convolution c that reads `channels`."""
    layers = {"a": first or conv(1, 8, 3), "c": last or conv(channels, 3)}
    if isinstance(middle, nn.Module):
        return net(lambda n, x: n.c(n.m(n.a(x))), m=middle, **layers)
    return net(lambda n, x: n.c(middle(n.a(x))), **layers)


def zeroed(some):
    def zero(x):
        x = x.clone()
        x[:, some] = 0
        return x

    return zero


def tied():
    made = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.Linear(16, 8))
    made[3].weight = made[0].weight
    return made


def tied_by_memory():
    made = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
    made[2].weight = nn.Parameter(made[0].weight.detach().t())
    return made


def joined(c, d, halves):
    return torch.cat([c(halves[0]), d(halves[1])], 1)


HALF = {"c": conv(4, 3), "d": conv(4, 3), "a": conv(1, 8, 3)}
# Nets that must come out exact: the net, its inputs, the groups that it has.
EXACT = {
    "in place, on views": (
        net(
            lambda n, x: n.d(n.b(n.c(x)[0].relu_()).relu_()),
            c=nn.LSTM(8, 5),
            b=nn.Linear(5, 4),
            d=nn.Linear(4, 3),
        ),
        TOKENS,
        "b",
    ),
    "flat, then joined": (
        net(
            lambda n, x: n.c(torch.cat([n.p(n.a(x)).flatten(1).relu(), n.b(x.flatten(1))], -1)),
            a=conv(1, 4, 3),
            b=nn.Linear(64, 5),
            c=nn.Linear(21, 3),
            p=nn.AdaptiveMaxPool2d(2),
        ),
        IMAGE,
        "a b",
    ),
    "joined, then flat": (
        net(
            lambda n, x: n.c(torch.cat([n.a(x), n.b(x), n.a(x)], 1).flatten(1)),
            a=conv(1, 4, 3),
            b=conv(1, 5, 3),
            c=nn.Linear(13 * 36, 3),
        ),
        IMAGE,
        "a b",
    ),
    "pooled at two scales": (
        net(
            lambda n, x: n.c(torch.cat([p(n.a(x)).flatten(1) for p in (n.one, n.two)], 1)),
            a=conv(1, 4, 3),
            c=nn.Linear(20, 3),
            one=nn.AdaptiveAvgPool2d(1),
            two=nn.AdaptiveMaxPool2d(2),
        ),
        IMAGE,
        "a",
    ),
    "a parameter of no numbers": (
        net(
            lambda n, x: n.c(n.a(x)),
            a=nn.Linear(16, 6),
            c=nn.Linear(6, 3),
            none=nn.ParameterList([torch.zeros(0, 4)]),
        ),
        ROW,
        "a",
    ),
    "an MLP on 16 numbers": (
        lambda: nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 3)),
        ROW,
        "0",
    ),
    "convolutions on a series": (
        lambda: nn.Sequential(
            nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(80, 3)
        ),
        SERIES,
        "0",
    ),
    "convolutions of volumes": (
        lambda: nn.Sequential(nn.Conv3d(1, 6, 3), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(48, 3)),
        torch.zeros(2, 1, 6, 6, 6),
        "0",
    ),
    "tokens": (
        net(
            lambda n, x: n.out(n.norm(x + n.b(F.gelu(n.a(n.norm(x))))).mean(1)),
            a=nn.Linear(8, 12),
            b=nn.Linear(12, 8),
            norm=nn.LayerNorm(8),
            out=nn.Linear(8, 3),
        ),
        TOKENS,
        "a",
    ),
    "group norms": (
        net(
            lambda n, x: n.out(F.silu(n.last(n.b(F.silu(n.norm(n.a(x)))))).mean((2, 3))),
            a=conv(1, 6, 3, padding=1),
            norm=nn.GroupNorm(3, 6),
            b=conv(6, 8, 3, padding=1),
            last=nn.GroupNorm(2, 8),
            out=nn.Linear(8, 3),
        ),
        IMAGE,
        "a b",
    ),
    "gated linear units": (
        net(
            lambda n, x: n.out(F.glu(n.b(n.glu(n.a(x))), dim=1).mean((2, 3))),
            a=conv(1, 12, 3),
            glu=nn.GLU(1),
            b=conv(6, 8, 3),
            out=nn.Linear(4, 3),
        ),
        IMAGE,
        "a b",
    ),
    "a layer whose weight the net's own code reads": (
        net(
            lambda n, x: n.out(F.linear(x, n.own.weight) + n.b(n.a(x).relu())).mean(1),
            own=nn.Linear(8, 8),
            a=nn.Linear(8, 12),
            b=nn.Linear(12, 8),
            out=nn.Linear(8, 3),
        ),
        TOKENS,
        "a",
    ),
    "flat tokens": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 3)),
        TOKENS,
        "0",
    ),
    "words": (
        net(
            lambda n, x: n.out(n.b(n.a(n.words(x)).relu()).relu().mean(1)),
            words=nn.Embedding(20, 8),
            a=nn.Linear(8, 12),
            b=nn.Linear(12, 6),
            out=nn.Linear(6, 3),
        ),
        WORDS,
        "a b",
    ),
    "two inputs": (
        net(
            lambda n, x, y: n.out(torch.cat([n.a(x), n.b(y), y], 1).relu()),
            a=nn.Linear(16, 5),
            b=nn.Linear(4, 6),
            out=nn.Linear(15, 3),
        ),
        (ROW, torch.zeros(2, 4)),
        "a b",
    ),
    "an image and words": (
        net(
            lambda n, x, y: n.out(n.a(x).mean((2, 3)) + n.b(n.words(y)).sum(1)),
            a=conv(1, 6, 3),
            words=nn.Embedding(20, 4),
            b=nn.Linear(4, 6),
            out=nn.Linear(6, 3),
        ),
        (torch.zeros(3, 1, 8, 8), WORDS),
        "a",
    ),
    "norms without parameters": (
        lambda: nn.Sequential(
            conv(1, 6, 3),
            nn.BatchNorm2d(6, affine=False),
            nn.ReLU(),
            conv(6, 5),
            nn.InstanceNorm2d(5),
            conv(5, 3),
        ),
        IMAGE,
        "0 3",
    ),
    "an instance norm": (
        lambda: nn.Sequential(
            conv(1, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), conv(6, 3)
        ),
        IMAGE,
        "0",
    ),
    "attention": (Attention, TOKENS, "b"),
    "an LSTM": (Recurrent, TOKENS, "b"),
    "an LSTM in float64": (lambda: Recurrent().double(), TOKENS.double(), "b"),
    "a GRU": (lambda: Recurrent(nn.GRU), TOKENS, "b"),
    "ragged groups": (
        net(
            lambda n, x: n.c(n.g(torch.cat([n.a(x), n.b(x)], 1)).relu()),
            a=conv(1, 3, 3),
            b=conv(1, 5, 3),
            g=conv(8, 6, groups=2),
            c=conv(6, 3),
        ),
        IMAGE,
        "a b g",
    ),
    "depth-wise, twice as many channels": (
        lambda: nn.Sequential(conv(1, 4, 3), conv(4, 8, 3, groups=4), nn.ReLU(), conv(8, 3)),
        IMAGE,
        "0 1",
    ),
    "a weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(conv(1, 6, 3)), nn.ReLU(), conv(6, 3)),
        IMAGE,
        "0",
    ),
    "a branch with pooling": (
        net(
            lambda n, x: n.c(n.a(x) + n.d(F.max_pool2d(n.b(x), 3, 1, 1))),
            a=conv(1, 4),
            b=conv(1, 5),
            d=conv(5, 4),
            c=conv(4, 3),
        ),
        IMAGE,
        "a b",
    ),
    "one-hot words": (
        net(
            lambda n, x: n.out(n.a(F.one_hot(x, 20).to(n.a.weight.dtype)).relu().mean(1)),
            a=nn.Linear(20, 6),
            out=nn.Linear(6, 3),
        ),
        WORDS,
        "a",
    ),
    "a layer that runs twice": (
        net(lambda n, x: n.c(n.b(n.b(n.a(x)).relu())), a=conv(1, 6, 3), b=conv(6, 6), c=conv(6, 3)),
        IMAGE,
        "a",
    ),
    "a branch on the batch": (after_a(Only(lambda x: x.tanh() if len(x) > 1 else x)), IMAGE, "a"),
    "noise of any shape in training": (
        after_a(InTraining(lambda x: x + torch.randn_like(x))),
        IMAGE,
        "a",
    ),
    "noise behind what is cut": (
        net(
            lambda n, x: n.m(n.c(n.a(x))),
            a=conv(1, 8, 3),
            c=conv(8, 3),
            m=InTraining(torch.rand_like),
        ),
        IMAGE,
        "a",
    ),
    "draws of Python in training": (after_a(InTraining(lambda x: x * random.random())), IMAGE, "a"),
    "layers called by keyword": (
        net(
            lambda n, x: n.c(input=n.u(n.norm(input=n.a(x)), output_size=[8, 8])),
            a=conv(1, 6, 3),
            norm=nn.BatchNorm2d(6),
            u=nn.ConvTranspose2d(6, 5, 3),
            c=conv(5, 3),
        ),
        IMAGE,
        "a u",
    ),
    "two channels eight times": (
        lambda: nn.Sequential(
            *(conv(1 if i == 0 else 2, 2) if j else nn.ReLU() for i in range(8) for j in (1, 0)),
            conv(2, 3),
        ),
        IMAGE,
        "0 10 12 14 2 4 6 8",
    ),
    "a head of training": (lambda: Auxiliary(Only(lambda x: x.mean())), IMAGE, None),
}
# Nets that are refused: the net, its inputs, the module to blame.
REFUSED = {
    "channels that the net's own code reads": (
        net(
            lambda n, x: n.out(F.linear(n.a(x), n.own.weight).relu()),
            a=nn.Linear(16, 12),
            own=nn.Linear(12, 6),
            out=nn.Linear(6, 3),
        ),
        ROW,
        "own|out|the net itself",
    ),
    "the second half": (after_a(lambda x: x.chunk(2, 1)[1], 4), IMAGE, "c"),
    "halves in two layers": (
        net(lambda n, x: n.c(n.a(x)[:, :4]) + n.d(n.a(x).chunk(2, 1)[1]), **HALF),
        IMAGE,
        "[cd]",
    ),
    "chunks of chunks": (after_a(lambda x: x.chunk(2, 1)[0].chunk(2, 1)[1], 2), IMAGE, "c"),
    "a slice": (after_a(lambda x: x[:, :6], 6), IMAGE, "c"),
    "a slice from the end": (after_a(lambda x: x[:, -3:], 3), IMAGE, "c"),
    "narrow": (after_a(lambda x: x.narrow(1, 2, 4), 4), IMAGE, "the net itself"),
    "every second": (after_a(lambda x: x[:, ::2], 4), IMAGE, "c"),
    "two of them": (after_a(lambda x: x[:, [5, 1]], 2), IMAGE, "c"),
    "selected": (
        after_a(lambda x: x.index_select(1, torch.tensor([1, 2, 6])), 3),
        IMAGE,
        "the net itself",
    ),
    "the first two at zero": (after_a(zeroed(slice(2))), IMAGE, "c"),
    "the last two at zero": (after_a(zeroed(slice(-2, None))), IMAGE, "c"),
    "an output that nothing reads": (after_a(Only(lambda x: x), first=Unread()), IMAGE, "a.b"),
    "flipped": (after_a(lambda x: x.flip(1)), IMAGE, "c"),
    "rolled": (after_a(lambda x: x.roll(1, 1)), IMAGE, "c"),
    "cumulated": (after_a(Only(lambda x: x.cumsum(1))), IMAGE, "m"),
    "sorted": (after_a(Only(lambda x: x.sort(1).values)), IMAGE, "m"),
    "softmax": (after_a(nn.Softmax(1)), IMAGE, "m"),
    "normalised": (after_a(Only(lambda x: F.normalize(x, dim=1))), IMAGE, "m"),
    "less its mean": (after_a(Only(lambda x: x - x.mean(1, keepdim=True))), IMAGE, "m"),
    "pooled over channels": (after_a(nn.MaxPool3d(3, 1, 1)), IMAGE, "m"),
    "shuffled": (after_a(nn.ChannelShuffle(2)), IMAGE, "[mc]"),
    "pixels shuffled": (after_a(nn.PixelShuffle(2), 2), IMAGE, "[mc]"),
    "response norm": (after_a(nn.LocalResponseNorm(3)), IMAGE, "m"),
    "a layer without a gradient": (after_a(NoGrad()), IMAGE, r"m\.conv"),
    "half without a gradient": (
        net(
            lambda n, x: n.c(n.a(x)) + n.d(n.a(x).detach()),
            a=conv(1, 4, 3),
            c=conv(4, 3),
            d=conv(4, 3),
        ),
        IMAGE,
        "d",
    ),
    "a branch on values": (after_a(Branching()), IMAGE, "m"),
    "an index of values": (after_a(Only(lambda x: x * x.max().item())), IMAGE, "m"),
    "a view of fixed size": (
        net(lambda n, x: n.c(n.a(x).view(-1, 8 * 6 * 6)), a=conv(1, 8, 3), c=nn.Linear(288, 3)),
        IMAGE,
        "the net itself|c",
    ),
    "an unflatten": (
        net(
            lambda n, x: n.c(n.u(n.a(x))),
            a=nn.Linear(16, 8),
            u=nn.Unflatten(1, (2, 2, 2)),
            c=conv(2, 3),
        ),
        ROW,
        "u",
    ),
    "padded with channels": (after_a(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), 10), IMAGE, "c"),
    "less the mean of all": (after_a(lambda x: x - x.mean()), IMAGE, "c"),
    "a buffer": (after_a(Buffered(8)), IMAGE, "m"),
    "a constant": (after_a(Only(lambda x: x + torch.linspace(0, 1, 8).view(-1, 1, 1))), IMAGE, "m"),
    "a matrix of channels": (
        after_a(Only(lambda x: torch.einsum("nchw,cd->ndhw", x, torch.ones(8, 8).triu()))),
        IMAGE,
        "m",
    ),
    "noise of a fixed shape in training": (
        after_a(InTraining(lambda x: x * torch.rand(8, 1, 1))),
        IMAGE,
        "m",
    ),
    "a fixed shape and draws of Python in training": (
        after_a(InTraining(lambda x: x * torch.full((8, 1, 1), random.random()))),
        IMAGE,
        "m",
    ),
    "normalised in training, with noise": (
        net(
            lambda n, x: n.c(n.m(n.a(x))) + torch.rand(3, 1, 1),
            a=conv(1, 8, 3),
            m=InTraining(lambda x: F.normalize(x, dim=1)),
            c=conv(8, 3),
        ),
        IMAGE,
        "m",
    ),
    "normalised where the user's values are": (
        after_a(Only(lambda x: torch.where(x.abs().amax() > 50, F.normalize(x, dim=1), x))),
        1000 * torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        "m",
    ),
    "a weight used twice": (tied, ROW, "3"),
    "a transposed weight": (tied_by_memory, ROW, "2"),
    "a head of layers in training": (lambda: Auxiliary(conv(8, 2)), IMAGE, "head"),
    "features in training": (lambda: Auxiliary(nn.Identity()), IMAGE, "[ab]|the net itself"),
    "sums over channels in training": (
        lambda: Auxiliary(Only(lambda x: x.sum(1))),
        IMAGE,
        "a|b|head|the net itself",
    ),
}


def small_and_gated(model, example, seed):
    """Random channels of every layer gone: the small net, and the given one without them."""
    generator, gated, keep = torch.Generator().manual_seed(seed), shrink.fold(model), {}
    for group in shrink.groups(model, example):
        n = group.channels
        count = int(torch.randint(1, max(n, 2), (), generator=generator))
        stay = set(torch.randperm(n, generator=generator)[:count].tolist())
        for m in group.members:
            gone = [i for c, each in enumerate(m.indices) if c not in stay for i in each]
            layer = gated.get_submodule(m.layer)
            if m.role == "produces":
                keep.setdefault(m.layer, set(range(m.size))).difference_update(gone)
            if m.role == "consumes":
                weight = layer.weight.data.movedim(shrink.axis_of(layer, "in"), 1)
                weight[:, [i for i in gone if i < weight.shape[1]]] = 0
    return shrink.remove(model, keep, example), gated


@pytest.mark.parametrize("name", EXACT)
def test_the_small_net_is_the_gated_one(name):
    make, example, names = EXACT[name]
    torch.manual_seed(0)
    model = make()
    if names is None:
        refused(lambda: shrink.groups(model, example), "module = ")
        return
    model = model.double()
    example = tuple(
        x.double() if x.is_floating_point() else x
        for x in (example if isinstance(example, tuple) else (example,))
    )
    found = shrink.groups(model, example)
    assert sorted({g.name.partition(":")[0] for g in found}) == names.split()
    example = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in example)
    for seed in range(3):
        small, gated = small_and_gated(model, example, seed)
        for count in (1, 2):
            batch = [x[:count] for x in example]
            with torch.no_grad():
                assert apart(small.eval()(*batch), gated.eval()(*batch)) < 1e-9


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_is_named(name):
    make, example, module = REFUSED[name]
    torch.manual_seed(0)
    model = make()
    with pytest.raises(InputError) as caught:
        shrink.groups(model, example)
    assert re.match(f"module = '({module})': ", one_line(caught)), one_line(caught)
    assert "nothing reads" not in name or "the output does not depend on it" in one_line(caught)


@pytest.mark.parametrize(
    ("middle", "example"),
    [
        (lambda n, x: n.a(x) * (x > 10).all(1, keepdim=True), ROW),
        (lambda n, x: n.a((x - 5).relu()), ROW),
        (lambda n, x: n.a(x / 255), ROW.to(torch.uint8)),
        (lambda n, x, mask: n.a(x) * mask, (torch.rand(2, 16), torch.zeros(2, 1) > 0)),
        (lambda n, x, mask: n.a(x) * mask, (torch.rand(2, 16), torch.zeros(2, 1).long())),
    ],
)
def test_channels_without_an_effect_are_not_proven(middle, example):
    a, c = nn.Linear(16, 8, bias=False), nn.Linear(8, 3)
    model = Net(lambda n, *x: n.c(F.normalize(middle(n, *x), dim=1)), a=a, c=c)
    why = "on inputs like the example no output depends on the channels of 'a' that it reads"
    line = f"module = 'c': cannot be pruned: {why}: nothing to compare"
    assert refusal(lambda: shrink.remove(model, {"a": [0, 1, 5]}, example)) == line


def test_what_the_users_values_prove():
    model = Net(lambda n, x: n.c(n.a((x - 5).relu())), a=nn.Linear(16, 8), c=nn.Linear(8, 3))
    x = 100 * torch.rand(9, 16, generator=torch.Generator().manual_seed(0))
    assert shrink.remove(model, {"a": [1, 5]}, x).c.in_features == 2


def hooked(how):
    made = nn.Sequential(conv(1, 6, 3), nn.ReLU(), conv(6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how(made[0])
    made(IMAGE)  # leaves a tensor that is no parameter on the layer
    return made


@pytest.mark.parametrize(
    "how",
    [
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
)
def test_weights_made_of_others_are_folded_or_refused(how):
    model = hooked(how).double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    plain = shrink.fold(model)
    assert sorted(plain.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert torch.equal(plain(x), model(x))
    small, gated = small_and_gated(model, x, 0)
    assert apart(small(x), gated(x)) < 1e-9
    refused(lambda: shrink.require_ordinary(model), "module = '0'", "use fold(net)")
    shrink.require_ordinary(plain)
    assert torch.equal(shrink.folded(model, x)(x), model(x))
    for number, name in ((tied(), "3"), (tied_by_memory(), "2")):
        refused(lambda net=number: shrink.require_ordinary(net), f"module = '{name}'", "'0'")


def test_removal_by_layer_keeps_what_can_be_trained():
    model = BatchNormNet().train()
    model.norm1.eval()
    model.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small = shrink.remove(model, {"conv1": torch.tensor([0, 2])}, torch.zeros(1, 1, 8, 8))
    assert small.conv1.weight.shape == (2, 1, 3, 3)
    assert torch.equal(small.conv1.weight, model.conv1.weight[[0, 2]])
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in small.parameters()] == [False, *[True] * 8]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    small(torch.randn(4, 1, 8, 8)).sum().backward()
    layers = nn.ModuleDict({"original": nn.Linear(16, 8), "out": nn.Linear(8, 3)})
    model = Net(lambda n, x: n.m.out(n.m.original(x)), m=layers)
    parametrizations.weight_norm(model.m.out).requires_grad_(False)
    small = shrink.remove(model.requires_grad_(False), {"m.original": [1]}, ROW)
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"conv3": [0]}, ["keep = 'conv3'", "conv1, conv2"]),
        ({"fc": [0]}, ["keep = 'fc'", "allowed are conv1, conv2"]),
        ({"conv1": [0, 4]}, ["keep['conv1'] = [0, 4]", "0..3"]),
        ({"conv1": [0]}, ["keep['conv1'] = [0]", "go with others"]),
        ({"conv1": []}, ["keep = 'conv1'", "no signal is left"]),
    ],
)
def test_channels_that_cannot_go_are_refused(keep, words):
    refused(lambda: shrink.remove(BatchNormNet(), keep, IMAGE), *words)


def test_producers_of_one_group_keep_the_same_channels():
    layers = {"a": conv(1, 4), "b": conv(1, 4), "c": conv(4, 3)}
    model = Net(lambda n, x: n.c(n.a(x) + n.b(x)), **layers)
    keep = {"a": [0, 1], "b": [0, 2]}
    refused(lambda: shrink.remove(model, keep, IMAGE), "keep['b'] = [0, 2]", "'a'", "same group")
    small = shrink.remove(model, {"a": [0, 1], "b": [1, 0]}, IMAGE)
    assert (small.a.out_channels, small.b.out_channels, small.c.in_channels) == (2, 2, 2)


def test_channels_of_a_layer_norm_cannot_go_exactly():
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    by_keyword = Net(lambda n, x: n.m[2](input=n.m[1](input=n.m[0](x))), m=model)
    assert [g.name for g in shrink.groups(by_keyword, ROW)] == ["m.0"]
    assert [g.name for g in shrink.groups(model, ROW)] == ["0"]
    refused(lambda: shrink.remove(model, {"0": [1, 2]}, ROW), "module = '1'", "statistics")


def test_a_branch_that_cannot_be_emptied_keeps_a_channel():
    make, example, _ = EXACT["a branch with pooling"]
    assert {g.name: g.skippable for g in shrink.groups(make(), example)} == {"a": False, "b": False}
    plain = net(lambda n, x: n.c(n.a(x) + n.d(n.b(x).relu())), b=conv(1, 5), d=conv(5, 4))
    made = plain()
    made.a, made.c = conv(1, 4), conv(4, 3)
    assert [g.skippable for g in shrink.groups(made, IMAGE)] == [False, True]


def test_an_encoder_layer_works_without_gradients_too():
    """There torch reads the weights of its layers by itself: none can be gone."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True, norm_first=True)
    net = nn.Sequential(layer, nn.Linear(8, 3))
    (group,) = (g for g in shrink.groups(net, TOKENS) if g.name == "0.linear1")
    assert not group.skippable
    refused(lambda: shrink.remove(net, {"0.linear1": []}, TOKENS), "no signal is left")
    small, x = shrink.remove(net, {"0.linear1": [0, 5, 7]}, TOKENS).eval(), torch.randn(3, 5, 8)
    with torch.no_grad():
        faster = small(x)
    assert small[0].linear2.in_features == 3 and torch.allclose(faster, small(x), atol=1e-6)


class Moody(nn.Module):
    """A parametrisation whose value is another each time."""

    def forward(self, weight):
        return weight * torch.rand(1)


def test_a_fold_that_computes_something_else_is_refused():
    model = nn.Sequential(conv(1, 6), nn.ReLU(), conv(6, 3)).train()
    nn.utils.parametrize.register_parametrization(model[0], "weight", Moody())
    refused(lambda: shrink.folded(model, IMAGE), "model = 'Sequential': cannot be folded", "off")
    assert model.training
