"""Channels removed by name, and what was removed or folded compared with what was there."""

import re
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from prunestudy.errors import refused, require, require_one_of
from prunestudy.shrink.compare import apart
from prunestudy.shrink.fold import fold
from prunestudy.shrink.groups import PRODUCES, Group, Member, read_groups, signal_remains
from prunestudy.shrink.narrow import narrow
from prunestudy.shrink.proof import Proof, proven
from prunestudy.shrink.runs import drawn, evaluating, given, outputs_of
from prunestudy.shrink.trace import trace
from prunestudy.values import inputs

Inputs = Tensor | tuple[Tensor, ...]


def remove(model: nn.Module, keep: Mapping[str, Sequence[int]], example: Inputs) -> nn.Module:
    """Return a copy of `model` in which the layers that `keep` names have only those channels.

    `keep` maps a layer's name (a convolution or linear layer) to its output channels that stay;
    all other layers stay whole, but those that share or read these channels follow. `example` is
    an input batch, or a tuple of them. The copy computes what `model` does with the weights at zero
    that read the removed channels; it is trainable as `model` is. Raises `InputError` for a layer
    or channel that does not exist or cannot go, and as `groups` for what loses channels.
    """
    traced = trace(model, example)
    every = read_groups(traced)
    require(isinstance(keep, Mapping), "keep", keep, "channels by the name of their layer")
    stays = _kept(every, {name: _numbers(name, channels) for name, channels in keep.items()})
    lose = [i for i, group in enumerate(every) if len(stays[i]) < group.channels]
    found, kept = proven(traced, [every[i] for i in lose]), [stays[i] for i in lose]
    for group in found:
        norm = next((m.layer for m in group.members if m.kind == "LayerNorm"), None)
        why = f"its statistics are of all channels, those of {group.name!r} cannot go"
        require(norm is None, "module", norm, why)
    emptied = [group for group, stay in zip(found, kept, strict=True) if not len(stay)]
    names = ", ".join(group.name for group in emptied)
    possible = all(g.skippable for g in emptied) and signal_remains(traced, emptied)
    require(possible or not emptied, "keep", names, "without these no signal is left")
    return trainable_as(model, remove_groups(model, found, kept, example))


def trainable_as(model: nn.Module, small: nn.Module) -> nn.Module:
    """Give the parameters and modules of `small` the flags and modes of those of `model`."""
    learns: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        made = re.sub(r"(parametrizations\.)?(\w+?)(\.original\d*|_orig|_g|_v)$", r"\2", name)
        learns[name] = parameter.requires_grad
        learns.setdefault(made, parameter.requires_grad)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        module.training = modes.get(name, model.training)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(learns.get(name, True))
    return small


def remove_groups(
    model: nn.Module, groups: Sequence[Group], kept: Sequence[Tensor], example: Inputs
) -> nn.Module:
    """Return `model`, folded and narrowed, compared with the gated net; raise `InputError`."""
    plain = fold(model)
    small = narrow(fold(plain), groups, kept)  # a net may hold its tensors in lists, too
    example = inputs(example)
    batch = drawn(example, plain.double())
    gap = Proof(plain, groups, batch, example).gap(fold(small).double(), kept)
    require(not gap, "model", type(model).__name__, f"the smaller net differs: {gap}")
    return small


def folded(model: nn.Module, example: Inputs) -> nn.Module:
    """Return `fold(model)`, compared with `model` in eval mode; `InputError` if they differ.

    On random inputs, or on `example` where the model fails on those.
    """
    plain, example = fold(model), inputs(example)
    batch, shapes = drawn(example, plain), [tuple(x.shape) for x in example]
    with torch.no_grad(), evaluating(model), refused("example", shapes, "the net fails on it"):
        try:
            right = outputs_of(model, batch)
        except Exception:  # a user's net may raise anything, of a matrix without inverse too
            right = outputs_of(model, batch := given(example, batch))
        gap = apart(right, outputs_of(plain, batch))
        if gap and apart(right, outputs_of(model, batch)):
            gap = "its output differs from call to call"
    require(not gap, "model", type(model).__name__, f"cannot be folded: {gap}")
    return plain


def _numbers(layer: str, channels: Any) -> set[int]:
    """The channels as plain numbers; `InputError` for others and for a mask."""
    numbers = channels.tolist() if hasattr(channels, "tolist") else channels
    numbers = list(numbers) if isinstance(numbers, Iterable) else [None]
    right = not any(isinstance(i, bool) or not hasattr(i, "__index__") for i in numbers)
    require(right, f"keep[{layer!r}]", channels, "numbers of channels")
    return {index(i) for i in numbers}


def _kept(groups: Sequence[Group], keep: Mapping[str, set[int]]) -> list[Tensor]:
    """The channels kept of each group, from those kept of layers."""
    makers: dict[str, dict[int, Member]] = {}  # by layer, and number of the group
    for number, group in enumerate(groups):
        for m in group.having(PRODUCES):
            makers.setdefault(m.layer, {})[number] = m
    kept, said = [set(range(group.channels)) for group in groups], {}
    for layer, channels in keep.items():
        require_one_of("keep", layer, makers)
        members, named, shown = makers[layer], f"keep[{layer!r}]", sorted(channels)
        every = set(range(next(iter(members.values())).size))
        require(channels <= every, named, shown, f"channels of 0..{len(every) - 1}")
        removable = {i for m in members.values() for places in m.indices for i in places}
        fixed = sorted(every - channels - removable)
        require(not fixed, named, shown, f"channels {fixed} must stay, others need them")
        for number, m in members.items():
            stay = {c for c, places in enumerate(m.indices) if channels.issuperset(places)}
            gone = {i for c, places in enumerate(m.indices) if c not in stay for i in places}
            half = sorted(gone & channels)
            require(not half, named, shown, f"channels {half} go with others that are gone")
            other = said.setdefault(number, layer)
            why = f"other channels than {other!r}, which is of the same group"
            require(other == layer or kept[number] == stay, named, shown, why)
            kept[number] = stay
    return [torch.tensor(sorted(stay), dtype=torch.long) for stay in kept]
