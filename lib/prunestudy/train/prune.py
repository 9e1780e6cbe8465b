"""`prune`: any net, any method, any batches; and what comes out of it."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from prunestudy import methods, shrink
from prunestudy.errors import InputError, require
from prunestudy.measure import Metrics
from prunestudy.measure.forward import device_of, evaluating
from prunestudy.methods.base import Batch, Context, Method, call, mean_loss, moved
from prunestudy.methods.probes import Probe
from prunestudy.train.checkpoint import read_checkpoint
from prunestudy.train.deterministic import full_precision
from prunestudy.train.loaders import Loader
from prunestudy.train.loop import Loop
from prunestudy.train.memory import keep_freed_memory
from prunestudy.train.recipe import Recipe
from prunestudy.train.report import report
from prunestudy.values import inputs

Metric = Callable[[nn.Module, Any], float | Mapping[str, float]]


@dataclass
class Result:
    """What `prune` gives back.

    `model`: an ordinary trainable module, in eval mode; `history`: a row per epoch; `status`:
    "done", or "diverged" if a loss was not finite; `seconds` of training; `method` and `probe` as
    the training left them; `example`: two inputs or more; `dense`: the model as it was given.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    status: str
    seconds: float
    method: Method
    probe: Probe
    example: tuple[Tensor, ...]
    dense: nn.Module = field(repr=False)
    score: Callable[[nn.Module], Mapping[str, float]] = field(repr=False)

    def report(self) -> str:
        """What left each layer, MACs, parameters and the validation metric, before and after."""
        return report(self)

    def save(self, path: str | Path) -> None:
        """Write the net to `path`, for `load` and a fresh instance of the model's class."""
        shrink.save(self.model, path)

    def export(self, path: str | Path) -> None:
        """Write the net to `path` as ONNX, for batches of any size."""
        shrink.export(self.model, path, self.example)


def prune(
    model: nn.Module,
    method: Method,
    train: Any,
    recipe: Recipe | None = None,
    *,
    validation: Any = None,
    loss: Callable[..., Tensor] | None = None,
    metric: Metric | None = None,
    metrics: Metrics | None = None,
    example: Tensor | tuple[Tensor, ...] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    checkpoint: Path | str | None = None,
    checkpoint_seconds: float = 20.0,
    run: str = "",
    show: bool = False,
    probe: Probe | None = None,
) -> Result:
    """Train `model` with `method` and return the finished smaller net; `model` is left alone.

    `train` and `validation` are iterables of batches (x, y) with a length, DataLoaders for
    instance; x is a tensor, a tuple of tensors or a dict of them, as the model's forward takes
    them. `loss(output, y)`, or `loss(output, x, y)`, is cross-entropy for labels that are whole
    numbers and mean squared error for others; `metric(model, batches)` gives a number, or several
    by name, the first of which judges: by default the share of right labels, if y are labels.
    `metrics` is what component-aware pruning judges by in its place, with smooth forms.
    `example` is an input batch (by default the first of `train`); `seed` of all random draws;
    `device` by default that of the model; `precision`: "fp32", "tf32" or "bf16" (autocast).

    With a `checkpoint` path the state of `run` is saved every `checkpoint_seconds` or less often
    (see `Loop.steps`), and an interrupted training goes on from there. A loss that is not finite
    ends the training with status "diverged". Raises `InputError` for what cannot be used, before
    any training.
    """
    recipe = recipe or Recipe(epochs=10, lr=0.05)
    _require_kinds(model, method, recipe, precision)
    device = torch.device(device or device_of(model))
    train = train if hasattr(train, "epoch") else Loader(train, seed, device, "train")
    if validation is not None and not hasattr(validation, "ordered"):
        validation = Loader(validation, seed, device, "validation")
    path = Path(checkpoint) if checkpoint else None
    keep_freed_memory()
    with (
        full_precision(precision != "tf32"),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        x, y = _few(next(iter(train.ordered(2))))
        example = moved(inputs(_arguments(model, x) if example is None else example), device)
        net = _on_device(model, device, example)
        loss = _loss(loss, net, x, y)
        generator = torch.Generator(device).manual_seed(seed)
        context = Context(example, loss, generator=generator, weight_decay=recipe.weight_decay)
        context.train = train.epoch
        metric = metric or (metrics.values if metrics else _default_metric(y))
        score = _Score(loss, metric, validation)
        context.metrics = metrics or Metrics(score.on)
        if validation is not None:
            context.score, context.validation = score.judge, lambda: validation.ordered(512)
        method.check(net)
        loop = Loop(
            net, method, recipe, train, context, score, probe, seed=seed, precision=precision
        )
        saved = read_checkpoint(path, run, device) if path else None
        if saved:
            _resume(loop, saved, path)
        with tqdm(total=loop.total, initial=loop.state.step, disable=not show, desc=run) as bar:
            for row in loop.steps(path, checkpoint_seconds, run):
                bar.update()
                if row:
                    shown = ("train_loss", f"validation_{score.name}", "kept")
                    bar.set_postfix({name: f"{row[name]:.4f}" for name in shown if name in row})
        small = loop.finish()
    if not _is_channels_last(model):
        small = small.to(memory_format=torch.contiguous_format)
    return Result(
        small.eval(),
        loop.state.history,
        "diverged" if loop.diverged else "done",
        loop.state.seconds,
        method,
        loop.probe,
        example,
        copy.deepcopy(model),
        score,
    )


def shrink_to(
    model: nn.Module,
    target: float,
    example: Tensor | tuple[Tensor, ...],
    *,
    of: str = "macs",
    by: str = "group_l2",
    seed: int = 0,
) -> nn.Module:
    """A smaller copy of `model` without the share `target` of its MACs, parameters or weights.

    Nothing is trained. `of`: "macs" or "parameters" (channels go), or "sparsity" (weights are set
    to zero); `by`: "group_l2", "l1_filter", "random", or "magnitude" for single weights; `example`:
    an input batch. Raises `InputError` for what cannot be used.
    """
    untrained = ("group_l2", "l1_filter", "magnitude", "random")
    require(by in untrained, "by", by, f"allowed are {', '.join(untrained)}")
    require(isinstance(model, nn.Module), "model", type(model).__name__, "a torch module")
    method, net = methods.build(by, {}, target, of), copy.deepcopy(model)
    example = moved(inputs(example), device_of(model))
    generator = torch.Generator(example[0].device).manual_seed(seed)
    context = Context(example, generator=generator)
    method.check(net)
    method.attach(net, context)
    return method.finish(net, context).requires_grad_(True).train(model.training)


class _Score:
    """The validation's numbers of a net: the loss, and those of the metric."""

    def __init__(self, loss: Callable[..., Tensor], metric: Metric | None, batches: Any) -> None:
        self.loss, self.metric, self.batches, self.name = loss, metric, batches, "loss"

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """All numbers by name, the one to judge by first; {} without validation batches."""
        return {} if self.batches is None else self._of(model, lambda: self.batches.ordered(512))

    def on(self, model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
        """The same on other batches."""
        return self._of(model, lambda: batches)

    def _of(self, model: nn.Module, read: Callable[[], Iterable[Batch]]) -> dict[str, float]:
        found = {}
        with evaluating(model), torch.inference_mode():
            if self.metric:
                found = self.metric(model, read())
                found = dict(found) if isinstance(found, Mapping) else {"metric": float(found)}
                self.name = next(iter(found))
            if "loss" not in found:
                found["loss"] = mean_loss(model, self.loss, read())
        return found

    def judge(self, model: nn.Module) -> float:
        """The number to judge by."""
        return next(iter(self(model).values()))


def top1(model: nn.Module, batches: Any) -> dict[str, float]:
    """The share (0-1) of right labels: of outputs (n, classes, ...), the largest along classes."""
    right = count = 0
    for x, y in batches:
        right += int((call(model, x).argmax(1) == y).sum())
        count += y.numel()
    return {"top1": right / count}


def _default_metric(y: Any) -> Metric | None:
    return top1 if _are_labels(y) else None


def _are_labels(y: Any) -> bool:
    return isinstance(y, Tensor) and not y.is_floating_point()


def _loss(loss: Any, net: nn.Module, x: Any, y: Any) -> Callable[[Any, Any, Any], Tensor]:
    """The loss as a function of (output, x, y), tried on a few samples."""
    loss = loss or (F.cross_entropy if _are_labels(y) else F.mse_loss)
    name = getattr(loss, "__name__", type(loss).__name__)
    require(callable(loss), "loss", name, "a function of (output, y) or (output, x, y)")
    form = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in form.parameters.values() if p.kind in positional and p.default is p.empty]
    function = loss if len(needed) > 2 else lambda output, _, y: loss(output, y)
    with evaluating(net), torch.no_grad():
        try:
            value = function(call(net, x), x, y)
        except Exception as error:  # whatever a net or a loss may raise
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"loss = {name!r}: fails on a batch of train: {line}") from error
    scalar = isinstance(value, Tensor) and value.dim() == 0
    require(scalar, "loss", name, "a function that gives one number, a 0-d tensor")
    return function


def _few(batch: Any) -> Any:
    """The first two samples of a batch (x, y)."""
    return tree_map_only(Tensor, lambda t: t[:2], batch)


def _arguments(model: nn.Module, x: Any) -> Any:
    """The positional arguments of the model's forward for a batch's `x`."""
    if not isinstance(x, dict):
        return tuple(x) if isinstance(x, list) else x
    return inspect.signature(model.forward).bind(**x).args


def _on_device(model: nn.Module, device: torch.device, example: tuple[Tensor, ...]) -> nn.Module:
    """A copy of `model` on `device`, in channels_last, which is faster, where it runs in it."""
    net = copy.deepcopy(model).to(device)
    if any(p.dim() == 4 for p in net.parameters()):
        fast = copy.deepcopy(net).to(memory_format=torch.channels_last)
        try:
            with evaluating(fast), torch.no_grad():
                fast(*example)
        except RuntimeError:  # `view` needs the other layout
            return net
        return fast
    return net


def _is_channels_last(model: nn.Module) -> bool:
    weights = [p for p in model.parameters() if p.dim() == 4]
    return any(not p.is_contiguous() for p in weights)


def _require_kinds(model: Any, method: Any, recipe: Any, precision: Any) -> None:
    for name, value, kind, allowed in (
        ("model", model, nn.Module, "a torch module"),
        ("method", method, Method, "a method such as GDP(target=0.5)"),
        ("recipe", recipe, Recipe, "a Recipe"),
    ):
        require(isinstance(value, kind), name, type(value).__name__, allowed)
    allowed = ("fp32", "tf32", "bf16")
    require(precision in allowed, "precision", precision, f"allowed are {', '.join(allowed)}")


def _resume(loop: Loop, saved: dict[str, Any], path: Path) -> None:
    try:
        loop.load(saved)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        line = "of another net, method or recipe; delete it to start this run again"
        raise InputError(f"checkpoint = {path.name!r}: {line}") from error
