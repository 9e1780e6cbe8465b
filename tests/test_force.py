import copy
import math
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import one_line, pairs_of, toy_batches
from matplotlib import pyplot as plt
from torch import nn

from prunestudy import measure, methods, models, papers, shrink
from prunestudy.errors import InputError
from prunestudy.methods import Context, Progress, filters
from prunestudy.methods.force import force, force_by_pairs
from prunestudy.shrink import factors
from prunestudy.study.figures import papers as drawings
from prunestudy.study.plan import plan
from prunestudy.study.records import Store, repository
from prunestudy.study.session import Session
from prunestudy.study.settings import own_settings
from prunestudy.train import Recipe, train

KINDS = ("l2", "l1")


def weights(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def regulariser(weight, kind):
    """R over ordered pairs: 1/2 sum |w_j - w_i|^2, or sum |w_j - w_i|, w_i = W_i / |W_i|."""
    rows = weight.flatten(1)
    unit = rows / rows.norm(dim=1, keepdim=True)
    n = len(unit)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    distance = torch.stack([(unit[j] - unit[i]).norm() for i, j in pairs])
    return 0.5 * distance.square().sum() if kind == "l2" else distance.sum()


class Doubles:
    """Batches in float64."""

    def __init__(self, batches):
        self.batches, self.info = batches, batches.info

    def ordered(self, size):
        return ((x.double(), y) for x, y in self.batches.ordered(size))


def context(weight_decay=0.0, doubles=False):
    held_out = Doubles(toy_batches(seed=1)) if doubles else toy_batches(seed=1)
    return Context(toy_batches(), held_out, measure.Task(), torch.device("cpu"), weight_decay)


def made(name="force", target=0.05, by="energy", prepared=None, **params):
    method = methods.build(name, params, target, by)
    method.prepare(None, prepared or context())
    return method


def convnet(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return models.build("convnet", (1, 8, 8), 10).to(dtype)


def at(step=0, steps=100, phase="train"):
    return Progress(phase, step, steps, step, steps)


def stepped(method, net, step=0, seed=1):
    """Random gradients on `net`; return them before and after the method's hook."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    before = {n: p.grad.clone() for n, p in net.named_parameters()}
    method.after_backward(net, at(step))
    return before, {n: p.grad for n, p in net.named_parameters()}


# --- the force


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 7), (6, 2, 3, 3), (2, 4)])
def test_force_is_the_scaled_gradient_of_the_regulariser(shape, kind):
    weight = weights(*shape).requires_grad_(True)
    (slope,) = torch.autograd.grad(regulariser(weight, kind), weight)
    length = weight.detach().flatten(1).norm(dim=1).view(-1, *[1] * (len(shape) - 1))
    assert torch.allclose(force(weight, kind), -(length**2) / 2 * slope, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_closed_form_equals_the_sum_over_pairs(kind, groups):
    weight = weights(8, 3, 2, 2, seed=4)
    got = force(weight, kind, groups)
    assert got.shape == weight.shape
    assert torch.allclose(got, force_by_pairs(weight, kind, groups), atol=1e-12)
    if groups == 2:
        halves = torch.cat([force(half, kind) for half in weight.split(4)])
        assert torch.allclose(got, halves, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_force_is_orthogonal_to_each_filter_and_scales_with_its_length(kind):
    weight = weights(9, 12, seed=2)
    got = force(weight, kind)
    assert float((got * weight).sum(1).abs().max()) < 1e-12
    scale = torch.linspace(0.1, 10, 9, dtype=torch.float64)[:, None]
    assert torch.allclose(force(weight * scale, kind), got * scale, atol=1e-12)


def test_two_filters_by_hand():
    # w = (1, 0) and (0, 1): L2 pulls by the other one's direction, L1 by 1 / sqrt(2) of it
    weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    assert force(weight, "l2").tolist() == [[0.0, 2.0], [3.0, 0.0]]
    wanted = torch.tensor([[0.0, 2.0], [3.0, 0.0]], dtype=torch.float64) / math.sqrt(2)
    assert torch.allclose(force(weight, "l1"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_coincident_opposite_and_zero_filters_give_no_nan_and_no_force(kind, dtype):
    line = torch.tensor([0.3, -0.4, 1.2], dtype=dtype)
    weight = torch.stack([line, line, 2.5 * line, -line, 0 * line, 1e-12 * line])
    for got in (force(weight, kind), force_by_pairs(weight, kind)):
        assert got.isfinite().all()
        assert float(got.abs().max()) < 1e-5
    other = torch.cat([weight, torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype)])
    got = force(other, kind)
    assert got.isfinite().all()
    assert not got[4:6].any()  # a filter without a direction is not pulled
    without = force(torch.cat([other[:4], other[6:]]), kind)
    assert torch.allclose(torch.cat([got[:4], got[6:]]), without)  # and does not pull


@pytest.mark.parametrize("kind", KINDS)
def test_filters_turn_towards_each_other_and_with_a_negative_strength_apart(kind):
    for sign in (1, -1):
        weight = weights(6, 5, seed=8)
        weight[:, 0] = weight[:, 0].abs() + 1
        before = regulariser(weight, kind)
        lengths = weight.norm(dim=1)
        for _ in range(20):
            weight = weight + sign * 0.005 * force(weight, kind)
        assert sign * (before - regulariser(weight, kind)) > 0.1
        assert torch.allclose(weight.norm(dim=1), lengths, rtol=0.02)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_force_is_the_same_on_a_gpu(kind):
    weight = weights(32, 16, 3, 3)
    assert torch.allclose(force(weight.cuda(), kind).cpu(), force(weight, kind), atol=1e-10)


# --- in the training


def test_a_step_is_gradient_decay_force_momentum():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, dtype=torch.float64), nn.Flatten(), nn.Linear(144, 2))
    weight, lr, decay, strength = net[0].weight, 0.1, 0.01, 0.3
    method = made(strength=strength, prepared=context(decay))
    method.attach(net, torch.Generator())
    sgd = torch.optim.SGD([weight], lr=lr, momentum=0.9, weight_decay=decay)
    w, velocity = weight.detach().clone(), torch.zeros_like(weight)
    for step in range(3):
        gradient = weights(*w.shape, seed=step)
        weight.grad = gradient.clone()
        method.after_backward(net, at(step))
        sgd.step()
        velocity = 0.9 * velocity + gradient + decay * w - strength * force(w)
        w = w - lr * velocity
        assert torch.allclose(weight, w, atol=1e-12)


def test_by_default_it_acts_on_convolutions_larger_than_1x1_only():
    net = models.build("resnet20", (1, 8, 8), 10)
    method = made(layers="stage*.conv?")
    method.attach(net, torch.Generator())
    before, after = stepped(method, net)
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert len(moved) == 18
    assert all(n.startswith("stage") and "conv" in n for n in moved)
    method = made()
    method.attach(net, torch.Generator())
    before, after = stepped(method, net)
    assert sum(not torch.equal(before[n], after[n]) for n in before) == 19


def test_strength_per_layer():
    net = convnet(dtype=torch.float64)
    method = made(strength=0.5, strengths={"conv*": 2.0, "conv3": 0.0}, kind="l1", target=0.05)
    method.attach(net, torch.Generator())
    before, after = stepped(method, net)
    for name, strength in (("conv1", 1.0), ("conv2", 1.0), ("conv3", 0.0)):
        pull = force(net.get_submodule(name).weight, "l1")
        moved = after[f"{name}.weight"] - before[f"{name}.weight"]
        assert torch.allclose(moved, -strength * pull, atol=1e-12)


def test_adaptive_strength_is_a_share_of_the_gradient_with_decay():
    net = convnet(dtype=torch.float64)
    method = made(strength=0.25, adaptive=True, prepared=context(0.1))
    method.attach(net, torch.Generator())
    before, after = stepped(method, net)
    for layer, name in ((net.conv1, "conv1.weight"), (net.conv3, "conv3.weight")):
        descent = before[name] + 0.1 * layer.weight
        pull = force(layer.weight)
        wanted = -0.25 * float(descent.detach().norm() / pull.norm()) * pull
        assert torch.allclose(after[name] - before[name], wanted, atol=1e-12)


@pytest.mark.parametrize("adaptive", [True, False])
def test_without_a_force_there_is_none_to_scale(adaptive):
    net = convnet()
    net.conv1.weight.data[:] = net.conv1.weight.data[:1].clone()
    method = made(strength=0.25, adaptive=adaptive, layers="conv1", kind="l1")
    method.attach(net, torch.Generator())
    before, after = stepped(method, net)
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])


def test_agree_keeps_components_that_move_the_weight_as_descent_does():
    net = convnet(dtype=torch.float64)
    method = made(strength=0.3, agree=True, prepared=context(2.0))
    method.attach(net, torch.Generator())
    before, after = stepped(method, net)
    added = after["conv2.weight"] - before["conv2.weight"]
    whole = -0.3 * force(net.conv2.weight)
    descent = before["conv2.weight"] + 2.0 * net.conv2.weight.detach()
    agrees = whole * descent > 0
    assert 0.3 < float(agrees.double().mean()) < 0.7
    assert torch.allclose(added[agrees], whole[agrees], atol=1e-12)
    assert not added[~agrees].any()
    assert not torch.equal(agrees, whole * before["conv2.weight"] > 0)  # the decay is seen


def test_the_force_rests_after_its_stop():
    net = convnet()
    method = made(stop=0.5)
    method.attach(net, torch.Generator())
    for step, acts in ((0, True), (49, True), (50, False), (99, False)):
        before, after = stepped(method, net, step)
        assert torch.equal(before["conv1.weight"], after["conv1.weight"]) != acts


def test_a_force_of_strength_zero_is_plain_training():
    nets = {}
    for name, params in (("force", {"strength": 0.0}), ("plain_low_rank", {})):
        nets[name] = trained(made(name, **params))[0].model
    got, wanted = (nets[n].state_dict() for n in nets)
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)


def trained(method, net=None, epochs=3, checkpoint=None, stop_at=None, **recipe):
    """Train a small convnet on 4 random batches an epoch; `stop_at` kills it at that step."""
    net = net or convnet()
    if stop_at is not None:
        hook = method.after_step

        def killing(model, progress, lr):
            if progress.total_step == stop_at:
                raise KeyboardInterrupt
            hook(model, progress, lr)

        method.after_step = killing
    values = {"epochs": epochs, "lr": 0.05, "weight_decay": 1e-3, "batch_size": 16} | recipe
    batches, held_out = toy_batches(), toy_batches(seed=1)
    result = train(
        net,
        method,
        Recipe(**values),
        batches,
        held_out,
        seed=0,
        checkpoint=checkpoint,
        checkpoint_seconds=0.0,
        run="r",
    )
    return result, net


def test_forces_lower_the_rank_and_narrow_the_angles():
    found, angles = {}, {}
    for name, params in (("plain_low_rank", {}), ("force", {"strength": 0.01})):
        method = made(name, **params)
        result, _ = trained(method, epochs=12)
        found[name] = method.measures(result.model)
        counts = result.arrays["angles_after.conv3"]
        angles[name] = float((counts * (2.5 + 5 * np.arange(36))).sum() / counts.sum())
    assert found["force"]["rank_total"] < 0.9 * found["plain_low_rank"]["rank_total"]
    assert found["force"]["factor_speed_up"] > found["plain_low_rank"]["factor_speed_up"]
    assert angles["force"] < angles["plain_low_rank"] - 3


# --- the factorised net


@pytest.mark.parametrize(
    ("target", "kind", "params"),
    [
        (0.3, "energy", {}),
        (0.3, "energy", {"variant": "svd"}),
        (0.7, "rank", {}),
        (0.6, "macs", {}),
        (0.8, "rank", {"factorise": "conv2 fc"}),
    ],
)
def test_finish_equals_the_net_with_projected_weights(target, kind, params):
    method = made(target=target, by=kind, prepared=context(doubles=True), **params)
    net = convnet(dtype=torch.float64)
    method.attach(net, torch.Generator())
    x, before = weights(3, 1, 8, 8), copy.deepcopy(net.state_dict())
    view = method.views(net)["low_rank"]
    with view, torch.no_grad():
        projected = net.eval()(x)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    small = method.finish(net)
    assert pairs_of(small)
    assert float((small(x) - projected).abs().max() / projected.abs().max()) < 1e-9
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("params", [{}, {"fine_tune": 0.5}])
def test_the_finished_net_comes_back_from_disk_bit_for_bit(tmp_path, params):
    small = trained(made(target=0.7, by="rank", **params), epochs=2)[0].model
    assert list(pairs_of(small)) == ["conv1", "conv2", "conv3"]
    shrink.save(small, tmp_path / "net")
    loaded, x = shrink.load(tmp_path / "net", convnet()), weights(4, 1, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))


def test_onnx_runtime_computes_the_same(tmp_path):
    method = made(target=0.7, by="rank", factorise="conv* fc")
    net = convnet()
    method.attach(net, torch.Generator())
    small, x = method.finish(net), weights(3, 1, 8, 8, dtype=torch.float32)
    assert pairs_of(small)
    shrink.export(small, tmp_path / "net.onnx", torch.rand(2, 1, 8, 8))
    with torch.no_grad():
        wanted = small(x)
    for count in (1, 3):
        found = shrink.OnnxNet(tmp_path / "net.onnx")(x[:count])
        assert float((found - wanted[:count]).abs().max() / wanted.abs().max()) < 1e-5


def test_each_kind_of_target_removes_what_it_says():
    shape = (1, 8, 8)
    net = convnet()
    wanted = {"energy": 0.2, "rank": 0.75, "macs": 0.5}
    small = {}
    for kind, target in wanted.items():
        method = made("plain_low_rank", target, kind)
        method.attach(net, torch.Generator())
        small[kind] = method.finish(net)
    pairs = pairs_of(small["rank"])
    assert [len(p[0].weight) for p in pairs.values()] == [6, 8, 16]  # of 25, 32 and 64
    for name, pair in pairs_of(small["energy"]).items():
        whole = net.get_submodule(name).weight.detach()
        lost = (whole - factors.merged(pair).detach()).square().sum() / whole.square().sum()
        assert 0.1 < float(lost) <= 0.2
    assert measure.macs(small["macs"], torch.zeros(1, *shape)) <= 0.5 * measure.macs(
        net, torch.zeros(1, *shape)
    )


def test_measures_are_those_of_the_net_before_and_of_its_factors():
    method = made("plain_low_rank", 0.75, "rank")
    net = convnet()
    method.attach(net, torch.Generator())
    small = method.finish(net)
    found = method.measures(small)
    at_error, macs = (
        shrink.ranks_by_energy(net, 0.95),
        measure.layer_macs(net, torch.zeros(1, 1, 8, 8)),
    )
    assert {f"rank.{n}": m for n, m in at_error.items()}.items() <= found.items()
    assert found["rank_total"] == sum(at_error.values())
    wider = shrink.ranks_by_energy(net, 0.95, variant="svd")
    assert found["rank_total_svd"] == sum(wider.values()) < found["rank_total"]
    assert found["speed_up.conv2"] == shrink.layer_speed_up(net.conv2, at_error["conv2"])
    ratios = [at_error[n] / full for n, full in (("conv1", 25), ("conv2", 32), ("conv3", 64))]
    assert found["rank_ratio"] == pytest.approx(sum(ratios) / 3)
    assert found["speed_up"] == pytest.approx(factors.speed_up_at(net, macs, at_error))
    own = {"conv1": 6, "conv2": 8, "conv3": 16}
    assert {n: found[f"factor_rank.{n}"] for n in own} == own
    assert found["factor_rank_total"] == 30
    assert found["log2_rank_total"] == pytest.approx(math.log2(found["rank_total"]))
    scores = measure.Task().evaluate(small, toy_batches(seed=1).ordered(), 10)
    assert found["validation_factorised"] == scores.metric
    assert found["factor_speed_up"] == pytest.approx(factors.speed_up_at(net, macs, own))


def test_arrays_are_before_and_after_and_small():
    result, net = trained(made(strength=1e-3), epochs=1)
    first, arrays = convnet(), result.arrays
    for name in ("conv1", "conv2", "conv3"):
        weight = first.get_submodule(name).weight.detach().flatten(1)
        assert torch.equal(torch.from_numpy(arrays[f"filters_before.{name}"]), weight)
        after = net.get_submodule(name).weight.detach().flatten(1)
        assert torch.equal(torch.from_numpy(arrays[f"filters_after.{name}"]), after)
        assert arrays[f"energy_after.{name}"][-1] == 1
        pairs = len(weight) * (len(weight) - 1) // 2
        assert arrays[f"angles_before.{name}"].sum() == pairs
    wide = models.build("resnet20", (3, 32, 32), 10)
    both = {
        **filters.portraits(factors.layers_to_factorise(wide), "before"),
        **filters.portraits(factors.layers_to_factorise(wide), "after"),
    }
    assert sum(a.nbytes for a in both.values()) < 900_000


def test_angles_of_known_filters():
    layer = nn.Linear(2, 4, bias=False)
    rows = [[1.0, 0.0], [1.0, math.tan(math.radians(32))], [-2.0, 0.0], [0.0, 0.0]]
    layer.weight.data = torch.tensor(rows)
    counts = filters.angle_histogram(layer)
    assert counts.nonzero().flatten().tolist() == [6, 29, 35]  # 32, 148 and 180 degrees
    assert counts.sum() == 3


def test_history_has_the_rank_and_the_accuracy_if_factorised_now():
    result, _ = trained(made(target=0.5), epochs=2)
    assert all(0 <= row["validation_top1_low_rank"] <= 1 for row in result.history)
    assert all(3 <= row["rank"] <= 25 + 32 + 64 for row in result.history)


def test_a_diverged_training_ends_without_factors():
    result, _ = trained(made(), epochs=3, lr=1e20)
    assert result.status == "diverged"
    assert not pairs_of(result.model)


# --- fine-tuning and dynamic rank pruning


def test_fine_tuning_trains_the_factors_at_equal_ranks():
    shapes = {}
    for name in ("force", "plain_low_rank"):
        method = made(name, 0.75, "rank", fine_tune=0.5)
        assert [(p.name, p.share, p.restart) for p in method.phases()] == [
            ("train", 0.5, False),
            ("fine_tune", 0.5, True),
        ]
        result, _ = trained(method, epochs=2)
        pairs = pairs_of(result.model)
        shapes[name] = {n: [tuple(x.weight.shape) for x in p] for n, p in pairs.items()}
        assert shapes[name]["conv2"] == [(8, 32, 5, 5), (32, 8, 1, 1)]
        start = shrink.factorise(net_after(name, 1), shrink.ranks_by_share(convnet(), 0.25))
        moved = [
            not torch.equal(a, b)
            for a, b in zip(start.parameters(), result.model.parameters(), strict=True)
        ]
        assert all(moved)
        assert [row["phase"] for row in result.history] == ["train", "fine_tune"]
        assert "validation_top1_low_rank" not in result.history[1]
    assert shapes["force"] == shapes["plain_low_rank"]


def net_after(name, epochs):
    return trained(made(name, 0.75, "rank"), epochs=epochs)[1]


def test_dynamic_rank_pruning_starts_full_and_narrows_each_round():
    prepared = context(doubles=True)
    method = made("plain_low_rank", 0.2, "energy", prepared, fine_tune=0.75, rounds=2)
    names = [p.name for p in method.phases()]
    assert names == ["train", "fine_tune", "fine_tune_1", "fine_tune_2"]
    assert [p.restart for p in method.phases()] == [False, True, False, False]
    net = convnet(dtype=torch.float64)
    method.attach(net, torch.Generator())
    x = weights(2, 1, 8, 8)
    with torch.no_grad():
        whole = net.eval()(x)
        seen = []
        for name in names:
            method.start(net, name)
            pairs = pairs_of(net)
            seen.append({n: len(p[0].weight) for n, p in pairs.items()})
            if name == "fine_tune":
                assert float((net(x) - whole).abs().max() / whole.abs().max()) < 1e-9
    assert seen[:2] == [{}, {"conv1": 25, "conv2": 32, "conv3": 64}]
    first = shrink.ranks_by_energy(convnet(dtype=torch.float64), 0.8)
    assert seen[2] == first
    assert all(seen[3][n] < first[n] for n in first)  # again a fifth of what was left
    assert method.row(net)["rank"] == sum(seen[3].values())


def in_rounds(rounds):
    params = {"fine_tune": 0.5, "rounds": rounds, "strength": 1e-3, "stop": 0.6, "adaptive": True}
    return made(target=0.3, **params)


@cache
def undisturbed(rounds):
    return trained(in_rounds(rounds))[0]


@pytest.mark.parametrize("stop_at", [2, 5, 9, 11])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, stop_at, rounds):
    calm, file = undisturbed(rounds), tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(in_rounds(rounds), checkpoint=file, stop_at=stop_at)
    again = trained(in_rounds(rounds), checkpoint=file)[0]
    one, two = calm.model.state_dict(), again.model.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert again.history == calm.history
    assert calm.arrays.keys() == again.arrays.keys()
    assert all(np.array_equal(calm.arrays[k], again.arrays[k]) for k in calm.arrays)


def test_what_was_measured_survives_a_resume():
    method = made(target=0.3, fine_tune=0.5)
    result, _ = trained(method)
    other = made(target=0.3, fine_tune=0.5)
    other.load_state(method.state())
    assert other.measures(result.model) == method.measures(result.model)
    assert other.state()["ranks"] == method.state()["ranks"]


# --- bad input


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("force", "strength", math.inf),
        ("force", "strength", math.nan),
        ("force", "strength", "big"),
        ("force", "strengths", {"conv1": math.inf}),
        ("force", "kind", "l3"),
        ("force", "stop", 0.0),
        ("force", "stop", 1.5),
        ("force", "lambda", 0.1),
        ("plain_low_rank", "strength", 0.1),
        ("plain_low_rank", "variant", "qr"),
        ("plain_low_rank", "fine_tune", 1.0),
        ("plain_low_rank", "rounds", -1),
        ("plain_low_rank", "factorise", ["conv1"]),
    ],
)
def test_bad_parameters_are_refused_in_one_line(name, key, value):
    with pytest.raises(InputError) as caught:
        methods.params_of(name, {key: value})
    assert one_line(caught).startswith(f"params.{key}")


@pytest.mark.parametrize("params", [{"rounds": 1}, {"rounds": 2, "fine_tune": 0.5}])
def test_rounds_need_fine_tuning_and_a_target_of_energy(params):
    kind = "energy" if "fine_tune" not in params else "rank"
    with pytest.raises(InputError) as caught:
        made("plain_low_rank", 0.5, kind, **params)
    assert one_line(caught).startswith(f"params.rounds = {params['rounds']}: 0 without fine_tune")


@pytest.mark.parametrize("key", ["layers", "factorise", "strengths"])
def test_a_layer_that_does_not_exist_is_refused(key):
    value = {"conv9": 2.0} if key == "strengths" else "conv1 conv9"
    method = made(**{key: value})
    for call in (lambda: method.check(convnet()), lambda: method.attach(convnet(), None)):
        with pytest.raises(InputError) as caught:
            call()
        said = one_line(caught)
        assert said == f"params.{key} = 'conv9': a layer of the net: conv1, conv2, conv3, fc"


# --- the card


def test_ranks_of_the_card_give_the_published_theory():
    sizes = {"conv3": (384, 256, 1), "conv4": (384, 384, 2), "conv5": (256, 384, 2)}
    checked = 0
    for table in papers.card("force").ranks:
        for layer, rank, theory in zip(table.layers, table.ranks, table.theory, strict=False):
            filters, channels, groups = sizes[layer]
            whole = nn.Conv2d(channels, filters, 3, groups=groups)
            assert shrink.layer_speed_up(whole, rank) == pytest.approx(theory, abs=0.01)
            checked += 1
    assert checked == 6


def test_lambda_of_lenet_is_what_the_rule_gives_on_the_records_of_the_search():
    profiles = papers.card("force").profiles
    experiments = [e for name in ("cpu", "paper") for e in profiles[name].experiments]
    forced = [(e, m) for e in experiments for m in e.methods if m.method == "force"]
    lenet = [m.params for e, m in forced if e.model == "lenet5" and e.purpose != "search"]
    used = {(params.get("kind", "l2"), params["strength"]) for params in lenet}

    store = Store("cpu", repository() / "results")
    search = [p for p in plan("cpu", ("force",)) if p.purpose == "search"]
    found = [(p.settings, store.read(p.settings)["metrics"]) for p in search]
    plain = next(m for s, m in found if s.method == "plain_low_rank")
    best = {}
    for settings, metrics in found:
        lost = max(plain[k] - metrics.get(k, 0.0) for k in ("metric", "metric_whole"))
        if settings.method == "force" and lost <= 0.002 + 1e-9:
            kind, strength = settings.params.get("kind", "l2"), settings.params["strength"]
            best[kind] = max(strength, best.get(kind, 0.0))
    assert used == set(best.items())


@pytest.mark.parametrize(("method", "derived"), [("plain_low_rank", 1.09), ("force", 2.87)])
def test_ranks_of_the_card_fit_the_nets_that_we_have(method, derived):
    tables = [t for t in papers.card("force").ranks if t.method == method]
    for table in tables:
        if (
            table.model == "alexnet_grouped"
        ):  # its layers have Caffe's names, and there are only three
            continue
        shape = (1, 28, 28) if table.dataset == "mnist" else (3, 32, 32)
        net = models.build(table.model, shape, 10)
        full = shrink.ranks_by_share(net, 1.0)
        assert full == dict(zip(table.layers, table.full, strict=True))
        if table.model == "resnet20":
            found = dict(zip(table.layers, table.ranks, strict=True))
            assert factors.speed_up_at(net, measure.layer_macs(net, shape), found) == pytest.approx(
                derived, abs=0.01
            )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": (1, 2, 3)}, "differ in length"),
        ({"cpu": (1.0,)}, "differ in length"),
        ({"ranks": (21, 1)}, "above the full one"),
        ({"ranks": (0, 1)}, "above the full one"),
        ({"rank": (1, 1)}, "extra inputs"),
    ],
)
def test_a_table_of_ranks_that_cannot_be_is_refused(change, words):
    lenet = next(t for t in papers.card("force").ranks if t.model == "lenet5")
    with pytest.raises(ValueError, match="(?i)" + words):
        papers.PublishedRanks(**(lenet.model_dump() | change))


def test_a_layer_that_does_not_exist_is_refused_before_a_run_starts():
    for params, words in (
        ({"params.layers": "conv9"}, "params.layers = 'conv9'"),
        ({"params.factorise": "block*"}, "params.factorise = 'block"),
    ):
        with pytest.raises(InputError) as caught:
            own_settings({"model": "convnet", "method": "force", "target": 0.05} | params)
        assert one_line(caught).startswith(words)


# --- figures and the study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The quick profile at one seed and one epoch, trained once."""
    folder = tmp_path_factory.mktemp("results")
    made = Session("force", "quick", seeds=1, epochs=1, results=folder, device="cpu", show=False)
    made.run()
    return made


def test_records_of_the_study_hold_ranks_and_both_scores(study):
    for item in study.planned:
        record = study.store.read(item.settings)
        assert record["status"] == "done"
        if item.settings.method not in ("force", "plain_low_rank"):
            continue
        metrics = record["metrics"]
        layers = [metrics[f"rank.conv{i}"] for i in (1, 2, 3)]
        assert metrics["rank_total"] == sum(layers)
        assert ("metric_whole" in metrics) == (item.settings.target.kind == "energy")
        assert 0 <= metrics["validation_factorised"] <= 1
        pairs = pairs_of(study.runner.net(item.settings))
        assert {n: len(p[0].weight) for n, p in pairs.items()} == {
            n.removeprefix("factor_rank."): rank
            for n, rank in metrics.items()
            if n.startswith("factor_rank.")
        }
        assert metrics["macs"] < metrics["dense_macs"]


def test_table_of_ranks_has_a_row_per_run_and_layer(study):
    found = drawings.ranks_table(study.store, study.planned)
    sizes = found[found.variant == ""].groupby("method").size()
    assert sizes.to_dict() == {"force": 3, "plain_low_rank": 3}
    assert list(found.full[:3]) == [25, 32, 64]
    assert drawings.ranks_table(study.store, 2 * study.planned).equals(found)


def test_ranks_stand_beside_the_published_ones_of_the_same_net():
    paper = papers.card("force")
    plain, *_ = (t for t in paper.ranks if (t.model, t.method) == ("resnet20", "plain_low_rank"))
    rows = [
        ("resnet20", "cifar10", method, "", seed, layer, rank, 16, 1.0, "cpu")
        for method, ranks in (("plain_low_rank", (8, 12)), ("force", (4, 4)))
        for seed, rank in enumerate(ranks)
        for layer in plain.layers
    ]
    columns = "model dataset method variant seed layer rank full speed_up device".split()
    ours = pd.DataFrame(rows, columns=columns)
    axes = drawings.rank_per_layer(ours, paper, "resnet20", "cifar10").axes[0]
    bars = [bar.get_height() for bar in axes.patches if bar.get_width()]
    count = len(plain.layers)
    assert bars[: 2 * count] == [62.5] * count + [25] * count
    marks = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    shares = [100 * rank / full for rank, full in zip(plain.ranks, plain.full, strict=True)]
    assert marks["published: low rank, no force [P]"] == pytest.approx(shares)
    plt.close("all")


def test_figures_say_what_is_missing(tmp_path):
    empty = Session("force", "quick", results=tmp_path, device="cpu", show=False)
    nothing = drawings.ranks_table(empty.store, empty.planned)
    for draw in (
        lambda: drawings.rank_per_layer(nothing, empty.card, "convnet", "digits"),
        lambda: drawings.speed_up(empty.runs),
    ):
        with pytest.raises(InputError, match=r"^figure = .*: no finished run"):
            draw()


def after_force(runner, method, target=None, kind="sparsity"):
    """Parent and child: a net at a quarter of its ranks, then `method` on it; with its metrics."""
    own = {"model": "convnet", "epochs": 1, "batch_size": 64}
    parent = own_settings(own | {"method": "force", "target": 0.75, "target_kind": "rank"})
    aim = {"target": target, "target_kind": kind} if target else {}
    child = own_settings(own | {"method": method} | aim).model_copy(update={"parent": parent})
    return runner.net(parent), runner.net(child), runner.ensure(child)["metrics"]


@pytest.mark.parametrize(("method", "target"), [("gradual_magnitude", 0.5), ("dense", None)])
def test_a_factorised_net_is_trained_and_its_weights_are_pruned(runner, method, target):
    before, after, metrics = after_force(runner, method, target)
    assert [n for n, _ in after.named_parameters()] == [n for n, _ in before.named_parameters()]
    weights = sum(w.numel() for _, w in measure.prunable_weights(before))
    kept = sum(int(w.count_nonzero()) for _, w in measure.prunable_weights(after))
    assert kept == (round(weights / 2) if target else weights)
    dense = sum(w.numel() for _, w in measure.prunable_weights(convnet()))
    assert metrics["sparsity"] == pytest.approx(1 - kept / dense)
    assert metrics["dense_parameters"] == measure.parameters(convnet())


def test_channels_of_a_factorised_net_are_removed(runner):
    before, after, metrics = after_force(runner, "l1_filter", 0.4, "macs")
    shape, full, ranks_ = (1, 8, 8), pairs_of(before), pairs_of(after)
    assert full.keys() == ranks_.keys()
    macs = measure.macs(after, torch.zeros(1, *shape))
    assert (
        0.5 * measure.macs(before, torch.zeros(1, *shape))
        < macs
        <= 0.6 * measure.macs(before, torch.zeros(1, *shape))
    )
    assert metrics["macs"] == macs
    assert metrics["dense_macs"] == measure.macs(
        convnet(), torch.zeros(1, *shape)
    )  # the whole compression
    assert metrics["target_met"] == 1
    # basis filters go as well as filters
    narrower = [[len(a.weight) < len(b.weight) for a, b in zip(ranks_[n], full[n], strict=True)]
                for n in full]  # fmt: skip
    assert any(basis for basis, _ in narrower)
    assert any(mixture for _, mixture in narrower)
