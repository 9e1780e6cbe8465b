"""Running statistics of batch norm for a net whose layers were replaced or narrowed."""

from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunestudy.errors import refused
from prunestudy.measure.forward import evaluating
from prunestudy.methods.base import Context, call, samples_in


def recalibrate(model: nn.Module, context: Context, batches: int) -> int:
    """Estimate the running statistics of `model` anew, in place; return the samples it took.

    Each is the mean over the first `batches` training batches, or all if there are fewer, of what
    the layer normalises by in training. All other modules are in eval mode meanwhile (no dropout).
    Nothing is read or changed with 0 batches, or in a net without such statistics. Raises
    `InputError` if there is no batch.
    """
    kinds = (m for m in model.modules() if isinstance(m, _BatchNorm))
    norms = {norm: norm.momentum for norm in kinds if norm.running_mean is not None}
    if not (batches and norms):
        return 0
    data, seen = context.batches(batches), 0
    first = next(data)  # refused before anything is changed
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.train().reset_running_stats()
            norm.momentum = None  # the mean of all batches
        try:
            for number, (x, _) in enumerate(chain([first], data)):
                with refused("context.train", f"batch {number}"):
                    call(model, x)
                seen += samples_in(x)
        finally:
            for norm, momentum in norms.items():
                norm.momentum = momentum
    return seen
