"""Removal that knows nothing: a random mask of weights, or random channels, then fine-tuning."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunestudy.methods.base import Context
from prunestudy.methods.channel_ranking import Cut, cut_at_once
from prunestudy.methods.channels import Channels
from prunestudy.methods.magnitude import Magnitude
from prunestudy.methods.masks import dense_weights


class Random(Magnitude):
    """A random mask of the target share; for MACs or parameters random channels are removed."""

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "random"
    target_kinds: ClassVar[tuple[str, ...]] = ("sparsity", "macs", "parameters")

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.removal: Cut | None = None

    @property
    def masks_weights(self) -> bool:
        """Whether single weights go, not channels."""
        return self.target_kind == "sparsity"

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Put masks on the weights, where weights are to go."""
        self.generator = generator
        if self.masks_weights:
            super().attach(model, generator)

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Remove channels, where channels are to go."""
        if not self.masks_weights:
            kind = self.target_kind
            self.removal = cut_at_once(model, context.shape, kind, self.target, self.noise)

    def start(self, model: nn.Module, phase: str) -> None:
        """Mask weights, where weights are to go."""
        if self.masks_weights:
            super().start(model, phase)

    def scores(self, model: nn.Module) -> list[Tensor]:
        """Uniform noise, one tensor per layer."""
        return [
            torch.rand(w.shape, generator=self.generator, device=w.device)
            for w in dense_weights(model)
        ]

    def noise(self, channels: Channels, model: nn.Module) -> Tensor:  # noqa: ARG002
        """Uniform noise, one number per channel."""
        device = self.generator.device
        return torch.rand(channels.size, generator=self.generator, device=device).cpu()

    def kept_share(self, model: nn.Module) -> float:
        """Share of the weights, MACs or parameters that is left."""
        return 1 - self.removal.removed if self.removal else super().kept_share(model)

    def measures(self, model: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        """For channels: whether the target was met, and what is kept of each group."""
        return self.removal.measures(self.target) if self.removal else {}
