"""Network slimming: L1 on the scales of batch norms (Liu et al., ICCV 2017), the polar opposite.

While training, lambda sign(gamma) is added to the gradient of every batch-norm scale gamma; then
one ranking of |gamma| over the whole net says which channels go, and what is left is fine-tuned.
Channels that several batch norms scale (residual streams) are ranked by the mean; channels
without a batch norm stay. Needs a net with batch norm.
"""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.methods.base import Context, Method, Params, Phase, Progress
from prunestudy.methods.channel_ranking import Cut, cut_at_once
from prunestudy.methods.channels import Channels, become
from prunestudy.shrink.groups import FOLLOWS

_NORM = nn.modules.batchnorm._BatchNorm


class NetworkSlimmingParams(Params):
    """`strength`: lambda, 1e-4 as in the paper's code; `cut`: share of the steps before the cut."""

    strength: Annotated[float, Field(gt=0)] = 1e-4
    cut: Annotated[float, Field(gt=0, lt=1)] = 0.5


class NetworkSlimming(Method):
    """L1 on batch-norm scales, a cut by their size, fine-tuning."""

    name: ClassVar[str] = "network_slimming"
    title: ClassVar[str] = "network slimming"
    target_kinds: ClassVar[tuple[str, ...]] = ("macs", "parameters")
    Params: ClassVar[type[Params]] = NetworkSlimmingParams

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.removal: Cut | None = None

    def phases(self) -> tuple[Phase, ...]:
        """Scales are pressed down, then the smaller net is fine-tuned."""
        share = self.params.cut
        return Phase("slim", share), Phase("fine_tune", 1 - share, restart=True)

    def check(self, model: nn.Module) -> None:
        """Refuse a net without batch norm."""
        norms = any(isinstance(m, _NORM) and m.affine for m in model.modules())
        name = type(model).__name__
        require(norms, "model", name, "network_slimming needs a net with batch norm")

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Keep the images' shape for the cut."""
        self.check(model)
        self.shape = context.shape

    def after_backward(self, model: nn.Module, progress: Progress) -> None:
        """Add lambda sign(gamma)."""
        if progress.phase == "slim":
            for scale in _scales(model):
                scale.grad.add_(scale.detach().sign(), alpha=self.params.strength)

    def end(self, model: nn.Module, phase: str) -> None:
        """Cut at the end of the first phase."""
        if phase == "slim":
            self._cut(model)

    def finish(self, model: nn.Module) -> nn.Module:
        """Cut, if no step did; an ordinary smaller net."""
        if self.removal is None:
            self._cut(model)
        return super().finish(model)

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of the MACs or parameters that is left."""
        return 1 - self.removal.removed if self.removal else 1.0

    def row(self, model: nn.Module) -> dict[str, float]:
        """Mean size of the scales."""
        return {"scale": float(torch.cat([s.detach().abs() for s in _scales(model)]).mean())}

    def measures(self, model: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        """Whether the target was met, and the channels kept of each group."""
        return self.removal.measures(self.target)

    def state(self) -> dict[str, Any]:
        """Which channels are left, once cut."""
        return {"open": self.removal.open_ if self.removal else None}

    def reshape(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Cut `model` to the shape it had."""
        if state["open"] is not None:
            channels = Channels(model, self.shape, self.target_kind)
            self.removal = Cut(channels, state["open"])
            become(model, channels.smaller(model, state["open"]))

    def _cut(self, model: nn.Module) -> None:
        self.removal = cut_at_once(model, self.shape, self.target_kind, self.target, scale_sizes)


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
