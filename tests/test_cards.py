"""What a card may say, and what it says once for several places."""

import pytest
from conftest import CARD, one_line, refused

from prunestudy import datasets, models, papers
from prunestudy.errors import InputError
from prunestudy.papers import RunRecipe as Recipe
from prunestudy.papers.claims import Rule, rules_of
from prunestudy.study.tables import RUN_COLUMNS

CLAIMS, TESTS, QUICK = (
    CARD.index(f"    [{name}]") for name in ("[claims]", "[claims.tests]", "profiles.quick")
)
CITATION = ("authors", "venue", "year", "arxiv")
FIRST = "profiles.quick.experiments.0"


def ids(found):
    return [card.id for card in found]


def without(text, *names):
    lines = [line for line in text.splitlines() if line.split(" = ")[0].strip() not in names]
    return "\n".join(lines) + "\n"


def test_the_toy_card(toy_card):
    card = papers.card("toy")
    assert (papers.cards(), card) == ((card,), papers.read_card(toy_card))
    experiment = card.profiles["quick"].experiments[0]
    assert experiment.recipe == Recipe(epochs=1, lr=0.05)
    assert [entry.method for entry in experiment.methods] == ["dense", "magnitude", "random"]
    assert (experiment.purpose, experiment.targets) == ("results", (0.9,))
    expected = Rule(kind="superiority", method="magnitude", against="random")
    assert card.claims[0].tests == (expected,)
    refused(lambda: papers.card("nope"), "paper = 'nope': allowed are toy")


def test_cards_come_in_the_order_of_their_notebooks(card_file):
    for name, notebook in (("a", "02_x"), ("b", "00_y"), ("c", "01_z")):
        card_file(CARD.replace("99_toy", notebook).replace('"toy"', f'"{name}"'), name)
    assert ids(papers.cards()) == ["b", "c", "a"]


def test_a_card_is_read_again_when_its_file_changes(card_file):
    card_file()
    assert papers.card("toy").title == "A toy"
    card_file(CARD.replace("A toy", "Another toy"))
    assert papers.card("toy").title == "Another toy"


def test_a_card_without_a_citation_has_runs_and_no_claims_and_comes_last(card_file):
    """What compares the papers is no paper."""
    text = without(CARD[:CLAIMS], *CITATION).replace("99_toy", "00_sum") + "    claims = []\n"
    card_file()
    card_file((text + CARD[QUICK:]).replace('"toy"', '"sum"'), "sum")
    assert [(card.id, card.is_paper) for card in papers.cards()] == [("toy", True), ("sum", False)]
    assert papers.card("sum").year is None


AGAINST, TIME, DENSE = 'against = "random"', 'time = "a second"', '{ method = "dense" }'
SUPERIOR, TEST = 'kind = "superiority"', "claims.0.tests.0"
READING = 'against = "strongest"\n    controls = ["random", "magnitude, slow"]'
EXTRA = "extra inputs are not permitted"


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("[claims]", "[claims", "", "not valid TOML ("),
        ('id = "toy"', 'id = "toy"\n    tittle = "x"', "tittle", EXTRA),
        ('id = "toy"', 'id = "../toy"', "", "id = '../toy': the name of the file, 'toy'"),
        ("year = 2000", "year = 2000-01-01", "", "not valid TOML ("),
        ("year = 2000", f"year = {'9' * 5000}", "", "not valid TOML ("),
        ("year = 2000", f"year = {'[' * 100_000}", "", "not valid TOML ("),
        ('title = "A toy"', "", "title", "field required"),
        ("year = 2000", 'year = "2000"', "year", "valid integer"),
        ('mark = "O"', 'mark = "O"\n    marc = "O"', "claims.0.marc", EXTRA),
        ('mark = "O"', 'mark = "X"', "claims.0.mark", "input should be 'p', 's'"),
        (
            'place = "here"',
            'place = "here"\n    not_testable = "x"',
            "claims.0",
            "has either tests",
        ),
        (CARD[TESTS:QUICK], "", "claims.0", "a claim has either tests or a reason in not_testable"),
        (AGAINST, 'agaisnt = "random"', TEST + ".agaisnt", EXTRA),
        (AGAINST, "where = { targets = [0.9] }", TEST, "why belongs to where"),
        (AGAINST, 'why = "x"', TEST, "why belongs to where"),
        (SUPERIOR, 'kind = "by_construction"', TEST, "and to what holds by construction"),
        (AGAINST, "where = { nets = [] }", TEST + ".where.nets.[key]", "'models', "),
        (AGAINST, f"{AGAINST}\n    at_least = 0.1", TEST, "at_least is for the metric itself"),
        (SUPERIOR, 'kind = "equality"', TEST + ".kind", "input should be 'superiority'"),
        (AGAINST, 'against = "strongest"', TEST, "controls belong to against = 'strongest'"),
        (AGAINST, f'{AGAINST}\n    controls = ["l1"]', TEST, "controls belong to against"),
        (AGAINST, READING, TEST, "a reading of the method is no control"),
        (
            f"{SUPERIOR}\n",
            'kind = "non_inferiority"\n    metric = "top1"\n',
            TEST,
            "is of the metric",
        ),
        (
            AGAINST,
            f'{AGAINST}\n    [[claims.tests]]\n    {SUPERIOR}\n    method = "l1"\n    {AGAINST}',
            "claims.0",
            "a claim has at most one test that ends in a verdict",
        ),
        ("[profiles.quick]", "[profiles.fast]", "profiles.fast.[key]", "input should be 'quick'"),
        (TIME, f'{TIME}\n    jobs = "seed"', "profiles.quick.jobs", EXTRA),
        (
            TIME,
            f'{TIME}\n    precision = "fp16"',
            "profiles.quick.precision",
            "input should be 'fp32'",
        ),
        (TIME, f"{TIME}\n    threads = 0", "profiles.quick.threads", "greater than or equal to 1"),
        (TIME, f"{TIME}\n    start = 3", "profiles.quick.start", EXTRA),
        ("validation = 200", "valid = 3", f"{FIRST}.valid", EXTRA),
        (
            "recipe = { epochs = 1,",
            "recipe = { epoch = 1,",
            f"{FIRST}.recipe",
            "epochs: is missing",
        ),
        ("seeds = 1", "seeds = 0", f"{FIRST}.seeds", "greater than or equal to 1"),
        ("seeds = 1", "seeds = 1.0", f"{FIRST}.seeds", "valid integer"),
        ("lr = 0.05 }", "lr = -0.05 }", f"{FIRST}.start", "lr = -0.05: input should be greater"),
        ("lr = 0.05 }", "lr = inf }", f"{FIRST}.start", "finite number"),
        ("targets = [0.9]", 'targets = ["a"]', f"{FIRST}.targets.0", "valid number"),
        (DENSE, '{ method = "dense", param = {} }', f"{FIRST}.methods.0.param", EXTRA),
        (DENSE, f"{DENSE}, {DENSE}", FIRST, "two methods have the same name, variant and stage"),
        (DENSE, '{ method = "l1", stage = "combined" }', FIRST, "'l1, combined' is combined after"),
        (
            DENSE,
            '{ method = "dense", variant = "tuned", after = "magnitude" }',
            FIRST,
            "after 'magnitude' is no entry before 'dense, tuned'",
        ),
        # shorthand
        ('name = "digits"', 'columns = ["name"]\n    rows = [["one", "two"]]', "", "at most 1 val"),
        (DENSE, '{ set = "chance" }', "", "set = 'chance'"),
        (
            '    method = "magnitude"',
            '    method = "two"\n    [sets]\n    two = ["magnitude", "random"]',
            "",
            "method = 'two': a method, or a set of one",
        ),
    ],
)
def test_a_wrong_card_is_refused_in_one_line(card_file, old, new, where, what):
    assert old in CARD
    path = card_file(CARD.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        papers.read_card(path)
    start = f"card toy.toml: {where}: " if where else "card"
    assert one_line(caught).startswith(start)
    assert what in one_line(caught)


def test_files_beside_the_cards_that_are_none(card_file):
    path = card_file()
    for name in ("._toy", ".#toy"):  # of macOS and Emacs
        path.with_name(f"{name}.toml").symlink_to("nothing")
    assert ids(papers.cards()) == ["toy"]
    path.with_name("toy (copy).toml").write_text(path.read_text())
    refused(papers.cards, "card toy (copy).toml: id = 'toy': the name of the file")
    path.write_bytes(b"\xff")
    refused(lambda: papers.read_card(path), "card = 'toy.toml': not valid TOML (")


def test_a_claim_that_cannot_be_tested(card_file):
    card = papers.read_card(card_file(CARD[:TESTS] + 'not_testable = "why"\n' + CARD[QUICK:]))
    assert (card.claims[0].tests, card.claims[0].not_testable) == ((), "why")


ROWS = """[[tests]]
    columns = ["claim", "kind", "method", "against", "metric"]
    rows = [["better", "superiority", "magnitude", "random", "metric"]]

    """


def test_tests_may_stand_in_a_table_of_their_own(card_file):
    card_file()
    nested, text = papers.card("toy"), CARD[:TESTS] + ROWS + CARD[QUICK:]
    card_file(text)
    assert papers.card("toy") == nested
    place = "quick", "lenet300", "digits"
    assert rules_of(text, *place) == rules_of(CARD, *place)
    more = ROWS.replace("superiority", "description").replace("random", "l1")
    card_file(CARD[:QUICK] + more + CARD[QUICK:])
    assert [rule.against for rule in papers.card("toy").claims[0].tests] == ["random", "l1"]
    path = card_file(text.replace('["better"', '["bettr"'))
    refused(lambda: papers.read_card(path), "claim = 'bettr': allowed are better")
    path = card_file(text.replace('["claim", ', '["where", '))
    refused(lambda: papers.read_card(path), "claim = '': allowed are better")


def test_the_rules_of_a_text_are_what_decides():
    """Prose, recipes, descriptions and the layout are none of it; sets and controls are."""
    described = f'{AGAINST}\n    [[claims.tests]]\n    kind = "description"\n    method = "l1"'
    net = 'profile = "PROFILE", model = "lenet300", dataset = "DATASET"'
    row = f'strongest = [{{ {net}, control = "l1" }}]\n    published'
    place = "quick", "lenet300", "digits"
    sets = '[sets]\n    chance = [{ method = "random", variant = "NAME" }]\n    [profiles.quick]'
    first, named = rules_of(CARD, *place), CARD.replace(AGAINST, 'against = "chance"')
    for old, new, same in (
        ('text = "Magnitude is', 'text = "Size is', True),
        ("epochs = 1", "epochs = 2", True),
        ('    against = "random"', '\n    # chance\n    against   = "random"', True),
        (AGAINST, described, True),
        ("published", row.replace("PROFILE", "cpu").replace("DATASET", "digits"), True),
        ("published", row.replace("PROFILE", "quick").replace("DATASET", "mnist"), True),
        ("published", row.replace("PROFILE", "quick").replace("DATASET", "digits"), False),
        (AGAINST, 'against = "l1"', False),
        (SUPERIOR, 'kind = "description"', False),
        ('id = "better"', 'id = "best"', False),
    ):
        assert old in CARD
        assert (rules_of(CARD.replace(old, new, 1), *place) == first) == same, new
    strongest = row.replace("PROFILE", "quick").replace("DATASET", "digits")
    unsearched = [
        rules_of(text, *place, False) for text in (CARD, CARD.replace("published", strongest))
    ]
    assert unsearched == [first, first]  # the claim names its opponent
    texts = [named.replace("[profiles.quick]", sets.replace("NAME", name)) for name in "ab"]
    assert len({first, *(rules_of(text, *place) for text in texts)}) == 3
    assert rules_of("nothing [", *place) == rules_of("a = 1", *place) == ""


@pytest.mark.parametrize("card", papers.cards(), ids=ids(papers.cards()))
def test_what_the_cards_name_is_there(card):
    """A misspelt name in a claim would only ever say that there are no runs."""
    metrics = {*RUN_COLUMNS, "kept_scale", "surviving", "layer_focus"}
    metrics |= {"roughness", "top1", "search_passes", "undecided", "log2_rank_total"}
    metrics |= {"validation_factorised"}
    for rule in (rule for claim in card.claims for rule in claim.tests):
        assert rule.metric.removeprefix("-") in metrics
        assert rule.method not in (rule.against, *rule.controls)
        assert {*rule.where.get("models", ())} <= {*models.names()}
        assert {*rule.where.get("datasets", ())} <= {*datasets.names()}
    controls = {name for claim in card.claims for rule in claim.tests for name in rule.controls}
    for row in card.strongest:
        assert row.control in controls
        assert (row.model in models.names(), row.dataset in datasets.names()) == (True, True)
    places = [tuple(row.model_dump().values()) for row in card.strongest]
    assert len(set(places)) == len(places)
    assert len({claim.id for claim in card.claims}) == len(card.claims)
    for number in card.published:
        assert number.kept is None or 0 < number.kept < 1
        assert number.source
    assert all(unknown.reading for unknown in card.unknown)
    citation = [bool(value) for value in (card.authors, card.venue, card.year, card.arxiv)]
    assert len(set(citation)) == 1
    assert card.is_paper or not (card.claims or card.published or card.ranks or card.unknown)
    for table in card.ranks:
        columns = (table.full, table.ranks, table.gpu, table.cpu, table.theory)
        assert {len(column) for column in columns if column} == {len(table.layers)}
        assert all(0 < rank <= full for rank, full in zip(table.ranks, table.full, strict=True))


def test_defaults_sets_rows_and_readings_are_written_out(card_file):
    listed = 'against = "strongest"\n    controls = ["chance", "chance, fine-tuned", "l1"]'
    text = CARD[:QUICK].replace(AGAINST, listed)
    card_file(
        text
        + """
    [sets]
    chance = ["random", { method = "random", variant = "rows", params = { seed = 1 } }]
    few = [{ set = "chance", seeds = 2, params = { more = 2 } }, "dense"]

    [profiles.quick]
    time = "a second"
    model = "lenet300"
    start = { epochs = 4 }
    recipe = { epochs = 2, lr = 0.05 }
    seeds = 3

    [[profiles.quick.experiments]]
    recipe = { lr = 0.1 }
    methods = ["few", "l1"]
    targets = [0.5]
    columns = ["name", "dataset", "start"]
    rows = [["one", "digits"], ["two", "mnist", { epochs = 0, lr = 0.2 }]]
    [profiles.quick.experiments.readings.l1]
    "slow" = { ramp = 0.5 }
    """
    )
    card = papers.card("toy")
    both = ("random", "random, rows")
    assert card.claims[0].tests[0].controls == (*both, *(f"{b}, fine-tuned" for b in both), "l1")
    one, two = card.profiles["quick"].experiments
    assert (one.name, one.dataset, one.model, one.seeds) == ("one", "digits", "lenet300", 3)
    assert (one.recipe, one.start) == (Recipe(epochs=2, lr=0.1), Recipe(epochs=4, lr=0.1))
    # a start that trains nothing takes nothing over
    assert (two.dataset, two.start) == ("mnist", Recipe(epochs=0, lr=0.2))
    assert [(e.method, e.variant, e.seeds, e.params) for e in one.methods] == [
        ("random", "", 2, {"more": 2}),
        ("random", "rows", 2, {"seed": 1, "more": 2}),
        ("dense", "", None, {}),
        ("l1", "", None, {}),
        ("l1", "slow", None, {"ramp": 0.5}),
    ]


def test_a_profiles_default_is_checked_in_its_experiments(card_file):
    text = CARD.replace("    seeds = 1\n", "").replace(TIME, f"{TIME}\n    seeds = 0")
    refused(lambda: papers.read_card(card_file(text)), f"card toy.toml: {FIRST}.seeds: ")
