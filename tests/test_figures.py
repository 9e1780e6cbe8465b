"""Figures from made-up runs: what is drawn is what was given."""

import io

import numpy as np
import pandas as pd
import pytest
from conftest import one_line, small_run
from IPython.core.pylabtools import print_figure
from matplotlib import pyplot as plt
from PIL import Image

from prunestudy.errors import InputError
from prunestudy.papers import card
from prunestudy.study import figures
from prunestudy.study.figures import papers
from prunestudy.study.session import Session


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


class Runs:
    """A store whose runs all have the same arrays."""

    def __init__(self, **arrays):
        self.held = arrays

    def arrays(self, run):
        return self.held

    def require(self, run):
        return {"metrics": {"channels": {"conv1": 2, "fc1": 1}, "met_at": 0.5, "kept_scale": 1.5}}

    def history(self, run):
        return [{"phase": phase} for phase in ("gates", "gates", "gates", "weights")]


ROW = {"model": "autoencoder", "dataset": "digits", "device": "cpu", "n": 3, "variant": ""}
FLOORS = {"digits": {"mean image": 12.0}}
PSNR = ROW | {"target_kind": "parameters", "metric_sd": 0.1, "dense_metric": 20.0}


def psnr(reading, target, metric, method="component_aware", stage=""):
    return PSNR | {
        "reading": reading,
        "stage": stage,
        "method": method,
        "target": target,
        "metric": metric,
    }


def test_psnr_against_removed_splits_by_fine_tuning():
    rows = [
        psnr("", 0.5, 18.0),
        psnr("", 0.7, 16.0),
        psnr("", 0.7, 19.0, stage="fine-tuned"),
        psnr("by component", 0.5, 11.0, "uniform"),
        psnr("penalty", 0.5, 1.0),
    ]
    figure = papers.psnr_against_removed(pd.DataFrame(rows), FLOORS, "autoencoder", "digits")
    titles = [axes.get_title().rpartition(", ")[2] for axes in figure.axes]
    assert titles == ["after pruning", "fine-tuned"]
    first, second = (
        {line.get_label(): line[0].get_xydata().tolist() for line in axes.containers}
        for axes in figure.axes
    )
    assert first == {
        "soft coefficients": [[50, 18], [70, 16]],
        "uniform share, by component": [[50, 11]],
    }
    assert second == {"soft coefficients": [[70, 19]]}
    floors = [
        line for axes in figure.axes for line in axes.lines if line.get_label() == "mean image"
    ]
    assert [line.get_ydata() for line in floors] == [[12, 12]] * 2


def test_runs_of_two_devices_are_not_drawn_as_one():
    rows = [psnr("", 0.5, 18.0), psnr("", 0.7, 16.0), psnr("", 0.5, 3.0) | {"device": "GPU"}]
    figure = papers.psnr_against_removed(pd.DataFrame(rows), FLOORS, "autoencoder", "digits")
    (line,) = figure.axes[0].containers
    assert line[0].get_xydata().tolist() == [[50, 18], [70, 16]]


def test_a_figure_of_nothing_is_refused_in_one_line():
    rows = pd.DataFrame([psnr("", 0.5, 18.0)])
    for draw in (
        lambda: papers.psnr_against_removed(rows, FLOORS, "autoencoder", "mnist"),
        lambda: figures.metric_against_target(rows, card("gdp"), "mlp", "mnist"),
        lambda: figures.variants(rows, "component_aware"),
    ):
        with pytest.raises(InputError) as caught:
            draw()
        assert one_line(caught).startswith("figure = ")


def test_variants_have_their_intervals_and_the_number_of_diverged_seeds():
    row = ROW | {"target_kind": "sparsity", "target": 0.9, "metric_name": "top1", "diverged": 0}
    row |= {"method": "sparse_gates", "difference": -0.02}
    row |= {"difference_low": -0.03, "difference_high": 0.0}
    worse = row | {"variant": "lr 1", "difference": -0.025, "diverged": 1}
    figure = figures.variants(pd.DataFrame([row, worse]), "sparse_gates")
    axes = figure.axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["lr 1, n = 3 (1 diverged)", "our reading, n = 3"]
    (container,) = axes.containers
    assert container[0].get_xdata().tolist() == pytest.approx([-2.5, -2])
    (bars,) = container[2]
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert np.array(ends) == pytest.approx(np.array([[-3, 0], [-3, 0]]))


def test_reconstructions_have_a_row_of_pictures_for_each_run():
    pictures = np.arange(48, dtype=np.uint8).reshape(3, 1, 4, 4)
    store = Runs(shown=pictures, output_dense=pictures + 1, output_pruned=pictures + 2)
    axes = papers.reconstructions(store, {"ours, 50%": "a", "uniform, 50%": "b"}).axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["image", "dense", "ours, 50%", "uniform, 50%"]
    assert figures.alt_text(axes.figure) == "images, and what is left of them"
    drawn = np.asarray(axes.images[0].get_array())
    assert drawn.shape == (16, 12)
    assert drawn[:4, 4:8].tolist() == pictures[1, 0].tolist()
    assert (drawn[8:12] == drawn[:4] + 2).all()


def test_gates_are_shown_at_the_first_a_middle_and_the_last_epoch_of_their_training():
    counts = np.array([[1, 1], [1, 3], [0, 4], [4, 0]])
    figure = papers.gate_histograms(Runs(gate_histograms=counts), "a")
    assert [axes.get_title() for axes in figure.axes] == [
        "after epoch 1",
        "after epoch 2",
        "after epoch 3",
    ]
    shares = [axes.patches[0].get_data().values.tolist() for axes in figure.axes]
    assert shares == [[0.5, 0.5], [0.25, 0.75], [0, 1]]
    assert figure.axes[0].get_ylim()[0] <= 1e-3  # else a half and a quarter look far apart


def test_kept_weights_are_drawn_against_their_start():
    store = Runs(kept_start=np.array([0.1, -0.2]), kept_end=np.array([-0.3, 0.1]))
    axes = papers.kept_against_start(store, {"l1": "a"}).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0.1, 0.3], [0.2, 0.1]]
    assert axes.get_title() == "L1 (LASSO): x1.50"


def test_paths_of_gates_are_split_by_group_and_by_what_is_left():
    paths = np.array([[1, 1, 1, 1], [0.5, 0, 1, 0.9]])
    arrays = {"gate_paths": paths, "gate_groups": np.array([0, 0, 0, 1])}
    arrays |= {"gate_steps": np.array([0, 9]), "cost_path": np.array([[1, 0.5], [1, 0.6]])}
    conv, fc, cost = papers.gate_paths(Runs(**arrays), "a").axes
    assert (conv.get_title(), fc.get_title()) == ("conv1: 2 of 3", "fc1: 1 of 1")
    fallen, *kept, met = conv.lines
    assert fallen.get_ydata().tolist() == [1, 0]
    assert [line.get_ydata().tolist() for line in kept] == [[1, 0.5], [1, 1]]
    assert met.get_xdata() == [5, 5]
    assert [line.get_ydata().tolist() for line in cost.lines[:2]] == [[1, 0.6], [1, 0.5]]


def test_gates_on_the_ramp_are_those_of_the_last_step_that_was_kept():
    """Of 100 steps the ramp is 40: its quarters end at 10, 20 and 30."""
    paths = np.array([[1, 1], [1, 0.5], [0.91, 0.11], [1, 0]], dtype=np.float16)
    store = Runs(gate_steps=np.array([0, 10, 25, 99]), gate_paths=paths)
    axes = papers.gates_on_the_ramp(store, "a", 0.4).axes
    assert axes[0].get_title() == "at 25% of the ramp"
    found = [np.flatnonzero(each.patches[0].get_data().values).tolist() for each in axes]
    assert found == [[20, 39], [20, 39], [4, 36], [0, 39]]


def test_gates_before_removal_say_how_many_are_in_between():
    store = Runs(final_gates=np.array([0, 0, 0.3, 1], dtype=np.float16))
    (axes,) = papers.final_gates(store, {"gdp": "a"}).axes
    assert axes.get_title() == "GDP (ours): 25% in (0, 0.5]"
    shares = axes.patches[0].get_data().values
    assert [shares[0], shares[12], shares[-1]] == [0.5, 0.25, 0.25]


def test_what_leaves_and_comes_back_and_how_attention_is_spread(runner, store):
    run = runner.ensure(small_run("magnitude_attention", 0.9, epochs=3, p_period=4))["run"]
    arrays = store.arrays(run)
    (panel,) = papers.flow(store, {"magnitude_attention": run}).axes
    steps = [part.get_data() for part in panel.patches]
    assert [s.edges.tolist() for s in steps] == [[0, *arrays["trail_step"].tolist()]] * 2
    heights = np.array([s.values for s in steps]) * arrays["trail_size"].sum() / 100
    returned, cut = heights.round().astype(int)
    assert returned.tolist() == arrays["trail_returned"].sum(1).tolist()
    assert (-cut).tolist() == arrays["trail_cut"].sum(1).tolist()
    start, *_, end = papers.attention_histograms(store, run).axes
    assert (start.get_title(), end.get_title()) == ("at the start", "after epoch 3")
    of_all, of_kept = (part.get_data().values for part in end.patches)
    assert (of_all.sum(), of_kept.sum()) == pytest.approx((1, 0.1), abs=1e-3)


@pytest.mark.parametrize(("random", "cut"), [(0.82, False), (0.1, True)])
def test_the_legend_says_what_is_cut_off_and_how_many_seeds_a_line_has(random, cut):
    row = ROW | {"model": "lenet5", "dataset": "mnist", "target_kind": "sparsity"}
    row |= {"metric_name": "top1", "metric_sd": 0.0, "dense_metric": 0.9}
    name, lines = "magnitude_attention", []
    for method, target, metric, n in (
        (name, 0.95, 0.88, 1),
        (name, 0.98, 0.8, 3),
        ("random", 0.95, random, 2),
    ):
        own = {"method": method, "target": target, "sparsity": target, "metric": metric, "n": n}
        lines.append(row | own)
    figure = figures.metric_against_target(pd.DataFrame(lines), card(name), "lenet5", "mnist")
    assert figure.axes[0].get_ylim() == pytest.approx((79, 90.5))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("(below the frame: random, down to 10)" in labels) == cut
    ends = {label.rpartition(" (")[2] for label in labels}
    assert {"n = 1 to 3)", "n = 2)"} <= ends


def test_angles_before_and_after_stand_in_one_panel_per_layer():
    names = [f"layer{i}" for i in range(7)]
    before, after = np.eye(36, dtype=int)[[18, 9]] * 4
    arrays = {f"angles_{when}.{n}": c for n in names for when, c in
              (("before", before), ("after", after))}  # fmt: skip
    figure = papers.angles(Runs(**arrays), {"force": "a"}, names)
    assert [axes.get_title() for axes in figure.axes] == ["layer0", "layer2", "layer4", "layer6"]
    shares = [part.get_data().values for part in figure.axes[0].patches]
    assert [(s.argmax(), s.max()) for s in shares] == [(18, 1), (9, 1)]


def test_speed_up_by_macs_and_by_time():
    row = ROW | {"method": "force", "target_kind": "energy", "status": "done"}
    row |= {"macs": 50, "dense_macs": 100, "latency_b1_ms": 4.0, "dense_latency_b1_ms": 2.0}
    runs = pd.DataFrame([row | {"latency_b128_ms": None, "dense_latency_b128_ms": 1.0}])
    axes = papers.speed_up(runs.astype({"latency_b128_ms": float})).axes[0]
    widths = [bar.get_width() for bars in axes.containers[:2] for bar in bars]
    assert widths == [2, 0.5]


def test_a_figure_is_saved_as_one_png(tmp_path):
    figure, (axes,) = figures.canvas()
    axes.plot([1, 2])
    study, pictures = Session("overview", results=tmp_path), []
    for _ in range(2):
        assert study.figure("line", figure) is figure
        (path,) = (tmp_path / "quick/figures").iterdir()
        pictures.append(path.read_bytes())
    assert path.name == "overview_line.png"
    assert pictures[0] == pictures[1]
    path.unlink()
    path.symlink_to("elsewhere")
    with pytest.raises(InputError, match="a regular file, or a name that is not in use"):
        study.figure("line", figure)


# --- in notebooks


def test_alternative_text_is_made_of_titles_axes_and_legends():
    figure, (left, right) = plt.subplots(1, 2)
    assert figures.alt_text(figure) == ""
    left.set(title="gates\nof fc1", xlabel="step", ylabel="gate g")
    left.plot([1, 2], label="kept")
    left.legend()
    right.set(xlabel="layer")
    assert figures.alt_text(figure) == "gates of fc1: gate g against step. layer. kept"
    figure.suptitle("LeNet")
    right.set(xlabel="")
    right.plot([1, 2], label="of all")
    figure.legend(handles=right.lines)
    assert figures.alt_text(figure) == "LeNet. gates of fc1: gate g against step. of all. kept"


def test_figures_in_notebooks_have_a_palette_and_show_the_same():
    figure, axes = plt.subplots()
    axes.imshow(np.linspace(0, 1, 400).reshape(20, 20))
    plain = print_figure(figure, dpi=1.5 * figure.dpi)
    png, shown = figures.shown(figure)
    assert (shown["alt"], len(png) < 0.6 * len(plain)) == ("", True)
    small, large = (Image.open(io.BytesIO(data)) for data in (png, plain))
    assert (small.mode, small.size) == ("P", large.size)
    assert small.size == pytest.approx((1.5 * shown["width"], 1.5 * shown["height"]), abs=1)
    pixels = [np.asarray(picture.convert("RGB"), int) for picture in (small, large)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 0.5
    assert (pixels[0][0, 0] == 255).all()
