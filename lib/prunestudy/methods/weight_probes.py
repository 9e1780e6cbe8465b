"""What figures show of methods on single weights: gates, the trail of a mask, attention."""

import contextlib
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


class Gates(Probe):
    """Histograms of the gates by epoch, and the validation of a sampled net while they are open."""

    def __init__(self) -> None:
        self.histograms: list[Tensor] = []

    def row(self) -> dict[str, float]:
        """No column; counts the gates."""
        flat = torch.cat([value.flatten() for value in self.method.values()])
        self.histograms.append(torch.histc(flat.cpu().float(), 40, 0, 1))
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
        vars(self).update(state)

    @contextlib.contextmanager
    def _sampled(self):
        gates = self.method.masks
        # Draws of its own: looking must not change the training.
        own = torch.Generator(gates[0].gate.device).manual_seed(0)
        before = [(each.generator, each.bernoulli) for each in gates]
        for each in gates:
            each.generator, each.bernoulli, each.sample_in_eval = own, True, True
        try:
            yield
        finally:
            for each, (generator, bernoulli) in zip(gates, before, strict=True):
                each.generator, each.bernoulli, each.sample_in_eval = generator, bernoulli, False


class Trail(Probe):
    """What a method's masks cut, when, and what came back; and where the training moved weights.

    `changes`: the step of each change of the masks, and how many weights of each layer it cut and
    took back; all are kept at the start. `parts`: for each part of the training the summed
    |change| of each layer's weights, sampled every `period` steps, of all of them and of those
    kept in the end. `explored`: the steps in which cut weights were updated.
    """

    def attach(self, method: Method, model: Any, context: Context) -> None:
        """Look at weights and masks; count the layers' MACs, for the cost of training."""
        super().attach(method, model, context)
        self.macs = measure.layer_macs(model, context.example)
        self.sizes = np.array([weight.numel() for weight in method.weights])
        self.last = [weight.detach().clone() for weight in method.weights]
        self.moved = [torch.zeros_like(weight) for weight in self.last]
        self.masks = [each.mask.clone() for each in method.masks]
        self.step = self.explored = self.moved_at = self.told = 0
        self.threshold = 0.0
        self.changes: list[tuple[int, list[int], list[int]]] = []
        self.parts: list[tuple[list[float], list[float]]] = []

    def update(self, at: At) -> None:
        """Note a change of the masks; add the movement every `period` steps."""
        self.step = at.total_step
        if self.step - self.moved_at >= self.method.period:
            self.moved_at = self.step
            self._move()
        if self.method.masked_at == self.step:
            self._note()
        if at.phase == "explore":
            self.explored = self.step
            if at.last and self.step < at.total_steps:
                self._close()

    def finished(self, net: Any) -> None:  # noqa: ARG002
        """Note the masks that the method finished with, and the rest of the movement."""
        if any((a != m.mask).any() for a, m in zip(self.masks, self.method.masks, strict=True)):
            self._note()
        self._close()

    @torch.no_grad()
    def _note(self) -> None:
        cut, returned, lowest = [], [], []
        triples = zip(self.method.weights, self.masks, self.method.masks, strict=True)
        for weight, before, each in triples:
            lowest.append(torch.where(each.mask == 1, weight.abs(), torch.inf).min())
            cut.append(int((before > each.mask).sum()))
            returned.append(int((before < each.mask).sum()))
            before.copy_(each.mask)
        self.threshold = torch.stack(lowest).min().item()
        self.changes.append((self.step, cut, returned))

    @torch.no_grad()
    def _move(self) -> None:
        for moved, last, weight in zip(self.moved, self.last, self.method.weights, strict=True):
            moved.add_(last.sub_(weight).abs_())
            last.copy_(weight)

    def _close(self) -> None:
        self._move()
        every = [moved.sum(dtype=torch.float64).item() for moved in self.moved]
        pairs = zip(self.moved, self.masks, strict=True)
        surviving = [moved[mask == 1].sum(dtype=torch.float64).item() for moved, mask in pairs]
        self.parts.append((every, surviving))
        for moved in self.moved:
            moved.zero_()

    def row(self) -> dict[str, float]:
        """The smallest |w| that the last mask kept; weights cut and returned in this epoch."""
        new, self.told = self.changes[self.told :], len(self.changes)
        cut, returned = (sum(sum(change[i]) for change in new) for i in (1, 2))
        return {"threshold": self.threshold, "cut": cut, "returned": returned}

    def measures(self) -> dict[str, Any]:
        """What the trail comes to.

        `scope_weights`, `scope_sparsity`: of the layers that are pruned. `returns`: how often a
        weight came back, on average. `surviving`: share of all movement of weights that fell on
        weights kept in the end, in all and by part of the training. `layer_focus`: density of the
        layer in which a movement falls, over the net's (1: updates do not prefer dense layers).
        `train_cost`: see `train_cost`.
        """
        total = self.sizes.sum()
        kept = np.array([int(mask.count_nonzero()) for mask in self.masks])
        density, overall = kept / self.sizes, kept.sum() / total
        movement = np.array(self.parts)  # (parts, all or kept, layers)
        every, surviving = movement.sum(0)
        parts = zip(("explore", "exploit"), movement.sum(2), strict=False)
        found = {
            "scope_weights": int(total),
            "scope_sparsity": float(1 - overall),
            "returns": sum(sum(returned) for _, _, returned in self.changes) / int(total),
            "surviving": _share(surviving.sum(), every.sum()),
            **{f"surviving_{part}": _share(kept, moved) for part, (moved, kept) in parts},
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
        passes = (2 * kept + late) / self.sizes + self.explored
        dense = 3 * steps * (inside.sum() + sum(macs.values()))
        return float(1 - (inside @ (3 * steps - passes)) / dense)

    def kept_steps(self, steps: int) -> np.ndarray:
        """Sum over the steps up to `steps` of each layer's number of kept weights."""
        kept, found, before = self.sizes, np.zeros_like(self.sizes), 0
        for step, cut, returned in self.changes:
            found = found + (step - before) * kept
            kept, before = kept - cut + returned, step
        return found + (steps - before) * kept

    def arrays(self) -> dict[str, np.ndarray]:
        """The trail for figures; rows of a long one cover several changes (their last step).

        `trail_step` (rows,), `trail_cut`, `trail_returned` (rows, layers), `trail_size` (layers,).
        """
        count, width = len(self.changes), len(self.sizes)
        groups = np.array_split(np.arange(count), max(1, min(count, _MOST // width)))
        rows = [[self.changes[i] for i in group] for group in groups if len(group)]
        summed = [[np.sum([change[i] for change in row], 0) for row in rows] for i in (1, 2)]
        cut, returned = (np.array(each, np.int32).reshape(-1, width) for each in summed)
        steps = np.array([row[-1][0] for row in rows], np.int32)
        found = {"trail_step": steps, "trail_size": self.sizes.astype(np.int32)}
        return found | {"trail_cut": cut, "trail_returned": returned}

    def state(self) -> dict[str, Any]:
        """The trail, and where the training is."""
        return {key: getattr(self, key) for key in _STATE}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        vars(self).update(state)


_STATE = tuple("step explored moved_at told threshold changes parts last moved masks".split())


class AttentionTrail(Trail):
    """The trail, and histograms of the attention by epoch, of all and of kept weights."""

    def attach(self, method: Method, model: Any, context: Context) -> None:
        """Count the attention at the start."""
        super().attach(method, model, context)
        self.histograms = [self._histogram()]

    def row(self) -> dict[str, float]:
        """The trail's columns; counts the attention."""
        self.histograms.append(self._histogram())
        return super().row()

    def arrays(self) -> dict[str, np.ndarray]:
        """The trail; `attention` (epochs + 1, 2, 80): how often A takes each value."""
        counts = torch.stack(self.histograms).numpy().astype(np.int32)
        return super().arrays() | {"attention": counts}

    def state(self) -> dict[str, Any]:
        """The trail's state and the histograms so far."""
        return super().state() | {"histograms": self.histograms}

    @torch.no_grad()
    def _histogram(self) -> Tensor:
        pairs = list(zip(self.method.weights, self.method.masks, strict=True))
        every = torch.cat([m.attention(w).flatten() for w, m in pairs]).cpu().float()
        kept = torch.cat([m.mask.flatten() for _, m in pairs]).cpu() == 1
        every.clamp_(max=_HIGHEST)
        return torch.stack([torch.histc(a, _BINS, 0, _HIGHEST) for a in (every, every[kept])])


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
