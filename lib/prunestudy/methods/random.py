"""Removal that knows nothing: a random mask of weights, or random channels, then fine-tuning."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.methods.base import Context
from prunestudy.methods.channel_ranking import Removal
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
        channels, scope = self.target_kind != "sparsity", self.params.scope
        allowed = "all, where channels are removed"
        require(not channels or scope == "all", "params.scope", scope, allowed)
        self.removal = Removal(self.target_kind, self.target) if channels else None

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Put masks on the weights, where weights are to go."""
        self.generator = generator
        if not self.removal:
            super().attach(model, generator)

    def prepare(self, model: nn.Module, context: Context) -> None:  # noqa: ARG002
        """Keep the images' shape."""
        self.shape = context.shape

    def start(self, model: nn.Module, phase: str) -> None:
        """Remove at once."""
        if self.removal:
            self.removal.apply(model, self.shape, self.noise)
        else:
            super().start(model, phase)

    def scores(self, model: nn.Module) -> list[Tensor]:
        """Uniform noise, one tensor per layer."""
        return [
            torch.rand(w.shape, generator=self.generator, device=w.device)
            for w in dense_weights(model)
        ]

    def noise(self, channels: Channels, model: nn.Module) -> Tensor:  # noqa: ARG002
        """Uniform noise, one number per channel, on the CPU."""
        device = self.generator.device
        return torch.rand(channels.size, generator=self.generator, device=device).cpu()

    def finish(self, model: nn.Module) -> nn.Module:
        """Remove channels, if no step was made; an ordinary net."""
        if self.removal:
            self.removal.apply(model, self.shape, self.noise)
        return super().finish(model)

    def kept_share(self, model: nn.Module) -> float:
        """Share of the weights, MACs or parameters that is left."""
        return self.removal.kept_share() if self.removal else super().kept_share(model)

    def measures(self, model: nn.Module) -> dict[str, Any]:
        """For channels: whether the target was met, and what is kept of each group."""
        return self.removal.measures() if self.removal else super().measures(model)

    def state(self) -> dict[str, Any]:
        """For channels: which are left."""
        return self.removal.state() if self.removal else super().state()

    def reshape(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Remove the channels that were removed."""
        if self.removal:
            self.removal.reshape(model, self.shape, state)
