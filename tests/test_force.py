"""Force Regularization and its control: the force, its step, factors, rounds, what is recorded."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import apart, one_line, pairs_of
from test_face import MyNet, loader
from test_factors import Owners
from torch import nn

import prunestudy as ps
from layers import force_by_pairs
from prunestudy import measure, methods, models, shrink
from prunestudy.errors import InputError
from prunestudy.methods import Context, filter_probes, low_rank
from prunestudy.methods.force import force
from prunestudy.shrink import factors

KINDS = ("l2", "l1")


def weights(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def convnet(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return models.build("convnet", (1, 8, 8), 10).to(dtype)


def attached(net, name="force", target=0.05, of="energy", decay=0.0, **settings):
    """The method on `net`, whose example is in the net's dtype."""
    method = methods.build(name, settings, target, of)
    x = weights(2, 1, 8, 8, dtype=next(net.parameters()).dtype)
    method.attach(net, Context((x,), weight_decay=decay))
    return method


def stepped(method, net, step=1, steps=100, seed=1):
    """Random gradients on `net`; return them before and after the method's hook."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    before = {n: p.grad.clone() for n, p in net.named_parameters()}
    method.after_backward(method.at(step, steps, torch.tensor(1.0)))
    return before, {n: p.grad for n, p in net.named_parameters()}


def pruned(net, method, epochs=3, shape=(1, 8, 8), validation=True, **options):
    """`net` through `ps.prune` on random images of 4 classes, 6 steps an epoch, with its probe."""
    recipe = ps.Recipe(epochs=epochs, lr=0.02, weight_decay=1e-3, period=options.pop("period", 1))
    options = {"recipe": recipe, "probe": methods.probe_of(method.name)} | options
    held_out = {"validation": loader(shape=shape, seed=1)} if validation else {}
    return ps.prune(net, method, loader(shape=shape), **held_out, **options)


def ranks_of(model):
    return {name: len(pair[0].weight) for name, pair in pairs_of(model).items()}


# --- the force


def regulariser(weight, kind):
    """R over ordered pairs: 1/2 sum |w_j - w_i|^2, or sum |w_j - w_i|, w_i = W_i / |W_i|."""
    rows = weight.flatten(1)
    unit = rows / rows.norm(dim=1, keepdim=True)
    n = len(unit)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    distance = torch.stack([(unit[j] - unit[i]).norm() for i, j in pairs])
    return 0.5 * distance.square().sum() if kind == "l2" else distance.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 7), (6, 2, 3, 3), (2, 4)])
def test_force_is_the_scaled_gradient_of_the_regulariser(shape, kind):
    weight = weights(*shape).requires_grad_(True)
    (slope,) = torch.autograd.grad(regulariser(weight, kind), weight)
    length = weight.detach().flatten(1).norm(dim=1).view(-1, *[1] * (len(shape) - 1))
    assert torch.allclose(force(weight, kind), -(length**2) / 2 * slope, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_equals_the_sum_over_pairs_and_groups_stand_alone(kind):
    weight = weights(8, 3, 2, 2, seed=4)
    for groups in (1, 2):
        got = force(weight, kind, groups)
        assert got.shape == weight.shape
        assert torch.allclose(got, force_by_pairs(weight, kind, groups), atol=1e-12)
    halves = torch.cat([force(half, kind) for half in weight.split(4)])
    assert torch.allclose(got, halves, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("distance", "most"),
    [
        (0.06, 1e-4),
        *((d, 1e-6) for d in (0.04, 1e-2, 1e-3, 1e-4, 0.0)),
        (1e-5, 1e-5),
        (1e-6, 1e-3),  # float64 keeps 3 digits of 2 - 2 cos
    ],
)
def test_l1_of_near_duplicates_in_float32_is_that_of_float64(distance, most, groups):
    weight, aside = weights(16, 18), weights(16, 18, seed=1)
    for i in (1, 9):  # turned from the filter before by this distance, at twice its length
        one = weight[i - 1]
        off = aside[i] - (aside[i] @ one) / (one @ one) * one
        weight[i] = 2 * (one + distance * one.norm() * off / off.norm())
    weight[4], weight[6] = 0, weight[5]
    weight = weight.float()
    got, wanted = force(weight, "l1", groups), force_by_pairs(weight.double(), "l1", groups)
    assert not got[4].any()
    assert float((got - wanted).norm(dim=1).div(wanted.norm(dim=1) + 1e-9).max()) < most


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
    assert not got[4:6].any()  # a filter without a direction is not pulled
    without = force(torch.cat([other[:4], other[6:]]), kind)
    assert torch.allclose(torch.cat([got[:4], got[6:]]), without)  # and does not pull


@pytest.mark.parametrize("kind", KINDS)
def test_filters_turn_towards_each_other_and_with_a_negative_strength_apart(kind):
    for sign in (1, -1):
        weight = weights(6, 5, seed=8)
        weight[:, 0] = weight[:, 0].abs() + 1
        before, lengths = regulariser(weight, kind), weight.norm(dim=1)
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
    net = nn.Sequential(nn.Conv2d(1, 4, 3, dtype=torch.float64), nn.Flatten())
    weight, lr, decay, strength = net[0].weight, 0.1, 0.01, 0.3
    method = attached(net, strength=strength, decay=decay)
    sgd = torch.optim.SGD([weight], lr=lr, momentum=0.9, weight_decay=decay)
    w, velocity = weight.detach().clone(), torch.zeros_like(weight)
    for step in range(3):
        gradient = weights(*w.shape, seed=step)
        weight.grad = gradient.clone()
        method.after_backward(method.at(step + 1, 100, torch.tensor(1.0)))
        sgd.step()
        velocity = 0.9 * velocity + gradient + decay * w - strength * force(w)
        w = w - lr * velocity
        assert torch.allclose(weight, w, atol=1e-12)


@pytest.mark.parametrize(("layers", "count"), [("stage*.conv?", 18), ("", 19), ("*", 22)])
def test_by_default_it_acts_on_convolutions_larger_than_1x1_only(layers, count):
    net = models.build("resnet20", (1, 8, 8), 10)
    before, after = stepped(attached(net, layers=layers), net)
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert len(moved) == count
    assert all("conv" in n for n in moved) == (count < 22)


def test_strength_per_layer():
    net = convnet(dtype=torch.float64)
    method = attached(net, strength=0.5, strengths={"conv*": 2.0, "conv3": 0.0}, kind="l1")
    before, after = stepped(method, net)
    for name, strength in {"conv1": 1.0, "conv2": 1.0, "conv3": 0.0}.items():
        moved = after[f"{name}.weight"] - before[f"{name}.weight"]
        pull = force(net.get_submodule(name).weight, "l1")
        assert torch.allclose(moved, -strength * pull, atol=1e-12)


def test_adaptive_strength_is_a_share_of_the_gradient_with_decay():
    net = convnet(dtype=torch.float64)
    before, after = stepped(attached(net, strength=0.25, adaptive=True, decay=0.1), net)
    for layer, name in ((net.conv1, "conv1.weight"), (net.conv3, "conv3.weight")):
        descent = before[name] + 0.1 * layer.weight
        pull = force(layer.weight)
        wanted = -0.25 * float(descent.detach().norm() / pull.norm()) * pull
        assert torch.allclose(after[name] - before[name], wanted, atol=1e-12)


@pytest.mark.parametrize("adaptive", [True, False])
def test_without_a_force_there_is_none_to_scale(adaptive):
    net = convnet()
    net.conv1.weight.data[:] = net.conv1.weight.data[:1].clone()
    method = attached(net, strength=0.25, adaptive=adaptive, layers="conv1", kind="l1")
    before, after = stepped(method, net)
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])


def test_agree_keeps_components_that_move_the_weight_as_descent_does():
    net = convnet(dtype=torch.float64)
    before, after = stepped(attached(net, strength=0.3, agree=True, decay=2.0), net)
    added = after["conv2.weight"] - before["conv2.weight"]
    whole = -0.3 * force(net.conv2.weight)
    agrees = whole * (before["conv2.weight"] + 2.0 * net.conv2.weight.detach()) > 0
    assert 0.3 < float(agrees.double().mean()) < 0.7
    assert torch.allclose(added[agrees], whole[agrees], atol=1e-12)
    assert not added[~agrees].any()
    assert not torch.equal(agrees, whole * before["conv2.weight"] > 0)  # the decay is seen


def test_the_force_rests_after_its_stop_and_in_fine_tuning():
    net = convnet()
    method = attached(net, stop=0.5, fine_tune=0.5)
    for step, acts in ((1, True), (25, True), (26, False), (50, False), (51, False)):
        before, after = stepped(method, net, step)
        assert torch.equal(before["conv1.weight"], after["conv1.weight"]) != acts


def test_forces_lower_the_rank_and_narrow_the_angles():
    found, angles = {}, {}
    for method in (ps.PlainLowRank(target=0.05), ps.Force(target=0.05, strength=0.03)):
        result = pruned(convnet(), method, epochs=10)
        found[method.name] = result.probe.measures()
        counts = result.probe.arrays()["angles_after.conv3"]
        angles[method.name] = float((counts * (2.5 + 5 * np.arange(36))).sum() / counts.sum())
    assert found["force"]["rank_total"] < 0.9 * found["plain_low_rank"]["rank_total"]
    assert found["force"]["speed_up.conv3"] > found["plain_low_rank"]["speed_up.conv3"]
    assert angles["force"] < angles["plain_low_rank"] - 3


# --- the factorised net


@pytest.mark.parametrize(
    ("target", "of", "settings"),
    [
        (0.3, "energy", {"variant": "svd"}),
        (0.6, "macs", {}),
        (0.8, "rank", {"factorise": "conv2 fc"}),
    ],
)
def test_finish_equals_the_net_with_projected_weights(target, of, settings):
    net = convnet(dtype=torch.float64)
    method = attached(net, target=target, of=of, **settings)
    x, low = weights(3, 1, 8, 8), copy.deepcopy(net).eval()
    with torch.no_grad():
        for name, rank in method.wanted(net).items():
            layer = low.get_submodule(name)
            layer.weight.copy_(factors.merged(factors.factorise_layer(layer, rank)))
        projected = low(x)
    small = method.finish(net, Context((x,)))
    assert pairs_of(small)
    assert apart(small(x), projected) < 1e-9
    assert not any(p.requires_grad for p in small.parameters())
    again = method.finish(net, Context((x,)))  # leaves the method and the net as they were
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True)
    )


def test_each_kind_of_target_removes_what_it_says():
    net, x = convnet(), torch.zeros(1, 1, 8, 8)
    wanted, small = {"energy": 0.2, "rank": 0.75, "macs": 0.5}, {}
    for of, target in wanted.items():
        method = attached(net, "plain_low_rank", target, of)
        small[of] = method.finish(net, Context((x,)))
    assert ranks_of(small["rank"]) == {"conv1": 6, "conv2": 8, "conv3": 16}  # of 25, 32 and 64
    for name, pair in pairs_of(small["energy"]).items():
        whole = net.get_submodule(name).weight.detach()
        lost = (whole - factors.merged(pair).detach()).square().sum() / whole.square().sum()
        assert 0.1 < float(lost) <= 0.2
    assert measure.macs(small["macs"], x) <= 0.5 * measure.macs(net, x)


@pytest.mark.parametrize("of", ["energy", "rank"])
def test_a_target_of_nearly_all_leaves_rank_one(of):
    result = pruned(MyNet(), ps.Force(target=0.999, of=of), epochs=1)
    assert ranks_of(result.model) == {"stem": 1, "body": 1}


def test_macs_beyond_rank_one_are_refused_with_the_largest_target():
    with pytest.raises(InputError) as caught:
        pruned(MyNet(), ps.Force(target=0.999, of="macs"))
    most = float(one_line(caught).removeprefix("target = 0.999: at most ").split(",")[0])
    result = pruned(MyNet(), ps.Force(target=most - 1e-4, of="macs"), epochs=1)
    assert ranks_of(result.model) == {"stem": 1, "body": 1}


@pytest.mark.parametrize("fine_tune", [0.0, 0.5])
def test_a_diverged_training_ends_without_factors(fine_tune):
    method = ps.Force(target=0.05, strength=1e30, fine_tune=fine_tune)
    result = pruned(convnet(), method)
    assert (result.status, pairs_of(result.model)) == ("diverged", {})


# --- what is observed


def test_measures_are_those_of_the_net_before_and_of_its_factors():
    net, result = convnet(), pruned(convnet(), ps.PlainLowRank(target=0.75, of="rank"), epochs=0)
    found, at_error = result.probe.measures(), shrink.ranks_by_energy(net, 0.95)
    assert {f"rank.{n}": m for n, m in at_error.items()}.items() <= found.items()
    assert found["rank_total"] == sum(at_error.values())
    wider = shrink.ranks_by_energy(net, 0.95, variant="svd")
    assert found["rank_total_svd"] == sum(wider.values()) < found["rank_total"]
    assert found["speed_up.conv2"] == shrink.layer_speed_up(net.conv2, at_error["conv2"])
    own = {"conv1": 6, "conv2": 8, "conv3": 16}
    assert {n: found[f"factor_rank.{n}"] for n in own} == own
    assert found["log2_rank_total"] == pytest.approx(math.log2(found["rank_total"]))
    assert found["validation_factorised"] == next(iter(result.score(result.model).values()))
    assert apart_from(result.probe.others()["whole"], net) == 0


def apart_from(one, two):
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_arrays_are_before_and_after_and_small():
    result = pruned(convnet(), ps.Force(target=0.05, strength=1e-3), epochs=1)
    first, last, arrays = convnet(), result.probe.others()["whole"], result.probe.arrays()
    for name in ("conv1", "conv2", "conv3"):
        for when, net in (("before", first), ("after", last)):
            weight = net.get_submodule(name).weight.detach().flatten(1)
            shares = torch.linalg.svdvals(weight).square().cumsum(0)
            known = (shares / shares[-1]).numpy()
            assert arrays[f"energy_{when}.{name}"] == pytest.approx(known, abs=1e-5)
        assert arrays[f"energy_after.{name}"][-1] == 1
        assert arrays[f"angles_before.{name}"].sum() == len(weight) * (len(weight) - 1) // 2
    wide = factors.layers_to_factorise(models.build("resnet20", (3, 32, 32), 10))
    assert sum(t.nbytes for t in filter_probes.portraits(wide, "before").values()) < 10_000


def test_angles_of_known_filters():
    layer = nn.Linear(2, 4, bias=False)
    rows = [[1.0, 0.0], [1.0, math.tan(math.radians(32))], [-2.0, 0.0], [0.0, 0.0]]
    layer.weight.data = torch.tensor(rows)
    counts = filter_probes.angle_histogram(layer)
    assert counts.nonzero().flatten().tolist() == [6, 29, 35]  # 32, 148 and 180 degrees
    assert counts.sum() == 3


# --- fine-tuning and dynamic rank pruning


def test_fine_tuning_trains_the_factors_at_equal_ranks():
    shapes = {}
    for cls in (ps.Force, ps.PlainLowRank):
        method = cls(target=0.75, of="rank", fine_tune=0.5)
        assert [(p.share, p.restart) for p in method.phases()] == [(0.5, False), (0.5, True)]
        result = pruned(convnet(), method, epochs=2)
        seen = pruned(convnet(), cls(target=0.75, of="rank"), epochs=1).model
        pairs = pairs_of(result.model)
        shapes[cls] = {n: [tuple(x.weight.shape) for x in p] for n, p in pairs.items()}
        assert shapes[cls]["conv2"] == [(8, 32, 5, 5), (32, 8, 1, 1)]
        both = zip(seen.parameters(), result.model.parameters(), strict=True)
        assert all(a.shape == b.shape and not torch.equal(a, b) for a, b in both)
        assert [row["phase"] for row in result.history] == ["train", "fine_tune"]
        assert "whole" not in result.probe.others()
    assert shapes[ps.Force] == shapes[ps.PlainLowRank]


def test_dynamic_rank_pruning_starts_full_and_narrows_each_round():
    net, x = convnet(dtype=torch.float64), weights(2, 1, 8, 8)
    settings = {"fine_tune": 0.75, "rounds": 2}
    method = attached(net, "plain_low_rank", 0.2, "energy", **settings)
    names = [p.name for p in method.phases()]
    assert names == ["train", "fine_tune", "fine_tune_1", "fine_tune_2"]
    assert [p.restart for p in method.phases()] == [False, True, False, False]
    whole, seen = net.eval()(x).detach(), []
    for step in range(1, 5):
        method.update(method.at(step, 4, torch.tensor(1.0)))
        seen.append(ranks_of(net))
        if step == 1:
            assert apart(net(x), whole) < 1e-9
    first = shrink.ranks_by_energy(convnet(dtype=torch.float64), 0.8)
    assert seen[:2] == [{"conv1": 25, "conv2": 32, "conv3": 64}, first]
    assert all(seen[2][n] < first[n] for n in first)  # again a fifth of what was left
    assert seen[3] == seen[2] == method.ranks


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_rounds_that_are_shorter_than_a_step_still_reach_the_target(steps):
    method = ps.Force(target=0.3, fine_tune=0.4, rounds=1)
    result = pruned(MyNet(), method, recipe=ps.Recipe(epochs=1, steps=steps, lr=0.02))
    ranks = ranks_of(result.model)
    assert ranks["stem"] < 8
    assert ranks["body"] < 16


# --- batch norm's statistics


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def normed(dims=2):
    """Convolution, batch norm, twice, with dropout and a norm without statistics between."""
    torch.manual_seed(0)
    conv, norm = CONVS[dims - 1], NORMS[dims - 1]
    parts = [conv(1, 4, 3), norm(4), nn.Dropout(), norm(4, track_running_stats=False)]
    net = nn.Sequential(*parts, conv(4, 4, 3), norm(4, momentum=0.3)).double()
    net[1].running_mean.fill_(7.0)
    return net


def batches(count, dims=2, size=5):
    return [(weights(size, 1, *[6] * dims, seed=i), None) for i in range(count)]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_statistics_are_the_mean_over_batches_of_what_training_normalises_by(dims):
    net, data = normed(dims), batches(3, dims)
    net.train()
    net[2].eval()
    before = copy.deepcopy(net.state_dict())
    context = Context((data[0][0],), train=lambda epoch: [data, []][epoch])
    seen = low_rank.recalibrate(net, context, 2)
    first, second = [], []
    for x, _ in data[:2]:
        out = net[0](x)
        first.append(out)
        over = [0, *range(2, out.dim())]
        for norm in (net[1], net[3]):
            var, mean = torch.var_mean(out, over, correction=0, keepdim=True)
            out = (out - mean) / (var + norm.eps).sqrt()
        second.append(net[4](out))
    for norm, outs in ((net[1], first), (net[5], second)):
        found = [torch.var_mean(out.transpose(0, 1).flatten(1), 1) for out in outs]
        for k, got in enumerate((norm.running_var, norm.running_mean)):
            assert torch.allclose(got, (found[0][k] + found[1][k]) / 2, atol=1e-12)
    assert seen == 10
    assert (net[1].momentum, net[5].momentum) == (0.1, 0.3)
    assert [m.training for m in net] == [True, True, False, True, True, True]
    after = copy.deepcopy(net.state_dict())
    moved = {n.partition(".")[2] for n in after if not torch.equal(before[n], after[n])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    low_rank.recalibrate(net, context, 2)
    assert all(torch.equal(after[n], t) for n, t in net.state_dict().items())
    assert low_rank.recalibrate(net, context, 9) == 15


def test_nothing_is_read_without_batch_norm_or_batches_and_none_is_refused():
    net, x = normed(), weights(2, 1, 6, 6)
    unread = Context((x,), train=None)
    before = copy.deepcopy(net.state_dict())
    assert low_rank.recalibrate(net, unread, 0) == 0
    assert low_rank.recalibrate(nn.Sequential(net[0], net[3]), unread, 5) == 0
    with pytest.raises(InputError, match=r"^context.train = 'no batch'"):
        low_rank.recalibrate(net, Context((x,)), 5)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


@pytest.mark.parametrize("fine_tune", [0.0, 0.5])
def test_factors_come_before_fine_tuning_and_their_statistics_right_then(fine_tune):
    settings = {"fine_tune": fine_tune, "recalibrate": 2}
    net, data = normed(), batches(3)
    method = methods.build("plain_low_rank", settings, 0.5, "rank")
    context = Context((data[0][0],), train=lambda _: data)
    method.attach(net, context)
    expected = shrink.factorise(net, method.wanted(net))
    low_rank.recalibrate(expected, context, 2)
    method.update(method.at(5, 10, torch.tensor(1.0)))
    found = net.eval() if fine_tune else method.finish(net, context)
    assert set(ranks_of(net)) == ({"0", "4"} if fine_tune else set())
    assert ranks_of(found) == ranks_of(expected) == {"0": 2, "4": 2}
    assert all(torch.equal(expected.state_dict()[n], t) for n, t in found.state_dict().items())
    assert method.report() == {"low_rank_passes": 10}
    net[1].running_mean.fill_(3.0)  # what fine-tuning leaves is not estimated again
    if fine_tune:
        assert method.finish(net, context)[1].running_mean.eq(3.0).all()


@pytest.mark.parametrize("by", ["energy", "loss"])
def test_samples_that_no_step_trains_on_are_counted(by):
    kept = {}
    for read in (0, 6):
        method = ps.PlainLowRank(target=0.5, of="macs", recalibrate=read, by=by)
        kept[read] = pruned(MyNet(), method, epochs=1, precision="bf16").method.report()
    # `stem` at ranks 4, 2 and 1, `body` at 13, 6, 3 and 1, and the whole net: 96 images each
    assert kept[0] == ({} if by == "energy" else {"low_rank_passes": 8 * 96})
    assert kept[6] == {"low_rank_passes": 96 if by == "energy" else 8 * (96 + 16) + 96}


def squares(output, _, y):
    return F.mse_loss(output, y)


class Branches(nn.Module):
    """Two convolutions on one input, of which the second counts a hundred times the first."""

    def __init__(self):
        super().__init__()
        self.less, self.more = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 3)

    def forward(self, x):
        return self.less(x) + 100 * self.more(x)


def test_by_loss_the_ranks_go_where_the_net_needs_them():
    torch.manual_seed(0)
    net, x, lost = Branches(), weights(16, 1, 8, 8, dtype=torch.float32), {}
    data = [(x, net(x).detach())]
    for by in ("energy", "loss"):
        method = methods.build("plain_low_rank", {"by": by}, 0.5, "macs")
        context = Context((x,), squares, validation=lambda: data)
        method.attach(net, context)
        small = method.finish(net, context)
        lost[by] = squares(small(x), x, data[0][1]).item()
        assert measure.macs(small, x) <= 0.5 * measure.macs(net, x)
    assert (ranks_of(small)["less"], "more" in ranks_of(small)) == (1, True)
    assert lost["loss"] < 0.7 * lost["energy"]
    with pytest.raises(InputError, match=r"^context.train = 'no batch'"):
        method.attach(net, Context((x,), squares))


# --- own nets


class Twice(nn.Module):
    """A convolution that forward calls twice and that has two names."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.again, self.head = self.body, nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.again(F.relu(self.body(F.relu(self.stem(x))))).mean((2, 3)))


class Unused(MyNet):
    """A net with a layer that forward leaves out and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Conv2d(8, 8, 3)
        self.stem.requires_grad_(False)


def stack(*layers):
    pool = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *pool, nn.Linear(layers[-1].out_channels, 4))


ROUNDS = {"fine_tune": 0.5, "rounds": 2}
EVERY = {"layers": "*", "factorise": "*"}
OWN = {
    "depthwise": (lambda: stack(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8)), ROUNDS, "0 1"),
    "grouped": (lambda: stack(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2)), ROUNDS, "0 1"),
    "transposed": (lambda: stack(nn.Conv2d(1, 8, 3), nn.ConvTranspose2d(8, 8, 3)), {}, "0"),
    "1x1": (lambda: stack(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 12, 1)), EVERY, "1 5"),
    "twice": (Twice, {"fine_tune": 0.5, "strengths": {"again": 2.0}}, "stem body"),
    "by its other name": (Twice, {"factorise": "again", "layers": "again"}, "body"),
    "unused": (Unused, {"fine_tune": 0.5}, "stem body spare"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OWN)
def test_nets_of_ones_own(name, kind):
    make, settings, replaced = OWN[name]
    torch.manual_seed(0)
    method = ps.Force(target=0.4, kind=kind, adaptive=True, **settings)
    result = pruned(make(), method, epochs=2)
    assert result.status == "done"
    ranks = ranks_of(result.model)
    assert set(ranks) <= set(replaced.split())
    found = result.probe.measures()
    assert {n: found[f"factor_rank.{n}"] for n in ranks} == ranks != {}


@pytest.mark.parametrize(
    "options",
    [{"period": 3}, {"period": 16}, {"precision": "bf16"}, {"validation": False}, {"probe": None}],
)
def test_periods_and_what_only_watches_change_no_number(options):
    settings = {"target": 0.3, "kind": "l1", "fine_tune": 0.5, "rounds": 2}
    one, two = (pruned(convnet(), ps.Force(**settings), **o).model for o in ({}, options))
    assert pairs_of(one).keys() == pairs_of(two).keys()
    assert "precision" in options or apart_from(one, two) == 0


class Reads(nn.Module):
    """A net that reads a layer's weight itself."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.conv2d(x, self.body.weight).mean((2, 3)))


class Holds(Reads):
    """A net that calls a layer by another name."""

    def __init__(self, hold):
        super().__init__()
        self.call = hold(self.body)

    def forward(self, x):
        return self.head(self.call(x).mean((2, 3)))


def test_factors_have_the_hooks_of_their_layer():
    net, x = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3)), torch.randn(2, 1, 8, 8)
    net[1].register_forward_hook(lambda layer, inputs, output: 3 * output)
    small = shrink.factorise(net, {"0": 8, "1": 4})
    assert apart(small(x), net(x)) < 1e-5
    shrink.factors.replace(small, "1", shrink.reduce_rank(small[1], 4))
    assert apart(small(x), net(x)) < 1e-5


COMPUTED = "its weight is computed from other tensors; make it a plain parameter first"


def refused(make, line, **settings):
    return pytest.param(make, settings, line)


@pytest.mark.parametrize(
    ("make", "settings", "line"),
    [
        refused(Owners, "module = 'tied': shares a parameter with another", factorise="t*"),
        refused(Owners, f"module = 'normed': {COMPUTED}", factorise="normed"),
        refused(Owners, f"module = 'masked': {COMPUTED}", factorise="twice", layers="m*"),
        refused(
            Owners, "factorise = '*.out_proj': a layer for factors: twice", factorise="*.out_proj"
        ),
        refused(Owners, "layers = '*.linear2': a layer for", factorise="twice", layers="*.linear2"),
        refused(Owners, "factorise = '': a net with convolutions larger than 1x1, or patterns"),
        refused(Reads, "module = 'body': fails as factors: 'Sequential' object has no attribute"),
        *(
            refused(partial(Holds, hold), "module = 'body': fails as factors: 'Conv2d' object has")
            for hold in (lambda layer: layer.forward, partial)
        ),
        refused(MyNet, "factorise = 'x*': a layer for factors: stem, body", factorise="body x*"),
        refused(MyNet, "strengths = 'x': a layer for factors: stem, body", strengths={"x": 2.0}),
        refused(
            nn.Identity, "factorise = '*': a layer for factors: the net has none", factorise="*"
        ),
    ],
)
def test_layers_that_cannot_become_factors_are_refused_before_any_training(make, settings, line):
    net, method = make(), ps.Force(target=0.5, **settings)
    calls = [lambda: method.attach(net, Context((torch.zeros(2, 1, 8, 8),)))]
    if "as factors" not in line:
        calls.append(lambda: method.check(net))
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        assert one_line(caught).startswith(line)
    assert not pairs_of(net)


BAD = [
    *(("Force", "strength", value) for value in (math.inf, "big")),
    ("Force", "strengths", {"conv1": math.inf}),
    ("Force", "kind", "l3"),
    *(("Force", "stop", value) for value in (0.0, 1.5)),
    ("Force", "lambda", 0.1),
    ("PlainLowRank", "strength", 0.1),
    ("PlainLowRank", "variant", "qr"),
    ("PlainLowRank", "fine_tune", 1.0),
    *(("PlainLowRank", "rounds", value) for value in (-1, 1)),
    ("PlainLowRank", "factorise", ["conv1"]),
    ("PlainLowRank", "recalibrate", -1),
    ("PlainLowRank", "samples", 0),
    *(("PlainLowRank", "by", value) for value in ("macs", "loss")),
]


@pytest.mark.parametrize(("name", "key", "value"), BAD)
def test_bad_settings_are_refused_in_one_line(name, key, value):
    with pytest.raises(InputError) as caught:
        getattr(ps, name)(target=0.5, **{key: value})
    assert one_line(caught).startswith(key)


def test_rounds_need_a_target_of_energy():
    with pytest.raises(InputError, match=r"^rounds = 2: 0 unless fine_tune > 0 and of = en"):
        ps.PlainLowRank(target=0.5, of="rank", rounds=2, fine_tune=0.5)
