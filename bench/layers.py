"""What removed channels, factors and closed forms gain, on finished nets and single layers."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import resnet50

from common import Ratio, Row, compare, main
from prunestudy import methods, models, shrink
from prunestudy.methods.channels import Channels
from prunestudy.methods.force import force
from prunestudy.papers import card
from prunestudy.shrink.factors import layer_speed_up

# Filters, channels, kernel, padding, groups, and the side of the input.
SIZES = {
    "LeNet": {"conv1": (20, 1, 5, 0, 1, 28), "conv2": (50, 20, 5, 0, 1, 12)},
    "AlexNet": {
        "conv3": (384, 256, 3, 1, 1, 13),
        "conv4": (384, 384, 3, 1, 2, 13),
        "conv5": (256, 384, 3, 1, 2, 13),
    },
}
# LeNet's ranks with the L2 force in one trial of ours; AlexNet's were published.
TRIED = {"LeNet": {"conv1": 6, "conv2": 17}}
_RANK = {"LeNet": "our trial's", "AlexNet": "its published"}


def closed_form(seconds: float) -> Ratio:
    """The L2 force of 512 filters of 64x3x3: summed over pairs, over the closed form."""
    weight = torch.randn(512, 64, 3, 3)
    both = {"pairs": partial(force_by_pairs, weight), "closed": partial(force, weight)}
    return compare(both, "pairs", "closed", seconds)


def factors(net: str, name: str, seconds: float) -> str:
    """A layer over its two factors at the rank that was published or tried for the L2 force.

    In channels_last, as nets are trained: in torch's other layout the 1x1 mixture of a small layer
    takes as long as the layer. Groups share a rank, so that an odd one is rounded down.
    """
    tables = [t for t in card("force").ranks if t.text.startswith(f"{net}, L2 force")]
    ranks = TRIED.get(net) or dict(zip(tables[0].layers, tables[0].ranks, strict=True))
    filters, channels, kernel, padding, groups, side = SIZES[net][name]
    rank = ranks[name] // groups * groups
    layer = nn.Conv2d(channels, filters, kernel, padding=padding, groups=groups)
    layer.to(memory_format=torch.channels_last)
    nets = {"whole": layer, "factors": shrink.factorise_layer(layer, rank)}
    lower = f" (published: {ranks[name]})" if rank < ranks[name] else ""
    parts = [f"at rank {rank} of {filters}{lower}"]
    for batch in (1, 128):
        ratio = forward(nets, (batch, channels, side, side), "whole", "factors", seconds / 4)
        parts.append(f"batch {batch}: {ratio}")
    parts.append(f"by MACs {layer_speed_up(layer, rank):.2f}")
    for table in tables:
        measured = table.cpu[table.layers.index(name)]
        parts.append(f"published, CPU: {measured:.2f} [{table.mark}]")
    return "; ".join(parts)


def force_by_pairs(weight: Tensor, kind: str = "l2", groups: int = 1) -> Tensor:
    """`force` by its definition, pair by pair."""
    rows = weight.reshape(groups, len(weight) // groups, -1)
    length = rows.norm(dim=2, keepdim=True)
    there = length > 1e-8
    unit = torch.where(there, rows / length, 0.0)
    pull = torch.zeros_like(unit)
    for i in range(unit.shape[1]):
        toward = (unit - unit[:, i : i + 1]) * there
        if kind == "l1":
            distance = toward.norm(dim=2, keepdim=True)
            toward = torch.where(distance > 5e-7, toward / distance, 0.0)
        pull[:, i] = toward.sum(1)
    along = (pull * unit).sum(2, keepdim=True)
    return (length * there * (pull - along * unit)).reshape(weight.shape)


def half_of_vgg16(seconds: float) -> str:
    """VGG-16 over itself with every other channel removed, and its speed-up over that in MACs."""
    nets, gain = _half()
    ratio = forward(nets, (128, 3, 32, 32), "dense", "half", seconds)
    return f"{ratio} at {gain:.2f} times fewer MACs"


def half_in_onnx_runtime(seconds: float) -> str:
    """The same two nets as ONNX files in ONNX Runtime."""
    nets, gain = _half()
    with tempfile.TemporaryDirectory() as folder:
        for name, net in nets.items():
            path = Path(folder) / f"{name}.onnx"
            shrink.export(net, path, torch.rand(2, 3, 32, 32))
            nets[name] = shrink.OnnxNet(path, threads=1)
    ratio = forward(nets, (128, 3, 32, 32), "dense", "half", seconds)
    return f"{ratio} at {gain:.2f} times fewer MACs"


def new_mask(seconds: float) -> Ratio:
    """A new global mask of ResNet-50, with the trail of what it cut, over torch's pruning."""
    both = {"ours": our_masks(resnet50()), "torch": torch_masks(resnet50())}
    return compare(both, "ours", "torch", seconds)


def forward(
    nets: dict[str, nn.Module], shape: tuple[int, ...], above: str, below: str, seconds: float
) -> Ratio:
    """Time of a forward pass of the net `above` over one of `below`, on a batch of `shape`."""
    x = torch.randn(shape)
    with torch.inference_mode():
        calls = {name: partial(net.eval(), x) for name, net in nets.items()}
        return compare(calls, above, below, seconds)


def _half() -> tuple[dict[str, nn.Module], float]:
    """VGG-16, dense and with every other channel, and how many times fewer MACs that is."""
    dense = models.build("vgg16_cifar", (3, 32, 32), 10).eval()
    channels = Channels(dense, torch.zeros(2, 3, 32, 32), "macs")
    kept = torch.cat([torch.arange(group.channels) % 2 == 0 for group in channels.groups])
    gain = channels.dense / float(channels.cost(kept))
    return {"dense": dense, "half": channels.smaller(dense, kept)}, gain


def our_masks(net: nn.Module) -> Callable[[], None]:
    """MAP's update; in turns it keeps a little more and less, so that weights leave and return."""
    method = methods.build("magnitude_attention", {}, 0.9)
    channels = next(p.shape[1] for p in net.parameters() if p.dim() == 4)
    method.attach(net, methods.Context((torch.randn(1, channels, 32, 32),)))
    method.cut(0.9)
    count = iter(range(10**9))
    return lambda: method.cut(0.9 - 0.002 * (next(count) % 2))


def torch_masks(net: nn.Module) -> Callable[[], None]:
    """torch's global_unstructured, after which the net's weights are as before."""
    layers = [(layer, "weight") for layer in net.modules() if isinstance(layer, nn.Conv2d)]

    def update() -> None:
        prune.global_unstructured(layers, prune.L1Unstructured, amount=0.9)
        for layer, name in layers:
            dense = layer.weight_orig.data
            prune.remove(layer, name)
            layer.weight.data = dense

    return update


ROWS: dict[str, Row] = {
    "L2 force of 512 filters: summed over pairs / in closed form": closed_form,
    **{
        f"{net} {name} at {_RANK[net]} rank: whole / two factors": partial(factors, net, name)
        for net, layers in SIZES.items()
        for name in layers
    },
    "VGG-16, forward, batch 128: dense / half its channels": half_of_vgg16,
    "The same in ONNX Runtime: dense / half its channels": half_in_onnx_runtime,
    "ResNet-50, a new mask: MAP's with its trail / torch's global_unstructured": new_mask,
}

if __name__ == "__main__":
    main(ROWS)
