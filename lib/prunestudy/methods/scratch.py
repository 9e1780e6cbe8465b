"""The found shape from scratch: does the pruning give good weights, or just a good shape?

Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019. The parent's net keeps its layers
and loses its weights: all are drawn anew from the run's seed. It trains as long as the parent and
its dense start together.
"""

from typing import ClassVar

import torch
from torch import nn

from prunestudy.methods.base import Method


class Scratch(Method):
    """Dense training of the parent's shape from new random weights."""

    name: ClassVar[str] = "scratch"
    title: ClassVar[str] = "found shape, from scratch"
    from_scratch: ClassVar[bool] = True

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        reinitialise(model, generator.initial_seed())


def reinitialise(model: nn.Module, seed: int) -> None:
    """Draw the weights of `model` as its factory does, from `seed`, in place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if hasattr(model, "initialise"):
            model.initialise()
