"""What figures show of methods on single weights: gates, the trail of a mask, attention."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunestudy import measure
from prunestudy.methods.base import At, Context, Method
from prunestudy.methods.probes import Probe

# Histograms of the attention: bins of 0.05, the last one with all above.
_BINS, _HIGHEST = 80, 4.0
# Rows of the trail in a run's arrays times layers; a longer one is told in fewer rows.
_MOST = 50_000


class _Gates(Probe):
    """`gate_histograms` (epochs, 40 bins over 0-1): the gates at the end of each epoch."""

    noted = ("histograms",)

    def __init__(self) -> None:
        self.histograms: list[Tensor] = []

    def epoch(self) -> None:
        flat = torch.cat([value.flatten() for value in self.method.values()])
        self.histograms.append(torch.histc(flat.cpu().float(), 40, 0, 1))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"gate_histograms": torch.stack(self.histograms).numpy()} if self.histograms else {}


class _Trail(Probe):
    """What a method's masks cut, when, and what came back; and where the training moved weights.

    `changes`: the step of each change of the masks, and how many weights of each layer it cut and
    took back. `moved`: by phase the summed |change| of each weight, sampled every `period` steps.
    `kept`: weights of each layer that the masks in force keep (layers,).
    `passes`: per layer and step, how many of the three passes of a training step (forward,
    gradients by input and by weights) went over kept weights only, times their number; `whole`: the
    steps in which the last of them was over all weights, as cut ones were updated, too.
    """

    noted = tuple("step phase moved_at changes kept passes whole last moved masks".split())

    def attach(self, method: Method, model: Any, context: Context) -> None:
        super().attach(method, model, context)
        self.macs = measure.layer_macs(model, context.example)
        self.sizes = np.array([weight.numel() for weight in method.weights])
        self.last = [weight.detach().clone() for weight in method.weights]
        self.moved: dict[str, list[Tensor]] = {}
        self.masks = self._flat()
        self.kept = torch.stack([each.mask.count_nonzero() for each in method.masks]).cpu()
        self.step, self.phase, self.moved_at = 0, "explore", 0
        self.passes, self.whole = torch.zeros(len(self.kept), dtype=torch.int64), 0
        self.changes: list[tuple[int, list[int], list[int]]] = []

    def update(self, at: At) -> None:
        """Note a change of the masks; add the movement every `period` steps."""
        done, exploring = at.total_step - self.step, at.phase == "explore"
        self.passes = self.passes + (2 if exploring else 3) * done * self.kept
        self.whole += done * exploring
        self.step, self.phase = at.total_step, at.phase
        due = self.step - self.moved_at >= self.method.period
        if due:
            self.moved_at = self.step
        if due or at.last:
            self._move()
        if self.method.masked_at == self.step:
            self._note()

    def finished(self, net: Any) -> None:  # noqa: ARG002
        """Note the masks that the method finished with, and the rest of the movement."""
        if not torch.equal(self.masks, self._flat()):
            self._note()
        self._move()

    def _flat(self) -> Tensor:
        return torch.cat([each.mask.flatten() for each in self.method.masks])

    def _note(self) -> None:
        before, self.masks = self.masks, self._flat()
        parts = (self.masks - before).split(self.sizes.tolist())
        # One look at the device for all layers.
        counts = torch.stack([torch.stack([(p < 0).sum(), (p > 0).sum()]) for p in parts], 1).cpu()
        self.kept = self.kept + counts[1] - counts[0]
        self.changes.append((self.step, *counts.tolist()))

    @torch.no_grad()
    def _move(self) -> None:
        moved = self.moved.setdefault(self.phase, [torch.zeros_like(last) for last in self.last])
        torch._foreach_sub_(self.last, self.method.weights)
        torch._foreach_abs_(self.last)
        torch._foreach_add_(moved, self.last)
        torch._foreach_copy_(self.last, self.method.weights)

    def measures(self) -> dict[str, Any]:
        """Summary statistics of the trail, by name.

        `returns`: how often a weight came back, on average. `surviving`: share of all movement
        that fell on weights kept in the end, in all and by part of the training. `layer_focus`:
        density of the layer in which a movement falls, over the net's (1: updates do not prefer
        dense layers). `train_cost`: multiplications of the training, as a share of the dense
        net's, if zeros were skipped; layers outside the scope count as dense.
        """
        total = self.sizes.sum()
        kept, masks = self.kept.numpy(), self.masks.split(self.sizes.tolist())
        movement = {}  # by phase: all or kept, layers
        for phase, moved in self.moved.items():
            pairs = zip(moved, masks, strict=True)
            sums = [(_sum(each), _sum(each.flatten()[mask == 1])) for each, mask in pairs]
            movement[phase] = np.array(sums).T.copy()
        every, surviving = sum(movement.values())
        found: dict[str, Any] = {
            "returns": sum(sum(returned) for *_, returned in self.changes) / int(total),
            "surviving": _share(surviving.sum(), every.sum()),
            **{f"surviving_{name}": _share(*part.sum(1)[::-1]) for name, part in movement.items()},
            "layer_focus": _share(every @ (kept / self.sizes), every.sum() * (kept.sum() / total)),
        }
        if self.step:
            dense, macs = 3 * self.step, dict(self.macs)
            inside = np.array([macs.pop(name) for name in self.method.names])
            saved = inside @ (dense - (self.passes.numpy() / self.sizes + self.whole))
            cost = 1 - saved / (dense * (inside.sum() + sum(macs.values())))
            found["train_cost"] = float(cost)
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """The trail for figures; rows of a long one cover several changes (their last step).

        `trail_step` (rows,), `trail_cut`, `trail_returned` (rows, layers), `trail_size` (layers,).
        """
        columns = zip(*self.changes, strict=True)
        step, cut, returned = (np.array(column, np.int32) for column in columns)
        every = -(-len(step) // max(1, _MOST // len(self.sizes)))
        first = np.arange(0, len(step), every)
        return {
            "trail_step": step[np.minimum(first + every, len(step)) - 1],
            "trail_size": self.sizes.astype(np.int32),
            "trail_cut": np.add.reduceat(cut, first, dtype=np.int32),
            "trail_returned": np.add.reduceat(returned, first, dtype=np.int32),
        }


class _Attentions(_Trail):
    """The trail; `attention` (epochs + 1, 2, 80): how often A of all and of kept weights takes
    each value, at the start and at the end of each epoch.
    """

    noted = (*_Trail.noted, "histograms")

    def attach(self, method: Method, model: Any, context: Context) -> None:
        super().attach(method, model, context)
        self.histograms: list[Tensor] = []
        self.epoch()

    @torch.no_grad()
    def epoch(self) -> None:
        pairs = list(zip(self.method.weights, self.method.masks, strict=True))
        every = torch.cat([m.attention(w).flatten() for w, m in pairs]).cpu().float()
        kept = torch.cat([m.mask.flatten() for _, m in pairs]).cpu() == 1
        every.clamp_(max=_HIGHEST)
        counts = [torch.histc(a, _BINS, 0, _HIGHEST) for a in (every, every[kept])]
        self.histograms.append(torch.stack(counts))

    def arrays(self) -> dict[str, np.ndarray]:
        counts = torch.stack(self.histograms).numpy().astype(np.int32)
        return super().arrays() | {"attention": counts}


def _sum(values: Tensor) -> float:
    return values.sum(dtype=torch.float64).item()


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
