import math

import pytest
import torch
from conftest import one_line
from torch import nn

from prunestudy import measure, models
from prunestudy.errors import InputError
from prunestudy.measure import Application, Metric, task_metrics

HIGH = Metric("score", "higher", lambda model, data: model.value)
LOW = Metric("error", "lower", lambda model, data: 1 - model.value)


class Valued(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value


def test_a_constraint_is_read_and_says_by_how_much_it_is_broken():
    limit, low, other = Application(
        [HIGH, LOW], [" score >= 0.95 ", "error <= -2e1", "error <= .5"]
    ).constraints
    assert (limit.name, limit.limit) == ("score", 0.95)
    assert str(limit) == "score >= 0.95"
    assert limit.share(0.9) == pytest.approx(0.05 / 0.95)
    assert limit.share(0.95) == 0
    assert low.share(-19.0) == 1 / 20
    assert other.share(0.75) == 0.5


def test_a_broken_limit_is_named_with_its_amount():
    app = Application([HIGH, LOW], ["score >= 0.9", "error <= 0.5", "score >= 0.25"])
    judged = app.judge(Valued(0.25), [])
    assert judged.values == {"score": 0.25, "error": 0.75}
    assert [(str(c), by) for c, by in judged.broken] == [
        ("score >= 0.9", pytest.approx(0.65)),
        ("error <= 0.5", 0.25),
    ]
    assert not judged.holds
    assert judged.shortfall == pytest.approx(0.65 / 0.9 + 0.5)
    assert str(judged) == (
        "score >= 0.9 is broken by 0.65 (score is 0.25), "
        "error <= 0.5 is broken by 0.25 (error is 0.75)"
    )
    assert app.judge(Valued(0.95), []).holds
    assert app.judge(Valued(math.nan), []).shortfall == math.inf


def test_what_a_change_costs():
    app = Application([HIGH, LOW])
    before, after = app.judge(Valued(0.95), []), app.judge(Valued(0.75), [])
    assert app.cost(before, after) == pytest.approx({"score": 0.2, "error": 0.2})
    assert app.objective is HIGH
    assert LOW.better(0.1, 0.2)
    assert HIGH.better(0.1, math.nan)
    assert not HIGH.better(math.nan, 0.1)


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ("score > 0.9", "a metric, >= or <=, and a number"),
        ("score >= nan", "a metric, >= or <=, and a number"),
        ("score >= 1e999", "a metric, >= or <=, and a number"),
        ("score >= high", "a metric, >= or <=, and a number"),
        (0.9, "a metric, >= or <=, and a number"),
        ("psnr >= 20", "metrics are error, score"),
        ("score <= 0.9", "higher score is better"),
        ("error >= 0.9", "lower error is better"),
    ],
)
def test_bad_constraints_are_refused(constraint, words):
    with pytest.raises(InputError, match=f"constraint = {constraint!r}: {words}") as caught:
        Application([HIGH, LOW], [constraint])
    assert one_line(caught)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "metrics = .*at least one"),
        (([HIGH, HIGH],), "metrics = .*each name once"),
    ],
)
def test_bad_applications_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        Application(*arguments)


def test_psnr_is_of_the_mean_error_and_its_smooth_form_is_the_same_number():
    task = measure.task("reconstruct", (0.5,), (0.25,))
    (psnr,) = task_metrics(task, 10)
    net = nn.Identity()
    # Pixels x / 4 + 1 / 2 against the output x: errors of 1/2 and of 1/8 in the two images.
    x = torch.tensor([0.0, 0.5]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    data, mse = [(x, torch.zeros(2, dtype=torch.long))], (0.5**2 + 0.125**2) / 2
    assert psnr.function(net, data) == pytest.approx(-10 * math.log10(mse), abs=1e-5)
    assert float(psnr.smooth(net(x), *data[0])) == pytest.approx(-10 * math.log10(mse), abs=1e-5)


def test_both_metrics_of_an_autoencoder_with_a_classifier():
    torch.manual_seed(0)
    net = models.build("autoencoder_classifier", (1, 8, 8), 10)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    metrics = task_metrics(measure.task("reconstruct_and_classify", (0.3,), (0.4,)), 10)
    assert [metric.name for metric in metrics] == ["psnr", "accuracy"]
    values = Application(metrics).judge(net, [(x, y)]).values
    assert values["accuracy"] == (net(x)[1].argmax(1) == y).float().mean().item()
    sure = nn.functional.one_hot(y, 10) * 100.0
    assert float(metrics[1].smooth((x, sure), x, y)) == pytest.approx(1.0)
    (alone,) = task_metrics(measure.task("classify"), 10)
    assert alone.function(lambda_net(sure), [(x, y)]) == 1.0


def test_metrics_of_a_segmentation_leave_out_pixels_without_a_label():
    task = measure.task("segment")
    metrics = task_metrics(task, 3)
    assert [metric.name for metric in metrics] == ["miou", "accuracy"]
    # Row by row: class 0 is found in 1 of 2 pixels, class 1 in all, and one pixel has no label.
    y = torch.tensor([[[0, 0, 1], [1, 1, 255]]])
    guess = torch.tensor([[[0, 1, 1], [1, 1, 2]]])
    sure = nn.functional.one_hot(guess, 3).movedim(-1, 1) * 100.0
    x = torch.zeros(1, 3, 2, 3)
    values = Application(metrics).judge(lambda_net(sure), [(x, y)]).values
    assert values == pytest.approx({"miou": (1 / 2 + 3 / 4) / 2, "accuracy": 4 / 5})
    for metric in metrics:
        assert float(metric.smooth(sure, x, y)) == pytest.approx(values[metric.name])
    unsure = sure.div(100).requires_grad_()
    metrics[0].smooth(unsure, x, y).backward()
    assert unsure.grad[0, :, 1, 2].abs().max() == 0
    assert unsure.grad[0, 0, 0, 1] > 0


def lambda_net(output):
    net = nn.Identity()
    net.forward = lambda x: output
    return net
