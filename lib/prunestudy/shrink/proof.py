"""The proof: every smaller net is compared with the gated one before it is returned.

Groups are what torch-pruning's graph suggests. Before anything is trained, random subsets of their
channels are removed from a copy of the net in float64 with random weights and statistics. What is
left is compared with the gated net: the same net where the layers that read those channels read
zeros. In at least one comparison, two groups of equal size lose different numbers of channels; in
one, each loses its first and its last channel, where slices of fixed channels lie. It proves
nothing about channels on which no output depends: new weights are drawn, up to 7 times, until all
had an effect. After the real removal the same comparison is made with the real weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from prunestudy.errors import InputError, first_line
from prunestudy.shrink.compare import apart, gates, in_training, inside
from prunestudy.shrink.groups import CONSUMES, Group, read_groups, signal_remains
from prunestudy.shrink.narrow import narrow
from prunestudy.shrink.runs import called, fresh, given, outputs_of, watching
from prunestudy.shrink.trace import Trace, trace

_DRAWS = 8  # of random weights
Batch = tuple[Tensor, ...]


def groups(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> list[Group]:
    """Return the dependency groups of `model` on inputs as `example`, in order of execution.

    `example` is a batch (n, ...), or a tuple of them for a net with several inputs. `model` is
    left untouched; gated layers (parametrisations) may be in place. Raises `InputError` naming the
    module where the net cannot be traced, or does not pass the proof.
    """
    traced = trace(model, example)
    return proven(traced, read_groups(traced))


def proven(traced: Trace, found: list[Group]) -> list[Group]:
    """Return the groups `found` in a traced net, once proven; raise `InputError` as `groups`.

    A group may only be emptied (is skippable) if the net without it passes the proof as well.
    """
    proof = Proof(traced.net.eval(), found, traced.example, traced.given)
    return proof.run(traced) if found else []


class Proof:
    """Compares small nets with `net`, in float64, that reads zeros for channels that are gone."""

    def __init__(self, net: nn.Module, groups: Sequence[Group], two: Batch, example: Batch) -> None:
        """`two` are random inputs, `example` is the user's."""
        self.net, self.groups, self.two = net, groups, two
        self.batches = [tuple(x[:1] for x in two), given(example, two)]
        self.generator = torch.Generator().manual_seed(0)

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
        with gates(self.net, self.groups, kept), in_training(self.net) if train else nullcontext():
            return outputs_of(self.net, batch, last=True)

    def silent(self) -> set[tuple[int, str]]:
        """Pairs (group that may go, layer that reads it) on which no output depends.

        Empty for a net that has no backward pass.
        """
        may_go = [(i, g) for i, g in enumerate(self.groups) if g.channels > 1 or g.skippable]
        kept = [torch.arange(group.channels) for group in self.groups]
        with torch.enable_grad(), gates(self.net, self.groups, kept) as made:
            for gate in made.values():
                gate.grad = torch.zeros_like(gate.requires_grad_())
            try:
                found = [t.flatten() for x in self.batches for t in outputs_of(self.net, x)]
                known = torch.cat([t[t.isfinite()].cpu() for t in found])
                (known * torch.linspace(1, 2, len(known))).sum().real.backward()
            except Exception:  # whatever a user's net raises
                return set()
        pairs = [(i, m) for i, group in may_go for m in group.having(CONSUMES)]
        return {(i, m.layer) for i, m in pairs if not made[m.layer].grad[m.channel_of >= 0].any()}

    @cached_property
    def moods(self) -> str | None:
        """How two passes with one seed differ in training mode; None if the net fails there."""
        try:
            with in_training(self.net):
                return apart(*(outputs_of(self.net, self.two) for _ in range(2)))
        except Exception:  # a batch norm of one value, or anything of a user's net
            return None

    def run(self, traced: Trace) -> list[Group]:
        """The groups, those only skippable that may be emptied; see `proven`."""
        self._require(self._draw())
        for counts in self._counts():
            self._require(self._some(counts), training=False)
        every = [torch.arange(group.channels) for group in self.groups]
        self._require([c[1:-1] if len(c) > 2 else c[-1:] for c in every], training=False)
        silent = self.silent()
        for seed in range(1, _DRAWS if silent else 0):
            fresh(self.net, seed)
            self._require(self._draw(), training=False)
            silent &= self.silent()
        for i, layer in sorted(silent):
            name, why = self.groups[i].name, "on inputs like the example no output depends on the"
            line = f"cannot be pruned: {why} channels of {name!r} that it reads: nothing to compare"
            raise InputError(f"module = {layer!r}: {line}")
        may = self._emptied(traced)
        return [replace(g, skippable=i in may) for i, g in enumerate(self.groups)]

    def _draw(self) -> list[Tensor]:
        """Random channels of each group to keep: some and, if it has several, not all."""
        most = (max(group.channels, 2) for group in self.groups)
        return self._some([int(torch.randint(1, n, (), generator=self.generator)) for n in most])

    def _some(self, counts: Sequence[int]) -> list[Tensor]:
        """So many random channels of each group."""
        return [
            torch.randperm(group.channels, generator=self.generator)[:count].sort().values
            for group, count in zip(self.groups, counts, strict=True)
        ]

    def _counts(self) -> Iterator[list[int]]:
        """Numbers of channels kept such that two groups of one size differ at least once."""
        sizes = [group.channels for group in self.groups]
        rank = [sizes[:i].count(size) for i, size in enumerate(sizes)]
        while True:
            yield [1 + r % n for r, n in zip(rank, sizes, strict=True)]
            rank = [r // n if n > 1 else 0 for r, n in zip(rank, sizes, strict=True)]
            if not any(rank):
                return

    def _require(self, chosen: list[Tensor], training: bool = True) -> None:
        """Raise `InputError` if the net is wrong with only the channels `chosen` of each group."""

        def only(numbers: Sequence[int]) -> list[Tensor]:
            return [
                stay if i in numbers else torch.arange(self.groups[i].channels)
                for i, stay in enumerate(chosen)
            ]

        def wrong(kept: list[Tensor]) -> bool:
            return bool(self.gap(narrow(self.net, self.groups, kept), kept, training))

        if not wrong(chosen):
            return
        blamed = list(range(len(chosen)))
        while len(blamed) > 1:
            first, rest = blamed[: len(blamed) // 2], blamed[len(blamed) // 2 :]
            blamed = first if wrong(only(first)) else rest
        alone = only(blamed)
        self._blame(self.groups[blamed[0]], alone if wrong(alone) else chosen)

    def _blame(self, group: Group, kept: list[Tensor]) -> None:
        """Raise `InputError` naming the first module that does not treat channels one by one."""
        fails = f"cannot be pruned: it does not work on fewer channels of {group.name!r}"
        small = narrow(self.net, self.groups, kept)
        passes = [(self.two, False), (self.batches[1], False), (self.two, True)]
        error, wrong = None, []
        for batch, train in passes[: 2 + (self.moods is not None)]:
            with watching(self.net, fails) as before:
                self.outputs(kept, batch, train)
            try:
                with watching(small, fails) as after:
                    outputs_of(small.train(train), batch)
            except InputError as raised:
                error = raised
            wrong = [n for n, found in after.last.items() if not inside(before.last[n], found)]
            if wrong or error:
                break
        if error and not wrong:
            raise error
        reader = next((m.layer for m in group.having(CONSUMES)), group.members[0].layer)
        name = called(wrong[0] if wrong else reader)
        why = f"cannot be pruned: with fewer channels of {group.name!r} it computes something else"
        raise InputError(f"module = {name!r}: {why}")

    def _emptied(self, traced: Trace) -> set[int]:
        """Numbers of the groups without which the net still computes what the gated one does."""
        may, left = set(), [i for i, group in enumerate(self.groups) if group.skippable]
        while left:
            chosen: list[int] = []
            for i in left:
                if signal_remains(traced, [self.groups[j] for j in (*chosen, i)]):
                    chosen.append(i)
            may |= self._works_without(chosen)
            left = [i for i in left if i not in chosen]
        return may

    def _works_without(self, chosen: list[int]) -> set[int]:
        sizes = [group.channels for group in self.groups]
        kept = [torch.arange(0 if i in chosen else n) for i, n in enumerate(sizes)]
        if not self.gap(narrow(self.net, self.groups, kept), kept):
            return set(chosen)
        half = len(chosen) // 2
        parts = (chosen[:half], chosen[half:]) if half else ()
        return set().union(*map(self._works_without, parts))
