"""How well a classifier does."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.measure.forward import device_of, evaluating


@dataclass(frozen=True)
class Quality:
    """Scores over `count` samples: `loss` is the mean cross-entropy, the others are in 0-1.

    `top5`: share whose class is among the five most likely; 1 for up to five classes.
    """

    top1: float
    macro_f1: float
    loss: float
    count: int
    top5: float


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> Quality:
    """Score `model` in eval mode on `batches` of inputs and labels (batch,) in 0..num_classes-1.

    Inputs go to the model's device; its modes are put back. Outputs that are not finite make the
    loss infinite or NaN; a row's prediction is then what `argmax` says (a NaN counts as largest).
    Raises `InputError` if there is no sample, a label is out of range, or the output is not
    (batch, num_classes).
    """
    require(type(num_classes) is int and num_classes > 0, "num_classes", num_classes, "at least 1")
    device = device_of(model)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    among = torch.zeros((), dtype=torch.int64, device=device)
    with evaluating(model), torch.inference_mode():
        for inputs, labels in batches:
            logits, y = model(inputs.to(device)), labels.to(device)
            _check(logits, y, num_classes)
            loss += F.cross_entropy(logits.double(), y, reduction="sum")
            among += (logits.topk(min(5, num_classes), 1).indices == y[:, None]).sum()
            cells = y * num_classes + logits.argmax(1)
            confusion += torch.bincount(cells, minlength=num_classes**2).view_as(confusion)
    count = int(confusion.sum())
    require(count > 0, "batches", count, "at least one sample")
    right = int(confusion.diagonal().sum())
    f1 = _macro_f1(confusion.cpu())
    return Quality(right / count, f1, float(loss) / count, count, int(among) / count)


def _check(logits: Tensor, y: Tensor, num_classes: int) -> None:
    right = tuple(logits.shape) == (len(y), num_classes)
    require(
        right, "output", tuple(logits.shape), f"(batch, {num_classes}) for {num_classes} classes"
    )
    if len(y):
        low, high = int(y.min()), int(y.max())
        require(low >= 0 and high < num_classes, "labels", (low, high), f"0..{num_classes - 1}")


def _macro_f1(confusion: Tensor) -> float:
    """Mean F1 of the classes that occur or are predicted, as torchmetrics and scikit-learn do.

    `confusion` (true, predicted); F1 = 2 TP / (2 TP + FP + FN).
    """
    counts = confusion.double()
    seen = counts.sum(0) + counts.sum(1)
    present = seen > 0
    return float((2 * counts.diagonal()[present] / seen[present]).mean())
