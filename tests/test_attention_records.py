import copy
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import child_run, small_run, tree

from prunestudy.errors import InputError
from prunestudy.papers import card
from prunestudy.study import figures
from prunestudy.study.figures import papers as drawings
from prunestudy.study.lines import line_of
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner
from prunestudy.train import Recipe

CUT = "magnitude_attention"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Settings, record and folder of results of a run, trained once."""
    made, results = small_run(CUT, 0.9, epochs=3, p_period=4), tmp_path_factory.mktemp("results")
    return made, Runner(Store("custom", results), device="cpu").ensure(made), results


@pytest.fixture
def done(trained, store):
    """Settings and record of that run, and a copy of it in `store`."""
    made, record, results = trained
    shutil.copytree(results, store.folder.parent, dirs_exist_ok=True)
    return made, record


def test_figures_of_a_run(done, store):
    run = done[0].run
    arrays = store.arrays(run)
    (panel,) = drawings.flow(store, {"magnitude_attention": run}).axes
    steps = [part.get_data() for part in panel.patches]
    assert [s.edges.tolist() for s in steps] == [[0, *arrays["trail_step"].tolist()]] * 2
    heights = np.array([s.values for s in steps]) * arrays["trail_size"].sum() / 100
    returned, cut = heights.round().astype(int)
    assert returned.tolist() == arrays["trail_returned"].sum(1).tolist()
    assert (-cut).tolist() == arrays["trail_cut"].sum(1).tolist()
    start, *_, end = drawings.attention_histograms(store, run).axes
    assert (start.get_title(), end.get_title()) == ("at the start", "after epoch 3")
    of_all, of_kept = (part.get_data().values for part in end.patches)
    assert (of_all.sum(), of_kept.sum()) == pytest.approx((1, 0.1), abs=1e-3)
    plt.close("all")


@pytest.mark.parametrize(("random", "cut"), [(0.82, False), (0.1, True)])
def test_a_figure_says_that_values_are_cut_off_only_where_some_are(random, cut):
    row = {"model": "lenet5", "dataset": "mnist", "variant": "", "target_kind": "sparsity"}
    row |= {"device": "cpu"}
    row |= {"metric_name": "top1", "metric_sd": 0.0, "dense_metric": 0.9, "n": 3}
    values = {(CUT, 0.95): 0.88, (CUT, 0.98): 0.8, ("random", 0.95): random}
    rows = [
        row | {"method": method, "target": target, "sparsity": target, "metric": metric}
        for (method, target), metric in values.items()
    ]
    (axes,) = figures.metric_against_target(pd.DataFrame(rows), card(CUT), "lenet5", "mnist").axes
    assert axes.get_ylim() == pytest.approx((79, 90.5))
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert ("(values below the frame are cut off)" in labels) == cut
    plt.close("all")


def test_a_legend_says_from_how_many_seeds_the_points_of_a_line_are():
    row = {"model": "lenet5", "dataset": "mnist", "variant": "", "target_kind": "sparsity"}
    row |= {"device": "cpu"}
    row |= {"metric_name": "top1", "metric": 0.8, "metric_sd": 0.0, "dense_metric": 0.9}
    counts = {(CUT, 0.95): 1, (CUT, 0.98): 3, ("dpf", 0.95): 2, ("dpf", 0.98): 2}
    rows = [
        row | {"method": method, "target": target, "sparsity": target, "n": n}
        for (method, target), n in counts.items()
    ]
    (axes,) = figures.metric_against_target(pd.DataFrame(rows), card(CUT), "lenet5", "mnist").axes
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert [label.rpartition(" (")[2] for label in labels[1:]] == ["n = 1 to 3)", "n = 2)"]
    plt.close("all")


def test_a_record_from_before_a_parameter_existed_is_still_the_run(runner, store):
    made = child_run("magnitude", 0.9)
    record = runner.ensure(made)
    path = store.path(made.run) / "record.json"
    older = copy.deepcopy(record)
    del older["settings"]["params"]["scope"]
    path.write_text(line_of(older) + "\n", encoding="utf-8")
    found = tree(store.folder)
    assert store.read(made)["settings"] == older["settings"]
    assert runner.ensure(made) == store.read(made)
    assert tree(store.folder).keys() == found.keys()
    older["settings"]["params"]["scope"] = "convolutions"
    path.write_text(line_of(older) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="was made with other settings"):
        store.read(made)


def test_new_settings_of_old_methods_leave_the_names_of_their_runs():
    made = small_run("magnitude", 0.9)
    assert "scope" in made.params
    assert made.model_copy(update={"params": {}}).run == made.run
    plain = made.recipe.model_dump(exclude={"warmup_from"})
    assert made.model_copy(update={"recipe": Recipe(**plain)}).run == made.run
