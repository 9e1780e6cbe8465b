"""Forward passes: calling a net without changing it, and what a pass takes in time and memory.

The repeats of one call differ by up to 40% on a shared machine, and drift. So calls are
interleaved: every round calls each function once, in a shuffled order.
"""

import random
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunestudy.errors import InputError, require
from prunestudy.shrink import OnnxNet, export, fold
from prunestudy.values import inputs

Example = Tensor | tuple[Tensor, ...]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and afterwards each of its modules back into its former mode."""
    former = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in former:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer of `model`; the CPU if it has none."""
    tensors = chain(model.parameters(), model.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def inputs_for(model: nn.Module, example: Example, first: bool = False) -> tuple[Tensor, ...]:
    """A copy of `inputs(example)` on the device of `model`, floating-point ones in its precision.

    With `first` a batch of the first input alone.
    """
    tensors = chain(model.parameters(), model.buffers())
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
    given = [x[:1] if first else x for x in inputs(example)]
    to = partial(Tensor.to, device=device_of(model), copy=True)  # nets may work in place
    return tuple(to(x, dtype=dtype if x.is_floating_point() else None) for x in given)


def run(model: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Call `model`; raises `InputError`, with the reason, where it does not take such inputs."""
    try:
        model(*args)
    except InputError:
        raise
    except Exception as error:  # a net may raise anything
        shown, why = [tuple(x.shape) for x in args], str(error).partition("\n")[0]
        name = type(model).__name__
        raise InputError(f"example = {shown}: {name} does not take it: {why}") from error


def interleave(
    functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 5
) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` rounds, after `warmup` rounds not counted.

    Every round calls each function once, in an order shuffled anew (the same in every run). The
    i-th times of two functions are a pair. Raises `InputError` for no function or bad counts.
    """
    require(bool(functions), "functions", functions, "at least one")
    require(type(rounds) is int and rounds > 0, "rounds", rounds, "a positive integer")
    require(type(warmup) is int and warmup >= 0, "warmup", warmup, "an integer of at least 0")
    seconds = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for turn in range(warmup + rounds):
        shuffle(order)
        for name in order:
            started = time.perf_counter()
            functions[name]()
            elapsed = time.perf_counter() - started
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def latency(
    models: dict[str, nn.Module],
    example: Example,
    rounds: int = 100,
    threads: int | None = None,
) -> dict[str, float]:
    """Median milliseconds of each model's forward pass on a batch like `example`, interleaved.

    Floating-point inputs are drawn, the same for all models: zeros hide what denormal weights cost.
    Others are as in `example`. Eval and inference mode, on each model's device, with `threads` of
    torch's (None: as many as now); modes and threads are put back. Parametrised models compute
    their weights in each pass: give finished ones. Raises `InputError` for a bad example or number.
    """
    right = threads is None or (type(threads) is int and threads > 0)
    require(right, "threads", threads, "a positive integer or None")
    drawn = _drawn(example)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads or torch.get_num_threads())
        for model in models.values():
            stack.enter_context(evaluating(model))
        calls = {name: partial(_forward, m, inputs_for(m, drawn)) for name, m in models.items()}
        seconds = interleave(calls, rounds)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def onnx_latency(
    models: dict[str, nn.Module],
    example: Example,
    rounds: int = 100,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, float]:
    """As `latency`, of the exported models in ONNX Runtime with `threads` of its own.

    `device` is "cpu" or "cuda" (the way there and back is counted). Raises `InputError` also for a
    net that cannot be exported.
    """
    with tempfile.TemporaryDirectory() as folder:
        nets = {}
        for number, (name, model) in enumerate(models.items()):
            path = Path(folder) / f"{number}.onnx"
            export(model, path, inputs_for(model, example))
            nets[name] = OnnxNet(path, threads, device)
        return latency(nets, example, rounds, threads)


def _drawn(example: Example) -> tuple[Tensor, ...]:
    """`example` with normal numbers, always the same, in its floating-point inputs."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x
        for x in inputs(example)
    )


def _forward(model: nn.Module, args: tuple[Tensor, ...]) -> None:
    run(model, args)
    if args[0].is_cuda:
        torch.cuda.synchronize(args[0].device)


def peak_memory_mb(model: nn.Module, example: Example) -> float:
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
