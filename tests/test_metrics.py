"""Metrics by name, their smooth forms, and limits on them."""

import math

import pytest
import torch
from conftest import one_line
from torch import nn

from prunestudy import measure, models
from prunestudy.errors import InputError
from prunestudy.measure import limits, task_metrics

KNOWN = {"score": 0.25, "error": 0.75}


def test_a_constraint_is_read_and_says_by_how_much_it_is_broken():
    limit, low, other = limits([" score >= 0.95 ", "error <= -2e1", "error <= .5"], KNOWN)
    assert (limit.metric, limit.value, str(limit)) == ("score", 0.95, "score >= 0.95")
    assert limit.shortfall(0.9) == pytest.approx(0.05 / 0.95)
    assert limit.shortfall(0.95) == limit.shortfall(0.99) == 0
    assert limit.shortfall(math.nan) == math.inf
    assert low.shortfall(-19.0) == 1 / 20
    assert other.share(0.75) == 0.5
    assert other.share(0.25) == -0.5
    assert limit.broken(0.9) == "score >= 0.95 is broken by 0.05 (score is 0.9)"
    assert other.broken(0.75) == "error <= 0.5 is broken by 0.25 (error is 0.75)"
    value = torch.tensor(0.5, requires_grad=True)
    other.share(value).backward()
    assert value.grad == 2


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ("score > 0.9", "a metric, >= or <=, and a number"),
        ("score >= nan", "a metric, >= or <=, and a number"),
        ("score >= high", "a metric, >= or <=, and a number"),
        ("psnr >= 20", "metrics are error, score"),
    ],
)
def test_bad_constraints_are_refused(constraint, words):
    with pytest.raises(InputError, match=f"constraint = {constraint!r}: {words}") as caught:
        limits([constraint], KNOWN)
    assert one_line(caught)


def test_constant_images_are_scored_on_images_that_they_were_not_made_of():
    train = torch.tensor([0, 102], dtype=torch.uint8).view(2, 1, 1, 1)
    test = torch.tensor([51, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    # Pixels 0.2 and 1 against 0, and against the mean 0.2.
    black, mean = -10 * math.log10((0.04 + 1) / 2), -10 * math.log10(0.64 / 2)
    expected = {"black image": pytest.approx(black), "mean image": pytest.approx(mean)}
    assert measure.constant_psnr(train, test) == expected


def test_psnr_is_of_the_mean_error_and_its_smooth_form_is_the_same_number():
    metrics = task_metrics(measure.task("reconstruct", (0.5,), (0.25,)), 10)
    net = nn.Identity()
    # Pixels x / 4 + 1 / 2 against the output x: errors of 1/2 and of 1/8 in the two images.
    x = torch.tensor([0.0, 0.5]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    data, mse = [(x, torch.zeros(2, dtype=torch.long))], (0.5**2 + 0.125**2) / 2
    expected = pytest.approx(-10 * math.log10(mse), abs=1e-5)
    assert metrics.values(net, data) == {"psnr": expected}
    assert float(metrics.smooth["psnr"](net(x), *data[0])) == expected


def test_both_metrics_of_an_autoencoder_with_a_classifier():
    torch.manual_seed(0)
    net = models.build("autoencoder_classifier", (1, 8, 8), 10)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    metrics = task_metrics(measure.task("reconstruct_and_classify", (0.3,), (0.4,)), 10)
    values = metrics.values(net, [(x, y)])
    assert list(values) == list(metrics.smooth) == ["psnr", "accuracy"]
    assert values["accuracy"] == (net(x)[1].argmax(1) == y).float().mean().item()
    sure = nn.functional.one_hot(y, 10) * 100.0
    assert float(metrics.smooth["accuracy"]((x, sure), x, y)) == pytest.approx(1.0)
    alone = task_metrics(measure.task("classify"), 10)
    assert alone.values(lambda_net(sure), [(x, y)]) == {"accuracy": 1.0}


def test_metrics_of_a_segmentation_leave_out_pixels_without_a_label():
    metrics = task_metrics(measure.task("segment"), 3)
    # Row by row: class 0 is found in 1 of 2 pixels, class 1 in all, and one pixel has no label.
    y = torch.tensor([[[0, 0, 1], [1, 1, 255]]])
    guess = torch.tensor([[[0, 1, 1], [1, 1, 2]]])
    sure = nn.functional.one_hot(guess, 3).movedim(-1, 1) * 100.0
    x = torch.zeros(1, 3, 2, 3)
    values = metrics.values(lambda_net(sure), [(x, y)])
    assert values == pytest.approx({"miou": (1 / 2 + 3 / 4) / 2, "accuracy": 4 / 5})
    for name, smooth in metrics.smooth.items():
        assert float(smooth(sure, x, y)) == pytest.approx(values[name])
    unsure = sure.div(100).requires_grad_()
    metrics.smooth["miou"](unsure, x, y).backward()
    assert unsure.grad[0, :, 1, 2].abs().max() == 0
    assert unsure.grad[0, 0, 0, 1] > 0


def lambda_net(output):
    net = nn.Identity()
    net.forward = lambda x: output
    return net
