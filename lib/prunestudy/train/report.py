"""A pruning in words and numbers: what `Result.report` gives."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from prunestudy import measure
from prunestudy.measure.forward import device_of
from prunestudy.methods.base import moved

if TYPE_CHECKING:
    from prunestudy.train.prune import Result


def report(result: "Result") -> str:
    """The method, what is left of each layer, costs and the validation's numbers."""
    return "\n".join(_lines(result))


def _lines(result: "Result") -> Iterator[str]:
    dense, small, target = result.dense, result.model, result.method.target
    aim = f", target {target:g} of {result.method.of}" if target else ""
    yield f"{result.method.title}{aim}: {result.status} in {result.seconds:.1f} s"
    after = dict(small.named_modules())
    width = max(len(name) for name, _ in measure.prunable_weights(dense))
    for name, weight in measure.prunable_weights(dense):
        layer = after.get(name.removesuffix(".weight").removesuffix("weight"))
        yield f"  {name:{width}}  {_sizes(weight)} -> {_left(layer)}"
    for name, count in (
        ("parameters", measure.parameters),
        ("nonzero parameters", measure.nonzeros),
        ("MACs", lambda net: measure.macs(net, moved(result.example, device_of(net)))),
    ):
        was, now = count(dense), count(small)
        yield f"{name}: {was:,} -> {now:,} ({1 - now / was:.1%} removed)"
    before, now = result.score(dense.to(result.example[0].device)), result.score(small)
    for name, value in now.items():
        yield f"validation {name}: {before[name]:.4f} -> {value:.4f}"


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
