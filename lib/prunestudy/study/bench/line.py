"""What every run needs: batches, the start of a command, tables."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from prunestudy import datasets, measure
from prunestudy.study import tables
from prunestudy.study.bench import Row, ratio_text
from prunestudy.study.plan import Planned, plan
from prunestudy.study.records import FORMAT, Store, canonical, checksum, write_text


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
    return "batches of 128 with shifts: torchvision's DataLoader / ours", ratio_text(ratio)


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
    return "start of a command / importing torch", f"{ratio_text(ratio)}; {median:.1f} s"


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
            "environment": {"device": "cpu"},
        }
        record["metrics"] |= {"nonzeros": 1000}
        record = json.loads(canonical(record))
        record["checksum"] = checksum(record)
        write_text(store.path(settings.run) / "record.json", canonical(record))
        made.append(Planned(first.paper, first.experiment, first.purpose, "", settings))
    return made


ROWS = (batches, start_up, many_records)
