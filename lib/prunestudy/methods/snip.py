r"""SNIP (Lee, Ajanthan, Torr; ICLR 2019): a control that prunes once, before any training.

    sensitivity of a connection = |dL / dc| at c = 1 of the net with weights c * w = |w dL/dw|

The gradient is that of the task loss on a few training batches; the most sensitive connections
over the whole net are kept and trained.
"""

import copy
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.methods.base import Context, Params
from prunestudy.methods.magnitude import Magnitude, MaskParams
from prunestudy.methods.masks import dense_weights


class SnipParams(MaskParams):
    """`batches`: how many training batches the sensitivity is measured on (the paper: one)."""

    batches: Annotated[int, Field(ge=1)] = 1


class Snip(Magnitude):
    """The most sensitive connections at the start, then training of what is left."""

    name: ClassVar[str] = "snip"
    title: ClassVar[str] = "SNIP"
    Params: ClassVar[type[Params]] = SnipParams

    def __init__(self, params: SnipParams, *target: Any) -> None:
        super().__init__(params, *target)
        self._sensitivity: list[Tensor] = []

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Measure the sensitivity on the first training batches."""
        # A copy: batch norm must not count these batches.
        probe = copy.deepcopy(model).train()
        weights, batches = dense_weights(probe), context.train.epoch(0)
        count = min(self.params.batches, context.train.steps)
        sums = [torch.zeros_like(w) for w in weights]
        for _, (x, y) in zip(range(count), batches, strict=False):
            gradients = torch.autograd.grad(context.task.loss(probe(x), x, y), weights)
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient)
        pairs = zip(weights, sums, strict=True)
        self._sensitivity = [(w.detach() * total).abs() for w, total in pairs]

    def scores(self, model: nn.Module) -> list[Tensor]:  # noqa: ARG002
        """The sensitivities."""
        return self._sensitivity
