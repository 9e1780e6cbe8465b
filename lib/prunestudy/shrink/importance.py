"""How important each channel of a dependency group is.

As in torch-pruning's group importance: of each layer's slices at a channel a sum, the mean of the
sums over the layers, divided by the mean over the group's channels. Biases do not count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunestudy.shrink.groups import FOLLOWS, Group
from prunestudy.shrink.narrow import axis_of


def group_l2(model: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    """Squared weights: one tensor (channels,) per group, of mean 1."""
    return _scores(model, groups, lambda weight: weight.detach().square())


def taylor(model: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    """First-order Taylor of a loss whose gradients lie in the weights: the sum of |w dL/dw|."""
    return _scores(model, groups, lambda weight: (weight.detach() * weight.grad).abs())


def _scores(model: nn.Module, groups: Sequence[Group], each) -> list[Tensor]:
    return [_score(model, group, each) for group in groups]


def _score(model: nn.Module, group: Group, each) -> Tensor:
    sums = []
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if getattr(layer, "weight", None) is None:
            continue
        along = axis_of(layer, FOLLOWS if member.role == FOLLOWS else member.axis)
        weight = each(layer.weight).movedim(along, 0)
        places = weight.reshape(len(weight), -1).sum(1)
        # One axis of a grouped convolution's weight is the same for all groups.
        places = places.repeat(member.size // len(places))
        index = torch.tensor(member.indices, device=places.device)
        sums.append(places[index].sum(1))
    score = torch.stack(sums).mean(0)
    return score / score.mean().clamp(min=torch.finfo(score.dtype).tiny)
