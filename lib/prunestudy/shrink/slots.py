"""Channels that depend on each other, followed through torch-pruning's graph of a net."""

import math
from collections import defaultdict
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch_pruning
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping, shape_infer

from prunestudy.errors import InputError
from prunestudy.shrink.layers import channels_of, is_depthwise, is_follower

Slot = tuple[str, str, int]  # layer, side ("in" or "out"), channel number there


class Graph(torch_pruning.DependencyGraph):
    """A dependency graph that maps the channels of reshapes last, once all else is known."""

    _2d_4d = property(lambda self: "done" in vars(self), lambda *_: None)

    def build_dependency(self, *arguments: Any, **options: Any) -> "Graph":
        """Build it as torch-pruning does, but for reshapes."""
        try:
            super().build_dependency(*arguments, **options)
        except TypeError as error:  # a sum of sizes, one of which it does not know
            line = "joins parts of its input, whose channels cannot be counted"
            raise InputError(f"module = 'the net itself': cannot be traced: {line}") from error
        self.done = True
        for kind, say in ((ops._ConcatOp, _map_parts), (ops._ReshapeOp, _map_reshape)):
            for node in self.module2node.values():
                if isinstance(node.module, kind):
                    say(self, node)
        return self


def _map_parts(_: Any, node: Any) -> None:
    """Say where the parts of a concatenation lie: autograd knows their sizes, also of flat ones."""
    ends = [(f, i) for f, i in node.grad_fn.next_functions if f is not None]
    shapes = [f._input_metadata[i].shape for f, i in ends]
    along = node.grad_fn._saved_dim  # without a sign
    if along in (1, 2**64 + 1 - len(shapes[0])) and len(shapes) == len(node.inputs):
        place, said = 0, set()
        for before, shape in zip(node.inputs, shapes, strict=True):
            part, place = (place, place + int(shape[1])), place + int(shape[1])
            for edges, end in ((node.dependencies, before), (before.dependencies, node)):
                edge = next(e for e in edges if e.target is end and id(e) not in said)
                edge.index_mapping[1] = index_mapping._ConcatIndexMapping(part, end is before)
                said.add(id(edge))


def _map_reshape(graph: Any, node: Any) -> None:
    """Say which channels a reshape makes of which, for inputs of any rank."""
    width, channels = node.grad_fn._input_metadata[0].shape[1:], None
    back = [edge for before in node.inputs for edge in before.dependencies if edge.target is node]
    to = [edge for edge in node.dependencies if edge.target in node.inputs]
    if len(width) == 1 and node.inputs:
        channels = shape_infer.infer_out_channels_recursively(graph, node.inputs[0], [0])
    if channels and width[0] % channels == 0:
        for edge in (*to, *back):
            flat = index_mapping._FlattenIndexMapping(width[0] // channels, edge in to)
            edge.index_mapping[0] = flat
    else:
        with suppress(ArithmeticError):  # of sizes it does not understand; the proof will find out
            index_mapping.update_reshape_index_mapping(graph, node)
    size = tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
    for edge in (*node.dependencies, *back):
        flat = edge.index_mapping[0]
        if len(size) > 2 and isinstance(flat, index_mapping._FlattenIndexMapping):
            total, times = math.prod(size[1:]), flat._stride
            if size[-1] * times == total != size[1] * times:
                edge.index_mapping[0] = partial(_interleaved, size[-1], times, flat.reverse)


def _interleaved(channels: int, times: int, reverse: bool, pairs: list) -> list:
    """The index map of a flatten with channels on the last axis: c at c, c + channels, ..."""
    if reverse:
        return [_HybridIndex(idx=p.idx % channels, root_idx=p.root_idx) for p in pairs]
    return [
        _HybridIndex(idx=p.idx + channels * k, root_idx=p.root_idx)
        for p in pairs
        for k in range(times)
    ]


class Slots:
    """Which slots of a dependency graph depend on each other: each a channel at a node's side.

    The channels of the nodes `images`, `outputs` and `fixed` stay. torch-pruning's own groups keep
    one root where several channels meet in one slot (unflatten), so its edges and index maps are
    followed here, each slot once.
    """

    def __init__(
        self, graph: Any, images: list, outputs: list, fixed: list, layers: dict[str, nn.Module]
    ) -> None:
        self.graph, self.images, self.outputs, self.fixed = graph, images, outputs, fixed
        self.name_of = {graph.module2node[layer]: name for name, layer in layers.items()}
        sides = [channels_of(m, side) for m in layers.values() for side in ("in", "out")]
        self.most = max([*(channels_of(image.module, "out") for image in images), *sides, 1])
        self.seen: dict[tuple[Any, str], np.ndarray] = {}  # by node and side, `most` channels each
        self.first: dict[tuple[Any, str], int] = {}  # number of the first of them
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        for node in [*images, *(node for node in self.name_of if self._produces(node))]:
            self._follow(node)
        for node in self.name_of:
            self._tie_groups(node)

    def classes(self) -> list[list[Slot]]:
        """Classes of the layers' slots that can only go together; each has a producer."""
        if not self.ties:
            return []
        a, b = (np.concatenate(ends) for ends in zip(*self.ties, strict=True))
        size = len(self.seen) * self.most
        graph = coo_array((np.ones(len(a), bool), (a, b)), (size, size))
        classes = connected_components(graph, directed=False)[1].reshape(-1, self.most)
        label = dict(zip(self.seen, classes, strict=True))
        ends = {(node, "out") for node in (*self.images, *self.outputs)}
        ends |= {(node, side) for node in self.fixed for side in ("in", "out")}
        kept = {int(i) for key in ends & set(label) for i in label[key][self.seen[key]]}
        found, made = defaultdict(list), set()
        for (node, side), labels in label.items():
            for i in np.flatnonzero(self.seen[node, side]) if node in self.name_of else ():
                found[int(labels[i])].append((self.name_of[node], side, int(i)))
                if side == "out" and self._produces(node):
                    made.add(int(labels[i]))
        free = made - kept
        return [slots for number, slots in found.items() if number in free]

    def _follow(self, node: Any) -> None:
        """Tie what depends on the outputs of `node`, and so on."""
        waiting = [(node, "out", self._new(node, "out", np.arange(self._size(node, "out"))))]
        while waiting:
            node, side, here = waiting.pop()
            for edge in node.dependencies:
                if len(here) and self._side(edge.trigger) == side:
                    end = self._side(edge.handler)
                    after = self._join((node, side), (edge.target, end), *_mapped(edge, here))
                    waiting.append((edge.target, end, after))

    def _join(
        self, here: tuple[Any, str], there: tuple[Any, str], a: np.ndarray, b: np.ndarray
    ) -> np.ndarray:
        """Tie channels `a` here to `b` there; return those seen there for the first time."""
        fits = b < self._size(*there)
        new = self._new(*there, b[fits])
        self.ties.append((self.first[here] + a[fits], self.first[there] + b[fits]))
        return new

    def _new(self, node: Any, side: str, channels: np.ndarray) -> np.ndarray:
        self.first.setdefault((node, side), len(self.first) * self.most)
        seen = self.seen.setdefault((node, side), np.zeros(self.most, bool))
        new = np.unique(channels[~seen[channels]])
        seen[new] = True
        return new

    def _tie_groups(self, node: Any) -> None:
        """Tie the same place in all groups of a convolution, and all channels of a norm's group."""
        groups, norm = getattr(node.module, "groups", 1), isinstance(node.module, nn.GroupNorm)
        if norm or (groups > 1 and not is_depthwise(node.module)):
            for side in ("in", "out"):
                channels = np.arange(self._size(node, side))
                first = channels % (len(channels) // groups)
                if norm:
                    first = channels - channels % (len(channels) // node.module.num_groups)
                self._new(node, side, channels)
                self._join((node, side), (node, side), first, channels)

    def _side(self, function: Any) -> str:
        return "out" if self.graph.is_out_channel_pruning_fn(function) else "in"

    def _size(self, node: Any, side: str) -> int:
        known = node in self.name_of or node in self.images
        return channels_of(node.module, side) if known else self.most

    def _produces(self, node: Any) -> bool:
        return node in self.images or (node in self.name_of and not is_follower(node.module))


def _mapped(edge: Any, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The channels that an edge of the graph relates: of its source, and of its target."""
    mappings = [mapping for mapping in edge.index_mapping if mapping is not None]
    if not mappings:
        return channels, channels
    pairs = [_HybridIndex(idx=i, root_idx=i) for i in channels.tolist()]
    try:
        for mapping in mappings:
            pairs = mapping(pairs)
    except LookupError:  # a split into parts of unknown size; the proof will find out
        return channels, channels
    both = np.array([(p.root_idx, p.idx) for p in pairs if p.idx >= 0], int).reshape(-1, 2)
    return both[:, 0], both[:, 1]
