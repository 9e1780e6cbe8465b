"""What a net is trained for: its loss, and the metric that it is judged by.

- `classify`: output is logits (batch, classes); cross-entropy; top-1 accuracy.
- `reconstruct`: output is images (batch, C, H, W) of pixels in 0-1; mean squared error; PSNR.
- `reconstruct_and_classify`: output is a pair (images, logits); the sum of both losses; PSNR, and
  top-1 beside it.
- `segment`: output is logits (batch, classes, H, W), labels are masks (batch, H, W), 255 for pixels
  without one; cross-entropy over the labelled pixels; mean IoU, and boundary F1 beside it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunestudy.errors import require, require_one_of
from prunestudy.measure.boundary import IGNORED, boundary_f1
from prunestudy.measure.forward import device_of, evaluating

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scores:
    """`metric` of a task over `count` samples, the mean `loss`, and what else was scored."""

    metric: float
    loss: float
    count: int
    more: dict[str, float] = field(default_factory=dict)


class Task:
    """Classification; the other tasks change what differs.

    `mean` and `std` are those that the inputs were normalised with, one value per channel.
    """

    name = "classify"
    metric_name = "top1"

    def __init__(self, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> None:
        self.mean, self.std = mean, std

    def loss(self, output: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """Mean loss of `output` for inputs `x` and labels `y` (batch,)."""
        return F.cross_entropy(output, y)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], num_classes: int) -> Scores:
        """Score `model` in eval mode on batches of inputs and labels 0..num_classes-1.

        Inputs go to the model's device; its modes are put back. Of classes `more` has macro-F1 and,
        above five classes, the share whose class is among the five most likely. Of images the
        metric is PSNR in dB, 10 log10(1 / MSE) of the mean MSE (not a mean of PSNRs). Of masks it
        is the mean IoU over all pixels with a label, of the classes that occur or are predicted;
        `more` has `boundary_f1`, the mean over the images, and the accuracy of the pixels.

        Outputs that are not finite make the loss infinite or NaN. Raises `InputError` if there is
        no sample with a label, a label is out of range, or the logits are not
        (batch, num_classes).
        """
        scorers, device = self._scorers(num_classes), device_of(model)
        with evaluating(model), torch.inference_mode():
            for inputs, labels in batches:
                x, y = inputs.to(device), labels.to(device)
                output = model(x)
                outputs = output if isinstance(output, tuple) else (output,)
                for scorer, part in zip(scorers, outputs, strict=True):
                    scorer.add(part, x, y)
        return self._together(*(scorer.scores() for scorer in scorers))

    def pixels(self, x: Tensor) -> Tensor:
        """Images (batch, C, H, W) as they were before normalisation, in 0-1."""
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in (self.mean, self.std))
        return x * std.view(-1, 1, 1) + mean.view(-1, 1, 1)

    def _scorers(self, num_classes: int) -> tuple:
        """One for each output of the net."""
        return (_Classes(num_classes),)

    def _together(self, scores: Scores) -> Scores:
        return scores


class Reconstruct(Task):
    """Autoencoding: the output is the input's pixels."""

    name = "reconstruct"
    metric_name = "psnr"

    def loss(self, output: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """Mean squared error of the pixels."""
        return F.mse_loss(output, self.pixels(x))

    def _scorers(self, num_classes: int) -> tuple:  # noqa: ARG002
        return (_Images(self),)


class ReconstructAndClassify(Reconstruct):
    """An autoencoder with a classifier on its latent vector."""

    name = "reconstruct_and_classify"
    # Cross-entropy is some ten times an image's mean squared error: so neither drowns the other.
    class_weight = 0.1

    def loss(self, output: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of the pixels plus a tenth of the cross-entropy."""
        return super().loss(output[0], x, y) + self.class_weight * F.cross_entropy(output[1], y)

    def _scorers(self, num_classes: int) -> tuple:
        return _Images(self), _Classes(num_classes)

    def _together(self, images: Scores, classes: Scores) -> Scores:
        loss = images.loss + self.class_weight * classes.loss
        more = {"top1": classes.metric, "macro_f1": classes.more["macro_f1"]}
        return Scores(images.metric, loss, images.count, more)


class Segment(Task):
    """A class for every pixel."""

    name = "segment"
    metric_name = "miou"

    def loss(self, output: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """Mean cross-entropy of the pixels of masks `y` (batch, H, W) that have a label."""
        return _pixel_loss(output, y, "mean")

    def _scorers(self, num_classes: int) -> tuple:
        return (_Masks(num_classes),)


class _Classes:
    """Adds up what is known of logits (batch, classes)."""

    def __init__(self, num_classes: int) -> None:
        right = type(num_classes) is int and num_classes > 0
        require(right, "num_classes", num_classes, "at least 1")
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.loss, self.among_five = 0.0, 0

    def add(self, logits: Tensor, _: Tensor, y: Tensor) -> None:
        n, shape = len(self.confusion), tuple(logits.shape)
        require(shape == (len(y), n), "output", shape, f"(batch, {n}) for {n} classes")
        low, high = (int(y.min()), int(y.max())) if len(y) else (0, 0)
        require(low >= 0 and high < n, "labels", (low, high), f"0..{n - 1}")
        self.loss += float(F.cross_entropy(logits.double(), y, reduction="sum"))
        self.among_five += int((logits.topk(min(5, n), 1).indices == y[:, None]).sum())
        cells = torch.bincount(y * n + logits.argmax(1), minlength=n**2)
        self.confusion += cells.view(n, n).cpu()

    def scores(self) -> Scores:
        count, counts = int(self.confusion.sum()), self.confusion.double()
        require(count > 0, "batches", count, "at least one sample")
        # F1 = 2 TP / (2 TP + FP + FN), of the classes that occur or are predicted
        right, seen = counts.diagonal(), counts.sum(0) + counts.sum(1)
        more = {"macro_f1": float((2 * right[seen > 0] / seen[seen > 0]).mean())}
        if len(counts) > 5:
            more["top5"] = self.among_five / count
        return Scores(int(right.sum()) / count, self.loss / count, count, more)


class _Images:
    """Adds up the errors of images."""

    def __init__(self, task: Reconstruct) -> None:
        from torchmetrics.image import PeakSignalNoiseRatio  # late: it takes seconds

        self.task, self.psnr, self.count = task, PeakSignalNoiseRatio(data_range=1.0), 0

    def add(self, images: Tensor, x: Tensor, _: Tensor) -> None:
        self.psnr.update(images.float().cpu(), self.task.pixels(x).float().cpu())
        self.count += len(x)

    def scores(self) -> Scores:
        decibel = float(self.psnr.compute())
        return Scores(decibel, 10 ** (-decibel / 10), self.count)


class _Masks:
    """Adds up what is known of the classes of pixels."""

    def __init__(self, num_classes: int) -> None:
        from torchmetrics.classification import MulticlassJaccardIndex  # late: it takes seconds

        self.iou = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED)
        self.contours, self.loss = [], 0.0

    def add(self, output: Tensor, _: Tensor, y: Tensor) -> None:
        self.loss += float(_pixel_loss(output, y, "sum"))
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


def _pixel_loss(output: Tensor, y: Tensor, reduction: str) -> Tensor:
    # As rows: of pixels in an image the loss has no deterministic backward pass on CUDA.
    rows = output.movedim(1, -1).flatten(0, -2)
    return F.cross_entropy(rows, y.flatten(), ignore_index=IGNORED, reduction=reduction)


TASKS = {cls.name: cls for cls in (Task, Reconstruct, ReconstructAndClassify, Segment)}


def task(name: str, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Task:
    """The task called `name`; `mean` and `std` as in `Task`. `InputError` for an unknown one."""
    require_one_of("task", name, TASKS)
    return TASKS[name](mean, std)
