"""What is observed of a training for figures and records, outside the methods."""

from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from prunestudy.methods.base import At, Context, Method


class Probe:
    """Watches a training and changes nothing; this base sees nothing.

    The loop calls `attach` after the method's; `leaving`, at the end of each phase, ahead of the
    method's update; `after_step` and `update` after the method's own; `epoch` at the end of each
    epoch; and `finished` with the net that comes out. `noted` names the attributes that a resumed
    run needs, tensors and plain values.
    """

    noted: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def pixels(x: Tensor) -> Tensor:
        """The images that inputs stand for."""
        return x

    def attach(self, method: Method, model: nn.Module, context: Context) -> None:
        """Keep hold of what is to be watched."""
        self.method, self.model, self.context = method, model, context

    def after_step(self, at: At) -> None:
        """Note tensors of this step; nothing is read from the device."""

    def leaving(self, at: At) -> None:
        """Look at the model at the end of a phase, before the method's update."""

    def update(self, at: At) -> None:
        """Note what the method's update has changed."""

    def epoch(self) -> None:
        """Look at the model at the end of an epoch."""

    def finished(self, net: nn.Module) -> None:
        """Look at the finished net."""

    def measures(self) -> dict[str, Any]:
        """Numbers for the record."""
        return {}

    def others(self) -> dict[str, nn.Module]:
        """Other nets to score beside the finished one: `metric_NAME` of the record, by name."""
        return {}

    def arrays(self) -> dict[str, np.ndarray]:
        """What figures need of the run (1 MB in all)."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {name: getattr(self, name) for name in self.noted}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        vars(self).update(state)
