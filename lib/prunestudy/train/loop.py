"""The one training loop: phases, hooks, validation, checkpoints and exact resume.

A run that is killed and started again goes on from its last checkpoint and ends with the same
numbers: batches depend on (seed, epoch, step) only, a method's draws come from one generator, a
net's (dropout) from torch's own, which is seeded at each step, and model, optimisers, method,
generator and history are in the checkpoint.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from prunestudy.datasets import Batches
from prunestudy.datasets.batches import mix
from prunestudy.measure import Scores, Task
from prunestudy.methods.base import Context, Method, Progress
from prunestudy.train.checkpoint import read_checkpoint, write_checkpoint
from prunestudy.train.deterministic import seed_default
from prunestudy.train.memory import keep_freed_memory
from prunestudy.train.recipe import Recipe


@dataclass
class TrainResult:
    """What a training leaves: the finished net, its history and whether it went well."""

    model: nn.Module
    history: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    seconds: float
    status: str


@dataclass
class _State:
    """Where the loop is; with model, optimisers and method, all that a checkpoint holds."""

    step: int = 0
    phase: int = -1
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    model: nn.Module,
    method: Method,
    recipe: Recipe,
    batches: Batches,
    validation: Batches,
    *,
    seed: int,
    task: Task | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 20.0,
    run: str = "",
    show: bool = False,
) -> TrainResult:
    """Train `model` with `method` and return the finished plain net.

    `batches` gives the training images, `validation` those looked at after each epoch; `task`
    (classification unless given) has the loss and the metric. With a
    `checkpoint` path the state is saved every `checkpoint_seconds` and at each end of an epoch,
    and an interrupted training of the same `run` goes on from there. `precision` is "fp32" or
    "bf16" (autocast). A loss that is not finite ends the training with status "diverged".
    Raises `InputError` for a checkpoint that cannot be used.
    """
    keep_freed_memory()
    device = torch.device(device)
    loop = Loop(model, method, recipe, batches, validation, seed, task, device, precision)
    saved = read_checkpoint(checkpoint, run) if checkpoint else None
    if saved:
        loop.load(saved)
    shown = ("train_loss", f"validation_{loop.task.metric_name}", "kept")
    bar = tqdm(total=loop.total, initial=loop.at.step, disable=not show, desc=run, leave=False)
    with bar, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for row in loop.steps(checkpoint, checkpoint_seconds, run):
            bar.update()
            if row:
                bar.set_postfix({name: f"{row[name]:.4f}" for name in shown})
    return loop.result()


class Loop:
    """A training that advances by steps; `train`, which says what the arguments are, runs one.

    Several can take turns. They draw from torch's own generator, which each step seeds anew.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        recipe: Recipe,
        batches: Batches,
        validation: Batches,
        seed: int,
        task: Task | None = None,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        self.model, self.method, self.recipe = model, method, recipe
        self.batches, self.validation, self.device = batches, validation, torch.device(device)
        self.seed = seed
        self.precision, self.task = precision, task or Task()
        self.generator = torch.Generator(device).manual_seed(seed)
        whole = recipe.epochs * batches.steps
        self.total = min(recipe.steps, whole) if recipe.steps else whole
        self.phases = method.phases()
        ends = np.cumsum([phase.share for phase in self.phases])
        # A phase boundary lies on a step; the last one is the end, whatever the rounding.
        self.ends = [round(self.total * float(end)) for end in ends[:-1]] + [self.total]
        self.at = _State()
        self.diverged = False
        self.optimizers: list[torch.optim.Optimizer] = []
        method.attach(model, self.generator)
        model.to(self.device, memory_format=torch.channels_last)
        decay = recipe.weight_decay
        method.prepare(model, Context(batches, validation, self.task, self.device, decay))

    def steps(
        self, checkpoint: Path | None = None, every: float = 20.0, run: str = ""
    ) -> Iterator[dict[str, Any] | None]:
        """Make a step at each `next`, to the end or to a loss that is not finite.

        Gives the epoch's row of the history after its last step and validation, else None. With a
        `checkpoint` path the state of `run` is saved at each end of an epoch and after each
        `every` seconds; time that passes between two calls counts for nothing.
        """
        while self.at.step < self.total:
            epoch, first = divmod(self.at.step, self.batches.steps)
            since = time.perf_counter()
            self.model.train()
            for x, y in self.batches.epoch(epoch, start=first):
                if not self._step(x, y):
                    self.diverged = True
                    return
                # An epoch that ends is saved with its row of the history, not before.
                if self._ends_epoch():
                    break
                spent = time.perf_counter() - since
                if checkpoint and spent > every:
                    self.at.seconds += spent
                    self._save(checkpoint, run)
                    spent = 0.0
                yield None
                since = time.perf_counter() - spent
            self.at.history.append(self._end_epoch(epoch))
            self.at.seconds += time.perf_counter() - since
            if checkpoint:
                self._save(checkpoint, run)
            yield self.at.history[-1]
        if not self.total:
            self.at.history = [self._end_epoch(-1)]

    def result(self) -> TrainResult:
        """The finished plain net, and what else the training leaves; after the last step."""
        # The loss of the last step says nothing of the weights that it left.
        sound = not self.diverged and math.isfinite(self.at.history[-1]["validation_loss"])
        net, status = self.method.finish(self.model), "done" if sound else "diverged"
        return TrainResult(net, self.at.history, self.method.arrays(), self.at.seconds, status)

    def _ends_epoch(self) -> bool:
        return self.at.step % self.batches.steps == 0 or self.at.step == self.total

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        self._enter_phase()
        progress, lr = self._progress(), self._set_lr()
        seed_default(mix(self.seed, self.at.step), self.device)
        value = self._backward(x, y, progress)
        if not math.isfinite(value):
            return False
        progress = replace(progress, loss=value)
        self.method.after_backward(self.model, progress)
        for optimizer in self.optimizers:
            optimizer.step()
        self.method.after_step(self.model, progress, lr)
        self.at.loss_sum += value
        self.at.loss_steps += 1
        self.at.step += 1
        if self.at.step == self.ends[self.at.phase]:
            self.method.end(self.model, self.phases[self.at.phase].name)
        return True

    def _backward(self, x: torch.Tensor, y: torch.Tensor, progress: Progress) -> float:
        """Leave the batch's gradients; its loss, not finite as soon as a piece's is not."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        value, left = 0.0, len(x)
        pieces = (each.chunk(self.recipe.pieces) for each in (x, y))
        for part, labels in zip(*pieces, strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = self.task.loss(self.model(part), part, labels)
            left -= len(part)
            total = loss if len(part) == len(x) else loss * (len(part) / len(x))
            extra = None if left else self.method.extra_loss(self.model, progress)
            total = total if extra is None else total + extra
            value += total.item()
            if not math.isfinite(value):
                break
            total.backward()
        return value

    def _enter_phase(self) -> None:
        phase = next(i for i, end in enumerate(self.ends) if self.at.step < end)
        if phase != self.at.phase:
            self.at.phase = phase
            self.method.start(self.model, self.phases[phase].name)
            self._make_optimizers()

    def _make_optimizers(self) -> None:
        name, recipe = self.phases[self.at.phase].name, self.recipe
        groups = self.method.parameter_groups(self.model, name)
        common = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        if recipe.optimizer == "adam":
            betas = (recipe.momentum, 0.999)
            first = torch.optim.Adam(groups, betas=betas, **common)
        else:
            nesterov = recipe.nesterov
            first = torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=nesterov, **common)
        own = self.method.own_optimizer(self.model, name)
        self.optimizers = [first] if own is None else [first, own]

    def _set_lr(self) -> float:
        phases, index = self.phases, self.at.phase
        first = max((i for i in range(index + 1) if phases[i].restart), default=0)
        last = next((i for i in range(index + 1, len(phases)) if phases[i].restart), len(phases))
        begin, end = (self.ends[first - 1] if first else 0), self.ends[last - 1]
        phase = phases[index]
        lr = self.recipe.lr_at(self.at.step - begin, end - begin, phase.schedule) * phase.lr_scale
        for group in self.optimizers[0].param_groups:
            group["lr"] = lr
        return lr

    def _progress(self) -> Progress:
        begin = self.ends[self.at.phase - 1] if self.at.phase else 0
        return Progress(
            self.phases[self.at.phase].name,
            self.at.step - begin,
            self.ends[self.at.phase] - begin,
            self.at.step,
            self.total,
        )

    def _end_epoch(self, epoch: int) -> dict[str, Any]:
        scores, name = self._validate(), f"validation_{self.task.metric_name}"
        row = {
            "epoch": epoch + 1,
            "phase": self.phases[self.at.phase].name,
            "train_loss": self.at.loss_sum / self.at.loss_steps if self.at.loss_steps else math.nan,
            "validation_loss": scores.loss,
            name: scores.metric,
            "kept": self.method.kept_share(self.model),
            **self.method.row(self.model),
        }
        for view_name, view in self.method.views(self.model).items():
            with view:
                row[f"{name}_{view_name}"] = self._validate().metric
        self.at.loss_sum, self.at.loss_steps = 0.0, 0
        return row

    def _validate(self) -> Scores:
        classes = self.validation.info.num_classes
        return self.task.evaluate(self.model, self.validation.ordered(512), classes)

    def _save(self, path: Path, run: str) -> None:
        state = {
            "at": vars(self.at),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "method": self.method.state(),
            "generator": self.generator.get_state(),
        }
        write_checkpoint(path, run, state)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which a checkpoint had."""
        self.at = _State(**state["at"])
        self.method.reshape(self.model, state["method"])
        self.model.load_state_dict(state["model"])
        self.method.load_state(state["method"])
        if self.at.phase >= 0:
            self._make_optimizers()
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
