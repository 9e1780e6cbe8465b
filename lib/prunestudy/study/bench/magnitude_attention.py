"""MAP: what a new mask and an attended step cost."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import prune

from prunestudy import measure, methods
from prunestudy.study.bench import Row, ratio_text, step_cost


def mask_update(quick: bool = False) -> Row:
    """A new global mask with its audit trail on ResNet-50's convolutions, over torch's pruning."""
    both = {"ours": _our_masks(_resnet50()), "torch": _torch_masks(_resnet50())}
    seconds = measure.interleave(both, rounds=2 if quick else 15, warmup=1)
    ratio = measure.ratio(seconds["ours"], seconds["torch"])
    return "ResNet-50, new mask: MAP's, with trail / torch's global_unstructured", ratio_text(ratio)


def attended_step(quick: bool = False) -> Row:
    """A ResNet-20 training step, batch 128, with a new mask at each step, over a dense one."""
    method = methods.build("magnitude_attention", {"period": 1}, 0.95)
    cost = step_cost("resnet20", (3, 32, 32), method, rounds=10 if quick else 200)
    return "ResNet-20 training step: MAP, a new mask at every step / dense", cost


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(weights=None)


def _our_masks(net: nn.Module) -> Callable[[], None]:
    method = methods.build("magnitude_attention", {}, 0.9)
    method.attach(net, torch.Generator().manual_seed(0))
    method.update(net, 0.9)
    count = iter(range(10**9))
    # In turns a little more and a little less, so that weights leave and return.
    return lambda: method.update(net, 0.9 - 0.002 * (next(count) % 2))


def _torch_masks(net: nn.Module) -> Callable[[], None]:
    layers = [(layer, "weight") for layer in net.modules() if isinstance(layer, nn.Conv2d)]

    def update() -> None:
        prune.global_unstructured(layers, prune.L1Unstructured, amount=0.9)
        for layer, name in layers:
            dense = layer.weight_orig.data
            prune.remove(layer, name)
            layer.weight.data = dense

    return update


ROWS = (mask_update, attended_step)
