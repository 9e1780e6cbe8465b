"""The gated net, and how a small one differs from it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from prunestudy.errors import first_line
from prunestudy.shrink.groups import CONSUMES, Group
from prunestudy.shrink.runs import given, outputs_of, watching

_LIMIT = 1e-9  # in float64, of the largest output
Batch = tuple[Tensor, ...]


class Gated:
    """A net in float64 that reads zeros in place of the channels that are not kept.

    `two` are random inputs, `example` is the user's.
    """

    def __init__(self, net: nn.Module, groups: Sequence[Group], two: Batch, example: Batch) -> None:
        self.net, self.groups, self.two = net, groups, two
        self.batches = [tuple(x[:1] for x in two), given(example, two)]

    def gap(self, small: nn.Module, kept: Sequence[Tensor], training: bool = True) -> str:
        """How `small` fails or differs with the channels `kept` of each group; empty if it doesn't.

        In eval mode on one input and on the user's; with `training` also on two, in training mode
        where it is defined. If their random draws differ there, only shapes are compared.
        `small` must also run without gradients. Its batch-norm statistics may change.
        """
        try:
            gaps = [self._apart(small, kept, batch) for batch in self.batches]
            outputs_of(small, self.batches[0], bare=True)
            if training and not any(gaps):
                gaps.append(self._apart(small, kept, self.two, train=self.moods is not None))
        except Exception as error:  # whatever a user's net raises
            return first_line(error)
        return max(gaps)

    def _apart(
        self, small: nn.Module, kept: Sequence[Tensor], batch: Batch, train: bool = False
    ) -> str:
        expected = self.outputs(kept, batch, train)
        with watching(small, "fails"):
            found = outputs_of(small.train(train), batch, last=True)
        gap = apart(expected[:-1], found[:-1])
        free = gap and train and (expected[-1] != found[-1] or self.moods)
        return apart(expected[:-1], found[:-1], values=False) if free else gap

    def outputs(self, kept: Sequence[Tensor], batch: Batch, train: bool) -> list[Tensor]:
        """What the gated net computes, and `last`; its statistics stay as they are."""
        with _gates(self.net, self.groups, kept), _training(self.net) if train else nullcontext():
            return outputs_of(self.net, batch, last=True)

    def silent(self) -> set[tuple[int, str]]:
        """Pairs (group number, layer that reads the group) on which no output depends.

        Without groups that must stay. Empty for a net that has no backward pass.
        """
        may_go = [(i, g) for i, g in enumerate(self.groups) if g.channels > 1 or g.skippable]
        kept = [torch.arange(group.channels) for group in self.groups]
        with torch.enable_grad(), _gates(self.net, self.groups, kept) as gates:
            for gate in gates.values():
                gate.grad = torch.zeros_like(gate.requires_grad_())
            try:
                found = [t.flatten() for x in self.batches for t in outputs_of(self.net, x)]
                known = torch.cat([t[t.isfinite()].cpu() for t in found])
                (known * torch.linspace(1, 2, len(known))).sum().real.backward()
            except Exception:  # whatever a user's net raises
                return set()
        pairs = [(i, m) for i, group in may_go for m in group.having(CONSUMES)]
        return {(i, m.layer) for i, m in pairs if not gates[m.layer].grad[m.channel_of >= 0].any()}

    @cached_property
    def moods(self) -> str | None:
        """How two passes with one seed differ in training mode; None if the net fails there."""
        try:
            with _training(self.net):
                return apart(*(outputs_of(self.net, self.two) for _ in range(2)))
        except Exception:  # a batch norm of one value, or anything of a user's net
            return None


@contextmanager
def _gates(net: nn.Module, groups: Sequence[Group], kept: Sequence[Tensor]) -> Iterator[dict]:
    """Within, the layers of `net` read zeros of all channels but those kept; gives the gates.

    A layer norm takes its statistics over those kept: for it alone, zeroing inputs is not the same
    as removing them.
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
        layer.forward = partial(_gated_call, layer, layer.forward, gates[name])
    try:
        yield gates
    finally:
        for layer in layers.values():
            del layer.forward


def _gated_call(layer: nn.Module, call: Callable, gate: Tensor, *args: Any, **named: Any) -> Any:
    x, *rest = args or (named.pop("input"),)
    if isinstance(layer, nn.LayerNorm):
        return _norm_gated(layer, gate, x)
    axis = -1 if isinstance(layer, nn.Linear) else x.dim() - len(layer.kernel_size) - 1
    x = x * gate.to(x).view(-1, *[1] * ((x.dim() - 1 - axis) % x.dim()))
    return call(x, *rest, **named)


def _norm_gated(layer: nn.LayerNorm, gate: Tensor, x: Tensor) -> Tensor:
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
