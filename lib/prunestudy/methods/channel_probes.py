"""What is observed of the methods on channels: gates, the loss, an autoencoder's images."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy.measure.forward import evaluating
from prunestudy.methods.base import At, Context, Method
from prunestudy.methods.probes import Probe

_MOST_LOSSES = 20_000
_BYTES = 800_000  # of the gates' paths
_SHOWN = 6  # images whose outputs are kept


class _Watch(Probe):
    """Keeps the losses, averaged over windows if there are many."""

    noted = ("sums", "window", "done")

    def attach(self, method: Method, model: nn.Module, context: Context) -> None:
        super().attach(method, model, context)
        self.sums = torch.zeros(0, dtype=torch.float64, device=context.device)
        self.window, self.done = 1, 0

    def after_step(self, at: At) -> None:
        if at.total_step == 1:
            self.window = -(-at.total_steps // _MOST_LOSSES)
            self.sums = self.sums.new_zeros(-(-at.total_steps // self.window))
        self.sums[self.done // self.window].add_(at.loss)
        self.done = at.total_step

    def losses(self) -> np.ndarray:
        """Mean loss of each window that is complete, float64."""
        return self.sums[: self.done // self.window].cpu().numpy() / self.window

    def measures(self) -> dict[str, Any]:
        """How smoothly the net trained: mean absolute change of the loss between windows."""
        losses = self.losses()
        rough = float(np.abs(np.diff(losses)).mean()) if len(losses) > 1 else math.nan
        return {"roughness": rough}


class _GatePaths(_Watch):
    """Of GDP: paths of all gates, and of the cost (soft, then hard), at at most 100 steps."""

    noted = (*_Watch.noted, "steps", "paths", "costs")

    def attach(self, method: Method, model: nn.Module, context: Context) -> None:
        super().attach(method, model, context)
        self.steps, self.paths, self.costs = [], [], []

    def after_step(self, at: At) -> None:
        """Gates that close at this step are still open."""
        super().after_step(at)
        channels, step = self.method.channels, at.total_step - 1
        every = -(-at.total_steps // max(2, min(100, _BYTES // (2 * channels.size))))
        if step % every == 0 or at.total_step == at.total_steps:
            g = self.method.gates()
            self.steps.append(step)
            self.paths.append(g.to(torch.float16))
            self.costs.append(torch.stack([channels.cost(g), channels.cost(g != 0)]))

    def arrays(self) -> dict[str, np.ndarray]:
        if not self.paths:
            return {}
        costs = torch.stack(self.costs, 1).cpu() / self.method.channels.dense
        return {
            "gate_steps": np.array(self.steps, np.int32),
            "gate_paths": torch.stack(self.paths).cpu().numpy(),
            "final_gates": self.method.gates().detach().cpu().to(torch.float16).numpy(),
            "gate_groups": self.method.channels.group_of.numpy().astype(np.int16),
            "cost_path": costs.float().numpy(),
        }


class _ConcretePaths(_Watch):
    """Of hard concrete gates: how they were before they were decided."""

    noted = (*_Watch.noted, "undecided")
    undecided: Tensor | None = None

    def leaving(self, at: At) -> None:
        if at.phase == "gates":
            self.undecided = self.method.gates.at_test().detach()

    def arrays(self) -> dict[str, np.ndarray]:
        before = self.undecided
        return {} if before is None else {"final_gates": before.to(torch.float16).cpu().numpy()}


class _Pictures(Probe):
    """What an autoencoder makes of a few validation images, dense and pruned.

    Of a net that has a method `encode`; of a search, the images and the dense net's outputs, too.
    """

    def attach(self, method: Method, model: nn.Module, context: Context) -> None:
        super().attach(method, model, context)
        self.x, _ = method.data[0]
        self.pictures: dict[str, np.ndarray] = {}
        if hasattr(method, "coefficients") and hasattr(model, "encode"):
            self._look(method.dense, "dense")
            self.pictures["shown"] = as_bytes(self.pixels(self.x[:_SHOWN]))

    def finished(self, net: nn.Module) -> None:
        if hasattr(net, "encode"):
            self._look(net, "pruned")

    def arrays(self) -> dict[str, np.ndarray]:
        return self.pictures

    def _look(self, net: nn.Module, name: str) -> None:
        with evaluating(net), torch.no_grad():
            output = net(self.x[:_SHOWN])
        images = output[0] if isinstance(output, tuple) else output
        self.pictures[f"output_{name}"] = as_bytes(images)


def as_bytes(images: Tensor) -> np.ndarray:
    """Images of pixels in 0-1 as uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
