"""Ratios measured side by side: interleaved pairs, medians, bootstrap intervals.

Seconds of one machine say little; the ratio of two things that ran in turns says more. Each file of
this package has `ROWS`, functions that measure one thing each.
"""

import pkgutil
import platform
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from prunestudy import measure, methods, models
from prunestudy.measure import Ratio
from prunestudy.methods import Context, Method, Progress
from prunestudy.study import tables
from prunestudy.study.records import repository, write_text
from prunestudy.train import keep_freed_memory

Row = tuple[str, str]


def run(results: str = "", quick: bool = False) -> None:
    """Measure everything, print it and write bench.md and sparse_linear.* into `results`."""
    from prunestudy.study.bench import sparse_gates

    folder = Path(results or repository() / "results")
    keep_freed_memory()  # as in a training
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [measure_row(quick) for measure_row in all_rows()]
        sparse = sparse_gates.sparse_linear(quick)
    finally:
        torch.set_num_threads(threads)
    text = _page(rows, sparse)
    print(text)
    write_text(folder / "bench.md", text)
    csv = sparse.to_csv(index=False, float_format="%.5g", lineterminator="\n")
    write_text(folder / "sparse_linear.csv", csv)
    sparse_gates.draw(sparse, folder)


def all_rows() -> list[Callable[[bool], Row]]:
    """What is measured, from all files of this package in the order of their names."""
    files = sorted(file.name for file in pkgutil.iter_modules(__path__))
    return [row for name in files for row in import_module(f"{__name__}.{name}").ROWS]


def training_step(
    net: nn.Module,
    method: Method,
    x: torch.Tensor,
    y: torch.Tensor,
    context: Context | None = None,
) -> Callable[[], None]:
    """One step of the loop in the first phase of `method`, on the batch `x`, `y`, as a call.

    With `context` for methods that look at the net's inputs first.
    """
    net = net.to(memory_format=torch.channels_last)
    method.attach(net, torch.Generator().manual_seed(0))
    if context:
        method.prepare(net, context)
    phase = method.phases()[0].name
    method.start(net, phase)
    sgd = torch.optim.SGD(method.parameter_groups(net, phase), lr=1e-4, momentum=0.9)
    own = method.own_optimizer(net, phase)
    optimizers = [sgd] if own is None else [sgd, own]
    count = iter(range(10**9))

    def step() -> None:
        step = next(count)
        progress = Progress(phase, step, 10_000, step, 10_000)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        method.after_backward(net, progress)
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(net, progress, 1e-4)

    return step


def step_cost(
    net: str,
    shape: tuple[int, ...],
    method: Method,
    rounds: int,
    warmup: int = 2,
    context: Context | None = None,
) -> str:
    """A training step of `net` with `method`, batch 128 of `shape`, over a dense one, for a row."""
    x, y = torch.randn(128, *shape), torch.randint(10, (128,))
    x = x.contiguous(memory_format=torch.channels_last)
    both = {
        name: training_step(models.build(net, shape, 10), each, x, y, context)
        for name, each in (("dense", methods.build("dense", {})), ("method", method))
    }
    seconds = measure.interleave(both, rounds=rounds, warmup=warmup)
    return ratio_text(measure.ratio(seconds["method"], seconds["dense"]))


def ratio_text(ratio: Ratio) -> str:
    """Median and interval of `ratio` for a row."""
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _page(rows: list[Row], sparse: pd.DataFrame) -> str:
    measured = pd.DataFrame(rows, columns=["what", "median [95% interval]"])
    wide = sparse.assign(
        x=[f"{r.speed_up:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in sparse.itertuples()]
    ).pivot(index=["width", "batch"], columns="sparsity", values="x")
    wide.columns = [f"{s:.0%} zeros" for s in wide.columns]
    return (
        "# Bench\n\nWritten by `make bench`: interleaved pairs on one thread, medians of the paired"
        " ratios with 95% bootstrap intervals.\n\n"
        f"Machine: {_machine()}.\n\n{tables.markdown(measured)}\n"
        "## Sparse linear layers\n\nTime of the dense layer over that of the same layer from"
        " compressed rows (CSR); above 1 the sparse one is faster.\n\n"
        f"{tables.markdown(wide.reset_index())}"
    )


def _machine() -> str:
    import psutil

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next(
        (x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine()
    )
    memory = round(psutil.virtual_memory().total / 2**30)
    return (
        f"{psutil.cpu_count()} x {model}, {memory} GiB, {platform.system()},"
        f" Python {platform.python_version()}, torch {version('torch')}"
    )
