"""Force Regularization: what the force costs in a training step, what its closed form saves, and
what factors gain: layer by layer, at ranks of the card.
"""

from functools import partial

import torch
from torch import nn

from prunestudy import measure, methods, shrink
from prunestudy.methods.force import force, force_by_pairs
from prunestudy.papers import card
from prunestudy.shrink.low_rank import layer_speed_up
from prunestudy.study.bench import Row, ratio_text, step_cost

# Filters, channels, kernel, padding, groups, and the height and width of the input.
ALEXNET = {
    "conv3": (384, 256, 3, 1, 1, 13),
    "conv4": (384, 384, 3, 1, 2, 13),
    "conv5": (256, 384, 3, 1, 2, 13),
}
LENET = {"conv1": (20, 1, 5, 0, 1, 28), "conv2": (50, 20, 5, 0, 1, 12)}


def force_step(quick: bool = False) -> Row:
    """A ResNet-20 training step, batch 128 of 3x32x32, with L2 force over a dense one."""
    method = methods.build("force", {}, 0.05)
    cost = step_cost("resnet20", (3, 32, 32), method, rounds=3 if quick else 100)
    return "ResNet-20 training step: with L2 force / dense", cost


def closed_form(quick: bool = False) -> Row:
    """The L2 force of 512 filters of 64x3x3: the sum over pairs over the closed form."""
    weight = torch.randn(512, 64, 3, 3)
    both = {"pairs": lambda: force_by_pairs(weight), "closed": lambda: force(weight)}
    seconds = measure.interleave(both, rounds=3 if quick else 50, warmup=1)
    ratio = measure.ratio(seconds["pairs"], seconds["closed"])
    return "L2 force of 512 filters: sum over pairs / closed form", ratio_text(ratio)


def factors(net: str, sizes: dict[str, tuple[int, ...]], name: str, quick: bool = False) -> Row:
    """A layer over its two factors at the rank that the card has for "`net`, L2 force".

    In channels_last, as nets are trained: in torch's other layout the 1x1 mixture of a small layer
    takes as long as the layer. Groups share a rank, so that an odd one is rounded down.
    """
    table = next(t for t in card("force").ranks if t.text.startswith(f"{net}, L2 force"))
    place = table.layers.index(name)
    filters, channels, kernel, padding, groups, side = sizes[name]
    rank = table.ranks[place] // groups * groups
    layer = nn.Conv2d(channels, filters, kernel, padding=padding, groups=groups)
    layer.to(memory_format=torch.channels_last)
    nets = {"whole": layer, "factors": shrink.factorise_layer(layer, rank)}
    found = []
    for batch, rounds in ((1, 200), (128, 20)):
        seconds = measure.timings(
            nets, (channels, side, side), batch, rounds=2 if quick else rounds, threads=1
        )
        ratio = measure.ratio(seconds["whole"], seconds["factors"])
        found.append(f"batch {batch}: {ratio_text(ratio)}")
    found.append(f"by MACs {layer_speed_up(layer, rank):.2f}")
    if table.cpu:
        found.append(f"published, CPU: {table.cpu[place]:.2f} [{table.mark}]")
    return f"{net} {name} at rank {rank} of {filters}: layer / factors", "; ".join(found)


ROWS = (
    force_step,
    closed_form,
    *(partial(factors, "LeNet", LENET, name) for name in LENET),
    *(partial(factors, "AlexNet", ALEXNET, name) for name in ALEXNET),
)
