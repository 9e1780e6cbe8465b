"""What is observed of the methods on channels: gates, the loss, an autoencoder's images."""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunestudy.measure.forward import evaluating
from prunestudy.methods.base import At, Context, Method, call
from prunestudy.methods.probes import Probe
from prunestudy.shrink import fold

_MOST_LOSSES = 20_000
_BYTES = 800_000  # of the gates' paths
# Images whose outputs, and whose latent vectors, are kept.
_SHOWN, _LATENTS = 6, 128


class _Watch(Probe):
    """Keeps the loss of each step and says what removal changed.

    Losses are averaged over windows so that at most 20,000 are kept.
    """

    kept: ClassVar[tuple[str, ...]] = ("sums", "window", "done")

    def attach(self, method: Method, model: nn.Module, context: Context) -> None:
        """Begin with no loss."""
        super().attach(method, model, context)
        self.removal: dict[str, float] = {}
        self.sums = torch.zeros(0, dtype=torch.float64, device=context.device)
        self.window, self.done = 1, 0

    def after_step(self, at: At) -> None:
        """Add the loss of this step."""
        if at.total_step == 1:
            self.window = -(-at.total_steps // _MOST_LOSSES)
            self.sums = self.sums.new_zeros(-(-at.total_steps // self.window))
        self.sums[self.done // self.window].add_(at.loss)
        self.done = at.total_step

    def finish(self) -> None:
        """Keep the gated net."""
        self.gated = fold(self.model)

    def finished(self, net: nn.Module) -> None:
        """Compare it with the smaller one."""
        self.removal = agreement(self.gated, net, self.context)

    def losses(self) -> np.ndarray:
        """Mean loss of each window that is complete, float64."""
        return self.sums[: self.done // self.window].cpu().numpy() / self.window

    def roughness(self) -> float:
        """Mean absolute change of the loss from one window to the next; NaN below two."""
        losses = self.losses()
        return float(np.abs(np.diff(losses)).mean()) if len(losses) > 1 else math.nan

    def jump(self, steps: list[int], around: int = 10) -> float:
        """Mean over `steps` (each once) of the loss in the `around` windows after, minus before.

        NaN without a step that has windows on both sides.
        """
        losses, found = self.losses(), []
        for at in sorted({step // self.window for step in steps}):
            before, after = losses[max(0, at - around) : at], losses[at + 1 : at + 1 + around]
            if len(before) and len(after):
                found.append(after.mean() - before.mean())
        return float(np.mean(found)) if found else math.nan

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        vars(self).update(state)


class GatePaths(_Watch):
    """Of GDP: paths of all gates and of the cost, which closed when, and what removal changed."""

    kept: ClassVar[tuple[str, ...]] = (*_Watch.kept, "steps", "paths", "costs", "closed", "open")

    def attach(self, method: Method, model: nn.Module, context: Context) -> None:
        """Begin with no path."""
        super().attach(method, model, context)
        self.steps, self.paths, self.costs, self.closed = [], [], [], []
        self.open = method.open()

    def after_step(self, at: At) -> None:
        """Keep the gates of at most 200 steps; those closing at this step are still open."""
        super().after_step(at)
        channels, step = self.method.channels, at.total_step - 1
        every = -(-at.total_steps // max(2, min(200, _BYTES // (2 * channels.size))))
        if step % every == 0 or at.total_step == at.total_steps:
            g = self.method.gates()
            self.steps.append(step)
            self.paths.append(g.to(torch.float16))
            self.costs.append(torch.stack([channels.cost(g), channels.cost(g != 0)]))

    def update(self, at: At) -> None:
        """Note which gates have closed."""
        now = self.method.open()
        self.closed += [
            (at.total_step - 1, i) for i in (self.open.cpu() & ~now).nonzero().flatten().tolist()
        ]
        self.open = now

    def measures(self) -> dict[str, Any]:
        """How gates ended, how smoothly the net trained, what removal changed."""
        g = self.method.gates().detach()
        return self.removal | {
            "smallest_gate": float(g[g > 0].min()) if (g > 0).any() else math.nan,
            "polarised": _polarised(g),
            "roughness": self.roughness(),
            "jump": self.jump([step for step, _ in self.closed]),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Paths of all gates and of the cost (soft, then hard), which closed when, the loss."""
        if not self.paths:
            return {}
        costs = torch.stack(self.costs, 1).cpu() / self.method.channels.dense
        return {
            "gate_steps": np.array(self.steps, np.int32),
            "gate_paths": torch.stack(self.paths).cpu().numpy(),
            "final_gates": self.method.gates().detach().cpu().to(torch.float16).numpy(),
            "gate_groups": self.method.channels.group_of.numpy().astype(np.int16),
            "cost_path": costs.float().numpy(),
            "closed": np.array(self.closed, np.int32).reshape(-1, 2),
            "loss": self.losses().astype(np.float32),
        }


class ConcretePaths(_Watch):
    """Of hard concrete gates: their paths, and what deciding them and removal changed."""

    kept: ClassVar[tuple[str, ...]] = (*_Watch.kept, "paths", "undecided", "found")

    def attach(self, method: Method, model: nn.Module, context: Context) -> None:
        """Begin with no path."""
        super().attach(method, model, context)
        self.paths, self.undecided, self.found = [], None, {}

    def leaving(self, at: At) -> None:
        """Keep the gates and the net as they are before they are decided."""
        if at.phase == "gates":
            self.undecided = self.method.gates.at_test().detach()
            self.gated = fold(self.model)

    def update(self, at: At) -> None:
        """Compare it with the net of decided gates."""
        if at.phase == "gates" and at.last:
            now = agreement(self.gated, fold(self.model), self.context)
            self.found = {"polarised": _polarised(self.undecided), "unchanged": now["unchanged"]}

    def row(self) -> dict[str, float]:
        """Keep the gates at test time; no column."""
        self.paths.append(self.method.gates.at_test().detach().to(torch.float16))
        return {}

    def measures(self) -> dict[str, Any]:
        """How gates were before they were decided, what changed then, how smoothly it trained."""
        gap = {name: gap for name, gap in self.removal.items() if name == "removal_gap"}
        return gap | self.found | {"roughness": self.roughness()}

    def arrays(self) -> dict[str, np.ndarray]:
        """Gates at test time by epoch and before they were decided, and the loss."""
        found = {"loss": self.losses().astype(np.float32)}
        if self.paths:
            found["gate_paths"] = torch.stack(self.paths).cpu().numpy()
        if self.undecided is not None:
            found["final_gates"] = self.undecided.to(torch.float16).cpu().numpy()
        return found


class Pictures(Probe):
    """Of a pruned net: channels kept, the descent's way, and what an autoencoder makes of images.

    Of a net that has a method `encode`, outputs for a few validation images; with a way also the
    images, the dense net's outputs, and latent vectors of both nets in two dimensions.
    """

    def attach(self, method: Method, model: nn.Module, context: Context) -> None:
        """Look at the dense net."""
        super().attach(method, model, context)
        self.x, self.y = method.data[0]
        self.pictures: dict[str, np.ndarray] = {}
        if method.path and hasattr(model, "encode"):
            self._look(method.small.dense, "dense")
            self.pictures["labels"] = self.y[:_LATENTS].to(torch.uint8).cpu().numpy()
            self.pictures["shown"] = as_bytes(self.pixels(self.x[:_SHOWN]))

    def finished(self, net: nn.Module) -> None:
        """Look at the small one."""
        if hasattr(net, "encode"):
            self._look(net, "pruned")

    def arrays(self) -> dict[str, np.ndarray]:
        """`kept` channels, `path` (steps + 1, coefficients), images as bytes, latent planes."""
        found = {"kept": np.array(self.method.point.kept), **self.pictures}
        path = np.array(self.method.path, dtype=np.float32)
        return found | ({"path": path} if len(path) else {})

    def _look(self, net: nn.Module, name: str) -> None:
        with evaluating(net), torch.no_grad():
            output = net(self.x[:_SHOWN])
            latent = net.encode(self.x[:_LATENTS]) if self.method.path else None
        images = output[0] if isinstance(output, tuple) else output
        self.pictures[f"output_{name}"] = as_bytes(images)
        if latent is not None:
            self.pictures[f"latent_{name}"] = plane(latent)


def as_bytes(images: Tensor) -> np.ndarray:
    """Images of pixels in 0-1 as uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def plane(z: Tensor) -> np.ndarray:
    """The first two principal components of vectors z (n, d), float16 (n, 2).

    Their signs are such that the largest of each is positive; a missing one is zero.
    """
    centred = z.double().cpu() - z.double().cpu().mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    points = torch.zeros(len(z), 2, dtype=torch.float64)
    points[:, : len(axes)] = centred @ axes.T
    largest = points.gather(0, points.abs().argmax(0, keepdim=True))
    return (points * torch.where(largest < 0, -1.0, 1.0)).to(torch.float16).numpy()


def agreement(before: nn.Module, after: nn.Module, context: Context) -> dict[str, float]:
    """How far two nets agree on the validation inputs, in eval mode; NaN without any.

    `unchanged`: share (0-1) of the samples with the same largest output; `removal_gap`: largest
    difference of an output, over the largest output.
    """
    same = count = 0
    gap = largest = 0.0
    with evaluating(before), evaluating(after), torch.inference_mode():
        for x, _ in context.validation():
            outputs = (tree_leaves(call(net, x)) for net in (before, after))
            for a, b in zip(*outputs, strict=True):
                same += int((a.flatten(1).argmax(1) == b.flatten(1).argmax(1)).sum())
                count += len(a)
                gap = max(gap, float((a - b).abs().max()))
                largest = max(largest, float(a.abs().max()))
    unchanged = same / count if count else math.nan
    return {"unchanged": unchanged, "removal_gap": gap / largest if largest else 0.0}


def _polarised(g: Tensor) -> float:
    """Share (0-1) of the gates at 0 or above one half."""
    return float(((g == 0) | (g > 0.5)).double().mean())
