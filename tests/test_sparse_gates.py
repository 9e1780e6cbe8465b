import math

import pytest
import torch
from weight_tools import at, attached, fit, layer, original

from prunestudy import methods
from prunestudy.methods import Context
from prunestudy.methods.weight_probes import _Gates
from prunestudy.train import Recipe

WEIGHTS, GATES, X, WANTED = [2.0, -3.0, 0.5], [0.25, 0.7, 0.9], [1.0, 2.0, -4.0], 1.5


def gated(weights, gates, target=0.5, **params):
    """One output with sparse gates set to `gates`, training."""
    model = layer(weights)
    method = attached("sparse_gates", model, target, **params)
    method.masks[0].gate.data.copy_(torch.tensor([gates], dtype=torch.float64))
    return model.train(), method


def row(tensor):
    return tensor.detach().flatten().tolist()


# --- the paper's equation


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


def drawn(method, seed):
    method.masks[0].generator.manual_seed(seed)
    return row(method.masks[0].draw())


def test_equation_with_bernoulli_draws():
    draws = set()
    for seed in range(6):
        model, method = gated(WEIGHTS, GATES, bimodal=0.3, ramp=0.5)
        method.steering.start(torch.tensor(0.25))
        draws.add(tuple(z := drawn(method, seed)))
        y, by_weight, by_gate = step_by_hand(z, lambda1=0.075, lambda2=0.25)
        method.masks[0].generator.manual_seed(seed)
        assert backward(model) == pytest.approx(y, abs=1e-14)
        method.after_backward(at(81))
        assert row(original(model).grad) == pytest.approx(by_weight, abs=1e-14)
        assert row(method.masks[0].gate.grad) == pytest.approx(by_gate, abs=1e-14)
    assert len(draws) >= 3
    assert {z for draw in draws for z in draw} == {0.0, 1.0}


def test_equation_with_the_deterministic_draw():
    model, method = gated(WEIGHTS, GATES, bimodal=0.0, draw="deterministic")
    method.steering.start(torch.tensor(0.25))
    y, by_weight, by_gate = step_by_hand([0, 1, 1], lambda1=0, lambda2=0.25)
    assert (backward(model), y) == (-8.0, -8.0)
    method.after_backward(at(81))
    # (y - WANTED) x = -9.5 x: -9.5, -19, 38; the gate's gradient reaches the gate that is off
    assert row(original(model).grad) == by_weight == [0.0, -19.0, 38.0]
    assert row(method.masks[0].gate.grad) == by_gate == [-18.75, 57.25, 19.25]


def test_the_first_lambda2_is_a_tenth_of_the_mean_gradient():
    model, method = gated(WEIGHTS, GATES, bimodal=0.0, draw="deterministic")
    assert method.log()["lambda2"] == 0
    backward(model)
    method.after_backward(at())
    mean = (19 + 57 + 19) / 3
    assert method.steering.strength.item() == pytest.approx(0.1 * mean, rel=1e-14)
    found = row(method.masks[0].gate.grad)
    assert found == pytest.approx([g + 0.1 * mean for g in (-19, 57, 19)], rel=1e-14)


@pytest.mark.parametrize(
    ("bimodal", "ramp", "expected"),
    [
        (4.0, 0.6, [0, 0, 0.4, 0.8, 0.8 + 3.2 / 2, 4.0]),
        (4.0, 1.0, [0, 0, 0.08, 0.32, 0.56, 0.8]),
        (0.0, 0.6, [0] * 6),
    ],
)
def test_ramp_of_lambda1(bimodal, ramp, expected):
    _, method = gated(WEIGHTS, GATES, bimodal=bimodal, ramp=ramp)
    shares = torch.linspace(0, 1, 6, dtype=torch.float64)
    assert row(torch.stack([method.bimodal_ratio(s) for s in shares])) == pytest.approx(expected)


@pytest.mark.parametrize(("lambda1", "lambda2"), [(0.0, 0.5), (0.27, 0.9), (0.3, 1.0)])
def test_resting_point_of_a_gate_on_a_quadratic_loss(lambda1, lambda2):
    """w^2 H = 2; the mean over 4,000 gates after 300 small steps of Bernoulli draws."""
    n, w, curvature = 4000, 2.0, 0.5
    params = {"bimodal": lambda1 / lambda2, "ramp": 0.5, "gate_optimizer": "sgd", "gate_lr": 0.02}
    model, method = gated([w] * n, [0.6] * n, **params)
    method.steering.start(torch.tensor(lambda2))
    optimizer = method.optimizer()
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * curvature * (model.weight - w) ** 2).sum().backward()
        method.after_backward(at(61))
        optimizer.step()
        method.after_step(at(61))
    rest = 1 - lambda2 / 2 if not lambda1 else (2 - lambda1 - lambda2) / (2 - 2 * lambda1)
    # sd of the mean below 0.002
    assert method.masks[0].gate.mean().item() == pytest.approx(rest, abs=0.006)


# --- draws


def test_eval_keeps_the_gates_of_at_least_half_and_draws_nothing():
    model, method = gated([1.0, 2.0, 4.0], [0.4999999, 0.5, 1.0])
    ones = torch.ones(1, 3, dtype=torch.float64)
    before = method.masks[0].generator.get_state()
    assert model.eval()(ones).item() == 6.0
    assert method.kept() == pytest.approx(2 / 3)
    assert torch.equal(before, method.masks[0].generator.get_state())
    for gate, output in ((1.0, 7.0), (0.0, 0.0)):
        method.masks[0].gate.data.fill_(gate)
        assert model.train()(ones).item() == output


def test_share_of_the_draws_is_the_gate():
    model, _ = gated([1.0] * 40_000, [0.3] * 40_000)
    kept = model.weight.count_nonzero().item()
    assert abs(kept / 40_000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 40_000)
    assert not torch.equal(model.weight, model.weight)


@pytest.mark.parametrize("first", ["bernoulli", "deterministic"])
@pytest.mark.parametrize("second", ["bernoulli", "deterministic"])
def test_kinds_of_draw_change_in_the_middle(first, second):
    draw = first if first == second else f"{first}_then_{second}"
    _, method = gated(WEIGHTS, GATES, draw=draw)
    method.update(at(49))
    assert method.masks[0].bernoulli == (first == "bernoulli")
    method.update(at(50))
    assert method.masks[0].bernoulli == (second == "bernoulli")


def test_gates_are_clipped_to_0_1_and_have_an_optimiser_of_their_own():
    _, method = gated(WEIGHTS, [-0.5, 1.5, 0.3])
    method.after_step(at())
    gate = method.masks[0].gate
    assert row(gate) == pytest.approx([0.0, 1.0, 0.3])
    adam = method.optimizer()
    assert type(adam) is torch.optim.Adam
    assert [p is gate for p in adam.param_groups[0]["params"]] == [True]
    assert adam.param_groups[0]["weight_decay"] == 0
    _, plain = gated(WEIGHTS, GATES, gate_optimizer="sgd", gate_lr=0.5)
    sgd = plain.optimizer().param_groups[0]
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.5, 0, 0)


# --- the end of the gates


@pytest.mark.parametrize(
    ("weights", "gates", "target", "mask"),
    [
        # the three at 1, then 0.31 ahead of 0.3 whatever their weights
        ([0.1, -5, 3, -4, 0.2, 9], [1, 0.3, 1, 1, 0.31, 0], 1 / 3, [1, 0, 1, 1, 1, 0]),
        ([0.1, -5, 3, -4, 0.2, 9], [1, 1, 1, 1, 1, 0], 0.5, [0, 1, 1, 1, 0, 0]),
        ([0.5] * 5, [1] * 5, 0.4, [1, 1, 1, 0, 0]),
        ([1, 2, 4, 8], [0.5, 0.49, 0.51, 0.1], 0.5, [1, 0, 1, 0]),
        ([0.0, 0.0], [0.2, 0.4], 0.5, [0, 1]),
    ],
)
def test_the_largest_gates_are_kept_and_ties_go_by_weight(weights, gates, target, mask):
    model, method = gated([float(w) for w in weights], gates, target)
    method.update(at(100))
    assert row(method.masks[0].mask) == mask
    expected = [w * on for w, on in zip(weights, mask, strict=True)]
    context = Context((torch.zeros(2, len(weights)),))
    assert row(method.finish(model, context).weight) == expected


def test_after_the_phase_of_the_gates_nothing_moves_them():
    model, method = gated(WEIGHTS, GATES)
    method.update(at(100))
    backward(model)
    before = row(method.masks[0].gate)
    method.after_backward(at(phase="fine_tune"))
    method.after_step(at(phase="fine_tune"))
    method.update(at(100, phase="fine_tune"))
    assert method.masks[0].gate.grad is None
    assert method.steering.strength.isnan()
    assert row(method.masks[0].gate) == before
    assert method.optimizer() is None
    assert row(original(model).grad)[0] == 0  # a cut weight has no gradient


def test_the_kept_share_follows_its_schedule_to_the_target():
    method = methods.build("sparse_gates", {"gate_lr": 0.05}, 0.9)
    made = fit(method, recipe=Recipe(epochs=60, lr=0.02, period=1))
    gates = [row for row in made.history if row["phase"] == "gates"]
    assert gates[0]["kept"] == pytest.approx(1, abs=0.1)
    # steered to within a third of the target before the mask is made exact
    assert gates[-2]["kept"] == pytest.approx(0.1, rel=1 / 3)
    assert made.history[-1]["kept"] == pytest.approx(0.1, abs=1e-3)
    assert made.history[-1]["undecided"] == 0


# --- what is observed


def test_numbers_of_the_history_and_histograms_of_the_gates():
    _, method = gated([1.0] * 4, [0.0, 0.5, 0.96, 1.0])
    method.steering.start(torch.tensor(0.125))
    expected = {"undecided": 0.25, "expected_kept": pytest.approx(2.46 / 4), "lambda2": 0.125}
    assert method.log() == {"kept": 0.75} | expected
    probe = _Gates()
    assert probe.arrays() == {}
    probe.attach(method, None, None)
    probe.epoch()
    probe.epoch()
    histograms = probe.arrays()["gate_histograms"]
    assert histograms.shape == (2, 40)
    # bins of 0.025; 1.0 falls into the last one
    assert {i: n for i, n in enumerate(histograms[1]) if n} == {0: 1, 20: 1, 38: 1, 39: 1}
