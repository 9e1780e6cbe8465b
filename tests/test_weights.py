import copy
import math
from itertools import pairwise

import pytest
import torch
from conftest import BatchNormNet, one_line, randomise, refused, toy_batches
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset
from weight_tools import (
    MASKED,
    at,
    attached,
    fit,
    kept_of,
    layer,
    masks_of,
    original,
    spied,
    weights_of,
)

from prunestudy import methods, models
from prunestudy.errors import InputError
from prunestudy.methods import Context
from prunestudy.methods.masks import cubic_sparsity, highest, kept_count, layers_in, top_masks
from prunestudy.methods.steering import Steering
from prunestudy.train import Recipe, prune

NETS = {
    "lenet300": (lambda: models.build("lenet300", (1, 8, 8), 10), 8),
    "lenet5": (lambda: models.build("lenet5", (1, 16, 16), 10), 16),
    "batch_norm": (BatchNormNet, 8),
}
SHORT = Recipe(epochs=4, lr=0.02, weight_decay=1e-3, period=1)


def net_of(name):
    torch.manual_seed(0)
    return NETS[name][0]()


# --- masks


@pytest.mark.parametrize(
    ("total", "target", "kept"),
    [(100, 0.9, 10), (50_200, 0.98, 1004), (10, 0.999, 1), (1, 0.5, 1), (7, 0.3, 5)],
)
def test_kept_count(total, target, kept):
    assert kept_count(total, target) == kept


def test_top_masks_rank_what_is_no_number_first():
    inf = math.inf
    scores = [torch.tensor([1.0, math.nan, inf, -inf]), torch.tensor([math.nan, 2.0])]
    masks = [torch.cat(top_masks(scores, 1 - keep / 6)).tolist() for keep in (1, 3, 4, 5)]
    assert masks[:2] == [[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0]]
    assert masks[2:] == [[0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_top_masks_are_those_of_a_stable_sort(levels):
    generator = torch.Generator().manual_seed(levels)
    values = torch.randint(levels, (999,), generator=generator).float()
    parts = [values[:99], values[99:].view(9, 5, 4, 5).to(memory_format=torch.channels_last)]
    for keep in (1, 10, 500, 998, 999):
        expected = torch.zeros(999)
        expected[values.argsort(descending=True, stable=True)[:keep]] = 1
        found = torch.cat([mask.flatten() for mask in top_masks(parts, 1 - keep / 999)])
        assert torch.equal(found, expected)
        assert torch.equal(highest(values, keep).float(), expected)  # as on CUDA


@pytest.mark.parametrize(
    ("share", "expected"), [(0, 0), (0.25, 0.9 * 37 / 64), (0.5, 0.7875), (1, 0.9), (1.5, 0.9)]
)
def test_cubic_sparsity(share, expected):
    assert cubic_sparsity(0.9, share) == pytest.approx(expected, abs=1e-15)


def sizes(model, scope):
    return [each.weight.numel() for each in layers_in(model, scope).values()]


def test_the_scope_is_the_convolutions_unless_linear_layers_hold_most():
    lenet, resnet = models.build("lenet5", (1, 28, 28), 10), models.build("resnet20", (3, 9, 9), 10)
    assert sizes(lenet, "auto") == sizes(lenet, "all") == [500, 25_000, 400_000, 5_000]
    assert sizes(lenet, "convolutions") == [500, 25_000]
    # 19 convolutions and 2 projections
    assert len(sizes(resnet, "auto")) == 21
    assert sizes(resnet, "all") == [*sizes(resnet, "auto"), 640]
    refused(lambda: layers_in(nn.Linear(2, 2), "convolutions"), "scope = ", "Linear has no conv")


def test_weights_that_are_shared_or_made_of_others_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(2, 2)))
    refused(lambda: layers_in(net, "all"), "module = '1': its weight is computed from others")
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    refused(lambda: layers_in(net, "all"), "module = '1': shares a parameter with '0'")


# --- steering


def test_steering_by_hand():
    steering = Steering(0.1, 0.8)
    wanted = [steering.wanted(at(step)) for step in (0, 40, 80, 100)]
    assert wanted == pytest.approx([1, math.sqrt(0.1), 0.1, 0.1])
    assert steering.strength.isnan()
    for strength in (2.0, 3.0):
        steering.start(torch.tensor(strength))
    steering.update(lambda: 1.0, at(40))  # e = log(1 / 0.316) = 1.15, clipped to 1
    assert steering.strength.item() == pytest.approx(2 * math.exp(1.6))
    steering.update(lambda: 0.12, at(80))
    error = math.log(1.2)
    expected = 2 * math.exp(1.6) * math.exp(0.1 * error + 1.5 * (error - 1))
    assert steering.strength.item() == pytest.approx(expected)
    other = Steering(0.1, 0.8)
    other.load_state_dict(steering.state_dict())
    for each in (steering, other):
        each.update(lambda: 0.0, at(90))  # nothing left: e clipped to -1
    assert other.state_dict() == steering.state_dict()
    assert other.error == -1
    other = Steering(0.1, 0.8)
    other.start(torch.tensor(0.0))
    assert other.strength == 1e-30


@pytest.mark.parametrize(("period", "acted"), [(1, [5, 10, 15]), (3, [6, 12]), (8, [8, 16])])
def test_steering_acts_at_least_five_steps_apart(period, acted):
    steering, found = Steering(0.1, 0.8), []
    for step in range(period, 17, period):
        steering.update(lambda now=step: found.append(now) or 1.0, at(step))
    assert found == acted


# --- what every method must do


@pytest.mark.parametrize(
    ("net", "target"),
    [("lenet300", 0.9), ("lenet5", 0.99), *(("batch_norm", t) for t in (0.003, 0.5, 0.99))],
)
@pytest.mark.parametrize("name", MASKED)
def test_the_target_is_exact(name, net, target):
    batches, method = toy_batches(side=NETS[net][1]), methods.build(name, {}, target)
    made = fit(method, net_of(net), batches, SHORT, validation=batches)
    kept, total = kept_of(made.model)
    assert kept == kept_count(total, target)
    assert made.history[-1]["kept"] == pytest.approx(kept / total)


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("name", MASKED)
def test_the_target_is_exact_without_steps(name, epochs):
    """No step at all, and a first phase that is too short for one."""
    settings = methods.method_class(name).Settings.model_fields
    params = {key: 0.01 for key in ("harden", "ramp") if key in settings}
    for each in ({}, params):
        made = fit(methods.build(name, each, 0.9), recipe=Recipe(epochs=epochs, lr=0.02))
        kept, total = kept_of(made.model)
        assert kept == kept_count(total, 0.9)


@pytest.mark.parametrize("period", [0, 3, 16])
@pytest.mark.parametrize("name", MASKED)
def test_the_target_is_exact_whatever_the_period_of_updates(name, period):
    recipe = Recipe(epochs=5, lr=0.02, period=period)
    kept, total = kept_of(fit(methods.build(name, {}, 0.9), recipe=recipe).model)
    assert kept == kept_count(total, 0.9)


def decided(name, model, target=0.8, side=8):
    """A method on `model` with its masks decided, as at the end of a training."""
    dtype = next(model.parameters()).dtype
    batches = [(x.to(dtype), y) for x, y in toy_batches(side=side).epoch(0)]
    method = attached(name, model, target, batch_list=batches)
    if name == "sparse_gates":
        for each in method.masks:
            each.gate.data.uniform_(0, 1, generator=torch.Generator().manual_seed(3))
    method.cut(target)
    return method


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", MASKED)
def test_the_finished_net_is_plain_and_equals_the_masked_one(name, net):
    model = randomise(net_of(net).double())
    dense, side = copy.deepcopy(model).eval(), NETS[net][1]
    method = decided(name, model, side=side)
    plain = method.finish(model, Context((torch.zeros(2, 1, side, side),)))
    x = torch.randn(7, 1, side, side, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected, found, before = model.eval()(x), plain(x), dense(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, before)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in dense.state_dict().items()
    }
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())
    assert [type(m) for m in plain.modules()] == [type(m) for m in dense.modules()]


@pytest.mark.parametrize("name", MASKED)
def test_the_state_of_a_method_is_a_few_numbers_and_none_of_the_models(name):
    method = decided(name, randomise(BatchNormNet()))
    assert sum(tensor.numel() for tensor in method.state_dict().values()) <= 5
    assert list(method.parameters()) == []


@pytest.mark.parametrize("name", MASKED)
def test_ten_lines_for_a_net_on_16_numbers(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 16, generator=generator)
    data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=16)
    torch.manual_seed(0)
    # a last layer with large weights, of which one ranking over the untrained net keeps enough
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    start = copy.deepcopy(net.state_dict())
    method = methods.method_class(name)(target=0.75)
    made = prune(net, method, data, Recipe(epochs=20, lr=0.1), validation=data)
    assert kept_of(made.model) == (36, 144)
    assert made.history[-1]["validation_top1"] > 0.7
    assert all(torch.equal(start[key], value) for key, value in net.state_dict().items())
    made.model.train()(x).sum().backward()


@pytest.mark.parametrize("name", MASKED[1:])
def test_only_the_scope_is_cut_and_exactly(name):
    params = {} if name in ("magnitude_attention", "dpf") else {"scope": "convolutions"}
    torch.manual_seed(0)
    made = fit(
        methods.build(name, params, 0.95), models.resnet(8, (1, 8, 8), 10), toy_batches(), SHORT
    )
    *inside, classifier = weights_of(made.model)
    total = sum(w.numel() for w in inside)
    assert sum(int(w.count_nonzero()) for w in inside) == kept_count(total, 0.95)
    assert classifier.count_nonzero() == classifier.numel()


# --- bad input


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("magnitude", "period", 3),
        ("sparse_gates", "gate_Ir", 0.01),
        ("sparse_gates", "initial", "0.9"),
        ("sparse_gates", "draw", "gumbel"),
        ("sparse_gates", "gate_lr", math.inf),
        ("sparse_gates", "ramp", 0.0),
        ("sparse_gates", "harden", True),
        ("gradual_magnitude", "period", 1.5),
        ("l1", "penalty_phase_lr", [1.0]),
        ("magnitude_attention", "alpha", -0.5),
        ("dpf", "scope", "linear"),
    ],
)
def test_bad_settings_are_refused_in_one_line(name, key, value):
    with pytest.raises(InputError) as caught:
        methods.params_of(name, {key: value})
    assert one_line(caught).startswith(f"params.{key} = {value!r}: ")
    with pytest.raises(InputError) as caught:
        methods.method_class(name)(0.5, **{key: value})
    assert one_line(caught).startswith(f"{key} = {value!r}: ")


@pytest.mark.parametrize("name", MASKED)
def test_what_cannot_be_pruned_is_refused_in_one_line(name):
    for target in (0.0, 1.0, -0.1, None, "a", math.nan, True):
        said = f"target = {target!r}: the share of weights to remove, above 0 and below 1"
        refused(lambda t=target: methods.build(name, {}, t), said)
    method = methods.build(name, {}, 0.5)
    bare = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))
    refused(lambda: method.check(bare), "model = 'Sequential': has no convolution or linear layer")
    said = "target = 0.5: above 0.7500, the share of zeros at the start: nothing left to prune"
    refused(lambda: method.check(layer([0.0, 0.0, 0.0, 1.0])), said)
    said = "target = 0.5: cuts none of 1 weights: nothing to prune"
    refused(lambda: method.check(layer([1.0])), said)


# --- the controls


def test_magnitude_ranks_over_the_whole_net():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data.copy_(torch.tensor([[0.1, -4.0], [0.2, 3.0]]))
    model[2].weight.data.copy_(torch.tensor([[0.3, -0.4]]))
    biases = model[0].bias.tolist()
    method = attached("magnitude", model)
    assert [m.mask.flatten().tolist() for m in method.masks] == [[0, 1, 0, 1], [0, 1]]
    assert method.log() == {"kept": 0.5}
    plain = method.finish(model, Context((torch.zeros(2, 2),)))
    assert plain[0].weight.tolist() == [[0, -4], [0, 3]]
    assert plain[0].bias.tolist() == biases


def test_a_mask_masks_the_gradient_unless_it_has_feedback():
    for name, expected in (("magnitude", [[0.0, 1.0]]), ("dpf", [[1.0, 1.0]])):
        model = layer([1.0, 2.0])
        attached(name, model).cut(0.5)
        model(torch.ones(1, 2).double()).sum().backward()
        assert original(model).grad.tolist() == expected


def test_gradual_magnitude_cuts_by_the_schedule_and_for_good():
    seen, params = [], {"harden": 0.5, "ramp": 0.5, "period": 2}
    method = methods.build("gradual_magnitude", params, 0.9)
    recipe = Recipe(epochs=6, lr=0.05, weight_decay=0.01, period=1)
    fit(spied(method, lambda m, _: seen.append(masks_of(m).bool())), recipe=recipe)
    total = len(seen[0])
    # 24 steps, 12 of pruning; the ramp ends after 6
    expected = [1.0] + [1 - cubic_sparsity(0.9, s / 6) for s in (2, 2, 4, 4)] + [1 - 0.9] * 19
    assert [int(m.sum()) for m in seen] == [round(total * kept) for kept in expected]
    for before, after in pairwise(seen):
        assert not (after & ~before).any()


def test_gradual_magnitude_prefers_a_kept_zero_to_a_weight_that_was_cut():
    model = layer([0.1, 5.0, 1.0])
    method = attached("gradual_magnitude", model)
    method.cut(1 / 3)
    original(model).data[0, 2] = 0.0
    method.cut(1 / 3)
    assert method.masks[0].mask.tolist() == [[0, 1, 1]]


def test_l1_steps_by_hand():
    model = layer([3.0, -2.0, 0.5, -0.1])
    method = attached("l1", model)
    method.steering.start(torch.tensor(2.0))
    method.after_step(at(3, phase="penalty"))  # threshold 0.2
    assert model.weight.tolist()[0] == pytest.approx([2.8, -1.8, 0.3, 0.0], abs=1e-15)
    assert model.weight[0, 3] == 0
    assert method.log() == {"kept": 0.75, "lambda": 2.0}
    method.after_step(at(3, phase="fine_tune"))
    assert model.weight.tolist()[0] == pytest.approx([2.8, -1.8, 0.3, 0.0], abs=1e-15)


def test_l1_begins_with_a_thousandth_of_the_mean_weight_and_ends_with_the_largest():
    model = layer([3.0, -2.0, 0.5, -0.1])
    method = attached("l1", model)
    assert method.log()["lambda"] == 0
    method.after_step(at(phase="penalty"))
    mean = 5.6 / 4
    assert method.steering.strength.item() == pytest.approx(1e-3 * mean / 0.1)
    assert model.weight[0, 1].item() == pytest.approx(-2 + 1e-3 * mean)
    method.update(at(100, phase="penalty"))
    assert (model.weight != 0).tolist() == [[True, True, False, False]]
    assert method.log()["kept"] == 0.5


def test_l1_applies_no_threshold_that_leaves_fewer_than_the_target():
    given = [3.0, -2.0, 0.5, -0.1]
    for strength, left in ((4.0, [2.6, -1.6, 0.1, 0]), (6.0, [2.4, -1.4, 0, 0]), (25.0, given)):
        model = layer(given)
        method = attached("l1", model)
        method.steering.start(torch.tensor(strength))
        method.after_step(at(3, phase="penalty"))  # threshold 0.4, 0.6, 2.5
        assert model.weight.tolist()[0] == pytest.approx(left, abs=1e-15)


def test_a_strong_l1_leaves_the_target_where_inputs_are_always_0():
    """Weights on the last six of ten inputs have no gradient: cut too early, they stay zero."""
    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    x[:, 4:] = 0
    batches = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    method = methods.build("l1", {"ramp": 0.1}, 0.5)
    method.steering.start(torch.tensor(1.0))
    torch.manual_seed(0)
    made = prune(nn.Linear(10, 8), method, batches, Recipe(epochs=10, lr=0.1, period=1))
    assert kept_of(made.model)[0] == 40


def test_a_methods_weights_are_measured_against_the_start():
    model = layer([3.0, -2.0, 0.5, -0.5])
    method = attached("dpf", model)
    original(model).data.mul_(-4)
    assert method.report() == {"grew": 4.0}


def test_weights_that_grow_a_hundredfold_have_come_apart(monkeypatch):
    batches = [(torch.randn(8, 16), torch.arange(8) % 4)]
    kind = methods.method_class("dpf")
    for grown, status in ((99.0, "done"), (100.0, "came_apart")):
        monkeypatch.setattr(kind, "grew", lambda _, grown=grown: grown)
        made = prune(nn.Linear(16, 4), kind(target=0.5), batches, Recipe(epochs=1, lr=0.1))
        assert made.status == status


def test_snip_keeps_the_most_sensitive_connections():
    """One sample x = (1, 2), logits W x, class 1: dL/dW = (p - y) x; the scores are |W dL/dW|."""
    model = layer([1.0, 0.5], [-1.0, 2.0])
    one = [(torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([1]))]
    method = attached("snip", model, batch_list=one)
    # logits (2, 3): p - y = (q, -q), q = 1 / (1 + e); scores q (1, 1, 1, 4): the first of the tie
    q = 1 / (1 + math.e)
    assert method.scores()[0].tolist() == [pytest.approx([q, q]), pytest.approx([q, 4 * q])]
    assert method.masks[0].mask.tolist() == [[1, 0], [0, 1]]
    refused(lambda: methods.build("snip", {}, 0.5).attach(layer([1.0, 2.0]), Context(())), "loss")


def test_snip_looks_at_the_first_batch_and_leaves_the_net_alone():
    batches = list(toy_batches().epoch(0))
    net, fresh, plain = (randomise(BatchNormNet()) for _ in range(3))
    method = attached("snip", net, batch_list=batches)
    for name, buffer in net.named_buffers():
        assert name.endswith("mask") or torch.equal(buffer, fresh.get_buffer(name)), name
    nn.functional.cross_entropy(plain.train()(batches[0][0]), batches[0][1]).backward()
    for found, part in zip(method.scores(), (plain.conv1, plain.conv2, plain.fc), strict=True):
        torch.testing.assert_close(found, (part.weight * part.weight.grad).abs())


def test_dpf_updates_cut_weights_and_takes_them_back():
    model = layer([1.0, -4.0], [9.0, 16.0])
    method = attached("dpf", model)
    method.cut(0.5)
    y = model(torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    (0.5 * (y - torch.tensor([[1.0, -9.0]])) ** 2).sum().backward()
    # y = (0, -7): dL/dW is that of the product W~, for cut weights, too
    assert original(model).grad.tolist() == [[-1, 1], [2, -2]]
    original(model).data[0, 1] = -10.0
    method.cut(0.5)
    assert model.weight.tolist() == [[0, -10], [0, 16]]


def test_bounded_feedback_is_as_large_as_the_kept_gradients_of_the_layer():
    for bounded, cut in ((None, [-30, 60]), (False, [-30, 60]), (True, [-2, 4])):
        model = layer([1.0, -4.0], [9.0, 16.0])
        method = attached("dpf", model, bounded=bounded)
        method.cut(0.5)
        y = model(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
        (0.5 * (y - torch.tensor([[30.0, -25.0]])) ** 2).sum().backward()
        method.after_backward(at(phase="explore"))
        # mean squares: 10 of the kept row (2, -4), 2250 of the one that is cut
        assert original(model).grad.tolist() == [pytest.approx(cut, rel=1e-14), [2, -4]]


def test_batch_norm_multiplies_the_gradient_of_a_filter_that_is_wholly_cut():
    """By about 1 / sqrt(eps) = 316; bounded, as by default, it moves as other filters do."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for bounded in (False, True, None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4))
        with torch.no_grad():
            net[0].weight[0] *= 0.01
        method = attached("dpf", net, 0.25, bounded=bounded)
        method.cut(0.25)
        assert method.masks[0].mask.sum(1).tolist() == [0, 8, 8, 8]
        (net(x) @ torch.ones(4)).square().mean().backward()
        method.after_backward(at(phase="explore"))
        sizes = original(net[0]).grad.square().mean(1).sqrt()
        factor = sizes[0] / sizes[1:].max()
        assert factor > 100 if bounded is False else factor <= 1


# --- weights of other kinds


@pytest.mark.parametrize("name", MASKED)
def test_weights_in_bfloat16(name):
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).bfloat16()
    x, y = torch.randn(32, 8).bfloat16(), torch.arange(32) % 3
    made = prune(net, methods.build(name, {}, 0.5), [(x, y)] * 4, Recipe(epochs=2, lr=0.05))
    kept = sum(int(made.model[i].weight.count_nonzero()) for i in (0, 2))
    assert (made.status, kept, made.model[0].weight.dtype) == ("done", 88, torch.bfloat16)


@pytest.mark.parametrize("name", MASKED)
def test_frozen_weights_are_cut_or_stay_as_they_are(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    net[0].weight.requires_grad_(False)
    data = [(torch.randn(32, 8), torch.arange(32) % 3)] * 8
    if name == "magnitude_attention":
        with pytest.raises(InputError, match=r"^0\.weight = 'frozen': must be trainable"):
            prune(net, methods.build(name, {}, 0.5), data, Recipe(epochs=2, lr=0.1))
        return
    made = prune(net, methods.build(name, {}, 0.5), data, Recipe(epochs=2, lr=0.1))
    left = made.model[0].weight
    assert torch.equal(left, torch.where(left == 0, 0, net[0].weight))
    assert 0 < int((left == 0).sum()) < left.numel()
