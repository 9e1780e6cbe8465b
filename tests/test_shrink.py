import copy
import json
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import apart, refused
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from prunestudy import models, shrink
from prunestudy.errors import InputError
from prunestudy.shrink import sparse

SHAPE = (1, 16, 16)


class Gate(nn.Module):
    """A mask on a weight; in training its draws are random."""

    def __init__(self, weight, kept):
        super().__init__()
        self.gate = nn.Parameter((torch.rand_like(weight) < kept).to(weight.dtype))

    def forward(self, weight):
        return weight * (torch.rand_like(weight) if self.training else self.gate)


def gated(name="lenet5", kept=0.1, dtype=torch.float32):
    torch.manual_seed(0)
    net = models.build(name, SHAPE, 10).to(dtype)
    for layer in list(net.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
            parametrize.register_parametrization(layer, "weight", Gate(layer.weight, kept))
    return net


def images(dtype=torch.float32, batch=5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *SHAPE, generator=generator, dtype=dtype)


# fold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fold_is_the_same_function_as_plain_torch(dtype):
    net = gated(dtype=dtype)
    plain = shrink.fold(net)
    assert torch.equal(plain(images(dtype)), net.eval()(images(dtype)))
    assert type(plain.conv1) is nn.Conv2d
    assert plain.state_dict().keys() == models.build("lenet5", SHAPE, 10).state_dict().keys()
    assert not plain.training
    assert not any(p.requires_grad for p in plain.parameters())


def test_fold_leaves_the_model_untouched():
    net = gated().train()
    net.conv1.eval()
    before = copy.deepcopy(net.state_dict())
    shrink.fold(net)
    shrink.fold(net)
    assert net.training
    assert not net.conv1.training
    assert parametrize.is_parametrized(net.conv1, "weight")
    assert all(p.requires_grad for p in net.parameters())
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    net(images()).sum().backward()


def test_fold_of_a_weight_made_of_several_frozen_tensors():
    layer = parametrizations.weight_norm(nn.Linear(3, 2)).requires_grad_(False)
    plain = shrink.fold(layer)
    assert [name for name, _ in plain.named_parameters()] == ["bias", "weight"]
    assert torch.equal(plain.weight, layer.weight)


# CSR layers


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", ["lenet5", "lenet300"])
def test_csr_equals_dense(name, dtype, limit, batch):
    net = gated(name, dtype=dtype)
    x = images(dtype, batch)
    sparse = shrink.to_csr(net)
    assert not any(isinstance(m, nn.Linear) for m in sparse.modules())
    with torch.inference_mode():
        assert apart(sparse(x), net.eval()(x)) < limit


def test_csr_only_from_the_sparsity_asked_for():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    net[0].weight.data = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    net[1].weight.data = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    sparse = shrink.to_csr(net, 0.75)
    assert [type(m) for m in sparse] == [shrink.CsrLinear, nn.Linear]
    assert sparse[0].rows.tolist() == [0, 1, 1]
    assert sparse[0].columns.tolist() == [1]
    assert sparse[0].values.tolist() == [2.0]
    assert sparse[0](torch.tensor([[5.0, 7.0], [0.0, 1.0]])).tolist() == [[14.0, 0.0], [2.0, 0.0]]
    assert [type(m) for m in net] == [nn.Linear, nn.Linear]


def test_csr_of_one_layer_of_many_dimensions_and_of_nothing():
    layer = nn.Linear(4, 3)
    sparse = shrink.to_csr(layer)
    for shape in [(4,), (2, 4), (2, 3, 4)]:
        x = torch.randn(shape)
        torch.testing.assert_close(sparse(x), layer(x))
    nn.init.zeros_(layer.weight)
    assert torch.equal(shrink.to_csr(layer)(torch.ones(2, 4)), layer.bias.expand(2, 3))


def test_csr_net_can_be_copied_and_pickled():
    sparse = shrink.to_csr(gated())
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other(images()), sparse(images()))


def test_no_beta_warning_escapes(tmp_path):
    (tmp_path / "net").write_bytes(pickle.dumps(shrink.to_csr(nn.Linear(3, 2))))
    code = (
        "import pathlib, pickle, torch\n"
        f"net = pickle.loads(pathlib.Path({str(tmp_path / 'net')!r}).read_bytes())\n"
        "net(torch.ones(2, 3))\n"
    )
    command = [sys.executable, "-W", "error:Sparse:UserWarning", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_min_sparsity_is_a_share(share):
    with pytest.raises(InputError, match=r"min_sparsity = .*0-1"):
        shrink.to_csr(nn.Linear(2, 2), share)


# storage


def save(net, path, factory="lenet5"):
    shrink.save_net(net, path, factory, SHAPE, 10)
    return path


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.9, 1.0])
@pytest.mark.parametrize("name", ["lenet5", "lenet300"])
def test_save_and_load_bit_for_bit(name, kept, tmp_path):
    net = gated(name, kept)
    random = torch.get_rng_state()
    loaded = shrink.load_net(save(net, tmp_path / "net", name), name)
    assert torch.equal(torch.get_rng_state(), random)
    plain = shrink.fold(net)
    assert type(loaded) is type(plain)
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in loaded.state_dict().items())
    assert torch.equal(loaded(images()), plain(images()))
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_layout_of_the_file(tmp_path):
    net = models.build("lenet5", SHAPE, 10)
    nn.init.zeros_(net.fc1.weight)
    net.fc1.weight.data[2, 49] = 3.0
    with safe_open(save(net, tmp_path / "net"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert tensors["fc1.weight:rows"].tolist() == [0] * 3 + [1] * 498
    assert tensors["fc1.weight:columns"].tolist() == [49]
    assert tensors["fc1.weight:values"].tolist() == [3.0]
    types = [tensors[f"fc1.weight:{part}"].dtype for part in ("rows", "columns", "values")]
    assert types == [torch.int32, torch.int16, torch.float32]
    assert torch.equal(tensors["conv1.weight"], net.conv1.weight)  # dense: CSR would take more
    assert "fc1.weight" not in tensors


def test_dense_or_csr_is_decided_by_bytes():
    # 1 x 12 weights: 48 bytes dense; CSR takes 2 * 4 + n * (4 + 2): 44 with n = 6, 50 with 7.
    for nonzero, numbers in [(6, 6 + 6 + 2), (7, 12)]:
        layer = nn.Linear(12, 1, bias=False)
        layer.weight.data = (torch.arange(12) < nonzero).float()[None]
        assert shrink.storage(layer).numbers_stored == numbers


def test_wide_layers_take_int32_columns():
    for width, size in [(32768, 2), (32769, 4)]:
        layer = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(layer.weight).data[0, -1] = 1
        small = shrink.storage(layer).bytes
        layer.weight.data[0, :4] = 1
        assert shrink.storage(layer).bytes - small == 4 * (4 + size)


def test_storage_counts(tmp_path):
    net = models.build("lenet300", SHAPE, 10)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.fc1.weight[0, :5] = 1
        net.fc3.bias[:] = 2
    found = shrink.storage(net, "lenet300", SHAPE, 10)
    assert found.nonzeros == 5 + 10
    assert found.numbers_with_indices == 2 * (5 + 10)
    assert found.numbers_stored == (5 + 5 + 301) + 101 + 11 + 300 + 100 + 10
    assert found.bytes == save(net, tmp_path / "net", "lenet300").stat().st_size
    assert 0 <= found.bytes - shrink.storage(net).bytes < 64


def test_loading_from_another_factory(tmp_path):
    path = save(gated(), tmp_path / "net")
    refused(lambda: shrink.load_net(path, "lenet300"), "factory = 'lenet300'", "lenet5")


@pytest.mark.parametrize("keep", [0, 7, 200, 1000, -1])
def test_truncated_file(keep, tmp_path):
    path = save(gated(), tmp_path / "net")
    path.write_bytes(path.read_bytes()[:keep])
    refused(lambda: shrink.load_net(path), f"path = {str(path)!r}", "not a whole")


def test_one_changed_byte(tmp_path):
    path = save(gated(), tmp_path / "net")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    refused(lambda: shrink.load_net(path), f"path = {str(path)!r}", "sha256")


def test_changed_metadata(tmp_path):
    path = save(gated("lenet300"), tmp_path / "net", "lenet300")
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"1 16 16 10"', b'"1 16 61 10"'))
    refused(lambda: shrink.load_net(path), "sha256")


def test_foreign_and_missing_files(tmp_path):
    path = tmp_path / "net"
    refused(lambda: shrink.load_net(path), "path", "save_net")
    refused(lambda: shrink.load_net(tmp_path), "path", "save_net")
    safetensors.torch.save_file({"x": torch.ones(1)}, path)
    refused(lambda: shrink.load_net(path), "path", "save_net")
    torch.save({"x": torch.ones(1)}, path)
    refused(lambda: shrink.load_net(path), "path", "not a whole")
    path.write_text(json.dumps({}))
    refused(lambda: shrink.load_net(path), "path", "not a whole")


def test_saving_refuses_and_writes_nothing(tmp_path):
    path = tmp_path / "net"
    net = gated()
    refused(lambda: save(net, tmp_path / "none" / "net"), "path", "folder")
    refused(lambda: save(net, path, "lenet6"), "model = 'lenet6'")
    refused(lambda: save(net, path, "lenet300"), "model = 'LeNet5'", "makes a LeNet300")
    refused(lambda: save(net.double(), path), "float64", "float32")
    net = models.build("lenet5", SHAPE, 10)
    refused(lambda: save(shrink.to_csr(net), path), "fc1")
    refused(lambda: shrink.storage(shrink.to_csr(net)), "before to_csr")
    net.fc2 = nn.Linear(400, 10)
    refused(lambda: save(net, path), "model = 'LeNet5': its layers do not fit")
    net.fc2 = nn.Linear(500, 10)
    net.fc2.weight = nn.Parameter(torch.ones(10, 400))  # the layer still says 500
    refused(lambda: save(net, path), "fc2.weight = (10, 400)", "(10, 500)")
    assert list(tmp_path.iterdir()) == []


# nets of another structure than the factory's


class Normed(nn.Module):
    """A small net with each kind of layer that a structure may hold."""

    def __init__(self, shape, num_classes, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(shape[0], width, 3, 2, 1), nn.BatchNorm2d(width))
        self.act = nn.ReLU()
        self.up = nn.ConvTranspose2d(width, width, 3, 2, 1, output_padding=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.conv = nn.Conv1d(width, width, 3, padding="same", groups=2, padding_mode="circular")
        self.norm = nn.BatchNorm1d(width, momentum=None)
        self.last = nn.LayerNorm(4 * width, bias=False)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        x = self.pool(self.up(self.act(self.stem(x))))
        return self.fc(self.last(self.norm(self.conv(x.flatten(2))).flatten(1)))


@pytest.fixture
def normed(monkeypatch):
    entry = models._Entry(Normed, "each kind of layer")
    monkeypatch.setitem(models._REGISTRY, "normed", entry)


def randomised(net):
    torch.manual_seed(3)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    return net


def narrowed():
    net = randomised(models.build("lenet5", SHAPE, 10))
    kept = torch.tensor([0, 3, 4, 11])
    for layer, name in ((net.conv1, "out"), (net.conv2, "in")):
        weight = layer.weight.detach().index_select(0 if name == "out" else 1, kept)
        layer.weight = nn.Parameter(weight)
        setattr(layer, f"{name}_channels", len(kept))
    net.conv1.bias = nn.Parameter(net.conv1.bias.detach()[kept])
    return net


def factorised():
    net = models.build("lenet5", SHAPE, 10)
    net.conv2 = nn.Sequential(nn.Conv2d(20, 6, 5, bias=False), nn.Conv2d(6, 50, 1))
    net.fc1 = nn.Sequential(nn.Linear(50, 7, bias=False), nn.Linear(7, 500))
    return randomised(net)


def narrow_normed():
    net = Normed(SHAPE, 10, width=6)
    net.up = nn.Sequential(net.up, nn.Identity())
    return randomised(net)


def structure_in(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata().get("structure", "null"))


@pytest.mark.parametrize(
    ("make", "factory", "paths"),
    [
        (narrowed, "lenet5", ["conv1", "conv2"]),
        (factorised, "lenet5", ["conv2", "fc1"]),
        (
            narrow_normed,
            "normed",
            ["stem.0", "stem.1", "up", "conv", "norm", "last", "fc"],
        ),
    ],
)
def test_another_structure_comes_back_bit_for_bit(make, factory, paths, tmp_path, normed):
    net = make().eval()
    random = torch.get_rng_state()
    loaded = shrink.load_net(save(net, tmp_path / "net", factory), factory)
    assert torch.equal(torch.get_rng_state(), random)
    assert [path for path, *_ in structure_in(tmp_path / "net")] == paths
    assert str(loaded) == str(net)
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(net.state_dict()[k], v) for k, v in loaded.state_dict().items())
    assert torch.equal(loaded(images()), net(images()))
    size = (tmp_path / "net").stat().st_size
    assert shrink.storage(net, factory, SHAPE, 10).bytes == size


def test_entries_of_a_structure(tmp_path):
    path = save(factorised(), tmp_path / "net")
    linear = [
        ["0", "Linear", {"in_features": 50, "out_features": 7, "bias": False}],
        ["1", "Linear", {"in_features": 7, "out_features": 500, "bias": True}],
    ]
    assert structure_in(path)[1] == ["fc1", "Sequential", linear]


def test_the_factorys_own_structure_is_not_written(tmp_path, normed):
    for net, name in ((gated(), "lenet5"), (randomised(Normed(SHAPE, 10)), "normed")):
        assert structure_in(save(net, tmp_path / name, name)) is None
    # Digest of the file with all weights at one, as it was before structures.
    net = models.build("lenet300", SHAPE, 10)
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    with safe_open(save(net, tmp_path / "net", "lenet300"), framework="pt") as file:
        assert (
            file.metadata()["sha256"]
            == "d5f0cb688ff2a216532ec152ac4dc974260c1c0b328cc8402064aa83e59f3a4d"
        )


def test_structures_that_are_refused(tmp_path, normed):
    path = tmp_path / "net"
    net = models.build("lenet5", SHAPE, 10)
    for layer, kind in (
        (nn.Bilinear(2, 2, 2), "Bilinear"),
        (type("Own", (nn.Linear,), {})(50, 500), "Own"),
        (nn.Sequential(nn.Linear(50, 7), nn.Tanh()), "Tanh"),
    ):
        net.fc1 = layer
        at = "fc1.1" if kind == "Tanh" else "fc1"
        refused(lambda at=at, kind=kind: save(net, path), f"{at} = {kind!r}", "LayerNorm")
    net = models.build("lenet5", SHAPE, 10)
    net.pool = nn.MaxPool2d(3)
    refused(lambda: save(net, path), "pool = 'MaxPool2d'")
    net = Normed(SHAPE, 10)
    net.act = nn.GELU()
    refused(lambda: save(net, path, "normed"), "act = 'GELU'")
    refused(lambda: shrink.storage(net, "normed", SHAPE, 10), "act = 'GELU'")
    assert list(tmp_path.iterdir()) == []


LINEAR = {"in_features": 50, "out_features": 500, "bias": True}


@pytest.mark.parametrize(
    "structure",
    [
        {"fc1": "Linear"},
        "Linear",
        [3],
        [["fc1", "Linear"]],
        [["fc9", "Linear", LINEAR]],
        [["", "Linear", LINEAR]],
        [[1, "Linear", LINEAR]],
        [["fc1", "Bilinear", LINEAR]],
        [["fc1", ["Linear"], LINEAR]],
        [["fc1", "Linear", [50, 500]]],
        [["fc1", "Linear", LINEAR | {"device": "cpu"}]],
        [["fc1", "Linear", LINEAR | {"in_features": -1}]],
        [["fc1", "Linear", LINEAR | {"bias": "yes"}]],
        [["fc1", "Linear", {"in_features": 50, "out_features": 500}]],
        [["fc1", "Sequential", LINEAR]],
        [["fc1", "Sequential", [["a.b", "Linear", LINEAR]]]],
        [["fc1", "Sequential", [["0", "Sequential", []]]]],
        [["fc1", "Linear", LINEAR | {"out_features": 499}]],
    ],
)
def test_malformed_structure_in_a_file(structure, tmp_path):
    path = tmp_path / "net"
    tensors = models.build("lenet5", SHAPE, 10).state_dict()
    path.write_bytes(sparse._serialise(tensors, "lenet5", SHAPE, 10, structure))
    refused(lambda: shrink.load_net(path), f"path = {str(path)!r}: ")


def test_structure_that_is_no_json_and_a_changed_one(tmp_path, monkeypatch):
    path = save(factorised(), tmp_path / "net")
    path.write_bytes(path.read_bytes().replace(b"out_features", b"out_featurez", 1))
    refused(lambda: shrink.load_net(path), "sha256")
    with monkeypatch.context() as patch:
        patch.setattr(sparse.json, "dumps", lambda *_, **__: "[" * 9000)
        data = sparse._serialise({"x": torch.ones(1)}, "lenet5", SHAPE, 10, [1])
    path.write_bytes(data)
    refused(lambda: shrink.load_net(path), f"path = {str(path)!r}: ")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(gated(), tmp_path / "net")
    old = path.read_bytes()

    def fails(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        save(gated(kept=0.5), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
