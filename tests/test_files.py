"""Nets of one's own, made smaller, saved, loaded on a fresh net, and exported."""

import copy
import io
import json
import os
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import refusal
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from prunestudy import models, shrink
from prunestudy.shrink import files
from prunestudy.shrink.export import _is_close
from prunestudy.shrink.layers import geometry_of


class Mlp(nn.Sequential):
    def __init__(self, width=12):
        layers = nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4)
        super().__init__(*layers)


class Sound(nn.Module):
    """Conv1d on (n, 2, 20)."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(2, 6, 5, stride=2, padding=2)
        self.norm = nn.GroupNorm(2, 6)
        self.b = nn.Conv1d(6, 8, 3, padding="same", padding_mode="circular")
        self.up = nn.ConvTranspose1d(8, 4, 2, stride=2, bias=False)
        self.act = nn.PReLU(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.b(self.norm(self.a(x)).relu())
        return self.head(self.act(self.up(x)).mean(-1))


class Block(nn.Module):
    """A transformer block on tokens (n, T), whose embedding is tied to the output layer."""

    def __init__(self, d=8):
        super().__init__()
        self.embed = nn.Embedding(11, d, padding_idx=0)
        self.place = nn.Parameter(torch.zeros(5, d))
        self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d, bias=False)])
        self.attention = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 16), nn.GELU(), nn.Linear(16, d))
        self.out = nn.Linear(d, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x):
        x = self.embed(x) + self.place[: x.shape[1]]
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.out(x + self.mlp(self.norms[1](x)))


class Residual(nn.Module):
    """Two inputs, two outputs, a branch that may go; `c` runs twice, under two names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.a, self.a_norm = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.b, self.b_norm = nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6, affine=False)
        self.c = self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x, scale):
        x = self.stem(x) * scale[:, None, None, None]
        x = x + self.b_norm(self.b(self.a_norm(self.a(x)).relu()))
        x = self.again(self.c(x).relu())
        return self.head(x.mean((2, 3))), x.flatten(1)


class Wide(nn.Module):
    """Layers in three dimensions and those that keep their channels."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4))
        self.norm = nn.InstanceNorm3d(4, affine=True)
        self.b = nn.ConvTranspose3d(4, 2, 2, stride=2, output_padding=1, dilation=2)
        self.last = nn.Identity()

    def forward(self, x):
        return self.last(self.b(self.norm(self.a(x)).relu()).flatten(2).mean(-1))


def randomised(net, dtype=torch.float32):
    """`net` in eval mode, with random numbers for parameters and statistics."""
    torch.manual_seed(0)
    for tensor in net.to(dtype).state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    return net.eval()


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def narrow_mlp():
    net = randomised(Mlp())
    return shrink.remove(net, {"0": [1, 4, 5]}, torch.zeros(2, 16))


def factored_sound():
    net = randomised(Sound())
    net = shrink.factorise(net, {"a": 4, "b": 3, "head": 2})
    net.b[0].weight.data[:, 1:] = 0
    return net


def pruned_block():
    net = randomised(Block())
    net = shrink.factorise(net, {"mlp.2": 3})
    net.attention.in_proj_weight.data[5:] = 0
    net.mlp[0].weight.data[:, 1:] = 0
    return net


def cut_residual():
    net = shrink.fold(randomised(Residual()))
    net.a = shrink.Constant(0, geometry_of(net.a), bias=False)
    net.a_norm = shrink.Constant(0, None, bias=False)
    net.b = shrink.Constant(6, None)
    net.b.bias.data += torch.arange(6)
    net.b.requires_grad_(False)
    return shrink.factorise(net, {"c": 4})


def wide():
    net = randomised(Wide())
    return shrink.factorise(net, {"a.0": 2})


X2 = (drawn(3, 3, 6, 6), drawn(3))
NETS = {
    "mlp": (Mlp, narrow_mlp, drawn(3, 16)),
    "sound": (Sound, factored_sound, drawn(3, 2, 20)),
    "block": (Block, pruned_block, torch.tensor([[1, 5, 0], [2, 2, 10], [7, 3, 1]])),
    "residual": (Residual, cut_residual, X2),
    "wide": (Wide, wide, drawn(3, 1, 4, 4, 4)),
}


def given(example, count=3):
    """The example as arguments, of `count` rows."""
    every = example if isinstance(example, tuple) else (example,)
    return tuple(torch.cat([x, x])[:count] for x in every)


def run(net, *args):
    with torch.no_grad():
        found = net(*args)
    return found if isinstance(found, tuple) else (found,)


def saved(net, path, **settings):
    shrink.save(net, path, **settings)
    return path


def log_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata().get("structure", "[]"))


@pytest.fixture(params=NETS)
def each(request):
    fresh, make, example = NETS[request.param]
    return fresh, make(), example


def test_a_smaller_net_of_ones_own_comes_back_bit_for_bit(each, tmp_path):
    fresh, net, example = each
    for like in (None, fresh()):
        path = saved(net, tmp_path / "net", like=like)
        start = fresh()
        before, drawn_before = copy.deepcopy(start.state_dict()), torch.get_rng_state()
        loaded = shrink.load(path, start)
        assert torch.equal(torch.get_rng_state(), drawn_before)
        assert str(loaded) == str(net)
        assert loaded.state_dict().keys() == net.state_dict().keys()
        assert all(torch.equal(net.state_dict()[k], v) for k, v in loaded.state_dict().items())
        for a, b in zip(run(net, *given(example)), run(loaded, *given(example)), strict=True):
            assert torch.equal(a, b)
        assert all(p.requires_grad for p in loaded.parameters())
        assert not any(module.training for module in loaded.modules())
        assert all(torch.equal(before[k], v) for k, v in start.state_dict().items())
        assert str(start) == str(fresh())
        run(loaded.train(), *given(example))
        loaded(*given(example))[0].sum().backward()
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_what_is_loaded_goes_through_torch_export(each, tmp_path):
    fresh, net, example = each
    loaded = shrink.load(saved(net, tmp_path / "net"), fresh())
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in given(example))
    program = torch.export.export(loaded, given(example), dynamic_shapes=shapes).module()
    for count in (2, 5):
        args = given(example, count)
        for a, b in zip(run(net, *args), run(program, *args), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_onnx_runtime_computes_what_is_loaded(each, tmp_path):
    fresh, net, example = each
    loaded = shrink.load(saved(net, tmp_path / "net"), fresh())
    one = tuple(x[:1] for x in given(example))
    shrink.export(loaded, tmp_path / "net.onnx", one if isinstance(example, tuple) else one[0])
    runtime = shrink.OnnxNet(tmp_path / "net.onnx")
    names = [x.name for x in runtime.session.get_inputs()]
    assert names == ["input", "input_1"][: len(names)]
    for count in (1, 3, 5):
        args = given(example, count)
        for a, b in zip(run(net, *args), run(runtime, *args), strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() <= 1e-4 * a.abs().max()


def test_shared_parameters_are_stored_once_and_shared_again(tmp_path):
    net = pruned_block()
    path = saved(net, tmp_path / "net")
    with safe_open(path, framework="pt") as file:
        assert "embed.weight" in file.keys()  # noqa: SIM118
        assert "out.weight" not in file.keys()  # noqa: SIM118
    assert log_of(path)[-1] == ["out.weight", "=", "embed.weight"]
    loaded = shrink.load(path, Block())
    assert loaded.out.weight is loaded.embed.weight
    twice = nn.Linear(3, 3)
    net = nn.Sequential(nn.Sequential(twice, twice), nn.ReLU())
    loaded = shrink.load(saved(net, tmp_path / "net"), copy.deepcopy(net))
    assert loaded[0][0] is loaded[0][1]
    residual = shrink.load(saved(cut_residual(), tmp_path / "net"), Residual())
    assert residual.again is residual.c


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_numbers_of_every_type_come_back_as_they_were(dtype, tmp_path):
    net = randomised(Sound(), dtype)
    net.b.weight.data[1:] = 0
    net.a.weight.data[0, 0, 0] = float("nan")
    start = Sound()
    for each, make in ((net, torch.ones), (start, torch.zeros)):
        each.register_buffer("counts", make(4, dtype=torch.int16))
        each.phase = nn.Parameter(make(2, dtype=torch.complex64))
    loaded = shrink.load(saved(net, tmp_path / "net"), start)
    for name, tensor in net.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found.nan_to_num(7), tensor.nan_to_num(7))


def test_any_layout_in_memory_is_stored_and_the_default_comes_back(tmp_path):
    net = randomised(Residual()).to(memory_format=torch.channels_last)
    net.head.weight = nn.Parameter(torch.rand(6, 4).T)
    loaded = shrink.load(saved(net, tmp_path / "net"), Residual())
    assert all(torch.equal(net.state_dict()[k], v) for k, v in loaded.state_dict().items())
    assert all(tensor.is_contiguous() for tensor in loaded.parameters())


def test_masks_and_gates_are_folded_in(tmp_path):
    net = randomised(Mlp())
    parametrizations.weight_norm(net[0])
    loaded = shrink.load(saved(net, tmp_path / "net"), Mlp())
    assert torch.equal(loaded[0].weight, net[0].weight)
    fresh = Mlp()
    parametrizations.weight_norm(fresh[0])
    assert type(shrink.load(tmp_path / "net", fresh)[0]) is nn.Linear
    assert parametrize.is_parametrized(fresh[0])


# --- the file


def test_weights_are_compressed_rows_where_these_are_smaller(tmp_path):
    net = randomised(Mlp())
    net[0].weight.data.zero_()[3, 7] = 2.0
    with safe_open(saved(net, tmp_path / "net"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert tensors["0.weight:rows"].tolist() == [0] * 4 + [1] * 9
    assert tensors["0.weight:columns"].tolist() == [7]
    assert tensors["0.weight:values"].tolist() == [2.0]
    types = [tensors[f"0.weight:{part}"].dtype for part in ("rows", "columns", "values")]
    assert types == [torch.int32, torch.int16, torch.float32]
    assert torch.equal(tensors["3.weight"], net[3].weight)
    assert "0.weight" not in tensors


def test_dense_or_rows_is_decided_by_bytes(tmp_path):
    # 1 x 12 weights: 48 bytes dense; rows take 2 * 4 + n * (4 + 2): 44 with n = 6, 50 with 7.
    for nonzero, names in [(6, 3), (7, 1)]:
        layer = nn.Linear(12, 1, bias=False)
        layer.weight.data = (torch.arange(12) < nonzero).float()[None]
        with safe_open(saved(layer, tmp_path / "net"), framework="pt") as file:
            assert len(list(file.keys())) == names
        assert torch.equal(shrink.load(tmp_path / "net", nn.Linear(12, 1)).weight, layer.weight)


def test_wide_layers_take_larger_column_numbers(tmp_path):
    for width, dtype in [(32768, torch.int16), (32769, torch.int32)]:
        layer = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(layer.weight).data[0, -1] = 1
        with safe_open(saved(layer, tmp_path / "net"), framework="pt") as file:
            assert file.get_tensor("weight:columns").dtype == dtype
        loaded = shrink.load(tmp_path / "net", nn.Linear(2, 1))
        assert loaded.weight.flatten().nonzero().tolist() == [[width - 1]]


def test_settings_may_be_numbers_of_numpy(tmp_path):
    net = nn.Sequential(nn.Linear(np.int64(3), np.int64(2)), nn.LayerNorm(torch.Size([2])))
    loaded = shrink.load(
        saved(net, tmp_path / "net"), nn.Sequential(nn.Linear(9, 5), nn.LayerNorm(5))
    )
    assert torch.equal(loaded(torch.ones(1, 3)), net(torch.ones(1, 3)))


def test_the_log(tmp_path):
    net = narrow_mlp()
    linear = {"in_features": 16, "out_features": 3, "bias": True}
    norm = {"num_features": 3, "eps": 1e-5, "momentum": 0.1, "affine": True}
    last = {"in_features": 3, "out_features": 4, "bias": True}
    layers = [
        ["0", "Linear", linear],
        ["1", "BatchNorm1d", norm | {"track_running_stats": True}],
        ["3", "Linear", last],
    ]
    whole = saved(net, tmp_path / "whole")
    assert log_of(whole) == [["", "Mlp", None], *layers[:2], ["2", "ReLU", None], layers[2]]
    part = saved(net, tmp_path / "part", like=Mlp())
    assert log_of(part) == layers
    assert part.stat().st_size < whole.stat().st_size
    entry = log_of(saved(pruned_block(), tmp_path / "block", like=Block()))[0]
    assert entry[:2] == ["mlp.2", "Sequential"]
    assert [name for name, *_ in entry[2]] == ["0", "1"]


def test_a_file_like_the_registered_net_is_what_it_was(tmp_path):
    net = models.build("lenet300", (1, 16, 16), 10)
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    about = {"factory": "lenet300", "sizes": "1 16 16 10"}
    saved(net, tmp_path / "net", like=models.build("lenet300", (1, 16, 16), 10), about=about)
    with safe_open(tmp_path / "net", framework="pt") as file:
        metadata = file.metadata()
    sha256 = "d5f0cb688ff2a216532ec152ac4dc974260c1c0b328cc8402064aa83e59f3a4d"
    assert metadata == about | {"format": "prunestudy-sparse-1", "sha256": sha256}
    assert shrink.about(tmp_path / "net") == about


# --- bad input


class Other(Sound):
    """The same layers in another net."""


def another_sound(**layers):
    net = Sound()
    for name, layer in layers.items():
        setattr(net, name, layer)
    return net


@pytest.mark.parametrize("nonzeros", [0, 1])
def test_a_sparse_row_does_not_fill_ten(nonzeros, tmp_path):
    def linear(outputs):
        return nn.Sequential(nn.Linear(100, outputs, bias=False))

    net = linear(1)
    with torch.no_grad():
        net[0].weight[:, nonzeros:] = 0
    path = tmp_path / "net"
    shrink.save(net, path, like=linear(1))
    line = f"net = 'Sequential': does not fit {path}: 1 rows, here 10"
    assert refusal(lambda: shrink.load(path, linear(10))) == line


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (Other(), "net = 'Other': does not fit PATH: 'the whole' is a Sound, here a Other"),
        (Mlp(), "net = 'Mlp': does not fit PATH: 'the whole' is a Sound, here a Mlp"),
        (Sound, "net = <class 'test_files.Sound'>: a torch module"),
        (
            another_sound(more=nn.LSTM(2, 2)),
            "net = 'Sound': does not fit PATH: Error(s) in loading state_dict for Sound: "
            'Missing key(s) in state_dict: "more.weight_ih_l0"',
        ),
    ],
)
def test_another_net_is_refused(net, says, tmp_path):
    path = saved(factored_sound(), tmp_path / "net")
    assert refusal(lambda: shrink.load(path, net)).startswith(says.replace("PATH", str(path)))


def test_modules_of_unknown_classes_must_be_the_same(tmp_path):
    path = saved(pruned_block(), tmp_path / "net")
    net = Block()
    net.mlp[1] = nn.ReLU()
    head = f"net = 'Block': does not fit {path}: "
    assert refusal(lambda: shrink.load(path, net)) == f"{head}'mlp.1' is a GELU, here a ReLU"
    net = Block()
    net.attention = nn.MultiheadAttention(16, 2)
    line = refusal(lambda: shrink.load(path, net))
    assert line.startswith(head)
    assert "size mismatch for attention.in_proj_weight: " in line
    net.attention = nn.Identity()
    assert refusal(lambda: shrink.load(path, net)).startswith(f"{head}'attention' is a Multihead")
    net = pruned_block()
    net.mlp[1] = nn.ReLU()
    line = refusal(lambda: shrink.save(net, path, like=Block()))
    here = "not as `like`, and not rebuilt: 'mlp.1' is a ReLU, here a GELU"
    assert line == f"net = 'Block': {here}"
    net.mlp[1], net.place = nn.GELU(), nn.Parameter(torch.zeros(4, 8))
    assert refusal(lambda: shrink.save(net, path, like=Block())).startswith("net = 'Block': not as")


class Conv(nn.Conv2d):
    """A convolution with a name, a note, and two numbers per channel of its own."""

    note = "kept"

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1))
        self.register_buffer("start", torch.rand(self.out_channels, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.gain + self.start


class Linear(nn.Linear):
    """Of the same name as its base."""


def subclassed():
    parts = [("a:b", Conv(3, 8, 1)), ("norm", nn.SyncBatchNorm(8)), ("act", nn.ReLU())]
    parts += [("body", nn.Sequential(Conv(8, 6, 3, padding=1, bias=False), nn.ReLU()))]
    parts += [("flat", nn.Flatten()), ("head", Linear(6 * 16, 2))]
    return nn.Sequential(OrderedDict(parts))


@pytest.mark.parametrize("like", [False, True])
def test_subclasses_of_layers_and_names_with_colons_come_back(like, tmp_path):
    x = torch.randn(2, 3, 4, 4)
    keep = {"a:b": [0, 3, 4], "body.0": [1, 2, 5]}
    small = shrink.remove(randomised(subclassed()), keep, x).eval()
    small.head.weight.data[:, 1:] = 0  # as compressed rows, where it is no subclass
    fresh = subclassed()
    shrink.save(small, tmp_path / "net", like=fresh if like else None)
    loaded = shrink.load(tmp_path / "net", fresh)
    assert str(loaded) == str(small)
    assert torch.equal(loaded(x), small(x))
    sub, part = loaded.get_submodule("a:b"), loaded.body[0]
    assert (type(sub), sub.note, sub.out_channels) == (Conv, "kept", small[0].out_channels)
    assert (type(part), part.bias, type(loaded.head)) == (Conv, None, Linear)
    assert all(p.requires_grad for p in loaded.parameters())
    assert fresh.body[0].out_channels == 6
    for other, says in (
        (nn.Conv2d(8, 6, 3), "'body.0' is a Conv, here a Conv2d"),
        (type("Conv", (nn.Linear,), {})(8, 6), "a Conv that is no Conv2d"),
    ):
        fresh.body[0] = other
        assert says in refusal(lambda: shrink.load(tmp_path / "net", fresh))


class Held(nn.Module):
    """Its first layer has a hook and an attribute, and is called by another name of it."""

    def __init__(self):
        super().__init__()
        pair = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        self.pair, self.b, self.order = pair, nn.Conv2d(6, 4, 1), [("a", pair[0])]
        pair[0].register_forward_hook(lambda layer, inputs, output: 3 * output)
        pair[0].gain = 2.0

    def forward(self, x):
        ((_, first),) = self.order
        return self.b(self.pair[1](first(x)) * first.gain)


@pytest.mark.parametrize("like", [False, True])
def test_what_a_net_hangs_on_a_layer_or_calls_it_by_stays_when_loaded(like, tmp_path):
    x, fresh = torch.randn(2, 3, 5, 5), Held()
    small = shrink.remove(randomised(Held()), {"pair.0": [0, 3, 4]}, x).eval()
    shrink.save(small, tmp_path / "net", like=fresh if like else None)
    loaded = shrink.load(tmp_path / "net", fresh)
    assert loaded.order[0][1] is loaded.pair[0] is not fresh.pair[0]
    assert torch.equal(loaded(x), small(x))


class Versioned(nn.Linear):
    """As torchvision's MNASNet, it will not be filled from a state of an unknown version."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_learn_the_version_of_their_state(tmp_path):
    net, like = (nn.Sequential(Versioned(3, 2)) for _ in range(2))
    shrink.save(net, tmp_path / "net")
    assert (shrink.load(tmp_path / "net", like)[0].weight == net[0].weight).all()


def test_lazy_nets_are_refused(tmp_path):
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(affine=False))
    shrink.save(nn.Sequential(nn.Linear(2, 3)), tmp_path / "net")
    line = "net = 'Sequential': parameters without values: call it first"
    assert refusal(lambda: shrink.load(tmp_path / "net", net)) == line
    assert refusal(lambda: shrink.save(net, tmp_path / "net")) == line


def test_what_cannot_be_stored_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "net"
    net = Mlp()
    assert refusal(lambda: shrink.save(net, tmp_path / "none/net")).startswith("path = ")
    assert refusal(lambda: shrink.save(Mlp, path)).endswith("a torch module")
    assert refusal(lambda: shrink.save(shrink.to_csr(net), path)).endswith("before to_csr")
    for about in ({"format": "x"}, {"a": 1}, {3: "b"}, [1], "text"):
        assert refusal(lambda about=about: shrink.save(net, path, about=about)).startswith(
            "about ="
        )
    net[0].weight = nn.Parameter(torch.ones(12, 15))
    line = "has the tensors {'weight': (12, 15), 'bias': (12,)}, not those of Linear("
    assert refusal(lambda: shrink.save(net, path)).startswith(f"module = '0': {line}")
    net = Mlp()
    net[3].more = nn.Linear(1, 1)
    assert refusal(lambda: shrink.save(net, path)).startswith("module = '3': has the tensors")
    net = Mlp()
    net.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    line = "only dense tensors of real numbers or complex64 are stored"
    assert refusal(lambda: shrink.save(net, path)) == f"phase = 'torch.complex128': {line}"
    net.phase = torch.eye(2).to_sparse()
    assert refusal(lambda: shrink.save(net, path)) == f"phase = 'torch.float32': {line}"
    assert refusal(lambda: shrink.save(Mlp().to("meta"), path)).startswith(
        "0.weight = 'torch.float"
    )
    assert list(tmp_path.iterdir()) == []


def signed(tensors, **metadata):
    """A file with a fitting checksum, whatever it says."""
    metadata = {"format": files.FORMAT} | {k: v for k, v in metadata.items() if v is not None}
    metadata.setdefault("sha256", files._digest(tensors, metadata))
    return safetensors.torch.save(tensors, metadata)


def damaged():
    """Contents by name: what is not a whole file of a net."""
    tensors = randomised(Mlp()).state_dict()
    whole, header = signed(tensors), int.from_bytes(signed(tensors)[:8], "little")
    linear = {"in_features": 16, "out_features": 12, "bias": True}
    logs = {
        "words": '"Linear"',
        "no JSON": "{",
        "deep": "[" * 5000,
        "a dict": {"0": "Linear"},
        "a number": [3],
        "too few": [["0", "Linear"]],
        "no path": [["9", "Linear", linear]],
        "path of a number": [[1, "Linear", linear]],
        "unknown": [["0", "Bilinear", linear]],
        "kind of a list": [["0", ["Linear"], linear]],
        "list of settings": [["0", "Linear", [16, 12]]],
        "more settings": [["0", "Linear", linear | {"device": "cpu"}]],
        "below zero": [["0", "Linear", linear | {"in_features": -1}]],
        "yes": [["0", "Linear", linear | {"bias": "yes"}]],
        "settings missing": [["0", "Linear", {"in_features": 16, "out_features": 12}]],
        "no parts": [["0", "Sequential", linear]],
        "part of a part": [["0", "Sequential", [["a.b", "Linear", linear]]]],
        "Sequential in it": [["0", "Sequential", [["0", "Sequential", []]]]],
        "other size": [["0", "Linear", linear | {"out_features": 11}]],
        "constant": [["0", "Constant", {"channels": "many", "geometry": None, "bias": True}]],
        "geometry": [["0", "Constant", {"channels": 2, "geometry": [1], "bias": True}]],
        "shared with nothing": [["0.weight", "=", "9.weight"]],
    }
    texts = {name: log if isinstance(log, str) else json.dumps(log) for name, log in logs.items()}
    return {
        "empty": b"",
        "text": b"not a net\n" * 40,
        "zeros": bytes(400),
        "header alone": whole[: 8 + header],
        "cut": whole[:-1],
        "more": whole + b"x",
        "one bit": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "long header": (2**60).to_bytes(8, "little") + whole[8:],
        "no metadata": safetensors.torch.save(tensors),
        "pickle": _pickled(tensors),
        "few tensors": signed({k: v for k, v in tensors.items() if k[0] != "3"}),
        "nothing in it": signed({}),
        "another format": signed(tensors, format="prunestudy-sparse-9"),
        "no sum": safetensors.torch.save(tensors, {"format": files.FORMAT}),
        "other sum": signed(tensors, sha256="0" * 64),
        "edited": signed(tensors, note="old").replace(b'"old"', b'"new"'),
        **{name: signed(tensors, structure=text) for name, text in texts.items()},
    }


def _pickled(tensors):

    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data"), damaged().items(), ids=lambda x: x if type(x) is str else ""
)
def test_a_file_that_is_no_whole_net(name, data, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(data)
    net, random = Mlp(), torch.get_rng_state()
    before = copy.deepcopy(net.state_dict())
    line = refusal(lambda: shrink.load(path, net))
    assert line.startswith((f"path = {str(path)!r}: ", f"net = 'Mlp': does not fit {path}: "))
    assert torch.equal(torch.get_rng_state(), random)
    assert str(net) == str(Mlp())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert path.read_bytes() == data


@pytest.mark.parametrize("place", ["pipe", ".", "none", "x" * 300, "none/net"])
def test_a_net_is_read_from_a_regular_file_only(place, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda path: shrink.load(path, Mlp()), shrink.about):
        assert refusal(lambda read=read: read(tmp_path / place)).startswith("path = ")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = saved(narrow_mlp(), tmp_path / "net")
    old = path.read_bytes()

    def fails(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        shrink.save(Mlp(), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


# --- export


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, 8)


class OneBatch(nn.Module):
    def forward(self, x):
        return x.flatten(1) + x.new_zeros(len(x), 1)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Drawing(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("net", "example", "line"),
    [
        (Fixed(), drawn(2, 8), "net = 'Fixed': no ONNX of it: "),
        (OneBatch(), drawn(2, 8), "net = 'OneBatch': no ONNX of it: takes batches of 2 only"),
        (Branching(), drawn(2, 8), "net = 'Branching': no ONNX of it: "),
        (Drawing(), drawn(2, 8), "net = 'Drawing': no ONNX of it: ONNX Runtime computes other"),
        (Mlp(), drawn(2, 15), "net = 'Mlp': no ONNX of it: mat1 and mat2 shapes"),
        (Mlp(), drawn(2, 16).double(), "net = 'Mlp': no ONNX of it: "),
        (Mlp(), (16,), "example = ['int']: an input batch"),
        (Residual(), (drawn(2, 3, 6, 6), drawn(3)), "example = [(2, 3, 6, 6), (3,)]: an input"),
    ],
)
def test_what_cannot_be_exported_is_refused(net, example, line, tmp_path):
    (tmp_path / "net.onnx").write_text("old")
    assert refusal(lambda: shrink.export(net, tmp_path / "net.onnx", example)).startswith(line)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(("value", "close"), [(1.0, False), (5.0, True)])
@pytest.mark.parametrize("odd", [torch.inf, torch.nan])
def test_outputs_that_are_not_finite_do_not_hide_others(value, close, odd):
    assert _is_close(torch.tensor([5.0, odd]), torch.tensor([value, odd])) is close


class Scores(Mlp):
    def forward(self, x):
        return super().forward(x).log_softmax(1, dtype=torch.float64)


def test_outputs_may_be_of_a_finer_type_than_the_weights(tmp_path):
    net, x = randomised(Scores()), drawn(4, 16)
    shrink.export(net, tmp_path / "net.onnx", x)
    assert torch.allclose(shrink.OnnxNet(tmp_path / "net.onnx")(x), net(x), rtol=1e-3)


class Sum(nn.Module):
    def forward(self, x, *more):
        return x + sum(more)


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_inputs_is_exported(count, tmp_path):
    example = drawn(count, 2, 3).unbind()
    shrink.export(Sum(), tmp_path / "net.onnx", example)
    assert torch.allclose(shrink.OnnxNet(tmp_path / "net.onnx")(*example), sum(example))


def test_what_is_no_onnx_file_is_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no net")
    for path in (tmp_path / "net.onnx", tmp_path / "none.onnx"):
        assert "a file that export wrote" in refusal(lambda path=path: shrink.OnnxNet(path))
    line = refusal(lambda: shrink.export(Mlp(), tmp_path / "none/net", drawn(2, 16)))
    assert line == f"path = '{tmp_path}/none/net': a file in a folder that exists"
    assert refusal(lambda: shrink.OnnxNet(path, 0)).startswith("threads = 0: ")
    assert refusal(lambda: shrink.OnnxNet(path, device="tpu")).startswith("device = 'tpu': ")
