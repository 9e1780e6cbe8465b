"""How long a net takes, measured so that a noisy machine does not decide.

The repeats of one call differ by up to 40% on a shared machine, and drift. So calls are
interleaved: every round calls each function once, in a shuffled order, and what is compared are
the pairs of one round.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.measure.forward import evaluating, zeros
from prunestudy.shrink import OnnxNet, export


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios with its 95% bootstrap interval `low` to `high`."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


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


def ratio(a: list[float], b: list[float], seed: int = 0) -> Ratio:
    """Median of the paired ratios a_i / b_i, with a percentile bootstrap interval over pairs.

    Raises `InputError` unless both are positive, finite, of one length and not empty.
    """
    pairs = (np.asarray(a, float), np.asarray(b, float))
    require(len(a) == len(b) > 0, "a, b", (len(a), len(b)), "two equal lengths above 0")
    for name, times in zip("ab", pairs, strict=True):
        worst = float(times.min())
        require(bool(np.isfinite(times).all()) and worst > 0, name, worst, "positive, finite times")
    ratios = pairs[0] / pairs[1]
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (1000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def latency(
    models: dict[str, nn.Module],
    shape: tuple[int, ...],
    batch: int,
    rounds: int = 100,
    threads: int | None = None,
) -> dict[str, float]:
    """Median milliseconds of each model's forward pass on one batch (batch, *shape).

    All are interleaved in one call; see `interleave`. Eval and inference mode, on each model's
    own device, waiting for CUDA; `threads` of torch's (the present number by default). Modes and
    threads are put back. Parametrised models compute their weights at each pass: give finished
    ones. Raises `InputError` for a bad shape or number.
    """
    right = threads is None or (type(threads) is int and threads > 0)
    require(right, "threads", threads, "a positive integer or None")
    calls = {name: partial(_forward, m, zeros(m, shape, batch)) for name, m in models.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads or torch.get_num_threads())
        for model in models.values():
            stack.enter_context(evaluating(model))
        seconds = interleave(calls, rounds)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def onnx_latency(
    models: dict[str, nn.Module],
    shape: tuple[int, ...],
    batch: int,
    rounds: int = 100,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, float]:
    """Median milliseconds of each model's forward pass on one batch in ONNX Runtime.

    Each is exported into a file of its own, for the while; then as `latency`, with `threads` of
    the runtime's, on `device` ("cpu" or "cuda"; the way there and back is counted). Raises
    `InputError` for a net that cannot be exported, a bad shape or number.
    """
    with tempfile.TemporaryDirectory() as folder:
        nets = {}
        for number, (name, model) in enumerate(models.items()):
            path = Path(folder) / f"{number}.onnx"
            export(model, path, zeros(model, shape, 2))
            nets[name] = OnnxNet(path, threads, device)
        return latency(nets, shape, batch, rounds, threads)


def _forward(model: nn.Module, x: Tensor) -> None:
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
