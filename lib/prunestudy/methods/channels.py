"""The channels of a net that may be removed, numbered, and what the net costs without them.

With g (N,) holding one number per channel (a gate, or 1 for kept and 0 for removed),

    cost(g) = sum over layers of  n k^2 / groups * (sum of g over its inputs) * (... its outputs)
              + what is one number per channel (depth-wise kernels, batch norm, biases)
              + what lies in none of these layers (embeddings, recurrent layers), which stays

where n is the number of positions at which the kernel is applied for MACs, and 1 for parameters.
The cost is bilinear in the gates of neighbouring layers (GDP, claim 6 of its card). At zeros and
ones it is exactly what the small net costs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy import measure, shrink
from prunestudy.errors import InputError, require
from prunestudy.methods.base import Method
from prunestudy.shrink.fold import channels_last
from prunestudy.shrink.groups import CONSUMES, PRODUCES, read_groups, signal_remains, silent_layers
from prunestudy.shrink.layers import LAYERS, channels_of, is_follower
from prunestudy.shrink.proof import proven
from prunestudy.shrink.remove import remove_groups
from prunestudy.shrink.trace import trace
from prunestudy.values import inputs

_CPU = torch.device("cpu")


class Channels:
    """Numbers the channels of all dependency groups of `model`, group after group.

    `example` is an input batch, or a tuple of them. `kind` is what `cost` counts: "macs" of one
    input, or "parameters". With `only`, just the groups of these names may lose channels; groups
    that the patterns `leave` name keep all. Layer norm takes its statistics over all its channels,
    so its groups are left out unless `norms`. Raises `InputError` for a net that cannot be traced
    or has no channel to remove, and for a group that does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        kind: str,
        only: Sequence[str] = (),
        norms: bool = False,
        leave: str = "",
    ) -> None:
        shrink.require_ordinary(model)
        self.example = inputs(example)
        self.traced = trace(model, self.example)
        found = _without(read_groups(self.traced), leave.split())
        try:
            found = proven(self.traced, found)
        except InputError as error:
            raise InputError(f"{error}; `leave` can exclude layers from pruning") from None
        self.groups = [g for g in found if norms or all(m.kind != "LayerNorm" for m in g.members)]
        if only:
            self.groups = [shrink.find(self.groups, name) for name in only]
        require(bool(self.groups), "model", type(model).__name__, "has no channels that could go")
        ends = list(accumulate(group.channels for group in self.groups))
        self.slices = [slice(e - g.channels, e) for e, g in zip(ends, self.groups, strict=True)]
        self.size, self._pairs = ends[-1], list(zip(self.groups, self.slices, strict=True))
        sizes = torch.tensor([group.channels for group in self.groups])
        self.group_of = torch.arange(len(self.groups)).repeat_interleave(sizes)
        self._numbers: dict[tuple[str, str], Tensor] = {}
        for group, part in self._pairs:
            for m in group.members:
                place = (m.layer, m.axis)
                numbers = self._numbers.setdefault(place, torch.full((m.size,), self.size))
                here = m.channel_of >= 0
                numbers[here] = m.channel_of[here] + part.start
        self._tables = {_CPU: self._count(kind, measure.layer_macs(model, self.example))}
        self.dense = float(self.cost(torch.ones(self.size)))
        # What is in no convolution, linear layer or norm: embeddings, recurrent layers, products.
        whole = measure.macs(model, self.example) if kind == "macs" else measure.parameters(model)
        if (rest := whole - round(self.dense)) > 0:
            table = self._tables[_CPU]
            self._tables[_CPU] = table._replace(constant=table.constant + rest)
            self.dense = float(whole)

    def numbers(self, layer: str, axis: str) -> Tensor:
        """Channel number at each index of a layer's axis ("in", "out"); `size` if not removable."""
        stays = torch.full((channels_of(self.traced.layers[layer], axis),), self.size)
        return self._numbers.get((layer, axis), stays)

    def cost(self, g: Tensor) -> Tensor:
        """MACs or parameters at `g` (N,), 0-d float64 on its device; differentiable."""
        g, t = g.double(), self._on(g.device)
        inside, outside = t.fixed_in + t.inside @ g, t.fixed_out + t.outside @ g
        return t.factor @ (inside * outside) + t.single @ g + t.constant

    def cost_at(self, kept: Sequence[int]) -> float:
        """The cost with `kept` channels in each group: all channels of a group cost the same."""
        t, k = self._of_groups, np.array(kept, float)
        kernels = t.factor @ ((t.fixed_in + t.inside @ k) * (t.fixed_out + t.outside @ k))
        return float(kernels + t.single @ k) + float(t.constant)

    @cached_property
    def _of_groups(self) -> "_Tables":
        """The tables in numpy, with one column for each group: that of its first channel."""
        first, t = [part.start for part in self.slices], self._tables[_CPU]
        columns = {name: getattr(t, name)[..., first] for name in ("inside", "outside", "single")}
        return _Tables(*(each.numpy() for each in t._replace(**columns)))

    def shares(self, g: Tensor) -> Tensor:
        """c = (d cost / d g) / dense cost at `g`: (N,), float64, on the device of `g`."""
        g, t = g.double(), self._on(g.device)
        inside = t.factor * (t.fixed_in + t.inside @ g)
        outside = t.factor * (t.fixed_out + t.outside @ g)
        return (t.inside.T @ outside + t.outside.T @ inside + t.single) / self.dense

    def removed(self, open_: Tensor) -> float:
        """Share (0-1) of the cost removed when only the channels `open_` (N,) are left."""
        return 1 - float(self.cost(open_)) / self.dense

    def close(self, order: Tensor, open_: Tensor, target: float) -> Tensor:
        """Close channels in `order` until `target` of the cost is removed; return those open.

        Skips channels that must stay; ends with the channel that meets the target, or with
        `order`. All tensors are on the CPU.
        """
        open_ = open_.clone()
        for number in order.tolist():
            if self.removed(open_) >= target - 1e-12:
                break
            if open_[number] and self._may_close(number, open_):
                open_[number] = False
                self._settle(open_)
        return open_

    def _may_close(self, number: int, open_: Tensor) -> bool:
        """Whether a channel may go: without a skip past its group, one of the group must stay."""
        i = int(self.group_of[number])
        if int(open_[self.slices[i]].sum()) > 1:
            return True
        emptied = [*self._emptied(open_), self.groups[i]]
        return self.groups[i].skippable and signal_remains(self.traced, emptied)

    def _settle(self, open_: Tensor) -> None:
        """Also close the groups that only layers of an emptied branch produce or consume."""
        useless: list[slice] | None = None
        while useless != [] and (emptied := self._emptied(open_)):
            silent = silent_layers(self.traced.layers, emptied)
            left = [(group, part) for group, part in self._pairs if open_[part].any()]
            useless = [part for group, part in left if _useless(group, silent)]
            for part in useless:
                open_[part] = False

    def most_removable(self) -> float:
        """Largest share (0-1) of the cost that can be removed."""
        open_ = torch.ones(self.size, dtype=torch.bool)
        for part in self.slices:
            open_[part.start + 1 : part.stop] = False
        return self.removed(self.close(open_.nonzero().flatten(), open_, 1.0))

    def kept(self, open_: Tensor) -> dict[str, int]:
        """Number of channels kept in each group, by name."""
        return {group.name: int(open_[part].sum()) for group, part in self._pairs}

    def smaller(self, model: nn.Module, open_: Tensor) -> nn.Module:
        """A smaller copy of `model` with only the open channels; see `remove_groups`."""
        kept = [open_[part].nonzero().flatten() for part in self.slices]
        return remove_groups(model, self.groups, kept, self.example)

    def _on(self, device: torch.device) -> "_Tables":
        """The cost's tables on `device`, copied there at the first use."""
        if device not in self._tables:
            self._tables[device] = _Tables(*(t.to(device) for t in self._tables[_CPU]))
        return self._tables[device]

    def _emptied(self, open_: Tensor) -> list[shrink.Group]:
        return [group for group, part in self._pairs if not open_[part].any()]

    def _count(self, kind: str, macs: dict[str, int]) -> "_Tables":
        layers, single = self.traced.layers, torch.zeros(self.size + 1, dtype=torch.float64)
        kernels, factor = [], []
        for name, layer in layers.items():
            kernel = isinstance(layer, LAYERS)
            weights = layer.weight.numel() if kernel else 0
            size = macs[f"{name}.weight"] if kernel and kind == "macs" else weights
            if kernel and not is_follower(layer):
                kernels.append(name)
                factor.append(size / math.prod(channels_of(layer, s) for s in ("in", "out")))
            numbers = self.numbers(name, "out")
            each = _alone(layer, kind, size) / channels_of(layer, "out")
            single.index_add_(0, numbers, torch.full((len(numbers),), each).double())
        tables = (*self._axis(kernels, "in"), *self._axis(kernels, "out"))
        factors = torch.tensor(factor, dtype=torch.float64)
        return _Tables(*tables, factors, single[:-1].clone(), single[-1].clone())

    def _axis(self, kernels: list[str], axis: str) -> tuple[Tensor, Tensor]:
        """How often each channel occurs on the axis of each kernel, and how many always stay."""
        count = torch.zeros(len(kernels), self.size + 1, dtype=torch.float64)
        for row, name in zip(count, kernels, strict=True):
            numbers = self.numbers(name, axis)
            row.index_add_(0, numbers, torch.ones(len(numbers), dtype=torch.float64))
        return count[:, :-1].contiguous(), count[:, -1].contiguous()


class _Tables(NamedTuple):
    """What `Channels.cost` is made of, float64: rows are kernels, columns channels."""

    inside: Tensor
    fixed_in: Tensor
    outside: Tensor
    fixed_out: Tensor
    factor: Tensor
    single: Tensor
    constant: Tensor


class Channelled(Method, ABC):
    """A method that removes some of its `channels`, and keeps those that are `open`.

    `leave`: layers whose channels all stay, patterns with `*` allowed, separated by spaces.
    """

    counts = ("macs", "parameters")
    leave: str = ""

    @abstractmethod
    def open(self) -> Tensor:
        """Which channels are open (N,), on the CPU."""

    def log(self) -> dict[str, float]:
        """The share of the MACs or parameters left with the open channels."""
        return {"kept": 1 - self.channels.removed(self.open())}

    def report(self) -> dict[str, Any]:
        """Whether the target was met, the share removed, and the channels kept of each group."""
        removed = self.channels.removed(self.open())
        met, kept = float(removed >= self.target - 1e-9), self.channels.kept(self.open())
        return {"target_met": met, "removed": removed, "channels": kept}


def become(model: nn.Module, small: nn.Module) -> None:
    """Turn `model` into `small`, in place, since the training holds on to the object.

    It keeps its mode, its memory layout, and which parameters are trained.
    """
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    if any(p.dim() == 4 and not p.is_contiguous() for p in model.parameters()):
        channels_last(small)
    for name, p in small.named_parameters():
        p.requires_grad_(name not in fixed)
    model.__dict__ = small.train(model.training).__dict__


def _without(groups: list[shrink.Group], leave: Sequence[str]) -> list[shrink.Group]:
    """`groups` but for those that one of the patterns `leave` names, or one of their producers."""
    names = [{group.name, *(m.layer for m in group.having(PRODUCES))} for group in groups]
    for pattern in leave if groups else ():  # a net without any is refused as such
        known = any(fnmatchcase(name, pattern) for each in names for name in each)
        allowed = f"no such layer among {', '.join(sorted(set().union(*names)))}"
        require(known, "leave", pattern, allowed)
    named = [any(fnmatchcase(n, p) for n in each for p in leave) for each in names]
    return [group for group, stays in zip(groups, named, strict=True) if not stays]


def _useless(group: shrink.Group, silent: set[str]) -> bool:
    """Whether all producers or all consumers of the channels of `group` are silent."""
    layers = [{m.layer for m in group.having(role)} for role in (PRODUCES, CONSUMES)]
    return any(each and each <= silent for each in layers)


def _alone(layer: nn.Module, kind: str, size: int) -> float:
    """What the outputs cost whatever the inputs: depth-wise kernels, batch norm, biases."""
    follows = is_follower(layer)
    if kind == "macs":
        return size if follows else 0
    return sum(p.numel() for name, p in layer.named_parameters() if follows or name != "weight")
