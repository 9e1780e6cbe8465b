import itertools

import pytest
import torch

from prunestudy import models
from prunestudy.errors import InputError
from prunestudy.models import TDMPC


def linear(*widths):
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("autoencoder", linear(784, 256, 128, 32, 128, 256, 784)),
        (
            "conv_autoencoder",
            2 * (16**2 + 16 * 32 * 16 + 32 * 32 * 49) + 16 + 32 + 32 + 32 + 16 + 1,
        ),
    ],
)
def test_parameters_with_and_without_a_classifier(name, size):
    head = linear(32, 64, 10)
    for label, expected in ((name, size), (f"{name}_classifier", size + head)):
        net = models.build(label, (1, 28, 28), 10)
        assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 16, 12)])
@pytest.mark.parametrize("name", ["autoencoder", "conv_autoencoder"])
def test_images_in_images_out_and_the_latent_between(name, shape):
    net, x = models.build(name, shape, 7), torch.randn(2, *shape)
    z = net.encode(x)
    assert z.shape == (2, 32)
    assert torch.equal(net(x), net.decode(z))
    assert net(x).shape == x.shape
    assert models.task_of(name) == "reconstruct"
    both = models.build(f"{name}_classifier", shape, 7)
    images, logits = both(x)
    assert (images.shape, logits.shape) == (x.shape, (2, 7))
    assert torch.equal(logits, both.classifier(both.encode(x)))
    assert models.task_of(f"{name}_classifier") == "reconstruct_and_classify"


def test_components_are_the_children():
    for name in ("autoencoder", "conv_autoencoder_classifier"):
        net = models.build(name, (1, 8, 8), 10)
        assert list(net.components) == [child for child, _ in net.named_children()]
    assert list(TDMPC.components) == [child for child, _ in TDMPC(3, 2, 4, 3).named_children()]


def test_sides_that_are_no_multiples_of_four_are_refused():
    with pytest.raises(InputError, match=r"shape = \(1, 30, 28\): .*multiples of 4"):
        models.build("conv_autoencoder", (1, 30, 28), 10)


def test_tdmpc_has_the_published_widths():
    net = TDMPC(24, 6)
    assert net.encoder[-1].out_features == net.dynamics.rest[-1].out_features == 50
    assert [m.normalized_shape for m in net.modules() if isinstance(m, torch.nn.LayerNorm)] == [
        (512,),
        (512,),
    ]
    outputs = net(torch.zeros(3, 30))
    assert [tuple(part.shape) for part in outputs] == [(3, 1), (3, 6), (3, 6), (3, 2)]
    with pytest.raises(InputError, match="latent = 0: a positive integer"):
        TDMPC(3, 2, 4, 0)


def test_tdmpc_computes_what_its_parts_say():
    torch.manual_seed(0)
    net = TDMPC(3, 2, 8, 4)
    x = torch.randn(5, 5)
    z, action = net.encoder(x[:, :3]), x[:, 3:]
    joint = torch.cat([net.dynamics.latent.weight, net.dynamics.action.weight], 1)
    hidden = torch.cat([z, action], 1) @ joint.T + net.dynamics.latent.bias
    after = net.dynamics.rest(hidden)
    then = net.policy(after).tanh()
    reward, now, later, values = net(x)
    torch.testing.assert_close(later, then)
    torch.testing.assert_close(now, net.policy(z).tanh())
    torch.testing.assert_close(reward, net.reward(z, action))
    torch.testing.assert_close(values[:, 1:], net.value[1](after, then))
