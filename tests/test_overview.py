"""The five side by side: costs, sentences and claims follow from the rows, whatever they say."""

import math

import pandas as pd
import pytest
from conftest import CARD, child_run, one_line, put_record
from matplotlib import pyplot as plt

from prunestudy import papers
from prunestudy.errors import InputError
from prunestudy.study import notebooks, overview, session
from prunestudy.study.figures import overview as drawings
from prunestudy.study.plan import Planned, plan
from prunestudy.study.records import Store
from prunestudy.study.session import Session, state_of
from prunestudy.study.tables import RUN_COLUMNS

T1 = 12.706204736174698  # the 97.5% point of t with one degree


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def run(method, seed, metric, dense=0.9, kind="", target=math.nan, variant="", **more):
    """A row of runs.csv: a net of 1000 parameters and MACs, trained in ten seconds."""
    name = f"{method}-{variant}-{kind}-{target}-{seed}"
    row = {"run": name, "parent": "", "paper": "overview", "method": method, "variant": variant}
    row |= {"model": "lenet5", "dataset": "mnist", "seed": seed, "epochs": 10, "status": "done"}
    row |= {"reading": "", "stage": "", "after": "", "device": "cpu"}
    row |= {"precision": "fp32", "threads": 1, "target_kind": kind, "target": target}
    row |= {"metric_name": "top1", "metric": metric, "dense_metric": dense}
    row |= {"nonzeros": 1000, "macs": 1000, "nonzero_macs": 1000, "bytes": 4000}
    row |= {"dense_parameters": 1000, "dense_macs": 1000, "peak_memory_mb": 2.0}
    return row | {"train_seconds": 10.0} | more


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
            run("gdp", seed, 0.89 + up, 0.9 + up, **aim, **small(0.3), train_seconds=12.0),
            run("group_l2", seed, 0.87 + up, 0.9 + up, **aim, **small(0.29), train_seconds=5.0),
            run("scratch", seed, 0.88 + 2 * up, 0.9 + up, **aim, **small(0.3), train_seconds=8.0)
            | {"parent": f"gdp--macs-0.7-{seed}"},
            run("sparse_gates", seed, 0.9, 0.9 + up, "sparsity", 0.9, nonzeros=100),
            run("gdp", seed, 0.5, math.nan, "macs", 0.5, "half", epochs=8, train_seconds=6.0)
            | {"stage": "half"},
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


def test_training_counts_what_had_to_be_trained_before(runs, rows):
    assert row_of(rows, "gdp").training == 1.2
    assert row_of(rows, "scratch").training == 2.0  # the shape's search and its own
    assert row_of(rows, "sparse_gates", combined=True).training == pytest.approx(1.6)
    runs.loc[(runs.method == "gdp") & (runs.seed == 1), "train_seconds"] = 22.0
    assert row_of(overview.settings_table(runs), "gdp").training == pytest.approx(1.7)


def test_what_did_not_finish_is_left_out(runs):
    runs.loc[runs.method == "gdp", "status"] = "diverged"
    assert "gdp" not in set(overview.settings_table(runs).method)
    with pytest.raises(InputError) as caught:
        overview.settings_table(runs.assign(status="diverged"))
    assert one_line(caught) == "overview: no run is done yet"


def test_the_readable_table_leaves_empty_what_was_not_measured(rows):
    line = overview.readable(rows).set_index("setting").loc["GDP (ours), 70% of MACs removed"]
    assert line["minus dense"] == "-1.00 [-1.00, -1.00]"
    assert [line[f"{words}, %"] for words in ("weights", "training time")] == ["30", "120"]
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
        assert best.loc["MACs", "setting"] == expected
    best = overview.which_when(rows, -0.02).set_index("to save")
    assert best.loc["MACs", ["minus dense", "n", "MACs, %"]].tolist() == [
        "-1.00 [-1.00, -1.00]",
        2,
        "30",
    ]
    assert len(best) == 6  # nothing was timed
    assert overview.which_when(rows, 0.5).empty


def test_every_duel_is_fought_once_and_judged_by_the_rule(store, card_file):
    """Gates meet MAP once; each meets the controls, of which one is the strongest."""
    names = ["dense", "sparse_gates", "magnitude_attention", "gradual_magnitude", "random"]
    entries = ", ".join(f'{{ method = "{name}" }}' for name in names)
    text = CARD[: CARD.index("methods = [{")] + f"methods = [{entries}]"
    card_file(text.replace("seeds = 1", "seeds = 2"))
    scores = dict(zip(names, (0.9, 0.8, 0.7, 0.85, 0.1), strict=True))
    for item in plan("quick"):
        method, seed = item.settings.method, item.settings.seed
        put_record(store, item.settings, scores[method] + seed * (0.2 if method == "random" else 0))
    duels = overview.duels(store, plan("quick"))
    assert duels[["rule", "strongest", "n", "verdict"]].to_numpy().tolist() == [
        [f"{ours} - {theirs} of metric >= 0", strongest, 2, verdict]
        for ours, theirs, strongest, verdict in (
            ("sparse_gates", "gradual_magnitude", "strongest", "contradicted"),
            ("sparse_gates", "magnitude_attention", "", "confirmed"),
            ("sparse_gates", "random", "", "undecided"),
            ("magnitude_attention", "gradual_magnitude", "strongest", "contradicted"),
            ("magnitude_attention", "random", "", "undecided"),
        )
    ]
    assert duels.method.tolist() == ["sparse_gates"] * 3 + ["magnitude_attention"] * 2
    assert duels.difference[1] == "+0.1000 [+0.1000, +0.1000]"


def test_a_pair_is_beside_the_best_single_one_of_its_size(rows):
    pair, single = "gate variables (ours), after GDP, 80% of weights removed", rows[~rows.combined]
    assert overview.combinations(rows).label.tolist() == [
        pair,
        "gate variables (ours), 90% of weights removed",
    ]
    by_macs = rows.assign(target_kind=rows.target_kind.mask(rows.combined, "macs"))
    assert overview.combinations(by_macs).method.tolist() == ["sparse_gates", "gdp"]
    tiny = by_macs.assign(macs=by_macs.macs.mask(by_macs.combined, 0.1))
    assert overview.combinations(tiny).label.tolist() == [pair]
    assert overview.combinations(single).empty


# --- claims


def study_of(store):
    """A session of a paper in profile quick, whose records are those of `store`."""
    session = Session("toy", "quick", device="cpu")
    session.store = store
    return session


def test_every_claim_of_every_paper_with_its_record(store, card_file):
    """A dense start, dense, magnitude and random; a second paper has no runs in this profile."""
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

    said = "Magnitude is better than chance. [O]"
    nothing = overview.claims(study_of(store))
    assert nothing[["paper", "claim", "rule", "verdict", "record"]].to_numpy().tolist() == [
        ["A toy", said, "magnitude - random of metric >= 0", "no runs in this profile", ""],
        ["Other", said, "no time", "not testable here", ""],
    ]
    planned = plan("quick", ("toy",))
    for item in planned:
        put_record(store, item.settings, 0.7 if item.settings.method == "random" else 0.9)
    ours, theirs = (item.settings.run for item in planned[-2:])
    row = overview.claims(study_of(store)).iloc[0]
    assert row[["n", "difference", "record"]].tolist() == [1, "+0.2000", f"{ours} - {theirs}"]


def test_a_claim_with_several_tests_is_said_once(store, card_file):
    card_file(CARD.replace('against = ["random"]', 'against = ["random", "dense"]'))
    for item in plan("quick"):
        put_record(store, item.settings)
    found = overview.claims(study_of(store))
    assert found.claim.tolist() == ["Magnitude is better than chance. [O]", ""]
    assert found.verdict.tolist() == ["undecided"] * 2


# --- the card and its notebook


@pytest.mark.parametrize(("profile", "epochs"), [("quick", 16), ("cpu", 10), ("paper", 400)])
def test_all_that_is_compared_has_the_same_total_epochs(profile, epochs):
    planned = [p for p in plan(profile, ("overview",)) if p.purpose == "results"]
    compared = [p for p in planned if p.variant not in ("start", "half")]
    assert {p.settings.epochs for p in compared} == {epochs}
    assert {p.settings.method for p in compared} >= {*overview.DUELS, *overview.DUELS.values()}


@pytest.mark.parametrize("profile", ["quick", "cpu", "cpu-long", "paper"])
def test_the_force_is_as_strong_as_its_own_card_has_it(profile):
    def strengths(paper):
        for item in plan(profile, (paper,)):
            s = item.settings
            if s.method == "force" and item.purpose == "results" and item.variant in ("", "half"):
                yield s.model, s.params["strength"], s.params["layers"]

    assert set(strengths("overview")) <= set(strengths("force"))


def test_the_executed_overview_is_as_old_as_the_records_of_all(tmp_path):
    store = Store("quick", tmp_path)
    state = notebooks.stamp(store, "quick", "overview", [])["records"]
    assert state == state_of(store, plan("quick"))
    assert state != state_of(store, plan("quick", ("overview",)))


# --- figures


def test_the_front_holds_what_no_smaller_one_beats():
    rows = pd.DataFrame({"macs": [0.3, 0.1, 0.2, 0.4], "difference": [-0.1, -0.2, -0.3, 0.0]})
    assert drawings.frontier(rows, "macs").macs.tolist() == [0.1, 0.3, 0.4]
    level = pd.DataFrame({"macs": [0.1, 0.1, 0.2], "difference": [-0.2, -0.1, -0.1]})
    assert drawings.frontier(level, "macs").index.tolist() == [1]


def test_points_are_what_is_left_and_what_is_lost(rows):
    figure = drawings.pareto(rows, "mnist")
    first = figure.axes[0]
    places = {c.get_label(): c[0].get_xydata().tolist() for c in first.containers}
    assert places["GDP (ours)"] == [[30, pytest.approx(-1)]]
    assert len(places) == 4  # combinations and dense are no points
    assert [len(panel.containers) for panel in figure.axes] == [4, 4, 0, 0, 4, 4]


def test_one_that_fails_is_shown_and_leaves_the_others_apart(rows):
    ours = rows.method == "gdp"
    panel = drawings.pareto(rows.assign(difference=rows.difference - 0.7 * ours), "mnist").axes[0]
    place = panel.transLimits.transform
    apart = place(panel.transScale.transform([[30, 0], [30, -5], [30, -71]]))[:, 1]
    assert 0 < apart[2] < apart[1] < apart[0] < 1
    assert apart[0] - apart[1] > 0.15


def test_verdicts_are_counted():
    claims = pd.DataFrame(
        {"paper": ["A", "A", "B"], "verdict": ["confirmed", "undecided", "confirmed"]}
    )
    axes = drawings.verdicts(claims).axes[0]
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[1, 1], [0, 1]]  # of B and A
    assert [text.get_text() for text in axes.texts] == ["1 / 0", "1 / 1"]


def test_methods_that_a_profile_has_at_a_target_are_found():
    """A profile without a control draws the others (cpu-long has no hard concrete gates)."""
    study = Session("gdp", "quick")
    target = next(p.settings for p in study.planned if p.settings.method == "gdp").target.value
    found = study.found(("gdp", "l1"), target)
    assert found == {"gdp": study.find("gdp", target).run}
    with pytest.raises(InputError, match=f"run = l1 at {target}, seed 0: not planned in quick"):
        study.find("l1", target)


def test_a_run_that_experiments_share_is_timed_once(runner, store, monkeypatch):
    settings = child_run("magnitude", 0.9)
    runner.ensure(settings)
    items = [Planned("toy", name, "results", "", settings) for name in ("one", "two")]
    timed = []
    monkeypatch.setattr(session, "_milliseconds", lambda _, s, rounds: timed.append(s.run) or {})
    assert session.measure_latency(store, items) == 1
    assert session.measure_latency(store, items) == 0
    assert timed == [settings.run]
