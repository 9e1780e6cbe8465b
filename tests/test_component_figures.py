"""Figures of component-aware pruning, from made-up runs: what is drawn is what was given."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from prunestudy.errors import InputError
from prunestudy.measure import Constraint
from prunestudy.models import TDMPC
from prunestudy.shrink import component_groups
from prunestudy.study.figures import component_aware as figures


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


REPORT = [
    {"group": "encoder.fc1", "kind": "internal", "place": "encoder", "removed": 0.25},
    {"group": "encoder.fc3", "kind": "coupling", "place": "encoder > decoder", "removed": 0.0},
]


class Runs:
    """A store of two runs, by grid and by gradient descent."""

    def __init__(self):
        generator = np.random.default_rng(0)
        pictures = generator.integers(0, 255, (3, 1, 4, 4), dtype=np.uint8)
        self.held = {
            **dict.fromkeys(("shown", "output_dense", "output_pruned"), pictures),
            **{f"latent_{name}": generator.normal(size=(5, 2)) for name in ("dense", "pruned")},
            "labels": np.arange(5),
        }

    def arrays(self, run):
        return self.held

    def read(self, settings):
        metrics = {"report": REPORT, "coefficients": 3, "search_passes": 100, "grid_passes": 729}
        return {"status": "done", "metrics": metrics}


def item(solver, target=0.5, variant=""):
    settings = SimpleNamespace(
        run=f"{solver}-{target}",
        method="component_aware",
        model="autoencoder",
        dataset="digits",
        params={"solver": solver},
        recipe=SimpleNamespace(epochs=0),
        target=SimpleNamespace(value=target),
    )
    return SimpleNamespace(settings=settings, variant=variant)


def test_groups_name_the_coupling_one_in_bold():
    found = component_groups(TDMPC(5, 2, 8, 4), (7,))
    labels = figures.groups(found).axes[0].get_yticklabels()
    bold = [label.get_text() for label in labels if label.get_fontweight() == "bold"]
    assert bold == ["encoder.2 (4)"]
    assert len(labels) == len(found)


def test_reconstructions_have_a_row_for_each_share_and_method():
    runs = {"ours": {0.5: "a", 0.7: "b"}, "uniform": {0.5: "c"}}
    figure = figures.reconstructions(Runs(), runs)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == ["image", "dense", "ours, 50%", "uniform, 50%", "ours, 70%"]


def test_coefficients_are_the_shares_removed_in_order_of_execution():
    planned = [item("gradient"), item("gradient", 0.7), item("grid", 0.5, "grid")]
    axes = figures.coefficients(Runs(), planned, "autoencoder", "digits").axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["encoder.fc1\n(internal)", "encoder.fc3\n(coupling)"]
    heights = sorted(bar.get_height() for bar in axes.patches if bar.get_width() > 0)
    assert heights[-2:] == [25, 25]
    with pytest.raises(InputError, match="no finished run"):
        figures.coefficients(Runs(), [], "autoencoder", "digits")


def test_search_cost_has_the_whole_grid_beside_what_was_judged():
    axes = figures.search_cost(Runs(), [item("gradient"), item("grid")]).axes[0]
    points = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert points == {
        "gradient descent": [[3, 100]],
        "grid: judged": [[3, 100]],
        "grid: all points": [[3, 729]],
    }


def test_latent_space_before_and_after():
    figure = figures.latent_space(Runs(), "a", "title")
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "latent space, dense",
        "latent space, pruned",
    ]
    assert len(figure.axes[0].collections[0].get_offsets()) == 5


def test_refusal_says_by_how_much():
    points = pd.DataFrame({"removed": [0.1, 0.5, 0.9], "psnr": [20.0, 18.0, 12.0]})
    axes = figures.refusal(points, Constraint.parse("psnr >= 17"), 0.6).axes[0]
    assert [text.get_text() for text in axes.texts] == ["5 short"]
    offsets = {c.get_label(): len(c.get_offsets()) for c in axes.collections[:2]}
    assert offsets == {"accepted": 2, "refused": 1}
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[-2:] == ["psnr >= 17", "closest: 60.0%"]


def test_report_has_a_panel_for_each_metric():
    rows = [row | {"psnr lost alone": 1.5, "accuracy lost alone": 0.1} for row in REPORT]
    figure = figures.report(rows)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "channels removed, %",
        "psnr lost alone",
        "accuracy lost alone",
    ]
    assert [bar.get_width() for bar in figure.axes[1].patches] == [1.5, 1.5]


def test_psnr_against_removed_splits_by_fine_tuning():
    base = {
        "model": "autoencoder",
        "dataset": "digits",
        "target_kind": "parameters",
        "n": 3,
        "device": "cpu",
    }
    base |= {"metric_sd": 0.1, "dense_metric": 20.0, "method": "component_aware"}
    rows = [
        base | {"reading": "", "stage": "", "target": 0.5, "metric": 18.0},
        base | {"reading": "", "stage": "", "target": 0.7, "metric": 16.0},
        base | {"reading": "", "stage": "fine-tuned", "target": 0.7, "metric": 19.0},
        base
        | {
            "reading": "by component",
            "stage": "",
            "method": "uniform",
            "target": 0.5,
            "metric": 11.0,
        },
    ]
    figure = figures.psnr_against_removed(pd.DataFrame(rows), "autoencoder", "digits")
    assert [axes.get_title() for axes in figure.axes] == ["after pruning", "fine-tuned"]
    first, second = (axes.containers for axes in figure.axes)
    assert [line.get_label() for line in first] == [
        "soft coefficients",
        "uniform share, by component",
    ]
    assert second[0].lines[0].get_xydata().tolist() == [[70, 19]]
    with pytest.raises(InputError, match="no finished run"):
        figures.psnr_against_removed(pd.DataFrame(rows), "autoencoder", "mnist")
