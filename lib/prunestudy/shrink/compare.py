"""Gates on what a net's layers read, and how outputs differ."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunestudy.shrink.groups import CONSUMES, Group

_LIMIT = 1e-9  # in float64, of the largest output


@contextmanager
def gates(net: nn.Module, groups: Sequence[Group], kept: Sequence[Tensor]) -> Iterator[dict]:
    """Within, the layers of `net` read zeros of all channels but those kept; gives the gates.

    A layer norm takes its statistics over those kept.
    """
    made: dict[str, Tensor] = {}
    for group, stay in zip(groups, kept, strict=True):
        open_ = torch.zeros(group.channels, dtype=torch.float64)
        open_[stay] = 1
        for m in group.members:
            if m.role == CONSUMES or m.kind == "LayerNorm":
                made[m.layer] = made.get(m.layer, 1.0) * m.spread(open_)
    layers = {name: net.get_submodule(name) for name in made}
    for name, layer in layers.items():
        layer.forward = partial(_gated_call, layer, layer.forward, made[name])
    try:
        yield made
    finally:
        for layer in layers.values():
            del layer.forward


def _gated_call(layer: nn.Module, call: Callable, gate: Tensor, *args: Any, **named: Any) -> Any:
    x, *rest = args or (named.pop("input"),)
    if isinstance(layer, nn.LayerNorm):  # of the open features alone, zero at the others
        out, open_ = torch.zeros_like(x), gate.to(x.device) > 0
        affine = (None if w is None else w[open_] for w in (layer.weight, layer.bias))
        size = (int(open_.sum()),)
        out[..., open_] = nn.functional.layer_norm(x[..., open_], size, *affine, layer.eps)
        return out
    axis = -1 if isinstance(layer, nn.Linear) else x.dim() - len(layer.kernel_size) - 1
    x = x * gate.to(x).view(-1, *[1] * ((x.dim() - 1 - axis) % x.dim()))
    return call(x, *rest, **named)


@contextmanager
def in_training(net: nn.Module) -> Iterator[None]:
    """Within, `net` is in training mode; then in eval mode with the statistics that it had."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()
    try:
        yield
    finally:
        net.eval()
        for name, buffer in buffers.items():
            net.get_buffer(name).copy_(buffer)


def inside(whole: object, part: object) -> bool:
    """Whether each channel of `part`, wherever they lie, is one of `whole`."""
    if not (isinstance(whole, Tensor) and isinstance(part, Tensor)) or not part.numel():
        return True
    differ = [i for i, (a, b) in enumerate(zip(whole.shape, part.shape, strict=False)) if a != b]
    if whole.dim() != part.dim() or len(differ) > 1:
        return False
    if not differ:
        return not apart([whole], [part])
    a, b = (t.movedim(differ[0], 0).flatten(1).double() for t in (whole, part))
    near = torch.cdist(b, a, p=torch.inf).min(1).values
    return bool((near <= _LIMIT * a.abs().max() + 1e-12).all())


def apart(expected: list[Tensor], found: list[Tensor], values: bool = True) -> str:
    """How `found` differs from `expected`, in shapes and `values`; empty if it does not."""
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (expected, found)]
    if shapes[0] != shapes[1]:
        return f"its output has shapes {shapes[1]} in place of {shapes[0]}"
    for right, got in zip(expected, found, strict=True) if values else ():
        known = right.isfinite()
        a, b = right.detach()[known].double(), got.detach()[known].double()
        if a.numel():
            gap, most = float((a - b).abs().max()), float(a.abs().max())
            single = right.is_floating_point() and right.dtype != torch.float64
            limit = torch.finfo(right.dtype).eps ** 0.5 if single else _LIMIT
            if not gap <= limit * most + 1e-12:
                return f"its output is {gap / (most or 1):.1e} off"
    return ""
