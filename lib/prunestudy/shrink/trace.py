"""A net's channels and how they depend on each other, read off torch-pruning's graph.

The graph comes from autograd: it knows modules, concatenations, splits and reshapes, and takes
every other operation to keep channel c at place c. Where that is wrong, `proof` finds out.
"""

import math
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping

from prunestudy.errors import require
from prunestudy.shrink.fold import fold, require_untied
from prunestudy.shrink.layers import (
    FOLLOWERS,
    LAYERS,
    TRANSPOSED,
    channels_of,
    is_depthwise,
    is_follower,
    is_layer,
    is_one_node,
)
from prunestudy.shrink.survey import (
    Watch,
    called,
    fresh,
    one_node_each,
    outputs_of,
    survey,
    watching,
)
from prunestudy.values import inputs

__all__ = [
    "LAYERS",
    "TRANSPOSED",
    "Slot",
    "Trace",
    "channels_of",
    "is_depthwise",
    "is_follower",
    "trace",
]

Slot = tuple[str, str, int]  # layer, side ("in" or "out"), channel number there


@dataclass(frozen=True)
class Trace:
    """What forward passes of a net say about its channels.

    `channels`: classes of slots that can only go together, none of the input's or output's.
    `layers`: those that ran, by name, in order of execution, of `net`.
    `edges`: for each node of the graph, by number, those that it feeds; `inputs`, `outputs` and
    `node_of` (by the layer's name) say which number is what. `net`: the model folded, in float64,
    with random parameters; `example`: random inputs for it, a batch of two.
    """

    channels: list[list[Slot]]
    layers: dict[str, nn.Module]
    edges: dict[int, list[int]]
    node_of: dict[str, int]
    inputs: list[int]
    outputs: list[int]
    net: nn.Module
    example: tuple[Tensor, ...]


def trace(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Trace:
    """Trace `model`, folded, on inputs as those of `example`: a batch, or a tuple of them.

    Raises `InputError` naming the module if a pass fails there, for tied weights, and for layers
    that run without a gradient or not at all.
    """
    given = inputs(example)
    require_untied(model)
    # In channels_last some operations go by other names.
    plain = fresh(fold(model).to(memory_format=torch.contiguous_format)).requires_grad_(True)
    batch, last = survey(plain, given)
    probe = _Probe(plain, batch, last)
    graph, outputs, watch, opaque = _build(probe, batch)
    _refuse_lost(plain, graph, watch)
    layers = {
        name: module
        for name, module in watch.order.items()
        if is_layer(module) and module in graph.module2node
    }
    number = {node: i for i, node in enumerate(graph.module2node.values())}
    images = [graph.module2node[m] for m in probe.images if m in graph.module2node]
    sources = [node for node in number if isinstance(node.module, nn.Embedding)]
    fixed = [
        node for node in number if node.grad_fn in opaque and node.module not in layers.values()
    ]
    fixed += [node for node in number if isinstance(node.module, nn.Parameter)]
    return Trace(
        channels=_Channels(graph, images, outputs, fixed, layers).classes(),
        layers=layers,
        edges={number[node]: [number[after] for after in node.outputs] for node in number},
        node_of={name: number[graph.module2node[layer]] for name, layer in layers.items()},
        inputs=[number[node] for node in (*images, *sources)],
        outputs=[number[node] for node in outputs],
        net=plain.requires_grad_(False).double(),
        example=tuple(x.double() if x.is_floating_point() else x for x in batch),
    )


class _Probe(nn.Module):
    """A net behind a layer for each float input, so that the inputs' channels are in the graph.

    The layers compute nothing: they only stand for a number of channels. With `last` these lie on
    the last axis, else on the first after the batch.
    """

    def __init__(self, net: nn.Module, batch: tuple[Tensor, ...], last: bool) -> None:
        super().__init__()
        self.images = nn.ModuleList()
        for x in batch:
            size = x.shape[-1] if last else x.shape[1] if x.dim() > 1 else 0
            real = x.is_floating_point() and size > 0
            self.images.append(nn.Linear(size, size, device="meta") if real else nn.Identity())
        self.net = net

    def forward(self, *batch: Tensor) -> Any:
        return self.net(*(image(x) for image, x in zip(self.images, batch, strict=True)))


class _Graph(torch_pruning.DependencyGraph):
    """A dependency graph that leaves reshapes alone until all else is known."""

    _2d_4d = property(lambda self: "done" in vars(self), lambda *_: None)

    def build_dependency(self, *arguments: Any, **options: Any) -> "_Graph":
        super().build_dependency(*arguments, **options)
        self.done = True
        for node in self.module2node.values():
            _map_reshape(self, node)
        return self


def _build(probe: _Probe, batch: tuple[Tensor, ...]) -> tuple[Any, list, Watch, set]:
    graph, found = _Graph(), []

    def run(net: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
        outputs = outputs_of(net, batch)
        found.extend(t for t in outputs if t.requires_grad)
        culprit = called(watch.cut or "")
        require(bool(found), "module", culprit, "cannot be traced: no gradient passes through it")
        return found

    fails = "cannot be traced"
    with (
        torch.enable_grad(),
        one_node_each(probe, set(probe.images)) as nodes,
        watching(probe.net, fails) as watch,
    ):
        graph.build_dependency(probe, batch, forward_fn=run, verbose=False)
    ends = {t.grad_fn for t in found}
    outputs = [node for node in graph.module2node.values() if node.grad_fn in ends]
    return graph, outputs, watch, nodes


def _refuse_lost(net: nn.Module, graph: Any, watch: Watch) -> None:
    inner = {
        child
        for module in net.modules()
        if is_one_node(module)
        for child in module.modules()
        if child is not module
    }
    for name, module in net.named_modules():
        if isinstance(module, (*LAYERS, *FOLLOWERS)) and module not in {*graph.module2node, *inner}:
            ran = name in watch.order
            why = "no gradient passes through it" if ran else "the output does not depend on it"
            culprit = called((watch.cut or name) if ran else name)
            require(False, "module", culprit, f"cannot be traced: {why}")


class _Interleaved:
    """Index mapping of a flatten whose channels lie on the last axis: channel c at c, c + n, ..."""

    def __init__(self, channels: int, times: int, reverse: bool) -> None:
        self.channels, self.times, self.reverse = channels, times, reverse

    def __call__(self, pairs: list) -> list:
        if self.reverse:
            return [_HybridIndex(idx=p.idx % self.channels, root_idx=p.root_idx) for p in pairs]
        return [
            _HybridIndex(idx=p.idx + self.channels * k, root_idx=p.root_idx)
            for p in pairs
            for k in range(self.times)
        ]


def _map_reshape(graph: Any, node: Any) -> None:
    """Say which channels a reshape makes of which, for inputs of any rank."""
    if not isinstance(node.module, ops._ReshapeOp):
        return
    with suppress(ArithmeticError):  # of sizes it does not understand; the proof will find out
        index_mapping.update_reshape_index_mapping(graph, node)
    size = tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
    back = [edge for before in node.inputs for edge in before.dependencies if edge.target is node]
    for edge in (*node.dependencies, *back):
        flat = edge.index_mapping[0]
        if len(size) > 2 and isinstance(flat, index_mapping._FlattenIndexMapping):
            total, times = math.prod(size[1:]), flat._stride
            if size[-1] * times == total != size[1] * times:
                edge.index_mapping[0] = _Interleaved(size[-1], times, flat.reverse)


class _Channels:
    """Which slots of a dependency graph depend on each other: each a channel at a node's side.

    torch-pruning's own groups keep one root where several channels meet in one slot (unflatten),
    so its edges and index maps are followed here, each slot once.
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
        self._tie_groups()

    def classes(self) -> list[list[Slot]]:
        """Classes of the layers' slots with a producer among them, as far as they may go.

        The channels of the input and the output stay, and those of what is no layer: parameters
        of the net's own, embeddings, attention, recurrent layers.
        """
        if not self.ties:
            return []
        label = dict(zip(self.seen, self._labels(), strict=True))
        ends = {(node, "out") for node in (*self.images, *self.outputs)}
        ends |= {(node, side) for node in self.fixed for side in ("in", "out")}
        kept = {int(i) for key in ends & set(label) for i in label[key][self.seen[key]]}
        found, made = defaultdict(list), set()
        for (node, side), labels in label.items():
            for i in np.flatnonzero(self.seen[node, side]) if node in self.name_of else ():
                found[int(labels[i])].append((self.name_of[node], side, int(i)))
                if side == "out" and self._produces(node):
                    made.add(int(labels[i]))
        return [slots for number, slots in found.items() if number in made - kept]

    def _follow(self, node: Any) -> None:
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

    def _labels(self) -> np.ndarray:
        """The class of each slot, (nodes and sides, most)."""
        a, b = (np.concatenate(ends) for ends in zip(*self.ties, strict=True))
        size = len(self.seen) * self.most
        graph = coo_array((np.ones(len(a), bool), (a, b)), (size, size))
        return connected_components(graph, directed=False)[1].reshape(-1, self.most)

    def _tie_groups(self) -> None:
        """The groups of a grouped convolution must stay of one size: tie the same place of all."""
        for node, name in self.name_of.items():
            groups = getattr(node.module, "groups", 1)
            if is_depthwise(node.module):
                why = "cannot be traced: a depth-wise convolution that multiplies its channels"
                require(node.module.out_channels == groups, "module", name, why)
            elif groups > 1:
                for side in ("in", "out"):
                    channels = np.arange(self._size(node, side))
                    first = channels % (len(channels) // groups)
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
