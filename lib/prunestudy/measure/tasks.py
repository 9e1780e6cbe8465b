"""What a net is trained for: its loss, and the metric that it is judged by.

- `classify`: output is logits (n, classes); cross-entropy; top-1 accuracy.
- `reconstruct`: output is images (n, C, H, W) of pixels in 0-1; mean squared error; PSNR.
- `reconstruct_and_classify`: output is a pair (images, logits); mean squared error plus a tenth of
  the cross-entropy (some ten times larger), so that neither drowns the other; PSNR, and top-1
  beside it.
- `segment`: output is logits (n, classes, H, W), labels are masks (n, H, W), 255 for unlabelled
  pixels; cross-entropy of the labelled pixels; mean IoU, and boundary F1 beside it.
- a loss and a metric of one's own: `own_task`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
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
    if not y.is_floating_point():
        return F.cross_entropy(output, y)
    shapes = tuple(output.shape), tuple(y.shape)
    require(shapes[0] == shapes[1], "targets", shapes[1], f"of the output's shape {shapes[0]}")
    return F.mse_loss(output, y)


class _Classes:
    """Adds up what is known of logits (n, classes)."""

    def __init__(self, num_classes: int | None) -> None:
        right = num_classes is None or (type(num_classes) is int and num_classes > 0)
        require(right, "num_classes", num_classes, "at least 1")
        self.classes, self.confusion, self.loss, self.among_five = num_classes, 0, 0.0, 0

    def add(self, logits: Tensor, _: Any, y: Tensor) -> None:
        shape = tuple(logits.shape)
        n = self.classes = self.classes or shape[-1]
        require(shape == (len(y), n), "output", shape, f"(batch, {n}) for {n} classes")
        whole = not y.is_floating_point() and y.dim() == 1
        require(whole, "labels", (y.dtype, tuple(y.shape)), "whole numbers (batch,)")
        low, high = int(y.min()), int(y.max())
        require(low >= 0 and high < n, "labels", (low, high), f"0..{n - 1}")
        self.loss += float(F.cross_entropy(logits.double(), y, reduction="sum"))
        self.among_five += int((logits.topk(min(5, n), 1).indices == y[:, None]).sum())
        self.confusion += torch.bincount(y * n + logits.argmax(1), minlength=n**2).cpu()

    def scores(self) -> Scores:
        count = int(torch.as_tensor(self.confusion).sum())
        require(count > 0, "batches", count, "at least one sample")
        counts = self.confusion.double().view(self.classes, self.classes)
        # F1 = 2 TP / (2 TP + FP + FN), of the classes that occur or are predicted
        right, seen = counts.diagonal(), counts.sum(0) + counts.sum(1)
        more = {"macro_f1": float((2 * right[seen > 0] / seen[seen > 0]).mean())}
        if self.classes > 5:
            more["top5"] = self.among_five / count
        return Scores(int(right.sum()) / count, self.loss / count, count, more)


class _Images:
    """Adds up the errors of images; `pixels` maps inputs to what the images should be."""

    def __init__(self, pixels: Callable[[Tensor], Tensor], _: int | None) -> None:
        from torchmetrics.image import PeakSignalNoiseRatio  # late: it takes seconds

        self.pixels, self.psnr, self.count = pixels, PeakSignalNoiseRatio(data_range=1.0), 0

    def add(self, images: Tensor, x: Tensor, _: Any) -> None:
        self.psnr.update(images.float().cpu(), self.pixels(x).float().cpu())
        self.count += len(x)

    def scores(self) -> Scores:
        require(self.count > 0, "batches", self.count, "at least one sample")
        decibel = float(self.psnr.compute())
        return Scores(decibel, 10 ** (-decibel / 10), self.count)


class _Both:
    """Adds up what is known of images and logits."""

    def __init__(self, pixels: Callable[[Tensor], Tensor], num_classes: int | None) -> None:
        self.parts = _Images(pixels, num_classes), _Classes(num_classes)

    def add(self, outputs: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> None:
        for part, output in zip(self.parts, outputs, strict=True):
            part.add(output, x, y)

    def scores(self) -> Scores:
        images, classes = (part.scores() for part in self.parts)
        more = {"top1": classes.metric, "macro_f1": classes.more["macro_f1"]}
        loss = images.loss + CLASS_WEIGHT * classes.loss
        return Scores(images.metric, loss, images.count, more)


class _Masks:
    """Adds up what is known of the classes of pixels."""

    def __init__(self, num_classes: int | None) -> None:
        from torchmetrics.classification import MulticlassJaccardIndex  # late: it takes seconds

        self.iou = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED)
        self.contours, self.loss = [], 0.0

    def add(self, output: Tensor, _: Any, y: Tensor) -> None:
        self.loss += float(pixel_loss(output, _, y, "sum"))
        guess, true = output.argmax(1).cpu(), y.cpu()
        self.iou.update(guess, true)
        self.contours += map(boundary_f1, guess, true)

    def scores(self) -> Scores:
        cells, count = self.iou.confmat.double(), len(self.contours)
        pixels, right = float(cells.sum()), float(cells.diagonal().sum())
        require(pixels > 0, "batches", count, "at least one pixel with a label")
        seen = [value for value in self.contours if not math.isnan(value)]
        contours = sum(seen) / len(seen) if seen else math.nan
        more = {"boundary_f1": contours, "pixel_accuracy": right / pixels}
        return Scores(float(self.iou.compute()), self.loss / pixels, count, more)


class _Loss:
    """Adds up a loss alone; the metric is left open."""

    def __init__(self, loss: Loss, _: int | None) -> None:
        self.loss, self.total, self.count = loss, 0.0, 0

    def add(self, output: Any, x: Any, y: Any) -> None:
        n = len(inputs(x)[0])
        self.total, self.count = self.total + n * float(self.loss(output, x, y)), self.count + n

    def scores(self) -> Scores:
        require(self.count > 0, "batches", self.count, "at least one sample")
        return Scores(math.nan, self.total / self.count, self.count)


@dataclass(frozen=True)
class Task:
    """A `loss` of (output, inputs, labels), and how a net is scored; classification by default.

    `scorer` makes an object that adds up batches; `metric`, where given, maps (model, batches) to
    the metric in its place. `pixels` maps inputs (n, C, H, W) to the images that they stand for.
    """

    name: str = "classify"
    metric_name: str = "top1"
    loss: Loss = default_loss
    scorer: Callable[[int | None], Any] = _Classes
    metric: Callable[[nn.Module, Batches], float] | None = None
    pixels: Callable[[Tensor], Tensor] = lambda x: x

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
        scorer, device = self.scorer(num_classes), device_of(model)
        if self.metric and iter(batches) is batches:  # it is read twice
            batches = list(batches)
        with evaluating(model), torch.inference_mode():
            for x, y in _moved(batches, device):
                scorer.add(model(*inputs(x)), x, y)
        scores = scorer.scores()
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

    `loss` is `default_loss` if None, `metric` is `top1`; it is called in eval mode, on batches
    that lie on the model's device and that it can read once.
    """
    if loss is None and metric is None:
        return Task()
    loss, metric = loss or default_loss, metric or top1
    name = getattr(metric, "__name__", "metric")
    return Task("own", name, loss, partial(_Loss, loss), metric)


def pixel_loss(output: Tensor, x: Any, y: Tensor, reduction: str = "mean") -> Tensor:  # noqa: ARG001
    """Cross-entropy of the pixels of masks `y` (n, H, W) that have a label."""
    # As rows: of pixels in an image the loss has no deterministic backward pass on CUDA.
    rows = output.movedim(1, -1).flatten(0, -2)
    return F.cross_entropy(rows, y.flatten(), ignore_index=IGNORED, reduction=reduction)


TASKS = ("classify", "reconstruct", "reconstruct_and_classify", "segment")


def task(name: str, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Task:
    """The task called `name`, of `TASKS`.

    `mean` and `std`, a value per channel, are those that the inputs were normalised with. Raises
    `InputError` for an unknown name.
    """
    require_one_of("task", name, TASKS)

    def pixels(x: Tensor) -> Tensor:
        m, s = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (mean, std))
        return x * s + m

    def reconstruction(images: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
        return F.mse_loss(images, pixels(x))

    def both(output: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return reconstruction(output[0], x, y) + CLASS_WEIGHT * F.cross_entropy(output[1], y)

    if name == "reconstruct":
        return Task(name, "psnr", reconstruction, partial(_Images, pixels), pixels=pixels)
    if name == "reconstruct_and_classify":
        return Task(name, "psnr", both, partial(_Both, pixels), pixels=pixels)
    if name == "segment":
        return Task(name, "miou", pixel_loss, _Masks)
    return Task()
