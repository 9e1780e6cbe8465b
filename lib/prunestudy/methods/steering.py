"""A penalty's strength, steered so that the kept share follows a schedule to its target."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunestudy.methods.base import At, scalar


class Steering(nn.Module):
    """Multiplicative PI control of a strength (lambda) on the log of the kept share.

    At each action: e = log(kept / wanted), clipped to +-1;
    strength <- strength * exp(0.1 e + 1.5 (e - e_before)). The wanted share falls geometrically
    from 1 to `share` over the first `ramp` (share of the phase's steps), then stays. Two actions
    lie at least `period` steps apart. Ours: papers fix lambda by hand and take the kept share that
    comes out.

    `strength`, NaN until `start`, and `error`, e_before, are 0-d float64 buffers.
    """

    def __init__(self, share: float, ramp: float, period: int = 5) -> None:
        super().__init__()
        self.share, self.ramp, self.period = share, ramp, period
        self.register_buffer("strength", scalar(math.nan, "cpu"))
        self.register_buffer("error", scalar(0.0, "cpu"))
        self.register_buffer("acted", torch.tensor(0))

    def start(self, strength: Tensor) -> None:
        """Set the first strength (0-d), once; it stays above zero. Tensors only."""
        first = strength.detach().double().clamp(min=1e-30)
        self.strength.copy_(torch.where(self.strength.isnan(), first, self.strength))

    def wanted(self, at: At) -> float:
        """Kept share wanted after step `at.step` of its phase."""
        return self.share ** min(1.0, at.step / max(1.0, self.ramp * at.steps))

    def update(self, kept: Callable[[], float], at: At) -> None:
        """Adjust the strength to the share `kept()` after this step, if it is due. On the host."""
        if at.step - self.acted.item() < self.period:
            return
        error = max(-1.0, min(1.0, math.log(max(kept(), 1e-6) / self.wanted(at))))
        self.strength.mul_(math.exp(0.1 * error + 1.5 * (error - self.error.item())))
        self.error.fill_(error)
        self.acted.fill_(at.step)
