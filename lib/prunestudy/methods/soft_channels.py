"""A net with soft channels: each multiplied by a mask, its weights left as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from prunestudy.shrink import Group, axis_of
from prunestudy.shrink.groups import CONSUMES


def masked_output(
    net: nn.Module, groups: Sequence[Group], masks: Sequence[Tensor], x: Tensor
) -> Any:
    """Output of `net` for `x` with each channel times its mask where it is consumed.

    `masks` has one tensor (channels,) per group. At zeros and ones this is what the net without
    the zeros computes; differentiable in the masks.
    """
    weights = dict(net.named_parameters())
    norms = []
    for group, mask in zip(groups, masks, strict=True):
        for member in group.members:
            layer = net.get_submodule(member.layer)
            if isinstance(layer, nn.LayerNorm):
                norms.append((layer, member.spread(mask)))
            if member.role == CONSUMES:
                name, weight = f"{member.layer}.weight", weights[f"{member.layer}.weight"]
                along, shape = axis_of(layer, "in"), [1] * weight.dim()
                shape[along] = -1
                spread = member.spread(mask)[: weight.shape[along]]
                weights[name] = weight * spread.view(shape)
    with _masked_norms(norms):
        return functional_call(net, weights, (x,))


@contextmanager
def _masked_norms(norms: list[tuple[nn.LayerNorm, Tensor]]) -> Iterator[None]:
    """Layer norms whose mean and variance weigh each feature by its mask."""

    def hook(layer: nn.LayerNorm, mask: Tensor):
        def masked(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> Tensor:
            x, total = inputs[0], mask.sum()
            mean = (x * mask).sum(-1, keepdim=True) / total
            variance = ((x - mean).square() * mask).sum(-1, keepdim=True) / total
            return (x - mean) * (variance + layer.eps).rsqrt() * layer.weight + layer.bias

        return layer.register_forward_hook(masked)

    handles = [hook(layer, mask) for layer, mask in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
