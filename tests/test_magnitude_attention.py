import copy
import math
import shutil
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BatchNormNet, child_run, one_line, randomise, small_run, toy_batches, tree
from torch import nn

from prunestudy import measure, methods, models
from prunestudy.errors import InputError
from prunestudy.methods import Context, Progress
from prunestudy.methods.masks import cubic_sparsity, dense_weights, kept_count, layers_in
from prunestudy.methods.trail import Trail
from prunestudy.papers import card
from prunestudy.study import cli, figures
from prunestudy.study.figures import papers as drawings
from prunestudy.study.lines import line_of
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner
from prunestudy.train import Recipe, train

CUT = "magnitude_attention"


def layer(weights, dtype=torch.float64):
    """A linear layer without bias with these weights (rows)."""
    rows = torch.tensor(weights, dtype=dtype)
    made = nn.Linear(rows.shape[1], rows.shape[0], bias=False, dtype=dtype)
    made.weight.data.copy_(rows)
    return made


def attached(model, name=CUT, target=0.5, **params):
    method = methods.build(name, params, target)
    method.attach(model, torch.Generator().manual_seed(0))
    return method


def original(model):
    return model.parametrizations.weight.original


def fit(name, target=0.9, net=None, batches=None, recipe=None, spy=None, **params):
    """A training of 48 steps with all that could move a cut weight: momentum, decay, Nesterov."""
    batches = batches or toy_batches(shift=1)
    recipe = recipe or Recipe(epochs=12, lr=0.02, nesterov=True, weight_decay=0.02)
    method = methods.build(name, params, target)
    if spy:
        spy(method)
    made = train(net or randomise(BatchNormNet()), method, recipe, batches, batches, seed=0)
    return made, method


# --- the equations


W, X, WANTED = [[1.0, -4.0], [9.0, 16.0]], [[1.0, -1.0]], [[1.0, -9.0]]


def backward(model):
    y = model(torch.tensor(X, dtype=torch.float64))
    (0.5 * (y - torch.tensor(WANTED, dtype=torch.float64)) ** 2).sum().backward()
    return y.tolist()


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_and_backward_of_a_2x2_example(frozen):
    """n = 16: A = (1/4, 1/2, 3/4, 1); M keeps the second row; y = (0, 6.75 - 16)."""
    model = layer(W)
    method = attached(model, alpha=0.5, norm="layer_max")
    method.update(model, 0.5)
    if frozen:
        method.start(model, "exploit")
    assert model.weight.tolist() == [[0, 0], [6.75, 16]]
    assert backward(model) == [[0, -9.25]]
    # dL/dW~ = (-1, -1/4) x (1, -1), times A, and times M where the mask is frozen
    first = [0, 0] if frozen else [-0.25, 0.5]
    assert original(model).grad.tolist() == [first, [-0.1875, 0.25]]
    assert original(model).tolist() == W


@pytest.mark.parametrize(
    ("params", "effective", "gradient"),
    [
        ({"alpha": 0.0}, [[0, 0], [9, 16]], [[-1, 1], [2, -2]]),
        ({"passes": "forward"}, [[0, 0], [6.75, 16]], [[-1, 1], [-0.25, 0.25]]),
        ({"passes": "backward"}, [[0, 0], [9, 16]], [[-0.25, 0.5], [1.5, -2]]),
        ({"differentiate": True}, [[0, 0], [6.75, 16]], [[-0.375, 0.75], [-0.28125, 0.375]]),
        (
            {"passes": "forward", "differentiate": True},
            [[0, 0], [6.75, 16]],
            [[-1.5, 1.5], [-0.375, 0.375]],
        ),
    ],
)
def test_variants_of_a_2x2_example(params, effective, gradient):
    model = layer(W)
    method = attached(model, **({"alpha": 0.5, "norm": "layer_max"} | params))
    method.update(model, 0.5)
    assert model.weight.tolist() == effective
    backward(model)
    assert original(model).grad.tolist() == gradient


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_a_frozen_mask_masks_the_gradient_of_every_variant(passes):
    model = layer(W)
    method = attached(model, passes=passes)
    method.update(model, 0.5)
    method.start(model, "exploit")
    backward(model)
    assert original(model).grad[0].tolist() == [0, 0]
    assert original(model).grad[1].abs().min() > 0


def test_differentiating_through_the_attention_is_a_factor():
    """Autograd through (|w| / n)^alpha w, n constant: the same as `differentiate`."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    model = layer(w.tolist())
    attached(model, alpha=0.7, differentiate=True)
    factor = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    (model.weight * factor).sum().backward()
    w.requires_grad_(True)
    ((w.abs() / w.detach().abs().mean()) ** 0.7 * w * factor).sum().backward()
    torch.testing.assert_close(original(model).grad, w.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("network_mean", [2.5, 2.5]), ("network_max", [7.0, 7.0]), ("layer_max", [3.0, 7.0])],
)
def test_norms_by_hand(norm, expected):
    model = nn.Sequential(layer([[1.0, -3.0, 0.5, 0.5]]), layer([[-7.0], [3.0]]))
    method = attached(model, norm=norm, alpha=1.0)
    assert [m.scale.item() for m in method.masks] == expected
    ratio = model[0].weight / original(model[0])
    torch.testing.assert_close(ratio, original(model[0]).abs() / expected[0])


@pytest.mark.parametrize("norm", ["network_mean", "layer_max"])
def test_zeros_have_no_attention_and_make_no_nan(norm):
    model = nn.Sequential(layer([[0.0, 0.0]]), layer([[2.0], [1.0], [4.0]]))
    attached(model, norm=norm, alpha=0.5)
    (model[0].weight.sum() + model[1].weight.sum()).backward()
    assert model[0].weight.tolist() == original(model[0]).grad.tolist() == [[0, 0]]
    assert model[1].weight.isfinite().all()


def test_weights_follow_the_attention_at_every_step():
    """n is the mean of the weights as they are after the step, until exploitation begins."""
    scales = []

    def spy(method):
        after_step = method.after_step

        def look(model, progress, lr):
            after_step(model, progress, lr)
            weights = torch.cat([w.flatten() for w in dense_weights(model)])
            scales.append((progress.phase, method.masks[0].scale.item(), weights.abs().mean()))

        method.after_step = look

    fit(CUT, spy=spy)
    exploring = [(n, mean.item()) for phase, n, mean in scales if phase == "explore"]
    assert [n for n, _ in exploring] == pytest.approx([mean for _, mean in exploring], rel=1e-5)
    frozen = {n for phase, n, _ in scales if phase == "exploit"}
    assert frozen == {exploring[-1][0]}


# --- DPF is the special case


@pytest.mark.parametrize(
    ("net", "side"),
    [
        (lambda: randomise(BatchNormNet()), 8),
        (lambda: models.build("lenet5", (1, 16, 16), 10), 16),
        (lambda: models.ResNet(8, (1, 8, 8), 10), 8),
    ],
    ids=["batch_norm", "lenet5", "resnet8"],
)
def test_without_attention_and_exploitation_it_is_dpf_bit_for_bit(net, side):
    def made(name, **params):
        torch.manual_seed(0)
        batches = toy_batches(side=side)
        recipe = Recipe(epochs=3, lr=0.05, nesterov=True, weight_decay=1e-3)
        return fit(name, net=net(), batches=batches, recipe=recipe, period=3, **params)[0]

    dpf = made("dpf")
    ours = made(CUT, alpha=0.0, exploitation=False)
    for name, tensor in dpf.model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name]), name
    keys = dpf.history[0].keys()
    assert dpf.history == [{key: row[key] for key in keys} for row in ours.history]
    for key, value in dpf.arrays.items():
        assert ours.arrays[key].tobytes() == value.tobytes(), key
    for other in ({"alpha": 0.5, "exploitation": False}, {"alpha": 0.0}):
        assert made(CUT, **other).history != ours.history


def test_dpf_updates_cut_weights_and_takes_them_back():
    model = layer([[1.0, -4.0], [9.0, 16.0]])
    method = attached(model, "dpf")
    method.update(model, 0.5)
    backward(model)
    # y = (0, -7): dL/dW is that of the product W~, for cut weights, too
    assert original(model).grad.tolist() == [[-1, 1], [2, -2]]
    original(model).data[0, 1] = -10.0
    method.update(model, 0.5)
    assert model.weight.tolist() == [[0, -10], [0, 16]]
    assert [(u.cut, u.returned) for u in method.trail.updates] == [((2,), (0,)), ((1,), (1,))]


# --- exploration, exploitation


def masks_of(method):
    return torch.cat([m.mask.flatten() for m in method.masks]).clone()


def watch(seen):
    """A spy that writes down phase, masks and dense weights after each step."""

    def spy(method):
        after_step = method.after_step

        def look(model, progress, lr):
            after_step(model, progress, lr)
            weights = torch.cat([w.detach().flatten() for w in dense_weights(model)])
            seen.append((progress.phase, masks_of(method), weights.clone()))

        method.after_step = look

    return spy


def test_masks_follow_the_cubic_schedule_every_period_until_they_freeze():
    seen = []
    made, method = fit(CUT, spy=watch(seen), period=5, ramp=0.5, exploit_from=0.7)
    total = len(seen[0][1])
    # 48 steps: the ramp ends after 24, exploration after round(33.6)
    expected = [
        kept_count(total, cubic_sparsity(0.9, 5 * (step // 5) / 24)) for step in range(1, 35)
    ]
    assert [int(m.sum()) for _, m, _ in seen[:34]] == expected
    assert [phase for phase, *_ in seen] == ["explore"] * 34 + ["exploit"] * 14
    assert [u.step for u in method.trail.updates] == [5, 10, 15, 20, 25, 30, 34]
    left = measure.nonzeros(made.model) - measure.parameters(made.model) + total
    assert left == kept_count(total, 0.9)


def test_cut_weights_are_updated_while_exploring_and_may_return():
    seen = []
    recipe = Recipe(epochs=12, lr=0.2)
    _, method = fit(CUT, 0.5, spy=watch(seen), period=2, recipe=recipe)
    explored = [(m, w) for phase, m, w in seen if phase == "explore"]
    moved = [
        (before != after)[mask == 0].float().mean().item()
        for (mask, before), (_, after) in pairwise(explored)
        if (mask == 0).any()
    ]
    assert min(moved) > 0.8
    assert sum(sum(u.returned) for u in method.trail.updates) > 0


def test_nothing_of_a_cut_weight_changes_or_matters_once_exploitation_begins():
    """Not its mask, not its stored value; and another value changes no bit of the result."""
    seen = []
    straight, _ = fit(CUT, spy=watch(seen))
    late = [(m, w) for phase, m, w in seen if phase == "exploit"]
    mask, weights = late[0]
    for other_mask, other_weights in late:
        assert torch.equal(other_mask, mask)
        assert torch.equal(other_weights[mask == 0], weights[mask == 0])
    assert not torch.equal(late[-1][1][mask == 1], weights[mask == 1])

    def tamper(method):
        start = method.start

        def changed(model, phase):
            start(model, phase)
            if phase == "exploit":
                for weight, each in zip(dense_weights(model), method.masks, strict=True):
                    weight.data[each.mask == 0] = 77.0

        method.start = changed

    other, _ = fit(CUT, spy=tamper)
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    columns = ("train_loss", "validation_loss", "validation_top1")
    assert [[r[c] for c in columns] for r in straight.history] == [
        [r[c] for c in columns] for r in other.history
    ]


def test_without_exploitation_the_mask_never_freezes():
    seen = []
    _, method = fit(CUT, spy=watch(seen), exploitation=False, period=2)
    assert {phase for phase, *_ in seen} == {"explore"}
    assert method.trail.updates[-1].step == 48
    assert not method.masks[0].frozen


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_part_too_short_for_a_step(share):
    """2 steps: exploration or exploitation has none; the target is met all the same."""
    recipe = Recipe(epochs=1, lr=0.01)
    batches = toy_batches(batch_size=32)
    made, method = fit(CUT, batches=batches, recipe=recipe, ramp=share)
    total = sum(w.numel() for w in dense_weights_of(made.model))
    kept = sum(int(w.count_nonzero()) for w in dense_weights_of(made.model))
    assert kept == kept_count(total, 0.9)
    assert method.measures(made.model)["scope_sparsity"] == pytest.approx(1 - kept / total)


def dense_weights_of(plain):
    return [w for _, w in measure.prunable_weights(plain)]


def test_a_weight_of_the_finished_net_is_what_the_attended_net_used():
    made, method = fit(CUT, alpha=1.0)
    used = [m(w) for m, w in zip(method.masks, dense_weights(method_model(method)), strict=True)]
    for found, expected in zip(dense_weights_of(made.model), used, strict=True):
        assert torch.equal(found, expected.detach())


def method_model(method):
    """A net that holds the stored weights of a method that has finished."""
    net = randomise(BatchNormNet())
    other = methods.build(CUT, {"alpha": 1.0}, 0.9)
    other.attach(net, torch.Generator())
    for weight, last in zip(dense_weights(net), method.trail._last, strict=True):
        weight.data.copy_(last)
    return net


# --- which layers


def sizes(model, scope):
    return [layer.weight.numel() for layer in layers_in(model, scope)]


def test_the_scope_is_the_convolutions_unless_linear_layers_hold_most():
    lenet, resnet = models.build("lenet5", (1, 28, 28), 10), models.build("resnet20", (3, 9, 9), 10)
    assert sizes(lenet, "auto") == sizes(lenet, "all") == [500, 25_000, 400_000, 5_000]
    assert sizes(lenet, "convolutions") == [500, 25_000]
    # 19 convolutions and 2 projections
    assert len(sizes(resnet, "auto")) == 21
    assert sizes(resnet, "all") == [*sizes(resnet, "auto"), 640]


@pytest.mark.parametrize("name", [CUT, "dpf", "gradual_magnitude", "magnitude", "random", "snip"])
def test_only_the_scope_is_cut_and_exactly(name):
    params = {} if name in (CUT, "dpf") else {"scope": "convolutions"}
    batches = toy_batches(side=8)
    recipe, net = Recipe(epochs=2, lr=0.02), models.ResNet(8, (1, 8, 8), 10)
    made, method = fit(name, 0.95, net=net, batches=batches, recipe=recipe, **params)
    *inside, classifier = dense_weights_of(made.model)
    total = sum(w.numel() for w in inside)
    assert sum(int(w.count_nonzero()) for w in inside) == kept_count(total, 0.95)
    assert classifier.count_nonzero() == classifier.numel()
    if name in (CUT, "dpf"):
        found = method.measures(made.model)
        assert found["scope_weights"] == total
        assert found["scope_sparsity"] == pytest.approx(0.95, abs=0.5 / total)


# --- the audit trail


def test_a_trail_by_hand():
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[4.0]])
    trail = Trail(["a.weight", "b.weight"], [first, second])

    def record(step, loss, before, after):
        masks = [[torch.tensor(m[0]), torch.tensor([[m[1]]])] for m in (before, after)]
        trail.record(step, loss, [first.abs(), second.abs()], *masks)

    one, zero = 1.0, 0.0
    record(2, 0.5, ([one, one, one], one), ([zero, zero, one], one))
    first += 0.5
    trail.move([first, second])
    record(4, 0.25, ([zero, zero, one], one), ([zero, one, one], zero))
    record(6, 0.125, ([zero, one, one], zero), ([zero, zero, one], one))
    first -= 1.0
    trail.move([first, second])
    masks = [torch.tensor([0.0, 0.0, 1.0]), torch.ones(1, 1)]
    trail.close(masks)
    assert [u.kept for u in trail.updates] == [(1, 1), (2, 0), (1, 1)]
    assert [u.cut for u in trail.updates] == [(2, 0), (0, 1), (1, 0)]
    assert [u.returned for u in trail.updates] == [(0, 0), (1, 0), (0, 1)]
    assert [u.threshold for u in trail.updates] == [3.0, 2.5, 3.5]
    found = trail.per_weight(masks)
    assert found["a.weight:when"].tolist() == [1, 3, 0]
    assert found["a.weight:magnitude"].tolist() == [1.0, 2.5, 0.0]
    assert found["a.weight:times"].tolist() == [1, 2, 0]
    assert found["a.weight:kept"].tolist() == [False, False, True]
    assert found["b.weight:when"].tolist() == [[2]]
    assert found["step"].tolist() == [2, 4, 6]
    # |0.5| + |-1| for each of three weights; the net of the third stays
    assert trail.movement().tolist() == [[[4.5, 1.5], [0.0, 0.0]]]
    # 3 weights for 2 steps, 1 for 2, 2 for 2, 1 for the last 4; b is away in steps 5 and 6
    assert trail.kept_steps(10).tolist() == [6 + 2 + 4 + 4, 4 + 0 + 4]
    arrays = trail.arrays()
    assert bytes(arrays["trail_layers"]).decode() == "a.weight\nb.weight"
    assert arrays["trail_kept"].tolist() == [[1, 1], [2, 0], [1, 1]]
    assert arrays["trail_loss"].tolist() == [0.5, 0.25, 0.125]
    other = Trail(["a.weight", "b.weight"], [first, second])
    other.load_state(copy.deepcopy(trail.state()))
    assert other.updates == trail.updates
    assert {k: v.tobytes() for k, v in other.per_weight(masks).items()} == {
        k: v.tobytes() for k, v in found.items()
    }
    assert other.movement().tolist() == trail.movement().tolist()


def test_a_long_trail_is_told_in_fewer_rows(monkeypatch):
    monkeypatch.setattr("prunestudy.methods.trail._MOST_BYTES", 100)
    weight = torch.ones(4)
    trail = Trail(["a"], [weight])
    masks = [torch.ones(4)]
    for step in range(1, 10):
        new = masks[0].clone()
        new[step % 4] = 1 - new[step % 4]
        trail.record(step, float(step), [weight], masks, [new])
        masks = [new]
    arrays = trail.arrays()
    # 100 bytes are 4 rows of 24: of 3, 2, 2 and 2 updates
    assert arrays["trail_step"].tolist() == [3, 5, 7, 9]
    assert arrays["trail_cut"].sum() == sum(u.cut[0] for u in trail.updates) == 5
    assert arrays["trail_returned"].sum() == 4
    assert arrays["trail_loss"].tolist() == [2.0, 4.5, 6.5, 8.5]
    assert arrays["trail_kept"][:, 0].tolist() == [1, 1, 3, 3]


def test_the_trail_of_a_training_adds_up():
    seen = []
    _, method = fit(CUT, spy=watch(seen), period=3)
    updates = method.trail.updates
    kept = [np.array(method.trail.sizes), *(np.array(u.kept) for u in updates)]
    for before, after, u in zip(kept, kept[1:], updates, strict=False):
        assert (before - u.cut + u.returned == after).all()
        assert math.isfinite(u.loss)
    assert kept[-1].sum() == kept_count(sum(method.trail.sizes), 0.9)
    cuts = method.per_weight()
    names = method.trail.names
    flat = {k: np.concatenate([cuts[f"{n}:{k}"].ravel() for n in names]) for k in ("when", "kept")}
    # of the masks seen after each step, the last change from kept to cut of each weight
    steps = np.array([0, *cuts["step"]])
    before, last = torch.ones_like(seen[0][1]), np.zeros(len(flat["when"]), dtype=int)
    for step, (_, mask, _) in enumerate(seen, 1):
        last[((before == 1) & (mask == 0)).numpy()] = step
        before = mask
    # the mask chosen at the end of exploration is seen one step later
    assert set(last - steps[flat["when"]]) <= {0, 1}
    assert (flat["kept"] == (before == 1).numpy()).all()


def test_measures_by_hand():
    model = nn.Sequential(layer([[1.0, 2.0], [3.0, 4.0]]), layer([[10.0, 20.0]]))
    method = attached(model, "dpf", 0.5)
    method._macs = {"0.weight": 4, "1.weight": 2, "head.weight": 6}
    method._step = 6
    method.update(model, 0.5)  # keeps 4, 10, 20
    original(model[0]).data += torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    original(model[1]).data += torch.tensor([[0.0, 1.0]])
    method._step = method.explored = 10
    made = method.finish(model)
    found = method.measures(made)
    assert found["scope_weights"] == 6
    assert found["scope_sparsity"] == 0.5
    assert found["surviving"] == found["surviving_explore"] == 3 / 4
    # 3 units of movement in a layer of density 1/4, 1 in one of density 1; the net's is 1/2
    assert found["layer_focus"] == pytest.approx((3 / 4 + 1) / (4 * 0.5))
    # three passes of 10 steps; in 6 all weights, then 1 of 4 and 2 of 2; the third pass is dense
    first = 4 * (2 * (6 + 4 / 4) + 10)
    assert found["train_cost"] == pytest.approx((first + 2 * 30 + 6 * 30) / (12 * 30))


def test_exploitation_saves_the_weights_gradient():
    made, method = fit(CUT, ramp=0.5)
    found = method.measures(made.model)
    steps, sizes_ = 48, np.array(method.trail.sizes)
    kept = method.trail.kept_steps(steps) / sizes_
    late = kept - method.trail.kept_steps(24) / sizes_
    macs = np.array([method._macs[name] for name in method.trail.names])
    assert found["train_cost"] == pytest.approx(
        (macs @ (2 * kept + 24 + late)) / (3 * steps * macs.sum())
    )
    assert found["surviving_exploit"] == 1.0
    assert 0 < found["surviving_explore"] < found["surviving"] < 1


def test_attention_histograms():
    made, method = fit(CUT, alpha=0.0, recipe=Recipe(epochs=3, lr=0.01))
    counts = made.arrays["attention"]
    total = sum(method.trail.sizes)
    assert counts.shape == (4, 2, 80)
    assert counts[0].sum(1).tolist() == [total, total]
    # alpha = 0: A = 1, in the bin that begins there
    assert counts[:, 0, 20].tolist() == [total] * 4
    assert counts[-1, 1].sum() == kept_count(total, 0.9)


def test_arrays_stay_below_a_megabyte_for_the_papers_nets():
    net = models.build("resnet56", (3, 32, 32), 10)
    method = attached(net, target=0.95)
    update = method.trail.updates
    method.update(net, 0.5)
    update += [update[0]] * 6000  # 300 epochs
    method._histograms = method._histograms * 301
    assert sum(a.nbytes for a in method.arrays().values()) < 900_000


# --- bad input


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"alpha": -0.5}, "params.alpha = -0.5: "),
        ({"period": 0}, "params.period = 0: "),
        ({"norm": "median"}, "params.norm = 'median': "),
        ({"scope": "linear"}, "params.scope = 'linear': "),
        ({"ramp": 0.0}, "params.ramp = 0.0: "),
        (
            {"exploit_from": 1.0},
            "params.exploit_from = 1.0: from ramp = 0.75 on and before the last",
        ),
        (
            {"exploit_from": 1.5},
            "params.exploit_from = 1.5: from ramp = 0.75 on and before the last",
        ),
        (
            {"exploit_from": 0.5},
            "params.exploit_from = 0.5: from ramp = 0.75 on and before the last",
        ),
        ({"ramp": 1.0}, "params.ramp = 1.0: below 1"),
        ({"exploit_from": 0.8, "exploitation": False}, "params.exploit_from = 0.8: nothing where"),
    ],
)
def test_bad_settings_are_refused_in_one_line(params, said):
    with pytest.raises(InputError) as caught:
        methods.build(CUT, params, 0.9)
    assert one_line(caught).startswith(said)


@pytest.mark.parametrize("name", [CUT, "dpf"])
def test_nothing_left_to_prune_is_refused_in_one_line(name):
    with pytest.raises(InputError) as caught:
        attached(layer([[0.0, 0.0, 0.0, 1.0]]), name, 0.5)
    said = "target = 0.5: above 0.7500, the share of zeros at the start: nothing left to prune"
    assert one_line(caught) == said
    with pytest.raises(InputError) as caught:
        attached(layer([[1.0, 2.0]]), name, 0.1)
    assert one_line(caught) == "target = 0.1: cuts none of 2 weights: nothing to prune"
    with pytest.raises(InputError) as caught:
        attached(layer([[1.0, 2.0]]), name, 0.5, scope="convolutions")
    assert one_line(caught).startswith("params.scope = 'convolutions': Linear has no convolution")


def test_what_needs_no_data_is_refused_when_planned(tmp_path, capsys):
    words = ["train", "--results", str(tmp_path), "--set", f"method={CUT}", "--set"]
    for pair in ("params.alpha=-1", "params.exploit_from=2", 'params.scope="convolutions"'):
        assert cli.main([*words, pair, "--set", "target=0.9"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- SNIP


def test_snip_keeps_the_most_sensitive_connections():
    """One image x = (1, 2), logits W x, class 1: dL/dW = (p - y) x; the scores are |W dL/dW|."""
    model = layer([[1.0, 0.5], [-1.0, 2.0]])
    method = attached(model, "snip")

    class One:
        steps, shape = 1, (2,)
        task = measure.Task()

        def epoch(self, number):
            yield torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([1])

    one = One()
    one.train = one
    method.prepare(model, one)
    # logits (2, 3): p - y = (q, -q), q = 1 / (1 + e); scores q (1, 1, 1, 4): the first of the tie
    q = 1 / (1 + math.e)
    assert method.scores(model)[0].tolist() == [
        pytest.approx([q, q]),
        pytest.approx([q, 4 * q]),
    ]
    method.start(model, "train")
    assert method.masks[0].mask[1, 1] == 1
    assert method.kept_share(model) == 0.5


def test_snip_looks_at_as_many_batches_as_it_is_told_and_leaves_the_net_alone():
    batches = toy_batches()
    nets = [randomise(BatchNormNet()) for _ in range(3)]
    scores = []
    for net, count in zip(nets, (1, 2, 9), strict=True):
        method = attached(net, "snip", batches=count)
        before = copy.deepcopy(net.state_dict())
        context = Context(batches, batches, measure.Task(), torch.device("cpu"))
        method.prepare(net, context)
        scores.append(torch.cat([s.flatten() for s in method.scores(net)]))
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(scores[0], scores[1])
    # by hand: gradients of the mean loss of each batch, summed
    plain = randomise(BatchNormNet()).train()
    total = [torch.zeros_like(w) for _, w in measure.prunable_weights(plain)]
    for x, y in batches.epoch(0):
        plain.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        for gradient, part in zip(total, (plain.conv1, plain.conv2, plain.fc), strict=True):
            gradient.add_(part.weight.grad)
    weights = [w for _, w in measure.prunable_weights(plain)]
    by_hand = torch.cat([(w * g).abs().flatten() for w, g in zip(weights, total, strict=True)])
    torch.testing.assert_close(scores[2], by_hand)


def test_a_resumed_snip_run_keeps_its_mask(tmp_path):
    class Broken:
        def __init__(self):
            self.inner = toy_batches()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def epoch(self, number, start=0):
            if number == 2:
                raise KeyboardInterrupt
            return self.inner.epoch(number, start)

    def run(batches, net_seed=0, **options):
        net = randomise(BatchNormNet(), net_seed)
        recipe = Recipe(epochs=4, lr=0.02)
        return train(net, methods.build("snip", {}, 0.8), recipe, batches, toy_batches(), **options)

    straight = run(toy_batches(), seed=0)
    options = {"seed": 0, "checkpoint": tmp_path / "c", "run": "r"}
    with pytest.raises(KeyboardInterrupt):
        run(Broken(), **options)
    resumed = run(toy_batches(), net_seed=5, **options)
    assert resumed.history == straight.history
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


# --- records


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Settings, record and folder of results of a run, trained once."""
    made, results = small_run(CUT, 0.9, epochs=3, p_period=4), tmp_path_factory.mktemp("results")
    return made, Runner(Store("custom", results), device="cpu").ensure(made), results


@pytest.fixture
def done(trained, store):
    """Settings and record of that run, and a copy of it in `store`."""
    made, record, results = trained
    shutil.copytree(results, store.folder.parent, dirs_exist_ok=True)
    return made, record


def test_figures_of_a_run(done, store):
    run = done[0].run
    arrays = store.arrays(run)
    (panel,) = drawings.flow(store, {"magnitude_attention": run}).axes
    steps = [part.get_data() for part in panel.patches]
    assert [s.edges.tolist() for s in steps] == [[0, *arrays["trail_step"].tolist()]] * 2
    heights = np.array([s.values for s in steps]) * arrays["trail_size"].sum() / 100
    returned, cut = heights.round().astype(int)
    assert returned.tolist() == arrays["trail_returned"].sum(1).tolist()
    assert (-cut).tolist() == arrays["trail_cut"].sum(1).tolist()
    start, *_, end = drawings.attention_histograms(store, run).axes
    assert (start.get_title(), end.get_title()) == ("at the start", "after epoch 3")
    of_all, of_kept = (part.get_data().values for part in end.patches)
    assert (of_all.sum(), of_kept.sum()) == pytest.approx((1, 0.1), abs=1e-3)
    plt.close("all")


@pytest.mark.parametrize(("random", "cut"), [(0.82, False), (0.1, True)])
def test_a_figure_says_that_values_are_cut_off_only_where_some_are(random, cut):
    row = {"model": "lenet5", "dataset": "mnist", "variant": "", "target_kind": "sparsity"}
    row |= {"device": "cpu"}
    row |= {"metric_name": "top1", "metric_sd": 0.0, "dense_metric": 0.9, "n": 3}
    values = {(CUT, 0.95): 0.88, (CUT, 0.98): 0.8, ("random", 0.95): random}
    rows = [
        row | {"method": method, "target": target, "sparsity": target, "metric": metric}
        for (method, target), metric in values.items()
    ]
    (axes,) = figures.metric_against_target(pd.DataFrame(rows), card(CUT), "lenet5", "mnist").axes
    assert axes.get_ylim() == pytest.approx((79, 90.5))
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert ("(values below the frame are cut off)" in labels) == cut
    plt.close("all")


def test_a_legend_says_from_how_many_seeds_the_points_of_a_line_are():
    row = {"model": "lenet5", "dataset": "mnist", "variant": "", "target_kind": "sparsity"}
    row |= {"device": "cpu"}
    row |= {"metric_name": "top1", "metric": 0.8, "metric_sd": 0.0, "dense_metric": 0.9}
    counts = {(CUT, 0.95): 1, (CUT, 0.98): 3, ("dpf", 0.95): 2, ("dpf", 0.98): 2}
    rows = [
        row | {"method": method, "target": target, "sparsity": target, "n": n}
        for (method, target), n in counts.items()
    ]
    (axes,) = figures.metric_against_target(pd.DataFrame(rows), card(CUT), "lenet5", "mnist").axes
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert [label.rpartition(" (")[2] for label in labels[1:]] == ["n = 1 to 3)", "n = 2)"]
    plt.close("all")


def test_a_record_from_before_a_parameter_existed_is_still_the_run(runner, store):
    made = child_run("magnitude", 0.9)
    record = runner.ensure(made)
    path = store.path(made.run) / "record.json"
    older = copy.deepcopy(record)
    del older["settings"]["params"]["scope"]
    path.write_text(line_of(older) + "\n", encoding="utf-8")
    found = tree(store.folder)
    assert store.read(made)["settings"] == older["settings"]
    assert runner.ensure(made) == store.read(made)
    assert tree(store.folder).keys() == found.keys()
    older["settings"]["params"]["scope"] = "convolutions"
    path.write_text(line_of(older) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="was made with other settings"):
        store.read(made)


def test_new_settings_of_old_methods_leave_the_names_of_their_runs():
    made = small_run("magnitude", 0.9)
    assert "scope" in made.params
    assert made.model_copy(update={"params": {}}).run == made.run
    plain = made.recipe.model_dump(exclude={"warmup_from"})
    assert made.model_copy(update={"recipe": Recipe(**plain)}).run == made.run


def test_progress_tells_the_loss_after_a_step_only():
    seen = []

    def spy(method):
        before, after = method.after_backward, method.after_step
        method.after_backward = lambda model, at: (before(model, at), seen.append(at.loss))
        method.after_step = lambda model, at, lr: (after(model, at, lr), seen.append(at.loss))

    made, _ = fit(CUT, spy=spy, recipe=Recipe(epochs=1, lr=0.01))
    assert math.isnan(Progress("explore", 0, 1, 0, 1).loss)
    assert len(seen) == 8
    assert np.mean(seen) == pytest.approx(made.history[0]["train_loss"])
