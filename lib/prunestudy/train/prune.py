"""`prune`: any net, any method, any batches."""

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from prunestudy import methods
from prunestudy.errors import InputError, require
from prunestudy.measure import Metrics
from prunestudy.measure.forward import device_of, evaluating
from prunestudy.methods.base import Context, Method, call, mean_loss, moved
from prunestudy.methods.probes import Probe
from prunestudy.train.checkpoint import read_checkpoint
from prunestudy.train.loaders import Loader
from prunestudy.train.loop import Loop
from prunestudy.train.process import full_precision, keep_freed_memory
from prunestudy.train.recipe import Recipe
from prunestudy.train.result import Result
from prunestudy.values import inputs

Metric = Callable[[nn.Module, Any], float | Mapping[str, float]]


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
    them. `loss(output, y)`, or `loss(output, x, y)`, is by default cross-entropy for labels that
    are whole numbers and mean squared error for others. `metric(model, batches)` gives a number,
    or several by name, the first of which judges: by default the share of right labels, if y are
    labels. Component-aware pruning judges by it, too, or by `metrics`, which has smooth forms.
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
        x, y = tree_map_only(Tensor, lambda t: t[:2], next(iter(train.ordered(2))))
        example = moved(inputs(_arguments(model, x) if example is None else example), device)
        net = _on_device(model, device, example)
        loss = _loss(loss, net, x, y)
        generator = torch.Generator(device).manual_seed(seed)
        context = Context(example, loss, generator=generator, weight_decay=recipe.weight_decay)
        context.train = train.epoch
        default = _top1 if _are_labels(y) else lambda *_: {}
        values = _values(metric or (metrics.values if metrics else default), loss)
        context.metrics = metrics or Metrics(lambda net, data: values(net, lambda: data))
        score = lambda _: {}  # noqa: E731
        if validation is not None:
            context.validation = lambda: validation.ordered(512)
            score = lambda net: values(net, context.validation)  # noqa: E731
            context.score = lambda net: next(iter(score(net).values()))
        method.check(net)
        loop = Loop(
            net, method, recipe, train, context, score, probe, seed=seed, precision=precision
        )
        if path and (saved := read_checkpoint(path, run, device)):
            try:
                loop.load(saved)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                line = "of another net, method or recipe; delete it to start this run again"
                raise InputError(f"checkpoint = {path.name!r}: {line}") from error
        with tqdm(total=loop.total, initial=loop.state.step, disable=not show, desc=run) as bar:
            for row in loop.steps(path, checkpoint_seconds, run):
                bar.update()
                if row:
                    seen = next((n for n in row if n.startswith("validation_")), "kept")
                    bar.set_postfix({n: f"{row[n]:.4f}" for n in ("train_loss", seen, "kept")})
        small = loop.finish()
    if all(p.is_contiguous() for p in model.parameters() if p.dim() == 4):
        small = small.to(memory_format=torch.contiguous_format)
    status, state = "diverged" if loop.diverged else "done", loop.state
    found = small.eval(), state.history, status, state.seconds, method, loop.probe, example
    return Result(*found, copy.deepcopy(model), score)


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


def _values(metric: Metric, loss: Callable[..., Tensor]) -> Callable[..., dict[str, float]]:
    """A function of a net and of what starts reading batches: `metric`'s numbers, and the loss."""

    def values(model: nn.Module, read: Callable[[], Any]) -> dict[str, float]:
        with evaluating(model), torch.inference_mode():
            found = metric(model, read())
            found = dict(found) if isinstance(found, Mapping) else {"metric": float(found)}
            return found if "loss" in found else found | {"loss": mean_loss(model, loss, read())}

    return values


def _top1(model: nn.Module, batches: Any) -> dict[str, float]:
    """The share (0-1) of right labels: of outputs (n, classes, ...), the largest along classes."""
    right = count = 0
    for x, y in batches:
        right += int((call(model, x).argmax(1) == y).sum())
        count += y.numel()
    return {"top1": right / count}


def _are_labels(y: Any) -> bool:
    return isinstance(y, Tensor) and not y.is_floating_point()


def _loss(loss: Any, net: nn.Module, x: Any, y: Any) -> Callable[[Any, Any, Any], Tensor]:
    """The loss as a function of (output, x, y), tried on a few samples."""
    loss = loss or (F.cross_entropy if _are_labels(y) else F.mse_loss)
    name = getattr(loss, "__name__", type(loss).__name__)
    require(callable(loss), "loss", name, "a function of (output, y) or (output, x, y)")
    form = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in form.parameters.values() if p.kind in kinds and p.default is p.empty]
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


def _arguments(model: nn.Module, x: Any) -> Any:
    """The positional arguments of the model's forward for a batch's `x`."""
    return inspect.signature(model.forward).bind(**x).args if isinstance(x, dict) else x


def _on_device(model: nn.Module, device: torch.device, example: tuple[Tensor, ...]) -> nn.Module:
    """A copy of `model` on `device`, in channels_last, which is faster, where it runs in it."""
    net = copy.deepcopy(model).to(device)
    if all(p.dim() != 4 for p in net.parameters()):
        return net
    fast = copy.deepcopy(net).to(memory_format=torch.channels_last)
    try:
        with evaluating(fast), torch.no_grad():
            fast(*example)
    except RuntimeError:  # `view` needs the other layout
        return net
    return fast


def _require_kinds(model: Any, method: Any, recipe: Any, precision: Any) -> None:
    for name, value, kind, allowed in (
        ("model", model, nn.Module, "a torch module"),
        ("method", method, Method, "a method such as GDP(target=0.5)"),
        ("recipe", recipe, Recipe, "a Recipe"),
    ):
        require(isinstance(value, kind), name, type(value).__name__, allowed)
    allowed = ("fp32", "tf32", "bf16")
    require(precision in allowed, "precision", precision, f"allowed are {', '.join(allowed)}")
