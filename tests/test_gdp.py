"""GDP by hand: gates, thresholds, schedules, freezing, what is recorded; hard concrete gates."""

import copy
import math

import pytest
import torch
from conftest import one_line, randomise
from test_channels import context_of, fit, net_of
from torch import nn
from torch.nn.utils import parametrize

from prunestudy import methods, models
from prunestudy.errors import InputError
from prunestudy.methods.channel_probes import _ConcretePaths, _GatePaths
from prunestudy.methods.gdp import gate
from prunestudy.methods.hard_concrete import _Gates as ConcreteGates
from prunestudy.methods.polarity import Polarity

LOSS = torch.tensor(1.0)


def prepared(model, params=None, target=0.5, kind="macs", side=8, name="gdp"):
    like = next(model.parameters())
    method = methods.build(name, params or {}, target, kind)
    method.context = context_of(torch.zeros(2, 1, side, side, dtype=like.dtype))
    method.attach(model, method.context)
    return method


def steered(strength, params=None, **options):
    """GDP with lambda held at `strength`, on 64 inputs, three hidden units and two outputs.

    Without `params` gates follow the gradient of each batch, and move as far as they like.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Linear(3, 2)).double()
    method = prepared(net, {"average": 0.0, "bound": 0.0} | (params or {}), **options)
    if strength:
        method.steering.start(torch.tensor(strength))
        method.steering.period = 10**9
    return net, method


def set_gates(method, values):
    method.gates.t.data = torch.tensor(values, dtype=torch.float64)


def push(method, forces, step, steps=100, update=True):
    """One step with dL/dg given: through the chain rule, the optimiser and the threshold."""
    t, eps, at = method.gates.t, method.gates.eps, method.at(step, steps, LOSS)
    slope = 2 * t.detach() * eps / (t.detach() ** 2 + eps) ** 2
    t.grad = torch.tensor(forces, dtype=torch.float64) * slope
    method.after_backward(at)
    method.optimizer().step()
    method.after_step(at)
    if update:
        method.update(at)


# --- the gate


def test_gate_and_its_slope_by_hand():
    t = torch.tensor([0.0, 0.1, -0.1, 1.0], dtype=torch.float64, requires_grad=True)
    g = gate(t, 0.01)
    assert g.tolist() == pytest.approx([0, 0.5, 0.5, 1 / 1.01], abs=1e-15)
    g.sum().backward()
    # 2 t eps / (t^2 + eps)^2; none at all at 0: off is for good
    slope = [0, 2 * 0.1 * 0.01 / 0.02**2, -2 * 0.1 * 0.01 / 0.02**2, 0.02 / 1.01**2]
    assert t.grad.tolist() == pytest.approx(slope, rel=1e-12)
    assert t.grad[0] == 0.0


def test_the_slope_is_largest_at_the_square_root_of_a_third_of_eps():
    eps, peak = 1e-2, math.sqrt(1e-2 / 3)
    t = torch.linspace(0, 4 * peak, 4001, dtype=torch.float64, requires_grad=True)
    gate(t, eps).sum().backward()
    assert t.detach()[t.grad.argmax()].item() == pytest.approx(peak, rel=1e-3)
    assert t.grad.max().item() == pytest.approx(3 * math.sqrt(3) / (8 * math.sqrt(eps)), rel=1e-6)


def test_gate_times_its_gradient_is_the_kernel_times_its_gradient():
    model = randomise(models.build("lenet5", (1, 16, 16), 10).double())
    method = prepared(model, side=16)
    g = gate(method.gates.t, method.gates.eps).detach().requires_grad_(True)
    method.gates.forward = lambda: g
    x = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    model(x).square().sum().backward()
    weight = model.conv2.parametrizations.weight.original
    by_kernel = (weight * weight.grad).sum((0, 2, 3))
    torch.testing.assert_close(g.detach()[:20] * g.grad[:20], by_kernel)


def test_before_a_batch_norm_scaling_all_gates_of_a_layer_costs_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6, 1e-16)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)),
    )
    model = randomise(net.double()).train()
    method = prepared(model)
    g = gate(method.gates.t, method.gates.eps).detach().requires_grad_(True)
    method.gates.forward = lambda: g
    model(torch.randn(8, 1, 8, 8, dtype=torch.float64)).square().sum().backward()
    by_gate = (g * g.grad).detach()
    assert by_gate[:5].abs().max() > 1e-3
    assert abs(by_gate[:5].sum()) < 1e-12 * by_gate[:5].abs().sum()
    # the linear layer behind has no batch norm after it
    assert abs(by_gate[5:].sum()) > 1e-3 * by_gate[5:].abs().sum()


# --- where gates are


def test_kernels_that_consume_one_channel_set_share_its_gates():
    model = models.build("resnet20", (1, 8, 8), 10)
    method = prepared(model)
    gated = [n for n, m in model.named_modules() if parametrize.is_parametrized(m, "weight")]
    every = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert gated == [name for name in every if name != "conv1"]
    assert sum(p is method.gates.t for p in model.parameters()) == 1
    part = method.channels.slices[0]
    assert method.channels.groups[0].name == "conv1"
    readers = [model.stage1[i].conv1 for i in range(3)] + [model.stage2[0].conv1]
    with torch.no_grad():
        method.gates.t[part.start + 2] = 0
        for layer in [*readers, model.stage2[0].shortcut]:
            assert layer.weight[:, 2].count_nonzero() == 0
            assert layer.weight[:, 3].count_nonzero() > 0
        assert model.stage1[0].conv2.weight[:, 2].count_nonzero() > 0


def test_depthwise_kernels_are_not_gated_and_flattened_channels_share_a_gate():
    net = net_of("depthwise")
    method = prepared(net)
    assert not parametrize.is_parametrized(net.depth)
    assert parametrize.is_parametrized(net.project)
    lenet = models.build("lenet5", (1, 16, 16), 10).double()
    method = prepared(lenet, side=16)
    with torch.no_grad():
        method.gates.t[20 + 3] = 0.5  # the fourth channel of conv2
    scale = (lenet.fc1.weight / lenet.fc1.parametrizations.weight.original)[0]
    assert scale[3].item() == pytest.approx(0.25 / 0.35)
    assert scale[[2, 4]].tolist() == pytest.approx([1 / 1.1] * 2)


def test_only_the_named_groups_are_gated_with_an_optimiser_of_their_own():
    net = net_of("lenet5")
    method = prepared(net, {"groups": "conv2"}, side=16)
    gated = [n for n, m in net.named_modules() if parametrize.is_parametrized(m, "weight")]
    assert (gated, method.channels.size) == (["fc1"], 50)
    group = method.optimizer().param_groups[0]
    assert [p is method.gates.t for p in group["params"]] == [True]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0, 0)


# --- one step


def test_soft_threshold_by_hand():
    _, method = steered(3.0)
    # every share is (64 + 2) / 198, so that a step takes 0.05 * 3 / 3 = 0.05 off
    set_gates(method, [1.0, -0.5, 0.04])
    push(method, [0.0] * 3, 1)
    assert method.gates.t.tolist() == pytest.approx([0.95, -0.45, 0.0], abs=1e-14)
    assert method.gates.t[2] == 0.0
    assert method.open().tolist() == [True, True, False]
    # a gradient step comes before the threshold, and closed gates stay closed
    _, method = steered(3.0)
    set_gates(method, [1.0, 1.0, 0.0])
    push(method, [-2.0, 5.0, -100.0], 1)
    slope = 2 * 0.1 / 1.1**2
    expected = [1 + 0.05 * 2 * slope - 0.05, 1 - 0.05 * 5 * slope - 0.05, 0]
    assert method.gates.t.tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("factor", "holds"), [(1.05, True), (0.95, False)])
def test_a_gate_holds_itself_from_154_lambda_c_root_eps_on(factor, holds):
    """Two of three gates are protected by a strong force, the third meets the bound or not."""
    strength, eps, share = 1.0, 1e-2, 1 / 3
    params = {"eps_start": eps, "eps_end": eps, "eps_share": 1.0}
    _, method = steered(strength, params, target=0.9)
    bound = 8 / (3 * math.sqrt(3)) * strength * share * math.sqrt(eps)
    assert bound == pytest.approx(1.54 * strength * share * math.sqrt(eps), rel=1e-3)
    set_gates(method, [0.3] * 3)
    for step in range(1, 1001):
        push(method, [-factor * bound, -9.0, -9.0], step, 10**6)
    assert bool(method.gates.t[0] != 0) == holds
    assert (method.gates.t[1:] > 0.3).all()


def test_where_a_gate_rests():
    """Near t = (2 eps |dL/dg| / (lambda c))^(1/3), for eps well below t^2."""
    _, method = steered(3.0, {"eps_start": 1e-4, "eps_end": 1e-4, "eps_share": 1.0}, target=0.9)
    for step in range(1, 1501):
        push(method, [-500.0] * 3, step, 10**6)
    assert method.gates.t.tolist() == pytest.approx([(2e-4 * 500) ** (1 / 3)] * 3, rel=0.01)


def test_paces():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Linear(3, 5), nn.Linear(5, 2))
    # MACs(g) = 64 a + a b + 2 b: a share of 69 for the first layer's, 5 for the second's
    for pace, rate in (("equal", 69 / 5), ("by_share", 1)):
        method = prepared(copy.deepcopy(net), {"pace": pace})
        assert method.rate.tolist() == pytest.approx([1] * 3 + [rate] * 5)
        method.steering.start(torch.tensor(1.0))
        method.after_step(method.at(1, 100, LOSS))
        g = 1 / 1.1  # so that the shares are (64 + 5 g) / 217 and (3 g + 2) / 217
        falls = [0.05 * (64 + 5 * g) / 217] * 3 + [0.05 * rate * (3 * g + 2) / 217] * 5
        assert (1 - method.gates.t).tolist() == pytest.approx(falls, rel=1e-4)


@pytest.mark.parametrize(("step", "eps"), [(1, 0.1 * 1e-3**0.02), (25, 0.1**2.5), (61, 1e-4)])
def test_eps_falls_geometrically_to_its_floor(step, eps):
    net, method = steered(1e-9)
    assert float(method.gates.eps) == 0.1
    method.update(method.at(step, 100, LOSS))
    assert float(method.gates.eps) == pytest.approx(eps)
    net(torch.zeros(1, 64, dtype=torch.float64))  # looking changes nothing
    assert float(method.gates.eps) == pytest.approx(eps)


def test_the_first_lambda_brings_the_fastest_gate_to_zero_over_the_ramp():
    _, method = steered(None, {"ramp": 0.5})
    assert method.log()["lambda"] == 0.0
    push(method, [0.0] * 3, 1, 40)
    # 20 steps of the ramp, 0.05 * lambda / 3 off at each
    assert method.log()["lambda"] == pytest.approx(1 / (20 * 0.05 / 3))
    assert method.gates.t.tolist() == pytest.approx([1 - 1 / 20] * 3)


def test_steering_looks_at_soft_gates_first_and_at_closed_ones_then():
    seen = []
    for step in (5, 50):
        _, method = steered(None, {"ramp": 0.3, "eps_share": 1.0})
        method.steering.start(torch.tensor(1e-9))
        method.steering.update = lambda kept, at: seen.append(kept())
        set_gates(method, [0.1, 1.0, 1.0])
        push(method, [0.0] * 3, step)
    soft = gate(torch.tensor([0.1, 1.0, 1.0]), 0.1).sum() / gate(torch.ones(3), 0.1).sum()
    assert seen == [pytest.approx(soft.item()), 1.0]


def test_gates_may_follow_the_running_mean_of_their_gradients():
    _, method = steered(1e-9, {"average": 0.75})
    push(method, [-4.0, 0.0, 0.0], 1, update=False)
    first, slope = method.gates.t[0].item(), 2 * 0.1 / 1.1**2
    assert first == pytest.approx(1 + 0.05 * 4 * slope / 4, abs=1e-9)
    push(method, [0.0] * 3, 2, update=False)
    # three quarters of that mean are left, and no momentum has gathered
    assert method.gates.t[0].item() - first == pytest.approx(0.05 * slope * 0.75, abs=1e-9)
    assert torch.equal(method.state_dict()["mean_gradient"], method.mean_gradient)
    # what is left of it opens no closed gate
    set_gates(method, [0.0, 1.0, 1.0])
    push(method, [0.0] * 3, 3, update=False)
    assert (method.mean_gradient[0] != 0, method.gates.t[0].item()) == (True, 0.0)


def test_no_gate_moves_further_than_the_bound_and_none_passes_zero():
    params = {"bound": 0.1, "eps_start": 0.01, "eps_end": 0.01, "ramp": 0.5}
    _, method = steered(1e-9, params)
    set_gates(method, [0.1, 0.03, -0.1])  # g = 0.5, 0.0826, 0.5
    push(method, [90.0, 90.0, -0.05], 1, update=False)  # through zero, and a little up
    t, g = method.gates.t, method.gates()
    assert g[0].item() == pytest.approx(0.4)
    assert (method.reached.tolist(), t[1].item()) == ([False, True, False], 0.03)
    # slope 2 * 0.1 * 0.01 / 0.02^2 = 5: what stays within the bound is the plain step
    assert t[2].item() == pytest.approx(-0.1 - 0.05 * 0.05 * 5)
    method.update(method.at(1, 100, LOSS))
    assert t[1].item() == 0.0
    push(method, [-90.0] * 3, 2)
    assert method.gates()[[0, 1]].tolist() == pytest.approx([0.5, 0.0])
    _, method = steered(30.0, params)
    push(method, [0.0] * 3, 1)  # the threshold alone takes 0.5 off: g from 0.990 to 0.962
    assert method.gates.t.tolist() == pytest.approx([0.5] * 3)
    push(method, [0.0] * 3, 2)
    assert method.gates().tolist() == pytest.approx([0.25 / 0.26 - 0.1] * 3)
    push(method, [0.0] * 3, 3, steps=20)  # four tenths of a ramp of 10 steps
    assert method.gates().tolist() == pytest.approx([0.25 / 0.26 - 0.5] * 3)


def test_once_gates_below_a_quarter_meet_the_target_the_others_are_free():
    params = {"eps_start": 0.01, "eps_end": 0.01, "eps_share": 1.0}
    _, method = steered(0.3, params, target=0.6)  # takes 0.005 off a step
    set_gates(method, [0.064, 0.05, 0.09])  # one of two that are needed lies below sqrt(eps / 3)
    push(method, [0.0] * 3, 1)
    assert method.falling.tolist() == [True] * 3
    assert method.gates.t.tolist() == pytest.approx([0.059, 0.045, 0.085])
    push(method, [0.0] * 3, 2)
    assert method.falling.tolist() == [True, True, False]
    before = method.steering.strength.item()
    push(method, [0.0, 0.0, -0.1], 3)
    assert method.steering.strength.item() == pytest.approx(1.02 * before)
    t = method.gates.t.tolist()
    assert t[:2] == pytest.approx([0.049, 0.035], abs=2e-4)  # lambda has begun to grow
    assert t[2] > 0.08
    for step in range(4, 20):
        push(method, [0.0] * 3, step)
    assert method.open().tolist() == [False, False, True]
    assert method.frozen
    # of three below a quarter, only as many fall on as are needed, the smallest
    _, method = steered(0.3, params, target=0.6)
    set_gates(method, [0.05, 0.055, 0.045])
    push(method, [0.0] * 3, 1)
    assert method.falling.tolist() == [True, False, True]


# --- meeting the target


def test_the_step_that_meets_the_target_closes_the_smallest_and_no_more():
    _, method = steered(1e6, target=0.5)
    set_gates(method, [0.5, -0.2, 0.3])
    push(method, [0.0] * 3, 1)
    # all three would fall; two thirds of the MACs are enough, the largest stays where it was
    assert method.gates.t.tolist() == [0.5, 0.0, 0.0]
    assert (bool(method.frozen), method.report()["met_at"], method.log()["lambda"]) == (
        True,
        0.01,
        0,
    )
    push(method, [7.0] * 3, 2)
    assert method.gates.t.tolist() == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("steer", ["decided", "closed"])
def test_at_the_floor_of_eps_what_is_missing_is_closed_and_the_earlier_way_lifts(steer):
    _, method = steered(1e-9, {"steer": steer}, target=0.3)
    set_gates(method, [-0.009, 0.011, 0.001])
    push(method, [0.0] * 3, 49)
    assert not method.frozen
    push(method, [0.0] * 3, 50)
    assert method.frozen
    # one that would end below one half stays where it is, or is lifted
    low, gates = (-0.03, [0.9, 0.5475, 0]) if steer == "closed" else (-0.009, [0.4475, 0.5475, 0])
    assert method.gates.t.tolist() == pytest.approx([low, 0.011, 0.0])
    assert gate(method.gates.t.detach(), 1e-4).tolist() == pytest.approx(gates, abs=1e-4)
    found = method.report()
    assert (found["closed_late"], found["lifted"]) == (1.0, float(steer == "closed"))


def test_the_last_channel_is_not_moved_where_no_skip_carries_the_signal():
    _, method = steered(1e6, target=0.9)
    push(method, [0.0] * 3, 1)
    assert method.gates.t.tolist() == [0.0, 0.0, 1.0]
    assert method.frozen
    # 66 of 198 MACs stay: out of reach, and known from the start
    found = method.report()
    assert (found["target_met"], found["most_removable"]) == (0.0, pytest.approx(2 / 3))


def test_a_gate_that_reaches_zero_between_two_updates_waits_and_keeps_its_place():
    _, method = steered(3.0, target=0.3)
    set_gates(method, [0.04, 0.06, 1.0])
    push(method, [0.0] * 3, 1, update=False)  # takes 0.05 off
    assert method.gates.t.tolist() == pytest.approx([0.04, 0.01, 0.95])
    push(method, [-50.0, 0.0, 0.0], 2, update=False)  # the second one's turn, nearer to 0
    assert method.gates.t.tolist() == pytest.approx([0.04, 0.01, 0.9])
    assert method.reached.tolist() == [True, True, False]
    method.steps_left[0] = 0.1
    method.update(method.at(3, 100, LOSS))
    assert method.open().tolist() == [False, True, True]


# --- a whole training


@pytest.mark.parametrize(("steer", "period"), [("decided", 1), ("closed", 1), ("closed", 7)])
@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("net", ["mlp", "resnet8", "batch_norm"])
def test_gates_end_at_zero_or_above_one_half(net, kind, steer, period):
    params = {"steer": steer} | ({"average": 0.0, "bound": 0.0} if steer == "closed" else {})
    made = fit("gdp", net_of(net), params=params, target=0.7, kind=kind, epochs=10, period=period)
    g = made.method.gates().detach()
    assert set((g == 0).tolist()) == {True, False}
    assert ((g == 0) | (g > 0.5)).all()
    paths = made.probe.arrays()["gate_paths"].astype(float)
    assert ((paths > 0.05) & (paths < 0.5)).any()  # on the way they were in between
    assert paths.shape == (40, made.method.channels.size)
    report = made.method.report()
    assert report["target_met"] == (report["most_removable"] >= 0.7)
    assert report["closed_late"] <= (steer == "decided") or period == 7


def test_history_and_arrays():
    made = fit("gdp", net_of("batch_norm"), target=0.5, epochs=5)
    columns = ["epoch", "phase", "train_loss", "validation_top1", "validation_loss", "kept"]
    assert sorted(made.history[0]) == sorted([*columns, "lambda", "eps", "channels", "soft_cost"])
    assert made.history[-1]["eps"] == pytest.approx(1e-4)
    arrays, method = made.probe.arrays(), made.method
    g = method.gates().detach()
    assert arrays["final_gates"].tolist() == pytest.approx(g.tolist(), abs=1e-3)
    assert arrays["gate_steps"].tolist() == list(range(20))
    assert arrays["gate_groups"].tolist() == [0] * 2 + [1] * 3
    assert arrays["cost_path"][1, -1] == pytest.approx(made.history[-1]["kept"])
    closing = (arrays["gate_paths"][:-1] > 0) & (arrays["gate_paths"][1:] == 0)
    assert closing.sum() + (arrays["gate_paths"][-1] > 0).sum() == 5
    assert len(made.probe.losses()) == 20
    expected = pytest.approx(made.history[0]["train_loss"], rel=1e-5)
    assert made.probe.losses()[:4].mean() == expected


@pytest.mark.parametrize("name", ["gdp", "hard_concrete", "group_l2", "network_slimming"])
def test_a_run_that_diverges_at_once_still_ends(name):
    net = net_of("batch_norm")
    net.fc.weight.data.fill_(torch.inf)
    made = fit(name, net)
    assert (made.status, made.history) == ("diverged", [])
    assert made.method.report()["removed"] >= 0
    made.probe.measures(), made.probe.arrays()


def test_arrays_of_a_wide_net_stay_below_a_megabyte():
    net, probe = models.build("vgg16_cifar", (1, 8, 8), 10), _GatePaths()
    method = prepared(net)
    probe.attach(method, net, method.context)
    with torch.no_grad():
        for step in range(1, 2001):
            probe.after_step(method.at(step, 2000, LOSS))
    assert 300_000 < sum(array.nbytes for array in probe.arrays().values()) < 1_000_000


def test_losses_in_windows():
    def watched(total, losses, state=None):
        probe = _ConcretePaths()
        probe.attach(None, None, context_of(torch.zeros(2, 1)))
        probe.load_state(state or {})
        for step, value in enumerate(losses, probe.done + 1):
            probe.after_step(methods.build("dense", {}).at(step, total, torch.tensor(value)))
        return probe

    curve = watched(4, [1.0, 2.0, 4.0, 4.0])
    assert curve.measures()["roughness"] == pytest.approx(1.0)
    assert math.isnan(watched(4, [1.0]).measures()["roughness"])
    coarse = watched(40_000, [1.0, 3.0, 5.0])
    assert (coarse.window, coarse.losses().tolist()) == (2, [2.0])
    state = copy.deepcopy(coarse.state())
    assert watched(40_000, [7.0], state).losses().tolist() == [2.0, 6.0]


# --- bad input


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gdp", {"eps_start": 0.0, "eps_end": math.nan, "gate_lr": 0.0, "ramp": 1.5}),
        (
            "gdp",
            {
                "average": 1.0,
                "bound": 1.0,
                "steer": "fast",
                "eps_share": 0.0,
                "pace": "fast",
                "eps": 0.1,
                "groups": 1,
            },
        ),
        ("hard_concrete", {"keep": 1.0, "harden": 0.0, "gate_phase_lr": 0.0, "gate_lr": -1.0}),
        ("network_slimming", {"strength": 0.0, "cut": 1.0}),
        ("taylor_channels", {"batches": 0}),
        ("group_l2", {"p": 2}),
    ],
)
def test_bad_settings_are_refused_in_one_line(name, values):
    for key, value in values.items():
        with pytest.raises(InputError) as caught:
            methods.build(name, {key: value}, 0.5, "macs")
        assert one_line(caught).startswith(f"{key} = {value!r}: ")


@pytest.mark.parametrize(
    ("params", "of", "line"),
    [
        ({"eps_start": 1e-3, "eps_end": 1e-2}, "macs", "eps_end = 0.01: at most eps_start, 0.001"),
        ({"groups": "layers.0 x"}, "macs", "group = 'x': allowed are layers.0, layers.2, layers.4"),
        ({}, "sparsity", "of = 'sparsity': gdp takes macs, parameters"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(params, of, line):
    with pytest.raises(InputError) as caught:
        fit("gdp", net_of("mlp"), params=params, kind=of)
    assert one_line(caught) == line


# --- hard concrete gates


def test_hard_concrete_by_hand():
    gates = ConcreteGates(3, 0.9, torch.zeros(1, dtype=torch.float64))
    assert gates.log_alpha.tolist() == pytest.approx([math.log(9)] * 3)
    alpha, noise = torch.tensor([0.0, -3.0, 3.0]), torch.tensor([0.5, 0.9, 0.2])
    gates.log_alpha.data = alpha.double()
    gates.noise.copy_(noise)

    def clip(s):
        return (1.2 * s - 0.1).clamp(0, 1).tolist()

    drawn = torch.sigmoid((torch.log(noise / (1 - noise)) + alpha) * 1.5)
    assert gates.train()().tolist() == pytest.approx(clip(drawn), abs=1e-6)
    expected = clip(torch.sigmoid(alpha))
    assert expected == pytest.approx([0.5, 0, 1])
    assert gates.eval()().tolist() == pytest.approx(expected)
    probability = torch.sigmoid(alpha - 2 / 3 * math.log(0.1 / 1.1)).tolist()
    assert gates.probability().tolist() == pytest.approx(probability)
    gates.hard.fill_(True)
    gates.mask[2] = False
    assert gates.train()().tolist() == pytest.approx([0.5, 0.1, 0.0])
    # it draws as often as it says
    many = ConcreteGates(50_000, 0.3, torch.zeros(1)).train()
    many.draw(torch.Generator().manual_seed(0))
    wanted = many.probability()[0].item()
    assert abs((many() > 0).float().mean().item() - wanted) < 4 * math.sqrt(0.25 / 50_000)


def test_hard_concrete_pull_is_the_gradient_of_the_expected_cost():
    method = prepared(net_of("mlp"), name="hard_concrete")
    gates = method.gates
    gates.log_alpha.data.normal_(generator=torch.Generator().manual_seed(0))
    cost = method.channels.cost(gates.probability()) / method.channels.dense
    (pull,) = torch.autograd.grad(cost, gates.log_alpha)
    gates.log_alpha.grad = torch.full_like(pull, 2.0)
    method.after_backward(method.at(1, 8, LOSS))
    # lambda starts so that the pull is a tenth of the loss's gradient
    strength = method.log()["lambda"]
    assert strength == pytest.approx(0.2 / pull.mean().item(), rel=1e-5)
    torch.testing.assert_close(gates.log_alpha.grad, 2 + strength * pull)
    method.after_backward(method.at(5, 8, LOSS))  # of fine-tuning: nothing is added
    torch.testing.assert_close(gates.log_alpha.grad, 2 + strength * pull)


def test_hard_concrete_draws_once_a_step_for_all_kernels_and_not_when_looked_at():
    model = models.build("resnet20", (1, 8, 8), 10)
    method = prepared(model, name="hard_concrete", target=0.3)
    first = method.gates.train()().detach().clone()
    assert torch.equal(first, method.gates().detach())
    model.train()
    scales = [
        (block.conv1.weight / block.conv1.parametrizations.weight.original)[0, :, 0, 0]
        for block in model.stage1
    ]
    torch.testing.assert_close(scales[0], scales[2])
    before = method.generator.get_state()
    model.eval()(torch.zeros(1, 1, 8, 8))
    assert torch.equal(before, method.generator.get_state())
    method.after_step(method.at(1, 8, LOSS))
    assert not torch.equal(first, method.gates.train()().detach())


def test_hard_concrete_keeps_the_largest_gates_at_the_target():
    made = fit("hard_concrete", net_of("batch_norm"), target=0.5, epochs=4)
    gates, arrays, found = made.method.gates, made.probe.arrays(), made.probe.measures()
    assert [row["phase"] for row in made.history] == ["gates", "gates", "fine_tune", "fine_tune"]
    assert made.method.optimizer() is None
    assert made.history[1]["kept"] == made.history[3]["kept"] <= 0.5
    assert gates.log_alpha[gates.mask].min() >= gates.log_alpha[~gates.mask].max()
    assert set(found) == {"roughness"}
    assert arrays["final_gates"].shape == gates.log_alpha.shape
    assert len(made.probe.losses()) == 16


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 3, 2, 1)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.out(input=self.up(self.down(x).relu(), output_size=x.shape[2:]))


def test_gated_layers_may_be_called_by_keyword():
    net = Up()
    method, x = prepared(net), torch.randn(2, 1, 8, 8)
    assert method.finish(net, context_of(x))(x).shape == (2, 2, 8, 8)
    assert method.report()["target_met"]


def test_gates_are_judged_at_the_last_closing():
    _, method = steered(1e6, {"eps_start": 0.01, "eps_end": 0.01}, target=0.3)
    set_gates(method, [0.01, 0.05, 1.0])
    method.polarity.before.copy_(method.gates().detach())
    push(method, [0.0] * 3, 1)
    found = method.report()
    # of the two left one is at t = 0.05: a fifth; the one that went was at 0.0001 / 0.0101
    assert (found["undecided"], found["undecided_half"]) == (0.5, 0.5)
    assert found["largest_closing_gate"] == pytest.approx(0.0001 / 0.0101)
    assert found["largest_late_step"] == 0.0


def test_the_eps_at_half_of_the_closings_tells_what_a_small_one_hides():
    polarity = Polarity(torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64))
    at, t = methods.build("dense", {}).at, torch.tensor([0.0, 1.0, 1.0, 0.05]).double()
    polarity.step(torch.tensor([0.1, 0.5, 0.5, 0.9]).double(), t > -1, at(1, 100, LOSS))
    which = torch.tensor([True, False, False, False])
    polarity.judge(t, which, torch.tensor(1e-2), at(1, 100, LOSS))
    assert polarity.report()["undecided"] == pytest.approx(1 / 3)
    assert polarity.report()["largest_late_step"] == pytest.approx(0.4)
    # later with a smaller eps, long after the last large move
    t[1], which = 0.0, torch.tensor([False, True, False, False])
    polarity.judge(t, which, torch.tensor(1e-4), at(90, 100, LOSS))
    found = polarity.report()
    assert (found["undecided"], found["largest_late_step"]) == (0.0, 0.0)
    assert found["largest_closing_gate"] == 0.5
    # with the eps at half of the closings the gate at 0.05 is at a fifth
    assert found["undecided_half"] == 0.5
