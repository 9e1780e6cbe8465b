"""Dependency groups: the channels that can only be removed together, and where they are.

A layer *produces* channels (the outputs of a convolution or linear layer), *consumes* them (its
inputs) or *follows* them (one value for each: batch norm, PReLU, depth-wise convolution). Layers
whose outputs are added produce the same channels. A channel is a slice of several layers: of one
output of each producer, one place of each follower, and one or more inputs of each consumer
(height times width of them behind a flatten, shifted behind a concatenation). The channels of the
input and of the output belong to no group: they are never cut.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor, nn

from prunestudy.errors import require_one_of
from prunestudy.shrink.layers import channels_of, is_follower
from prunestudy.shrink.slots import Slot
from prunestudy.shrink.trace import Trace

PRODUCES, CONSUMES, FOLLOWS = "produces", "consumes", "follows"


@dataclass(frozen=True)
class Member:
    """A layer that holds slices of a group's channels.

    `layer` is its module's name, `kind` its class, `order` its number in order of execution,
    `role` "produces", "consumes" or "follows", `axis` "out" or "in". Channel i of the group is at
    places `indices[i]` among the `size` channels (features) of that axis, as activations count.
    """

    layer: str
    kind: str
    order: int
    role: str
    axis: str
    size: int
    indices: tuple[tuple[int, ...], ...]

    @cached_property
    def channel_of(self) -> Tensor:
        """For each place of the axis (size,) the group's channel there, -1 if of another group."""
        found = torch.full((self.size,), -1)
        found[torch.tensor(self.indices)] = torch.arange(len(self.indices))[:, None]
        return found

    def spread(self, values: Tensor) -> Tensor:
        """`values` (channels,) at their places of the axis (size,), 1 elsewhere; differentiable."""
        return torch.cat([values, values.new_ones(1)])[self.channel_of.to(values.device)]


@dataclass(frozen=True)
class Group:
    """Channels that go together: `channels` of them, each a slice of every member.

    `name` is the first producer's; later groups of the same producer are called `name:1`, ...
    `skippable`: were all its channels removed, the input would still reach the output (over a skip
    connection or a parallel branch).
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    skippable: bool

    def having(self, role: str) -> list[Member]:
        """The members of one role."""
        return [member for member in self.members if member.role == role]


def read_groups(traced: Trace) -> list[Group]:
    """The dependency groups that a trace suggests, in order of execution, before the proof."""
    gathered = defaultdict(list)
    for slots in traced.channels:
        counted = Counter((layer, side) for layer, side, _ in slots)
        gathered[frozenset(counted.items())].append(slots)
    found = []
    for channels in gathered.values():
        members = _members(traced, channels)
        first = next(m for m in members if m.role == PRODUCES)
        group = Group(first.layer, len(channels), members, skippable=False)
        group = replace(group, skippable=signal_remains(traced, [group]))
        found.append((first.order, min(members[0].indices), group))
    made, used = [], Counter()
    for *_, group in sorted(found, key=itemgetter(0, 1)):
        number = used[group.name]
        made.append(replace(group, name=f"{group.name}:{number}") if number else group)
        used[group.name] += 1
    return made


def find(found: Iterable[Group], name: str) -> Group:
    """The group called `name`; `InputError` if there is none."""
    by_name = {group.name: group for group in found}
    require_one_of("group", name, by_name)
    return by_name[name]


def signal_remains(traced: Trace, emptied: Iterable[Group]) -> bool:
    """Whether the input still reaches the output when all channels of `emptied` are removed."""
    dead = {traced.node_of[name] for name in silent_layers(traced.layers, emptied)}
    reached, waiting = set(), list(traced.inputs)
    while waiting:
        node = waiting.pop()
        if node not in reached and node not in dead:
            reached.add(node)
            waiting += traced.edges[node]
    return any(node in reached for node in traced.outputs)


def silent_layers(layers: Mapping[str, nn.Module], emptied: Iterable[Group]) -> set[str]:
    """Layers without inputs or outputs once all channels of the groups `emptied` are removed."""
    gone = Counter()
    for m in (m for group in emptied for m in group.members):
        gone[m.layer, m.axis] += sum(map(len, m.indices))
    return {layer for (layer, axis), n in gone.items() if n == channels_of(layers[layer], axis)}


def _members(traced: Trace, channels: list[list[Slot]]) -> tuple[Member, ...]:
    """The layers that hold these channels, in order of execution, "in" before "out"."""
    order = {name: i for i, name in enumerate(traced.layers)}
    sides = sorted({(n, side) for n, side, _ in channels[0]}, key=lambda s: (order[s[0]], s[1]))
    first = next(s for s in sides if s[1] == "out" and not is_follower(traced.layers[s[0]]))
    places = {side: [] for side in sides}
    for slots in sorted(channels, key=lambda slots: min(i for *s, i in slots if tuple(s) == first)):
        here = defaultdict(list)
        for layer, side, index in slots:
            here[layer, side].append(index)
        for side, indices in here.items():
            places[side].append(tuple(sorted(indices)))
    made = []
    for (name, axis), indices in places.items():
        layer = traced.layers[name]
        role = FOLLOWS if is_follower(layer) else PRODUCES if axis == "out" else CONSUMES
        size, kind = channels_of(layer, axis), type(layer).__name__
        made.append(Member(name, kind, order[name], role, axis, size, tuple(indices)))
    return tuple(made)
