"""The gated net, and how the small one differs from it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunestudy.shrink.groups import CONSUMES, Group

_LIMIT = 1e-9  # of the largest output


@contextmanager
def gated(net: nn.Module, groups: Sequence[Group], kept: Sequence[Tensor]) -> Iterator[None]:
    """Within, the layers of `net` read zeros of all channels but those kept.

    A layer norm takes its statistics over those kept: it is the one layer that a gate before it
    does not turn into the smaller one.
    """
    gates: dict[str, Tensor] = {}
    for group, stay in zip(groups, kept, strict=True):
        open_ = torch.zeros(group.channels, dtype=torch.float64)
        open_[stay] = 1
        for m in group.members:
            if m.role == CONSUMES or m.kind == "LayerNorm":
                gates[m.layer] = gates.get(m.layer, 1.0) * m.spread(open_)
    layers = {name: net.get_submodule(name) for name in gates}
    for name, layer in layers.items():
        call = _norm_gated if isinstance(layer, nn.LayerNorm) else _gated_call
        layer.forward = partial(call, layer, layer.forward, gates[name])
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _gated_call(layer: nn.Module, call: Callable, gate: Tensor, x: Tensor, *rest: Any) -> Any:
    axis = -1 if isinstance(layer, nn.Linear) else x.dim() - len(layer.kernel_size) - 1
    return call(x * gate.to(x).view(-1, *[1] * ((x.dim() - 1 - axis) % x.dim())), *rest)


def _norm_gated(layer: nn.LayerNorm, _: Callable, gate: Tensor, x: Tensor) -> Tensor:
    """What `layer` makes of the open features alone, zero at the others."""
    out, open_ = torch.zeros_like(x), gate.to(x.device) > 0
    rest = (None if w is None else w[open_] for w in (layer.weight, layer.bias))
    out[..., open_] = nn.functional.layer_norm(x[..., open_], (int(open_.sum()),), *rest, layer.eps)
    return out


@contextmanager
def mode(net: nn.Module, training: bool) -> Iterator[None]:
    """Within, `net` is in training or eval mode; its statistics are put back after."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()} if training else {}
    net.train(training)
    try:
        yield
    finally:
        net.eval()
        for name, buffer in buffers.items():
            net.get_buffer(name).copy_(buffer)


@contextmanager
def leaves(net: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """Collect in `found` the last output of each module without children, in order."""
    handles = []
    for name, module in net.named_modules():
        if not any(module.children()):
            keep = lambda _, __, out, name=name: found.update({name: out})  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inside(whole: object, part: object) -> bool:
    """Whether each channel of `part`, wherever they lie, is one of `whole`."""
    if not (isinstance(whole, Tensor) and isinstance(part, Tensor)) or not part.numel():
        return True
    differ = [i for i, (a, b) in enumerate(zip(whole.shape, part.shape, strict=False)) if a != b]
    if whole.dim() != part.dim() or len(differ) > 1:
        return False
    if not differ:
        return not apart([whole], [part])
    a, b = (t.detach().movedim(differ[0], 0).flatten(1).double() for t in (whole, part))
    mix = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(0), dtype=a.dtype)
    a, b = ((t.cpu() @ mix) for t in (a, b))
    a = a.sort().values
    near = torch.searchsorted(a, b).clamp(max=len(a) - 1)
    gaps = torch.minimum((a[near] - b).abs(), (a[(near - 1).clamp(min=0)] - b).abs())
    return bool((gaps <= _LIMIT * a.abs().max() + 1e-12).all())


def apart(expected: list[Tensor], found: list[Tensor]) -> str:
    """How `found` differs from `expected`; empty if it does not."""
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (expected, found)]
    if shapes[0] != shapes[1]:
        return f"its output has shapes {shapes[1]} in place of {shapes[0]}"
    for right, given in zip(expected, found, strict=True):
        known = right.isfinite()
        a, b = right.detach()[known].double(), given.detach()[known].double()
        if a.numel():
            gap, most = float((a - b).abs().max()), float(a.abs().max())
            if not gap <= _LIMIT * most + 1e-12:
                return f"its output is {gap / (most or 1):.1e} off"
    return ""
