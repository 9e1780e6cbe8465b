"""What batches cost, from memory and from files, beside the usual way and beside bare decoding."""

import tempfile
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from common import BATCH, Ratio, Row, compare, main, noise, usual_loader
from prunestudy import datasets
from prunestudy.datasets.streams import training_transforms

WORKERS, PHOTOS = 2, 32  # photos a batch


def from_memory(seconds: float) -> Ratio:
    """An epoch of MNIST-sized images with shifts and flips: torchvision's time over ours."""
    info = datasets.info("mnist")
    images = noise(info, 20 if seconds else 2)
    ours = datasets.Batches(images, info, BATCH, shift=2, flip=True)
    usual = usual_loader(images, info, shift=2)
    both = {"ours": lambda: list(ours.epoch(0)), "torchvision": lambda: list(usual)}
    return compare(both, "torchvision", "ours", seconds)


def from_files(seconds: float) -> Ratio:
    """Training batches of ImageNet's size with two workers: bare time over the stream's."""
    with tempfile.TemporaryDirectory() as folder:
        images = photos(Path(folder), 256 if seconds else 16, times=2)
        both = {"stream": partial(stream, images), "bare": partial(bare, images)}
        return compare(both, "bare", "stream", seconds)


def photos(folder: Path, count: int, times: int) -> datasets.ImageSet:
    """JPEG files of 500x375, each listed a few `times`: smooth noise, 80 kB as a photo has."""
    generator = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(count)]
    for name in names:
        coarse = generator.integers(0, 256, (75, 100, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / name, quality=90)
    return datasets.ImageSet(np.tile(names, times), np.zeros(count * times, int), folder)


def stream(images: datasets.ImageSet) -> None:
    """An epoch of `images`, the start of its workers with it."""
    info = datasets.info("imagenet")
    for _ in datasets.batches_of(images, info, PHOTOS, flip=True, workers=WORKERS).epoch(0):
        pass


def bare(images: datasets.ImageSet) -> None:
    """As many processes decode and transform their share as torchvision does, and drop it."""
    info = datasets.info("imagenet")
    tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    normalised = v2.Normalize(info.mean, info.std)
    transforms = v2.Compose([training_transforms(info, flip=True), *tensor, normalised])

    def work(first: int) -> None:
        torch.set_num_threads(1)
        for name in images.images[first::WORKERS]:
            with Image.open(images.folder / name) as image:
                transforms(image.convert("RGB"))

    workers = [get_context("fork").Process(target=work, args=(i,)) for i in range(WORKERS)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()


ROWS: dict[str, Row] = {
    "Batches of 128 with shifts and flips: torchvision's DataLoader / ours": from_memory,
    "ImageNet-sized JPEGs, two workers: rate of the stream / of bare decoding": from_files,
}

if __name__ == "__main__":
    main(ROWS)
