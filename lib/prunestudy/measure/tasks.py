"""What a net is trained for: its loss, and the metric that it is judged by.

- `classify`: output is logits (n, classes); cross-entropy; top-1 accuracy.
- `reconstruct`: output is images (n, C, H, W) of pixels in 0-1; mean squared error; PSNR.
- `reconstruct_and_classify`: output is a pair (images, logits); both losses; PSNR, top-1 beside it.
- `segment`: output is logits (n, classes, H, W), labels are masks (n, H, W), 255 for unlabelled
  pixels; cross-entropy of the labelled pixels; mean IoU, and boundary F1 beside it.
- a loss and a metric of one's own: `own_task`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunestudy.errors import require, require_one_of
from prunestudy.measure.boundary import IGNORED, boundary_f1
from prunestudy.measure.forward import device_of, evaluating
from prunestudy.values import inputs

Batches = Iterable[tuple[Any, Any]]
Loss = Callable[[Any, Any, Any], Tensor]  # of output, inputs, labels
Counts = dict[str, Any]  # what is added up over batches
TASKS = ("classify", "reconstruct", "reconstruct_and_classify", "segment")
# Cross-entropy is some ten times an image's mean squared error: so neither drowns the other.
CLASS_WEIGHT = 0.1


@dataclass(frozen=True)
class Scores:
    """`metric` of a task over `count` samples, the mean `loss`, and what else was scored."""

    metric: float
    loss: float
    count: int
    more: dict[str, float] = field(default_factory=dict)


def default_loss(output: Tensor, x: Any, y: Tensor) -> Tensor:  # noqa: ARG001
    """Cross-entropy for labels that are whole numbers, mean squared error for other targets."""
    require(isinstance(output, Tensor), "output", type(output).__name__, "a tensor, or an own loss")
    if not y.is_floating_point():
        return F.cross_entropy(output, y.long())
    shapes = tuple(output.shape), tuple(y.shape)
    require(shapes[0] == shapes[1], "targets", shapes[1], f"of the output's shape {shapes[0]}")
    return F.mse_loss(output, y)


def _count_classes(logits: Tensor, x: Any, y: Tensor, classes: int | None) -> Counts:  # noqa: ARG001
    shape = tuple(logits.shape)
    n = classes or shape[-1]
    require(shape == (len(y), n), "output", shape, f"(batch, {n}) for {n} classes")
    whole = not y.is_floating_point() and y.dim() == 1
    require(whole, "labels", (y.dtype, tuple(y.shape)), "whole numbers (batch,)")
    y = y.long()
    return {
        "confusion": _confusion(logits.argmax(1), y, n),
        "loss": float(F.cross_entropy(logits.double(), y, reduction="sum")),
        "five": int((logits.topk(min(5, n), 1).indices == y[:, None]).sum()),
    }


def _confusion(guess: Tensor, y: Tensor, n: int) -> Tensor:
    """How often each label (a row) was taken for each class (a column)."""
    low, high = (int(y.min()), int(y.max())) if len(y) else (0, 0)
    require(low >= 0 and high < n, "labels", (low, high), f"0..{n - 1}")
    return torch.bincount(y * n + guess, minlength=n**2).view(n, n).cpu()


def _score_classes(total: Counts) -> Scores:
    counts, count = total["confusion"].double(), int(total["confusion"].sum())
    # F1 = 2 TP / (2 TP + FP + FN), of the classes that occur or are predicted
    right, seen = counts.diagonal(), counts.sum(0) + counts.sum(1)
    more = {"macro_f1": float((2 * right[seen > 0] / seen[seen > 0]).mean())}
    if len(counts) > 5:
        more["top5"] = total["five"] / count
    return Scores(int(right.sum()) / count, total["loss"] / count, count, more)


def _score_images(total: Counts) -> Scores:
    decibel = float(-(total["error"] / total["values"]).log() * (10 / torch.tensor(10.0).log()))
    return Scores(decibel, 10 ** (-decibel / 10), total["images"])


def _score_both(total: Counts) -> Scores:
    images, classes = _score_images(total), _score_classes(total)
    more = {"top1": classes.metric, "macro_f1": classes.more["macro_f1"]}
    loss = images.loss + CLASS_WEIGHT * classes.loss
    return Scores(images.metric, loss, images.count, more)


def _count_masks(logits: Tensor, x: Any, y: Tensor, classes: int | None) -> Counts:
    n, guess, known = classes or logits.shape[1], logits.argmax(1), y != IGNORED
    found = [boundary_f1(*masks) for masks in zip(guess, y, strict=True)]
    contours = [value for value in found if not math.isnan(value)]
    return {
        "confusion": _confusion(guess[known], y[known], n),
        "loss": float(_pixel_loss(logits, x, y, "sum")),
        "images": len(y),
        "contours": sum(contours),
        "with_contours": len(contours),
    }


def _score_masks(total: Counts) -> Scores:
    counts, pixels = total["confusion"].double(), int(total["confusion"].sum())
    require(pixels > 0, "batches", total["images"], "at least one pixel with a label")
    right, with_contours = counts.diagonal(), total["with_contours"]
    union = counts.sum(0) + counts.sum(1) - right
    more = {
        "boundary_f1": total["contours"] / with_contours if with_contours else math.nan,
        "pixel_accuracy": float(right.sum()) / pixels,
    }
    iou = float((right[union > 0] / union[union > 0]).mean())
    return Scores(iou, total["loss"] / pixels, total["images"], more)


@dataclass(frozen=True)
class Task:
    """A `loss` of (output, inputs, labels), and how a net is scored; classification by default.

    `counts` maps (output, inputs, labels, classes) of a batch to what is added up, `scores` the
    sums to `Scores`; `metric`, where given, maps (model, batches) to the metric in place of
    theirs. `pixels` maps inputs (n, C, H, W) to the images that they stand for.
    """

    name: str = "classify"
    metric_name: str = "top1"
    loss: Loss = default_loss
    counts: Callable[[Any, Any, Any, int | None], Counts] = _count_classes
    scores: Callable[[Counts], Scores] = _score_classes
    metric: Callable[[nn.Module, Batches], float] | None = None
    pixels: Callable[[Tensor], Tensor] | None = None

    def evaluate(
        self, model: nn.Module, batches: Batches, num_classes: int | None = None
    ) -> Scores:
        """Score `model` in eval mode on batches of inputs and labels.

        Both go to the model's device; its modes are put back. Of classes `more` has macro-F1 and,
        above five classes, the share whose class is among the five most likely. Of images the
        metric is PSNR in dB, 10 log10(1 / MSE) of the mean MSE (not a mean of PSNRs). Of masks it
        is the mean IoU over all labelled pixels, of the classes that occur or are predicted;
        `more` has `boundary_f1`, the mean over the images, and the accuracy of the pixels.

        Outputs that are not finite make the loss infinite or NaN. Raises `InputError` if there is
        no sample with a label, a label is out of range, or the logits are not
        (batch, num_classes).
        """
        right = num_classes is None or (type(num_classes) is int and num_classes > 0)
        require(right, "num_classes", num_classes, "at least 1")
        if self.metric and iter(batches) is batches:  # it is read twice
            batches = list(batches)
        total, device = {}, device_of(model)
        with evaluating(model), torch.inference_mode():
            for x, y in _moved(batches, device):
                counts = self.counts(model(*inputs(x)), x, y, num_classes)
                total = {name: total.get(name, 0) + value for name, value in counts.items()}
        require(bool(total), "batches", 0, "at least one sample")
        scores = self.scores(total)
        if self.metric:
            with evaluating(model), torch.no_grad():
                scores = replace(scores, metric=float(self.metric(model, _moved(batches, device))))
        return scores


def _moved(batches: Batches, device: torch.device) -> Iterator[tuple[Any, Any]]:
    for x, y in batches:
        yield tree_map_only(Tensor, lambda t: t.to(device), (x, y))


def top1(model: nn.Module, batches: Batches) -> float:
    """Share (0-1) of the samples whose most likely class is the label (n,)."""
    return Task().evaluate(model, batches).metric


def own_task(
    loss: Loss | None = None, metric: Callable[[nn.Module, Batches], float] | None = None
) -> Task:
    """The task of a `loss(output, x, y)`, a scalar tensor, and a `metric(model, batches)`.

    `loss` is `default_loss` if None. `metric` is `top1` if None; it is called in eval mode, with
    batches on the model's device that it can read once; higher is better.
    """
    if loss is None and metric is None:
        return Task()
    loss, metric = loss or default_loss, metric or top1

    def counts(output: Any, x: Any, y: Any, _: int | None) -> Counts:
        n = len(inputs(x)[0])
        return {"loss": n * float(loss(output, x, y)), "count": n}

    def scores(total: Counts) -> Scores:
        return Scores(math.nan, total["loss"] / total["count"], total["count"])

    return Task("own", getattr(metric, "__name__", "metric"), loss, counts, scores, metric)


def task(name: str, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Task:
    """The task called `name`, of `TASKS`; `InputError` for an unknown one.

    `mean` and `std`, a value per channel, are those that the inputs were normalised with.
    """
    require_one_of("task", name, TASKS)

    def pixels(x: Tensor) -> Tensor:
        m, s = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (mean, std))
        return x * s + m

    def image_loss(images: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
        return F.mse_loss(images, pixels(x))

    def both_losses(output: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return image_loss(output[0], x, y) + CLASS_WEIGHT * F.cross_entropy(output[1], y)

    def count_images(images: Tensor, x: Tensor, *_: Any) -> Counts:
        error = (images.float().cpu() - pixels(x).float().cpu()).square().sum()
        return {"error": error, "values": images.numel(), "images": len(x)}

    def count_both(output: tuple[Tensor, Tensor], x: Tensor, y: Tensor, classes: int) -> Counts:
        return count_images(output[0], x) | _count_classes(output[1], x, y, classes)

    return {
        "classify": Task(),
        "reconstruct": Task(name, "psnr", image_loss, count_images, _score_images, None, pixels),
        "reconstruct_and_classify": Task(
            name, "psnr", both_losses, count_both, _score_both, None, pixels
        ),
        "segment": Task(name, "miou", _pixel_loss, _count_masks, _score_masks),
    }[name]


def _pixel_loss(output: Tensor, x: Any, y: Tensor, reduction: str = "mean") -> Tensor:  # noqa: ARG001
    # As rows: of pixels in an image the loss has no deterministic backward pass on CUDA.
    rows = output.movedim(1, -1).flatten(0, -2)
    return F.cross_entropy(rows, y.flatten(), ignore_index=IGNORED, reduction=reduction)
