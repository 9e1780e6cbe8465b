"""What comes out of a pruning: the net, how it was trained, and a report in words and numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunestudy import measure, shrink
from prunestudy.errors import InputError
from prunestudy.measure.forward import device_of
from prunestudy.methods.base import TARGETS, Method
from prunestudy.methods.probes import Probe
from prunestudy.train.loaders import moved


@dataclass
class Result:
    """What `prune` gives back.

    `model`: an ordinary trainable module, in eval mode; `history`: a row per epoch; `status`:
    "done", "diverged" if a loss was not finite, or "came_apart" if mean |w| of a masked net grew a
    hundredfold; `seconds` of training; `method` and `probe` as the training left them; `example`:
    two inputs or more; `dense`: the model as given; `score(model)`: the validation's numbers.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    status: str
    seconds: float
    method: Method
    probe: Probe
    example: tuple[Tensor, ...]
    dense: nn.Module = field(repr=False)
    score: Callable[[nn.Module], Mapping[str, float]] = field(repr=False)

    def report(self) -> str:
        """What is left of each layer, MACs, parameters and the metric, before and after."""
        dense, small, method = self.dense, self.model, self.method
        aim = f", target {method.target:g} of {method.of}" if method.target else ""
        lines = [f"{method.title}{aim}: {self.status} in {self.seconds:.1f} s"]
        found = method.report()
        if found.get("target_met") == 0:
            share = f"{found['removed']:.4f} of {TARGETS[method.of]}"
            lines.append(f"target not met: {share} removed, no more can be")
        after, weights = dict(small.named_modules()), measure.prunable_weights(dense)
        width = max((len(name) for name, _ in weights), default=0)
        for name, weight in weights:
            layer = after.get(name.removesuffix("weight").removesuffix("."))
            lines.append(f"  {name:{width}}  {_sizes(weight)} -> {_left(layer)}")
        for name, count in (
            ("parameters", measure.parameters),
            ("nonzero parameters", measure.nonzeros),
            ("MACs", lambda net: measure.macs(net, moved(self.example, device_of(net)))),
        ):
            try:
                was, now = count(dense), count(small)
            except InputError as error:  # of a product that has no formula
                lines.append(f"{name}: not counted: {error}")
                continue
            gone = 1 - now / was if was else 0.0
            lines.append(f"{name}: {was:,} -> {now:,} ({gone:.1%} removed)")
        before, now = self.score(dense.to(self.example[0].device)), self.score(small)
        lines += [f"validation {n}: {before[n]:.4f} -> {value:.4f}" for n, value in now.items()]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the net to `path`, for `load` and a fresh instance of the model's class."""
        shrink.save(self.model, path)

    def export(self, path: str | Path) -> None:
        """Write the net to `path` as ONNX, for batches of any size."""
        shrink.export(self.model, path, self.example)


def _left(layer: nn.Module | None) -> str:
    """What is left of a layer: its sizes and zeros, its rank, or nothing."""
    if isinstance(layer, nn.Sequential):
        return f"{_sizes(layer[0].weight)} and {_sizes(layer[1].weight)} (low rank)"
    weight = getattr(layer, "weight", None)
    if weight is None:
        return "removed"
    zeros = 1 - int(weight.count_nonzero()) / weight.numel()
    return f"{_sizes(weight)}, {zeros:.1%} zeros" if zeros > 0 else _sizes(weight)


def _sizes(weight: Tensor) -> str:
    return " x ".join(map(str, weight.shape))
