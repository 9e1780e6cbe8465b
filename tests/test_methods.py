import copy
import itertools
import math
from itertools import pairwise

import pytest
import torch
from conftest import BatchNormNet, one_line, randomise, toy_batches
from torch import nn
from torch.nn.utils import parametrize

from prunestudy import measure, methods, models
from prunestudy.errors import InputError
from prunestudy.methods import Progress
from prunestudy.methods.masks import cubic_sparsity, kept_count, top_masks
from prunestudy.methods.steering import Steering
from prunestudy.train import Recipe, train

PRUNING = [
    name for name in methods.names() if "sparsity" in methods.method_class(name).target_kinds
]
NETS = {
    "lenet300": (lambda: models.build("lenet300", (1, 8, 8), 10), 8),
    "lenet5": (lambda: models.build("lenet5", (1, 16, 16), 10), 16),
    "batch_norm": (BatchNormNet, 8),
}


def net_of(name):
    torch.manual_seed(0)
    return NETS[name][0]()


def line(weights, dtype=torch.float64):
    """A linear layer without bias, from len(weights) inputs to one output."""
    layer = nn.Linear(len(weights), 1, bias=False, dtype=dtype)
    layer.weight.data.copy_(torch.tensor([weights], dtype=dtype))
    return nn.Sequential(layer)


def attached(name, model, params=None, target=0.5, seed=0):
    method = methods.build(name, params or {}, target)
    method.attach(model, torch.Generator().manual_seed(seed))
    return method


def gated(weights, gates, target=0.5, **params):
    """A line with sparse gates set to `gates`, in the phase of the gates, training."""
    model = line(weights)
    method = attached("sparse_gates", model, params, target)
    method.gates[0].gate.data.copy_(torch.tensor([gates], dtype=torch.float64))
    method.start(model, "gates")
    return model.train(), method


def at(step=0, steps=100, phase="gates"):
    return Progress(phase, step, steps, step, steps)


def row(tensor):
    return tensor.detach().flatten().tolist()


# --- names and parameters


def test_the_methods_are_those_of_the_design():
    names = ("dense", "sparse_gates", "magnitude", "gradual_magnitude", "random", "l1")
    names += ("magnitude_attention", "dpf", "snip")
    assert set(names) <= set(methods.names())
    assert [methods.method_class(name).name for name in methods.names()] == list(methods.names())
    kinds = [methods.method_class(name).target_kinds for name in names]
    assert [kind[:1] for kind in kinds] == [()] + [("sparsity",)] * 8
    with pytest.raises(InputError, match=r"^method = .lasso.: allowed are component_aware, dense"):
        methods.method_class("lasso")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("dense", "harden", 0.5),
        ("magnitude", "period", 3),
        ("sparse_gates", "gate_Ir", 0.01),
        ("sparse_gates", "initial", 0.0),
        ("sparse_gates", "initial", 1.5),
        ("sparse_gates", "initial", "0.9"),
        ("sparse_gates", "draw", "gumbel"),
        ("sparse_gates", "gate_optimizer", "lion"),
        ("sparse_gates", "gate_lr", -0.01),
        ("sparse_gates", "gate_lr", math.inf),
        ("sparse_gates", "bimodal", -1.0),
        ("sparse_gates", "bimodal", math.nan),
        ("sparse_gates", "ramp", 0.0),
        ("sparse_gates", "harden", 1.0),
        ("sparse_gates", "harden", True),
        ("sparse_gates", "gate_phase_lr", None),
        ("gradual_magnitude", "period", 0),
        ("gradual_magnitude", "period", 1.5),
        ("gradual_magnitude", "harden", 0.0),
        ("gradual_magnitude", "prune_phase_lr", 0.0),
        ("l1", "ramp", 1.1),
        ("l1", "penalty_phase_lr", [1.0]),
        ("gdp", "eps_start", 0.0),
        ("gdp", "eps_start", -0.1),
        ("gdp", "eps_end", 0.0),
        ("gdp", "eps_end", math.nan),
        ("gdp", "gate_lr", 0.0),
        ("gdp", "ramp", 1.5),
        ("gdp", "eps_share", 0.0),
        ("gdp", "pace", "fast"),
        ("gdp", "eps", 0.1),
        ("hard_concrete", "keep", 1.0),
        ("hard_concrete", "harden", 0.0),
        ("network_slimming", "strength", 0.0),
        ("network_slimming", "cut", 1.0),
        ("group_l2", "p", 2),
    ],
)
def test_bad_parameters_are_refused_in_one_line(name, key, value):
    with pytest.raises(InputError) as caught:
        methods.params_of(name, {key: value})
    assert one_line(caught).startswith(f"params.{key} = {value!r}: ")


STRUCTURED = ("gdp", "hard_concrete", "l1_filter", "group_l2", "random")
COUNTED = [*itertools.product(PRUNING, [("sparsity", "weights")])]
COUNTED += itertools.product(STRUCTURED, [("macs", "MACs"), ("parameters", "parameters")])


@pytest.mark.parametrize(("name", "kind"), COUNTED)
@pytest.mark.parametrize("target", [0, 1, 0.0, 1.0, -0.1, 1.5, None, "a", math.nan, math.inf, True])
def test_bad_targets_are_refused_in_one_line(name, kind, target):
    with pytest.raises(InputError) as caught:
        methods.build(name, {}, target, kind[0])
    allowed = f"the share of {kind[1]} to remove, above 0 and below 1"
    assert one_line(caught) == f"target = {target!r}: {allowed}"


@pytest.mark.parametrize("name", PRUNING)
def test_a_net_without_weights_to_prune_is_refused(name):
    with pytest.raises(InputError) as caught:
        attached(name, nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)))
    assert one_line(caught) == "model = Sequential: has no convolution or linear layer"


@pytest.mark.parametrize("name", ["dense", *PRUNING])
def test_phases_share_all_steps(name):
    method = methods.build(name, {}, 0.5 if name in PRUNING else None)
    assert math.fsum(phase.share for phase in method.phases()) == pytest.approx(1, abs=1e-12)
    assert not method.phases()[0].restart


# --- the paper's equation


WEIGHTS, GATES, X, WANTED = [2.0, -3.0, 0.5], [0.25, 0.7, 0.9], [1.0, 2.0, -4.0], 1.5


def step_by_hand(z, lambda1, lambda2):
    """Output, dL/dw and dL/dg of L = (y - WANTED)^2 / 2 + penalties for y = sum x w z."""
    y = sum(x * w * on for x, w, on in zip(X, WEIGHTS, z, strict=True))
    by_product = [(y - WANTED) * x for x in X]
    by_weight = [on * d for on, d in zip(z, by_product, strict=True)]
    by_gate = [
        w * d + lambda2 + lambda1 * (1 - 2 * g)
        for w, d, g in zip(WEIGHTS, by_product, GATES, strict=True)
    ]
    return y, by_weight, by_gate


def backward(model):
    y = model(torch.tensor([X], dtype=torch.float64))
    (0.5 * (y - WANTED) ** 2).sum().backward()
    return y.item()


@pytest.mark.parametrize("seed", range(6))
def test_equation_with_bernoulli_draws(seed):
    model, method = gated(WEIGHTS, GATES, bimodal=0.3, ramp=0.5)
    method.steering.start(0.25)
    z = drawn(method, seed)
    y, by_weight, by_gate = step_by_hand(z, lambda1=0.075, lambda2=0.25)
    method.gates[0].generator.manual_seed(seed)
    assert backward(model) == pytest.approx(y, abs=1e-14)
    method.after_backward(model, at(80))
    layer = model[0].parametrizations.weight
    assert row(layer.original.grad) == pytest.approx(by_weight, abs=1e-14)
    assert row(layer[0].gate.grad) == pytest.approx(by_gate, abs=1e-14)


def drawn(method, seed):
    method.gates[0].generator.manual_seed(seed)
    return row(method.gates[0].draw())


def test_the_six_draws_are_zeros_and_ones_and_not_all_alike():
    _, method = gated(WEIGHTS, GATES)
    draws = {tuple(drawn(method, seed)) for seed in range(6)}
    assert len(draws) >= 3
    assert {z for draw in draws for z in draw} == {0.0, 1.0}


def test_equation_with_the_deterministic_draw():
    model, method = gated(WEIGHTS, GATES, bimodal=0.0, draw="deterministic")
    method.steering.start(0.25)
    y, by_weight, by_gate = step_by_hand([0, 1, 1], lambda1=0, lambda2=0.25)
    assert (backward(model), y) == (-8.0, -8.0)
    method.after_backward(model, at(80))
    layer = model[0].parametrizations.weight
    # (y - WANTED) x = -9.5 x: -9.5, -19, 38; the gate's gradient reaches the gate that is off
    assert row(layer.original.grad) == by_weight == [0.0, -19.0, 38.0]
    assert row(layer[0].gate.grad) == by_gate == [-18.75, 57.25, 19.25]


def test_the_first_lambda2_is_a_tenth_of_the_mean_gradient():
    model, method = gated(WEIGHTS, GATES, bimodal=0.0, draw="deterministic")
    backward(model)
    method.after_backward(model, at())
    mean = (19 + 57 + 19) / 3
    assert method.steering.strength == pytest.approx(0.1 * mean, rel=1e-14)
    found = row(method.gates[0].gate.grad)
    assert found == pytest.approx([g + 0.1 * mean for g in (-19, 57, 19)], rel=1e-14)


def test_after_the_phase_of_the_gates_nothing_is_added():
    model, method = gated(WEIGHTS, GATES)
    method.end(model, "gates")
    backward(model)
    method.after_backward(model, at(phase="fine_tune"))
    method.after_step(model, at(phase="fine_tune"), 0.1)
    assert method.gates[0].gate.grad is None
    assert method.steering.strength is None


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, 0), (0.2, 0), (0.4, 0.4), (0.6, 0.8), (0.8, 0.8 + 3.2 / 2), (1.0, 4.0)],
)
def test_ramp_of_lambda1(share, expected):
    _, method = gated(WEIGHTS, GATES, bimodal=4.0, ramp=0.6)
    assert method._bimodal(share) == pytest.approx(expected, abs=1e-12)


def test_lambda1_is_at_its_end_where_the_ramp_fills_the_phase():
    _, method = gated(WEIGHTS, GATES, bimodal=4.0, ramp=1.0)
    assert method._bimodal(1.0) == pytest.approx(0.8)
    _, method = gated(WEIGHTS, GATES, bimodal=0.0)
    assert [method._bimodal(s / 10) for s in range(11)] == [0.0] * 11


def test_eval_keeps_the_gates_of_at_least_half():
    model, method = gated([1.0, 2.0, 4.0], [0.4999999, 0.5, 1.0])
    method.gates[0].gate.data.clamp_(0, 1)
    ones = torch.ones(1, 3, dtype=torch.float64)
    before = method.gates[0].generator.get_state()
    assert model.eval()(ones).item() == 6.0
    assert method.kept_share(model) == pytest.approx(2 / 3)
    # looking draws nothing
    assert torch.equal(before, method.gates[0].generator.get_state())
    method.gates[0].gate.data.fill_(1.0)
    assert model.train()(ones).item() == 7.0
    method.gates[0].gate.data.fill_(0.0)
    assert model(ones).item() == 0.0


def test_share_of_the_draws_is_the_gate():
    model, _ = gated([1.0] * 40_000, [0.3] * 40_000)
    kept = model[0].weight.count_nonzero().item()
    assert abs(kept / 40_000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 40_000)
    assert not torch.equal(model[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("draw", "first", "second"),
    [
        ("bernoulli", True, True),
        ("deterministic", False, False),
        ("bernoulli_then_deterministic", True, False),
        ("deterministic_then_bernoulli", False, True),
    ],
)
def test_kinds_of_draw_change_in_the_middle(draw, first, second):
    model, method = gated(WEIGHTS, GATES, draw=draw)
    assert method.gates[0].bernoulli == first
    method.after_step(model, at(48), 0.1)
    assert method.gates[0].bernoulli == first
    method.after_step(model, at(49), 0.1)
    assert method.gates[0].bernoulli == second


@pytest.mark.parametrize(("lambda1", "lambda2"), [(0.0, 0.5), (0.27, 0.9), (0.3, 1.0)])
def test_resting_point_of_a_gate_on_a_quadratic_loss(lambda1, lambda2):
    """w^2 H = 2; the mean over 4,000 gates after 300 small steps of Bernoulli draws."""
    n, w, curvature = 4000, 2.0, 0.5
    params = {"bimodal": lambda1 / lambda2, "ramp": 0.5, "gate_optimizer": "sgd", "gate_lr": 0.02}
    model, method = gated([w] * n, [0.6] * n, **params)
    method.steering.start(lambda2)
    optimizer = method.own_optimizer(model, "gates")
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * curvature * (model[0].weight - w) ** 2).sum().backward()
        method.after_backward(model, at(60))
        optimizer.step()
        method.after_step(model, at(60), 0.1)
    rest = 1 - lambda2 / 2 if not lambda1 else (2 - lambda1 - lambda2) / (2 - 2 * lambda1)
    # sd of the mean below 0.002
    assert method.gates[0].gate.mean().item() == pytest.approx(rest, abs=0.006)


def test_gates_are_clipped_to_0_1():
    model, method = gated(WEIGHTS, [-0.5, 1.5, 0.3])
    method.after_step(model, at(), 0.1)
    assert row(method.gates[0].gate) == pytest.approx([0.0, 1.0, 0.3])


def test_gates_have_an_optimiser_of_their_own():
    model, method = gated(WEIGHTS, GATES)
    gate = method.gates[0].gate
    adam = method.own_optimizer(model, "gates")
    assert type(adam) is torch.optim.Adam
    assert [p is gate for p in adam.param_groups[0]["params"]] == [True]
    assert adam.param_groups[0]["weight_decay"] == 0
    assert all(p is not gate for p in method.parameter_groups(model, "gates"))
    assert len(method.parameter_groups(model, "gates")) == 1
    assert method.own_optimizer(model, "fine_tune") is None
    _, plain = gated(WEIGHTS, GATES, gate_optimizer="sgd", gate_lr=0.5)
    sgd = plain.own_optimizer(model, "gates").param_groups[0]
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.5, 0, 0)


def test_history_row_and_histograms_of_the_gates():
    model, method = gated([1.0] * 4, [0.0, 0.5, 0.96, 1.0])
    method.steering.start(0.125)
    assert method.row(model) == {
        "undecided": 0.25,
        "expected_kept": pytest.approx(2.46 / 4),
        "lambda2": 0.125,
    }
    method.row(model)
    histograms = method.arrays()["gate_histograms"]
    assert histograms.shape == (2, 40)
    # bins of 0.025; 1.0 falls into the last one
    assert {i: n for i, n in enumerate(histograms[1]) if n} == {0: 1, 20: 1, 38: 1, 39: 1}


def test_the_sampled_view_draws_in_eval_and_leaves_no_trace():
    model, method = gated([1.0] * 1000, [0.6] * 1000)
    model.eval()
    before = method.gates[0].generator.get_state()
    with method.views(model)["sampled"]:
        kept = model[0].weight.count_nonzero().item()
        assert kept != model[0].weight.count_nonzero().item()
        assert 500 < kept < 700
    assert model[0].weight.count_nonzero() == 1000
    assert torch.equal(before, method.gates[0].generator.get_state())
    assert (method.gates[0].bernoulli, method.gates[0].sample_in_eval) == (True, False)
    method.end(model, "gates")
    assert method.views(model) == {}


def test_hardening_keeps_the_largest_gates_and_ties_go_by_weight():
    weights = [0.1, -5.0, 3.0, -4.0, 0.2, 9.0]
    model, method = gated(weights, [1.0, 0.3, 1.0, 1.0, 0.31, 0.0], target=1 / 3)
    method.end(model, "gates")
    # 4 of 6: the three at 1, then 0.31 ahead of 0.3 whatever their weights
    assert row(method.gates[0].mask) == [1, 0, 1, 1, 1, 0]
    assert not method.gates[0].gate.requires_grad
    model, method = gated(weights, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0], target=0.5)
    method.end(model, "gates")
    assert row(method.gates[0].mask) == [0, 1, 1, 1, 0, 0]
    model, method = gated([0.5] * 5, [1.0] * 5, target=0.4)
    method.end(model, "gates")
    assert row(method.gates[0].mask) == [1, 1, 1, 0, 0]
    assert row(method.finish(model)[0].weight) == [0.5, 0.5, 0.5, 0, 0]


# --- steering, masks, schedules


def test_steering_by_hand():
    steering = Steering(0.1, 0.8)
    assert [steering.wanted(s, 100) for s in (0, 40, 80, 100)] == pytest.approx(
        [1, math.sqrt(0.1), 0.1, 0.1]
    )
    assert not steering.due(5)
    steering.start(2.0)
    steering.start(3.0)
    assert [steering.due(s) for s in (4, 5, 10)] == [False, True, True]
    steering.update(1.0, 40, 100)  # e = log(1 / 0.316) = 1.15, clipped to 1
    assert steering.strength == pytest.approx(2 * math.exp(1.6))
    steering.update(0.12, 80, 100)
    error = math.log(1.2)
    assert steering.strength == pytest.approx(
        2 * math.exp(1.6) * math.exp(0.1 * error + 1.5 * (error - 1))
    )
    state = steering.state()
    other = Steering(0.1, 0.8)
    other.load_state(state)
    for each in (steering, other):
        each.update(0.0, 90, 100)  # nothing left: e clipped to -1
    assert other.state() == steering.state()
    assert other._error == -1


def test_steering_starts_above_zero():
    steering = Steering(0.1, 0.8)
    steering.start(0.0)
    assert steering.strength == 1e-30


@pytest.mark.parametrize(
    ("total", "target", "kept"),
    [(100, 0.9, 10), (50_200, 0.98, 1004), (10, 0.999, 1), (1, 0.5, 1), (7, 0.3, 5)],
)
def test_kept_count(total, target, kept):
    assert kept_count(total, target) == kept


@pytest.mark.parametrize("keep", range(8))
def test_top_masks_keeps_exactly_that_many_with_ties(keep):
    scores = [torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.tensor([2.0, 2.0, 5.0])]
    order = [6, 1, 2, 4, 5, 0, 3]  # of equal scores the first
    expected = [float(i in order[:keep]) for i in range(7)]
    masks = top_masks(scores, keep)
    assert [tuple(m.shape) for m in masks] == [(2, 2), (3,)]
    assert torch.cat([m.flatten() for m in masks]).tolist() == expected


def test_top_masks_rank_what_is_no_number_first():
    inf = math.inf
    scores = [torch.tensor([1.0, math.nan, inf, -inf]), torch.tensor([math.nan, 2.0])]
    masks = [torch.cat(top_masks(scores, keep)).tolist() for keep in (1, 3, 4, 5)]
    assert masks[:2] == [[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0]]
    assert masks[2:] == [[0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_top_masks_are_those_of_a_stable_sort(levels):
    generator = torch.Generator().manual_seed(levels)
    values = torch.randint(levels, (999,), generator=generator).float()
    for keep in (1, 10, 500, 998, 999):
        expected = torch.zeros(999)
        expected[values.argsort(descending=True, stable=True)[:keep]] = 1
        assert torch.equal(torch.cat(top_masks([values[:99], values[99:]], keep)), expected)


def test_top_masks_of_equal_scores_in_every_memory_layout():
    scores = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    (mask,) = top_masks([scores], 17)
    assert mask.flatten().tolist() == [1.0] * 17 + [0.0] * 79


@pytest.mark.parametrize(
    ("share", "expected"), [(0, 0), (0.25, 0.9 * 37 / 64), (0.5, 0.7875), (1, 0.9), (1.5, 0.9)]
)
def test_cubic_sparsity(share, expected):
    assert cubic_sparsity(0.9, share) == pytest.approx(expected, abs=1e-15)


# --- the controls


def test_magnitude_ranks_over_the_whole_net():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data.copy_(torch.tensor([[0.1, -4.0], [0.2, 3.0]]))
    model[2].weight.data.copy_(torch.tensor([[0.3, -0.4]]))
    biases = row(model[0].bias)
    method = attached("magnitude", model, target=0.5)
    assert method.kept_share(model) == 1
    method.start(model, "train")
    assert [row(m.mask) for m in method.masks] == [[0, 1, 0, 1], [0, 1]]
    assert method.kept_share(model) == 0.5
    plain = method.finish(model)
    assert row(plain[0].weight) == [0, -4, 0, 3]
    assert row(plain[2].weight) == pytest.approx([0, -0.4])
    assert row(plain[0].bias) == biases


def test_random_masks_follow_the_seed_and_not_the_weights():
    def mask(seed, weights):
        model = line(weights)
        method = attached("random", model, target=0.7, seed=seed)
        method.start(model, "train")
        return row(method.masks[0].mask)

    up, down = [float(i) for i in range(100)], [float(100 - i) for i in range(100)]
    assert mask(1, up) == mask(1, down)
    assert mask(1, up) != mask(2, up)
    assert sum(mask(2, up)) == 30


def masks_along_the_way(name, params, epochs=6, net="lenet300"):
    """Masks after each step of a training on noise, and the trained net."""
    method, seen = methods.build(name, params, 0.9), []
    after_step = method.after_step

    def spy(model, progress, lr):
        after_step(model, progress, lr)
        seen.append(torch.cat([m.mask.flatten() for m in method.masks]).bool().clone())

    method.after_step = spy
    recipe = Recipe(epochs=epochs, lr=0.05, weight_decay=0.01)
    side = NETS[net][1]
    batches = toy_batches(side=side)
    made = train(net_of(net), method, recipe, batches, batches, seed=0)
    return seen, made.model


def test_gradual_magnitude_cuts_by_the_schedule_and_for_good():
    params = {"harden": 0.5, "ramp": 0.5, "period": 2}
    seen, _ = masks_along_the_way("gradual_magnitude", params)
    total = len(seen[0])
    # 24 steps, 12 of pruning; the ramp ends after 6
    expected = [1.0] + [1 - cubic_sparsity(0.9, s / 6) for s in (2, 2, 4, 4)] + [1 - 0.9] * 19
    assert [int(m.sum()) for m in seen] == [round(total * kept) for kept in expected]
    for before, after in pairwise(seen):
        assert not (after & ~before).any()
    cut_first = ~seen[1]
    assert (~seen[-1])[cut_first].all()


def test_gradual_magnitude_prefers_a_kept_zero_to_a_weight_that_was_cut():
    model = line([0.1, 5.0, 1.0])
    method = attached("gradual_magnitude", model)
    method.cut(model, 1 / 3)
    assert row(method.masks[0].mask) == [0, 1, 1]
    model[0].parametrizations.weight.original.data[0, 2] = 0.0
    method.cut(model, 1 / 3)
    assert row(method.masks[0].mask) == [0, 1, 1]


def test_l1_steps_by_hand():
    model = line([3.0, -2.0, 0.5, -0.1])
    method = attached("l1", model)
    method.steering.start(2.0)
    method.after_step(model, at(phase="penalty"), 0.1)  # threshold 0.2
    assert row(model[0].weight) == pytest.approx([2.8, -1.8, 0.3, 0.0], abs=1e-15)
    assert row(model[0].weight)[3] == 0
    assert method.kept_share(model) == 0.75
    assert method.row(model) == {"lambda": 2.0}
    method.after_step(model, at(phase="fine_tune"), 0.1)
    assert row(model[0].weight) == pytest.approx([2.8, -1.8, 0.3, 0.0], abs=1e-15)


def test_l1_begins_with_a_thousandth_of_the_mean_weight():
    model = line([3.0, -2.0, 0.5, -0.1])
    method = attached("l1", model)
    method.after_step(model, at(phase="penalty"), 0.1)
    mean = 5.6 / 4
    assert method.steering.strength == pytest.approx(1e-3 * mean / 0.1)
    assert row(model[0].weight)[:2] == pytest.approx([3 - 1e-3 * mean, -2 + 1e-3 * mean])


def test_l1_keeps_the_largest_at_the_end():
    model = line([3.0, -2.0, 0.5, -0.1, 0.0])
    method = attached("l1", model, target=0.6)
    method.start(model, "penalty")
    method.end(model, "penalty")
    assert row(model[0].weight) == [3, -2, 0, 0, 0]
    assert method.kept_share(model) == 0.4


# --- what is left in the end


@pytest.mark.parametrize(
    ("net", "target"),
    [("lenet300", 0.9), ("lenet5", 0.99), *(("batch_norm", t) for t in (0.003, 0.5, 0.9, 0.99))],
)
@pytest.mark.parametrize("name", PRUNING)
def test_sparsity_is_exact_after_training(name, net, target):
    batches = toy_batches(side=NETS[net][1])
    method = methods.build(name, {}, target)
    made = train(net_of(net), method, Recipe(epochs=4, lr=0.02), batches, batches, seed=0)
    weights = [w for _, w in measure.prunable_weights(made.model)]
    total = sum(w.numel() for w in weights)
    assert sum(int(w.count_nonzero()) for w in weights) == kept_count(total, target)
    assert made.history[-1]["kept"] == pytest.approx(kept_count(total, target) / total)


@pytest.mark.parametrize("name", PRUNING)
def test_sparsity_is_exact_when_a_phase_is_too_short_for_a_step(name):
    params = {"harden": 0.01} if "harden" in methods.method_class(name).Params.model_fields else {}
    batches = toy_batches()
    method = methods.build(name, params, 0.9)
    made = train(net_of("batch_norm"), method, Recipe(epochs=1, lr=0.02), batches, batches, seed=0)
    weights = [w for _, w in measure.prunable_weights(made.model)]
    total = sum(w.numel() for w in weights)
    assert sum(int(w.count_nonzero()) for w in weights) == kept_count(total, 0.9)


class Images:
    """What `prepare` may look at: one batch of noise in the net's own precision."""

    shape, steps, task = (1, 8, 8), 1, measure.Task()

    def __init__(self, side, dtype):
        self.shape, self.dtype = (1, side, side), dtype
        self.train = self

    def epoch(self, epoch):
        for x, y in toy_batches(side=self.shape[1]).epoch(epoch):
            yield x.to(self.dtype), y


def played(name, model, target=0.8, side=8):
    """`model` with the method's masks or gates decided, as at the end of a training."""
    method = attached(name, model, target=target if name in PRUNING else None)
    method.prepare(model, Images(side, next(model.parameters()).dtype))
    for phase in method.phases():
        method.start(model, phase.name)
        if name == "sparse_gates" and phase.name == "gates":
            for gate in method.gates:
                gate.gate.data.uniform_(0, 1, generator=torch.Generator().manual_seed(3))
        method.end(model, phase.name)
    return method


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["dense", *PRUNING])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_the_finished_net_is_the_gated_net(name, net, dtype, tolerance):
    model = randomise(net_of(net).to(dtype))
    dense = copy.deepcopy(model).eval()
    method = played(name, model, side=NETS[net][1])
    plain = method.finish(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 1, *[NETS[net][1]] * 2, generator=generator, dtype=dtype)
    with torch.no_grad():
        expected, found, before = model.eval()(x), plain(x), dense(x)
    scale = expected.abs().max()
    assert scale > 0.1
    assert (found - expected).abs().max() / scale <= tolerance
    # and the comparison can fail: the dense net is far away
    assert ((before - expected).abs().max() / scale > 0.1) == (name in PRUNING)


@pytest.mark.parametrize("name", ["dense", *PRUNING])
def test_the_finished_net_is_plain_torch(name):
    model = randomise(BatchNormNet())
    fresh = BatchNormNet()
    plain = played(name, model).finish(model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in fresh.modules()]
    assert {k: tuple(v.shape) for k, v in plain.state_dict().items()} == {
        k: tuple(v.shape) for k, v in fresh.state_dict().items()
    }
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in fresh.named_parameters()}
    for module in plain.modules():
        assert not parametrize.is_parametrized(module)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert [len(h) for h in hooks] == [0, 0, 0]
    assert not plain.training
    fresh.load_state_dict(plain.state_dict())


def test_a_gate_at_one_half_is_decided_like_in_eval():
    model, method = gated([1.0, 2.0, 4.0, 8.0], [0.5, 0.49, 0.51, 0.1], target=0.5)
    before = row(model.eval()[0].weight)
    assert row(method.finish(model)[0].weight) == before == [1, 0, 4, 0]


@pytest.mark.parametrize("name", ["dense", *PRUNING])
def test_states_are_taken_back(name):
    """A method that was attached anew continues with the state of another."""
    model = randomise(BatchNormNet())
    method = played(name, model)
    method.row(model)
    other = BatchNormNet()
    again = attached(name, other, target=0.8 if name in PRUNING else None)
    other.load_state_dict(model.state_dict())
    again.load_state(copy.deepcopy(method.state()))
    assert again.kept_share(other) == method.kept_share(model)
    for key, value in method.arrays().items():
        assert again.arrays()[key].tobytes() == value.tobytes()
    x = torch.ones(2, 1, 8, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert torch.equal(again.finish(other)(x), method.finish(model)(x))
