"""An audit trail of a mask that changes during training: what was cut, when, and what came back.

Per mask update and layer: weights kept, cut and returned, the threshold and the loss. Per weight:
the last update that cut it, its magnitude then, and how often it was cut. And where the training
moved the weights, so that one can ask how much of that movement is left in the final net.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Bytes of the trail in a run's arrays; a longer one is told in fewer rows.
_MOST_BYTES = 500_000


@dataclass(frozen=True)
class Update:
    """One change of the mask, after `step` training steps; counts have one entry per layer.

    `threshold`: the smallest |w| that was kept; `loss`: the training loss of that step.
    """

    step: int
    threshold: float
    loss: float
    kept: tuple[int, ...]
    cut: tuple[int, ...]
    returned: tuple[int, ...]


class Trail:
    """The trail of the layers `names` with weights like `weights`; all are kept at the start."""

    def __init__(self, names: list[str], weights: list[Tensor]) -> None:
        self.names = names
        self.sizes = [w.numel() for w in weights]
        self.updates: list[Update] = []
        self._last = [w.detach().clone() for w in weights]
        self._moved = [torch.zeros_like(w) for w in self._last]
        self._when = [torch.zeros_like(w, dtype=torch.int32) for w in self._last]
        self._magnitude = [torch.zeros_like(w) for w in self._last]
        self._times = [torch.zeros_like(w, dtype=torch.uint8) for w in self._last]
        self._parts: list[tuple[list[float], list[float]]] = []

    def record(
        self,
        step: int,
        loss: float,
        sizes: list[Tensor],
        before: list[Tensor],
        after: list[Tensor],
    ) -> None:
        """Write down that the mask of weights with |w| = `sizes` went from `before` to `after`."""
        number = len(self.updates) + 1
        kept = self.updates[-1].kept if self.updates else self.sizes
        cut, returned, lowest = [], [], []
        for layer, (size, was, now) in enumerate(zip(sizes, before, after, strict=True)):
            lowest.append(torch.where(now == 1, size, torch.inf).min())
            changed = (was != now).nonzero(as_tuple=True)
            gone = now[changed] == 0
            where = tuple(index[gone] for index in changed)
            self._when[layer][where] = number
            self._magnitude[layer][where] = size[where]
            # The count stops at 255.
            self._times[layer][where] += (self._times[layer][where] < 255).to(torch.uint8)
            cut.append(len(where[0]))
            returned.append(len(gone) - len(where[0]))
        kept = tuple(k - c + r for k, c, r in zip(kept, cut, returned, strict=True))
        threshold = torch.stack(lowest).min().item()
        self.updates.append(Update(step, threshold, loss, kept, tuple(cut), tuple(returned)))

    @torch.no_grad()
    def move(self, weights: list[Tensor]) -> None:
        """Add how far each weight has come since the last call."""
        for moved, last, weight in zip(self._moved, self._last, weights, strict=True):
            moved.add_(last.sub_(weight).abs_())
            last.copy_(weight)

    def close(self, masks: list[Tensor]) -> None:
        """End a part of the training: sum its movement, over all weights and over `masks`."""
        every = [moved.sum(dtype=torch.float64).item() for moved in self._moved]
        pairs = zip(self._moved, masks, strict=True)
        surviving = [moved[mask == 1].sum(dtype=torch.float64).item() for moved, mask in pairs]
        self._parts.append((every, surviving))
        for moved in self._moved:
            moved.zero_()

    def movement(self) -> np.ndarray:
        """Summed |change| of the weights, (parts, layers, 2): of all, of those kept in the end."""
        return np.array(self._parts).reshape(-1, 2, len(self.names)).transpose(0, 2, 1)

    def kept_steps(self, steps: int) -> np.ndarray:
        """Sum over the steps up to `steps` of each layer's number of kept weights."""
        times = [0, *(u.step for u in self.updates), steps]
        kept = np.array([self.sizes, *(u.kept for u in self.updates)], dtype=np.int64)
        return (np.diff(times)[:, None] * kept).sum(0)

    def arrays(self) -> dict[str, np.ndarray]:
        """The trail for figures; rows of a long one cover several updates (their last step).

        `trail_kept`, `trail_cut`, `trail_returned` (rows, layers), `trail_step`,
        `trail_threshold`, `trail_loss` (rows,), `trail_size` (layers,), `trail_movement` (parts,
        layers, 2), `trail_layers`: the names, joined by line ends, in UTF-8.
        """
        most = max(1, _MOST_BYTES // (12 * len(self.names) + 12))
        groups = np.array_split(np.arange(len(self.updates)), min(most, len(self.updates)) or 1)
        rows = [[self.updates[i] for i in group] for group in groups if len(group)]
        width = len(self.names)

        def column(values: list, kind: type = np.int32, shape: tuple[int, ...] = ()) -> np.ndarray:
            return np.array(values, dtype=kind).reshape(-1, *shape)

        return {
            "trail_step": column([row[-1].step for row in rows]),
            "trail_threshold": column([row[-1].threshold for row in rows], np.float32),
            "trail_loss": column([np.mean([u.loss for u in row]) for row in rows], np.float32),
            "trail_kept": column([row[-1].kept for row in rows], shape=(width,)),
            "trail_cut": column([np.sum([u.cut for u in r], 0) for r in rows], shape=(width,)),
            "trail_returned": column(
                [np.sum([u.returned for u in r], 0) for r in rows], shape=(width,)
            ),
            "trail_size": column(self.sizes),
            "trail_movement": self.movement().astype(np.float32),
            "trail_layers": np.frombuffer("\n".join(self.names).encode(), dtype=np.uint8),
        }

    def per_weight(self, masks: list[Tensor]) -> dict[str, np.ndarray]:
        """One value per weight and layer: `NAME:when` (number of the last update that cut it, 0 for
        never), `NAME:magnitude` (|w| then), `NAME:times` (how often it was cut, at most 255),
        `NAME:kept` (in the final `masks`); and `step`, `threshold` of every update.
        """
        found = {
            "step": np.array([u.step for u in self.updates], dtype=np.int32),
            "threshold": np.array([u.threshold for u in self.updates], dtype=np.float32),
        }
        for layer, name in enumerate(self.names):
            for kind in ("when", "magnitude", "times"):
                tensor = getattr(self, f"_{kind}")[layer]
                found[f"{name}:{kind}"] = tensor.cpu().contiguous().numpy()
            found[f"{name}:kept"] = (masks[layer] == 1).cpu().contiguous().numpy()
        return found

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        tensors = {key: getattr(self, key) for key in _TENSORS}
        return {**tensors, "updates": [vars(u) for u in self.updates], "parts": self._parts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        for key in _TENSORS:
            for own, saved in zip(getattr(self, key), state[key], strict=True):
                own.copy_(saved)
        self.updates = [Update(**values) for values in state["updates"]]
        self._parts = [tuple(part) for part in state["parts"]]


_TENSORS = ("_last", "_moved", "_when", "_magnitude", "_times")
