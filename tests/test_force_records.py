"""Force Regularization in the study: the card's ranks and lambda, records, tables, figures."""

import pandas as pd
import pytest
import torch
from conftest import one_line, pairs_of, speed_up_at
from matplotlib import pyplot as plt
from torch import nn

from prunestudy import measure, models, papers, shrink
from prunestudy.errors import InputError
from prunestudy.study.figures import papers as drawings
from prunestudy.study.plan import plan
from prunestudy.study.records import Store, repository
from prunestudy.study.session import Session
from prunestudy.study.settings import own_settings


def convnet():
    return models.build("convnet", (1, 8, 8), 10)


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


def test_earlier_lambda_of_lenet_is_what_the_rule_gives_on_the_records_of_the_search():
    """What it is now `prunestudy search` says."""
    profiles = papers.card("force").profiles
    experiments = [e for name in ("cpu", "paper") for e in profiles[name].experiments]
    forced = [(e, m) for e in experiments for m in e.methods if m.method == "force"]
    steps = [(e, m) for e, m in forced if e.purpose != "search" and e.recipe.schedule == "step"]
    lenet = [m.params for e, m in steps if e.model == "lenet5"]
    used = {(params.get("kind", "l2"), params["strength"]) for params in lenet}

    store = Store("cpu", repository() / "results")
    search = [p for p in plan("cpu", ("force",)) if p.experiment == "search"]
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
        if table.model == "alexnet_grouped":  # its layers have Caffe's names, and there are three
            continue
        shape = (1, 28, 28) if table.dataset == "mnist" else (3, 32, 32)
        net, x = models.build(table.model, shape, 10), torch.zeros(1, *shape)
        full = shrink.ranks_by_share(net, 1.0)
        assert full == dict(zip(table.layers, table.full, strict=True))
        if table.model == "resnet20":
            found = dict(zip(table.layers, table.ranks, strict=True))
            speed_up = speed_up_at(net, measure.layer_macs(net, x), found)
            assert speed_up == pytest.approx(derived, abs=0.01)


def test_a_layer_that_does_not_exist_is_refused_before_a_run_starts():
    for params, words in (
        ({"params.layers": "conv9"}, "layers = 'conv9'"),
        ({"params.factorise": "block*"}, "factorise = 'block"),
    ):
        with pytest.raises(InputError) as caught:
            own_settings({"model": "convnet", "method": "force", "target": 0.05} | params)
        assert one_line(caught).startswith(words)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The quick profile at one seed and one epoch, trained once."""
    folder = tmp_path_factory.mktemp("results")
    made = Session("force", "quick", seeds=1, epochs=1, results=folder, device="cpu")
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
    assert marks["published: low rank without force [P]"] == pytest.approx(shares)
    plt.close("all")


def test_figures_say_what_is_missing(tmp_path):
    empty = Session("force", "quick", results=tmp_path, device="cpu")
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
    x, full, left = torch.zeros(1, 1, 8, 8), pairs_of(before), pairs_of(after)
    assert full.keys() == left.keys()
    macs = measure.macs(after, x)
    assert 0.5 * measure.macs(before, x) < macs <= 0.6 * measure.macs(before, x)
    assert metrics["macs"] == macs
    assert metrics["dense_macs"] == measure.macs(convnet(), x)  # the whole compression
    assert metrics["target_met"] == 1
    # basis filters go as well as filters
    for part in (0, 1):
        assert any(len(left[n][part].weight) < len(full[n][part].weight) for n in full)
