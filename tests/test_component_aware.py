"""Component-aware pruning: the budget, the search, the limits, its controls, and what is kept."""

import copy
import math

import numpy as np
import pytest
import torch
import torch_pruning
from conftest import one_line, randomise
from dispatch import TensorsOnly
from torch import nn

from prunestudy import datasets, measure, methods
from prunestudy.errors import InputError
from prunestudy.measure import Metrics
from prunestudy.methods import Context, Method
from prunestudy.methods.channel_controls import taylor
from prunestudy.methods.channel_probes import as_bytes
from prunestudy.methods.channels import Channels
from prunestudy.methods.component_aware import ComponentAware, masked_output
from prunestudy.methods.search import Uniform, _Budget, placed
from prunestudy.models import TDMPC, Autoencoder
from prunestudy.shrink import component_groups, narrow
from prunestudy.train import Recipe, prune

IMAGES = torch.zeros(2, 1, 8, 8)
ONCE = Recipe(epochs=0, lr=1e-3)


# --- the budget


def budget(numbers=(4, 3), least=(1, 1)):
    first, second = numbers
    net = nn.Sequential(nn.Linear(2, first), nn.Linear(first, second), nn.Linear(second, 2))
    positions = placed([torch.arange(n).float() for n in numbers], evenly=True)
    return _Budget(Channels(net, torch.zeros(2, 2), "parameters"), positions, list(least))


def test_positions_are_even_ranks_or_logarithms():
    scores = [torch.tensor([0.3, 0.1, 0.2, 9.0])]
    assert placed(scores, evenly=True)[0].tolist() == [0.625, 0.125, 0.375, 0.875]
    assert placed(scores, evenly=False)[0].tolist() == scores[0].double().log().tolist()


def test_channels_below_the_number_go_and_the_least_stay():
    made = budget()
    assert made.kept([0.0, 0.0]) == [4, 3]
    # Ranks 1/8, 3/8, ... of the first group, 1/6, 1/2, 5/6 of the second.
    assert made.kept([0.4, 0.4]) == [2, 2]
    assert made.kept([9.0, 0.0]) == [1, 3]
    assert budget(least=(4, 2)).kept([9.0, 9.0]) == [4, 2]
    assert [i.tolist() for i in made.indices([2, 1])] == [[2, 3], [2]]


def test_the_target_is_met_from_above_and_not_one_more_could_stay():
    made = budget()
    assert made.channels.dense == 12 + 15 + 8
    kept = made.meet([0.0, 0.0], 0.3)
    assert made.removed(kept) >= 0.3
    for i, k in enumerate(kept):
        more = [*kept[:i], k + 1, *kept[i + 1 :]]
        assert k == made.full[i] or made.removed(more) < 0.3
    assert made.meet([0.9, 0.0], 0.3)[0] < made.meet([0.0, 0.9], 0.3)[0]
    with pytest.raises(InputError, match=r"^target = 0\.9: at most 0\.7429 of the parameters"):
        made.meet([0.0, 0.0], 0.9)
    assert made.kept([0.0, 0.0], made.offset([0.0, 0.0], 0.3, [1]))[1] == 1


def test_taylor_importance_is_torch_prunings():
    net = randomise(Autoencoder((1, 8, 8), 10, (4, 6), 5, convolutional=True))
    channels, x = Channels(net, IMAGES, "parameters"), torch.randn(3, 1, 8, 8)
    net(x).square().mean().backward()
    graph = torch_pruning.DependencyGraph().build_dependency(net, x, verbose=False)
    theirs = torch_pruning.importance.GroupTaylorImportance()
    for group, score in zip(channels.groups, taylor(channels, net), strict=True):
        layer = net.get_submodule(group.name)
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        every = graph.get_pruning_group(layer, cut, list(range(group.channels)))
        torch.testing.assert_close(score, theirs(every))
        assert score.mean().item() == pytest.approx(1, rel=1e-5)


# --- the search, where the answer is known


def two_parts():
    """Two components of eight hidden units each, and four numbers between them.

    Of the first component's units only the last two are used, of the second's the last six: at
    equal cost a unit, the best coefficients are 6/8 and 2/8 where half of the units must go.
    """
    torch.manual_seed(1)
    parts = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)]
    for part, unused in zip(parts, (6, 2), strict=True):
        for layer in (part[0], part[2]):
            nn.init.normal_(layer.weight)
        part[0].bias.data.fill_(0.5)
        part[0].weight.data[:unused] *= 0.1
        part[2].weight.data[:, :unused] = 0
    return nn.Sequential(*parts)


def squared(output, y):
    """The exact net has no error at all: a constant keeps the ratio to it finite."""
    return nn.functional.mse_loss(output, y) + 0.1


@pytest.mark.parametrize("importance", ["taylor", "group_l2"])
@pytest.mark.parametrize("solver", ["gradient", "grid"])
def test_both_solvers_find_the_known_best_coefficients(solver, importance):
    net, x = two_parts(), torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    data = [(part, net(part).detach()) for part in x.split(64)]
    # Sixteen units of nine parameters, four numbers between: eight units are 72 of 152.
    target = 8 * 9 / measure.parameters(net)
    options = {"protect": ["coupling"], "importance": importance}
    method = ComponentAware(target, solver=solver, **options)
    made = prune(net, method, data, ONCE, validation=data, loss=squared)
    assert method.point.kept == (2, 4, 6)
    assert method.point.values == {"loss": pytest.approx(0.1)}
    assert [part[0].out_features for part in made.model] == [2, 6]
    control = Uniform(target, **options)
    prune(net, control, data, ONCE, loss=squared)  # without validation: judged on the training's
    assert control.point.kept == (4, 4, 4)
    assert control.point.values["loss"] > 0.1001


def test_a_step_of_the_descent_keeps_the_share_removed():
    alpha = torch.tensor([0.2, 0.5], requires_grad=True)
    loss, over = 3 * alpha[0] + alpha[1], alpha @ torch.tensor([1.0, 1.0]) - 0.6
    ComponentAware(0.5).step(alpha, torch.optim.SGD([alpha], lr=0.1), loss, over)
    # Gradient (3, 1) less its part (2, 2) along (1, 1); then 0.1 over the target, taken back.
    assert alpha.tolist() == pytest.approx([0.2 - 0.1 - 0.05, 0.5 + 0.1 - 0.05])


# --- on a trained autoencoder of digits


class Digits:
    """An autoencoder of digits with a classifier, trained for a second, its data and task."""

    def __init__(self):
        data = datasets.load("digits")
        held_in, held_out = datasets.split(data.train, 200)
        self.train = datasets.batches_of(held_in, data.info, 64)
        self.task = measure.task("reconstruct_and_classify", data.info.mean, data.info.std)
        self.about = {
            "validation": datasets.batches_of(held_out, data.info, 200),
            "loss": self.task.loss,
            "metrics": measure.task_metrics(self.task, 10),
        }
        torch.manual_seed(0)
        net = Autoencoder((1, 8, 8), 10, (32, 16), 12, head=16)
        recipe = Recipe(epochs=12, lr=0.005, optimizer="adam")
        self.net = prune(net, Method(), self.train, recipe, **self.about).model.eval()

    def prune(self, name="component_aware", target=0.5, recipe=ONCE, more=(), **params):
        quick = {"samples": 64} | ({"steps": 40} if name == "component_aware" else {})
        method = methods.build(name, quick | params, target)
        about = self.about | dict(more)
        return prune(self.net, method, self.train, recipe, **about)


@pytest.fixture(scope="module")
def digits():
    return Digits()


SOLVERS = [
    ("component_aware", {}),
    ("component_aware", {"importance": "group_l2", "hold": "penalty"}),
    ("component_aware", {"coefficient": "multiplier"}),
    ("component_aware", {"solver": "grid", "levels": 3, "per": "component"}),
    ("uniform", {}),
    ("uniform", {"aware": True}),
    ("uniform", {"ranking": "global"}),
    ("uniform", {"ranking": "global", "aware": True, "importance": "taylor"}),
    ("uniform", {"ranking": "random", "aware": True}),
]


@pytest.mark.parametrize("target", [0.3, 0.85])
@pytest.mark.parametrize(("name", "params"), SOLVERS)
def test_the_share_of_real_parameters_is_met_without_a_step(digits, name, params, target):
    made = digits.prune(name, target, **params)
    removed = 1 - measure.parameters(made.model) / measure.parameters(digits.net)
    # A channel of the smallest group is 0.1 to 0.5% of this net.
    assert 0 <= removed - target < 0.005
    report = made.method.report()
    assert report["removed"] == pytest.approx(removed)
    macs = [measure.macs(net, IMAGES) for net in (made.model, digits.net)]
    assert report["macs_removed"] == pytest.approx(1 - macs[0] / macs[1])
    (row,) = made.history
    assert (row["epoch"], row["kept"]) == (0, pytest.approx(1 - removed))
    assert math.isnan(row["train_loss"])
    # It is the dense net with the pruned channels at zero where they are consumed.
    kept = made.method.budget.indices(made.method.point.kept)
    groups = made.method.channels.groups
    masks = [torch.zeros(g.channels).index_fill(0, k, 1) for g, k in zip(groups, kept, strict=True)]
    x = torch.randn(5, 1, 8, 8)
    both = zip(masked_output(digits.net, groups, masks, x), made.model(x), strict=True)
    assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in both)


def test_gradient_descent_reaches_the_grid_at_half_of_its_passes(digits):
    """Four coefficients, seven levels of each: 2,401 points, of which many are one."""
    given = {"protect": ["coupling", "classifier"], "target": 0.6, "samples": 128, "levels": 7}
    best = digits.prune(solver="grid", **given).method.report()
    found = digits.prune(**given | {"steps": 100}).method.report()
    assert found["search_psnr"] >= best["search_psnr"] - 0.1
    assert found["search_passes"] <= best["search_passes"] / 2


def test_coefficients_beat_the_controls(digits):
    def psnr(name, **params):
        return digits.prune(name, **params).method.point.values["psnr"]

    controls = [{}, {"ranking": "global"}, {"ranking": "random"}]
    controls.append({"ranking": "global", "importance": "taylor"})
    assert psnr("component_aware") > max(psnr("uniform", **params) for params in controls)


def test_protected_groups_and_the_net_itself_are_untouched(digits):
    before = copy.deepcopy(digits.net.state_dict())
    made = digits.prune(protect=["coupling", "encoder.fc1"])
    assert made.model.encoder.fc3.out_features == 12
    assert torch.equal(made.model.encoder.fc1.weight, before["encoder.fc1.weight"])
    assert all(torch.equal(before[name], v) for name, v in made.dense.state_dict().items())
    aware = digits.prune("uniform", aware=True, ranking="global").model
    blind = digits.prune("uniform", ranking="global").model
    assert aware.encoder.fc3.out_features == 12 > blind.encoder.fc3.out_features


def test_groups_of_a_component_share_a_coefficient(digits):
    method = digits.prune(per="component", solver="grid", levels=2).method
    report = method.report()
    assert method.coefficients == 4  # encoder, decoder, classifier and the latent vector
    removed = [row["removed"] for row in report["report"]]
    assert removed[0] == pytest.approx(removed[1], abs=1 / 8)
    assert removed[3] == pytest.approx(removed[4], abs=1 / 8)


def test_a_net_may_be_judged_by_how_well_it_recovers(digits):
    given = {"target": 0.7, "steps": 20, "check": 20}
    frozen, made = digits.prune(**given).method, digits.prune(**given, recover=10)
    method = made.method
    assert method.point.values["psnr"] > frozen.point.values["psnr"] + 1
    # Each point is judged on 64 samples, after ten batches of 64, forward and backward.
    points = [each.cost["search_points"] for each in (frozen, method)]
    more = method.cost["search_passes"] - frozen.cost["search_passes"]
    assert more == 64 * (points[1] - points[0]) + 10 * 3 * 64 * points[1]
    # What was trained to be judged is thrown away: the small net is cut out of the dense one.
    (kept, *_), whole = method.budget.indices(method.point.kept), digits.net.encoder.fc1.weight
    assert torch.equal(made.model.encoder.fc1.weight, whole[kept])


def test_the_report_says_what_each_group_costs_alone(digits):
    method = digits.prune().method
    rows = {row["group"]: row for row in method.report()["report"]}
    assert list(rows) == [g.name for g in method.groups]
    row, full = rows["encoder.fc2"], method.budget.full
    point, dense = method.judge([*full[:1], row["kept"], *full[2:]]), method.judge(full)
    for metric in ("psnr", "accuracy"):
        assert row[f"{metric} lost alone"] == dense.values[metric] - point.values[metric]
    assert (row["place"], row["kind"]) == ("encoder", "internal")
    assert rows["encoder.fc3"]["kind"] == "coupling"
    assert row["removed"] == 1 - row["kept"] / 16
    assert method.report() == method.report()


# --- limits


def dense_psnr(digits):
    x, y = next(iter(digits.about["validation"].ordered(64)))
    return digits.about["metrics"].values(digits.net, [(x, y)])["psnr"]


def test_a_limit_changes_what_is_kept(digits):
    free = digits.prune(target=0.7).method.point.values
    limit = math.ceil(100 * free["accuracy"] + 2) / 100
    method = digits.prune(target=0.7, constraints=[f"accuracy >= {limit}"]).method
    held, report = method.point, method.report()
    assert held.shortfall == 0
    assert held.values["accuracy"] >= limit > free["accuracy"]
    assert held.values["psnr"] < free["psnr"]
    assert report["search_psnr"] == held.values["psnr"]


@pytest.mark.parametrize("name", ["component_aware", "uniform"])
def test_a_broken_limit_is_refused_with_the_closest_point(digits, name):
    constraints = [f"psnr >= {round(dense_psnr(digits) - 2, 2)}"]
    with pytest.raises(InputError) as caught:
        digits.prune(name, 0.8, constraints=constraints)
    said = one_line(caught)
    assert said.startswith(f"target = 0.8: refused, {constraints[0]} is broken by ")
    closest = float(said.split("within the limits at most ")[1].split()[0])
    assert 0 < closest < 0.8
    # It is recorded instead of refused where that is asked for.
    report = digits.prune(name, 0.8, constraints=constraints, refuse=False).method.report()
    assert report["constraints_hold"] == 0
    assert report["constraints_shortfall"] > 0
    # And what is said to hold does.
    report = digits.prune(name, closest - 1e-4, constraints=constraints).method.report()
    assert report["constraints_hold"] == 1


@pytest.mark.parametrize(
    ("params", "line"),
    [
        ({"constraints": ["psnr >= 90"]}, r"within the limits at most 0\.0000 of the param"),
        ({"constraints": ["speed >= 3"]}, "constraint = 'speed >= 3': metrics are accuracy, psnr"),
        ({"protect": ["encoder.fc9"]}, "protect = 'encoder.fc9': protectable are"),
        ({"protect": ["encoder", "decoder"], "target": 0.9}, r"target = 0\.9: at most 0\.\d+ of"),
        ({"target": 1.0}, "target = 1.0: the share of parameters to remove"),
        ({"tolerance": 0.0}, "tolerance = 0.0: "),
        ({"most": 1.0}, "most = 1.0: "),
        ({"check": 0}, "check = 0: "),
        ({"solver": "newton"}, "solver = 'newton': "),
        ({"protect": "encoder"}, "protect = 'encoder': "),
        ({"constraints": [0.9]}, "constraints.0 = 0.9: "),
        ({"epsilon": 0.1}, "epsilon = 0.1: allowed are"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(digits, params, line):
    with pytest.raises(InputError, match=line) as caught:
        digits.prune(**params)
    assert one_line(caught)


# --- soft masks


def test_soft_masks_of_a_layer_norm_are_the_pruned_net():
    net = randomise(TDMPC(3, 2, 8, 4)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    groups = [each.group for each in component_groups(net, x)]
    masks = [(torch.arange(g.channels) % 2).double() for g in groups]
    small = narrow(net, groups, [m.nonzero().flatten() for m in masks])
    for a, b in zip(masked_output(net, groups, masks, x), small(x), strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_the_soft_loss_counts_its_passes_and_has_the_gradient_of_finite_differences(digits):
    method = digits.prune().method
    method.dense.double()
    x, y = next(method.batches)
    one, before = (x.double(), y), method.passes
    numbers = torch.full((6,), 0.4, dtype=torch.float64, requires_grad=True)

    def at(numbers):
        method.batches = iter([one])
        return method.soft_loss(method.dense, numbers, 0.1)

    loss, removed = at(numbers)
    assert method.passes - before == 3 * 64
    (slope,) = torch.autograd.grad(loss, numbers)
    for i in range(6):
        step = 1e-5 * torch.eye(6, dtype=torch.float64)[i]
        with torch.no_grad():
            up, down = (at(numbers + s)[0] for s in (step, -step))
        assert slope[i].item() == pytest.approx((up - down).item() / 2e-5, rel=1e-4, abs=1e-7)
    # A mask of 1 / (1 + exp((alpha - p) / T)) each, summed over the ranks of the group.
    p = (torch.arange(32).double() + 0.5) / 32
    whole = torch.sigmoid((p - 0.4) / 0.1).sum().item()
    assert method.soft_masks(numbers, 0.1)[0].sum().item() == pytest.approx(whole)
    assert 0.3 < removed.item() < 0.9
    # At temperature zero they are the channels kept.
    hard = [int(mask.sum()) for mask in method.soft_masks(numbers.detach() + 0.001, 1e-9)]
    assert hard == method.budget.kept([0.401] * 6)


# --- training on, resuming, and nets of one's own


def test_the_small_net_is_trained_on_and_a_resumed_run_ends_the_same(digits, tmp_path):
    recipe = Recipe(epochs=2, lr=1e-3, optimizer="adam")

    def run(path, stop=0):
        probe = methods.probe_of("component_aware", digits.task.pixels)
        if stop:
            probe.update = lambda at: 1 // (stop - at.total_step)
        more = {"probe": probe, "checkpoint": path, "checkpoint_seconds": 0.0, "run": "r"}
        return digits.prune(recipe=recipe, more=more, steps=20)

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "cut.pt", stop=25)
    resumed = run(tmp_path / "cut.pt")
    assert measure.parameters(whole.model) < 0.51 * measure.parameters(digits.net)
    both = zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in both)
    assert whole.history == resumed.history
    found, again = whole.probe.arrays(), resumed.probe.arrays()
    assert all(np.array_equal(found[name], again[name]) for name in found)
    for name in ("shown", "output_dense", "output_pruned"):
        assert (found[name].shape, found[name].dtype) == ((6, 1, 8, 8), np.uint8)


def test_a_classifier_of_ones_own_with_limits_on_ones_own_metrics():
    torch.manual_seed(0)
    x = torch.randn(96, 16)
    data = [(x[i : i + 32], x[i : i + 32, :4].argmax(1)) for i in range(0, 96, 32)]
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    net = prune(net, Method(), data, Recipe(epochs=20, lr=0.1)).model
    options = {"steps": 10, "constraints": ["top1 >= 0.2", "loss <= 9"]}
    made = prune(net, ComponentAware(0.4, **options), data, Recipe(epochs=1, lr=0.1))
    assert list(made.method.point.values) == ["top1", "loss"]
    assert made.model[0].out_features == 14
    with TensorsOnly():  # nothing is left to do in a step
        at = made.method.at(1, 4, torch.tensor(1.0))
        made.method.after_backward(at)
        made.method.after_step(at)

    def wrong(model, batches):
        return {"wrong": sum(float((model(x).argmax(1) != y).sum()) for x, y in batches)}

    metrics = Metrics(wrong, {"wrong": lambda output, x, y: -output.gather(1, y[:, None]).mean()})
    with pytest.raises(InputError, match=r"target = 0\.9: refused, wrong <= 0 is broken by \d+"):
        prune(net, Uniform(0.9, constraints=["wrong <= 0"]), data, ONCE, metrics=metrics)


def test_a_loop_of_ones_own_needs_batches_and_a_net_with_channels():
    net = nn.Sequential(nn.Linear(16, 4))
    context = Context((torch.zeros(2, 16),), nn.functional.cross_entropy)
    with pytest.raises(InputError, match="model = 'Sequential': has no channels that could go"):
        Uniform(0.5).attach(net, context)
    net = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"context\.train = 'no batch': batches"):
        Uniform(0.5).attach(net, context)


def test_pixels_become_bytes():
    assert as_bytes(torch.tensor([-1.0, 0.5, 2.0])).tolist() == [0, 128, 255]


@pytest.mark.parametrize("hold", ["projection", "penalty"])
def test_a_batch_whose_loss_is_not_finite_is_named(hold):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    data, method = [(x, y), (x * math.nan, y)], ComponentAware(0.4, hold=hold, taylor_batches=1)
    with pytest.raises(InputError) as caught:
        prune(net, method, data, ONCE, validation=[(x, y)])
    assert one_line(caught) == "train = 'a batch': its loss is not finite"
