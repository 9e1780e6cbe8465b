"""The training loss step by step, kept small: how smoothly a method trains."""

import math
from typing import Any

import numpy as np

_MOST = 20_000


class LossCurve:
    """Losses of all steps in order, averaged over windows so that at most 20,000 are kept."""

    def __init__(self) -> None:
        self.window, self.values, self._sum, self._count = 1, [], 0.0, 0

    def begin(self, steps: int) -> None:
        """Choose the window for a training of `steps` steps."""
        self.window = -(-steps // _MOST)

    def add(self, loss: float) -> None:
        """Append the loss of the next step."""
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count == self.window:
            self.values.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0

    def roughness(self) -> float:
        """Mean absolute change of the loss from one window to the next; NaN below two."""
        return float(np.abs(np.diff(self.values)).mean()) if len(self.values) > 1 else math.nan

    def jump(self, steps: list[int], around: int = 10) -> float:
        """Mean over `steps` (each once) of the loss in the `around` windows after, minus before.

        NaN without a step that has windows on both sides.
        """
        values, found = np.array(self.values), []
        for at in sorted({step // self.window for step in steps}):
            before, after = values[max(0, at - around) : at], values[at + 1 : at + 1 + around]
            if len(before) and len(after):
                found.append(after.mean() - before.mean())
        return float(np.mean(found)) if found else math.nan

    def array(self) -> np.ndarray:
        """The kept losses, float32."""
        return np.array(self.values, np.float32)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return dict(vars(self), values=list(self.values))

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        vars(self).update(state, values=list(state["values"]))
