"""How much memory a forward pass needs."""

import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunestudy.measure.forward import zeros
from prunestudy.shrink import fold


def peak_memory_mb(model: nn.Module, shape: tuple[int, ...], batch: int = 128) -> float:
    """Peak of live tensor bytes while `model`, folded, infers one batch, in MB (10^6 bytes).

    Weights, buffers, the input (batch, *shape) and activations. On the CPU a count of tensors,
    the same on every machine: what an operation allocates and frees inside itself is not seen.
    On CUDA what torch's allocator saw, such workspaces and rounding included.
    Raises `InputError` for a bad shape or batch.
    """
    plain = fold(model)
    x = zeros(plain, shape, batch)
    peak = _cuda_peak if x.is_cuda else _live_peak
    return peak(plain, x) / 1e6


def _live_peak(plain: nn.Module, x: Tensor) -> int:
    # Not inference_mode: there the mode sees a layer whole, without its intermediate tensors.
    with torch.no_grad(), _LiveBytes([*plain.parameters(), *plain.buffers(), x]) as live:
        plain(x)
    return live.peak


def _cuda_peak(plain: nn.Module, x: Tensor) -> int:
    held = _LiveBytes([*plain.parameters(), *plain.buffers(), x])
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    with torch.inference_mode():
        plain(x)
    torch.cuda.synchronize(x.device)
    return held.peak + torch.cuda.max_memory_allocated(x.device) - before


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
