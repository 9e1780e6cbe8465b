"""A method that prunes channels once: pruned net, report, undo, and what the loop calls."""

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy import measure
from prunestudy.measure import Application, RefusedError
from prunestudy.measure.forward import evaluating
from prunestudy.methods.base import Context, Method, Params
from prunestudy.methods.channel_budget import Budget
from prunestudy.methods.channel_choice import Batch, Choice, ChoiceParams, Loss, Point
from prunestudy.methods.channels import become
from prunestudy.shrink import ComponentGroup, component_groups

# Images whose outputs, and whose latent vectors, are kept for figures.
SHOWN, LATENTS = 6, 128


@dataclass
class Pruned:
    """A pruned net with all that led to it; `undo` gives the dense one back, bit for bit."""

    model: nn.Module
    point: Point
    dense: nn.Module
    choice: Choice
    budget: Budget

    def undo(self) -> nn.Module:
        """The dense net as it was, whatever has been done to the small one since."""
        return copy.deepcopy(self.dense)

    def report(self) -> list[dict[str, Any]]:
        """One row per group: where it lies, what was removed, what that alone costs."""
        full = self.choice.full
        before = self.choice.judge(self.budget, full).judgement
        rows = []
        for i, (each, kept) in enumerate(zip(self.choice.groups, self.point.kept, strict=True)):
            alone = self.choice.judge(self.budget, [*full[:i], kept, *full[i + 1 :]]).judgement
            costs = self.choice.application.cost(before, alone)
            rows.append(
                {
                    "group": each.name,
                    "place": each.place,
                    "kind": each.kind,
                    "channels": full[i],
                    "kept": kept,
                    "removed": 1 - kept / full[i],
                    **{f"{name} lost alone": cost for name, cost in costs.items()},
                }
            )
        return rows


class ChannelMethod(Method, ABC):
    """A method that prunes channels in `prepare`; what is then trained is the small net."""

    target_kinds: ClassVar[tuple[str, ...]] = ("parameters",)
    Params: ClassVar[type[Params]] = ChoiceParams
    before_and_after: ClassVar[bool] = False

    @abstractmethod
    def solve(self, choice: Choice) -> tuple[Budget, Sequence[float], Point]:
        """The budget and numbers found, and the point there."""

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:  # noqa: ARG002
        """Remember where random numbers come from."""
        self.generator = generator

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Search on training and validation images, then prune `model` in place."""
        shape, classes = context.shape, context.train.info.num_classes
        metrics = measure.task_metrics(context.task, classes)
        application = Application(metrics, self.params.constraints)
        x, y = next(context.validation.ordered(min(self.params.samples, len(context.validation))))
        with evaluating(model):
            groups = component_groups(model, torch.zeros(2, *shape), protect=self.params.protect)
            self.pruned = self.prune(
                model, groups, application, context.task.loss, _endless(context.train), [(x, y)]
            )
        self.shown, self.task = (x[:SHOWN], x[:LATENTS], y[:LATENTS]), context.task
        self.passes = self.pruned.choice.passes
        become(model, self.pruned.model)

    def prune(
        self,
        model: nn.Module,
        groups: list[ComponentGroup],
        application: Application,
        loss: Loss,
        batches: Iterable[Batch],
        data: Sequence[Batch],
    ) -> Pruned:
        """Prune a copy of `model`: the way in for an application of one's own.

        `loss` maps (output, x, y) to a scalar, `batches` never ends, `data` is what candidates are
        judged on. Raises `RefusedError` (an `InputError`) for a target that cannot be met.
        """
        choice = Choice(model, groups, application, loss, batches, data, self.target, self.params)
        budget, numbers, point = self.solve(choice)
        if not choice.on_target(point):
            over = point.removed - self.target
            why = f"the nearest whole channels remove {point.removed:.4f}, {over:+.4f}"
            raise RefusedError(f"target = {self.target:g}: {why}", point.judgement, point.removed)
        if self.params.refuse and not point.judgement.holds:
            closest = self._closest(choice, choice.closest(budget, numbers))
            raise RefusedError(
                f"target = {self.target:g}: refused, {point.judgement}; "
                f"the closest that holds removes {closest:.4f} of the parameters",
                point.judgement,
                closest,
            )
        small = choice.small(budget.indices(point.kept))
        real = 1 - measure.parameters(small) / measure.parameters(model)
        if abs(real - point.removed) > 1e-9:
            raise RuntimeError(f"counted {point.removed} of the parameters removed, found {real}")
        return Pruned(small, point, copy.deepcopy(model), choice, budget)

    def _closest(self, choice: Choice, found: float) -> float:
        """Search again at five targets between the share `found` that holds and the refused one."""
        low, high = found, choice.target
        for _ in range(5):
            middle = (low + high) / 2
            again = dataclasses.replace(choice, target=middle, passes=0, seen={})
            *_, point = self.solve(again)
            if point.judgement.holds:
                low, found = middle, max(found, point.removed)
            else:
                high = middle
        return found

    def finish(self, model: nn.Module) -> nn.Module:
        """The small net as it is now; what an autoencoder makes of a few images is kept."""
        small = super().finish(model)
        self._views = self.views_of(small) if hasattr(small, "encode") else {}
        return small

    def views_of(self, small: nn.Module) -> dict[str, np.ndarray]:
        """Outputs of the finished net for a few validation images, as bytes.

        With `before_and_after` also the images, the dense net's outputs, and latent vectors of
        both nets in two dimensions.
        """
        made = {"output_pruned": self._pictures(small)}
        if self.before_and_after:
            images, more, labels = self.shown
            for name, net in (("dense", self.pruned.dense), ("pruned", small)):
                with evaluating(net), torch.no_grad():
                    made[f"latent_{name}"] = plane(net.encode(more))
            made["labels"] = labels.to(torch.uint8).cpu().numpy()
            made["shown"] = as_bytes(self.task.pixels(images))
            made["output_dense"] = self._pictures(self.pruned.dense)
        return made

    def arrays(self) -> dict[str, np.ndarray]:
        """Channels kept; of an autoencoder, what it makes of a few validation images."""
        return {"kept": np.array(self.pruned.point.kept), **self._views}

    def _pictures(self, net: nn.Module) -> np.ndarray:
        with evaluating(net), torch.no_grad():
            output = net(self.shown[0])
        return as_bytes(output[0] if type(output) is tuple else output)

    def kept_share(self, model: nn.Module) -> float:  # noqa: ARG002
        """Share of the parameters left."""
        return 1 - self.pruned.point.removed

    def measures(self, model: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        """Share removed, what is left of each group, the report, what the search saw and cost."""
        pruned = self.pruned
        judgement, points = pruned.point.judgement, len(pruned.choice.seen)
        return {
            "removed": pruned.point.removed,
            "groups": {
                each.name: kept / full
                for each, kept, full in zip(
                    pruned.choice.groups, pruned.point.kept, pruned.choice.full, strict=True
                )
            },
            "report": pruned.report(),
            "search_passes": self.passes,
            "search_points": points,
            **{f"search_{name}": value for name, value in judgement.values.items()},
            "constraints_hold": float(judgement.holds),
            "constraints_shortfall": judgement.shortfall,
        }


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


def _endless(batches: Any) -> Iterable[Batch]:
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1
