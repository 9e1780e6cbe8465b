"""How important each channel of a dependency group is to a loss."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunestudy.shrink.groups import FOLLOWS, Group
from prunestudy.shrink.narrow import axis_of


def taylor(model: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    """First-order Taylor of a loss whose gradients lie in the weights: one (channels,) per group.

    As torch-pruning's: of each layer's slices at a channel the sum of |w dL/dw|, the mean of the
    sums over the layers, divided by the mean over the group's channels. Biases do not count.
    """
    return [_score(model, group) for group in groups]


def _score(model: nn.Module, group: Group) -> Tensor:
    sums = []
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if getattr(layer, "weight", None) is None:
            continue
        along = axis_of(layer, FOLLOWS if member.role == FOLLOWS else member.axis)
        terms = (layer.weight.detach() * layer.weight.grad).abs().movedim(along, 0)
        places = terms.reshape(len(terms), -1).sum(1)
        # One axis of a grouped convolution's weight is the same for all groups.
        places = places.repeat(member.size // len(places))
        index = torch.tensor(member.indices, device=places.device)
        sums.append(places[index].sum(1))
    score = torch.stack(sums).mean(0)
    return score / score.mean().clamp(min=torch.finfo(score.dtype).tiny)
