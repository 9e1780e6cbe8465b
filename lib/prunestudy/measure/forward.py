"""Forward passes: calling a net without changing it, and what a pass takes in time and memory.

The repeats of one call differ by up to 40% on a shared machine, and drift. So calls are
interleaved: every round calls each function once, in a shuffled order.
"""

import random
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunestudy.errors import InputError, first_line, require
from prunestudy.shrink import OnnxNet, export, fold
from prunestudy.shrink.runs import device_of, dtype_of, evaluating
from prunestudy.values import inputs

Example = Tensor | tuple[Tensor, ...]


def inputs_for(model: nn.Module, example: Example, first: bool = False) -> tuple[Tensor, ...]:
    """A copy of the example (or its `first` input) on the device, in the precision of `model`."""
    to = partial(Tensor.to, device=device_of(model), copy=True)  # nets may work in place
    given, dtype = [x[:1] if first else x for x in inputs(example)], dtype_of(model)
    return tuple(to(x, dtype=dtype if x.is_floating_point() else None) for x in given)


def run(model: nn.Module, args: tuple[Tensor, ...], given: str = "example") -> None:
    """Call `model`; raises `InputError`, with the reason, where it does not take such inputs.

    It names the parameter `given`.
    """
    try:
        model(*args)
    except InputError:
        raise
    except Exception as error:  # a net may raise anything
        shown, line = [tuple(x.shape) for x in args], first_line(error)
        name = type(model).__name__
        raise InputError(f"{given} = {shown}: {name} does not take it: {line}") from error


def interleave(
    functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 5
) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` rounds, after `warmup` rounds not counted.

    The order is shuffled anew in each round, the same in every run; the i-th times of two functions
    are a pair. Raises `InputError` for no function or bad counts.
    """
    require(bool(functions), "functions", functions, "at least one")
    require(type(rounds) is int and rounds > 0, "rounds", rounds, "a positive integer")
    require(type(warmup) is int and warmup >= 0, "warmup", warmup, "an integer of at least 0")
    seconds = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(warmup + rounds):
        shuffle(order)
        for name in order:
            started = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: times[warmup:] for name, times in seconds.items()}


def latency(
    models: dict[str, nn.Module], example: Example, rounds: int = 100, threads: int | None = None
) -> dict[str, float]:
    """Median milliseconds of each model's forward pass on a batch like `example`, interleaved.

    Floating-point inputs are drawn, the same for all models: zeros hide what denormal weights cost.
    In eval and inference mode, with `threads` of torch's (None: as many as now), which are put
    back. Raises `InputError` for a bad example or number.
    """
    right = threads is None or (type(threads) is int and threads > 0)
    require(right, "threads", threads, "a positive integer or None")
    generator = torch.Generator().manual_seed(0)
    drawn = tuple(
        torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x
        for x in inputs(example)
    )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads or torch.get_num_threads())
        for model in models.values():
            stack.enter_context(evaluating(model))
        calls = {name: partial(_forward, m, inputs_for(m, drawn)) for name, m in models.items()}
        seconds = interleave(calls, rounds)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def _forward(model: nn.Module, args: tuple[Tensor, ...]) -> None:
    run(model, args)
    if args[0].is_cuda:
        torch.cuda.synchronize(args[0].device)


def onnx_latency(
    models: dict[str, nn.Module], example: Example, rounds: int = 100, threads: int = 1
) -> dict[str, float]:
    """As `latency`, of the exported models in ONNX Runtime on CPU with `threads` of its own.

    Raises `InputError` also for a net that cannot be exported.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{n}.onnx" for n, name in enumerate(models)}
        for name, model in models.items():
            export(model, paths[name], inputs_for(model, example))
        return latency({n: OnnxNet(p, threads) for n, p in paths.items()}, example, rounds, threads)


def peak_memory_mb(model: nn.Module, example: Example) -> float:
    """Peak of the bytes that `model`, folded, holds while it infers `example`, in MB (10^6 bytes).

    Weights, buffers, inputs and activations: a count of live tensors, which misses what an
    operation allocates and frees inside itself.
    """
    plain = fold(model)
    args = inputs_for(plain, example)
    live = _LiveBytes([*plain.parameters(), *plain.buffers(), *args])
    # Not inference_mode: there the mode sees a layer whole, without its intermediate tensors.
    with torch.no_grad(), live:
        run(plain, args)
    return live.peak / 1e6


class _LiveBytes(TorchDispatchMode):
    """Finds the `peak` of the bytes in the storages of `tensors` and of what operations return."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.peak, self.alive = 0, weakref.WeakKeyDictionary()
        self._add(tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._add(tree_leaves(out))
        return out

    def _add(self, leaves: list[Any]) -> None:
        for leaf in leaves:
            # a CSR tensor only groups buffers that are counted already
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()  # views share it
                self.alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
