"""Sets on disk: what their batches cost beside decoding and transforming the images."""

import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prunestudy import datasets, measure
from prunestudy.datasets.stream_batches import training_transforms
from prunestudy.study.bench import Row, ratio_text

_WORKERS, _BATCH = 2, 32


def stream(quick: bool = False) -> Row:
    """Training batches for ImageNet with two workers, over the bare work in two processes."""
    with tempfile.TemporaryDirectory() as folder:
        # Enough images that starting and ending workers weighs as little as in a real epoch.
        images = _photos(Path(folder), 32 if quick else 256, 1 if quick else 16)
        both = {"stream": _stream(images), "bare": _bare(images)}
        seconds = measure.interleave(both, rounds=2 if quick else 5, warmup=1)
    ratio = measure.ratio(seconds["bare"], seconds["stream"])
    return "ImageNet-sized JPEGs, two workers: rate of the stream / bare decoding", ratio_text(
        ratio
    )


def _photos(folder: Path, count: int, times: int) -> datasets.StreamSet:
    """JPEG files of 500x375, each listed a few `times`: smooth noise, 80 kB as a photo has."""
    generator = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(count)]
    for name in names:
        coarse = generator.integers(0, 256, (75, 100, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / name, quality=90)
    files = np.array([name.encode() for name in names])
    return datasets.StreamSet("bench", folder, np.tile(files, times), np.zeros(count * times, int))


def _stream(images: datasets.StreamSet) -> Callable[[], None]:
    info = datasets.info("imagenet")
    batches = datasets.batches_of(images, info, _BATCH, flip=True, workers=_WORKERS)

    def epoch() -> None:
        for _ in batches.epoch(0):
            pass

    return epoch


def _bare(images: datasets.StreamSet) -> Callable[[], None]:
    """Each process decodes and transforms its share, as torchvision does, and drops it."""
    from torchvision.transforms import v2

    info = datasets.info("imagenet")
    tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    normalised = v2.Normalize(info.mean, info.std)
    transforms = v2.Compose([training_transforms(info, flip=True), *tensor, normalised])

    def work(first: int) -> None:
        torch.set_num_threads(1)
        for name in images.files[first::_WORKERS]:
            with Image.open(images.path(name)) as image:
                transforms(image.convert("RGB"))

    def epoch() -> None:
        context = get_context("fork")
        workers = [context.Process(target=work, args=(i,)) for i in range(_WORKERS)]
        for process in workers:
            process.start()
        for process in workers:
            process.join()

    return epoch


ROWS = (stream,)
