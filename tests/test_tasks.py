"""The tasks: losses and metrics on outputs small enough to count by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from torch import nn
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_jaccard_index
from torchmetrics.image import PeakSignalNoiseRatio

from prunestudy import measure
from prunestudy.measure.boundary import boundary_f1


class Fixed(nn.Module):
    """Returns its input: the logits are what the test puts in."""

    def forward(self, x):
        return x


CLASSIFY = measure.task("classify")


def test_quality_by_hand():
    first = torch.tensor([[0.0, 0.0, -math.inf], [0.0, math.log(3), -math.inf]])
    batches = [(first, torch.tensor([0, 1])), (first[1:], torch.tensor([0]))]
    found = CLASSIFY.evaluate(Fixed(), batches, 3)
    assert (found.metric, found.count) == (2 / 3, 3)
    assert found.loss == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3, rel=1e-6)
    assert found.more["macro_f1"] == pytest.approx(2 / 3, rel=1e-12)


def test_top5_by_hand():
    falling = torch.arange(7, 0, -1.0).repeat(4, 1)  # the likeliest class is 0, then 1, ...
    found = CLASSIFY.evaluate(Fixed(), [(falling, torch.tensor([0, 4, 5, 6]))], 7)
    assert (found.metric, found.more["top5"]) == (0.25, 0.5)
    few = [(falling[:, :5], torch.tensor([0, 1, 3, 4]))]
    assert "top5" not in CLASSIFY.evaluate(Fixed(), few, 5).more


@pytest.mark.parametrize("classes", [3, 10])
def test_macro_f1_is_that_of_torchmetrics(classes):
    torch.manual_seed(0)
    for seen in (2, classes - 1, classes):
        y = torch.randint(seen, (40,))
        logits = torch.randn(40, classes)
        found = CLASSIFY.evaluate(Fixed(), zip(logits.split(7), y.split(7), strict=True), classes)
        want = multiclass_f1_score(logits, y, classes, average="macro")
        assert found.more["macro_f1"] == pytest.approx(float(want), rel=1e-6)
        assert found.metric == pytest.approx(float((logits.argmax(1) == y).float().mean()))
        assert found.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-6)


def test_psnr_is_that_of_torchmetrics():
    torch.manual_seed(0)
    task, theirs = measure.task("reconstruct", (0.3,), (0.4,)), PeakSignalNoiseRatio(data_range=1.0)
    x = torch.randn(40, 1, 8, 8)
    for part in x.split(7):
        theirs.update(part, part * 0.4 + 0.3)
    found = task.evaluate(Fixed(), [(part, part) for part in x.split(7)])
    assert (found.metric, found.count) == (float(theirs.compute()), 40)
    assert found.loss == pytest.approx(float(task.loss(x, x, x)), rel=1e-5)


def test_evaluate_puts_every_mode_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), nn.BatchNorm1d(2))
    net.train()
    net[2].eval()
    CLASSIFY.evaluate(net, [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))], 2)
    assert [m.training for m in net.modules()] == [True, True, True, False]
    refused(lambda: CLASSIFY.evaluate(net, [], 2), "batches = 0")
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert net[2].num_batches_tracked == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite(value):
    found = CLASSIFY.evaluate(Fixed(), [(torch.full((4, 3), value), torch.tensor([0, 1, 2, 2]))], 3)
    assert not math.isfinite(found.loss)
    assert 0 <= found.metric <= 1
    assert found.count == 4


def test_evaluate_refuses():
    for width, labels, classes, word in [
        (2, [0, 2], 2, "labels = (0, 2)"),
        (2, [-1, 0], 2, "labels = (-1, 0)"),
        (3, [0, 1], 2, "output = (2, 3)"),
        (2, [0, 1], 0, "num_classes = 0"),
    ]:
        batches = [(torch.eye(2, width), torch.tensor(labels))]
        refused(lambda: CLASSIFY.evaluate(Fixed(), batches, classes), word)  # noqa: B023
    refused(lambda: measure.task("sort"), "task = 'sort'", "segment")


def test_labels_of_many_classes_and_of_bytes():
    logits, labels = torch.eye(300)[[0, 255, 255]], torch.tensor([0, 255, 0], dtype=torch.uint8)
    found = CLASSIFY.evaluate(Fixed(), [(logits, labels)])
    assert (found.metric, found.count) == (2 / 3, 3)  # 255 is a class like others
    assert found.loss == pytest.approx(float(CLASSIFY.loss(logits, logits, labels)), rel=1e-6)


def test_loss_and_scores_of_images_with_classes():
    task, x = measure.task("reconstruct_and_classify", (0.5,), (0.5,)), torch.ones(4, 1, 2, 2)
    y = torch.tensor([0, 1, 0, 0])
    output = torch.full_like(x, 0.9), torch.eye(2)[[0, 0, 0, 1]]
    net = Fixed()
    net.forward = lambda _: output
    found = task.evaluate(net, [(x, y)], 2)
    assert found.metric == pytest.approx(20, abs=1e-4)  # of an MSE of 0.01
    assert (found.more["top1"], task.metric_name) == (0.5, "psnr")
    entropy = float(F.cross_entropy(output[1], y))
    assert found.loss == pytest.approx(0.01 + 0.1 * entropy, rel=1e-5)
    assert float(task.loss(output, x, y)) == pytest.approx(0.01 + 0.1 * entropy, rel=1e-5)


def masks_of(mask, classes):
    return math.log(3) * F.one_hot(torch.tensor(mask), classes).movedim(-1, 1).float()


SEGMENT = measure.task("segment")


def test_loss_is_that_of_the_labelled_pixels():
    output = masks_of([[[0, 1], [1, 0]]], 2).requires_grad_(True)
    y = torch.tensor([[[0, 0], [255, 255]]])
    loss = SEGMENT.loss(output, output, y)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=1e-6)
    loss.backward()
    assert output.grad[:, :, 1].count_nonzero() == 0


def test_mean_iou_by_hand():
    batches = [
        (masks_of([[[0, 0], [1, 1]]], 4), torch.tensor([[[0, 1], [1, 255]]])),
        (masks_of([[[2, 2], [0, 0]]], 4), torch.tensor([[[2, 2], [255, 2]]])),
    ]
    found = SEGMENT.evaluate(Fixed(), batches, 4)
    # Of the pixels that are 0 or were called so one of three is right, of 1 one of two, of 2 two of
    # three; the fourth class does not occur.
    assert found.metric == pytest.approx((1 / 3 + 1 / 2 + 2 / 3) / 3, rel=1e-6)
    assert found.more["pixel_accuracy"] == 4 / 6
    right = math.log(3 + 3) - math.log(3)  # -log softmax of ln 3 among zeros, four classes
    assert found.loss == pytest.approx((4 * right + 2 * math.log(6)) / 6, rel=1e-6)
    assert (found.count, SEGMENT.metric_name) == (2, "miou")


def test_mean_iou_is_that_of_torchmetrics():
    torch.manual_seed(0)
    logits, y = torch.randn(6, 5, 8, 8), torch.randint(0, 4, (6, 8, 8))
    y[torch.rand(6, 8, 8) < 0.2] = 255
    found = SEGMENT.evaluate(Fixed(), zip(logits.split(4), y.split(4), strict=True), 5).metric
    theirs = multiclass_jaccard_index(logits, y, 5, ignore_index=255)
    assert found == pytest.approx(float(theirs), rel=1e-6)
    wrong = [(logits, y.where(y < 255, 7))]
    refused(lambda: SEGMENT.evaluate(Fixed(), wrong, 5), "labels = (0, 7): 0..4")
    batches = [(masks_of([[[0, 1]]], 2), torch.full((1, 1, 2), 255))]
    refused(lambda: SEGMENT.evaluate(Fixed(), batches, 2), "at least one pixel with a label")


def square(left, side=16):
    """A class 1 from column `left` on, in a mask of 0."""
    mask = torch.zeros(side, side, dtype=torch.int64)
    mask[:, left:] = 1
    return mask


def test_boundary_f1_counts_within_the_tolerance():
    # The diagonal of 16x16 is 22.6: two columns are 8.84% of it.
    assert boundary_f1(square(6), square(6)) == 1.0
    assert boundary_f1(square(8), square(6), tolerance=0.089) == 1.0
    assert boundary_f1(square(8), square(6), tolerance=0.088) == 0.0
    assert boundary_f1(square(7), square(6)) == 0.0  # 0.75% is less than a pixel here


def test_boundary_f1_by_hand():
    true = torch.zeros(8, 8, dtype=torch.int64)
    true[2:6, 2:6] = 1
    predicted = true.clone()
    predicted[5, 2:6] = 0  # the lowest row is missed
    # Class 1: 12 contour pixels of the square, 10 of what is 3x4, 8 the same. Class 0: 16 pixels
    # beside the square, 14 beside the other, 10 the same.
    one = 2 * (8 / 10) * (8 / 12) / (8 / 10 + 8 / 12)
    zero = 2 * (10 / 14) * (10 / 16) / (10 / 14 + 10 / 16)
    assert boundary_f1(predicted, true) == pytest.approx((one + zero) / 2, rel=1e-12)


def test_classes_with_a_contour_in_one_mask_only_score_zero():
    plain = torch.zeros(16, 16, dtype=torch.int64)
    assert math.isnan(boundary_f1(plain, plain))
    assert boundary_f1(square(6), plain) == 0.0
    three = square(6)
    three[:, 12:] = 2
    # 0 is as it should be; of 1's two columns one is true; 2 is in one mask only.
    expected = (1 + 2 * 0.5 / 1.5 + 0) / 3
    assert boundary_f1(three, square(6)) == pytest.approx(expected, rel=1e-12)


def test_pixels_without_a_label_decide_nothing():
    true = square(6)
    true[:, 5:8] = 255
    assert math.isnan(boundary_f1(square(7), true))  # the ring is no contour
    true = square(6)
    true[:8, 5:8] = 255
    # Below the ring the contour is columns 5 and 6; 8 rows have it, the ring's own border none.
    assert boundary_f1(square(6), true) == 1.0
    assert boundary_f1(square(8), true) == 0.0
    within = square(6)
    within[:8, 5:8] = 2
    assert boundary_f1(within, true) == 1.0


def test_boundary_f1_of_a_set_is_the_mean_of_its_images():
    masks = torch.stack([square(6), square(6), torch.zeros(16, 16, dtype=torch.int64)])
    guess = torch.stack([square(6), square(9), masks[2]])
    found = SEGMENT.evaluate(Fixed(), [(masks_of(guess.tolist(), 2), masks)], 2)
    assert found.more["boundary_f1"] == 0.5
