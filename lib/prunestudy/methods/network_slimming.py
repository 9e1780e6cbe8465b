"""Network slimming: L1 on the scales of batch norms (Liu et al., ICCV 2017), the polar opposite.

While training, lambda sign(gamma) is added to the gradient of every batch-norm scale gamma; then
one ranking of |gamma| over the whole net says which channels go, and what is left is fine-tuned.
Channels that several batch norms scale (residual streams) are ranked by the mean; channels
without a batch norm stay. Needs a net with batch norm.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.methods.base import Params, Phase, Progress
from prunestudy.methods.channel_ranking import GroupL2
from prunestudy.methods.channels import Channels
from prunestudy.shrink.groups import FOLLOWS

_NORM = nn.modules.batchnorm._BatchNorm


class NetworkSlimmingParams(Params):
    """`strength`: lambda, what presses on the scales; `cut`: share of the steps before the cut."""

    strength: Annotated[float, Field(gt=0)] = 1e-4
    cut: Annotated[float, Field(gt=0, lt=1)] = 0.5


class NetworkSlimming(GroupL2):
    """L1 on batch-norm scales, a cut by their size, fine-tuning."""

    name: ClassVar[str] = "network_slimming"
    title: ClassVar[str] = "network slimming"
    Params: ClassVar[type[Params]] = NetworkSlimmingParams

    def phases(self) -> tuple[Phase, ...]:
        """Scales are pressed down, then the smaller net is fine-tuned."""
        share = self.params.cut
        return Phase("slim", share), Phase("fine_tune", 1 - share, restart=True)

    def check(self, model: nn.Module) -> None:
        """Refuse a net without batch norm."""
        name, why = type(model).__name__, "network_slimming needs a net with batch norm"
        require(bool(_scales(model)), "model", name, why)

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:  # noqa: ARG002
        """Refuse a net without batch norm."""
        self.check(model)

    def start(self, model: nn.Module, phase: str) -> None:
        """Cut after the first phase."""
        if phase == "fine_tune":
            super().start(model, phase)

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        """Add lambda sign(gamma)."""
        if progress.phase == "slim":
            for scale in _scales(model):
                scale.grad.add_(scale.detach().sign(), alpha=self.params.strength)

    def scores(self, channels: Channels, model: nn.Module) -> Tensor:
        """Mean |gamma| of the batch norms of each channel (N,); infinite without any."""
        return scale_sizes(channels, model)

    def row(self, model: nn.Module) -> dict[str, float]:
        """Mean size of the scales."""
        return {"scale": float(torch.cat([s.detach().abs() for s in _scales(model)]).mean())}


def scale_sizes(channels: Channels, model: nn.Module) -> Tensor:
    """Mean |gamma| of the batch norms of each channel (N,), on the CPU; infinite without any."""
    found = []
    for group in channels.groups:
        layers = [(m, model.get_submodule(m.layer)) for m in group.having(FOLLOWS)]
        sizes = [
            layer.weight.detach().abs().cpu()[torch.tensor(m.indices)].mean(1)
            for m, layer in layers
            if isinstance(layer, _NORM) and layer.affine
        ]
        none = torch.full((group.channels,), torch.inf)
        found.append(torch.stack(sizes).mean(0) if sizes else none)
    return torch.cat(found)


def _scales(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, _NORM) and m.affine]
