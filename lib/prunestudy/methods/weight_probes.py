"""What figures show of methods on single weights: gates, the trail of a mask, attention.

The trail tells what was cut, when, and what came back: per change of the mask and layer, weights
kept, cut and returned, the threshold and the loss. And where the training moved the weights, so
that one can ask how much of that movement is left in the final net.
"""

import contextlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy import measure
from prunestudy.methods.base import At, Context
from prunestudy.methods.probes import Probe

_GATE_BINS = 40
# Histograms of A: bins of 0.05, the last one with all above.
_BINS, _HIGHEST = 80, 4.0
# Bytes of the trail in a run's arrays; a longer one is told in fewer rows.
_MOST_BYTES = 500_000


class Gates(Probe):
    """Histograms of the gates by epoch, and the validation of a sampled net while they are open."""

    def __init__(self) -> None:
        self.histograms: list[Tensor] = []

    def row(self) -> dict[str, float]:
        """No column; counts the gates."""
        values = [g.mask if g.hard else g.gate.detach() for g in self.method.gates]
        flat = torch.cat([value.flatten() for value in values]).cpu().float()
        self.histograms.append(torch.histc(flat, _GATE_BINS, 0, 1))
        return {}

    def views(self) -> dict[str, contextlib.AbstractContextManager]:
        """The sampled net, while gates are open."""
        return {} if self.method.hard else {"sampled": self._sampled()}

    def arrays(self) -> dict[str, np.ndarray]:
        """`gate_histograms` (epochs, 40 bins over 0-1)."""
        return {"gate_histograms": torch.stack(self.histograms).numpy()} if self.histograms else {}

    def state(self) -> dict[str, Any]:
        """The histograms so far."""
        return {"histograms": self.histograms}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.histograms = list(state["histograms"])

    @contextlib.contextmanager
    def _sampled(self):
        gates = self.method.gates
        # Draws of its own: looking must not change the training.
        own = torch.Generator(gates[0].gate.device).manual_seed(0)
        before = [(g.generator, g.bernoulli) for g in gates]
        for each in gates:
            each.generator, each.bernoulli, each.sample_in_eval = own, True, True
        try:
            yield
        finally:
            for each, (generator, bernoulli) in zip(gates, before, strict=True):
                each.generator, each.bernoulli, each.sample_in_eval = generator, bernoulli, False


@dataclass(frozen=True)
class _Change:
    """One change of the mask, after `step` training steps; counts have one entry per layer.

    `threshold`: the smallest |w| that was kept; `loss`: the training loss of that step.
    """

    step: int
    threshold: float
    loss: float
    kept: tuple[int, ...]
    cut: tuple[int, ...]
    returned: tuple[int, ...]


class Trail(Probe):
    """The trail of a `Masked` method's masks and of its weights; all are kept at the start."""

    def attach(self, method: nn.Module, model: nn.Module, context: Context) -> None:
        """Count the layers' multiplications, for the cost of training; look at the weights."""
        super().attach(method, model, context)
        self.sizes = [w.numel() for w in method.weights]
        self.macs = measure.layer_macs(model, context.example)
        self.changes: list[_Change] = []
        self.step = self.explored = self.moved_at = 0  # `explored`: the steps with cut updated
        self.told = 0  # changes that the history has
        self.loss = math.nan
        self.last = [w.detach().clone() for w in method.weights]
        self.moved = [torch.zeros_like(w) for w in self.last]
        self.masks = [each.mask.clone() for each in method.masks]
        self.parts: list[tuple[list[float], list[float]]] = []

    @torch.no_grad()
    def update(self, at: At) -> None:
        """Note a change of the mask; sum the movement every `period` steps."""
        self.step, self.loss = at.total_step, at.loss.item()
        if at.total_step - self.moved_at >= self.method.period:
            self.moved_at = at.total_step
            self.move()
        if at.phase == "explore":
            self.explored = at.total_step
        if self.method.masked_at == at.total_step:
            self.note()
        if at.phase == "explore" and at.last and at.total_step < at.total_steps:
            self.close()

    def finished(self, net: nn.Module) -> None:  # noqa: ARG002
        """Note the masks that the method finished with, and the rest of the movement."""
        if any((a != m.mask).any() for a, m in zip(self.masks, self.method.masks, strict=True)):
            self.note()
        self.close()

    @torch.no_grad()
    def note(self) -> None:
        """Write down how the masks have changed since the last time."""
        kept = self.changes[-1].kept if self.changes else self.sizes
        cut, returned, lowest = [], [], []
        for weight, was, each in zip(
            self.method.weights, self.masks, self.method.masks, strict=True
        ):
            now = each.mask
            lowest.append(torch.where(now == 1, weight.abs(), torch.inf).min())
            cut.append(int((was > now).sum()))
            returned.append(int((was < now).sum()))
            was.copy_(now)
        kept = tuple(k - c + r for k, c, r in zip(kept, cut, returned, strict=True))
        threshold = torch.stack(lowest).min().item()
        change = _Change(self.step, threshold, self.loss, kept, tuple(cut), tuple(returned))
        self.changes.append(change)

    @torch.no_grad()
    def move(self) -> None:
        """Add how far each weight has come since the last call."""
        for moved, last, weight in zip(self.moved, self.last, self.method.weights, strict=True):
            moved.add_(last.sub_(weight).abs_())
            last.copy_(weight)

    def close(self) -> None:
        """End a part of the training: sum its movement, of all weights and of those kept."""
        self.move()
        every = [moved.sum(dtype=torch.float64).item() for moved in self.moved]
        pairs = zip(self.moved, self.masks, strict=True)
        surviving = [moved[mask == 1].sum(dtype=torch.float64).item() for moved, mask in pairs]
        self.parts.append((every, surviving))
        for moved in self.moved:
            moved.zero_()

    def movement(self) -> np.ndarray:
        """Summed |change| of the weights, (parts, layers, 2): of all, of those kept in the end."""
        return np.array(self.parts).reshape(-1, 2, len(self.sizes)).transpose(0, 2, 1)

    def kept_steps(self, steps: int) -> np.ndarray:
        """Sum over the steps up to `steps` of each layer's number of kept weights."""
        times = [0, *(c.step for c in self.changes), steps]
        kept = np.array([self.sizes, *(c.kept for c in self.changes)], dtype=np.int64)
        return (np.diff(times)[:, None] * kept).sum(0)

    def row(self) -> dict[str, float]:
        """Threshold of the last mask; how many weights left and came back in this epoch."""
        new, self.told = self.changes[self.told :], len(self.changes)
        return {
            "threshold": self.changes[-1].threshold if self.changes else 0.0,
            "cut": sum(sum(c.cut) for c in new),
            "returned": sum(sum(c.returned) for c in new),
        }

    def measures(self) -> dict[str, Any]:
        """What the trail comes to.

        `scope_weights`, `scope_sparsity`: of the layers that are pruned. `returns`: how often a
        weight came back, on average. `surviving`: share of all movement of weights that fell on
        weights kept in the end, in all and by part of the training. `layer_focus`: density of the
        layer in which a movement falls, over the net's (1: updates do not prefer dense layers).
        `train_cost`: see `train_cost`.
        """
        sizes = np.array(self.sizes)
        kept = np.array([int(mask.count_nonzero()) for mask in self.masks])
        density, overall = kept / sizes, kept.sum() / sizes.sum()
        movement = self.movement()
        every, surviving = movement.sum(0).T
        parts = zip(("explore", "exploit"), movement.sum(1), strict=False)
        found = {
            "scope_weights": int(sizes.sum()),
            "scope_sparsity": float(1 - overall),
            "returns": sum(sum(c.returned) for c in self.changes) / int(sizes.sum()),
            "surviving": _share(surviving.sum(), every.sum()),
            **{f"surviving_{part}": _share(kept, total) for part, (total, kept) in parts},
            "layer_focus": _share(every @ density, every.sum() * overall),
        }
        return found | ({"train_cost": self.train_cost()} if self.step else {})

    def train_cost(self) -> float:
        """Multiplications of the training, as a share of the dense net's, if zeros were skipped.

        Sparse forward pass and gradient by the input; the gradient by the weights is dense while
        cut weights are updated and sparse after that. Layers outside the scope count as dense.
        """
        steps, macs = self.step, dict(self.macs)
        inside = np.array([macs.pop(name) for name in self.method.names])
        kept = self.kept_steps(steps)
        late = kept - self.kept_steps(self.explored)
        passes = (2 * kept + late) / np.array(self.sizes) + self.explored
        dense = 3 * steps * (inside.sum() + sum(macs.values()))
        return float(1 - (inside @ (3 * steps - passes)) / dense)

    def arrays(self) -> dict[str, np.ndarray]:
        """The trail for figures; rows of a long one cover several changes (their last step).

        `trail_kept`, `trail_cut`, `trail_returned` (rows, layers), `trail_step`,
        `trail_threshold`, `trail_loss` (rows,), `trail_size` (layers,), `trail_movement` (parts,
        layers, 2), `trail_layers`: the names, joined by line ends, in UTF-8.
        """
        width, count = len(self.sizes), len(self.changes)
        most = max(1, _MOST_BYTES // (12 * width + 12))
        groups = np.array_split(np.arange(count), min(most, count) or 1)
        rows = [[self.changes[i] for i in group] for group in groups if len(group)]

        def column(values: list, kind: type = np.int32, shape: tuple[int, ...] = ()) -> np.ndarray:
            return np.array(values, dtype=kind).reshape(-1, *shape)

        def summed(name: str) -> np.ndarray:
            values = [np.sum([getattr(c, name) for c in row], 0) for row in rows]
            return column(values, shape=(width,))

        return {
            "trail_step": column([row[-1].step for row in rows]),
            "trail_threshold": column([row[-1].threshold for row in rows], np.float32),
            "trail_loss": column([np.mean([c.loss for c in row]) for row in rows], np.float32),
            "trail_kept": column([row[-1].kept for row in rows], shape=(width,)),
            "trail_cut": summed("cut"),
            "trail_returned": summed("returned"),
            "trail_size": column(self.sizes),
            "trail_movement": self.movement().astype(np.float32),
            "trail_layers": np.frombuffer("\n".join(self.method.names).encode(), dtype=np.uint8),
        }

    def state(self) -> dict[str, Any]:
        """The trail, and where the training is."""
        plain = {key: getattr(self, key) for key in (*_PLAIN, *_TENSORS)}
        return plain | {"changes": [asdict(change) for change in self.changes]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        for key in _PLAIN:
            setattr(self, key, state[key])
        for key in _TENSORS:
            for own, saved in zip(getattr(self, key), state[key], strict=True):
                own.copy_(saved)
        self.changes = [_Change(**values) for values in state["changes"]]


_PLAIN = ("step", "explored", "moved_at", "told", "loss", "parts")
_TENSORS = ("last", "moved", "masks")


class AttentionTrail(Trail):
    """The trail, and histograms of the attention by epoch."""

    def attach(self, method: nn.Module, model: nn.Module, context: Context) -> None:
        """Count the attention at the start."""
        super().attach(method, model, context)
        self.histograms = [self.histogram()]

    def row(self) -> dict[str, float]:
        """The trail's columns; counts the attention."""
        self.histograms.append(self.histogram())
        return super().row()

    @torch.no_grad()
    def histogram(self) -> Tensor:
        """How often A takes each value, (2, 80): of all and of kept weights."""
        pairs = list(zip(self.method.weights, self.method.masks, strict=True))
        every = torch.cat([m.attention(w).flatten() for w, m in pairs]).cpu().float()
        kept = torch.cat([m.mask.flatten() for _, m in pairs]).cpu() == 1
        every.clamp_(max=_HIGHEST)
        return torch.stack([torch.histc(a, _BINS, 0, _HIGHEST) for a in (every, every[kept])])

    def arrays(self) -> dict[str, np.ndarray]:
        """The trail; `attention` (epochs + 1, 2, 80): histograms of A over all and kept weights."""
        counts = torch.stack(self.histograms).numpy().astype(np.int32)
        return super().arrays() | {"attention": counts}

    def state(self) -> dict[str, Any]:
        """The trail's state and the histograms so far."""
        return super().state() | {"histograms": self.histograms}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        super().load_state(state)
        self.histograms = list(state["histograms"])


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
