"""The proof: every smaller net is compared with the gated one before it is returned.

Groups are what torch-pruning's graph suggests. Before anything is trained, random subsets of their
channels are removed from a copy of the net in float64 with random weights and statistics. What is
left is compared with the gated net: the same net where the layers that read those channels read
zeros. In at least one comparison, two groups of equal size lose different numbers of channels. It
proves nothing about channels on which no output depends: new weights are drawn, up to 7 times,
until all had an effect. After the real removal the same comparison is made with the real weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from prunestudy.errors import InputError
from prunestudy.shrink.compare import Gated, inside
from prunestudy.shrink.groups import CONSUMES, Group, read_groups, signal_remains
from prunestudy.shrink.narrow import narrow
from prunestudy.shrink.runs import called, fresh, outputs_of, watching
from prunestudy.shrink.trace import Trace, trace

_DRAWS = 8  # of random weights


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

    All others stay whole. A group may only be emptied (is skippable) if the net without it passes
    the proof as well.
    """
    return _Proof(traced, found).run() if found else []


class _Proof(Gated):
    """The comparisons for one traced net and its groups."""

    def __init__(self, traced: Trace, groups: list[Group]) -> None:
        super().__init__(traced.net.eval(), groups, traced.example, traced.given)
        self.traced = traced
        self.generator = torch.Generator().manual_seed(0)

    def run(self) -> list[Group]:
        """The groups, those only skippable that may be emptied; see `proven`."""
        self._require([int(self._draw(group.channels)) for group in self.groups])
        for counts in self._counts():
            self._require(counts, training=False)
        silent = self.silent()
        for seed in range(1, _DRAWS if silent else 0):
            fresh(self.net, seed)
            self._require([int(self._draw(g.channels)) for g in self.groups], training=False)
            silent &= self.silent()
        for i, layer in sorted(silent):
            name, why = self.groups[i].name, "on inputs like the example no output depends on the"
            line = f"cannot be pruned: {why} channels of {name!r} that it reads: nothing to compare"
            raise InputError(f"module = {layer!r}: {line}")
        may = self._emptied()
        return [replace(g, skippable=i in may) for i, g in enumerate(self.groups)]

    def _draw(self, channels: int) -> Tensor:
        """How many channels of a group to keep: some and, if it has several, not all."""
        return torch.randint(1, max(channels, 2), (), generator=self.generator)

    def _counts(self) -> Iterator[list[int]]:
        """Numbers of channels kept such that two groups of one size differ at least once."""
        sizes = [group.channels for group in self.groups]
        rank = [sizes[:i].count(size) for i, size in enumerate(sizes)]
        while True:
            yield [1 + r % n for r, n in zip(rank, sizes, strict=True)]
            rank = [r // n if n > 1 else 0 for r, n in zip(rank, sizes, strict=True)]
            if not any(rank):
                return

    def _require(self, counts: Sequence[int], training: bool = True) -> None:
        """Raise `InputError` if the net is wrong with so many random channels of each group."""
        chosen = [
            torch.randperm(group.channels, generator=self.generator)[:count].sort().values
            for group, count in zip(self.groups, counts, strict=True)
        ]

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

    def _emptied(self) -> set[int]:
        """Numbers of the groups without which the net still computes what the gated one does."""
        may, left = set(), [i for i, group in enumerate(self.groups) if group.skippable]
        while left:
            chosen: list[int] = []
            for i in left:
                if signal_remains(self.traced, [self.groups[j] for j in (*chosen, i)]):
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
