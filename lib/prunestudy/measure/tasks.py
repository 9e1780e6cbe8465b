"""What a net is trained for: its loss, and the metric that it is judged by.

- `classify`: output is logits (n, classes); cross-entropy; top-1 accuracy.
- `reconstruct`: output is images (n, C, H, W) of pixels in 0-1; mean squared error; PSNR.
- `reconstruct_and_classify`: output is a pair (images, logits); both losses; PSNR, top-1 beside it.
- `segment`: output is logits (n, classes, H, W), labels are masks (n, H, W), 255 for unlabelled
  pixels; cross-entropy of the labelled pixels; mean IoU, and boundary F1 beside it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunestudy.errors import require, require_one_of
from prunestudy.measure.boundary import IGNORED, boundary_f1
from prunestudy.measure.forward import device_of, evaluating

Batches = Iterable[tuple[Tensor, Tensor]]
Counts = dict[str, Any]  # what is added up over batches
METRICS = {  # of each task, its own first: a score by the metric's name
    "classify": {"accuracy": "top1"},
    "reconstruct": {"psnr": "psnr"},
    "reconstruct_and_classify": {"psnr": "psnr", "accuracy": "top1"},
    "segment": {"miou": "miou", "accuracy": "pixel_accuracy"},
}
# Cross-entropy is some ten times an image's mean squared error: so neither drowns the other.
CLASS_WEIGHT = 0.1


@dataclass(frozen=True)
class Scores:
    """`metric` of a task over `count` samples, the mean `loss`, and what else was scored."""

    metric: float
    loss: float
    count: int
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What a net is trained for: its loss, and how it is scored."""

    name: str = "classify"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def metric_name(self) -> str:
        """The name of the metric: "top1", "psnr" or "miou"."""
        return next(iter(METRICS[self.name].values()))

    def pixels(self, x: Tensor) -> Tensor:
        """The images (n, C, H, W) of pixels in 0-1 that the inputs `x` stand for."""
        mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return x * std + mean

    def loss(self, output: Any, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch: a 0-d tensor."""
        images, logits = self._parts(output)
        if images is None:
            return _cross_entropy(logits, y)
        loss = F.mse_loss(images, self.pixels(x))
        return loss if logits is None else loss + CLASS_WEIGHT * _cross_entropy(logits, y)

    def evaluate(
        self, model: nn.Module, batches: Batches, num_classes: int | None = None
    ) -> Scores:
        """Score `model` in eval mode on batches of inputs and labels.

        PSNR is in dB, of the mean MSE (not a mean of PSNRs); macro-F1 and mean IoU are of the
        classes that occur or are predicted, IoU over all labelled pixels; top-5 is given above five
        classes. Raises `InputError` for no sample or no label, a label out of range, or logits that
        are not (batch, num_classes, ...).
        """
        right = num_classes is None or (type(num_classes) is int and num_classes > 0)
        require(right, "num_classes", num_classes, "at least 1")
        total, device = {}, device_of(model)
        with evaluating(model), torch.inference_mode():
            for batch in batches:
                x, y = (each.to(device) for each in batch)
                counts = self._counts(model(x), x, y, num_classes)
                total = {name: total.get(name, 0) + value for name, value in counts.items()}
        require(bool(total), "batches", 0, "at least one sample")
        return self._scores(total)

    def _parts(self, output: Any) -> tuple[Tensor | None, Tensor | None]:
        """The images and the logits of an output."""
        alone = (output, None) if self.name == "reconstruct" else (None, output)
        return output if self.name == "reconstruct_and_classify" else alone

    def _counts(self, output: Any, x: Tensor, y: Tensor, classes: int | None) -> Counts:
        images, logits = self._parts(output)
        counts = {"count": len(x)}
        if images is not None:
            error = (images.float().cpu() - self.pixels(x).float().cpu()).square().sum()
            counts |= {"error": error, "values": images.numel()}
        return counts if logits is None else counts | _label_counts(logits, y, classes)

    def _scores(self, total: Counts) -> Scores:
        loss, more = 0.0, {}
        if "error" in total:
            mse = total["error"] / total["values"]
            more["psnr"] = float(-mse.log() * (10 / torch.tensor(10.0).log()))
            loss = 10 ** (-more["psnr"] / 10)
        if "confusion" in total:
            counts, labelled = total["confusion"].double(), int(total["confusion"].sum())
            require(labelled > 0, "batches", total["count"], "at least one pixel with a label")
            right, seen = counts.diagonal(), counts.sum(0) + counts.sum(1)
            accuracy, some = float(right.sum()) / labelled, seen > 0
            entropy = total["entropy"] / labelled
            loss = loss + CLASS_WEIGHT * entropy if more else entropy
            if self.name == "segment":
                contours = total["contours"] / (total["with_contours"] or math.nan)
                iou = float((right / (seen - right))[some].mean())
                more = {"miou": iou, "boundary_f1": contours, "pixel_accuracy": accuracy}
            else:  # F1 = 2 TP / (2 TP + FP + FN)
                more |= {"top1": accuracy, "macro_f1": float((2 * right / seen)[some].mean())}
            if self.name == "classify" and len(counts) > 5:
                more["top5"] = total["five"] / labelled
        return Scores(more.pop(self.metric_name), loss, total["count"], more)


def task(name: str, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Task:
    """The task called `name`, of `METRICS`; `InputError` for an unknown one.

    `mean` and `std`, a value per channel, are those that the inputs were normalised with.
    """
    require_one_of("task", name, METRICS)
    return Task(name, mean, std)


def _cross_entropy(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    # As rows: of pixels in an image the loss has no deterministic backward pass on CUDA.
    rows, ignored = logits.movedim(1, -1).flatten(0, -2), IGNORED if y.dim() > 1 else -100
    return F.cross_entropy(rows, y.long().flatten(), ignore_index=ignored, reduction=reduction)


# torchmetrics counts and divides in float32, and does not say which label is out of range.
def _label_counts(logits: Tensor, y: Tensor, classes: int | None) -> Counts:
    """How often each label (a row) was taken for each class (a column), and what else adds up."""
    shape, masks = tuple(logits.shape), y.dim() > 1
    n = classes or shape[1]
    allowed = (len(y), n, *y.shape[1:])
    require(shape == allowed, "output", shape, f"{allowed} for {n} classes")
    known = (y != IGNORED) | (not masks)
    guess, true = logits.argmax(1)[known], y[known].long()
    low, high = (int(true.min()), int(true.max())) if len(true) else (0, 0)
    require(low >= 0 and high < n, "labels", (low, high), f"0..{n - 1}")
    counts = {"confusion": torch.bincount(true * n + guess, minlength=n**2).view(n, n).cpu()}
    counts["entropy"] = float(_cross_entropy(logits if masks else logits.double(), y, "sum"))
    if masks:
        found = [boundary_f1(*pair) for pair in zip(logits.argmax(1), y, strict=True)]
        contours = [value for value in found if not math.isnan(value)]
        return counts | {"contours": sum(contours), "with_contours": len(contours)}
    return counts | {"five": int((logits.topk(min(5, n), 1).indices == y[:, None]).sum())}
