"""The proof: no smaller net is handed out that was not compared with the gated one.

Groups are what torch-pruning's graph suggests. Before anything is trained, random subsets of their
channels are removed from a copy of the net in float64 with random weights and statistics, and what
is left is compared with the gated net: the same net where the layers that read those channels read
zeros. Two groups of one size lose different numbers of channels in one comparison at least. After
the real removal the same comparison is made with the real weights.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from prunestudy.errors import InputError, require, require_one_of
from prunestudy.shrink.compare import apart, gated, inside, leaves, mode
from prunestudy.shrink.fold import fold
from prunestudy.shrink.groups import CONSUMES, PRODUCES, Group, read_groups, signal_remains
from prunestudy.shrink.narrow import Narrow
from prunestudy.shrink.remove import Nothing, require_whole
from prunestudy.shrink.survey import called, drawn, outputs_of, watching
from prunestudy.shrink.trace import Trace, trace
from prunestudy.values import inputs

Inputs = Tensor | tuple[Tensor, ...]


def groups(model: nn.Module, example: Inputs) -> list[Group]:
    """Return the dependency groups of `model` on inputs as `example`, in order of execution.

    `example` is a batch (n, ...), or a tuple of them for a net with several inputs. `model` is
    left untouched; gated layers (parametrisations) may be in place. Raises `InputError` naming the
    module where the net cannot be traced, or does not pass the proof.
    """
    require_whole(model)
    return groups_of(trace(model, example))


def groups_of(traced: Trace) -> list[Group]:
    """Return the dependency groups of a traced net, proven; raise `InputError` as `groups`.

    A group may only be emptied (is skippable) if the net without it passes the proof as well.
    """
    found = read_groups(traced)
    return _Proof(traced, found).run() if found else []


def remove(model: nn.Module, keep: Mapping[str, Sequence[int]], example: Inputs) -> nn.Module:
    """Return a copy of `model` in which the layers that `keep` names have only those channels.

    `keep` maps a layer's name (a convolution or linear layer) to its output channels that stay,
    numbered as the layer has them; all others stay whole. The layers that share or read these
    channels follow. `example` is an input batch, or a tuple of them. The copy computes what `model`
    does with the weights at zero that read the removed channels; it is trainable as `model` is.
    Raises `InputError` for a layer or channel that does not exist or cannot go, and as `groups`.
    """
    require_whole(model)
    traced = trace(model, example)
    found = groups_of(traced)
    require(isinstance(keep, Mapping), "keep", keep, "channels by the name of their layer")
    kept = _kept(found, {name: _numbers(name, channels) for name, channels in keep.items()})
    for group, stay in zip(found, kept, strict=True):
        norm = next((m.layer for m in group.members if m.kind == "LayerNorm"), None)
        why = f"its statistics are of all channels, those of {group.name!r} cannot go"
        require(norm is None or len(stay) == group.channels, "module", norm, why)
    emptied = [group for group, stay in zip(found, kept, strict=True) if not len(stay)]
    names = ", ".join(group.name for group in emptied)
    possible = all(g.skippable for g in emptied) and signal_remains(traced, emptied)
    require(possible or not emptied, "keep", names, "without these no signal is left")
    small, learns = remove_groups(model, found, kept, example), {}
    for name, parameter in model.named_parameters():
        learns[name.replace("parametrizations.", "").partition(".original")[0]] = parameter
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        module.training = modes.get(name, model.training)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(name not in learns or learns[name].requires_grad)
    return small


def remove_groups(
    model: nn.Module, groups: Sequence[Group], kept: Sequence[Tensor], example: Inputs
) -> nn.Module:
    """Return `narrow(model, groups, kept)`, compared with the gated net; raise `InputError`."""
    small, plain = Narrow(model, groups)(kept), fold(model).double()
    batch = drawn(inputs(example), plain)
    with gated(plain, groups, kept):
        expected = outputs_of(plain, batch)
    with watching(small, "the smaller net fails"):
        gap = apart(expected, outputs_of(fold(small).double(), batch))
    require(not gap, "model", type(model).__name__, f"the smaller net differs: {gap}")
    return small


def folded(model: nn.Module, example: Inputs) -> nn.Module:
    """Return `fold(model)`, compared with `model` in eval mode; `InputError` if they differ."""
    plain = fold(model)
    batch, modes = drawn(inputs(example), plain), [(m, m.training) for m in model.modules()]
    try:
        with torch.no_grad():
            gap = apart(outputs_of(model.eval(), batch), outputs_of(plain, batch))
    finally:
        for module, training in modes:
            module.training = training
    require(not gap, "model", type(model).__name__, f"cannot be folded: {gap}")
    return plain


class _Proof:
    """The comparisons for one traced net and its groups."""

    def __init__(self, traced: Trace, groups: list[Group]) -> None:
        self.traced, self.groups, self.net = traced, groups, traced.net.eval()
        self.narrow, self.two = Narrow(self.net, groups), traced.example
        self.one = tuple(x[:1] for x in self.two)
        self.generator = torch.Generator().manual_seed(0)
        self.all = [torch.arange(group.channels) for group in groups]
        self.trains = self._trains()

    def run(self) -> list[Group]:
        """The groups, those only skippable that may be emptied; see `groups_of`."""
        self._require(self._random(range(len(self.groups))))
        for counts in self._counts():
            self._require(self._random(range(len(self.groups)), counts), training=False)
        may = self._emptied()
        return [
            Group(g.name, g.channels, g.members, g.skippable and i in may)
            for i, g in enumerate(self.groups)
        ]

    def _require(self, kept: list[Tensor], training: bool = True) -> None:
        if not self._differs(kept, training):
            return
        fewer = [i for i, stay in enumerate(kept) if len(stay) < self.groups[i].channels]
        for i in fewer:
            alone = self._random([i])
            if self._differs(alone, training):
                self._blame(self.groups[i], alone)
        self._blame(self.groups[fewer[0]], kept)

    def _random(self, chosen: Sequence[int], counts: Sequence[int] = ()) -> list[Tensor]:
        """Random channels of the groups `chosen`, all of others: `counts`, or some and not all."""
        kept = list(self.all)
        for i in chosen:
            n = self.groups[i].channels
            some = int(torch.randint(1, max(n, 2), (), generator=self.generator))
            order = torch.randperm(n, generator=self.generator)
            kept[i] = order[: counts[i] if counts else some].sort().values
        return kept

    def _counts(self) -> Iterator[list[int]]:
        """Numbers of channels kept such that two groups of one size differ at least once."""
        rank, sizes = [], [group.channels for group in self.groups]
        for i, size in enumerate(sizes):
            rank.append(sizes[:i].count(size))
        while True:
            yield [1 + r % n for r, n in zip(rank, sizes, strict=True)]
            rank = [r // n if n > 1 else 0 for r, n in zip(rank, sizes, strict=True)]
            if not any(rank):
                return

    def _differs(self, kept: list[Tensor], training: bool = True) -> str:
        """How the small net differs from the gated one, or fails; empty if it does not.

        In eval mode on one input; with `training` on two as well, and in that mode if defined.
        """
        small = self.narrow(kept)
        modes = [(self.one, False), (self.two, False), (self.two, True)]
        for batch, train in modes[: 2 + self.trains if training else 1]:
            with gated(self.net, self.groups, kept), mode(self.net, train):
                expected = outputs_of(self.net, batch)
            try:
                gap = apart(expected, outputs_of(small.train(train), batch))
            except Exception as error:  # whatever a user's net raises on fewer channels
                gap = next(iter(str(error).splitlines()), type(error).__name__)
            if gap:
                return gap
        return ""

    def _trains(self) -> bool:
        """Whether the net in training mode gives one answer for one batch."""
        try:
            with mode(self.net, training=True):
                both = [outputs_of(self.net, self.two, seed=seed) for seed in (0, 1)]
        except Exception:  # a batch norm of one value, or anything of a user's net
            return False
        return not apart(*both)

    def _emptied(self) -> set[int]:
        """Numbers of the groups without which the net still computes what the gated one does."""
        may, left = set(), [i for i, group in enumerate(self.groups) if group.skippable]
        while left:
            chosen: list[int] = []
            for i in left:
                if signal_remains(self.traced, [self.groups[j] for j in (*chosen, i)]):
                    chosen.append(i)
            may |= self._works_without(self._runs_without(chosen))
            left = [i for i in left if i not in chosen]
        return may

    def _runs_without(self, chosen: list[int]) -> list[int]:
        """Those of `chosen` that are left when the last group emptied before a crash stays."""
        small = self.narrow(self._none_of(chosen))
        try:
            with watching(small, "fails") as watch:
                outputs_of(small, self.one)
        except InputError:
            gone = [name for name, layer in watch.order.items() if isinstance(layer, Nothing)]
            last = {m for m in chosen for each in self.groups[m].members if each.layer in gone[-1:]}
            return self._runs_without([i for i in chosen if i not in last]) if last else chosen
        return chosen

    def _none_of(self, chosen: Sequence[int]) -> list[Tensor]:
        return [each[:0] if i in chosen else each for i, each in enumerate(self.all)]

    def _works_without(self, chosen: list[int]) -> set[int]:
        if not self._differs(self._none_of(chosen)):
            return set(chosen)
        half = len(chosen) // 2
        parts = (chosen[:half], chosen[half:]) if half else ()
        return set().union(*map(self._works_without, parts))

    def _blame(self, group: Group, kept: list[Tensor]) -> None:
        """Raise `InputError` naming the first module that does not treat channels one by one."""
        fails = f"cannot be pruned: it does not work on fewer channels of {group.name!r}"
        small, before, after = self.narrow(kept), {}, {}
        with gated(self.net, self.groups, kept), leaves(self.net, before):
            outputs_of(self.net, self.two)
        error = None
        try:
            with leaves(small, after), watching(small, fails):
                outputs_of(small, self.two)
        except InputError as raised:
            error = raised
        wrong = [name for name in after if not inside(before[name], after[name])]
        if not wrong and error:
            raise error
        reader = next((m.layer for m in group.having(CONSUMES)), group.members[0].layer)
        name = called(wrong[0] if wrong else reader)
        why = f"cannot be pruned: with fewer channels of {group.name!r} it computes something else"
        raise InputError(f"module = {name!r}: {why}")


def _numbers(layer: str, channels: Any) -> set[int]:
    """The channels as plain numbers; `InputError` for others and for a mask."""
    numbers = channels.tolist() if hasattr(channels, "tolist") else channels
    numbers = list(numbers) if isinstance(numbers, Iterable) else [None]
    right = not any(isinstance(i, bool) or not hasattr(i, "__index__") for i in numbers)
    require(right, f"keep[{layer!r}]", channels, "numbers of channels")
    return {index(i) for i in numbers}


def _kept(groups: Sequence[Group], keep: Mapping[str, set[int]]) -> list[Tensor]:
    """The channels kept of each group, from those kept of layers."""
    places: dict[str, dict[int, tuple[int, int]]] = {}
    sizes = {}
    for number, group in enumerate(groups):
        for m in group.having(PRODUCES):
            sizes[m.layer] = m.size
            here = places.setdefault(m.layer, {})
            here.update({i: (number, c) for c, each in enumerate(m.indices) for i in each})
    kept: dict[int, tuple[str, set[int]]] = {}
    for layer, channels in keep.items():
        require_one_of("keep", layer, places)
        named, size = f"keep[{layer!r}]", sizes[layer]
        inside = all(0 <= i < size for i in channels)
        require(inside, named, sorted(channels), f"channels of 0..{size - 1}")
        gone = set(range(size)) - channels
        fixed = sorted(gone - set(places[layer]))
        require(not fixed, named, sorted(channels), f"channels {fixed} must stay, others need them")
        lost = {places[layer][i] for i in gone}
        half = sorted(i for i in channels if places[layer][i] in lost) if lost else []
        require(not half, named, sorted(channels), f"channels {half} go with others that are gone")
        for number in {number for number, _ in places[layer].values()}:
            stay = {c for n, c in places[layer].values() if n == number} - {
                c for n, c in lost if n == number
            }
            other, before = kept.setdefault(number, (layer, stay))
            why = f"other channels than {other!r}, which is of the same group"
            require(before == stay, named, sorted(channels), why)
    return [
        torch.tensor(sorted(kept[i][1] if i in kept else range(g.channels)), dtype=torch.long)
        for i, g in enumerate(groups)
    ]
