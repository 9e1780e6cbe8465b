import pytest
import torch
from torch import nn

from prunestudy import measure, models
from prunestudy.errors import InputError
from prunestudy.models.convnet import WithinChannelNorm


def test_parameters_and_macs_of_caffes_cifar10_full():
    net = models.build("convnet", (3, 32, 32), 10)
    sizes = [32 * 75 + 32, 32 * 800 + 32, 64 * 800 + 64, 10 * 1024 + 10]
    assert measure.parameters(net) == sum(sizes) == 89_578
    # one product per weight and position: 32x32, 16x16 and 8x8 positions
    macs = 1024 * 32 * 75 + 256 * 32 * 800 + 64 * 64 * 800 + 10 * 1024
    assert measure.macs(net, torch.zeros(1, 3, 32, 32)) == macs == 12_298_240


def test_normalisation_is_within_a_channel_and_counts_the_border_as_zeros():
    norm = WithinChannelNorm(alpha=9.0, beta=1.0)
    x = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    x[0, 0], x[0, 1, 1, 1] = 1.0, 2.0
    y = norm(x)
    # corners see 4 ones of 9 cells, edges 6, the centre 9: 1 / (1 + 9 * count / 9)
    corner, edge, centre = 1 / 5, 1 / 7, 1 / 10
    wanted = [[corner, edge, corner], [edge, centre, edge], [corner, edge, corner]]
    assert torch.allclose(y[0, 0], torch.tensor(wanted, dtype=torch.float64))
    assert y[0, 1].flatten().tolist() == pytest.approx([0] * 4 + [2 / 5] + [0] * 4)
    across = nn.LocalResponseNorm(3, alpha=9.0, beta=1.0)(x)
    assert not torch.allclose(y, across)


def test_default_strength_is_caffes():
    x = torch.full((1, 1, 3, 3), 100.0, dtype=torch.float64)
    centre = 100 * (1 + 5e-5 * 100**2) ** -0.75
    assert float(WithinChannelNorm()(x)[0, 0, 1, 1]) == pytest.approx(centre)


def test_poolings_round_up():
    net, seen = models.build("convnet", (3, 32, 32), 10), []
    for layer in (net.conv1, net.conv2, net.conv3):
        layer.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape[1:])))
    net(torch.zeros(1, 3, 32, 32))
    assert seen == [(32, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert net.fc.in_features == 64 * 4 * 4


def test_bad_input_is_refused():
    with pytest.raises(InputError, match=r"^shape = \(3, 7, 32\): convnet needs images of"):
        models.build("convnet", (3, 7, 32), 10)
    with pytest.raises(InputError, match=r"^size = 2: an odd number of pixels"):
        WithinChannelNorm(2)
