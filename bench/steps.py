"""What a method's training step costs, in the library's own loop."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from common import BATCH, MOST_PAIRS, Ratio, Row, compare, main, noise, usual_loader
from prunestudy import datasets, methods, models
from prunestudy.train import Loop, Recipe


def training(
    model: str,
    info: datasets.DatasetInfo,
    method: methods.Method,
    batches: datasets.Batches,
    precision: str = "fp32",
) -> Iterator[Any]:
    """The loop of `train` on `batches`, to be advanced by steps."""
    net = models.build(model, (info.channels, info.height, info.width), info.num_classes)
    # Of so many epochs that a look sees its first phase.
    recipe = Recipe(epochs=100, lr=1e-3)
    return Loop(net, method, recipe, batches, batches, seed=0, precision=precision).steps()


def over_dense(
    model: str,
    dataset: str,
    name: str,
    params: dict[str, Any],
    target: tuple[float, str],
    seconds: float,
) -> Ratio:
    """A training step of `model` with the method `name` over one of dense training."""
    info = datasets.info(dataset)
    images = noise(info, MOST_PAIRS + 4 if seconds else 8)
    batches = datasets.Batches(images, info, BATCH, shift=2)
    method = methods.build(name, params, *target)
    both = {
        "dense": partial(next, training(model, info, methods.build("dense", {}), batches)),
        "method": partial(next, training(model, info, method, batches)),
    }
    return compare(both, "method", "dense", seconds)


def over_torchvision(seconds: float) -> Ratio:
    """ResNet-20 on crops and flips: steps a second of ours over those of a usual loop."""
    info = datasets.info("cifar10")
    images = noise(info, MOST_PAIRS + 4 if seconds else 8)
    batches = datasets.Batches(images, info, BATCH, shift=4, flip=True)
    ours = training("resnet20", info, methods.build("dense", {}), batches, PRECISION)
    few = datasets.ImageSet(images.images[: 4 * BATCH], images.labels[: 4 * BATCH])
    usual = _usual_training(few, info)
    both = {"ours": partial(next, ours), "usual": partial(next, usual)}
    return compare(both, "usual", "ours", seconds)


def _usual_training(images: datasets.ImageSet, info: datasets.DatasetInfo) -> Iterator[None]:
    """A loop as tutorials have it: a DataLoader, default layout, fp32."""
    loader = usual_loader(images, info, shift=4)
    net = models.build("resnet20", (3, 32, 32), 10).train()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    while True:
        for x, y in loader:
            sgd.zero_grad()
            F.cross_entropy(net(x), y).backward()
            sgd.step()
            yield


def _multiplies_in_bf16() -> bool:
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


PRECISION = "bf16" if _multiplies_in_bf16() else "fp32"

RESNET, LENET = ("resnet20", "cifar10"), ("lenet5", "mnist")

ROWS: dict[str, Row] = {
    "LeNet-5, a training step: with gates on weights / dense": partial(
        over_dense, *LENET, "sparse_gates", {}, (0.95,)
    ),
    "ResNet-20, a training step: with the L2 force / dense": partial(
        over_dense, *RESNET, "force", {}, (0.05,)
    ),
    "ResNet-20, a training step: with GDP's gates / dense": partial(
        over_dense, *RESNET, "gdp", {}, (0.5, "macs")
    ),
    "ResNet-20, a training step: with MAP's new mask at every step / dense": partial(
        over_dense, *RESNET, "magnitude_attention", {"period": 1}, (0.95,)
    ),
    f"ResNet-20, images a second: ours ({PRECISION}) / torchvision's DataLoader, fp32": (
        over_torchvision
    ),
}

if __name__ == "__main__":
    main(ROWS)
