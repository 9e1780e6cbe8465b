"""Segmentation: its loss, mean IoU and boundary F1 on masks small enough to count by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import one_line
from torch import nn
from torchmetrics.functional.classification import multiclass_jaccard_index

from prunestudy import measure
from prunestudy.errors import InputError


class Fixed(nn.Module):
    """Returns its input: the logits are what the test puts in."""

    def forward(self, x):
        return x


def logits_of(mask, classes):
    return math.log(3) * F.one_hot(torch.tensor(mask), classes).movedim(-1, 1).float()


TASK = measure.task("segment")


def test_loss_is_that_of_the_labelled_pixels():
    output = logits_of([[[0, 1], [1, 0]]], 2).requires_grad_(True)
    y = torch.tensor([[[0, 0], [255, 255]]])
    loss = TASK.loss(output, output, y)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=1e-6)
    loss.backward()
    assert output.grad[:, :, 1].count_nonzero() == 0
    whole = torch.tensor([[[0, 1], [1, 1]]])
    expected = F.cross_entropy(output, whole)
    assert TASK.loss(output, output, whole).item() == pytest.approx(expected.item(), rel=1e-6)


def test_mean_iou_by_hand():
    batches = [
        (logits_of([[[0, 0], [1, 1]]], 4), torch.tensor([[[0, 1], [1, 255]]])),
        (logits_of([[[2, 2], [0, 0]]], 4), torch.tensor([[[2, 2], [255, 2]]])),
    ]
    found = TASK.evaluate(Fixed(), batches, 4)
    # Of the pixels that are 0 or were called so one of three is right, of 1 one of two, of 2 two of
    # three; the fourth class does not occur.
    assert found.metric == pytest.approx((1 / 3 + 1 / 2 + 2 / 3) / 3, rel=1e-6)
    assert found.more["pixel_accuracy"] == 4 / 6
    right = math.log(3 + 3) - math.log(3)  # -log softmax of ln 3 among zeros, four classes
    assert found.loss == pytest.approx((4 * right + 2 * math.log(6)) / 6, rel=1e-6)
    assert (found.count, TASK.metric_name) == (2, "miou")


def test_mean_iou_is_that_of_torchmetrics():
    torch.manual_seed(0)
    logits, y = torch.randn(6, 5, 8, 8), torch.randint(0, 4, (6, 8, 8))
    y[torch.rand(6, 8, 8) < 0.2] = 255
    found = TASK.evaluate(Fixed(), zip(logits.split(4), y.split(4), strict=True), 5).metric
    theirs = multiclass_jaccard_index(logits, y, 5, ignore_index=255)
    assert found == pytest.approx(float(theirs), rel=1e-6)
    wrong = [(logits, y.where(y < 255, 7))]
    with pytest.raises(InputError, match=r"labels = \(0, 7\): 0..4"):
        TASK.evaluate(Fixed(), wrong, 5)


def test_a_mask_without_labels_is_refused():
    batches = [(logits_of([[[0, 1]]], 2), torch.full((1, 1, 2), 255))]
    with pytest.raises(InputError, match="at least one pixel with a label") as caught:
        TASK.evaluate(Fixed(), batches, 2)
    one_line(caught)


def square(left, side=16):
    """A class 1 from column `left` on, in a mask of 0."""
    mask = torch.zeros(side, side, dtype=torch.int64)
    mask[:, left:] = 1
    return mask


def test_boundary_f1_counts_within_the_tolerance():
    # The diagonal of 16x16 is 22.6: two columns are 8.84% of it.
    assert measure.boundary_f1(square(6), square(6)) == 1.0
    assert measure.boundary_f1(square(8), square(6), tolerance=0.089) == 1.0
    assert measure.boundary_f1(square(8), square(6), tolerance=0.088) == 0.0
    assert measure.boundary_f1(square(7), square(6)) == 0.0  # 0.75% is less than a pixel here


def test_boundary_f1_by_hand():
    true = torch.zeros(8, 8, dtype=torch.int64)
    true[2:6, 2:6] = 1
    predicted = true.clone()
    predicted[5, 2:6] = 0  # the lowest row is missed
    # Class 1: 12 contour pixels of the square, 10 of what is 3x4, 8 the same. Class 0: 16 pixels
    # beside the square, 14 beside the other, 10 the same.
    one = 2 * (8 / 10) * (8 / 12) / (8 / 10 + 8 / 12)
    zero = 2 * (10 / 14) * (10 / 16) / (10 / 14 + 10 / 16)
    assert measure.boundary_f1(predicted, true) == pytest.approx((one + zero) / 2, rel=1e-12)


def test_classes_with_a_contour_in_one_mask_only_score_zero():
    plain = torch.zeros(16, 16, dtype=torch.int64)
    assert math.isnan(measure.boundary_f1(plain, plain))
    assert measure.boundary_f1(square(6), plain) == 0.0
    three = square(6)
    three[:, 12:] = 2
    # 0 is as it should be; of 1's two columns one is true; 2 is in one mask only.
    expected = (1 + 2 * 0.5 / 1.5 + 0) / 3
    assert measure.boundary_f1(three, square(6)) == pytest.approx(expected, rel=1e-12)


def test_pixels_without_a_label_decide_nothing():
    true = square(6)
    true[:, 5:8] = 255
    assert math.isnan(measure.boundary_f1(square(7), true))  # the ring is no contour
    true = square(6)
    true[:8, 5:8] = 255
    # Below the ring the contour is columns 5 and 6; 8 rows have it, the ring's own border none.
    assert measure.boundary_f1(square(6), true) == 1.0
    assert measure.boundary_f1(square(8), true) == 0.0
    within = square(6)
    within[:8, 5:8] = 2
    assert measure.boundary_f1(within, true) == 1.0


def test_boundary_f1_of_a_set_is_the_mean_of_its_images():
    masks = torch.stack([square(6), square(6), torch.zeros(16, 16, dtype=torch.int64)])
    guess = torch.stack([square(6), square(9), masks[2]])
    found = TASK.evaluate(Fixed(), [(logits_of(guess.tolist(), 2), masks)], 2)
    assert found.more["boundary_f1"] == 0.5
