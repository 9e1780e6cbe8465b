"""A penalty's strength steered so that the kept share follows a schedule to its target."""

import math
from typing import Any


class Steering:
    """Multiplicative PI control of a strength (lambda) on the log of the kept share.

    Every `period` steps: e = log(kept / wanted), clipped to +-1;
    strength <- strength * exp(0.1 e + 1.5 (e - e_before)). The wanted share falls geometrically
    from 1 to `share` over the first `ramp` (share of the phase's steps), then stays. Ours: the
    paper fixes lambda by hand, and then the kept share is whatever comes out.
    """

    def __init__(self, share: float, ramp: float, period: int = 5) -> None:
        self.share, self.ramp, self.period = share, ramp, period
        self.strength: float | None = None
        self._error = 0.0

    def wanted(self, step: int, steps: int) -> float:
        """Kept share wanted at `step` of `steps`."""
        return self.share ** min(1.0, step / max(1.0, self.ramp * steps))

    def start(self, strength: float) -> None:
        """Set the first strength, once."""
        if self.strength is None:
            self.strength = max(strength, 1e-30)

    def due(self, step: int) -> bool:
        """Whether the strength is to be updated after `step`."""
        return self.strength is not None and step % self.period == 0

    def update(self, kept: float, step: int, steps: int) -> None:
        """Answer the `kept` share found after `step`."""
        error = math.log(max(kept, 1e-6) / self.wanted(step, steps))
        error = max(-1.0, min(1.0, error))
        self.strength *= math.exp(0.1 * error + 1.5 * (error - self._error))
        self._error = error

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"strength": self.strength, "error": self._error}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.strength, self._error = state["strength"], state["error"]
