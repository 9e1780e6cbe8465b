"""What the notebook does not draw in every profile."""

import pandas as pd
import pytest
from conftest import one_line
from matplotlib import pyplot as plt

from prunestudy import papers
from prunestudy.errors import InputError
from prunestudy.study import figures
from prunestudy.study.figures import gdp as drawings

COLUMNS = "method model dataset variant target_kind target metric_name metric dense_metric".split()


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def timed(seconds):
    rows = [("gdp", "mlp", "digits", "", "macs", 0.9, "top1", m, 0.98) for m in (0.9, 0.94)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.assign(
        device="cpu", latency_b128_ms=[seconds, None], dense_latency_b128_ms=[8.0, None]
    )


def test_accuracy_is_the_mean_over_seeds_and_the_speed_up_that_of_the_timed_net():
    figure = drawings.accuracy_against_latency(timed(2.0), "mlp", "digits", 128)
    (points,) = figure.axes[0].collections
    ((x, y),) = points.get_offsets().tolist()
    assert (x, y) == (4.0, pytest.approx(92.0))


def test_reference_rows_are_those_of_the_card():
    card = papers.card("gdp")
    figure = drawings.reference_rows(card, "resnet56", "cifar10")
    stars = [
        line.get_xydata()[0].tolist()
        for line in figure.axes[0].lines
        if len(line.get_xydata()) == 1
    ]
    assert len(stars) == 6
    assert [round(x, 6) for x in stars[0]] == [48, -0.53]
    assert {text.get_text() for text in figure.axes[0].texts} >= {"Slimming", "FPGM", "CCP"}
    assert all(number.mark == "N" for number in card.published)


def test_figures_of_nothing_are_refused_in_one_line():
    for draw in (
        lambda: drawings.reference_rows(papers.card("gdp"), "resnet20", "cifar10"),
        lambda: drawings.accuracy_against_latency(timed(None), "mlp", "digits", 128),
        lambda: drawings.channels_kept(None, [], 0.5, kind="macs", model="mlp", dataset="digits"),
    ):
        with pytest.raises(InputError) as caught:
            draw()
        assert one_line(caught).startswith("figure = ")


def test_runs_of_two_devices_are_not_drawn_as_one():
    table = timed(2.0)
    other = table.assign(device="GPU", metric=0.5, latency_b128_ms=[4.0, None])
    both = pd.concat([table, other, table.iloc[1:]], ignore_index=True)
    (points,) = drawings.accuracy_against_latency(both, "mlp", "digits", 128).axes[0].collections
    assert points.get_offsets().tolist() == [[4.0, pytest.approx(100 * (0.9 + 0.94 + 0.94) / 3)]]


def test_a_figure_is_saved_as_one_png(tmp_path):
    figure = drawings.accuracy_against_latency(timed(2.0), "mlp", "digits", 128)
    path = figures.save_to(figure, tmp_path / "figures", "latency")
    assert [p.name for p in path.parent.iterdir()] == ["latency.png"]
    first = path.read_bytes()
    assert figures.save_to(figure, tmp_path / "figures", "latency").read_bytes() == first
