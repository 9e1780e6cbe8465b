"""Which settings are the best of a search, on made-up records and on those of the study."""

import json
from statistics import mean

import pytest
from conftest import CARD
from conftest import put_record as put

from prunestudy import papers
from prunestudy.places import home
from prunestudy.study import cli, search
from prunestudy.study.plan import plan
from prunestudy.study.records import Store

SEARCH = """
    [[profiles.quick.experiments]]
    name = "search"
    dataset = "digits"
    model = "lenet300"
    purpose = "search"
    start = { epochs = 1, lr = 0.05 }
    recipe = { epochs = 1, lr = 0.05, one_schedule = true }
    targets = [0.9]
    seeds = 2
    validation = 200
    grids = [
        { methods = ["magnitude", "l1"], lr = [0.01, 0.02, 0.05, 0.1] },
        { methods = ["gradual_magnitude"], lr = [0.05, 0.1], harden = [0.5, 0.7] },
    ]
"""
BEST = (0.81, 0.83)  # mean 0.82


@pytest.fixture
def planned(card_file):
    card_file(CARD + SEARCH)
    return plan("quick")


@pytest.fixture
def fill(store, planned):
    """Write records of `scores`: variant of `method` to a score per seed, 0.5 for all others."""

    def write(method, scores):
        for item in planned:
            s = item.settings
            if item.experiment == "search" and s.method == method:
                put(store, s, scores.get(item.variant, (0.5, 0.5))[s.seed])
        grids = search.grids(store, planned)
        return next(grid for grid in grids if grid.label == method)

    return write


def test_a_grid_is_every_combination_of_its_lists(planned):
    entries = papers.card("toy").profiles["quick"].experiments[1].methods
    assert [(e.variant, e.lr, e.params, e.grid) for e in entries if e.method[0] == "g"] == [
        (f"lr {lr}, harden {harden}", lr, {"harden": harden}, "gradual_magnitude")
        for lr in (0.05, 0.1)
        for harden in (0.5, 0.7)
    ]
    runs = [item.settings for item in planned if item.experiment == "search"]
    assert {s.evaluate for s in runs} == {"validation"}
    assert len({s.run for s in runs}) == 2 * (1 + 3 * 4)
    magnitude = [s.recipe.lr for s in runs if s.method == "magnitude" and s.seed == 1]
    assert magnitude == [0.01, 0.02, 0.05, 0.1]


def test_a_grid_keeps_the_readings_name_and_passes_other_values_on(card_file):
    slow = '[{ method = "l1", variant = "slow", params = { ramp = 0.9 } }]'
    at = CARD.index("    [profiles.quick]")
    grid = '{ methods = ["slow"], fresh = true, lr = [0.1], harden = [0.5] }'
    text = SEARCH[: SEARCH.index("    grids")] + f"    grids = [{grid}]\n"
    card_file(CARD[:at] + f"    [sets]\n    slow = {slow}\n" + CARD[at:] + text)
    (entry,) = papers.card("toy").profiles["quick"].experiments[1].methods
    assert (entry.label, entry.grid) == ("l1, slow, lr 0.1, harden 0.5", "l1, slow")
    assert (entry.params, entry.fresh) == ({"ramp": 0.9, "harden": 0.5}, True)


def test_the_best_has_the_best_mean_over_the_seeds(fill):
    grid = fill("magnitude", {"lr 0.02": BEST, "lr 0.01": (0.9, 0.7), "lr 0.1": (0.82, 0.81)})
    assert grid.best.settings.recipe.lr == 0.02
    assert grid.best.mean == pytest.approx(0.82)
    assert grid.edges == []


def test_a_setting_with_a_failed_run_is_the_worst(fill):
    grid = fill("magnitude", {"lr 0.1": (0.99, None), "lr 0.02": BEST})
    assert grid.best.settings.recipe.lr == 0.02
    assert [tried.mean for tried in grid.tried][-1] == float("-inf")


def test_a_control_that_fails_in_the_results_is_searched_again(card_file, store):
    """Not where it fails at another setting, and not for the paper's own method."""
    used = SEARCH[: SEARCH.index("    grids")].replace('"search"', '"results"')
    used = used.replace("lr = 0.05, one", "lr = 0.1, one").replace("seeds = 2", "seeds = 3")
    text = CARD + SEARCH + used + '    methods = ["magnitude"]\n'
    for paper, best in (("magnitude", 0.1), ("toy", 0.02)):
        card_file(text.replace('id = "toy"', f'id = "{paper}"'), paper)
        planned = plan("quick", (paper,))
        for item in (item for item in planned if item.settings.method == "magnitude"):
            score = {"lr 0.1": 0.9, "lr 0.02": 0.8}.get(item.variant, 0.5)
            fails = item.experiment == "results" and item.settings.seed == 2
            put(store, item.settings, None if fails else score)
        grid = next(g for g in search.grids(store, planned) if g.label == "magnitude")
        assert grid.best.settings.recipe.lr == best
        assert [tried.failed for tried in grid.tried] == [False, False, False, paper == "toy"]
    assert "0.9000   0.9000   failed  among the results" in "\n".join(search.lines(grid))


@pytest.mark.parametrize(("method", "rate", "harden"), [("l1", 0.02, None), ("g", 0.05, 0.5)])
def test_equals_go_to_the_lower_rate_then_to_the_first(fill, method, rate, harden):
    if method == "l1":
        best = fill("l1", {"lr 0.05": BEST, "lr 0.02": BEST[::-1]}).best.settings
    else:
        names = [f"lr {lr}, harden {h}" for lr in (0.1, 0.05) for h in (0.7, 0.5)]
        best = fill("gradual_magnitude", dict.fromkeys(names, BEST)).best.settings
    assert (best.recipe.lr, best.params.get("harden") if harden else None) == (rate, harden)


def test_all_failed_is_complete_and_the_lowest_rate(fill):
    failed = dict.fromkeys(("lr 0.01", "lr 0.02", "lr 0.05", "lr 0.1"), (None, None))
    grid = fill("magnitude", failed)
    assert grid.complete
    assert grid.best.settings.recipe.lr == 0.01


def test_edges_are_those_of_lists_of_three_or_more(fill):
    assert fill("magnitude", {"lr 0.1": BEST}).edges == ["lr highest"]
    assert fill("l1", {"lr 0.01": BEST}).edges == ["lr lowest"]
    assert fill("gradual_magnitude", {"lr 0.1, harden 0.7": BEST}).edges == []


def test_where_the_card_differs(fill):
    """Its magnitude runs at 0.05 and not by one schedule; it has no gradual magnitude."""
    grid = fill("magnitude", {"lr 0.1": BEST, "lr 0.05": (0.8, 0.8)})
    common = "one_schedule false instead of true"
    assert grid.differences == ["lr 0.05 instead of 0.1", common]
    assert grid.gain == pytest.approx(0.02)
    assert fill("magnitude", {"lr 0.05": (0.9, 0.9)}).differences == [common]
    assert fill("gradual_magnitude", {}).differences == ["no such runs"]


def test_a_grid_that_lacks_a_run_is_not_judged(store, planned, fill):
    fill("magnitude", {"lr 0.1": BEST})
    left = next(p.settings for p in planned if p.variant == "lr 0.02" and p.settings.seed == 1)
    (store.runs / left.run / "record.json").unlink()
    grid = next(g for g in search.grids(store, planned) if g.label == "magnitude")
    assert not grid.complete
    text = "\n".join(search.lines(grid))
    assert "0.5000        -        -" in text
    assert "card:" not in text


@pytest.mark.parametrize("equal", [False, True])
def test_the_command_fails_where_the_card_differs(card_file, tmp_path, capsys, equal):
    grids = '    grids = [{ methods = ["magnitude"], lr = [0.01, 0.05, 0.1] }]'
    text = SEARCH.replace(", one_schedule = true", "") if equal else SEARCH
    card_file(CARD + text[: text.index("    grids")] + grids)
    store = Store("quick", tmp_path)
    words = ["search", "--results", str(tmp_path)]
    assert cli.main([*words, "--check"]) == 0  # as far as there are records
    for item in plan("quick"):
        if item.experiment == "search":
            put(store, item.settings, 0.9 if item.settings.recipe.lr == 0.05 else 0.8)
    assert cli.main(words) == 0
    assert cli.main([*words, "--check"]) == (0 if equal else 1)
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"1 grids, 1 complete; in {0 if equal else 1} the card differs"
    assert told[-4:-1] == [
        "  * lr 0.05                      0.9000   0.9000   0.9000",
        "    lr 0.1                       0.8000   0.8000   0.8000",
        f"    card: {'the best' if equal else 'one_schedule false instead of true'}, "
        "+0.0000 by the search",
    ]


STRONGEST = 'against = "strongest"\n    controls = ["l1", "random", "gradual_magnitude"]'
ROW = '{ profile = "quick", model = "lenet300", dataset = "digits", target_kind = "sparsity",'


@pytest.mark.parametrize(
    ("l1", "control", "best", "code"),
    [
        ((0.8, 0.9), "l1", "l1", 0),
        ((0.8, 0.9), "gradual_magnitude", "l1", 1),
        ((0.8, 0.9), "", "l1", 1),
        ((0.99, None), "gradual_magnitude", "gradual_magnitude", 0),
    ],
)
def test_the_strongest_control_of_the_card_is_checked(
    card_file, tmp_path, capsys, l1, control, best, code
):
    """By the means of the best settings; one that fails everywhere is not eligible."""
    rows = f'    strongest = [{ROW} control = "{control}" }}]\n' if control else ""
    text = CARD.replace('against = "random"', STRONGEST).replace(
        "    published", rows + "    published"
    )
    text = text.replace(
        '{ method = "random" }', '{ method = "l1" }, { method = "gradual_magnitude" }'
    )
    grids = """grids = [
        { methods = ["l1", "magnitude"], lr = [0.05] },
        { methods = ["gradual_magnitude"], lr = [0.05] },
    ]
    """
    card_file(text + SEARCH[: SEARCH.index("grids")].replace(", one_schedule = true", "") + grids)
    store, scores = Store("quick", tmp_path), {"l1": l1, "gradual_magnitude": (0.84, 0.85)}
    words = ["search", "--results", str(tmp_path), "--check"]
    items = [item.settings for item in plan("quick") if item.experiment == "search"]
    for settings in items[:-1]:
        put(store, settings, scores.get(settings.method, (0.9, 0.9))[settings.seed])
    assert cli.main(words) == 0
    assert "against" not in capsys.readouterr().out  # not all grids are complete
    put(store, items[-1], 0.85)
    assert cli.main(words) == code
    told = f"toy: magnitude against {best}, lenet300, digits, sparsity; card: {control or '-'}"
    assert told in capsys.readouterr().out.splitlines()


# --- the study's own


@pytest.fixture(scope="module")
def found():
    return search.grids(Store("cpu", home() / "results"), plan("cpu"))


def dataset_of(grid):
    return grid.tried[0].settings.dataset


def test_every_method_and_control_of_the_cards_has_the_same_chance(found):
    assert {len(grid.tried) for grid in found} == {6}
    assert {len(tried.scores) for grid in found for tried in grid.tried} == {2}
    common = {}
    for settings in (tried.settings for grid in found for tried in grid.tried):
        r = settings.recipe
        common.setdefault(settings.model, set()).add((r.weight_decay, r.schedule, r.one_schedule))
    one = {(5e-4, "cosine", True)}
    coders = {name: {(0.0, "cosine", False)} for name in ("autoencoder", "conv_autoencoder")}
    assert common == {"lenet5": one, "lenet300": one} | coders
    for paper, kinds in {
        "gdp": "dense gdp group_l2 l1_filter taylor_channels random hard_concrete scratch",
        "sparse_gates": "dense sparse_gates gradual_magnitude magnitude l1 random",
    }.items():
        for dataset in ("mnist", "fashion_mnist"):
            labels = {g.label for g in found if (g.paper, dataset_of(g)) == (paper, dataset)}
            assert labels == {*kinds.split()}


def test_every_opponent_of_map_was_searched(found):
    """But for its readings, which have its setting, and a control's that failed."""
    ours = "magnitude_attention"
    labels = {grid.label for grid in found if grid.paper == "magnitude_attention"}
    rules = [r for claim in papers.card("magnitude_attention").claims for r in claim.tests]
    opponents = {a for rule in rules for a in rule.controls or (rule.against,)}
    readings = {
        f"{ours}, {r}" for r in ("forward pass only", "backward pass only", "no exploitation")
    }
    readings |= {"gradual_magnitude, lr 0.1"}
    assert labels == ({rule.method for rule in rules} | opponents) - readings


def without_seed(settings):
    """The names of the run and of its parents, whatever their seed."""
    parents = without_seed(settings.parent) if settings.parent else ()
    return settings.model_copy(update={"seed": 0, "parent": None}).run, *parents


def test_the_best_of_the_committed_searches_are_those_of_the_lines(found):
    """Once more, from the lines of the file alone; for complete searches."""
    text = (home() / "results/cpu/records.jsonl").read_text(encoding="utf-8")
    records = {record["run"]: record for record in map(json.loads, text.splitlines())}
    planned = {p.settings.run: p.settings for p in plan("cpu") if p.purpose == "search"}
    scores = {}
    for run in records.keys() & planned.keys():
        done = records[run]["status"] == "done"
        score = records[run]["metrics"]["metric"] if done else float("-inf")
        scores.setdefault(without_seed(planned[run]), []).append(score)
    for grid in (grid for grid in found if grid.complete):
        kinds = {without_seed(t.settings): t for t in grid.tried if not t.failed}
        assert {len(scores[kind]) for kind in kinds} == {2}
        top = max(mean(scores[kind]) for kind in kinds)
        tops = [t.settings.recipe.lr for kind, t in kinds.items() if mean(scores[kind]) == top]
        assert (grid.best.mean, grid.best.settings.recipe.lr) == (pytest.approx(top), min(tops))


def test_the_cards_have_the_best_settings(found):
    assert all(grid.complete for grid in found)
    assert [grid.label for grid in found if grid.differences] == []
