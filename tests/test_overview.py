"""The five side by side: costs, sentences and claims follow from the rows, whatever they say."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CARD, child_run, one_line, put_record
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from torch import nn

import prunestudy as ps
from prunestudy import papers
from prunestudy.errors import InputError
from prunestudy.study import notebooks, overview, session
from prunestudy.study.figures import overview as drawings
from prunestudy.study.lines import bits_of
from prunestudy.study.plan import Planned, plan
from prunestudy.study.records import Store
from prunestudy.study.session import Session
from prunestudy.study.tables import RUN_COLUMNS

T1 = 12.706204736174698  # the 97.5% point of t with one degree


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def run(method, seed, metric, dense=0.9, kind="", target=math.nan, variant="", **more):
    """A row of runs.csv: a net of 1000 parameters and MACs."""
    name = f"{method}-{variant}-{kind}-{target}-{seed}"
    row = {"run": name, "parent": "", "paper": "overview", "method": method, "variant": variant}
    row |= {"model": "lenet5", "dataset": "mnist", "seed": seed, "epochs": 10, "status": "done"}
    row |= {"reading": "", "stage": "", "after": "", "device": "cpu"}
    row |= {"precision": "fp32", "threads": 1, "target_kind": kind, "target": target}
    row |= {"metric_name": "top1", "metric": metric, "dense_metric": dense}
    row |= {"nonzeros": 1000, "macs": 1000, "nonzero_macs": 1000, "bytes": 4000}
    row |= {"dense_parameters": 1000, "dense_macs": 1000, "peak_memory_mb": 2.0}
    return row | more


def table(*rows):
    return pd.DataFrame(rows).reindex(columns=RUN_COLUMNS)


def small(share):
    """What a channel method leaves at `share`."""
    left = int(1000 * share)
    sizes = {"nonzeros": left, "macs": left, "nonzero_macs": left, "bytes": 4 * left}
    return sizes | {"peak_memory_mb": 2 * share}


@pytest.fixture
def runs():
    """Two seeds of dense, GDP with its strongest control, its shape anew, gates, and a pair."""
    rows = []
    for seed in (0, 1):
        up = seed / 100
        aim = {"kind": "macs", "target": 0.7}
        rows += [
            run("dense", seed, 0.9 + up, 0.9 + up),
            run("gdp", seed, 0.89 + up, 0.9 + up, **aim, **small(0.3)),
            run("group_l2", seed, 0.87 + up, 0.9 + up, **aim, **small(0.29)),
            run("scratch", seed, 0.88 + 2 * up, 0.9 + up, **aim, **small(0.3))
            | {"parent": f"gdp--macs-0.7-{seed}"},
            run("sparse_gates", seed, 0.9, 0.9 + up, "sparsity", 0.9, nonzeros=100),
            run("gdp", seed, 0.5, math.nan, "macs", 0.5, "half", epochs=8) | {"stage": "half"},
            run("sparse_gates", seed, 0.85 + up, 0.9 + up, "sparsity", 0.8, "after GDP")
            | {
                "stage": "combined",
                "after": "gdp",
                "nonzeros": 100,
                "macs": 500,
                "parent": f"gdp-half-macs-0.5-{seed}",
            },
        ]
    return table(*rows)


@pytest.fixture
def rows(runs):
    return overview.settings_table(runs)


def row_of(rows, method, combined=False):
    (row,) = (r for _, r in rows.iterrows() if (r.method, r.combined) == (method, combined))
    return row


# --- settings


def test_dense_nets_of_several_lengths_are_told_apart(runs):
    longer = [run("dense", seed, 0.9, epochs=20) for seed in (0, 1)]
    rows = overview.settings_table(pd.concat([runs, table(*longer)]))
    labels = [label for label in rows.label if label.startswith("dense")]
    assert labels == ["dense, 10 epochs", "dense, 20 epochs"]
    assert row_of(rows, "gdp").label == "GDP (ours), 70% of MACs removed"


def test_one_row_per_setting_in_shares_of_dense(rows):
    order = ["dense", "sparse_gates", "gdp", "group_l2", "scratch", "sparse_gates"]
    assert rows.method.tolist() == order
    gdp = row_of(rows, "gdp")
    assert gdp.label == "GDP (ours), 70% of MACs removed"
    assert (gdp.n, gdp.weights, gdp.macs, gdp.memory, gdp.bytes) == (2, 0.3, 0.3, 0.3, 0.3)
    assert [gdp.difference, gdp.difference_low, gdp.difference_high] == pytest.approx([-0.01] * 3)
    assert math.isnan(gdp.time_b1)
    gates = row_of(rows, "sparse_gates")
    assert (gates.weights, gates.macs) == (0.1, 1)
    half = T1 * 0.01 / math.sqrt(2) / math.sqrt(2)
    assert [gates.difference, gates.difference_low] == pytest.approx([-0.005, -0.005 - half])
    pair = row_of(rows, "sparse_gates", combined=True)
    assert pair.label == "gate variables (ours), after GDP, 80% of weights removed"


def test_what_did_not_finish_is_left_out(runs):
    runs.loc[runs.method == "gdp", "status"] = "diverged"
    assert "gdp" not in set(overview.settings_table(runs).method)
    left = (runs.method == "sparse_gates") & (runs.seed == 1)
    runs.loc[left, "status"] = "diverged"
    gates = overview.readable(overview.settings_table(runs).query("method == 'sparse_gates'"))
    assert gates.n.tolist()[0] == "1 (1 diverged)"
    with pytest.raises(InputError) as caught:
        overview.settings_table(runs.assign(status="diverged"))
    assert one_line(caught) == "overview: no run is done yet"


def test_the_readable_table_leaves_empty_what_was_not_measured(rows):
    line = overview.readable(rows).set_index("setting").loc["GDP (ours), 70% of MACs removed"]
    assert line["minus dense"] == "-1.00 [-1.00, -1.00]"
    assert line["weights, %"] == "30"
    assert line["time for one image, %"] == ""
    assert line["result"] == "89.50 ± 0.71%"


# --- answers


def test_of_settings_about_as_small_the_most_accurate_is_taken(rows):
    """group L2 is a little smaller than GDP, and worse; the gates lose less, and leave all MACs."""
    for worse, at_least, expected in (
        (0, -0.05, "GDP (ours), 70% of MACs removed"),
        (0, -0.007, "gate variables (ours), 90% of weights removed"),
        (-0.03, -0.05, "found shape, from scratch, 70% of MACs removed"),
    ):
        changed = rows.assign(difference=rows.difference + worse * (rows.method == "gdp"))
        best = overview.which_when(changed, at_least).set_index("to save")
        (macs,) = (words for words in best.index if "MACs" in words.split(", "))
        assert best.loc[macs, "setting"] == expected
    best = overview.which_when(rows, -0.02).set_index("to save")
    assert best.index.tolist() == [
        "weights",
        "MACs, MACs with non-zero weights, peak memory, bytes on disk",
    ]
    assert best.iloc[1][["minus dense", "n", "MACs, %"]].tolist() == [
        "-1.00 [-1.00, -1.00]",
        2,
        "30",
    ]
    assert overview.which_when(rows, 0.5).empty


# --- claims


def study_of(store):
    """A session of a paper in profile quick, whose records are those of `store`."""
    session = Session("toy", "quick", device="cpu")
    session.store = store
    return session


@pytest.fixture
def three_cards(card_file):
    """A toy paper, another without runs in this profile, and a card that is no paper's."""
    card_file()
    untested = 'not_testable = "no time"'
    start, end = CARD.index("    [[claims.tests]]"), CARD.index("    [profiles.quick]")
    other = CARD[:start] + untested + "\n" + CARD[end:].replace("quick", "cpu")
    card_file(other.replace('"toy"', '"other"').replace("A toy", "Other"), "other")
    plain = CARD[: CARD.index("    [[claims]]")].replace('"toy"', '"sum"')
    for line in ('authors = "Nobody"', 'venue = "Nowhere"', "year = 2000", 'arxiv = "0000.00000"'):
        plain = plain.replace(f"    {line}\n", "")
    card_file(plain + "    claims = []\n" + CARD[end:], "sum")
    assert [card.id for card in papers.cards()] == ["toy", "other", "sum"]


def test_every_claim_of_every_paper(store, three_cards):
    said, study = "Magnitude is better than chance. [O]", study_of(store)
    assert overview.claims(overview.verdicts(study)).to_numpy().tolist() == [
        ["A toy", said, "no runs in this profile"],
        ["Other", said, "not testable here: no time"],
    ]
    planned = plan("quick", ("toy",))
    for item in planned:
        put_record(store, item.settings, 0.7 if item.settings.method == "random" else 0.9)
    ours, theirs = (item.settings.run for item in planned[-2:])
    judged = overview.verdicts(study)
    row = judged.iloc[0]
    assert row[["n", "mean", "runs"]].tolist() == [1, pytest.approx(0.2), f"{ours} - {theirs}"]
    few = "not tested: fewer than eight seeds"
    assert overview.claims(judged).verdict[0] == few
    assert overview.claims(judged).claim[0] == said
    (shown,) = study.verdicts().to_dict("records")
    assert (shown["test"], shown["mean, over seeds"]) == ("description", "+20.00 points")


def test_what_each_class_pays(store, card_file, monkeypatch):
    """The magnitude net loses every image of class 3 and wins none; random has no bits."""
    card_file(CARD.replace("seeds = 1", "seeds = 2"))
    monkeypatch.setattr(overview, "OURS", ("magnitude", "random"))
    study = study_of(store)
    study.planned = plan("quick")
    labels = study.runner.load("digits").test.labels.numpy()
    for item in study.planned:
        put_record(store, item.settings, 0.9)
    assert overview.class_drops(study).empty
    read = store.read_all

    def read_all(settings):
        right = np.where(settings.method == "magnitude", labels != 3, True)
        bits = {"right": bits_of(right)} if settings.method != "random" else {}
        return [record | bits | {"metrics": {"images": len(labels)}} for record in read(settings)]

    monkeypatch.setattr(store, "read_all", read_all)
    drops = overview.class_drops(study)
    assert drops[["dataset", "method", "class"]].to_numpy().tolist() == [
        ["digits", "magnitude", k] for k in range(10)
    ]
    assert drops["drop"].tolist() == [0, 0, 0, -1, 0, 0, 0, 0, 0, 0]
    panel = drawings.classes(drops).axes[0]
    assert panel.images[0].get_array().tolist() == [[100 * x for x in drops["drop"]]]
    assert [text.get_text() for text in panel.get_xticklabels()] == [str(k) for k in range(10)]


# --- the card and its notebook


@pytest.mark.parametrize(("profile", "epochs"), [("quick", 16), ("cpu", 10), ("paper", 400)])
def test_all_that_is_compared_has_the_same_total_epochs(profile, epochs):
    planned = [p for p in plan(profile, ("overview",)) if p.purpose == "results"]
    compared = [p for p in planned if p.variant not in ("start", "half")]
    assert {p.settings.epochs for p in compared} == {epochs}
    assert {p.settings.method for p in compared} >= {*overview.OURS}


@pytest.mark.parametrize("profile", ["quick", "cpu", "cpu-long", "paper"])
def test_the_force_is_as_strong_as_its_own_card_has_it(profile):
    """In profile cpu at its earlier setting, as all but the weights there."""

    def strengths(paper):
        for item in plan(profile, (paper,)):
            s, earlier = item.settings, item.variant == "earlier setting"
            ours = item.purpose == "results" and item.variant in ("", "half")
            if s.method == "force" and (ours or earlier):
                yield s.model, s.params["strength"], s.params["layers"]

    assert set(strengths("overview")) <= set(strengths("force"))


def test_the_executed_overview_is_as_old_as_the_records_of_all(tmp_path):
    store = Store("quick", tmp_path)
    own = {item.settings.run for item in plan("quick", ("overview",))}
    others = (item.settings for item in plan("quick") if item.settings.run not in own)
    before = notebooks.stamp(store, "quick", "overview", [])
    put_record(store, next(others))
    after = notebooks.stamp(store, "quick", "overview", [])
    assert [name for name in before if before[name] != after[name]] == ["records"]


# --- figures


def test_the_front_holds_what_no_smaller_one_beats():
    rows = pd.DataFrame({"macs": [0.3, 0.1, 0.2, 0.4], "difference": [-0.1, -0.2, -0.3, 0.0]})
    assert drawings.frontier(rows, "macs").macs.tolist() == [0.1, 0.3, 0.4]
    level = pd.DataFrame({"macs": [0.1, 0.1, 0.2], "difference": [-0.2, -0.1, -0.1]})
    assert drawings.frontier(level, "macs").index.tolist() == [1]


def test_points_are_what_is_left_and_what_is_lost_with_their_targets(rows):
    figure = drawings.pareto(rows, "mnist")
    (first,) = figure.axes  # nothing was timed
    places = {c.get_label(): c[0].get_xydata().tolist() for c in first.containers}
    assert places["GDP (ours)"] == [[30, pytest.approx(-1)]]
    assert [*places] == ["gate variables (ours)", "GDP (ours)", "group L2, one shot"]
    assert [text.get_text() for text in first.texts] == ["90% w", "70% m", "70% m"]
    timed = drawings.pareto(rows.assign(time_b1=rows.macs), "mnist")
    assert [panel.get_xlabel() for panel in timed.axes] == [
        "time for one image, % of dense",
        "bytes on disk, % of dense",
    ]


def test_one_that_fails_is_shown_and_leaves_the_others_apart(rows):
    ours = rows.method == "gdp"
    panel = drawings.pareto(rows.assign(difference=rows.difference - 0.7 * ours), "mnist").axes[0]
    place = panel.transLimits.transform
    apart = place(panel.transScale.transform([[30, 0], [30, -5], [30, -71]]))[:, 1]
    assert 0 < apart[2] < apart[1] < apart[0] < 1
    assert apart[0] - apart[1] > 0.15


def test_the_picture_is_one_of_claims(three_cards):
    """A square for each net that a claim is tested on; one for a claim that is not."""
    shown = {
        ("toy", "better"): [
            "confirmed",
            "undecided",
            "",
            "not tested: the card names no strongest control yet",
        ],
        ("toy", "same"): ["contradicted"],
        ("other", "algebra"): ["", "by construction"],
        ("other", "few"): ["not tested: fewer than eight seeds"] * 3,
    }
    rows = [
        {"paper": paper, "claim": claim, "says": f"It is {claim}.", "verdict": verdict}
        for (paper, claim), found in shown.items()
        for verdict in found
    ]
    axes = drawings.verdicts(pd.DataFrame(rows)).axes[0]
    squares = [(c.get_offsets().tolist(), len(c.get_facecolors())) for c in axes.collections[:4]]
    assert squares == [([[0, 1], [1, 1]], 2), ([[0, 2]], 1), ([[0, 4]], 1), ([[0, 5]], 1)]
    texts = [(text.get_text(), *text.get_position()) for text in axes.texts]
    assert texts[:3] == [("A toy", 0, 0), ("It is better.", 2, 1), ("It is same.", 2, 2)]
    assert texts[3:] == [("Other", 0, 3), ("It is algebra.", 2, 4), ("It is few.", 2, 5)]
    told = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    words = ["confirmed", "undecided", "contradicted", "by construction", "not tested"]
    assert told == [f"{word}: 1" for word in words]
    dark = [to_hex(c.get_facecolors()[0]) for c in axes.collections[:4]]
    assert dark == ["#029e73", "#d55e00", "#7fb3d5", "#ececec"]


@pytest.mark.parametrize("name", ["Force", "GDP", "ComponentAware", "MagnitudeAttention"])
def test_what_is_left_of_a_layer_stands_where_it_was(name):
    """Put back in place, the weights give what the smaller net computes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    more = {"of": "macs", "layers": "2", "factorise": "2"} if name == "Force" else {}
    method = getattr(ps, name)(target=0.3, **more)
    result = ps.prune(net, method, [(x, y)], ps.Recipe(epochs=2, lr=0.01))
    left = {layer: overview.layer_left(result, layer) for layer in "024"}
    small = [p for p in result.model.parameters() if p.dim() > 1]
    if name == "Force":
        rank = len(small[1])
        assert left["2"].shape == (10 + rank, 8 + rank)
        product = left["2"][rank:, :rank] @ left["2"][:rank, rank:]
        assert np.allclose(product, (small[2] @ small[1]).detach(), atol=1e-6)
        return
    for part, weight in zip(left.values(), small, strict=True):
        assert np.isfinite(part).sum() == int(weight.count_nonzero())
    biases = [p.detach() for p in result.model.parameters() if p.dim() == 1]
    hidden, inner = x.double(), [np.nan_to_num(part) for part in left.values()]
    for weight, bias, part in zip(inner, biases, left.values(), strict=True):
        rows = ~np.isnan(part).all(1) if len(bias) < len(part) else np.ones(len(part), bool)
        whole = torch.zeros(len(part)).double()
        whole[torch.tensor(rows)] = bias.double()
        hidden = hidden @ torch.tensor(weight).double().T + whole
        hidden = hidden.relu() if len(part) > 3 else hidden
    assert torch.allclose(hidden.float(), result.model(x), atol=1e-5)


def test_the_five_ways_are_drawn_at_the_share_that_each_leaves():
    whole = np.ones((4, 4))
    half = np.where(np.eye(4) + np.eye(4)[::-1], whole, np.nan)
    figure = drawings.five_ways({"dense": whole, "gdp": half}, 0.5)
    assert [panel.get_title() for panel in figure.axes] == ["dense", "GDP: 50%"]
    again = drawings.five_ways({"dense": whole, "gdp": whole}, 1.0, figure)
    assert again is figure
    assert figure.axes[1].get_title() == "GDP: 100%"
    assert "keeps 100% of the net" in figure.get_suptitle()


def test_methods_that_a_profile_has_at_a_target_are_found():
    """A profile without a control draws the others (cpu-long has no hard concrete gates)."""
    study = Session("gdp", "quick")
    target = next(p.settings for p in study.planned if p.settings.method == "gdp").target.value
    found = study.found(("gdp", "l1"), target)
    assert found == {"gdp": study.find("gdp", target).run}
    with pytest.raises(InputError, match=f"run = l1 at {target}: not planned in quick"):
        study.find("l1", target)


def test_a_run_that_experiments_share_is_timed_once(runner, store, monkeypatch):
    settings = child_run("magnitude", 0.9)
    runner.ensure(settings)
    items = [Planned("toy", name, "results", settings) for name in ("one", "two")]
    timed = []
    monkeypatch.setattr(session, "_milliseconds", lambda _, s, rounds: timed.append(s.run) or {})
    assert session.measure_latency(store, items) == 1
    assert session.measure_latency(store, items) == 0
    assert timed == [settings.run]
