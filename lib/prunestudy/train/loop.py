"""The training loop: phases, hooks, validation, checkpoints and exact resume.

Batches depend on (seed, epoch, step) only, a method's draws come from one generator, a net's
(dropout) from torch's own, which is seeded at each step, and all else is in the checkpoint. A step
reads nothing from the device; losses are looked at every `period` steps.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunestudy.datasets.batches import mix
from prunestudy.errors import refused, require
from prunestudy.methods.base import At, Context, Method, Phase, boundaries, call, scalar
from prunestudy.methods.probes import Probe
from prunestudy.train.capture import Captured, graphs_on
from prunestudy.train.checkpoint import write_checkpoint
from prunestudy.train.process import seed_default
from prunestudy.train.recipe import Recipe

_MOST_SAVING = 0.02  # the share of the training's time that checkpoints may take


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
        trains = any(p.requires_grad for p in model.parameters()) or not self.total
        allowed = "a net with parameters that train (requires_grad)"
        require(trains, "model", type(model).__name__, allowed)
        self.phases = method.phases()
        if recipe.one_schedule:
            self.phases = tuple(Phase(each.name, each.share) for each in self.phases)
        self.ends = boundaries(self.phases, self.total)
        # With model, optimisers and method all that a checkpoint holds.
        self.state = SimpleNamespace(step=0, phase=-1, seconds=0.0, history=[])
        self.diverged, self.known = False, {}
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
        in_graph = graphs and getattr(train, "gather", None)
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
        self._file = (checkpoint, every, run)
        try:
            while self.state.step < self.total and not self.diverged:
                yield from self._epoch(*divmod(self.state.step, self.train.steps))
        except GeneratorExit:
            self._write()
            raise
        if not self.total:
            self.state.history = [self._row(-1)]

    def _epoch(self, epoch: int, first: int) -> Iterator[dict[str, Any] | None]:
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
            self._clock(since)
            yield None
            since = time.perf_counter()
            self._look()  # not before the pause: the device may have been at work on the step
            if self.diverged:
                break
        row = self._row(epoch)
        if row:
            self.state.history.append(row)
            self._clock(since, ends=True)
            yield row

    def finish(self) -> nn.Module:
        """The finished plain net, frozen; after the last step."""
        # The loss of the last step says nothing of the weights that it left.
        last = self.state.history[-1] if self.state.history else {}
        self.diverged |= not math.isfinite(last.get("validation_loss", 0.0))
        self._captured.forget()
        net = self.method.finish(self.model, self.context)
        self.probe.finished(net)
        return net

    def _step(self, batch: Any) -> None:
        state, step = self.state, self.state.step
        phase = next(i for i, end in enumerate(self.ends) if step < end)
        if phase != state.phase:
            state.phase = phase
            self._make_optimizers()
        begin, end = (self.ends[phase - 1] if phase else 0), self.ends[phase]
        self._share.fill_((step - begin) / (end - begin))
        lr = self.recipe.rate(self.phases, self.ends, phase, step)
        self._lr.fill_(lr)
        rate = lr if self._rate is None else self._rate.fill_(lr)
        for group in self.optimizers[0].param_groups:
            group["lr"] = rate
        seed_default(mix(self.seed, step), self.device)
        state.step += 1
        here = self.phases[phase].name, state.step - begin, end - begin, state.step, self.total
        self._at = partial(At, *here, self._share, self._lr)
        at, self._count = self._at(self._captured(batch)), self._count + 1
        with torch.no_grad():
            self.probe.after_step(at)
        self._due = at if at.step % self.context.period == 0 or at.last else None

    def _look(self) -> None:
        """What the host has to do after the last step, if anything and not done yet."""
        at, self._due = self._due, None
        if at:
            self.diverged = not math.isfinite(self._sum.item())
        if at and not self.diverged:
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

    def _backward(self, x: Any, y: Any) -> Tensor:
        """Leave the batch's gradients; its loss, 0-d."""
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

    def _row(self, epoch: int) -> dict[str, Any]:
        """The history's row of an epoch that has ended; {} if a loss was not finite."""
        loss = self._sum.item() / self._count if self._count else math.nan
        self.diverged |= self._count > 0 and not math.isfinite(loss)
        if self.diverged:
            return {}
        row = {"epoch": epoch + 1, "phase": self.phases[self.state.phase].name, "train_loss": loss}
        row |= {f"validation_{key}": value for key, value in self.score(self.model).items()}
        row |= self.method.log()
        self.probe.epoch()
        self._sum.zero_()
        self._count = 0
        return row

    def _clock(self, since: float, *, ends: bool = False) -> None:
        """Count the time spent, and save what is due; where an epoch `ends`, sooner."""
        (_, every, _), now = self._file, time.perf_counter()
        self.state.seconds += now - since
        due = max(0.0 if ends else every, self._save_seconds / _MOST_SAVING) if every else 0.0
        if self.state.seconds - self._saved >= due:
            self._write()
            self._saved, self._save_seconds = self.state.seconds, time.perf_counter() - now

    def _write(self) -> None:
        """Write the checkpoint, where one is wanted."""
        path, _, run = self._file
        if path:
            self._look()
        if not path or self.diverged:
            return
        # Behind the last step of a phase the next one makes new optimisers.
        going = self.state.phase >= 0 and self.state.step < self.ends[self.state.phase]
        saved = {
            "state": vars(self.state),
            "known": self.known,
            "sum": (self._sum, self._count),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers] if going else [],
            "method": self.method.state_dict(),
            "probe": self.probe.state(),
            "generator": (self.device.type, self.context.generator.get_state()),
        }
        write_checkpoint(path, run, saved)

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from `saved`, which a checkpoint had."""
        self.state = SimpleNamespace(**saved["state"])
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
