import pytest
from conftest import CARD, one_line

from prunestudy.errors import InputError
from prunestudy.study import cli, forecast
from prunestudy.study.plan import plan

MACS, PARAMETERS = 64 * 300 + 300 * 100 + 100 * 10, 50_610  # LeNet-300-100 on 8x8 digits
EPOCH = 3 * (1437 - 200) * MACS  # forward and backward
HOUR = EPOCH / 1e12 / 3600  # of one epoch, at a rate of 1


def names(planned):
    return [f"{item.settings.method}, {item.variant}" for item in planned]


def test_cost_is_the_closed_form(toy_card):
    start = plan("quick")[0].settings
    disk = (4 * PARAMETERS + 2**20) / 1e9
    assert forecast.cost(start, 2.0) == pytest.approx((1, 1237, EPOCH / 1e15, HOUR / 2, disk))


@pytest.mark.parametrize(("steps", "samples"), [(0, 1237), (5, 5 * 128), (99, 1237)])
def test_cost_of_a_run_that_is_counted_in_steps(toy_card, steps, samples):
    start = plan("quick")[0].settings
    recipe = start.recipe.model_copy(update={"steps": steps, "batch_size": 128})
    found = forecast.cost(start.model_copy(update={"recipe": recipe}))
    assert found[:2] == (1, samples)
    assert found[2] * 1e15 == pytest.approx(EPOCH * samples / 1237)


def test_a_run_that_two_ask_for_counts_once(toy_card):
    table = forecast.forecast(plan("quick") + plan("quick"), rate=1.0)
    assert table[["paper", "experiment"]].to_numpy().tolist() == [["toy", "digits"], ["all", ""]]
    for row in table.to_dict("records"):
        assert (row["runs"], row["epochs"], row["samples"]) == (4, 4, 4 * 1237)
        assert row["PMACs"] == pytest.approx(4 * EPOCH / 1e15)
        assert row["hours"] == pytest.approx(4 * HOUR)


def test_comparisons_come_first_and_parents_before_children(toy_card):
    pair = ["dense, start", "magnitude, ", "random, "]
    for epochs, expected in (
        (0.9, []),
        (1.5, ["dense, start"]),
        (3.5, pair),
        (4.5, [*pair, "dense, "]),
    ):
        assert names(forecast.choose(plan("quick"), epochs * HOUR, rate=1.0)) == expected


def test_one_seed_of_all_comes_before_the_next_seed(card_file):
    card_file(CARD.replace("seeds = 1", "seeds = 3"))
    chosen = forecast.choose(plan("quick"), 6.5 * HOUR, rate=1.0)
    assert [item.settings.seed for item in chosen] == [0, 0, 0, 1, 1, 1]
    assert names(chosen) == 2 * ["dense, start", "magnitude, ", "random, "]


def test_a_claim_on_one_value_needs_no_control(card_file):
    card_file(CARD.replace('against = ["random"]', "against = []"))
    chosen = forecast.choose(plan("quick"), 2.5 * HOUR, rate=1.0)
    assert names(chosen) == ["dense, start", "magnitude, "]


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_numbers(toy_card, value):
    for name, numbers in (("hours", (value, 1.0)), ("rate", (1.0, value))):
        with pytest.raises(InputError) as caught:
            forecast.choose(plan("quick"), *numbers)
        assert one_line(caught) == f"{name} = {value}: a finite number above 0"


def test_the_command(toy_card, capsys):
    assert cli.main(["plan"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "an estimate, at 3 x 10^12 MACs of training a second (assumed)" in said.out
    assert cli.main(["plan", "--gpu-hours", "1", "--rate", "2"]) == 0
    said = capsys.readouterr()
    assert sorted(said.out.split()) == sorted(item.settings.run for item in plan("quick"))
    assert "(as given)" in said.err
    assert cli.main(["plan", "--rate", "0"]) == 2
    assert capsys.readouterr().err == "prunestudy: rate = 0.0: a finite number above 0\n"
