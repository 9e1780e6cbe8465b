"""The training loop: phases, hooks, validation, checkpoints and exact resume.

A run that is killed and started again ends with the same numbers: batches depend on (seed, epoch,
step) only, a method's draws come from one generator, a net's (dropout) from torch's own, which is
seeded at each step, and all else is in the checkpoint. A step reads nothing from the device;
losses are looked at every `period` steps.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunestudy.datasets.batches import mix
from prunestudy.errors import refused, require
from prunestudy.methods.base import At, Context, Method, Phase, boundaries, call, scalar
from prunestudy.methods.probes import Probe
from prunestudy.shrink.fold import with_gradients
from prunestudy.train.capture import Captured, graphs_on
from prunestudy.train.checkpoint import write_checkpoint
from prunestudy.train.process import seed_default
from prunestudy.train.recipe import Recipe

_MOST_SAVING = 0.02  # the share of the training's time that checkpoints may take


@dataclass
class _State:
    """Where the loop is; with model, optimisers and method, all that a checkpoint holds."""

    step: int = 0
    phase: int = -1
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Loop:
    """A training that advances by steps; `prune`, which says what the arguments are, runs one.

    `train` has `steps`, `epoch(epoch, start)`; `score(model)` gives the validation's numbers by
    name. Several loops can take turns: each step seeds torch's own generator anew.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        recipe: Recipe,
        train: Any,
        context: Context,
        score: Callable[[nn.Module], Mapping[str, float]],
        probe: Probe | None = None,
        *,
        seed: int = 0,
        precision: str = "fp32",
    ) -> None:
        self.model, self.method, self.recipe, self.train = model, method, recipe, train
        self.context, self.score, self.probe = context, score, probe or Probe()
        self.seed, self.precision, self.device = seed, precision, context.device
        whole = recipe.epochs * train.steps
        self.total = min(recipe.steps, whole) if recipe.steps else whole
        context.period = recipe.period or min(16, max(1, self.total // 200))
        trains = any(parameter.requires_grad for parameter in model.parameters())
        allowed = "a net with parameters that train (requires_grad)"
        require(trains or not self.total, "model", type(model).__name__, allowed)
        self.phases = method.phases()
        if recipe.one_schedule:
            self.phases = tuple(Phase(each.name, each.share) for each in self.phases)
        self.ends = boundaries(self.phases, self.total)
        self.state, self.diverged, self.known = _State(), False, {}
        self.optimizers: list[torch.optim.Optimizer] = []
        # What a step reads of the host, and the sum of the losses: the same tensors throughout.
        self._share, self._lr, self._sum = (scalar(0.0, self.device) for _ in range(3))
        self._count, self._saved, self._due = 0, 0.0, None
        # Until the first checkpoint tells: weights and two moments at 200 MB a second.
        self._save_seconds = 3 * sum(p.nbytes for p in model.parameters()) / 2e8
        method.attach(model, context)
        method.to(self.device)
        self.probe.attach(method, model, context)
        graphs = graphs_on(self.device)
        self._captured = Captured(self._work, model, method, context.generator, graphs)
        # Optimisers in a graph read their learning rate from a tensor.
        self._rate = torch.zeros((), device=self.device) if graphs else None
        in_graph = graphs and getattr(train, "places", None)
        self._read, self._made = (train.places, train.gather) if in_graph else (train.epoch, None)

    def steps(
        self, checkpoint: Path | None = None, every: float = 20.0, run: str = ""
    ) -> Iterator[dict[str, Any] | None]:
        """Make a step at each `next`, to the end or to a loss that is not finite.

        Gives the epoch's row of the history after its last step and validation, else None. The
        state of `run` is saved to a `checkpoint` path at ends of epochs and after each `every`
        seconds, less often where that would take more than 2% of the time (0: after each step), and
        when the iterator is closed. Time that passes between two calls counts for nothing.
        """
        while self.state.step < self.total:
            epoch, first = divmod(self.state.step, self.train.steps)
            since = time.perf_counter()
            self.model.train()
            for batch in self._read(epoch, start=first):
                self._step(batch)
                ends = self.state.step % self.train.steps == 0 or self.state.step == self.total
                if ends or self._rate is None:
                    self._look()
                # An epoch that ends is saved with its row of the history, not before.
                if self.diverged or ends:
                    break
                self._clock(since, checkpoint, every, run)
                yield from self._pause(None, checkpoint, run)
                since = time.perf_counter()
                self._look()  # not before the pause: the device may have been at work on the step
                if self.diverged:
                    return
            row = {} if self.diverged else self._end_epoch(epoch)
            if self.diverged:
                return
            self.state.history.append(row)
            self._clock(since, checkpoint, every, run, ends=True)
            yield from self._pause(row, checkpoint, run)
        if not self.total:
            self.state.history = [self._end_epoch(-1)]

    def _pause(
        self, row: dict[str, Any] | None, checkpoint: Path | None, run: str
    ) -> Iterator[dict[str, Any] | None]:
        try:
            yield row
        except GeneratorExit:
            if checkpoint:
                self._write(checkpoint, run)
            raise

    def finish(self) -> nn.Module:
        """The finished plain net; after the last step."""
        # The loss of the last step says nothing of the weights that it left.
        last = self.state.history[-1] if self.state.history else {}
        self.diverged |= not math.isfinite(last.get("validation_loss", 0.0))
        self._captured.forget()
        net = self.method.finish(self.model, self.context)
        self.probe.finished(net)
        return with_gradients(net)

    def _step(self, batch: Any) -> None:
        state, phase = self.state, next(i for i, e in enumerate(self.ends) if self.state.step < e)
        if phase != state.phase:
            state.phase = phase
            self._make_optimizers()
        self._set_lr()
        seed_default(mix(self.seed, state.step), self.device)
        state.step += 1
        at, self._count = self._at(self._captured(batch)), self._count + 1
        with torch.no_grad():
            self.probe.after_step(at)
        self._due = at if at.step % self.context.period == 0 or at.last else None

    def _look(self) -> None:
        """What the host has to do after the last step, if anything and not done yet."""
        at, self._due = self._due, None
        if at:
            self.diverged = not math.isfinite(self._sum.item())
            if not self.diverged:
                if at.last:
                    self.probe.leaving(at)
                self.method.update(at)
                self.probe.update(at)
                self._captured.look()

    def _work(self, batch: Any) -> Tensor:
        """Do what a step does on the device, which can be captured; the loss, 0-d."""
        with refused("train", f"batch {(self.state.step - 1) % self.train.steps}"):
            loss = self._backward(*(self._made(batch) if self._made else batch))
        at = self._at(loss)
        self._sum.add_(loss)
        self.method.after_backward(at)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            self.method.after_step(at)
        return loss

    def _at(self, loss: Tensor) -> At:
        step, index = self.state.step, self.state.phase
        begin, end = (self.ends[index - 1] if index else 0), self.ends[index]
        here = self.phases[index].name, step - begin, end - begin, step, self.total
        return At(*here, self._share, self._lr, loss)

    def _backward(self, x: Any, y: Any) -> Tensor:
        """Leave the batch's gradients; its loss, 0-d on the device."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        found, whole = [], len(tree_leaves(x)[0])
        size = -(-whole // self.recipe.pieces)
        # A weight's cast that is kept would be one of another step.
        on = {"enabled": self.precision == "bf16", "cache_enabled": self._rate is None}
        for begin in range(0, whole, size):
            share = min(size, whole - begin) / whole
            part, labels = tree_map_only(Tensor, lambda t, b=begin: t[b : b + size], (x, y))
            with torch.autocast(self.device.type, torch.bfloat16, **on):
                loss = self.context.loss(call(self.model, part), part, labels)
            require(loss.requires_grad, "loss", "a number without gradient", "must have a gradient")
            (loss * share).backward()
            found.append(loss.detach().double() * share)
        return loss.detach() if share == 1 else torch.stack(found).sum()

    def _make_optimizers(self) -> None:
        own = self.method.optimizer()
        first = self.recipe.over(self.method.trained(self.model, own))
        self.optimizers = [first, own] if own else [first]
        self._captured.forget()
        for optimizer in self.optimizers if self._rate is not None else ():
            optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are not
            for group in optimizer.param_groups:
                group["fused"] = True
                if "capturable" in group:
                    group["capturable"] = self.device.type == "cuda"

    def _set_lr(self) -> None:
        index, step = self.state.phase, self.state.step
        start = self.ends[index - 1] if index else 0
        lr = self.recipe.rate(self.phases, self.ends, index, step)
        self._lr.fill_(lr)
        self._share.fill_((step - start) / (self.ends[index] - start))
        if self._rate is not None:
            self._rate.fill_(lr)
        for group in self.optimizers[0].param_groups:
            group["lr"] = lr if self._rate is None else self._rate

    def _end_epoch(self, epoch: int) -> dict[str, Any]:
        loss = self._sum.item() / self._count if self._count else math.nan
        if self._count and not math.isfinite(loss):
            self.diverged = True
            return {}
        row = {"epoch": epoch + 1, "phase": self.phases[self.state.phase].name, "train_loss": loss}
        row |= {f"validation_{key}": value for key, value in self.score(self.model).items()}
        row |= self.method.log()
        self.probe.epoch()
        self._sum.zero_()
        self._count = 0
        return row

    def _clock(
        self, since: float, checkpoint: Path | None, every: float, run: str, *, ends: bool = False
    ) -> None:
        """Count the time spent, and save what is due; where an epoch `ends`, sooner."""
        state, now = self.state, time.perf_counter()
        state.seconds += now - since
        due = max(0.0 if ends else every, self._save_seconds / _MOST_SAVING) if every else 0.0
        if checkpoint and state.seconds - self._saved >= due:
            self._write(checkpoint, run)
            self._saved, self._save_seconds = state.seconds, time.perf_counter() - now

    def _write(self, checkpoint: Path, run: str) -> None:
        self._look()
        if not self.diverged:
            write_checkpoint(checkpoint, run, self._to_save())

    def _to_save(self) -> dict[str, Any]:
        # Behind the last step of a phase the next one makes new optimisers.
        going = self.state.phase >= 0 and self.state.step < self.ends[self.state.phase]
        return {
            "state": vars(self.state),
            "known": self.known,
            "sum": (self._sum, self._count),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers] if going else [],
            "method": self.method.state_dict(),
            "probe": self.probe.state(),
            "generator": (self.device.type, self.context.generator.get_state()),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from `saved`, which a checkpoint had."""
        self.state = _State(**saved["state"])
        self._saved = self.state.seconds
        self.method.load_state_dict(saved["method"])  # it may give the model other layers
        self.model.load_state_dict(saved["model"])
        self.probe.load_state(saved["probe"])
        total, self._count = saved["sum"]
        self._sum.copy_(total)
        if saved["optimizers"]:
            self._make_optimizers()
            for optimizer, each in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(each)
        kind, generator = saved["generator"]
        if kind == self.device.type:  # of another device's generator nothing can be taken over
            self.context.generator.set_state(generator.cpu())
