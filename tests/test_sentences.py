"""Sentences from made-up records: numbers, directions, and what is not there."""

from types import SimpleNamespace

import pytest

from prunestudy.errors import InputError
from prunestudy.papers import card
from prunestudy.study import sentences
from prunestudy.study.plan import Planned
from prunestudy.study.settings import Target

LOSES = {"dense": (0.90, 0.92, 0.94), "magnitude": (0.80, 0.83, 0.83), "random": (0.10, 0.93, 0.5)}


class _Store:
    """Records of three seeds on lenet5 and MNIST, of 90% of weights removed where pruned."""

    def __init__(self, scores, **changed):
        self.scores, self.changed = scores, changed
        self.planned = [
            Planned("sparse_gates", "e", "results", self._settings(method, seed, target), reading)
            for label in scores
            for method, _, reading in [label.partition(", ")]
            for target in ([None] if method == "dense" else [0.9, 0.95])
            for seed in range(3)
        ]

    def _settings(self, method, seed, target):
        aim = target and Target(kind="sparsity", value=target)
        return SimpleNamespace(
            method=method, seed=seed, epochs=1, model="lenet5", dataset="mnist", aim=aim
        )

    def read_all(self, settings):
        score = self.scores[settings.method][settings.seed]
        if settings.aim and settings.aim.value == 0.95:
            score -= 0.5
        record = {
            "status": "done",
            "environment": {"device": "cpu"},
            "metrics": {"metric": score, "metric_name": "top1"},
            "latency": {"ms": {"dense_latency_b1_ms": 3.0, "latency_b1_ms": 2.0}},
            "history": {"phase": ["gates", "gates", "fine_tune"], "open": [0.3, 0.2, 0.0]},
        }
        if settings.seed > 0:
            record["latency"] = None
        return [record | self.changed.get(f"{settings.method}_{settings.seed}", {})]


def _says(store, *words, **what):
    return sentences.says(store, store.planned, card("sparse_gates"), *words, **what)


def test_a_comparison_has_mean_interval_number_and_direction():
    """Differences -10, -9, -11: mean -10, sd 1, half width 4.303 / sqrt(3) = 2.484."""
    made = _says(_Store(LOSES), "magnitude", "dense", target=0.9, then={"below": "So no."})
    assert made == (
        "LeNet-5 on MNIST, 90% of weights removed: the test accuracy of one-shot magnitude is "
        "below that of dense: -10.00 points [-12.48, -7.52], n = 3. So no."
    )
    assert made.direction == "below"
    turned = _says(
        _Store(LOSES | {"dense": LOSES["magnitude"], "magnitude": LOSES["dense"]}),
        "magnitude",
        "dense",
        target=0.9,
        then={"below": "So no."},
    )
    assert turned.direction == "above"
    assert turned.endswith("is above that of dense: +10.00 points [+7.52, +12.48], n = 3.")
    level = _says(_Store(LOSES), "random", "magnitude", target=0.9)
    assert level.direction == "level"
    assert "is not told apart from that of one-shot magnitude: -31.00 points" in level


def test_several_settings_are_counted_in_one_sentence():
    made = _says(_Store(LOSES), "magnitude", "dense")
    assert made == (
        "Test accuracy, one-shot magnitude against dense, in 2 settings: above in 0, below in 2, "
        "not told apart in 0; from -60.00 points [-62.48, -57.52], n = 3 (LeNet-5 on MNIST, 95% "
        "of weights removed), to -10.00 points [-12.48, -7.52], n = 3 (LeNet-5 on MNIST, 90% of "
        "weights removed)."
    )
    store = _Store({"dense": (0.5, 0.5, 0.5), "magnitude": (0.6, 0.61, 0.62)})
    assert _says(store, "magnitude", "dense", then={"mixed": "It depends."}).endswith("It depends.")


def test_a_direction_of_some_settings_says_of_how_many():
    """-12, -2 and -7 points at 90%, the same minus 50 at 95%: only there below."""
    store = _Store({"dense": (0.9, 0.9, 0.9), "magnitude": (0.78, 0.88, 0.83)})
    made = _says(store, "magnitude", "dense", then={"below": "So no."})
    assert made.direction == "below"
    assert made.endswith(" In 1 of 2 settings no; the others leave it open.")
    assert _says(_Store(LOSES), "magnitude", "dense", then={"below": "So."}).endswith(" So.")


def test_failed_runs_are_named_and_other_devices_not_paired():
    store = _Store(LOSES, dense_2={"status": "diverged"})
    made = _says(store, "magnitude", "dense", target=0.9)
    assert "-9.50 points [-15.85, -3.15], n = 2, 1 failed." in made
    store = _Store(LOSES, dense_2={"environment": {"device": "cuda"}})
    assert "n = 2." in _says(store, "magnitude", "dense", target=0.9)


def test_other_quantities_are_said_in_the_same_way():
    store, at = _Store(LOSES), {"target": 0.9}
    made = _says(store, "magnitude", of=sentences.speed_up(1), than=1, **at)
    assert made.endswith(
        "measured speed-up on 1 image of one-shot magnitude beside 1x is 1.50x, one seed."
    )
    assert made.direction == ""
    share = sentences.when_trained("open", "share of open gates", "gates", "%", 100)
    assert _says(store, "magnitude", of=share, than=10, **at).direction == "above"
    assert "is 20.00% [20.00, 20.00], n = 3." in _says(store, "magnitude", of=share, **at)
    less = share.minus(sentences.metric("metric", "accuracy", "%", 100), "difference")
    assert "is -62.00 points [" in _says(store, "magnitude", of=less, **at)
    assert sentences.metric("ratio", "ratio")({"metrics": {}}) is None
    one = _says(store, "magnitude", of=sentences.speed_up(1))
    assert one.endswith("one-shot magnitude, in 2 settings: 1.50x, one seed in each.")


@pytest.mark.parametrize(
    ("words", "what", "says"),
    [
        (
            ("gdp", "dense"),
            {},
            "This profile has no runs for the score of GDP against dense.",
        ),
        (
            ("magnitude", "l1"),
            {"model": "lenet5", "dataset": "mnist", "target": 0.9},
            "This profile has no runs for the score of one-shot magnitude against L1 (LASSO) on "
            "LeNet-5 on MNIST, 90% of weights removed.",
        ),
        (
            ("magnitude",),
            {"of": sentences.speed_up(128), "dataset": "digits"},
            "This profile has no runs for the measured speed-up on 128 images of one-shot "
            "magnitude on digits.",
        ),
        (
            ("magnitude",),
            {"kind": "macs"},
            "This profile has no runs for the score of one-shot magnitude at targets on MACs.",
        ),
        (
            ("magnitude",),
            {"of": sentences.metric("bytes", "bytes"), "target": 0.9},
            "The records of this profile do not hold the bytes of one-shot magnitude at 90% of "
            "weights removed.",
        ),
        (
            ("magnitude",),
            {"of": sentences.metric("bytes", "bytes"), "than": 2},
            "The records of this profile do not hold the bytes of one-shot magnitude.",
        ),
        (
            ("magnitude",),
            {"than": "published"},
            "Nothing is published in this profile's settings beside the score of one-shot "
            "magnitude.",
        ),
    ],
)
def test_what_is_not_there_is_said(words, what, says):
    made = _says(_Store(LOSES), *words, **what)
    assert made.lower() == says.lower() and made.direction == ""


def test_a_cell_shows_one_line_for_all_that_has_no_runs(monkeypatch):
    cells, shown = iter([SimpleNamespace(execution_count=c) for c in (1, 1, 1, 1, 2)]), []
    monkeypatch.setattr("IPython.get_ipython", lambda: next(cells))
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    store = _Store(LOSES)
    there, unpublished = _says(store, "magnitude"), _says(store, "magnitude", than="published")
    for made in (_says(store, "gdp"), there, unpublished, _says(store, "l1"), _says(store, "gdp")):
        made._ipython_display_()
    quiet = "*Not shown: what this profile did not run.*"
    assert [data["text/markdown"] for data in shown] == [quiet, there, unpublished, quiet]


@pytest.mark.parametrize("wrong", [{"than": "x"}, {"modell": "lenet5"}])
def test_what_cannot_be_asked_is_refused_in_one_line(wrong):
    with pytest.raises(InputError, match=r"x|modell") as refused:
        _says(_Store(LOSES), "magnitude", **wrong)
    assert "\n" not in str(refused.value)
