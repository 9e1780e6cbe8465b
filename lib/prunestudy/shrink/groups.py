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
    places `indices[i]` among the `size` channels (features) of that axis; in a convolution of
    several groups, as the activation counts them.
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

    def spread(self, values: Tensor, elsewhere: float = 1.0) -> Tensor:
        """`values` (channels,) at their places of the axis (size,), `elsewhere` at all others.

        Differentiable in `values`.
        """
        rest = values.new_full((1,), elsewhere)
        return torch.cat([values, rest])[self.channel_of.to(values.device)]


@dataclass(frozen=True)
class Group:
    """Channels that go together: `channels` of them, each a slice of every member.

    `name` is the first producer's, in order of execution; where channels of one producer are in
    several groups, the later ones are called `name:1`, `name:2`, ... `skippable`: were all its
    channels removed, the input would still reach the output (over a skip connection or a parallel
    branch).
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
    found = [_members(traced, channels) for channels in gathered.values()]
    producer = {members: next(m for m in members if m.role == PRODUCES) for members in found}
    found.sort(key=lambda members: (producer[members].order, min(members[0].indices)))
    made, used = [], Counter()
    for members in found:
        name = producer[members].layer
        label = f"{name}:{used[name]}" if used[name] else name
        used[name] += 1
        group = Group(label, len(members[0].indices), members, skippable=False)
        made.append(replace(group, skippable=signal_remains(traced, [group])))
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
    left = {}
    for group in emptied:
        for m in group.members:
            key = (m.layer, m.axis)
            left[key] = left.get(key, channels_of(layers[m.layer], m.axis))
            left[key] -= sum(map(len, m.indices))
    return {layer for (layer, _), count in left.items() if count == 0}


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
