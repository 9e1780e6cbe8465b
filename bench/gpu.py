"""What one CUDA device gives: `python bench/gpu.py [FOLDER [PART ...]]` prints rows.

They go to gpu_bench.md in the folder, in place of this card's older rows of those parts (all unless
named); rows of another card go.

Images are random, of CIFAR-10's size (ResNet-50: of ImageNet's). "Usual" is a plain loop of torch
in the default layout behind torchvision's DataLoader on all cores; "on the device" the same loop in
channels_last with the batches of this library; "eager" and "captured" are the library's own loop.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common import BATCH, noise, usual_loader
from prunestudy import datasets, methods, models, shrink
from prunestudy.errors import InputError, require_one_of
from prunestudy.methods import Context
from prunestudy.methods.channels import Channels
from prunestudy.train import Loop, Recipe, capture
from prunestudy.train.process import Turn, use_own_stream

CUDA = torch.device("cuda")
METHODS = {
    "sparse_gates": ({}, 0.9),
    "force": ({}, 0.05),
    "gdp": ({}, 0.5),
    "magnitude_attention": ({}, 0.95),
    "hard_concrete": ({}, 0.5),
    "network_slimming": ({}, 0.5),
    "l1": ({}, 0.9),
}
SECONDS = 0.5


def main(folder: Path | None, parts: list[str]) -> None:
    """Measure all rows of `parts`; each is printed, and written, as soon as it is there."""
    head = f"# {torch.cuda.get_device_name()}, torch {torch.__version__}"
    page, found = folder and folder / "gpu_bench.md", {}
    if page and page.is_file():
        lines = page.read_text(encoding="utf-8").splitlines()
        if lines[:1] == [head]:  # rows of another card go
            found = dict(line[2:].rsplit(": ", 1) for line in lines[1:] if line)
    print(head, flush=True)
    for what, value in rows(parts):
        print(f"{what}: {value}", flush=True)
        found[what] = value
        if page:
            page.parent.mkdir(parents=True, exist_ok=True)
            text = "\n".join(f"- {name}: {each}" for name, each in found.items())
            page.write_text(f"{head}\n\n{text}\n", encoding="utf-8")


def rows(parts: list[str]) -> Iterator[tuple[str, str]]:
    """Name and value of everything that is measured."""
    known = ("resnet20", "methods", "latency", "resnet50", "resnet56", "vgg16_cifar")
    for part in parts:
        require_one_of("part", part, known)
    peak = bf16_peak()
    yield "bf16 matrix product, TFLOP/s", f"{peak / 1e12:.0f}"
    others = {"methods": of_methods, "latency": of_latency, "resnet50": of_resnet50}
    for part in parts or known:
        yield from others[part]() if part in others else of_net(part, peak)


def bf16_peak(size: int = 8192) -> float:
    """Operations a second of a product of two random matrices."""
    a, b = (torch.randn(size, size, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 * rate(lambda: a @ b)


def rate(call: Callable[[], Any], warm: int = 5) -> float:
    """Calls a second, what they queue included."""
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    started, done, seconds = time.perf_counter(), 0, 0.0
    while not done or seconds < SECONDS:
        for _ in range(min(64, done or 1)):
            call()
        torch.cuda.synchronize()
        done, seconds = done + min(64, done or 1), time.perf_counter() - started
    return done / seconds


def of_net(name: str, peak: float) -> Iterator[tuple[str, str]]:
    """Images a second of a training of `name`, and ratios."""
    info = datasets.info("cifar10")
    images, macs = noise(info, 80), _macs(name)
    workers = {"num_workers": min(16, os.cpu_count() or 1), "persistent_workers": True}
    for precision in ("fp32", "bf16"):
        batches = datasets.Batches(images, info, BATCH, shift=4, flip=True, device=CUDA)
        loader = usual_loader(images, info, 4, pin_memory=torch.cuda.is_available(), **workers)
        found = {"usual": rate(plain(name, loader, precision, usual=True))}
        del loader
        found["on the device"] = rate(plain(name, batches, precision))
        found["eager"] = rate(ours(name, batches, precision, 1, eager=True))
        for count in (1, 2, 4, 8):
            key = f"captured, {count} at a time" if count > 1 else "captured"
            found[key] = rate(ours(name, batches, precision, count))
        per = {key: BATCH * value * (_count(key)) for key, value in found.items()}
        for key, value in per.items():
            yield f"{name}, {precision}, {key}: images/s", f"{value:,.0f}"
        faster = max(per["usual"], per["on the device"])
        yield f"{name}, {precision}: captured / faster plain", f"{per['captured'] / faster:.2f}"
        best = max(value for key, value in per.items() if key.startswith("captured"))
        yield f"{name}, {precision}: best gang / one alone", f"{best / per['captured']:.2f}"
        share = 6 * macs * best / peak
        yield f"{name}, {precision}: share of the bf16 peak in the best", f"{share:.4f}"


def plain(name: str, batches: Any, precision: str, usual: bool = False) -> Callable[[], None]:
    """A step of a loop as tutorials have it."""
    net = models.build(name, (3, 32, 32), 10).to(CUDA)
    net = net if usual else net.to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def endless() -> Iterator[Any]:
        epoch = 0
        while True:
            yield from batches if usual else batches.epoch(epoch)
            epoch += 1

    source = endless()

    def step() -> None:
        x, y = (part.to(CUDA, non_blocking=True) for part in next(source))
        sgd.zero_grad()
        with torch.autocast(CUDA.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        sgd.step()

    return step


def training(net: nn.Module, method: methods.Method, batches: Any, precision: str) -> Iterator[Any]:
    """The loop that `prune` runs, on a stream of its own."""
    use_own_stream(CUDA)
    net = net.to(CUDA, memory_format=torch.channels_last)
    example = next(batches.ordered(2))[0]
    context = Context((example,), lambda output, x, y: F.cross_entropy(output, y))  # noqa: ARG005
    context.generator = torch.Generator(CUDA).manual_seed(0)
    recipe = Recipe(epochs=1000, lr=1e-3)
    yield from Loop(net, method, recipe, batches, context, _unscored, precision=precision).steps()


def _unscored(_: nn.Module) -> dict[str, float]:
    return {}


def ours(
    name: str,
    batches: Any,
    precision: str,
    count: int = 1,
    method: str = "dense",
    eager: bool = False,
) -> Callable[[], None]:
    """A step of each of `count` trainings in turns."""
    going = []
    for _ in range(count):
        params, target = METHODS.get(method, ({}, None))
        made = methods.build(method, params, *([target] if target else []))
        net = models.build(name, (3, batches.info.height, batches.info.width), 10)
        going.append((training(net, made, batches, precision), Turn()))
    capture.WARM = 10**9 if eager else 3

    def step() -> None:
        for loop, turn in going:
            with turn:
                next(loop)

    for _ in range(8):  # the captures
        step()
    return step


def of_methods() -> Iterator[tuple[str, str]]:
    """A step of each method over a dense one, both captured, in pairs."""
    info = datasets.info("cifar10")
    batches = datasets.Batches(noise(info, 80), info, BATCH, shift=4, flip=True, device=CUDA)
    for name in METHODS:
        ratios = []
        both = [ours("resnet20", batches, "bf16", method=each) for each in ("dense", name)]
        for _ in range(3):
            dense, with_method = (rate(step) for step in both)
            ratios.append(dense / with_method)
        low, middle, high = sorted(ratios)
        yield f"resnet20, bf16, step of {name} / dense", f"{middle:.3f} ({low:.3f} to {high:.3f})"


def of_latency() -> Iterator[tuple[str, str]]:
    """Milliseconds of a forward pass: dense, gated, half the channels, half the rank."""
    for name in ("resnet20", "vgg16_cifar"):
        dense = models.build(name, (3, 32, 32), 10).eval()
        channels = Channels(dense, torch.zeros(2, 3, 32, 32), "macs")
        kept = torch.cat([torch.arange(group.channels) % 2 == 0 for group in channels.groups])
        halves = {n: max(1, r // 2) for n, r in shrink.ranks_by_share(dense, 1.0).items()}
        small, low_rank = channels.smaller(dense, kept), shrink.factorise(dense, halves)
        gated = models.build(name, (3, 32, 32), 10).eval()
        methods.build("gdp", {}, 0.5).attach(gated, Context((torch.zeros(2, 3, 32, 32),)))
        nets = {"dense": dense, "gated": gated, "small": small, "factorised": low_rank}
        for batch in (1, 128):
            x = torch.randn(batch, 3, 32, 32, device=CUDA).to(memory_format=torch.channels_last)
            with torch.inference_mode():
                for kind, net in nets.items():
                    there = net.to(CUDA, memory_format=torch.channels_last)
                    ms = 1e3 / rate(lambda there=there, x=x: there(x))
                    yield f"{name}, {kind}, batch {batch}: ms", f"{ms:.3f}"


def of_resnet50(batch: int = 64) -> Iterator[tuple[str, str]]:
    """The same images over and over, at ImageNet's size: plain and captured."""
    info = datasets.info("imagenet")
    shape = (2 * batch, 224, 224, 3)
    images = datasets.ImageSet(
        torch.randint(256, shape, dtype=torch.uint8), torch.randint(10, (2 * batch,))
    )
    batches = datasets.Batches(images, info, batch, flip=True, device=CUDA)
    for key, eager in (("eager", True), ("captured", False)):
        value = batch * rate(ours("resnet50", batches, "bf16", eager=eager))
        yield f"resnet50, bf16, {key}: images/s", f"{value:,.0f}"


def _count(key: str) -> int:
    return int(key.split(", ")[1].split(maxsplit=1)[0]) if ", " in key else 1


def _macs(name: str) -> int:
    from prunestudy.study.settings import dense_macs

    return dense_macs(name, datasets.info("cifar10"))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: no CUDA device here")
    with torch.cuda.stream(torch.cuda.Stream()):
        try:
            main(Path(sys.argv[1]) if sys.argv[1:] else None, sys.argv[2:])
        except InputError as error:
            sys.exit(f"bench/gpu.py: {error}")
