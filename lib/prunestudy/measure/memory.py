"""How much memory a forward pass needs."""

import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunestudy.measure.forward import inputs_for, run
from prunestudy.shrink import fold


def peak_memory_mb(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> float:
    """Peak of live tensor bytes while `model`, folded, infers `example`, in MB (10^6 bytes).

    Weights, buffers, inputs and activations: a count of tensors, the same on every machine. What
    an operation allocates and frees inside itself is not seen.
    """
    plain = fold(model)
    args = inputs_for(plain, example)
    # Not inference_mode: there the mode sees a layer whole, without its intermediate tensors.
    with torch.no_grad(), _LiveBytes([*plain.parameters(), *plain.buffers(), *args]) as live:
        run(plain, args)
    return live.peak / 1e6


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages alive among `tensors` and of all that operations return."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.finalize] = {}
        self._add(tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._add([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])
        return out

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for finalizer in self.alive.values():
            finalizer.detach()

    def _add(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.layout != torch.strided:
                continue  # a CSR tensor only groups buffers that are counted already
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key not in self.alive:  # views share a storage, and torch keeps its Python object
                self.now += size
                self.alive[key] = weakref.finalize(storage, self._drop, key, size)
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self.now -= size
        del self.alive[key]
