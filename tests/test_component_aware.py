import copy
import math

import numpy as np
import pytest
import torch
from conftest import one_line, randomise, toy_batches
from torch import nn
from torch.utils._pytree import tree_leaves

from prunestudy import datasets, measure, methods, models, shrink
from prunestudy.errors import InputError
from prunestudy.measure import Application, Metric, RefusedError
from prunestudy.methods import Context
from prunestudy.methods.channel_budget import spread_out
from prunestudy.methods.channel_choice import Choice
from prunestudy.methods.channel_method import as_bytes, plane
from prunestudy.methods.channel_ranking import GroupL2, importance
from prunestudy.methods.channels import Channels
from prunestudy.methods.component_aware import descend_step, soft_loss, soft_masks
from prunestudy.methods.soft_channels import masked_output
from prunestudy.models import TDMPC, Autoencoder
from prunestudy.shrink import component_groups, narrow
from prunestudy.train import Recipe, train

SMALL = (1, 8, 8)


def build(name="component_aware", target=0.5, **params):
    return methods.build(name, params, target, "parameters")


class TwoParts(nn.Module):
    """Two components of eight hidden units each, and four numbers between them.

    Of the first component's units only the last two are used, of the second's the last six: at
    equal cost a unit, the best coefficients are 6/8 and 2/8 where half of the units must go.
    """

    components = ("encoder", "decoder")

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        for part, used in ((self.encoder, 2), (self.decoder, 6)):
            for layer in (part[0], part[2]):
                layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
            part[0].weight.data[: 8 - used] = 0
            part[0].bias.data.fill_(0.5)[: 8 - used] = 0
            part[2].weight.data[:, : 8 - used] = 0

    def forward(self, x):
        return self.decoder(self.encoder(x))


def squared(output, x, y):
    return nn.functional.mse_loss(output, y)


def error(model, data):
    with torch.no_grad():
        return float(sum(squared(model(x), x, y) for x, y in data))


ERROR = Metric("error", "lower", error)


def regression(net, inputs, count=256):
    """Data that `net` answers exactly, and batches of it without end."""
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net(x) if torch.is_tensor(net(x)) else torch.cat(net(x), 1)

    def batches():
        while True:
            for start in range(0, count, 64):
                yield x[start : start + 64], y[start : start + 64]

    return batches(), [(x, y)]


def offset_loss(output, x, y):
    """The exact net has no loss at all: a constant keeps the ratio to it finite."""
    return squared(output, x, y) + 0.1


def toy_target():
    # Sixteen units of nine parameters, four numbers between: eight units are 72 of 152.
    net = TwoParts()
    return net, 8 * 9 / sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("importance", ["taylor", "group_l2"])
@pytest.mark.parametrize("solver", ["gradient", "grid"])
def test_both_solvers_find_the_known_best_coefficients(solver, importance):
    net, target = toy_target()
    batches, data = regression(net, 4)
    method = build(target=target, solver=solver, importance=importance, protect=["coupling"])
    groups = component_groups(net, torch.zeros(2, 4), protect=["coupling"])
    pruned = method.prune(net, groups, Application([ERROR]), offset_loss, batches, data)
    assert pruned.point.kept == (2, 4, 6)
    assert pruned.point.judgement.values["error"] < 1e-10
    share = methods.build("uniform", {"protect": ["coupling"]}, target, "parameters")
    same = share.prune(net, groups, Application([ERROR]), offset_loss, batches, data)
    assert same.point.kept == (4, 4, 4)
    assert same.point.judgement.values["error"] > 0.01


def test_a_regression_of_tdmpc_is_solved_exactly():
    torch.manual_seed(0)
    net = TDMPC(3, 2, 8, 4)
    unused = {"encoder.0": 6, "dynamics.latent": 1, "policy.2": 5, "value.0.rest.2": 4}
    groups = component_groups(net, torch.zeros(2, 5), protect=["coupling"])
    with torch.no_grad():
        for each in (g.group for g in groups if g.name in unused):
            for m in each.having("consumes"):
                net.get_submodule(m.layer).weight[:, : unused[each.name]] = 0
    batches, data = regression(net, 5)
    best = [g.group.channels - unused.get(g.name, 0) for g in groups]
    channels = Channels(net, (5,), "parameters", norms=True)
    target = 1 - channels.cost_at(best) / channels.dense

    def loss(output, x, y):
        return squared(torch.cat(output, 1), x, y) + 0.1

    def missed(model, data):
        with torch.no_grad():
            return float(sum(squared(torch.cat(model(x), 1), x, y) for x, y in data))

    app = Application([Metric("error", "lower", missed)])
    method = build(target=target, protect=["coupling"], steps=200)
    pruned = method.prune(net, groups, app, loss, batches, data)
    assert list(pruned.point.kept) == best
    assert pruned.point.judgement.values["error"] < 1e-9
    assert 1 - measure.parameters(pruned.model) / measure.parameters(net) == pytest.approx(target)


@pytest.fixture(scope="module")
def digits():
    """An autoencoder of digits with a classifier, trained for a second, and its context."""
    data = datasets.load("digits")
    held_in, held_out = datasets.split(data.train, 200)
    batches = datasets.Batches(held_in, data.info, 64)
    validation = datasets.Batches(held_out, data.info, 200)
    task = measure.task("reconstruct_and_classify", data.info.mean, data.info.std)
    torch.manual_seed(0)
    net = models.AutoencoderClassifier(SMALL, 10, (32, 16), 12, 16)
    recipe = Recipe(epochs=12, lr=0.005, batch_size=64, optimizer="adam")
    made = train(net, methods.build("dense", {}), recipe, batches, validation, seed=0, task=task)
    return made.model, Context(batches, validation, task, torch.device("cpu"))


def pruned_by(digits, name="component_aware", target=0.5, seed=0, **params):
    """The prepared method and the net that it has pruned in place."""
    net, context = copy.deepcopy(digits[0]), digits[1]
    quick = {"samples": 64} | ({"steps": 40} if name == "component_aware" else {})
    method = build(name, target, **quick | params)
    method.attach(net, torch.Generator().manual_seed(seed))
    method.prepare(net, context)
    return method, net


def kept_by(method):
    """Channels kept, by the group's name."""
    names = [group.name for group in method.pruned.choice.groups]
    return dict(zip(names, method.pruned.point.kept, strict=True))


SOLVERS = [
    ("component_aware", {}),
    ("component_aware", {"importance": "group_l2", "hold": "penalty"}),
    ("component_aware", {"coefficient": "multiplier"}),
    ("component_aware", {"solver": "grid", "levels": 3, "per": "component"}),
    ("uniform", {}),
    ("uniform", {"aware": True}),
    ("uniform", {"ranking": "global"}),
    ("uniform", {"ranking": "global", "aware": True, "importance": "taylor"}),
    ("uniform", {"ranking": "random"}),
    ("uniform", {"ranking": "random", "aware": True}),
]


@pytest.mark.parametrize("target", [0.3, 0.85])
@pytest.mark.parametrize(("name", "params"), SOLVERS)
def test_the_share_of_real_parameters_is_met(digits, name, params, target):
    method, net = pruned_by(digits, name, target, **params)
    removed = 1 - measure.parameters(net) / measure.parameters(digits[0])
    # A channel of the smallest group is 0.1 to 0.5% of this net.
    assert 0 <= removed - target < 0.005
    assert method.measures(net)["removed"] == pytest.approx(removed)
    assert method.kept_share(net) == pytest.approx(1 - removed)


def test_gradient_descent_reaches_the_grid_at_a_tenth_of_its_passes(digits):
    """Four coefficients, seven levels of each: 2,401 points, counted before skipping."""
    given = {"protect": ["coupling", "classifier"], "target": 0.6, "samples": 128, "levels": 7}
    grid, _ = pruned_by(digits, solver="grid", **given)
    descent, net = pruned_by(digits, **given | {"steps": 100})
    best, found = (m.pruned.point.judgement.values["psnr"] for m in (grid, descent))
    measures = descent.measures(net)
    assert measures["coefficients"] == 4
    assert measures["grid_passes"] == 7**4 * 128
    assert found >= best - 0.1
    assert measures["search_passes"] <= measures["grid_passes"] / 10


def test_coefficients_beat_the_controls(digits):
    def psnr(name, **params):
        return pruned_by(digits, name, 0.5, **params)[0].pruned.point.judgement.values["psnr"]

    ours = psnr("component_aware")
    assert ours > max(
        psnr("uniform"),
        psnr("uniform", ranking="global"),
        psnr("uniform", ranking="global", importance="taylor"),
        psnr("uniform", ranking="random"),
    )


def test_protected_groups_are_untouched_and_undo_is_exact(digits):
    before = copy.deepcopy(digits[0].state_dict())
    method, net = pruned_by(digits, protect=["coupling", "encoder.fc1"])
    kept = kept_by(method)
    assert (kept["encoder.fc1"], kept["encoder.fc3"]) == (32, 12)
    assert torch.equal(net.encoder.fc1.weight, before["encoder.fc1.weight"])
    with torch.no_grad():
        net.encoder.fc1.weight.zero_()
    dense = method.pruned.undo()
    assert list(dense.state_dict()) == list(before)
    assert all(torch.equal(before[name], v) for name, v in dense.state_dict().items())
    assert dense.decoder.fc1.out_features == 16


def test_a_limit_changes_what_is_kept(digits):
    free, _ = pruned_by(digits, target=0.7)
    accuracy = free.pruned.point.judgement.values["accuracy"]
    limit = math.ceil(100 * accuracy + 2) / 100
    held, _ = pruned_by(digits, target=0.7, constraints=[f"accuracy >= {limit}"])
    judged = held.pruned.point.judgement
    assert judged.holds
    assert judged.values["accuracy"] >= limit > accuracy
    assert judged.values["psnr"] < free.pruned.point.judgement.values["psnr"]


def dense_psnr(digits):
    net, context = digits
    x, y = next(context.validation.ordered(64))
    return context.task.evaluate(net, [(x, y)], 10).metric


@pytest.mark.parametrize("name", ["component_aware", "uniform"])
def test_a_broken_limit_is_refused_with_the_closest_point(digits, name):
    limit = round(dense_psnr(digits) - 2, 2)
    constraints = [f"psnr >= {limit}"]
    with pytest.raises(RefusedError) as caught:
        pruned_by(digits, name, 0.8, constraints=constraints)
    error = caught.value
    said = one_line(caught)
    assert said.startswith(f"target = 0.8: refused, psnr >= {limit:g} is broken by ")
    assert f"the closest that holds removes {error.closest:.4f}" in said
    assert 0 < error.closest < 0.8
    (broken,) = error.judgement.broken
    assert broken[1] == pytest.approx(limit - error.judgement.values["psnr"])
    # It is recorded instead of refused where that is asked for.
    method, net = pruned_by(digits, name, 0.8, constraints=constraints, refuse=False)
    assert method.measures(net)["constraints_hold"] == 0
    assert method.measures(net)["constraints_shortfall"] > 0


def test_what_is_said_to_hold_does(digits):
    limit = [f"psnr >= {dense_psnr(digits) - 2:.2f}"]
    with pytest.raises(RefusedError) as caught:
        pruned_by(digits, "uniform", 0.8, constraints=limit)
    closest = caught.value.closest
    method, net = pruned_by(digits, "uniform", closest, constraints=limit)
    assert method.measures(net)["constraints_hold"] == 1
    assert method.measures(net)["removed"] == pytest.approx(closest, abs=1e-9)


def test_what_not_even_the_dense_net_keeps_is_refused_with_zero(digits):
    with pytest.raises(RefusedError, match=r"removes 0\.0000 of the parameters") as caught:
        pruned_by(digits, "uniform", 0.5, constraints=["psnr >= 90"])
    assert caught.value.closest == 0


def test_a_target_out_of_reach_is_refused_with_the_most_there_is(digits):
    with pytest.raises(
        RefusedError, match=r"^target = 0\.9: at most 0\.\d+ of the param"
    ) as caught:
        pruned_by(digits, target=0.9, protect=["encoder", "decoder"])
    assert 0 < caught.value.closest < 0.9


def test_a_target_between_two_channels_is_refused_beyond_the_tolerance():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    batches, data = regression(net, 2)
    method = methods.build("uniform", {"tolerance": 0.01}, 0.2, "parameters")
    groups = component_groups(net, torch.zeros(2, 2), {"all": ["0", "1"]})
    with pytest.raises(RefusedError, match=r"nearest whole channels remove 0\.4167, \+0\.2167"):
        method.prune(net, groups, Application([ERROR]), squared, batches, data)


def test_the_report_says_what_each_group_costs_alone(digits):
    method, _ = pruned_by(digits)
    rows = {row["group"]: row for row in method.pruned.report()}
    assert list(rows) == [g.name for g in method.pruned.choice.groups]
    row, full = rows["encoder.fc2"], method.pruned.choice.full
    alone = [*full[:1], row["kept"], *full[2:]]
    point = method.pruned.choice.judge(method.pruned.budget, alone)
    dense = method.pruned.choice.judge(method.pruned.budget, full)
    for metric in ("psnr", "accuracy"):
        cost = dense.judgement.values[metric] - point.judgement.values[metric]
        assert row[f"{metric} lost alone"] == cost
    assert (row["place"], row["kind"]) == ("encoder", "internal")
    assert rows["encoder.fc3"]["kind"] == "coupling"
    assert row["removed"] == 1 - row["kept"] / 16


def test_recheck_on_new_data_finds_the_drift(digits):
    limit = f"psnr >= {dense_psnr(digits) - 4:.2f}"
    method, net = pruned_by(digits, target=0.1, constraints=[limit])
    choice, point = method.pruned.choice, method.pruned.point
    same = choice.application.recheck(net, choice.data, point.judgement)
    assert [row["worse by"] for row in same] == [0, 0]
    (x, y), *_ = choice.data
    noisy = choice.application.recheck(net, [(x + 2 * torch.randn_like(x), y)], point.judgement)
    assert noisy[0]["worse by"] > 1
    assert (same[0]["holds"], noisy[0]["holds"]) == (True, False)


def test_soft_masks_at_zero_temperature_are_the_pruned_net(digits):
    net, context = digits
    choice = choice_of(net.double(), context)
    net.float()
    numbers = torch.tensor([0.3, 0.7, 0.4, 0.6, 0.2, 0.5])
    budget = choice.budget(spread_out([torch.rand(n) for n in choice.full]))
    masks = soft_masks(choice, budget, numbers, 1e-9)
    small = choice.small(budget.indices(budget.kept(numbers.tolist())))
    x = choice.data[0][0]
    outputs = masked_output(choice.small.dense, choice.plain, masks, x), small(x)
    for soft, hard in zip(*outputs, strict=True):
        assert (soft - hard).abs().max() <= 1e-9 * hard.abs().max()


def choice_of(net, context, target=0.5):
    def batches():
        while True:
            for x, y in context.train.epoch(0):
                yield x.double(), y

    x, y = next(context.validation.ordered(32))
    metrics = measure.task_metrics(context.task, 10)
    params = methods.params_of("component_aware", {})
    groups = component_groups(net, torch.zeros(2, *SMALL))
    app, data = Application(metrics), [(x.double(), y)]
    return Choice(net, groups, app, context.task.loss, batches(), data, target, params)


def test_soft_masks_of_a_layer_norm_are_the_pruned_net():
    net = randomise(TDMPC(3, 2, 8, 4)).double()
    groups = component_groups(net, torch.zeros(2, 5))
    x = torch.randn(6, 5, dtype=torch.float64)
    masks = [(torch.arange(g.group.channels) % 2).double() for g in groups]
    small = narrow(net, [g.group for g in groups], [m.nonzero().flatten() for m in masks])
    soft = masked_output(net, [g.group for g in groups], masks, x)
    for a, b in zip(soft, small(x), strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_the_soft_loss_counts_its_passes_and_has_the_gradient_of_finite_differences(digits):
    net, context = digits
    choice = choice_of(copy.deepcopy(net).double(), context)
    budget = choice.budget(spread_out([torch.rand(n) for n in choice.full]))
    one = choice.batch()
    choice.batch, before = (lambda: one), choice.passes
    numbers = torch.full((6,), 0.4, dtype=torch.float64, requires_grad=True)
    loss, removed = soft_loss(choice, budget, numbers, 0.1)
    assert choice.passes - before == 3 * 64
    (slope,) = torch.autograd.grad(loss, numbers)
    for i in range(6):
        step = 1e-5 * torch.eye(6, dtype=torch.float64)[i]
        with torch.no_grad():
            up, down = (soft_loss(choice, budget, numbers + s, 0.1)[0] for s in (step, -step))
        assert slope[i].item() == pytest.approx((up - down).item() / 2e-5, rel=1e-4, abs=1e-7)
    # A mask of 1 / (1 + exp((alpha - p) / T)) each, summed over the ranks of the group.
    p = (torch.arange(32).double() + 0.5) / 32
    kept = torch.sigmoid((p - 0.4) / 0.1).sum().item()
    whole = [kept / 32 * n for n in choice.full]
    assert 0.3 < removed.item() < 0.9
    masks = soft_masks(choice, budget, numbers, 0.1)
    assert masks[0].sum().item() == pytest.approx(whole[0])


def test_a_step_of_the_descent_keeps_the_share_removed():
    alpha = torch.tensor([0.2, 0.5], requires_grad=True)
    loss, over = 3 * alpha[0] + alpha[1], alpha @ torch.tensor([1.0, 1.0]) - 0.6
    params = methods.params_of("component_aware", {})
    descend_step(alpha, torch.optim.SGD([alpha], lr=0.1), loss, over, params)
    # Gradient (3, 1) less its part (2, 2) along (1, 1); then 0.1 over the target, taken back.
    assert alpha.tolist() == pytest.approx([0.2 - 0.1 - 0.05, 0.5 + 0.1 - 0.05])


def test_the_small_net_is_trained_on_and_a_resumed_run_ends_the_same(digits, tmp_path):
    net, context = digits
    recipe = Recipe(epochs=2, lr=1e-3, batch_size=64, optimizer="adam")

    def run(path, stop=None):
        method = build(target=0.5, samples=64, steps=20)
        where = {"seed": 0, "task": context.task, "checkpoint": path, "run": "r"}
        more = {"checkpoint_seconds": 0.0} if stop else {}
        model = copy.deepcopy(net).requires_grad_(True)
        if stop:
            method.after_step = stopper(stop)
        return train(model, method, recipe, context.train, context.validation, **where, **more)

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.pt", stop=25)
    resumed = run(tmp_path / "cut.pt")
    assert measure.parameters(whole.model) < 0.51 * measure.parameters(net)
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert whole.history == resumed.history
    for name in ("shown", "output_dense", "output_pruned"):
        assert (whole.arrays[name].shape, whole.arrays[name].dtype) == ((6, *SMALL), np.uint8)
    assert whole.arrays["latent_dense"].shape == whole.arrays["latent_pruned"].shape == (64, 2)
    assert np.array_equal(whole.arrays["kept"], resumed.arrays["kept"])


def stopper(steps):
    count = iter(range(steps))

    def after_step(model, progress, lr):
        if next(count, None) is None:
            raise KeyboardInterrupt

    return after_step


def test_without_training_the_pruned_net_is_what_is_left(digits):
    net, context = digits
    method, model = build("uniform", 0.5, samples=64), copy.deepcopy(net)
    recipe = Recipe(epochs=0, lr=1e-3, batch_size=64)
    where = {"seed": 0, "task": context.task}
    made = train(model, method, recipe, context.train, context.validation, **where)
    assert made.status == "done"
    (row,) = made.history
    assert (row["epoch"], row["kept"]) == (0, method.kept_share(model))
    assert math.isnan(row["train_loss"])
    x = torch.randn(4, *SMALL)
    for a, b in zip(made.model(x), method.pruned.model(x), strict=True):
        assert torch.equal(a, b)


def test_awareness_keeps_the_interface_and_gives_each_component_its_share(digits):
    method, _ = pruned_by(digits, "uniform", 0.5, aware=True, ranking="global")
    assert kept_by(method)["encoder.fc3"] == 12
    blind, _ = pruned_by(digits, "uniform", 0.5, ranking="global")
    assert blind.pruned.point.kept[2] < 12


def test_groups_of_a_component_share_a_coefficient(digits):
    method, net = pruned_by(digits, per="component", solver="grid", levels=2)
    # Encoder, decoder, classifier and the latent vector.
    assert method.measures(net)["coefficients"] == 4
    kept = [row["removed"] for row in method.pruned.report()]
    assert kept[0] == pytest.approx(kept[1], abs=1 / 8)
    assert kept[3] == pytest.approx(kept[4], abs=1 / 8)


STORED = [
    ("autoencoder", "reconstruct"),
    ("autoencoder_classifier", "reconstruct_and_classify"),
    ("conv_autoencoder", "reconstruct"),
    ("conv_autoencoder_classifier", "reconstruct_and_classify"),
]


@pytest.fixture(scope="module", params=STORED, ids=lambda each: each[0])
def finished(request):
    """A pruned autoencoder with a life of its own: name, dense net, finished net."""
    name, task = request.param
    torch.manual_seed(0)
    dense = randomise(models.build(name, SMALL, 10)).eval()
    net = copy.deepcopy(dense)
    task = measure.task(task, (0.5,), (0.29,))
    method = build("uniform", 0.7, ranking="global", samples=32)
    method.attach(net, torch.Generator().manual_seed(0))
    method.prepare(net, Context(toy_batches(), toy_batches(), task, torch.device("cpu")))
    return name, dense, method.finish(net).eval()


def outputs(net):
    x = torch.randn(5, *SMALL, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return tree_leaves(net(x))


def test_a_pruned_autoencoder_is_the_masked_dense_one(finished):
    _, dense, small = finished
    channels, masks = Channels(dense, SMALL, "parameters"), []
    groups = channels.groups
    scores = importance(channels, dense, GroupL2.measure).split([g.channels for g in groups])
    for group, score in zip(groups, scores, strict=True):
        kept = len(small.get_submodule(group.name).bias)
        gone = score.argsort(stable=True)[: group.channels - kept]
        masks.append(torch.ones(group.channels).index_fill(0, gone, 0))
    for a, b in zip(
        outputs(lambda x: masked_output(dense, groups, masks, x)), outputs(small), strict=True
    ):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_a_pruned_autoencoder_comes_back_from_disk_bit_for_bit(finished, tmp_path):
    name, dense, small = finished
    shrink.save_net(small, tmp_path / "net", name, SMALL, 10)
    loaded = shrink.load_net(tmp_path / "net", name)
    assert type(loaded) is type(dense)
    assert measure.parameters(loaded) == measure.parameters(small) < 0.3 * measure.parameters(dense)
    for a, b in zip(outputs(small), outputs(loaded), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(small.encode(torch.ones(2, *SMALL)), loaded.encode(torch.ones(2, *SMALL)))


@pytest.mark.parametrize("finished", STORED[1:3], indirect=True, ids=lambda each: each[0])
def test_onnx_runtime_computes_every_output_of_it(finished, tmp_path):
    _, _, small = finished
    shrink.export_onnx(small, tmp_path / "net.onnx", SMALL)
    net = shrink.OnnxNet(tmp_path / "net.onnx")
    names = [each.name for each in net.session.get_outputs()]
    expected = outputs(small)
    assert names == ["output", "output_1"][: len(expected)]
    for a, b in zip(expected, outputs(net), strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()


@pytest.mark.parametrize(
    ("params", "target", "words"),
    [
        ({}, 0.0, "target = 0.0: the share of parameters to remove"),
        ({}, 1.0, "target = 1.0: the share of parameters to remove"),
        ({"tolerance": 0.0}, 0.5, "params.tolerance = 0.0: "),
        ({"most": 1.0}, 0.5, "params.most = 1.0: "),
        ({"levels": 1}, 0.5, "params.levels = 1: "),
        ({"solver": "newton"}, 0.5, "params.solver = 'newton': "),
        ({"protect": "encoder"}, 0.5, "params.protect = 'encoder': "),
        ({"epsilon": 0.1}, 0.5, "params.epsilon = 0.1: allowed are"),
    ],
)
def test_bad_settings_are_refused(params, target, words):
    with pytest.raises(InputError, match=words) as caught:
        build(target=target, **params)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"constraints": ["speed >= 3"]}, "constraint = 'speed >= 3': metrics are accuracy, psnr"),
        ({"protect": ["encoder.fc9"]}, "protect = 'encoder.fc9': protectable are"),
    ],
)
def test_what_only_the_net_can_tell_is_refused_before_the_search(digits, params, words):
    before = copy.deepcopy(digits[0].state_dict())
    with pytest.raises(InputError, match=words) as caught:
        pruned_by(digits, **params)
    assert one_line(caught)
    assert all(torch.equal(before[k], v) for k, v in digits[0].state_dict().items())


def test_the_plane_of_points_is_that_of_their_spread():
    z = torch.tensor([[3.0, 0.0, 1.0], [-3.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
    assert plane(z).tolist() == [[3, 0], [-3, 0], [0, 1], [0, -1]]
    assert plane(z[:, :1])[:, 1].tolist() == [0] * 4
    assert as_bytes(torch.tensor([-1.0, 0.5, 2.0])).tolist() == [0, 128, 255]


def test_a_classifier_is_pruned_by_its_accuracy():
    context = Context(toy_batches(), toy_batches(), measure.Task(), torch.device("cpu"))
    net = models.build("lenet300", SMALL, 10)
    method = build(target=0.5, samples=32, steps=5)
    method.attach(net, torch.Generator().manual_seed(0))
    method.prepare(net, context)
    assert list(method.pruned.point.judgement.values) == ["accuracy"]
    assert method.finish(net)(torch.zeros(2, *SMALL)).shape == (2, 10)
    assert set(method.arrays()) == {"kept", "path"}


def test_the_dense_net_of_no_hidden_layer_has_nothing_to_remove():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    context = Context(toy_batches(), toy_batches(), measure.Task(), torch.device("cpu"))
    method = build(target=0.5)
    method.attach(net, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="model = 'Sequential': has no channels that could go"):
        method.prepare(net, context)


def test_an_autoencoder_alone_is_judged_by_psnr():
    task = measure.task("reconstruct", (0.5,), (0.29,))
    context = Context(toy_batches(), toy_batches(), task, torch.device("cpu"))
    torch.manual_seed(0)
    net = Autoencoder(SMALL, 10, (8, 6), 4)
    # A channel of so small a net is 5% of its parameters.
    method = build(target=0.3, samples=32, steps=5, tolerance=0.05)
    method.attach(net, torch.Generator().manual_seed(0))
    method.prepare(net, context)
    assert list(method.pruned.point.judgement.values) == ["psnr"]
