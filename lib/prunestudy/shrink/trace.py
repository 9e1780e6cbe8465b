"""A net's channels and how they hang together, read off torch-pruning's dependency graph.

The graph comes from autograd, so it knows operations by their backward's name. What it does not
know it takes for element-wise; here such an operation is refused, unless only channels of the
input or the output go through it, which are never cut.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex

from prunestudy.errors import InputError, require
from prunestudy.shrink.fold import fold

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# One value (or none) for each channel, whatever the other channels are.
# (A layer norm's statistics are of all of them, so that they change with those removed.)
FOLLOWERS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.PReLU)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)

# Operations that keep channel c of (n, c, ...) at place c, by the name of their backward.
_ELEMENTWISE = set(
    """abs add celu clamp clampmax clampmin clone div elu exp gelu hardsigmoid hardswish hardtanh
    leakyrelu maximum minimum mish mul neg pow relu rsub selu sigmoid silu softplus sqrt square sub
    t tanh threshold tocopy nativedropout fuseddropout
    adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d adaptivemaxpool2d adaptivemaxpool3d amax
    amin avgpool2d avgpool3d constantpadnd max maxpool2dwithindices maxpool3dwithindices mean
    mkldnnadaptiveavgpool2d mkldnnmaxpool2d reflectionpad2d replicationpad2d squeeze sum
    unsqueeze upsamplebicubic2d upsamplebilinear2d upsamplelinear1d upsamplenearest1d
    upsamplenearest2d upsamplenearestexact2d""".split()
)
_IN_LAYERS = set(
    """accumulategrad addmm convolution cudnnbatchnorm mkldnnconvolution mm nativebatchnorm
    nativelayernorm prelukernel""".split()
)
_RESHAPES = {"view", "unsafeview", "reshapealias", "alias"}
_PIECES = {"cat", "split", "splitwithsizes", "slice"}

_OPERATIONS = (
    ops._ConcatOp,
    ops._ElementWiseOp,
    ops._ExpandOp,
    ops._OutputOp,
    ops._ReshapeOp,
    ops._SliceOp,
    ops._SplitOp,
    ops._UnbindOp,
)

Slot = tuple[str, str, int]  # layer, side ("in" or "out"), channel number there


@dataclass(frozen=True)
class Trace:
    """What one forward pass of a net says about its channels.

    `channels`: classes of slots that can only go together, none of the input's or output's.
    `layers`: those that ran, by name, in order of execution (of a copy of the net).
    `edges`: for each node of the graph, by number, those that it feeds; `input`, `outputs` and
    `node_of` (by the layer's name) say which number is what.
    """

    channels: list[list[Slot]]
    layers: dict[str, nn.Module]
    edges: dict[int, list[int]]
    node_of: dict[str, int]
    input: int
    outputs: list[int]


def trace(model: nn.Module, shape: tuple[int, ...]) -> Trace:
    """Trace `model`, folded, on a batch of zeros of `shape` (without the batch).

    Raises `InputError` naming the module if the pass fails there, or if what happens in it is
    not understood and channels that could be cut go through it.
    """
    right = isinstance(shape, list | tuple) and all(type(n) is int and n > 0 for n in shape)
    require(right and 0 < len(shape) <= 4, "shape", shape, "1 to 4 positive integers, no batch")
    # In channels_last some operations go by other names.
    plain = fold(model).to(memory_format=torch.contiguous_format)
    probe = _Probe(plain.requires_grad_(True), shape)
    watch = _Watch(probe.net)
    graph, outputs = _build(probe, shape, watch)
    _refuse_lost(probe.net, graph, watch)
    layers = {name: module for name, module in watch.order.items() if _is_layer(module)}
    number = {node: i for i, node in enumerate(graph.module2node.values())}
    image = graph.module2node[probe.image]
    return Trace(
        channels=_Channels(graph, image, outputs, layers).classes(watch),
        layers=layers,
        edges={number[node]: [number[after] for after in node.outputs] for node in number},
        node_of={name: number[graph.module2node[layer]] for name, layer in layers.items()},
        input=number[image],
        outputs=[number[node] for node in outputs],
    )


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each input channel of a convolution has output channels of its own."""
    return isinstance(layer, LAYERS[:-1]) and layer.groups == layer.in_channels > 1


def is_follower(layer: nn.Module) -> bool:
    """Whether a layer's channels come and go with those before it."""
    return is_depthwise(layer) or isinstance(layer, FOLLOWERS)


def channels_of(layer: nn.Module, side: str) -> int:
    """Number of channels (features) of `layer` at side "in" or "out"."""
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1]
    for name in (f"{side}_channels", f"{side}_features", "num_features", "num_parameters"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise TypeError(type(layer).__name__)


class _Probe(nn.Module):
    """A net behind a layer of its own, so that the input's channels are in the graph as well."""

    def __init__(self, net: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        kind = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 1]
        like = next((p for p in net.parameters()), torch.zeros(0))
        sizes = (shape[0], shape[0]) if kind is nn.Linear else (shape[0], shape[0], 1)
        self.image = nn.utils.skip_init(kind, *sizes, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.image.weight)
        nn.init.zeros_(self.image.bias)
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(self.image(x))


class _Watch:
    """Which module was at work when: for blaming the right one."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.order: dict[str, nn.Module] = {}
        self.spans: list[tuple[int, int, str]] = []
        self.stack: list[tuple[str, int]] = []
        self.cut: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for name, module in self.net.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def blame(self, operation: Any) -> str:
        """The innermost module in which `operation`, a node of autograd's graph, ran."""
        now = operation._sequence_nr()
        inside = [(last - first, name) for first, last, name in self.spans if first <= now < last]
        innermost = min(inside, key=lambda span: span[0], default=(0, ""))
        return _called(innermost[1])

    def _enter(self, name: str):
        def hook(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001
            self.stack.append((name, torch.autograd._get_sequence_nr()))

        return hook

    def _leave(self, name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
            _, first = self.stack.pop()
            self.spans.append((first, torch.autograd._get_sequence_nr(), name))
            self.order.setdefault(name, module)
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            if self.cut is None and tensors and not any(t.requires_grad for t in tensors):
                self.cut = name

        return hook


def _build(probe: _Probe, shape: tuple[int, ...], watch: _Watch):
    graph, found = torch_pruning.DependencyGraph(), []
    like = probe.image.weight
    # Two images: with one, a squeeze would take the batch away.
    x = torch.zeros(2, *shape, device=like.device, dtype=like.dtype)

    def tensors(output: Any) -> list[Tensor]:
        found.extend(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad)
        culprit = _called(watch.cut or "")
        require(bool(found), "module", culprit, "cannot be traced: no gradient passes through it")
        return found

    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), watch.watching():
            graph.build_dependency(
                probe,
                x,
                forward_fn=lambda net, images: net(images),
                output_transform=tensors,
                verbose=False,
            )
    except InputError:
        raise
    except Exception as error:
        if not watch.stack:  # the pass went well; the graph of what happened in it did not
            _refuse_first_doubt(found, watch)
        inside = _called(watch.stack[-1][0] if watch.stack else "")
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"module = {inside!r}: cannot be traced on {shape}: {line}") from error
    ends = {t.grad_fn for t in found}
    return graph, [node for node in graph.module2node.values() if node.grad_fn in ends]


def _refuse_lost(net: nn.Module, graph: Any, watch: _Watch) -> None:
    outside = {id(parameter) for parameter, _ in graph.unwrapped_parameters}
    for name, parameter in net.named_parameters():
        why = "cannot be traced: a parameter outside the layers"
        require(id(parameter) not in outside, "module", name, why)
    for name, module in net.named_modules():
        if isinstance(module, (*LAYERS, *FOLLOWERS)) and module not in graph.module2node:
            ran = name in watch.order
            why = "no gradient passes through it" if ran else "the output does not depend on it"
            culprit = _called((watch.cut or name) if ran else name)
            require(False, "module", culprit, f"cannot be traced: {why}")


class _Channels:
    """Which slots of a dependency graph hang together: each a channel at one side of one node.

    torch-pruning's own groups keep one root where several channels meet in one slot (unflatten),
    so its edges and index maps are followed here, each slot once.
    """

    def __init__(self, graph: Any, image: Any, outputs: list, layers: dict[str, nn.Module]) -> None:
        self.graph, self.image, self.outputs = graph, image, outputs
        self.name_of = {graph.module2node[layer]: name for name, layer in layers.items()}
        sides = [channels_of(m, side) for m in layers.values() for side in ("in", "out")]
        self.most = max([channels_of(image.module, "out"), *sides])
        self.misfit: tuple[Any, int] | None = None
        self.seen: dict[tuple[Any, str], np.ndarray] = {}  # by node and side, `most` channels each
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        for node in [image, *(node for node in self.name_of if self._produces(node))]:
            self._follow(node)
        self._tie_groups()

    def classes(self, watch: _Watch) -> list[list[Slot]]:
        """Classes of the layers' slots, but for those with channels of the input or output.

        Raises `InputError` naming the module where it is not clear what hangs together.
        """
        label = dict(zip(self.seen, self._labels(), strict=True))
        end = [
            key for key in self.seen if key[1] == "out" and key[0] in (self.image, *self.outputs)
        ]
        kept = {int(i) for key in end for i in label[key][self.seen[key]]}
        self._refuse_doubts(label, kept, watch)
        self._refuse_gaps(label)
        found = defaultdict(list)
        for (node, side), labels in label.items():
            for i in np.flatnonzero(self.seen[node, side]) if node in self.name_of else ():
                found[int(labels[i])].append((self.name_of[node], side, int(i)))
        return [slots for number, slots in found.items() if number not in kept]

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
        if not fits.all():
            self.misfit = self.misfit or (there[0], int(b.max()) + 1)
        new = self._new(*there, b[fits])
        self.ties.append((self._ids(*here, a[fits]), self._ids(*there, b[fits])))
        return new

    def _new(self, node: Any, side: str, channels: np.ndarray) -> np.ndarray:
        seen = self.seen.setdefault((node, side), np.zeros(self.most, bool))
        new = np.unique(channels[~seen[channels]])
        seen[new] = True
        return new

    def _ids(self, node: Any, side: str, channels: np.ndarray) -> np.ndarray:
        return list(self.seen).index((node, side)) * self.most + channels

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

    def _refuse_doubts(self, label: dict, kept: set[int], watch: _Watch) -> None:
        cuttable = {
            node
            for (node, side), labels in label.items()
            if not kept.issuperset(labels[self.seen[node, side]].tolist())
        }
        for node in reversed(self.graph.module2node.values()):
            if node in cuttable and node not in self.name_of and (reason := _doubt(node)):
                require(False, "module", watch.blame(node.grad_fn), f"cannot be traced: {reason}")
        if self.misfit:
            node, count = self.misfit
            name = self.name_of.get(node) or watch.blame(node.grad_fn)
            why = f"cannot be traced: the channels that come together here, {count}, do not fit"
            require(False, "module", name, why)

    def _refuse_gaps(self, label: dict) -> None:
        sources = [key for key in label if key[1] == "out" and self._produces(key[0])]
        fed = np.unique(np.concatenate([label[key][self.seen[key]] for key in sources]))
        for node, name in self.name_of.items():
            side = "out" if is_follower(node.module) else "in"
            mine = label.get((node, side), np.array([-1]))[: self._size(node, side)]
            why = "cannot be traced: unknown where its channels come from"
            require(bool(np.isin(mine, fed).all()), "module", name, why)

    def _side(self, function: Any) -> str:
        return "out" if self.graph.is_out_channel_pruning_fn(function) else "in"

    def _size(self, node: Any, side: str) -> int:
        known = node in self.name_of or node is self.image
        return channels_of(node.module, side) if known else self.most

    def _produces(self, node: Any) -> bool:
        return node is self.image or (node in self.name_of and not is_follower(node.module))


def _mapped(edge: Any, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The channels that an edge of the graph relates: of its source, and of its target."""
    mappings = [mapping for mapping in edge.index_mapping if mapping is not None]
    if not mappings:
        return channels, channels
    pairs = [_HybridIndex(idx=i, root_idx=i) for i in channels.tolist()]
    for mapping in mappings:
        pairs = mapping(pairs)
    both = np.array([(p.root_idx, p.idx) for p in pairs], int).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _doubt(node: Any) -> str | None:
    """Why the operation of `node` may move or mix channels."""
    if isinstance(node.module, nn.PReLU) or not node.inputs:
        return None
    if isinstance(node.module, nn.Module) and not isinstance(node.module, _OPERATIONS):
        return f"{type(node.module).__name__} may mix channels"
    return None if _keeps_places(node.grad_fn) else f"{_name(node.grad_fn)} may mix channels"


def _refuse_first_doubt(outputs: list[Tensor], watch: _Watch) -> None:
    seen, waiting = set(), [t.grad_fn for t in outputs]
    while waiting:
        operation = waiting.pop()
        if operation is not None and operation not in seen:
            seen.add(operation)
            waiting += [before for before, _ in operation.next_functions]
    strange = [op for op in seen if _name(op) not in _IN_LAYERS and not _keeps_places(op)]
    for operation in sorted(strange, key=lambda op: op._sequence_nr())[:1]:
        why = f"cannot be traced: {_name(operation)} may mix channels"
        require(False, "module", watch.blame(operation), why)


def _keeps_places(operation: Any) -> bool:
    """Whether channel c of (n, c, ...) is channel c after `operation`, or moves as known."""
    name = _name(operation)
    if name not in _ELEMENTWISE | _RESHAPES | _PIECES:
        return False
    out = tuple(operation._input_metadata[0].shape)
    for before, number in operation.next_functions:
        if before is None or _name(before) == "accumulategrad":
            continue
        into = tuple(before._input_metadata[number].shape)
        if into[:1] != out[:1]:
            return False
        flattening = name in _RESHAPES and 2 in (len(into), len(out))
        if into[1:2] != out[1:2] and not flattening and name not in _PIECES:
            return False
    return True


def _name(operation: Any) -> str:
    """`relu` of ReluBackward0."""
    return re.sub(r"backward\d*$", "", operation.name().lower().rsplit("::", 1)[-1])


def _is_layer(module: nn.Module) -> bool:
    one_for_all = isinstance(module, nn.PReLU) and module.num_parameters == 1
    return isinstance(module, (*LAYERS, *FOLLOWERS)) and not one_for_all


def _called(name: str) -> str:
    return name or "the net itself"
