"""Channels cut at once by a ranking of the start net, then fine-tuned: the usual controls.

- `l1_filter`: L1 norm of the filter that makes the channel (Li et al., ICLR 2017).
- `group_l2`: squared weights of all layers that hold a slice of the channel, their mean (DepGraph,
  Fang et al., CVPR 2023, without its sparse training).

The importance is torch-pruning's, divided by its mean over the dependency group, so that one
ranking holds for the whole net; channels go from the lowest on until the target is met.
"""

from collections.abc import Callable
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


class Removal:
    """Channels removed once, from a net that goes on training; a resumed run gets the same shape.

    `kind` and `target` as in `Channels`; `open_` (N,) says what is left, once `apply` was called.
    """

    def __init__(self, kind: str, target: float) -> None:
        self.kind, self.target = kind, target
        self.channels: Channels | None = None
        self.open_: Tensor | None = None

    def apply(self, model: nn.Module, shape: tuple[int, ...], scores: Scores) -> None:
        """Remove channels of lowest score from `model`, in place, until the target is met.

        Channels of infinite score stay. Does nothing the second time.
        """
        if self.open_ is not None:
            return
        channels = Channels(model, shape, self.kind)
        score = scores(channels, model)
        order = score.argsort(stable=True)[: int(score.isfinite().sum())]
        everything = torch.ones(channels.size, dtype=torch.bool)
        self._leave(model, channels, channels.close(order, everything, self.target))

    def kept_share(self) -> float:
        """Share of the MACs or parameters that is left."""
        return 1.0 if self.open_ is None else 1 - self.channels.removed(self.open_)

    def measures(self) -> dict[str, Any]:
        """For the record: whether the target was met, and the channels kept of each group."""
        removed = 1 - self.kept_share()
        met = float(removed >= self.target - 1e-9)
        kept = self.channels.kept(self.open_)
        return {"target_met": met, "removed": removed, "channels": kept}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"open": self.open_}

    def reshape(self, model: nn.Module, shape: tuple[int, ...], state: dict[str, Any]) -> None:
        """Give `model` the shape it had at `state`, in place."""
        if state["open"] is not None:
            self._leave(model, Channels(model, shape, self.kind), state["open"])

    def _leave(self, model: nn.Module, channels: Channels, open_: Tensor) -> None:
        self.channels, self.open_ = channels, open_
        small = channels.smaller(model, open_).train(model.training)
        become(model, small.to(memory_format=torch.channels_last))


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

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.removal = Removal(self.target_kind, self.target)

    def prepare(self, model: nn.Module, context: Context) -> None:  # noqa: ARG002
        """Keep the images' shape."""
        self.shape = context.shape

    def start(self, model: nn.Module, phase: str) -> None:  # noqa: ARG002
        """Remove channels at once."""
        self.removal.apply(model, self.shape, self.scores)

    def scores(self, channels: Channels, model: nn.Module) -> Tensor:
        """What the ranking is by (N,): lowest goes first."""
        return importance(channels, model, self.measure)

    def finish(self, model: nn.Module) -> nn.Module:
        """Remove channels, if no step was made; an ordinary smaller net."""
        self.removal.apply(model, self.shape, self.scores)
        return super().finish(model)

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of the MACs or parameters that is left."""
        return self.removal.kept_share()

    def measures(self, model: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        """Whether the target was met, and the channels kept of each group."""
        return self.removal.measures()

    def state(self) -> dict[str, Any]:
        """Which channels are left."""
        return self.removal.state()

    def reshape(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Remove what was removed."""
        self.removal.reshape(model, self.shape, state)


class L1Filter(GroupL2):
    """One-shot removal of the filters of smallest L1 norm, then fine-tuning."""

    name: ClassVar[str] = "l1_filter"
    title: ClassVar[str] = "L1 filter norm, one shot"
    measure: ClassVar[Any] = MagnitudeImportance(p=1, group_reduction="first")
