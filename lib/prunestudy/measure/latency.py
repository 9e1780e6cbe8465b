"""How long a net takes, measured so that a noisy machine does not decide.

The repeats of one call differ by up to 40% on a shared machine, and drift. So calls are
interleaved: every round calls each function once, in a shuffled order.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.measure.forward import evaluating, inputs_for, run
from prunestudy.shrink import OnnxNet, export
from prunestudy.values import inputs


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
    example: Tensor | tuple[Tensor, ...],
    rounds: int = 100,
    threads: int | None = None,
) -> dict[str, float]:
    """Median milliseconds of each model's forward pass on a batch like `example`.

    Floating-point inputs are drawn, the same for all models: on zeros a net with denormal weights
    seems fast. Other inputs are those of `example`. Calls are interleaved, in eval and inference
    mode, on each model's own device, waiting for CUDA, with `threads` of torch's (None: as many as
    now). Modes and threads are put back. Parametrised models compute their weights in each pass:
    give finished ones. Raises `InputError` for a bad example or number.
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
    example: Tensor | tuple[Tensor, ...],
    rounds: int = 100,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, float]:
    """Median milliseconds of each model's forward pass on a batch like `example` in ONNX Runtime.

    Each is exported to a temporary file; then as `latency`, with `threads` of the runtime's, on
    `device` ("cpu" or "cuda"; the way there and back is counted). Raises `InputError` for a net
    that cannot be exported, a bad example or number.
    """
    with tempfile.TemporaryDirectory() as folder:
        nets = {}
        for number, (name, model) in enumerate(models.items()):
            path = Path(folder) / f"{number}.onnx"
            export(model, path, inputs_for(model, example))
            nets[name] = OnnxNet(path, threads, device)
        return latency(nets, example, rounds, threads)


def _drawn(example: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
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
