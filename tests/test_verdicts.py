"""Verdicts on made-up records: what is tested, what counts, and how often chance confirms."""

import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CARD, child_run, compared, put_record
from scipy import stats

from prunestudy import datasets, papers, places
from prunestudy.study import provenance, tables, verdicts
from prunestudy.study.lines import bits_of, right_of
from prunestudy.study.plan import plan
from prunestudy.study.select import SEEDS
from prunestudy.study.statistics import (
    ALPHA,
    decided,
    drawn,
    holm,
    one_sided,
)

NEW = CARD.replace("seeds = 1", "seeds = 8\n    first_seed = 10")
# A claim "CLAIM", tested against the control of that name.
ONE_MORE = """
    [[claims]]
    id = "CLAIM"
    text = "t"
    mark = "P"
    place = "p"
    tests = [{ kind = "superiority", method = "magnitude", against = "CLAIM" }]

    """
NOISE = np.array([0.03, -0.01, 0.02, -0.02, 0.01, -0.03, 0.0, 0.04]) / 10


@pytest.fixture
def old_rules(monkeypatch):
    """Every rule is older than every run."""
    monkeypatch.setattr(verdicts, "rules_commit", lambda *_: "0" * 40)
    monkeypatch.setattr(verdicts, "is_before", lambda *_: True)


@pytest.fixture
def judge(store, card_file, old_rules):
    """The rows of the card `text`, with `ours` and `theirs` by seed as metrics (None: diverged).

    Other methods have 0.8; those in `fails` diverge. Data sets without `only` have no records.
    """
    store.folder = store.folder.with_name("quick")

    def made(ours, theirs=(0.8,) * 8, text=NEW, only="", fails=(), **more):
        card_file(text)
        for item in (item for item in plan("quick") if only in item.settings.dataset):
            s, level = item.settings, None if item.settings.method in fails else 0.8
            scores = {"magnitude": ours, "random": theirs}.get(s.method, (level,) * 8)
            put_record(store, s, scores[(s.seed - 10) % 8], **more)
        return verdicts.verdicts_table(store, plan("quick"), papers.card("toy"))

    return made


def outcome(table):
    """The verdict of the only row."""
    (verdict,) = table.verdict
    return verdict


# --- the test


def test_p_values_are_those_of_the_paired_t_test():
    d = np.random.default_rng(0).normal(0.3, 1, (5, 8))
    above, below = one_sided(d)
    assert above == pytest.approx(stats.ttest_1samp(d, 0, axis=1, alternative="greater").pvalue)
    assert below == pytest.approx(stats.ttest_1samp(d, 0, axis=1, alternative="less").pvalue)
    assert np.isnan(one_sided(np.ones(8))).all()
    assert np.isnan(one_sided(np.ones((3, 1)))).all()


def test_holm_by_hand():
    # 0.01 x 3; then 0.02 x 2 = 0.04; then 0.03, which may not be below it
    assert holm(np.array([0.03, 0.01, 0.02])) == pytest.approx([0.04, 0.03, 0.04])
    assert holm(np.array([0.6, 0.4])) == pytest.approx([0.8, 0.8])
    # a test that was not made still counts
    assert holm(np.array([0.01, np.nan, 0.5])) == pytest.approx([0.03, np.nan, 1], nan_ok=True)


def confirmed_by_chance(mean, margin):
    """Share of 1,000 profiles of eight tests of which any is confirmed; differences have sd 1."""
    d = np.random.default_rng(5).normal(mean, 1, (1000, 8, len(SEEDS)))
    outcomes = decided(*map(holm, one_sided(d + margin)))
    return (outcomes == "confirmed").any(1).mean()


@pytest.mark.parametrize(("mean", "margin"), [(0, 0), (-0.7, 0.7)])
def test_equal_methods_and_one_at_the_margin_are_seldom_confirmed(mean, margin):
    """Family-wise at most 5%, here within two standard errors, and no less than a Holm test."""
    assert 0.03 < confirmed_by_chance(mean, margin) <= 0.064


@pytest.mark.parametrize("effect", [0.8, 1.2, 2.0])
def test_a_known_difference_is_found_as_often_as_eight_seeds_find_it(effect):
    """One of eight methods differs by `effect` deviations: the power of a t-test at ALPHA / 8."""
    n, draws = len(SEEDS), 4000
    d = np.random.default_rng(6).normal(0, 1, (draws, 8, n))
    d[:, 0] += effect
    found = (decided(*map(holm, one_sided(d)))[:, 0] == "confirmed").mean()
    bound = stats.t.isf(ALPHA / 8, n - 1)
    power = stats.nct.sf(bound, n - 1, effect * np.sqrt(n))
    # Holm asks for a little less where chance has confirmed another.
    assert power - 0.025 < found < power + 0.035


# --- from records


def test_a_difference_is_confirmed_and_its_opposite_contradicted(judge):
    table = judge(0.85 + NOISE)
    (row,) = table.to_dict("records")
    p = stats.ttest_1samp(0.05 + NOISE, 0, alternative="greater").pvalue
    assert (row["kind"], row["verdict"], row["n"]) == ("superiority", "confirmed", 8)
    assert (row["model"], row["dataset"], row["targets"]) == ("lenet300", "digits", "sparsity 0.9")
    assert (row["method"], row["control"], row["chosen_by"]) == ("magnitude", "random", "claim")
    assert [row["mean"], row["p"], row["p_adjusted"]] == pytest.approx([0.05 + NOISE.mean(), p, p])
    assert row["p_opposite"] == pytest.approx(1 - p)
    ours, theirs = (
        next(s.settings.run for s in plan("quick") if (s.settings.method, s.settings.seed) == key)
        for key in (("magnitude", 10), ("random", 10))
    )
    assert row["runs"] == f"{ours} - {theirs}"
    assert outcome(judge(0.75 + NOISE)) == "contradicted"
    assert outcome(judge(0.8 + NOISE - NOISE.mean())) == "undecided"


@pytest.mark.parametrize(
    ("first", "count", "seed"), [(10, 8, 10), (20, 8, 20), (10, 18, 10), (12, 8, 0), (0, 9, 0)]
)
def test_a_verdict_is_made_on_the_first_eight_seeds_or_the_second(judge, first, count, seed):
    text = CARD.replace("seeds = 1", f"seeds = {count}\n    first_seed = {first}")
    (row,) = judge(0.85 + NOISE, text=text).to_dict("records")
    if not seed:
        assert (row["verdict"], row["n"]) == ("not tested: fewer than eight seeds", count)
        return
    assert (row["verdict"], row["n"]) == ("confirmed", 8)
    ours = {s.settings.run: s.settings.seed for s in plan("quick")}
    assert ours[row["runs"].partition(" - ")[0]] == seed


def test_columns_of_the_file(store, judge):
    table = judge(0.85 + NOISE)
    assert list(tables.verdicts(store, plan("quick")).columns) == (
        "paper,claim,kind,model,dataset,method,control,chosen_by,targets,n,mean,low,high,p,"
        "p_adjusted,p_opposite,p_opposite_adjusted,verdict,runs"
    ).split(",")
    (row,) = tables.readable_verdicts(table).to_dict("records")
    assert row["compared"] == "one-shot magnitude - random"
    assert row["where"] == "LeNet-300-100 on Digits"
    assert row["mean, over seeds"].startswith("+5.05 [")
    assert not {"over seeds and images", "failures"} & row.keys()  # nothing stands there


@pytest.mark.parametrize(
    ("dataset", "name", "loss", "verdict"),
    [
        ("mnist", "top1", 0.001, "undecided"),
        ("mnist", "top1", 0.0, "confirmed"),
        ("mnist", "top1", 0.002, "contradicted"),
        ("mnist", "psnr", 0.1, "confirmed"),
        ("mnist", "psnr", 0.3, "contradicted"),
        ("digits", "top1", 0.0, "not tested: no margin for this data set"),
    ],
)
def test_non_inferiority_is_within_one_margin_for_all_papers(judge, dataset, name, loss, verdict):
    text = NEW.replace('kind = "superiority"', 'kind = "non_inferiority"')
    ours = 0.8 - loss + (NOISE - NOISE.mean()) / 10
    table = judge(ours, text=text.replace('dataset = "digits"', f'dataset = "{dataset}"'))
    if name == "psnr":
        table = judge(ours, text=text.replace('"digits"', f'"{dataset}"'), metric_name="psnr")
    assert outcome(table) == verdict


def test_a_seed_is_the_mean_over_all_targets(judge, store):
    text = NEW.replace("[0.9]", "[0.9, 0.8]")
    judge(0.85 + NOISE, text=text)
    half = next(p.settings for p in plan("quick") if p.settings.method == "magnitude")
    put_record(store, half, 0.95)
    table = verdicts.verdicts_table(store, plan("quick"), papers.card("toy"))
    assert (table.n[0], table.targets[0]) == (8, "sparsity 0.8 0.9")
    scores = 0.05 + NOISE
    scores[0] = (scores[0] + 0.15) / 2
    assert table["mean"][0] == pytest.approx(scores.mean())


@pytest.mark.parametrize(
    ("seeds", "n"),
    [("seeds = 7\n    first_seed = 10", 7), ("seeds = 8", 8), ("seeds = 1", 1)],
)
def test_with_fewer_seeds_or_used_ones_there_is_no_verdict(judge, store, seeds, n):
    text = CARD.replace("seeds = 1", seeds)
    judge(0.85 + NOISE, text=text)
    (row,) = verdicts.verdicts_table(store, plan("quick"), papers.card("toy")).to_dict("records")
    assert (row["kind"], row["n"]) == ("description", n)
    assert row["verdict"] == "not tested: fewer than eight seeds"
    assert np.isnan([row["p"], row["p_adjusted"], row["p_opposite"]]).all()
    assert np.isfinite(row["mean"])


def test_a_planned_test_that_cannot_be_made_counts_in_the_family(judge):
    """Three tests; then one has a control that fails, and of another data set nothing is here."""
    more = "".join(ONE_MORE.replace("CLAIM", name) for name in ("dense", "l1"))
    text = NEW.replace("    [profiles.quick]", f"{more}\n    [profiles.quick]")
    text = text.replace('{ method = "random" }]', '{ method = "random" }, { method = "l1" }]')
    again = text[text.index("    [[profiles.quick.experiments]]") :].replace('"digits"', '"mnist"')
    here = judge(0.85 + NOISE, text=text)
    there = judge(0.85 + NOISE, text=text + again, only="digits", fails=["l1"])
    assert here.p_adjusted.tolist() == pytest.approx([3 * p for p in here.p])
    made = there[(there.dataset == "digits") & (there.control != "l1")]
    assert made.p.tolist() == pytest.approx(here.p[:2].tolist())
    assert made.p_adjusted.tolist() == pytest.approx([3 * p for p in made.p])
    assert set(there[there.control == "l1"].verdict) == {
        "not tested: the control fails",
        "no runs in this profile",
    }


def test_a_claim_whose_test_has_too_few_seeds_counts_in_the_family(judge):
    text = NEW.replace(
        "    [profiles.quick]", f"{ONE_MORE.replace('CLAIM', 'l1')}\n    [profiles.quick]"
    )
    text = text.replace(
        '{ method = "random" }]', '{ method = "random" }, { method = "l1", seeds = 3 }]'
    )
    table = judge(0.85 + NOISE, text=text).set_index("claim")
    assert table.n["l1"] == 3
    assert table.verdict["l1"] == "not tested: fewer than eight seeds"
    (name,) = set(table.index) - {"l1"}
    assert table.p_adjusted[name] == pytest.approx(2 * table.p[name])


def test_a_seed_that_is_not_run_yet_leaves_a_description(judge, store):
    judge(0.85 + NOISE)
    lost = next(p.settings for p in plan("quick") if p.settings.method == "magnitude")
    (store.path(lost.run) / "record.json").unlink()
    (row,) = verdicts.verdicts_table(store, plan("quick"), papers.card("toy")).to_dict("records")
    assert (row["kind"], row["n"]) == ("description", 7)


def test_what_is_equal_by_algebra_is_said_to_be(judge):
    for ours in ((0.8,) * 8, (0.85,) * 8):
        (row,) = judge(ours).to_dict("records")
        assert (row["kind"], row["verdict"]) == ("by_construction", "by construction")
        assert np.isnan([row["p"], row["p_adjusted"], row["p_opposite"]]).all()
    rule = '    kind = "by_construction"\n    method = "magnitude"\n    why = "a test shows it"\n'
    a, b = NEW.index('    kind = "superiority"'), NEW.index("    [profiles.quick]")
    table = judge(0.85 + NOISE, text=NEW[:a] + rule + NEW[b:])
    assert (outcome(table), table.kind[0], table.n[0]) == ("by construction", "by_construction", 0)
    claims = verdicts.claims_table(table)
    assert claims.verdict.tolist() == ["by construction: a test shows it"]


# --- failures


def with_lost(scores, lost, value=None):
    """The scores with runs that diverge (None), or end at `value`, at the places `lost`."""
    return [value if i in lost else float(score) for i, score in enumerate(scores)]


@pytest.mark.parametrize("value", [None, 0.19])
def test_a_seed_that_fails_never_helps(judge, value):
    """Diverged, or below twice chance: 0.2 with ten classes."""
    good, bad, level = 0.85 + NOISE, 0.75 + NOISE, 0.8 + NOISE - NOISE.mean()
    for scores, lost, verdict in (
        (good, [], "confirmed"),
        (good, [3], "undecided"),
        (good, [3, 4], "undecided"),
        (good, [3, 4, 5], "contradicted"),
        (good, range(8), "contradicted"),
        (bad, [3], "contradicted"),
        (level, [3], "undecided"),
    ):
        table = judge(with_lost(scores, lost, value))
        assert outcome(table) == verdict
        assert table.n[0] == 8 - len(lost)
        seeds = ", ".join(str(10 + place) for place in lost)
        told = f"one-shot magnitude fails on seed{'s' * (len(lost) > 1)} {seeds}" if lost else ""
        assert table.failures[0] == told
    # just above twice chance a run counts, and badly
    assert judge(with_lost(good, [3], 0.21)).n[0] == 8


def test_nothing_is_won_against_a_control_that_fails(judge):
    for scores in (0.85 + NOISE, 0.75 + NOISE):
        (row,) = judge(scores, with_lost([0.8] * 8, [0, 2])).to_dict("records")
        assert (row["verdict"], row["n"]) == ("not tested: the control fails", 6)
        assert row["failures"] == "random fails on seeds 10, 12"
        assert np.isnan(row["p"])
    # one that fails too does not save ours
    both = judge(with_lost(0.85 + NOISE, [1, 2, 3]), with_lost([0.8] * 8, [0]))
    assert outcome(both) == "contradicted"


def test_a_run_that_came_apart_fails():
    record = {"status": "came_apart", "validation": {"top1": 0.9}, "settings": {"dataset": "mnist"}}
    assert verdicts.fails(record)
    assert not verdicts.fails(record | {"status": "done"})
    psnr = {"validation": {"psnr": 0.1}, "status": "done"}
    assert not verdicts.fails(record | psnr)


# --- controls and devices


STRONGEST = 'against = "strongest"\n    controls = ["random", "l1"]'


def test_without_a_chosen_control_all_are_described(judge):
    text = NEW.replace('against = "random"', STRONGEST)
    text = text.replace('{ method = "random" }', '{ method = "random" }, { method = "l1" }')
    table = judge(0.85 + NOISE, text=text)
    assert table.control.tolist() == ["random", "l1"]
    assert set(table.verdict) == {"not tested: the card names no strongest control yet"}
    row = '{ profile = "quick", model = "lenet300", dataset = "digits", target_kind = "sparsity",'
    named = f'    strongest = [{row} control = "l1" }}]\n    published'
    table = judge(0.85 + NOISE, text=text.replace("    published", named))
    assert (table.control.tolist(), outcome(table)) == (["l1"], "confirmed")
    assert table.chosen_by.tolist() == ["search"]


def test_a_reading_of_ours_is_never_a_control(judge):
    """Its runs are there, and better; the control is the one that the card names."""
    entry = '{ method = "magnitude", variant = "other", lr = 0.1 }, { method = "random" }'
    text = NEW.replace('{ method = "random" }', entry)
    table = judge(0.85 + NOISE, text=text.replace('against = "random"', STRONGEST))
    assert set(table.control) == {"random"}
    for card in papers.cards():
        for rule in (rule for claim in card.claims for rule in claim.tests):
            own = rule.method.partition(",")[0]
            assert own not in {label.partition(",")[0] for label in rule.controls}


def test_runs_of_different_devices_are_never_paired(store, card_file, monkeypatch):
    """A row is of the device that has most seeds; a seed with one side alone on it is none."""
    devices = {"magnitude": ["cpu", "cuda"], "random": ["cpu", "cuda", "mps"]}

    def read_all(settings):
        names = devices[settings.method]
        names = names[settings.seed :] if settings.method == "random" else names
        same = {"settings": settings.model_dump(), "metrics": {"metric": 0.5}}
        return [same | {"environment": {"device": name}} for name in names]

    card_file(CARD.replace("seeds = 1", "seeds = 3"))
    monkeypatch.setattr(store, "read_all", read_all)
    (found,) = compared(papers.card("toy"), plan("quick"))
    pairs = {
        seed: [[record["environment"]["device"] for record in pair] for pair in pairs]
        for seed, pairs in verdicts.observed(store, found).items()
    }
    assert pairs == {0: [["cuda"] * 2], 1: [["cuda"] * 2]}
    devices["random"] = ["cpu", "mps", "cuda"]
    assert list(verdicts.observed(store, found)) == [0, 1, 2]
    devices["magnitude"] = ["mps"]
    assert list(verdicts.observed(store, found)) == [0, 1]


@pytest.mark.parametrize(("ours", "n"), [(0.85, 0), (0.8995, 8), (0.95, 8), (0.898, 0)])
def test_pairs_count_where_ours_removed_as_much(judge, store, ours, n):
    text = NEW.replace('against = "random"', 'against = "random"\n    within = 0.001')
    judge(0.85 + NOISE, text=text)
    for item in plan("quick"):
        if item.settings.method == "magnitude":
            put_record(store, item.settings, 0.9, sparsity=ours)
    (row,) = verdicts.verdicts_table(store, plan("quick"), papers.card("toy")).to_dict("records")
    assert row["n"] == n
    assert n or row["verdict"] == "not tested: ours is larger on some seeds"


@pytest.mark.parametrize(("at_least", "verdict"), [(0.8, "confirmed"), (0.9, "contradicted")])
def test_a_claim_on_a_value_itself(judge, at_least, verdict):
    table = judge(0.85 + NOISE, text=NEW.replace('against = "random"', f"at_least = {at_least}"))
    assert (outcome(table), table.control[0], table.chosen_by[0]) == (verdict, "", "")
    assert table["mean"][0] == pytest.approx(0.85 + NOISE.mean())


# --- rules and their age


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A git repository; commit the card in it with this text, and return the commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")

    def commit(text):
        (folder / "toy.toml").write_text(text)
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "x", "--allow-empty")
        return git(folder, "rev-parse", "HEAD")

    commit.folder, commit.card = folder, folder / "toy.toml"
    return commit


def test_the_last_commit_that_changed_the_rules(repository):
    folder, card = repository.folder, repository.card
    first = repository(CARD.replace('against = "random"', 'against = "dense"'))
    changed = repository(CARD)
    later = repository(CARD.replace("epochs = 1", "epochs = 2").replace("better than", "above"))
    assert provenance.rules_commit(folder, card, "quick", "lenet300", "digits") == changed
    before = [provenance.is_before(folder, changed, c) for c in (first, changed, later)]
    assert before == [False, True, True]
    assert provenance.is_before(folder, changed, f"{later}-dirty")
    unknown = ("unknown", "", "0" * 40)
    assert {provenance.is_before(folder, changed, commit) for commit in unknown} == {None}
    shallow = folder.with_name("shallow")
    git(folder, "clone", "-q", "--depth=1", f"file://{folder}", str(shallow))
    for place in (shallow, folder.parent, folder / "nowhere"):
        assert provenance.is_before(place, changed, later) is None
    # what is not committed is younger than everything
    card.write_text(CARD.replace('against = "random"', 'against = "l1"'))
    assert provenance.rules_commit(folder, card, "quick", "lenet300", "digits") == ""
    assert provenance.is_before(folder, "", later) is False


def test_outside_git_nothing_is_known(tmp_path, repository):
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "toy.toml").write_text(CARD)
    place = "quick", "lenet300", "digits"
    assert provenance.rules_commit(other, other / "toy.toml", *place) == ""
    assert provenance.rules_commit(repository.folder, other / "toy.toml", *place) == ""


def test_runs_that_are_older_than_the_rule_give_no_verdict(store, judge, repository, monkeypatch):
    first = repository(CARD.replace('against = "random"', 'against = "dense"'))
    changed = repository(NEW)
    monkeypatch.setattr(verdicts, "rules_commit", provenance.rules_commit)
    monkeypatch.setattr(verdicts, "is_before", provenance.is_before)
    monkeypatch.setattr(verdicts, "path_of", lambda _: repository.card)
    monkeypatch.setattr(places, "checkout", lambda: repository.folder)
    judge(0.85 + NOISE)
    read = store.read_all

    def made_at(commit):
        def read_all(settings):
            own = first if commit == "mixed" and settings.seed == 13 else commit
            own = changed if own == "mixed" else own
            return [r | {"environment": r["environment"] | {"commit": own}} for r in read(settings)]

        monkeypatch.setattr(store, "read_all", read_all)
        (row,) = verdicts.verdicts_table(store, plan("quick"), papers.card("toy")).to_dict(
            "records"
        )
        return row

    assert made_at(changed)["verdict"] == "confirmed"
    for commit in (first, "mixed", "unknown"):
        row = made_at(commit)
        verdict = verdicts.NO_AGE if commit == "unknown" else "rule younger than its runs"
        assert (row["verdict"], row["n"]) == (verdict, 8)
        assert np.isnan([row["p"], row["p_adjusted"], row["p_opposite_adjusted"]]).all()
    monkeypatch.setattr(places, "checkout", lambda: None)
    assert made_at(changed)["verdict"] == verdicts.NO_AGE == verdict


# --- claims


def test_one_line_a_claim(judge, card_file, store):
    more = """
    [[claims.tests]]
    kind = "description"
    method = "magnitude"
    against = "dense"

    [[claims]]
    id = "never"
    text = "t"
    mark = "P"
    place = "p"
    not_testable = "because"

    [[claims]]
    id = "said"
    text = "u"
    mark = "P"
    place = "p"
    tests = [{ kind = "description", method = "magnitude", against = "random" }]

    [[claims]]
    id = "absent"
    text = "v"
    mark = "P"
    place = "p"
    tests = [{ kind = "superiority", method = "magnitude", against = "snip" }]

    [profiles.quick]
    """
    table = judge(0.85 + NOISE, text=NEW.replace("    [profiles.quick]\n", more))
    assert table.verdict.tolist() == [
        *("confirmed", "", "not testable here", ""),
        "no runs in this profile",
    ]
    claims = verdicts.claims_table(table)
    assert claims.claim.tolist() == ["better", "never", "said", "absent"]
    assert claims.text[0] == "Magnitude is better than chance. [O]"
    assert claims.verdict.tolist() == [
        "confirmed on 1 of 1 net",
        "not testable here: because",
        "described, not tested",
        "no runs in this profile",
    ]


def test_verdicts_of_several_nets_are_counted():
    outcomes = ["confirmed", "contradicted", "confirmed", "not tested: fewer than eight seeds"]
    same = {"paper": "p", "claim": "c", "says": "s", "mark": "P", "why": ""}
    table = pd.DataFrame([same | {"verdict": verdict} for verdict in outcomes])
    (row,) = verdicts.claims_table(table).to_dict("records")
    assert row["verdict"] == "confirmed on 2, contradicted on 1 of 3 nets"
    (row,) = verdicts.claims_table(table[3:]).to_dict("records")
    assert row["verdict"] == "not tested: fewer than eight seeds"


# --- which images were right


def test_bits_come_back():
    right = np.random.default_rng(0).random(1003) < 0.97
    record = {"right": bits_of(right), "metrics": {"images": 1003}}
    assert right_of(record).tolist() == right.tolist()
    assert right_of({"metrics": {"images": 3}}) is None
    assert len(bits_of(np.random.default_rng(0).random(10_000) < 0.99)) < 1000


def test_a_new_record_says_which_test_images_were_right(runner):
    """As many as the accuracy has; the same that the finished net is right on, in order."""
    settings = child_run("magnitude", 0.5, epochs=3, lr=0.2)
    record = runner.ensure(settings)
    right = right_of(record)
    assert len(right) == record["metrics"]["images"]
    assert right.mean() == pytest.approx(record["metrics"]["metric"])
    assert 0.2 < right.mean() < 1
    data = runner.load("digits")
    batches = datasets.batches_of(data.test, data.info, len(data.test))
    net = runner.net(settings).eval()
    with torch.inference_mode():
        own = torch.cat([net(x).argmax(1) == y for x, y in batches.ordered(100)])
    assert own.tolist() == right.tolist()
    # Validation images are seen in searches, which are judged on nothing else.
    assert "right" not in runner.ensure(settings.model_copy(update={"evaluate": "validation"}))


def test_the_interval_over_seeds_and_images():
    """Of independent noise the variances of both add up; images alone where seeds agree."""
    generator = np.random.default_rng(0)
    images = (generator.random(5000) < 0.04) * generator.choice([-1.0, 1.0], 5000)
    low, high = drawn(np.tile(images, (8, 1)))
    half = 1.96 * images.std() / np.sqrt(5000)
    assert [low, high] == pytest.approx([images.mean() - half, images.mean() + half], abs=4e-4)
    seeds = np.repeat(0.01 * generator.normal(size=(8, 1)), 5000, 1)
    low, high = drawn(seeds)
    half = 1.96 * seeds[:, 0].std() / np.sqrt(8)
    assert high - low == pytest.approx(2 * half, rel=0.1)
    assert drawn(images[None] + seeds) == drawn(images[None] + seeds)
    assert drawn(np.zeros((8, 100))) == (0, 0)


def test_people_see_both_intervals(store, judge, monkeypatch):
    judge(0.85 + NOISE)
    read, generator = store.read_all, np.random.default_rng(0)
    right = {}

    def read_all(settings):
        share = {"magnitude": 0.85, "random": 0.8}[settings.method]
        bits = right.setdefault(settings.run, bits_of(generator.random(360) < share))
        return [record | {"right": bits} for record in read(settings)]

    monkeypatch.setattr(store, "read_all", read_all)
    card = papers.card("toy")
    table = verdicts.verdicts_table(store, plan("quick"), card, images=True)
    assert table.images_low[0] < table.low[0] < table.high[0] < table.images_high[0]
    (text,) = tables.readable_verdicts(table)["over seeds and images"]
    assert text.startswith("+5.05 [")
    assert np.isnan(verdicts.verdicts_table(store, plan("quick"), card).images_low[0])
