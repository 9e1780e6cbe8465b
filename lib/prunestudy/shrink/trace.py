"""A net's channels and how they depend on each other, read off torch-pruning's graph.

The graph comes from autograd: it knows modules, concatenations, splits and reshapes, and assumes
that every other operation keeps channel c at place c. Where that is wrong, `proof` finds out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.shrink.fold import fold, require_net, require_untied, with_gradients
from prunestudy.shrink.layers import (
    FOLLOWERS,
    LAYERS,
    Constant,
    channels_of,
    is_layer,
    is_one_node,
)
from prunestudy.shrink.runs import (
    Watch,
    called,
    drawn,
    fresh,
    one_node_each,
    outputs_of,
    watching,
)
from prunestudy.shrink.slots import Graph, Slot, Slots
from prunestudy.values import inputs


@dataclass(frozen=True)
class Trace:
    """What a forward pass of a net says about its channels.

    `channels`: classes of slots that can only go together, none of the input's or output's;
    `layers`: those that ran, by name, in order of execution; `edges`: for each node of the graph,
    by number, those that it feeds; `inputs`, `outputs`, `node_of` (by layer): such numbers; `net`:
    the model folded, in float64, with random parameters; `example`: two random inputs for it;
    `given`: the user's.
    """

    channels: list[list[Slot]]
    layers: dict[str, nn.Module]
    edges: dict[int, list[int]]
    node_of: dict[str, int]
    inputs: list[int]
    outputs: list[int]
    net: nn.Module
    example: tuple[Tensor, ...]
    given: tuple[Tensor, ...]


def trace(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Trace:
    """Trace `model`, folded, on inputs as `example`: a batch, or a tuple of them.

    Raises `InputError` naming the module if a pass fails there, for tied weights, for a branch that
    was removed, for a net that reads values of its input, and for layers that run without a
    gradient or not at all.
    """
    example = inputs(example, valued=True)
    require_net(model)
    for name, module in model.named_modules():
        gone = isinstance(module, Constant)
        require(not gone, "module", name, "a branch was removed here, no more can be")
    require_untied(model)
    # In channels_last some operations go by other names.
    plain = fresh(fold(model).to(memory_format=torch.contiguous_format))
    with_gradients(plain)
    batch = drawn(example, plain)
    graph, outputs = Graph(), []

    def run(net: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
        outputs.extend(t for t in outputs_of(net, batch) if t.requires_grad)
        why = "cannot be traced: no gradient passes through it"
        require(bool(outputs), "module", called(watch.cut or ""), why)
        return outputs

    with torch.enable_grad():
        probe = _Probe(plain, batch, last=_first_pass(plain, batch))
        alone = one_node_each(probe, set(probe.images))
        with alone as opaque, watching(plain, "cannot be traced") as watch:
            graph.build_dependency(probe, batch, forward_fn=run, verbose=False)
    _require_all(plain, graph, watch, outputs)
    layers = {n: m for n, m in watch.order.items() if is_layer(m) and m in graph.module2node}
    number = {node: i for i, node in enumerate(graph.module2node.values())}
    ends = {t.grad_fn for t in outputs}
    last = [node for node in number if node.grad_fn in ends]
    images = [graph.module2node[m] for m in probe.images if m in graph.module2node]
    # A layer that reads integers, or their one-hot codes, begins a path as well.
    begin = (nn.Embedding, *LAYERS)
    sources = [n for n in number if isinstance(n.module, begin) and not n.inputs]
    own = set(layers.values())
    fixed = [n for n in number if n.grad_fn in opaque and n.module not in own]
    fixed += [n for n in number if isinstance(n.module, nn.Parameter)]
    return Trace(
        channels=Slots(graph, images, last, fixed, layers).classes(),
        layers=layers,
        edges={number[node]: [number[after] for after in node.outputs] for node in number},
        node_of={name: number[graph.module2node[layer]] for name, layer in layers.items()},
        inputs=[number[node] for node in (*images, *sources)],
        outputs=[number[node] for node in last],
        net=plain.requires_grad_(False).double(),
        example=tuple(x.double() if x.is_floating_point() else x for x in batch),
        given=example,
    )


def _first_pass(net: nn.Module, batch: tuple[Tensor, ...]) -> bool:
    """Whether the channels of the inputs lie on their last axis; `InputError` as `trace`."""
    fails = f"cannot be traced on {[tuple(x.shape) for x in batch]}"
    with watching(net, fails) as watch:
        found = outputs_of(net, batch, strict=True)
    finite = any(bool(t.isfinite().any()) for t in found)
    require(finite, "module", called(""), "cannot be traced: on random inputs nothing is finite")
    weighted = (m for m in watch.order.values() if getattr(m, "weight", None) is not None)
    first = next(weighted, None)
    linear = isinstance(first, nn.Linear | nn.LayerNorm)
    return linear and any(x.dim() > 2 and x.shape[-1] == channels_of(first, "in") for x in batch)


class _Probe(nn.Module):
    """A net behind a layer for each float input, which stands for the input's channels.

    With `last` these lie on the last axis, else on the first after the batch.
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


def _require_all(net: nn.Module, graph: Any, watch: Watch, outputs: list[Tensor]) -> None:
    """Raise `InputError` for a layer that is not in the graph.

    Unless it is part of another, or only the net's own code reads its weight.
    """
    inner = {child for m in net.modules() if is_one_node(m) for child in list(m.modules())[1:]}
    read = _parameters_of(outputs)
    idle = {m for n, m in net.named_modules() if isinstance(m, LAYERS) and n not in watch.order}
    inner |= {layer for layer in idle if id(layer.weight) in read}
    for name, module in net.named_modules():
        lost = isinstance(module, (*LAYERS, *FOLLOWERS)) and module not in graph.module2node
        ran = name in watch.order
        culprit, why = name, "the output does not depend on it" + ", or without a gradient" * ran
        if ran and watch.cut is not None:
            culprit, why = watch.cut, "no gradient passes through it"
        require(not lost or module in inner, "module", called(culprit), f"cannot be traced: {why}")


def _parameters_of(outputs: list[Tensor]) -> set[int]:
    """The `id` of each parameter that autograd finds behind `outputs`."""
    waiting, seen = [t.grad_fn for t in outputs], {None}
    while waiting:
        step = waiting.pop()
        if step not in seen:
            seen.add(step)
            waiting += [before for before, _ in step.next_functions]
    return {id(getattr(step, "variable", None)) for step in seen}
