import copy
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import apart
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from prunestudy import models, shrink
from prunestudy.errors import InputError

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


def test_csr_leaves_the_layers_that_others_read():
    net = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 4))
    sparse, x = shrink.to_csr(net), torch.randn(2, 3, 4)
    assert [name for name, m in sparse.named_modules() if type(m) is shrink.CsrLinear] == ["1"]
    assert torch.allclose(sparse(x), net.eval()(x), atol=1e-6)


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
