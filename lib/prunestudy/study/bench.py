"""Ratios measured side by side: interleaved pairs, medians, bootstrap intervals.

Seconds of one machine say little; the ratio of two things that ran in turns says more.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from prunestudy import datasets, measure, methods, models, shrink
from prunestudy.measure import Ratio
from prunestudy.methods import Progress
from prunestudy.study import tables
from prunestudy.study.plan import Planned, plan
from prunestudy.study.records import FORMAT, Store, canonical, checksum, repository, write_text

Row = tuple[str, str]
WIDTHS, SPARSITIES, BATCHES = (512, 1024, 2048, 4096), (0.90, 0.95, 0.98, 0.99), (1, 128)


def run(results: str = "", quick: bool = False) -> None:
    """Measure everything, print it and write bench.md and sparse_linear.* into `results`."""
    folder = Path(results or repository() / "results")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [batches(quick), gate_step(quick), start_up(quick), many_records(quick)]
        sparse = sparse_linear(quick)
    finally:
        torch.set_num_threads(threads)
    text = _page(rows, sparse)
    print(text)
    write_text(folder / "bench.md", text)
    csv = sparse.to_csv(index=False, float_format="%.5g", lineterminator="\n")
    write_text(folder / "sparse_linear.csv", csv)
    _draw(sparse, folder)


def batches(quick: bool = False) -> Row:
    """Batches of 128 MNIST-sized images with shifts: torchvision's time over ours."""
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision import transforms as T

    images = torch.randint(256, (128 * (8 if quick else 40), 28, 28, 1), dtype=torch.uint8)
    labels = torch.zeros(len(images), dtype=torch.int64)
    known = datasets.info("mnist")
    ours = datasets.Batches(datasets.ImageSet(images, labels), known, 128, shift=2)
    crop = [T.RandomCrop(28, padding=2), T.ToTensor(), T.Normalize(known.mean, known.std)]
    change = T.Compose(crop)
    pictures = [Image.fromarray(image[:, :, 0].numpy()) for image in images]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return change(pictures[index]), 0

    loader = DataLoader(Pictures(), 128, shuffle=True, drop_last=True)
    both = {
        "torchvision": lambda: [None for _ in loader],
        "ours": lambda: [None for _ in ours.epoch(0)],
    }
    seconds = measure.interleave(both, rounds=5 if quick else 25, warmup=1)
    ratio = measure.ratio(seconds["torchvision"], seconds["ours"])
    return "batches of 128 with shifts: torchvision's DataLoader / ours", _ratio(ratio)


def gate_step(quick: bool = False) -> Row:
    """A LeNet-5 training step, batch 128, with gates over a dense one."""
    x, y = torch.randn(128, 1, 28, 28), torch.randint(10, (128,))
    x = x.contiguous(memory_format=torch.channels_last)
    both = {name: _step(name, x, y) for name in ("dense", "sparse_gates")}
    seconds = measure.interleave(both, rounds=20 if quick else 300, warmup=5)
    ratio = measure.ratio(seconds["sparse_gates"], seconds["dense"])
    return "LeNet-5 training step: with gates / dense", _ratio(ratio)


def _step(name: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    net = models.build("lenet5", (1, 28, 28), 10).to(memory_format=torch.channels_last)
    method = methods.build(name, {}, None if name == "dense" else 0.95)
    method.attach(net, torch.Generator().manual_seed(0))
    phase = method.phases()[0].name
    method.start(net, phase)
    sgd = torch.optim.SGD(method.parameter_groups(net, phase), lr=1e-4, momentum=0.9)
    own = method.own_optimizer(net, phase)
    optimizers = [sgd] if own is None else [sgd, own]
    count = iter(range(10**9))

    def step() -> None:
        progress = Progress(phase, next(count), 10_000, 0, 10_000)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        method.after_backward(net, progress)
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(net, progress, 1e-4)

    return step


def start_up(quick: bool = False) -> Row:
    """From the shell to a planned run, over importing torch alone."""
    words = {
        "command": [sys.executable, "-m", "prunestudy.study.cli", "list"],
        "torch": [sys.executable, "-c", "import torch"],
    }

    def call(command: list[str]) -> Callable[[], None]:
        return lambda: subprocess.run(command, check=True, capture_output=True)

    both = {name: call(command) for name, command in words.items()}
    seconds = measure.interleave(both, rounds=2 if quick else 7, warmup=1)
    ratio = measure.ratio(seconds["command"], seconds["torch"])
    median = np.median(seconds["command"])
    return "start of a command / importing torch", f"{_ratio(ratio)}; {median:.1f} s"


def many_records(quick: bool = False) -> Row:
    """Seconds for both tables from synthetic records, ours 10,000."""
    count = 500 if quick else 10_000
    with tempfile.TemporaryDirectory() as folder:
        store = Store("quick", folder)
        planned = _synthetic(store, count)
        started = time.perf_counter()
        tables.write(store, planned)
        seconds = time.perf_counter() - started
    return f"both tables from {count:,} records", f"{seconds:.1f} s"


def _synthetic(store: Store, count: int) -> list[Planned]:
    first = next(p for p in plan("quick") if p.settings.target)
    made = []
    for seed in range(count):
        settings = first.settings.model_copy(update={"seed": seed, "parent": None})
        record = {
            "format": FORMAT,
            "run": settings.run,
            "parent": None,
            "status": "done",
            "settings": settings.model_dump(mode="json"),
            "metrics": {"metric_name": "top1", "metric": 0.9 + 1e-6 * seed, "sparsity": 0.9},
            "cost": {"train_seconds": 1.0},
        }
        record["metrics"] |= {"nonzeros": 1000}
        record = json.loads(canonical(record))
        record["checksum"] = checksum(record)
        write_text(store.path(settings.run) / "record.json", canonical(record))
        made.append(Planned(first.paper, first.experiment, first.purpose, "", settings))
    return made


def sparse_linear(quick: bool = False) -> pd.DataFrame:
    """Dense over compressed-row time of square linear layers; above 1 sparse is faster."""
    widths = WIDTHS[:1] if quick else WIDTHS
    rows = []
    generator = torch.Generator().manual_seed(0)
    for width in widths:
        for sparsity in SPARSITIES:
            dense = nn.Linear(width, width)
            keep = torch.rand(dense.weight.shape, generator=generator) >= sparsity
            dense.weight.data.mul_(keep)
            nets = {"dense": dense, "sparse": shrink.to_csr(dense)}
            for batch in BATCHES:
                rounds = 20 if quick else 100
                seconds = measure.timings(nets, (width,), batch, rounds=rounds, threads=1)
                ratio = measure.ratio(seconds["dense"], seconds["sparse"])
                rows.append((width, sparsity, batch, ratio.median, ratio.low, ratio.high))
    return pd.DataFrame(rows, columns=["width", "sparsity", "batch", "speed_up", "low", "high"])


def _ratio(ratio: Ratio) -> str:
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


def _draw(sparse: pd.DataFrame, folder: Path) -> None:
    import matplotlib.pyplot as plt

    from prunestudy.study import figures

    figures.style()
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(9, 3.4), sharey=True)
    for panel, batch in zip(axes, BATCHES, strict=True):
        for width, rows in sparse[sparse.batch == batch].groupby("width"):
            error = [rows.speed_up - rows.low, rows.high - rows.speed_up]
            panel.errorbar(rows.sparsity, rows.speed_up, error, marker="o", label=f"{width} wide")
        panel.axhline(1, color="black", ls="--", lw=1)
        panel.set(title=f"batch {batch}", xlabel="share of zero weights", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("dense time / sparse time")
    axes[0].legend(fontsize=8)
    figures.save_to(figure, folder, "sparse_linear")
    plt.close(figure)
