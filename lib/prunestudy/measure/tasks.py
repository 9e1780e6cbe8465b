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
from prunestudy.measure.quality import evaluate

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
        """Score `model` in eval mode on batches of inputs and labels; see `measure.evaluate`."""
        quality = evaluate(model, batches, num_classes)
        more = {"macro_f1": quality.macro_f1}
        if num_classes > 5:
            more["top5"] = quality.top5
        return Scores(quality.top1, quality.loss, quality.count, more)

    def pixels(self, x: Tensor) -> Tensor:
        """Images (batch, C, H, W) as they were before normalisation, in 0-1."""
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in (self.mean, self.std))
        return x * std.view(-1, 1, 1) + mean.view(-1, 1, 1)


class Reconstruct(Task):
    """Autoencoding: the output is the input's pixels."""

    name = "reconstruct"
    metric_name = "psnr"

    def loss(self, output: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """Mean squared error of the pixels."""
        return F.mse_loss(output, self.pixels(x))

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], num_classes: int) -> Scores:  # noqa: ARG002
        """PSNR in dB, 10 log10(1 / MSE), of the mean MSE over all samples (not a mean of PSNRs)."""
        psnr = _psnr()
        device, count = device_of(model), 0
        with evaluating(model), torch.inference_mode():
            for inputs, _ in batches:
                x = inputs.to(device)
                self._update(psnr, model(x), x)
                count += len(x)
        decibel = float(psnr.compute())
        return Scores(decibel, 10 ** (-decibel / 10), count)

    def _update(self, psnr, output: Tensor, x: Tensor) -> None:
        psnr.update(output.float().cpu(), self.pixels(x).float().cpu())


class ReconstructAndClassify(Reconstruct):
    """An autoencoder with a classifier on its latent vector."""

    name = "reconstruct_and_classify"
    # Cross-entropy is some ten times an image's mean squared error: so neither drowns the other.
    class_weight = 0.1

    def loss(self, output: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of the pixels plus a tenth of the cross-entropy."""
        return super().loss(output[0], x, y) + self.class_weight * F.cross_entropy(output[1], y)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], num_classes: int) -> Scores:
        """PSNR in dB of the images; `more` has top-1 and macro-F1 of the classes."""
        held = list(batches)
        quality = evaluate(_Part(model, 1), held, num_classes)
        images = super().evaluate(_Part(model, 0), held, num_classes)
        more = {"top1": quality.top1, "macro_f1": quality.macro_f1}
        loss = images.loss + self.class_weight * quality.loss
        return Scores(images.metric, loss, images.count, more)


class Segment(Task):
    """A class for every pixel."""

    name = "segment"
    metric_name = "miou"

    def loss(self, output: Tensor, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """Mean cross-entropy of the pixels of masks `y` (batch, H, W) that have a label."""
        return self._cross_entropy(output, y, "mean")

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], num_classes: int) -> Scores:
        """Mean IoU over all pixels with a label, of the classes that occur or are predicted.

        `more` has `boundary_f1` (see `boundary.py`), the mean over the images, and the accuracy
        of the pixels. Raises `InputError` if no pixel has a label.
        """
        confusion = _confusion(num_classes)
        device, contours, loss, count = device_of(model), [], 0.0, 0
        with evaluating(model), torch.inference_mode():
            for inputs, masks in batches:
                output, y = model(inputs.to(device)), masks.to(device)
                loss += float(self._cross_entropy(output, y, "sum"))
                guess = output.argmax(1)
                confusion.update(guess.cpu(), masks.cpu())
                contours += [boundary_f1(a, b) for a, b in zip(guess, masks, strict=True)]
                count += len(y)
        cells = confusion.confmat.double()
        pixels, right = float(cells.sum()), cells.diagonal()
        require(pixels > 0, "batches", count, "at least one pixel with a label")
        seen = [value for value in contours if not math.isnan(value)]
        more = {
            "boundary_f1": sum(seen) / len(seen) if seen else math.nan,
            "pixel_accuracy": float(right.sum()) / pixels,
        }
        return Scores(float(confusion.compute()), loss / pixels, count, more)

    def _cross_entropy(self, output: Tensor, y: Tensor, reduction: str) -> Tensor:
        # As rows: of pixels in an image the loss has no deterministic backward pass on CUDA.
        rows = output.movedim(1, -1).flatten(0, -2)
        return F.cross_entropy(rows, y.flatten(), ignore_index=IGNORED, reduction=reduction)


class _Part(nn.Module):
    """One of several outputs of a net."""

    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[self.index]


def _psnr():
    from torchmetrics.image import PeakSignalNoiseRatio  # late: it takes seconds

    return PeakSignalNoiseRatio(data_range=1.0)


def _confusion(num_classes: int):
    from torchmetrics.classification import MulticlassJaccardIndex  # late: it takes seconds

    return MulticlassJaccardIndex(num_classes, ignore_index=IGNORED)


TASKS = {cls.name: cls for cls in (Task, Reconstruct, ReconstructAndClassify, Segment)}


def task(name: str, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Task:
    """The task called `name`; `mean` and `std` as in `Task`. `InputError` for an unknown one."""
    require_one_of("task", name, TASKS)
    return TASKS[name](mean, std)
