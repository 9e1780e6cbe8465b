import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BatchNormNet, randomise, refused, toy_batches
from torch import nn
from weight_tools import (
    at,
    attached,
    fit,
    kept_of,
    layer,
    masks_of,
    original,
    same,
    spied,
    weights_of,
)

from prunestudy import methods, models
from prunestudy.methods import Context
from prunestudy.methods.masks import cubic_sparsity, kept_count
from prunestudy.methods.weight_probes import _Trail
from prunestudy.train import Recipe

CUT = "magnitude_attention"
W, X, WANTED = ([1.0, -4.0], [9.0, 16.0]), [[1.0, -1.0]], [[1.0, -9.0]]
SHORT = Recipe(epochs=3, lr=0.05, nesterov=True, weight_decay=1e-3, period=1)


def backward(model):
    y = model(torch.tensor(X, dtype=torch.float64))
    (0.5 * (y - torch.tensor(WANTED, dtype=torch.float64)) ** 2).sum().backward()
    return y.tolist()


# --- the equations


@pytest.mark.parametrize(
    ("params", "frozen", "effective", "gradient"),
    [
        # n = 16: A = (1/4, 1/2, 3/4, 1); M keeps the second row; y = (0, 6.75 - 16);
        # dL/dW~ = (-1, -1/4) x (1, -1), times A, and times M where the mask is frozen
        ({}, False, [6.75, 16], [[-0.25, 0.5], [-0.1875, 0.25]]),
        ({}, True, [6.75, 16], [[0, 0], [-0.1875, 0.25]]),
        ({"alpha": 0.0}, False, [9, 16], [[-1, 1], [2, -2]]),
        ({"alpha": 0.0}, True, [9, 16], [[0, 0], [2, -2]]),
        ({"passes": "forward"}, False, [6.75, 16], [[-1, 1], [-0.25, 0.25]]),
        ({"passes": "forward"}, True, [6.75, 16], [[0, 0], [-0.25, 0.25]]),
        ({"passes": "backward"}, False, [9, 16], [[-0.25, 0.5], [1.5, -2]]),
        ({"passes": "backward"}, True, [9, 16], [[0, 0], [1.5, -2]]),
        ({"differentiate": True}, False, [6.75, 16], [[-0.375, 0.75], [-0.28125, 0.375]]),
        (
            {"passes": "forward", "differentiate": True},
            False,
            [6.75, 16],
            [[-1.5, 1.5], [-0.375, 0.375]],
        ),
    ],
)
def test_forward_and_backward_of_a_2x2_example(params, frozen, effective, gradient):
    model = layer(*W)
    method = attached(CUT, model, **({"alpha": 0.5, "norm": "layer_max"} | params))
    method.cut(0.5)
    if frozen:
        method.update(at(100, phase="explore"))
    assert model.weight.tolist() == [[0, 0], effective]
    assert backward(model) == [[0, effective[0] - effective[1]]]
    assert original(model).grad.tolist() == gradient
    assert original(model).tolist() == list(W)


def test_differentiating_through_the_attention_is_a_factor():
    """Autograd through (|w| / n)^alpha w, n constant: the same as `differentiate`."""
    generator = torch.Generator().manual_seed(1)
    w, factor = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    model = layer(*w.tolist())
    attached(CUT, model, alpha=0.7, differentiate=True)
    (model.weight * factor).sum().backward()
    w.requires_grad_(True)
    ((w.abs() / w.detach().abs().mean()) ** 0.7 * w * factor).sum().backward()
    torch.testing.assert_close(original(model).grad, w.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("params", "rate"),
    [
        # kept A = (3/4, 1): the mean of A^2 is 25/32, that of A 7/8; dW~/dW = 1.5 A
        ({}, 1.5 * 25 / 32),
        ({"alpha": 0.0}, 1.0),
        ({"passes": "forward"}, 1.5 * 7 / 8),
        ({"passes": "backward"}, 7 / 8),
        ({"differentiate": True}, 1.5**2 * 25 / 32),
    ],
)
def test_alphas_can_be_compared_at_one_rate(params, rate):
    """By a small step along the gradient, the kept W~ moves on average as without attention."""
    params = {"alpha": 0.5, "norm": "layer_max", "period": 1} | params
    gradients = []
    for normalise in (False, True):
        model = layer(*W)
        method = attached(CUT, model, normalise=normalise, **params)
        method.cut(0.5)
        model.weight.sum().backward()
        method.after_backward(at(phase="explore"))
        gradients.append(original(model).grad)
    assert method.rate().item() == pytest.approx(rate)
    torch.testing.assert_close(gradients[1], gradients[0] / rate)
    before = model.weight.detach().clone()
    original(model).data.sub_(1e-6 * gradients[1])
    moved = ((before - model.weight) / 1e-6).sum() / 2
    assert moved.item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("network_mean", [2.5, 2.5]), ("network_max", [7.0, 7.0]), ("layer_max", [3.0, 7.0])],
)
def test_norms_by_hand(norm, expected):
    model = nn.Sequential(layer([1.0, -3.0, 0.5, 0.5]), layer([-7.0], [3.0]))
    method = attached(CUT, model, norm=norm, alpha=1.0)
    assert [m.scale.item() for m in method.masks] == expected
    assert method.log() == {"kept": 1.0, "scale": expected[0]}
    ratio = model[0].weight / original(model[0])
    torch.testing.assert_close(ratio, original(model[0]).abs() / expected[0])


@pytest.mark.parametrize("norm", ["network_mean", "layer_max"])
def test_zeros_have_no_attention_and_make_no_nan(norm):
    model = nn.Sequential(layer([0.0, 0.0]), layer([2.0], [1.0], [4.0]))
    attached(CUT, model, norm=norm, alpha=0.5)
    (model[0].weight.sum() + model[1].weight.sum()).backward()
    assert model[0].weight.tolist() == original(model[0]).grad.tolist() == [[0, 0]]
    assert model[1].weight.isfinite().all()


# --- DPF is the special case


@pytest.mark.parametrize(
    "net",
    [lambda: randomise(BatchNormNet()), lambda: models.resnet(8, (1, 8, 8), 10)],
    ids=["batch_norm", "resnet8"],
)
def test_without_attention_and_exploitation_it_is_dpf_bit_for_bit(net):
    def made(name, **params):
        torch.manual_seed(0)
        method = methods.build(name, {"period": 3} | params, 0.9)
        return fit(method, net(), toy_batches(), SHORT)

    dpf, ours = made("dpf"), made(CUT, alpha=0.0, exploitation=False)
    ours.history[:] = [{key: row[key] for key in dpf.history[0]} for row in ours.history]
    same(dpf, ours)
    for other in ({"alpha": 0.5, "exploitation": False}, {"alpha": 0.0}):
        assert made(CUT, **other).history[-1]["train_loss"] != dpf.history[-1]["train_loss"]


# --- exploration, exploitation


def watched(name=CUT, recipe=None, **params):
    """A training of 48 steps: result, and after each step phase, masks, weights, n."""
    seen = []

    def look(method, now):
        weights = torch.cat([w.detach().flatten() for w in method.weights]).clone()
        seen.append((now.phase, masks_of(method), weights, method.log().get("scale")))

    method = spied(methods.build(name, params, params.pop("target", 0.9)), look)
    return fit(method, recipe=recipe), seen


def test_masks_follow_the_cubic_schedule_every_period_until_they_freeze():
    made, seen = watched(period=5, ramp=0.5)
    # 48 steps: the ramp and exploration end after 24
    total = len(seen[0][1])
    kept = [kept_count(total, cubic_sparsity(0.9, 5 * (step // 5) / 24)) for step in range(1, 24)]
    assert [int(m.sum()) for _, m, *_ in seen[:24]] == [*kept, kept_count(total, 0.9)]
    assert [phase for phase, *_ in seen] == ["explore"] * 24 + ["exploit"] * 24
    assert made.probe.arrays()["trail_step"].tolist() == [5, 10, 15, 20, 24]


def test_while_exploring_cut_weights_are_updated_and_return_and_n_follows():
    made, seen = watched(target=0.5, period=2, recipe=Recipe(epochs=12, lr=0.2, period=1))
    explored = [(m, w) for phase, m, w, _ in seen if phase == "explore"]
    moved = [
        (before != after)[mask == 0].float().mean().item()
        for (mask, before), (_, after) in pairwise(explored)
        if (mask == 0).any()
    ]
    assert min(moved) > 0.8
    assert made.probe.arrays()["trail_returned"].sum() > 0
    # n is the mean of the weights as they are after the step
    scales, means = zip(*[(n, w.abs().mean().item()) for *_, w, n in seen[:36]], strict=True)
    assert scales == pytest.approx(means, rel=1e-5)
    assert {n for *_, n in seen[36:]} == {scales[-1]}


def test_nothing_of_a_cut_weight_changes_or_matters_once_exploitation_begins():
    """Not its mask, not its stored value; and another value changes no bit of the result."""
    straight, seen = watched()
    late = [(m, w) for phase, m, w, _ in seen if phase == "exploit"]
    mask, weights = late[0]
    for other_mask, other_weights in late:
        assert torch.equal(other_mask, mask)
        assert torch.equal(other_weights[mask == 0], weights[mask == 0])
    assert not torch.equal(late[-1][1][mask == 1], weights[mask == 1])

    def tamper(method, now):
        if now.phase == "explore" and now.last:
            for weight, each in zip(method.weights, method.masks, strict=True):
                weight.data[each.mask == 0] = 77.0

    other = fit(spied(methods.build(CUT, {}, 0.9), tamper))
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    for column in ("train_loss", "validation_loss", "validation_top1"):
        assert [r[column] for r in straight.history] == [r[column] for r in other.history]


def test_without_exploitation_the_mask_never_freezes():
    made, seen = watched(exploitation=False, period=2)
    assert {phase for phase, *_ in seen} == {"explore"}
    assert made.probe.arrays()["trail_step"].tolist() == list(range(2, 49, 2))
    assert not made.method.frozen


def test_a_weight_of_the_finished_net_is_what_the_attended_net_used():
    made, _ = watched(alpha=1.0)
    for found, each, weight in zip(
        weights_of(made.model), made.method.masks, made.method.weights, strict=True
    ):
        assert torch.equal(found, each(weight).detach())


def test_exploitation_needs_an_end_of_the_ramp():
    refused(lambda: methods.build(CUT, {"ramp": 1.0}, 0.9), "ramp = 1.0: below 1")
    methods.build(CUT, {"ramp": 1.0, "exploitation": False}, 0.9)


# --- the trail


def trail_of(model, name="dpf", **params):
    method, probe = attached(name, model, **params), _Trail()
    probe.attach(method, model, Context((torch.zeros(2, 2, dtype=torch.float64),)))
    return method, probe


def test_a_trail_by_hand():
    """Four weights and two; three changes of the masks."""
    model = nn.Sequential(layer([1.0, 2.0], [3.0, 4.0]), layer([10.0, 20.0]))
    method, probe = trail_of(model, target=0.5, period=1)
    first, second = (each.mask for each in method.masks)

    def step(number, masks, grown=0.0):
        first.copy_(torch.tensor([masks[:2], masks[2:4]]))
        second.copy_(torch.tensor([masks[4:]]))
        original(model[0]).data[0] += grown
        method.masked_at.fill_(number)
        probe.update(at(number, 10, phase="explore"))

    step(2, [0, 0, 1, 1, 1, 1])
    step(4, [0, 1, 0, 1, 0, 1], grown=0.5)
    step(6, [0, 0, 0, 1, 1, 1], grown=-1.0)
    method.masked_at.fill_(0)
    probe.update(at(10, 10, phase="explore"))
    probe.finished(None)
    arrays = probe.arrays()
    assert arrays["trail_step"].tolist() == [2, 4, 6]
    assert arrays["trail_cut"].tolist() == [[2, 0], [1, 1], [1, 0]]
    assert arrays["trail_returned"].tolist() == [[0, 0], [1, 0], [0, 1]]
    assert arrays["trail_size"].tolist() == [4, 2]
    # 4 weights for 2 steps, then 2 for 2, 2 for 2 and 1 for 4; one of the second is away for 2
    assert probe.passes.tolist() == [2 * (8 + 4 + 4 + 4), 2 * (4 + 4 + 2 + 8)]
    # the first row moved by 0.5 and by 1, and neither of its weights was kept
    found = probe.measures()
    assert found["returns"] == 2 / 6
    assert found["surviving"] == found["surviving_explore"] == 0
    # movement in a layer of density 1/4; the net's is 1/2
    assert found["layer_focus"] == pytest.approx((1 / 4) / (1 / 2))
    # two sparse passes and a dense one of 10 steps each, over three dense ones
    assert found["train_cost"] == pytest.approx((2 * 20 + 4 * 10 + 2 * 18 + 2 * 10) / (6 * 30))


def test_exploitation_saves_the_weights_gradient():
    made, seen = watched(ramp=0.5)
    found, sizes = made.probe.measures(), made.probe.sizes
    kept = np.array([[m.sum() for m in mask.split(sizes.tolist())] for _, mask, *_ in seen])
    kept = np.vstack([sizes, kept[:-1]])  # a mask is in force from the next step on
    macs = np.array([made.probe.macs[name] for name in made.method.names])
    passes = (2 * kept.sum(0) + kept[24:].sum(0)) / sizes + 24
    assert found["train_cost"] == pytest.approx((macs @ passes) / (3 * 48 * macs.sum()))
    assert found["surviving_exploit"] == 1.0
    assert 0 < found["surviving_explore"] < found["surviving"] < 1


def test_the_trail_of_a_training_adds_up():
    made, seen = watched(period=3)
    arrays = made.probe.arrays()
    left = made.probe.sizes.sum() - arrays["trail_cut"].sum() + arrays["trail_returned"].sum()
    assert left == kept_of(made.model)[0] == seen[-1][1].sum()


def test_a_run_without_a_step_has_a_trail():
    found = fit(methods.build(CUT, {}, 0.9), recipe=Recipe(epochs=0, lr=0.1)).probe
    assert found.arrays()["trail_step"].tolist() == [0]
    assert math.isnan(found.measures()["surviving"])


def test_a_long_trail_is_told_in_fewer_rows():
    probe = _Trail()
    probe.sizes, probe.method = np.ones(20_000), SimpleNamespace(names=())
    ones = np.ones(20_000, int)
    probe.changes = [(step, ones, 2 * ones) for step in range(1, 8)]
    arrays = probe.arrays()
    # 50,000 / 20,000 are 2 rows: of 4 and 3 changes
    assert arrays["trail_step"].tolist() == [4, 7]
    assert arrays["trail_cut"][:, 0].tolist() == [4, 3]
    assert arrays["trail_returned"][:, 0].tolist() == [8, 6]


def test_histograms_of_the_attention():
    made = fit(methods.build(CUT, {"alpha": 0.0}, 0.9), recipe=Recipe(epochs=3, lr=0.01))
    counts = made.probe.arrays()["attention"]
    kept, total = kept_of(made.model)
    assert counts.shape == (4, 2, 80)
    # alpha = 0: A = 1, in the bin that begins there
    assert counts[:, 0, 20].tolist() == [total] * 4
    assert counts[0, 1].sum() == total
    assert counts[-1, 1].sum() == kept
