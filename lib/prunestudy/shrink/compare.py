"""The gated net, and how a small one differs from it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from prunestudy.shrink.groups import CONSUMES, Group
from prunestudy.shrink.runs import first_line, outputs_of, watching

_LIMIT = 1e-9  # in float64, of the largest output


class Gated:
    """A net in float64 that reads zeros in place of the channels that are not kept."""

    def __init__(self, net: nn.Module, groups: Sequence[Group], batch: tuple[Tensor, ...]) -> None:
        self.net, self.groups, self.two = net, groups, batch
        self.one = tuple(x[:1] for x in batch)

    def gap(self, small: nn.Module, kept: Sequence[Tensor], training: bool = True) -> str:
        """How `small` fails or differs with the channels `kept` of each group; empty if it doesn't.

        In eval mode on one input; with `training` also on two, in training mode where it is
        defined. `small` may change its batch-norm statistics.
        """
        gap = self._gap(small, kept, self.one, False)
        if gap or not training:
            return gap
        gap = self._gap(small, kept, self.two, True)
        return self._gap(small, kept, self.two, False) if gap and not self.trains else gap

    def _gap(
        self, small: nn.Module, kept: Sequence[Tensor], batch: tuple[Tensor, ...], train: bool
    ) -> str:
        try:
            expected = self.outputs(kept, batch, train)
            with watching(small, "fails"):
                return apart(expected, outputs_of(small.train(train), batch))
        except Exception as error:  # whatever a user's net raises
            return first_line(error)

    def outputs(
        self, kept: Sequence[Tensor], batch: tuple[Tensor, ...], train: bool
    ) -> list[Tensor]:
        """What the gated net computes; its statistics stay as they are."""
        with _gates(self.net, self.groups, kept), _training(self.net) if train else nullcontext():
            return outputs_of(self.net, batch)

    @cached_property
    def trains(self) -> bool:
        """Whether the net in training mode gives one answer for one batch."""
        try:
            with _training(self.net):
                return not apart(*(outputs_of(self.net, self.two, seed=seed) for seed in (0, 1)))
        except Exception:  # a batch norm of one value, or anything of a user's net
            return False


@contextmanager
def _gates(net: nn.Module, groups: Sequence[Group], kept: Sequence[Tensor]) -> Iterator[None]:
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
def _training(net: nn.Module) -> Iterator[None]:
    """Within, `net` is in training mode; then in eval mode with the statistics that it had."""
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()
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
    a, b = (t.movedim(differ[0], 0).flatten(1).double() for t in (whole, part))
    near = torch.cdist(b, a, p=torch.inf).min(1).values
    return bool((near <= _LIMIT * a.abs().max() + 1e-12).all())


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
            single = right.is_floating_point() and right.dtype != torch.float64
            limit = torch.finfo(right.dtype).eps ** 0.5 if single else _LIMIT
            if not gap <= limit * most + 1e-12:
                return f"its output is {gap / (most or 1):.1e} off"
    return ""
