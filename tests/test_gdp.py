"""GDP by hand: gates, thresholds, schedules, freezing, what ends in the record; hard concrete."""

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from conftest import one_line, randomise
from test_channels import Images, fit, net_of
from test_train import Fragile, KilledError, same
from torch import nn
from torch.nn.utils import parametrize

from prunestudy import datasets, methods, models
from prunestudy.errors import InputError
from prunestudy.measure import Task
from prunestudy.methods import Progress
from prunestudy.methods.base import Context
from prunestudy.methods.curve import LossCurve
from prunestudy.methods.gdp import gate
from prunestudy.methods.hard_concrete import ConcreteGates


def at(step=0, steps=100, phase="gates", loss=1.0):
    return Progress(phase, step, steps, step, steps, loss)


def prepared(model, params=None, target=0.5, kind="macs", side=8, dtype=torch.float32, name="gdp"):
    method = methods.build(name, params or {}, target, kind)
    method.attach(model, torch.Generator().manual_seed(0))
    images = Images(side, dtype)
    method.prepare(model, Context(images, images, Task(), torch.device("cpu")))
    method.start(model, "gates")
    return method


def three(kind=nn.Linear, dtype=torch.float64):
    """A net with three channels: 64 inputs, 3 hidden units, 2 outputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Linear(3, 2)).to(dtype)


def steered(strength, params=None, **options):
    """GDP on `three`, with lambda held at `strength`."""
    model = three()
    method = prepared(model, params, dtype=torch.float64, **options)
    method.steering.start(strength)
    method.steering.period = 10**9
    return model, method


def push(model, method, forces, step, steps=100):
    """One step with dL/dg given: through the chain rule, the optimiser and the threshold."""
    t, eps = method.gates.t, method.gates.eps
    slope = 2 * t.detach() * eps / (t.detach() ** 2 + eps) ** 2
    t.grad = forces * slope
    method.after_backward(model, at(step, steps))
    method.own_optimizer(model, "gates").step()
    method.after_step(model, at(step, steps), 0.1)


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


@pytest.mark.parametrize("eps", [0.1, 1e-2, 1e-4])
def test_the_slope_is_largest_at_the_square_root_of_a_third_of_eps(eps):
    peak = math.sqrt(eps / 3)
    t = torch.linspace(0, 4 * peak, 4001, dtype=torch.float64, requires_grad=True)
    gate(t, eps).sum().backward()
    assert t.detach()[t.grad.argmax()].item() == pytest.approx(peak, rel=1e-3)
    assert t.grad.max().item() == pytest.approx(3 * math.sqrt(3) / (8 * math.sqrt(eps)), rel=1e-6)


def test_gate_times_its_gradient_is_the_kernel_times_its_gradient():
    model = randomise(models.build("lenet5", (1, 16, 16), 10).double())
    method = prepared(model, side=16, dtype=torch.float64)
    g = gate(method.gates.t, method.gates.eps).detach().requires_grad_(True)
    method.gates.forward = lambda: g
    x = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    model(x).square().sum().backward()
    weight = model.conv2.parametrizations.weight.original
    by_kernel = (weight * weight.grad).sum((0, 2, 3))
    torch.testing.assert_close(g.detach()[:20] * g.grad[:20], by_kernel)


def test_before_a_batch_norm_scaling_all_gates_of_a_layer_costs_nothing():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 5, 3), nn.Conv2d(5, 6, 3, bias=False)
            self.norm = nn.BatchNorm2d(6, eps=1e-16)
            self.fc = nn.Linear(6, 10)

        def forward(self, x):
            return self.fc(self.norm(self.b(self.a(x).relu())).relu().mean((2, 3)))

    model = randomise(Normed().double()).train()
    method = prepared(model, dtype=torch.float64)
    g = gate(method.gates.t, method.gates.eps).detach().requires_grad_(True)
    method.gates.forward = lambda: g
    model(torch.randn(8, 1, 8, 8, dtype=torch.float64)).square().sum().backward()
    by_gate = (g * g.grad).detach()
    assert by_gate[:5].abs().max() > 1e-3
    assert abs(by_gate[:5].sum()) < 1e-12 * by_gate[:5].abs().sum()
    # the linear layer behind has no batch norm after it
    assert abs(by_gate[5:].sum()) > 1e-3 * by_gate[5:].abs().sum()


# --- where gates are


def test_kernels_that_read_one_channel_set_share_its_gates():
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
    method = prepared(lenet, side=16, dtype=torch.float64)
    with torch.no_grad():
        method.gates.t[20 + 3] = 0.5  # the fourth channel of conv2
    scale = (lenet.fc1.weight / lenet.fc1.parametrizations.weight.original)[0]
    assert scale[3].item() == pytest.approx(0.25 / 0.35)
    assert scale[[2, 4]].tolist() == pytest.approx([1 / 1.1] * 2)


def test_only_the_named_groups_are_gated():
    net = net_of("lenet5")
    method = prepared(net, {"groups": "conv2"}, side=16)
    gated = [n for n, m in net.named_modules() if parametrize.is_parametrized(m, "weight")]
    assert (gated, method.channels.size) == (["fc1"], 50)


def test_gates_have_an_optimiser_of_their_own():
    model, method = steered(1.0)
    group = method.own_optimizer(model, "gates").param_groups[0]
    assert [p is method.gates.t for p in group["params"]] == [True]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0, 0)
    assert all(p is not method.gates.t for p in method.parameter_groups(model, "gates"))
    assert len(method.parameter_groups(model, "gates")) == 4


# --- one step


def test_soft_threshold_by_hand():
    model, method = steered(3.0)
    # every share is (64 + 2) / 198, so that a step takes 0.05 * 3 / 3 = 0.05 off
    method.gates.t.data = torch.tensor([1.0, -0.5, 0.04], dtype=torch.float64)
    push(model, method, torch.zeros(3, dtype=torch.float64), 0)
    assert method.gates.t.tolist() == pytest.approx([0.95, -0.45, 0.0], abs=1e-14)
    assert method.gates.t[2] == 0.0
    assert method.deaths == [(0, 2)]
    assert method.open().tolist() == [True, True, False]


def test_a_gradient_step_comes_before_the_threshold():
    model, method = steered(3.0)
    forces = torch.tensor([-2.0, 0.0, 5.0], dtype=torch.float64)
    push(model, method, forces, 0)
    slope = 2 * 0.1 / 1.1**2
    expected = [1 - 0.05 * f * slope - 0.05 for f in forces.tolist()]
    assert method.gates.t.tolist() == pytest.approx(expected, abs=1e-14)


def test_closed_gates_stay_closed():
    model, method = steered(1e-9, target=0.9)
    method.gates.t.data[0] = 0.0
    for step in range(5):
        push(model, method, torch.full((3,), -100.0, dtype=torch.float64), step)
    assert method.gates.t[0] == 0.0
    assert (method.gates.t[1:] > 1).all()


@pytest.mark.parametrize(("factor", "holds"), [(1.05, True), (0.95, False)])
def test_a_gate_holds_itself_from_154_lambda_c_root_eps_on(factor, holds):
    """Two of three gates are protected by a strong force, the third meets the bound or not."""
    strength, eps = 1.0, 1e-2
    params = {"eps_start": eps, "eps_end": eps, "eps_share": 1.0}
    model, method = steered(strength, params, target=0.9)
    share = 1 / 3
    bound = 8 / (3 * math.sqrt(3)) * strength * share * math.sqrt(eps)
    assert bound == pytest.approx(1.54 * strength * share * math.sqrt(eps), rel=1e-3)
    forces = -torch.tensor([factor * bound, 9.0, 9.0], dtype=torch.float64)
    method.gates.t.data.fill_(0.3)
    for step in range(1000):
        push(model, method, forces, step, 10**6)
    assert bool(method.gates.t[0] != 0) == holds
    assert (method.gates.t[1:] > 0.3).all()


def test_where_a_gate_rests():
    """Near t = (2 eps |dL/dg| / (lambda c))^(1/3), for eps well below t^2."""
    strength, eps, force = 3.0, 1e-4, 500.0
    params = {"eps_start": eps, "eps_end": eps, "eps_share": 1.0}
    model, method = steered(strength, params, target=0.9)
    forces = torch.full((3,), -force, dtype=torch.float64)
    for step in range(3000):
        push(model, method, forces, step, 10**6)
    rest = (2 * eps * force / (strength / 3)) ** (1 / 3)
    assert method.gates.t.tolist() == pytest.approx([rest] * 3, rel=0.01)


def test_paces():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Linear(3, 5), nn.Linear(5, 2))
    equal = prepared(copy.deepcopy(net))
    # MACs(g) = 64 a + a b + 2 b: a share of 69 for the first layer's, 5 for the second's
    assert equal.pace.tolist() == pytest.approx([1] * 3 + [69 / 5] * 5)
    assert prepared(net, {"pace": "by_share"}).pace.tolist() == [1] * 8


@pytest.mark.parametrize(("step", "eps"), [(0, 0.1 * 1e-3**0.02), (24, 0.1**2.5), (60, 1e-4)])
def test_eps_falls_geometrically_to_its_floor(step, eps):
    model, method = steered(1e-9)
    assert float(method.gates.eps) == 0.1
    method.after_step(model.eval(), at(step), 0.1)
    assert float(method.gates.eps) == pytest.approx(eps)
    # looking changes nothing
    model(torch.zeros(1, 64, dtype=torch.float64))
    assert float(method.gates.eps) == pytest.approx(eps)
    assert "eps" in dict(method.gates.named_buffers())


def test_the_first_lambda_brings_the_fastest_gate_to_zero_over_the_ramp():
    model = three()
    method = prepared(model, {"ramp": 0.5}, dtype=torch.float64)
    method.gates.t.grad = torch.zeros(3, dtype=torch.float64)
    method.after_step(model, at(0, 40), 0.1)
    # 20 steps of the ramp, 0.05 * lambda / 3 off at each
    assert method.steering.strength == pytest.approx(1 / (20 * 0.05 / 3))
    assert method.gates.t.tolist() == pytest.approx([1 - 1 / 20] * 3)


def test_steering_looks_at_soft_gates_first_and_at_closed_ones_then():
    seen = []
    for step in (4, 49):
        model = three()
        method = prepared(model, {"ramp": 0.3, "eps_share": 1.0}, 0.5, dtype=torch.float64)
        method.steering.start(1e-9)
        method.steering.update = lambda kept, done, steps: seen.append(kept)
        method.gates.t.data = torch.tensor([0.1, 1.0, 1.0], dtype=torch.float64)
        method.after_step(model, at(step), 0.1)
    soft = gate(torch.tensor([0.1, 1.0, 1.0]), 0.1).sum() / gate(torch.ones(3), 0.1).sum()
    assert seen == [pytest.approx(soft.item()), 1.0]


# --- meeting the target


def test_the_step_that_meets_the_target_closes_the_smallest_and_no_more():
    model, method = steered(1e6, target=0.5)
    method.gates.t.data = torch.tensor([0.5, -0.2, 0.3], dtype=torch.float64)
    push(model, method, torch.zeros(3, dtype=torch.float64), 0)
    # all three would fall; two thirds of the MACs are enough, the largest stays where it was
    assert method.gates.t.tolist() == [0.5, 0.0, 0.0]
    assert (method.frozen, method.frozen_at, method.late) == (True, 0.01, 0)
    assert not method.gates.t.requires_grad
    assert method.row(model)["lambda"] == 0.0
    before = method.gates.t.clone()
    method.after_backward(model, at(1))
    method.own_optimizer(model, "gates").step()
    method.after_step(model, at(1), 0.1)
    assert torch.equal(method.gates.t, before)


def test_a_survivor_that_would_end_below_one_half_is_lifted():
    model, method = steered(1e6, target=0.3)
    method.gates.t.data = torch.tensor([-0.009, 0.011, 0.001], dtype=torch.float64)
    push(model, method, torch.zeros(3, dtype=torch.float64), 0)
    assert method.gates.t.tolist() == pytest.approx([-0.03, 0.011, 0.0])
    assert method.lifted == 1
    assert gate(method.gates.t.detach(), 1e-4).tolist() == pytest.approx([0.9, 0.5475, 0], abs=1e-4)


def test_at_the_floor_of_eps_what_is_missing_is_closed_and_counted():
    model, method = steered(1e-9, target=0.5)
    method.gates.t.data = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    push(model, method, torch.zeros(3, dtype=torch.float64), 48)
    assert not method.frozen
    push(model, method, torch.zeros(3, dtype=torch.float64), 49)
    assert (method.frozen, method.late, method.open().tolist()) == (True, 2, [True, False, False])
    assert method.measures(model)["closed_late"] == 2.0


def test_the_last_channel_is_not_moved_where_no_skip_carries_the_signal():
    model, method = steered(1e6, target=0.9)
    push(model, method, torch.zeros(3, dtype=torch.float64), 0)
    assert method.gates.t.tolist() == [0.0, 0.0, 1.0]
    # 66 of 198 MACs stay: out of reach, and known from the start
    assert method.reach == pytest.approx(2 / 3)
    assert method.frozen
    assert method.measures(model)["target_met"] == 0.0


# --- a whole training


@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("net", ["mlp", "resnet8", "batch_norm"])
def test_gates_end_at_zero_or_above_one_half(net, kind):
    made = fit("gdp", net_of(net), target=0.7, kind=kind, epochs=10)
    method, g = made.method, made.method.gates().detach()
    assert set((g == 0).tolist()) == {True, False}
    assert ((g == 0) | (g > 0.5)).all()
    found = method.measures(made.model)
    assert found["polarised"] == 1.0
    assert found["smallest_gate"] == pytest.approx(g[g > 0].min().item())
    paths = made.arrays["gate_paths"].astype(float)
    # on the way they were in between
    assert ((paths > 0.05) & (paths < 0.5)).any()
    assert paths.shape == (40, method.channels.size)
    assert (found["unchanged"], method.late) == (1.0, 0)
    assert found["removal_gap"] < 1e-5


@pytest.mark.parametrize("net", ["mlp", "resnet8"])
def test_predictions_before_and_after_removal_are_the_same(net):
    data, gated = datasets.load("digits"), net_of(net)
    batches = datasets.Batches(data.train, data.info, 64, seed=0)
    made = fit("gdp", gated, target=0.6, epochs=4, batches=batches)
    (x, _) = next(datasets.Batches(data.test, data.info, 360).ordered(360))
    with torch.no_grad():
        before, after = gated.eval()(x).argmax(1), made.model(x).argmax(1)
    assert torch.equal(before, after)
    assert len(before.unique()) > 5
    assert made.method.found["unchanged"] == 1.0
    small, full = (sum(p.numel() for p in m.parameters()) for m in (made.model, net_of(net)))
    assert small < 0.6 * full


def common_of(variant):
    return {"epochs": 4} | ({"target": None, "kind": None} if variant == "scratch" else {})


@cache
def undisturbed(variant):
    return fit(variant, randomise(net_of("batch_norm")), **common_of(variant))


@pytest.mark.parametrize("step", [1, 4, 10, 11, 15])
@pytest.mark.parametrize(
    "variant", ["gdp", "hard_concrete", "l1_filter", "random", "network_slimming", "scratch"]
)
def test_an_interrupted_run_ends_like_an_undisturbed_one(variant, step, tmp_path):
    """16 steps; GDP's target is met, and the other gates are decided, on the way."""
    straight, common = undisturbed(variant), common_of(variant)
    options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, "run": "r"}
    with pytest.raises(KilledError):
        fit(variant, randomise(net_of("batch_norm")), batches=Fragile(step), **common, **options)
    # what the new process starts with does not matter
    torch.manual_seed(step)
    net = randomise(net_of("batch_norm"), seed=99)
    resumed = fit(variant, net, batches=Fragile(10**9), **common, **options)
    same(straight, resumed)
    assert straight.method.measures(straight.model) == resumed.method.measures(resumed.model)


def test_the_same_seed_is_the_same_run():
    for name in ("gdp", "hard_concrete", "random"):
        first = fit(name, net_of("batch_norm"))
        same(first, fit(name, net_of("batch_norm")))
        assert first.history != fit(name, net_of("batch_norm"), seed=4).history or name == "gdp"


def test_history_and_arrays():
    made = fit("gdp", net_of("batch_norm"), target=0.5, epochs=5)
    columns = ["epoch", "phase", "train_loss", "validation_loss", "validation_top1", "kept"]
    assert list(made.history[0]) == [*columns, "lambda", "eps", "channels", "soft_cost"]
    assert made.history[-1]["eps"] == pytest.approx(1e-4)
    arrays, method = made.arrays, made.method
    g = method.gates().detach()
    assert arrays["final_gates"].tolist() == pytest.approx(g.tolist(), abs=1e-3)
    assert arrays["gate_steps"].tolist() == list(range(20))
    assert arrays["gate_groups"].tolist() == [0] * 2 + [1] * 3
    assert arrays["cost_path"][1, -1] == pytest.approx(made.history[-1]["kept"])
    assert len(arrays["closed"]) == 5 - method.open().sum()
    steps, numbers = arrays["closed"].T
    for step, number in zip(steps, numbers, strict=True):
        assert arrays["gate_paths"][step, number] > 0
        assert (arrays["gate_paths"][step + 1 :, number] == 0).all()
    assert len(arrays["loss"]) == 20
    assert arrays["loss"][:4].mean() == pytest.approx(made.history[0]["train_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["gdp", "hard_concrete", "group_l2", "network_slimming"])
def test_a_run_that_diverges_at_once_still_ends(name):
    net = net_of("batch_norm")
    net.fc.weight.data.fill_(torch.inf)
    made = fit(name, net)
    assert made.status == "diverged"
    assert made.history == []
    assert set(made.arrays) <= {"loss", "final_gates"}


def test_arrays_of_a_wide_net_stay_below_a_megabyte():
    net = models.build("vgg16_cifar", (1, 8, 8), 10)
    method = prepared(net)
    method.frozen = True
    for step in range(2000):
        method.after_step(net, at(step, 2000), 0.1)
    assert 300_000 < sum(array.nbytes for array in method.arrays().values()) < 1_000_000


def test_loss_curve():
    curve = LossCurve()
    assert math.isnan(curve.roughness())
    for value in [1.0, 2.0, 4.0, 4.0]:
        curve.add(value)
    assert curve.roughness() == pytest.approx(1.0)
    # before step 1: 1; after it: 4, 4
    assert curve.jump([1, 1]) == pytest.approx(3.0)
    assert math.isnan(curve.jump([0]))
    coarse = LossCurve()
    coarse.begin(40_000)
    for value in (1.0, 3.0, 5.0):
        coarse.add(value)
    assert (coarse.window, coarse.array().tolist()) == (2, [2.0])
    other = LossCurve()
    other.load_state(copy.deepcopy(coarse.state()))
    other.add(7.0)
    assert other.array().tolist() == [2.0, 6.0]
    assert coarse.array().tolist() == [2.0]


# --- bad input


def test_eps_must_fall():
    with pytest.raises(InputError) as caught:
        methods.params_of("gdp", {"eps_start": 1e-3, "eps_end": 1e-2})
    assert one_line(caught) == "params.eps_end = 0.01: at most eps_start, 0.001"


def test_a_group_that_does_not_exist_is_refused_before_training():
    with pytest.raises(InputError) as caught:
        fit("gdp", net_of("mlp"), params={"groups": "layers.0 layers.1"})
    assert one_line(caught) == "group = 'layers.1': allowed are layers.0, layers.2, layers.4"


def test_a_kind_of_target_that_the_method_does_not_take_is_refused():
    with pytest.raises(InputError) as caught:
        methods.build("gdp", {}, 0.5, "sparsity")
    assert one_line(caught) == "target_kind = 'sparsity': gdp takes macs, parameters"


# --- hard concrete gates


def test_hard_concrete_by_hand():
    gates = ConcreteGates(3, 0.9, torch.zeros(1, dtype=torch.float64))
    assert gates.log_alpha.tolist() == pytest.approx([math.log(9)] * 3)
    gates.log_alpha.data = torch.tensor([0.0, -3.0, 3.0], dtype=torch.float64)
    gates.noise.copy_(torch.tensor([0.5, 0.9, 0.2]))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def clip(x):
        return min(1, max(0, 1.2 * x - 0.1))

    drawn = [sigmoid((math.log(u / (1 - u)) + a) * 1.5) for u, a in [(0.5, 0), (0.9, -3), (0.2, 3)]]
    assert gates.train()().tolist() == pytest.approx([clip(s) for s in drawn])
    expected = [clip(sigmoid(a)) for a in (0, -3, 3)]
    assert expected[1:] == [0, 1]
    assert gates.eval()().tolist() == pytest.approx(expected)
    probability = [sigmoid(a - 2 / 3 * math.log(0.1 / 1.1)) for a in (0, -3, 3)]
    assert gates.probability().tolist() == pytest.approx(probability)
    gates.hard = True
    gates.mask[2] = False
    assert gates.train()().tolist() == pytest.approx([expected[0], 0.1, 0.0])


def test_hard_concrete_draws_as_often_as_it_says():
    gates = ConcreteGates(50_000, 0.3, torch.zeros(1)).train()
    gates.noise.uniform_(generator=torch.Generator().manual_seed(0))
    wanted = gates.probability()[0].item()
    assert abs((gates() > 0).float().mean().item() - wanted) < 4 * math.sqrt(0.25 / 50_000)


def test_hard_concrete_pull_is_the_gradient_of_the_expected_cost():
    method = prepared(net_of("mlp"), name="hard_concrete")
    method.gates.log_alpha.data.normal_(generator=torch.Generator().manual_seed(0))
    cost = method.channels.cost(method.gates.probability()) / method.channels.dense
    (expected,) = torch.autograd.grad(cost, method.gates.log_alpha)
    torch.testing.assert_close(method._pull(), expected.float())


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
    method.after_step(model, at(0), 0.1)
    assert not torch.equal(first, method.gates.train()().detach())


def test_hard_concrete_keeps_the_largest_gates_at_the_target():
    made = fit("hard_concrete", net_of("batch_norm"), target=0.5, epochs=4)
    method = made.method
    assert [row["phase"] for row in made.history] == ["gates", "gates", "fine_tune", "fine_tune"]
    log_alpha, mask = method.gates.log_alpha.detach(), method.gates.mask
    assert log_alpha[mask].min() >= log_alpha[~mask].max()
    assert set(method.found) == {"polarised", "unchanged", "removal_gap"}
    assert made.arrays["gate_paths"].shape == (4, 5)
    before = made.arrays["final_gates"].astype(float)
    assert method.found["polarised"] == ((before == 0) | (before > 0.5)).mean()
    assert np.isfinite(made.arrays["loss"]).all()
