"""GDP: what gates cost in a step, how fast the loop is, what removed channels gain."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from prunestudy import datasets, measure, methods, models
from prunestudy.measure import Task
from prunestudy.methods.base import Context
from prunestudy.methods.channels import Channels
from prunestudy.study.bench import Row, ratio_text, step_cost

SHAPE = (3, 32, 32)


def gdp_step(quick: bool = False) -> Row:
    """A ResNet-20 training step, batch 128, with GDP's gates over a dense one."""
    context = Context(_images(128), _images(128), Task(), torch.device("cpu"))
    method = methods.build("gdp", {}, 0.5, "macs")
    cost = step_cost("resnet20", SHAPE, method, 2 if quick else 60, 1, context)
    return "ResNet-20 training step: with GDP's gates / dense", cost


def resnet20_throughput(quick: bool = False) -> Row:
    """ResNet-20 on crops and flips, batch 128: images per second of ours over a plain loop."""
    both = {"plain": _plain_loop(128), "ours": _our_loop(128)}
    seconds = measure.interleave(both, rounds=2 if quick else 40, warmup=1)
    ratio = measure.ratio(seconds["plain"], seconds["ours"])
    form = "bf16, channels_last" if _has_bf16() else "channels_last"
    what = f"ResNet-20, images a second: ours ({form}) / torchvision, DataLoader, fp32"
    return what, ratio_text(ratio)


def half_of_vgg16(quick: bool = False) -> Row:
    """VGG-16 with half of each layer's channels removed: its speed-up over its MACs ratio."""
    nets, gain = _half()
    seconds = measure.timings(nets, SHAPE, 128, rounds=2 if quick else 40, threads=1)
    ratio = measure.ratio(seconds["dense"], seconds["half"])
    text = f"{ratio_text(ratio)} at {gain:.2f} times fewer MACs: {ratio.median / gain:.2f} of it"
    return "VGG-16 with half its channels, batch 128: dense / small", text


def half_in_onnx_runtime(quick: bool = False) -> Row:
    """The same two nets as ONNX files in ONNX Runtime, one thread."""
    nets, gain = _half()
    milliseconds = measure.onnx_latency(nets, SHAPE, 128, rounds=2 if quick else 20)
    gained = milliseconds["dense"] / milliseconds["half"]
    text = f"{gained:.2f} (of medians) at {gain:.2f} times fewer MACs: {gained / gain:.2f} of it"
    return "The same in ONNX Runtime: dense / small", text


def _half() -> tuple[dict[str, torch.nn.Module], float]:
    """VGG-16, dense and with every other channel, and how many times fewer MACs that is."""
    dense = models.build("vgg16_cifar", SHAPE, 10).eval()
    channels = Channels(dense, SHAPE, "macs")
    half = torch.cat([torch.arange(group.channels) % 2 == 0 for group in channels.groups])
    gain = channels.dense / float(channels.cost(half))
    return {"dense": dense, "half": channels.smaller(dense, half)}, gain


def _images(count: int) -> datasets.Batches:
    """Random pictures of CIFAR's size, with crops and flips."""
    labels, side = torch.randint(10, (count,)), (3, 32, 32, 10)
    info = datasets.DatasetInfo("noise", "noise", "1", *side, count, count, (0.5,) * 3, (0.25,) * 3)
    images = datasets.ImageSet(_pixels(count), labels)
    return datasets.Batches(images, info, min(128, count), shift=4, flip=True)


def _pixels(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)


def _our_loop(count: int) -> Callable[[], None]:
    """An epoch of `count` images as the training loop of this library makes it."""
    batches = _images(count)
    net = models.build("resnet20", SHAPE, 10).to(memory_format=torch.channels_last).train()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def epoch() -> None:
        for x, y in batches.epoch(0):
            with torch.autocast("cpu", torch.bfloat16, enabled=_has_bf16()):
                loss = F.cross_entropy(net(x), y)
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            sgd.step()

    return epoch


def _plain_loop(count: int) -> Callable[[], None]:
    """The same in the usual way: pictures one by one, default layout, fp32."""
    from torch.utils.data import DataLoader
    from torchvision import transforms as T

    change = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor()]
    change = T.Compose([T.ToPILImage(), *change, T.Normalize((0.5,) * 3, (0.25,) * 3)])
    pictures = [(picture, 0) for picture in _pixels(count).numpy()]
    loader = DataLoader(
        pictures, min(128, count), shuffle=True, collate_fn=lambda some: _collate(change, some)
    )
    net = models.build("resnet20", SHAPE, 10).train()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def epoch() -> None:
        for x, y in loader:
            loss = F.cross_entropy(net(x), y)
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            sgd.step()

    return epoch


def _collate(change: Callable, some: list) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, labels = zip(*some, strict=True)
    return torch.stack([change(picture) for picture in pictures]), torch.tensor(labels)


def _has_bf16() -> bool:
    """Whether the processor multiplies in bf16 by itself."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


ROWS = (gdp_step, resnet20_throughput, half_of_vgg16, half_in_onnx_runtime)
