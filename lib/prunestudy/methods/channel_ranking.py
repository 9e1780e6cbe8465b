"""Channels cut at once by a ranking of the start net, then fine-tuned: the usual controls.

- `l1_filter`: L1 norm of the filter that makes the channel (Li et al., ICLR 2017).
- `group_l2`: squared weights of all layers that hold a slice of the channel, their mean (DepGraph,
  Fang et al., CVPR 2023, without its sparse training).

The importance is torch-pruning's, divided by its mean over the dependency group, so that one
ranking holds for the whole net; channels go from the lowest on until the target is met.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.pruner.importance import GroupMagnitudeImportance, MagnitudeImportance

from prunestudy.methods.base import Context, Method
from prunestudy.methods.channels import Channels, become
from prunestudy.shrink import fold
from prunestudy.shrink.groups import PRODUCES

Scores = Callable[[Channels, nn.Module], Tensor]


@dataclass(frozen=True)
class Cut:
    """What a cut left: the channels of the net as it was, and those that are open (N,)."""

    channels: Channels
    open_: Tensor

    @property
    def removed(self) -> float:
        """Share (0-1) of the cost that is gone."""
        return self.channels.removed(self.open_)

    def measures(self, target: float) -> dict[str, Any]:
        """For the record."""
        met = float(self.removed >= target - 1e-9)
        kept = self.channels.kept(self.open_)
        return {"target_met": met, "removed": self.removed, "channels": kept}


def cut_at_once(
    model: nn.Module, shape: tuple[int, ...], kind: str, target: float, scores: Scores
) -> Cut:
    """Remove channels of lowest score from `model`, in place, until `target` of `kind` is gone.

    Channels of infinite score are never removed.
    """
    channels = Channels(model, shape, kind)
    score = scores(channels, model)
    order = score.argsort(stable=True)[: int(score.isfinite().sum())]
    everything = torch.ones(channels.size, dtype=torch.bool)
    open_ = channels.close(order, everything, target)
    small = channels.smaller(model, open_).train(model.training)
    become(model, small.to(memory_format=torch.channels_last))
    return Cut(channels, open_)


def importance(channels: Channels, model: nn.Module, measure: Any) -> Tensor:
    """torch-pruning's `measure` of every channel (N,), on the CPU."""
    net = fold(model).requires_grad_(True)
    like = next(net.parameters())
    x = torch.zeros(2, *channels.shape, dtype=like.dtype, device=like.device)
    graph = torch_pruning.DependencyGraph().build_dependency(net, x, verbose=False)
    found = []
    for group in channels.groups:
        root = group.having(PRODUCES)[0]
        layer = net.get_submodule(root.layer)
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        score = measure(graph.get_pruning_group(layer, cut, list(range(root.size)))).cpu()
        found.append(score[torch.tensor(root.indices)].mean(1))
    return torch.cat(found)


class GroupL2(Method):
    """One-shot removal by the group's squared weights, then fine-tuning."""

    name: ClassVar[str] = "group_l2"
    title: ClassVar[str] = "group L2, one shot"
    target_kinds: ClassVar[tuple[str, ...]] = ("macs", "parameters")
    measure: ClassVar[Any] = GroupMagnitudeImportance(p=2)

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Cut at once."""
        kind, shape = self.target_kind, context.shape
        self.cut = cut_at_once(model, shape, kind, self.target, self.scores)

    def scores(self, channels: Channels, model: nn.Module) -> Tensor:
        """What the ranking is by (N,): lowest goes first."""
        return importance(channels, model, self.measure)

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of the MACs or parameters that is left."""
        return 1 - self.cut.removed

    def measures(self, model: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        """Whether the target was met, and the channels kept of each group."""
        return self.cut.measures(self.target)


class L1Filter(GroupL2):
    """One-shot removal of the filters of smallest L1 norm, then fine-tuning."""

    name: ClassVar[str] = "l1_filter"
    title: ClassVar[str] = "L1 filter norm, one shot"
    measure: ClassVar[Any] = MagnitudeImportance(p=1, group_reduction="first")
