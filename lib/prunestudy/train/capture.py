"""A step of training as one CUDA graph: a single launch in place of some 500 kernels.

The first steps of a phase run eagerly. They initialise what torch creates lazily, momentum
included; as they are real training steps, no state has to be restored. The last of them is
checked: if something in it cannot be captured, all steps stay eager, and one line says why.
"""

import gc
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunestudy.errors import first_line

WARM = 3  # plain steps before a capture
_READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "is_set_to")
_SHAPES = ("nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "bincount")
_MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")


def cuda_graph(
    function: Callable[[], Tensor], generator: torch.Generator
) -> tuple[Callable[[], None], Tensor]:
    """Capture what `function` queues on the current stream, which is not the default one.

    It is not run by that. Returns what runs it, on the same tensors, and its result.
    """
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch finds generators by itself, and says so
        graph.register_generator_state(generator)
    gc.disable()  # what it may free breaks a capture off
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            result = function()
    finally:
        gc.enable()
    return graph.replay, result


def graphs_on(device: torch.device) -> Callable[..., Any] | None:
    """What captures steps on `device`; None where they are made plainly."""
    return cuda_graph if device.type == "cuda" else None


class Captured:
    """Calls `step(batch)`, which gives the loss: plainly, then by replaying a graph of it.

    Only the first batch shape that is seen more than `WARM` times has one. The states of `method`
    and `model` say which tensors and flags a step depends on.
    """

    def __init__(
        self,
        step: Callable[[Any], Tensor],
        model: nn.Module,
        method: nn.Module,
        generator: torch.Generator,
        graphs: Callable[..., Any] | None,
    ) -> None:
        self._step, self._model, self._method = step, model, method
        self._generator, self._graphs, self._graph = generator, graphs, None
        self.forget()

    def forget(self) -> None:
        """Begin with plain steps again: what a step does has changed."""
        if self._graph and self._generator.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # a graph must outlive its replays
        self._graph, self._batch, self._made = None, None, Counter()

    def look(self) -> None:
        """Forget the graph, if tensors were replaced or flags have changed since the capture."""
        if self._graph and self._state() != self._seen:
            self.forget()

    def __call__(self, batch: Any) -> Tensor:
        """Make a step with `batch`; its loss, which the next step may overwrite."""
        leaves = tree_leaves(batch)
        if not self._graphs or not all(isinstance(leaf, Tensor) for leaf in leaves):
            return self._step(batch)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        self._made[shapes] += 1
        made = self._made[shapes]
        if (self._graph and shapes != self._shapes) or made < WARM:
            return self._step(batch)
        if made == WARM:
            with watched(self._model) as found:
                loss = self._step(batch)
            if found:
                self._refuse(found[0])
            return loss
        if self._graph:
            for held, leaf in zip(tree_leaves(self._batch), leaves, strict=True):
                held.copy_(leaf)
        else:
            self._batch, self._shapes = tree_map(torch.clone, batch), shapes
            try:
                self._graph = self._graphs(lambda: self._step(self._batch), self._generator)
            except Exception as error:  # whatever a step may raise there
                self._refuse(first_line(error))
                return self._step(batch)
            self._seen = self._state()
        replay, loss = self._graph
        replay()
        return loss

    def _refuse(self, why: str) -> None:
        self._graphs = None
        name = type(self._model).__name__
        print(f"prunestudy: {name}: steps are not captured: {why}", file=sys.stderr, flush=True)

    def _state(self) -> list[Any]:
        owned = [each.state_dict(keep_vars=True) for each in (self._model, self._method)]
        values = [value for each in owned for value in each.values()]
        return [
            (id(v), v.data_ptr(), v.requires_grad) if isinstance(v, Tensor) else v for v in values
        ]


@contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """Gives a list of what is done inside that a CUDA graph cannot hold: the module, and why."""
    names, watch = {m: name for name, m in model.named_modules()}, _Watch()

    def enter(module: nn.Module, _: Any) -> None:
        watch.inside = f"{names.get(module, '')} ({type(module).__name__})"

    handle, cuda = register_module_forward_pre_hook(enter), torch.cuda.is_initialized()
    try:
        with warnings.catch_warnings(record=True) as said, watch:
            warnings.simplefilter("always")
            if cuda:
                torch.cuda.set_sync_debug_mode("warn")
            yield watch.found
    finally:
        handle.remove()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    watch.found += [str(w.message) for w in said if "called a synchronizing" in str(w.message)]


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.found = "", []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if why := refused(func, args, kwargs or {}):
            self.found.append(f"in or after {self.inside}, {why}")
        return func(*args, **(kwargs or {}))


def refused(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a CUDA graph cannot hold this call of a torch operator; "" if it can."""
    name = func.overloadpacket.__name__
    if name in _READS:
        return f"{func}: reads a value on the host"
    if name in _SHAPES or (name == "repeat_interleave" and "Tensor" in str(func)):
        return f"{func}: its shape depends on values"
    if name in _MASKED:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return f"{func}: its shape depends on values (a mask as an index)" if masks else ""
    # A 0-d tensor of the CPU counts as a number.
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    kinds = {t.device.type for t in tensors if t.dim() or t.device.type != "cpu"}
    if name in ("_to_copy", "to") and kwargs.get("device") is not None:
        kinds.add(torch.device(kwargs["device"]).type)
    return f"{func}: changes the device" if len(kinds) > 1 else ""
