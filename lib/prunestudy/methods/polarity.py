"""Whether gates polarise by themselves: what is seen at every step, judged at the last closing."""

import math

import torch
from torch import Tensor, nn

from prunestudy.methods.base import At

_WINDOWS, _LATE = 50, 10  # windows of the run, with their largest moves; how many are late
_NAMES = ("undecided", "undecided_half", "largest_closing_gate", "largest_late_step")


class Polarity(nn.Module):
    """Watches gates g (N,) = t^2 / (t^2 + eps) and judges them when the last channel closes.

    `undecided`: share (0-1) of the open gates in (0.05, 0.5); `undecided_half`: the same with the
    eps that was in force when half of the channels had closed, since a small eps alone makes every
    gate look decided; `largest_closing_gate`: the largest gate of a channel one step before it
    closed; `largest_late_step`: the largest move of a surviving gate in one step in the last fifth
    of the run before. All are NaN until something has closed.
    """

    def __init__(self, g: Tensor) -> None:
        super().__init__()
        self.register_buffer("before", g.detach().clone())
        self.register_buffer("moves", g.new_zeros(_WINDOWS, len(g)))
        self.register_buffer("eps_of", g.new_full((len(g),), math.nan))
        self.register_buffer("found", torch.full((4,), math.nan, dtype=torch.float64))

    def step(self, g: Tensor, falling: Tensor, at: At) -> None:
        """Note the gates `g` after this step; those not `falling` have reached 0. Tensors only."""
        row = (at.share * _WINDOWS).long().view(1)
        move = torch.where(falling, (g - self.before).abs(), 0).unsqueeze(0)
        self.moves.index_copy_(0, row, torch.maximum(self.moves.index_select(0, row), move))
        self.before.copy_(torch.where(falling, g, self.before))

    def judge(self, t: Tensor, closing: Tensor, eps: Tensor, at: At) -> None:
        """Judge the gates after the channels `closing` (N,) went with this `eps`. On the host."""
        self.eps_of[closing] = eps.to(self.eps_of)
        left = t[t != 0].square()
        largest = float(self.before[closing].max().fmax(self.found[2].to(t)))
        last = int((at.step - 1) / at.steps * _WINDOWS)
        late = self.moves[max(0, last - _LATE) : last + 1, t != 0]
        half = -(-self.eps_of).nanmedian()  # the larger of two
        now = [_undecided(left / (left + e)) for e in (eps, half)]
        self.found.copy_(torch.tensor([*now, largest, float(late.max()) if late.numel() else 0.0]))

    def report(self) -> dict[str, float]:
        """The four numbers."""
        return dict(zip(_NAMES, self.found.tolist(), strict=True))


def _undecided(g: Tensor) -> float:
    """Share (0-1) of the gates `g` that are neither below 0.05 nor above one half."""
    return float(((g > 0.05) & (g < 0.5)).double().mean()) if len(g) else 0.0
