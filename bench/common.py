"""What every script of this folder needs: paired ratios, and a page that grows row by row."""

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.transforms.functional import to_pil_image

from prunestudy import datasets, measure
from prunestudy.train import keep_freed_memory


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios with its 95% bootstrap interval `low` to `high`."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


# Measures what a row of the page says, in about so many seconds (0: a look).
Row = Callable[[float], Ratio | str]

RESULTS = Path(__file__).resolve().parents[1] / "results"
SECONDS = 5.0
BATCH, LEAST_PAIRS, MOST_PAIRS = 128, 5, 100


def compare(
    calls: dict[str, Callable[[], object]], above: str, below: str, seconds: float
) -> Ratio:
    """Time of `above` over that of `below`, in pairs: as many as take `seconds`, within bounds."""
    trial = measure.interleave(calls, rounds=1, warmup=1)
    fitting = int(seconds / sum(times[0] for times in trial.values()))
    rounds = min(max(LEAST_PAIRS, fitting), MOST_PAIRS) if seconds else 2
    times = measure.interleave(calls, rounds, warmup=0)
    return ratio(times[above], times[below])


def ratio(a: list[float], b: list[float], seed: int = 0) -> Ratio:
    """Median of the paired ratios a_i / b_i, with a percentile bootstrap interval over pairs."""
    ratios = np.asarray(a, float) / np.asarray(b, float)
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (1000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def noise(info: datasets.DatasetInfo, batches: int) -> datasets.ImageSet:
    """Random images of the size of `info`, enough for so many `batches`, and labels below 10."""
    shape = (batches * BATCH, info.height, info.width, info.channels)
    images = torch.randint(256, shape, dtype=torch.uint8)
    return datasets.ImageSet(images, torch.randint(10, (len(images),)))


def usual_loader(
    images: datasets.ImageSet, info: datasets.DatasetInfo, shift: int, **options: Any
) -> DataLoader:
    """Batches in the usual way: PIL pictures, which torchvision transforms one by one."""
    changes = [T.RandomCrop(info.height, padding=shift), T.RandomHorizontalFlip()]
    change = T.Compose([*changes, T.ToTensor(), T.Normalize(info.mean, info.std)])
    pictures = [to_pil_image(image.numpy()) for image in images.images]
    pairs = list(zip(pictures, images.labels, strict=True))

    def collate(chosen: list) -> tuple[torch.Tensor, torch.Tensor]:
        pictures, labels = zip(*chosen, strict=True)
        return torch.stack([change(picture) for picture in pictures]), torch.stack(labels)

    return DataLoader(pairs, BATCH, shuffle=True, drop_last=True, collate_fn=collate, **options)


def main(rows: dict[str, Row], anew: bool = False, words: list[str] | None = None) -> Path | None:
    """Measure `rows` on one thread; print each, and put it on the page, as soon as it is there.

    The page keeps its other rows unless `anew`. Returns its folder, None for a look without.
    """
    chosen = _arguments(words)
    keep_freed_memory()  # as in a training
    torch.set_num_threads(1)
    page = chosen.results / "bench.md" if chosen.results else None
    if page and anew:
        page.unlink(missing_ok=True)
    for what, row in rows.items():
        print(what, end=": ", flush=True)
        measured = str(row(0.0 if chosen.quick else SECONDS))
        print(measured, flush=True)
        if page:
            write_row(page, what, measured)
    return chosen.results


def write_row(page: Path, what: str, measured: str) -> None:
    """Put a row on the `page`, in place of the one of that name; other machines' rows go."""
    head = _head()
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    kept = old.removeprefix(head).splitlines() if old.startswith(head) else []
    lines = dict(line.removeprefix("| ").split(" | ", 1) for line in kept)
    lines[what] = measured.replace("[", r"\[").replace("]", r"\]") + " |"
    part = page.with_suffix(".part")
    part.write_text(head + "".join(f"| {a} | {b}\n" for a, b in lines.items()), encoding="utf-8")
    part.replace(page)


def _head() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return (
        "# Bench\n\nWritten by `make bench`: two things in turns on one thread, medians of the"
        f" ratios of {LEAST_PAIRS} to {MOST_PAIRS} pairs, 95% bootstrap intervals. A training step"
        " is one of the library's own loop on batches of 128 images.\n\n"
        f"Machine: {next(names, platform.machine())}, {platform.system()},"
        f" Python {platform.python_version()}, torch {version('torch')}.\n\n"
        "| what | median \\[95% interval\\] |\n| --- | --- |\n"
    )


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"bench: {message}\n")


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = _OneLine(description="Measure ratios side by side.", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="two pairs a row, a look: no page")
    parser.add_argument("--results", type=Path, help="folder of the page (default: results/)")
    chosen = parser.parse_args(words)
    if not chosen.quick and chosen.results is None:
        chosen.results = RESULTS
    if chosen.results and not chosen.results.is_dir():
        parser.error(f"--results = {str(chosen.results)!r}: must be a folder that exists")
    return chosen
