"""What a profile would cost: closed forms, checked by hand."""

from dataclasses import replace

import pytest

from prunestudy.study import cli
from prunestudy.study.plan import RATE, forecast, plan

pytestmark = pytest.mark.usefixtures("toy_card")
MACS, PARAMETERS = 64 * 300 + 300 * 100 + 100 * 10, 50_610  # LeNet-300-100 on 8x8 digits
EPOCH = 3 * (1437 - 200) * MACS  # forward and backward
HOUR = EPOCH / (RATE * 1e12) / 3600  # of one epoch


@pytest.mark.parametrize(("steps", "samples"), [(0, 1237), (5, 5 * 128), (99, 1237)])
def test_cost_is_the_closed_form(steps, samples):
    start = plan("quick")[0]
    recipe = start.settings.recipe.model_copy(update={"steps": steps, "batch_size": 128})
    changed = start.settings.model_copy(update={"recipe": recipe})
    share, disk = samples / 1237, (4 * PARAMETERS + 2**20) / 1e9
    expected = (1, 1, samples, EPOCH * share / 1e15, HOUR * share, disk)
    found = forecast([replace(start, settings=changed)]).iloc[0, 2:]
    assert tuple(found) == pytest.approx(expected)


def test_a_run_that_two_ask_for_counts_once():
    table = forecast(plan("quick") + plan("quick"))
    assert table[["paper", "experiment"]].to_numpy().tolist() == [["toy", "digits"], ["all", ""]]
    for row in table.to_dict("records"):
        assert (row["runs"], row["epochs"], row["samples"]) == (4, 4, 4 * 1237)
        assert row["PMACs"] == pytest.approx(4 * EPOCH / 1e15)
        assert row["hours"] == pytest.approx(4 * HOUR)


def test_the_command_says_the_costs_and_the_rate(capsys):
    assert cli.main(["plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "paper experiment runs epochs samples PMACs hours disk GB".split()
    assert [line.split()[0] for line in lines[1:3]] == ["toy", "all"]
    assert lines[3].startswith("hours: an estimate, at 3 x 10^12 MACs of training a second")
