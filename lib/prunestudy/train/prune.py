"""`prune`: any net, any method, any batches."""

import hashlib
import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm.auto import tqdm

from prunestudy import methods
from prunestudy.errors import InputError, first_line, require, require_one_of, writable_file
from prunestudy.measure import Metrics
from prunestudy.measure.forward import device_of, evaluating, inputs_for
from prunestudy.measure.forward import run as run_on
from prunestudy.methods.base import Batch, Context, Method, call
from prunestudy.methods.probes import Probe
from prunestudy.shrink.fold import channels_last, copied, require_net
from prunestudy.shrink.remove import trainable_as
from prunestudy.train.checkpoint import AGAIN, digest_of, read_checkpoint
from prunestudy.train.loaders import Loader, moved
from prunestudy.train.loop import Loop
from prunestudy.train.process import Steps, gang, keep_freed_memory, set_arithmetic, use_own_stream
from prunestudy.train.recipe import Recipe
from prunestudy.train.result import Result
from prunestudy.train.score import Metric, Score, checked_loss, checked_metrics, default_metric
from prunestudy.values import inputs, plain

_APART = 100  # times the mean |w| of the start: a training that works comes nowhere near


def pruning(
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
) -> Steps[Result]:
    """`prune` by steps, for `gang`: gives what `Loop.steps` does, and returns the `Result`."""
    recipe = recipe or Recipe(epochs=10, lr=0.05)
    _require_kinds(model, precision, method, recipe, metrics, probe, plain(checkpoint_seconds))
    require(metric is None or callable(metric), "metric", metric, "a function of (model, batches)")
    seed, device = _seed(seed), _device(device_of(model) if device is None else device)
    train = _batches("train", train, seed, device)
    if validation is not None:
        validation = _batches("validation", validation, seed, device)
    path = writable_file(checkpoint, "checkpoint") if checkpoint else None
    settings = method.name, method.target, method.of, method.settings, recipe, seed, precision
    told = hashlib.sha256(repr(settings).encode()).hexdigest()
    keep_freed_memory()
    set_arithmetic(precision == "tf32")
    use_own_stream(device)
    x, y = _two(train)[1]
    source = "train" if example is None else "example"
    example = moved(inputs(_arguments(model, x) if example is None else example), device)
    net = _on_device(model, device, example, source)
    loss = checked_loss(loss, net, x, y)
    metric = metric or (metrics.values if metrics else default_metric(net, x, y))
    score = Score(loss, metric, validation)
    context = Context(example, loss, train=train.epoch, weight_decay=recipe.weight_decay)
    context.generator = torch.Generator(device).manual_seed(seed)
    context.metrics = checked_metrics(metrics) if metrics else Metrics(score)
    if validation is not None:
        context.score = lambda net: next(iter(score(net).values()))
        context.validation = lambda: validation.ordered(512)
        score.try_first(net)
    method.check(net)
    allowed = "has pruned a net already: make a new one"
    require(not method.attached, "method", method.name, allowed)
    known = {"method, recipe or seed": told} | _known(model, net, loss, train) if path else {}
    loop = Loop(net, method, recipe, train, context, score, probe, seed=seed, precision=precision)
    if path:
        _resume(loop, path, run or told[:8], known)
    with tqdm(total=loop.total, initial=loop.state.step, disable=not show, desc=run) as bar:
        for row in loop.steps(path, checkpoint_seconds, run or told[:8]):
            bar.update()
            if row:
                seen = next((n for n in row if n.startswith("validation_")), "kept")
                bar.set_postfix({n: f"{row[n]:.4f}" for n in ("train_loss", seen, "kept")})
            yield row
    small = trainable_as(model, loop.finish())
    if all(p.is_contiguous() for p in model.parameters() if p.dim() == 4):
        small = small.to(memory_format=torch.contiguous_format)
    status = "diverged" if loop.diverged else "came_apart" if method.grew() >= _APART else "done"
    found = loop.state.history, status, loop.state.seconds, method, loop.probe, example
    result = Result(small.eval(), *found, copied(model), score)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # its readers have other streams
    return result


@wraps(pruning, assigned=())
def prune(*args: Any, **settings: Any) -> Result:
    """Train `model` with `method` and return the finished smaller net; `model` is left alone.

    `train` and `validation` are iterables of batches (x, y) with a length, DataLoaders for
    instance; x is a tensor, a tuple of tensors or a dict of them, as the model's forward takes
    them. `loss(output, y)`, or `loss(output, x, y)`, is cross-entropy for labels that are whole
    numbers and mean squared error for others; `metric(model, batches)` gives a number, or several
    by name, the first of which judges: by default the share of right labels, if y are labels.
    `metrics` is what component-aware pruning judges by in its place, with smooth forms.
    `example` is an input batch (by default the first of `train`); `seed` of all random draws;
    `device` by default that of the model; `precision`: "fp32", "tf32" or "bf16" (autocast).

    With a `checkpoint` path the state of `run` (by default a hash of the settings) is saved every
    `checkpoint_seconds` or less often (see `Loop.steps`), and an interrupted training goes on from
    there; method, recipe and seed, the model's weights, the number of batches, the first batch
    (unless it is drawn anew) and its loss must be the same. A loss that is not finite ends the
    training with status "diverged"; weights that grew a hundredfold make it "came_apart". Raises
    `InputError` for what cannot be used, before any training but for batches that come later.
    """
    return next(gang([pruning(*args, **settings)]))


def shrink_to(
    model: nn.Module,
    target: float,
    example: Tensor | tuple[Tensor, ...],
    *,
    of: str = "macs",
    by: str = "group_l2",
    leave: str = "",
    seed: int = 0,
) -> nn.Module:
    """A smaller copy of `model` without the share `target` of its MACs, parameters or weights.

    Nothing is trained. `of`: "macs" or "parameters" (channels go), or "sparsity" (weights are set
    to zero); `by`: "group_l2", "l1_filter", "random", or "magnitude" for single weights; `leave`:
    layers whose channels all stay, as of every method that removes channels; `example`: an input
    batch. Raises `InputError` for what cannot be used.
    """
    require_one_of("by", by, ("group_l2", "l1_filter", "magnitude", "random"))
    require_net(model)
    method = methods.build(by, {"leave": leave} if leave else {}, target, of)
    net = copied(model)
    context = Context(moved(inputs(example, valued=True), device_of(model)))
    context.generator = torch.Generator(context.device).manual_seed(_seed(seed))
    _run_alone(net, model, inputs_for(net, context.example), "example")
    method.check(net)
    method.attach(net, context)
    found = {"removed": 0.0, "target_met": 1} | method.report()
    most = f"at most {found['removed']:.4f} can go by this rule"
    require(found["target_met"], "target", target, most)
    return trainable_as(model, method.finish(net, context))


def _resume(loop: Loop, path: Path, run: str, known: dict[str, Any]) -> None:
    loop.known, saved = known, read_checkpoint(path, run, loop.device)
    if not saved:
        return
    there = known | saved.get("known", {})
    other = next((name for name in known if there[name] != known[name]), None)
    require(other is None, "checkpoint", path.name, f"of another {other}; {AGAIN}")
    try:
        loop.load(saved)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        line = f"of another net, method or recipe; {AGAIN}"
        raise InputError(f"checkpoint = {path.name!r}: {line}") from error


def _known(model: nn.Module, net: nn.Module, loss: Callable, train: Any) -> dict[str, Any]:
    """What a checkpoint says of model, data and loss; of the first batch what is not drawn anew."""
    found, where = [], device_of(net).type  # each device rounds in its own way
    for _ in range(2):
        whole, (x, y) = _two(train)
        with evaluating(net), torch.no_grad():
            value = f"{float(loss(call(net, x), x, y)):.1e}"
        found.append({("first batch", digest_of(whole)), ("loss", value)})
    same = {f"{name} on {where}": value for name, value in sorted(found[0] & found[1])}
    return {"model": digest_of(model.state_dict()), "number of batches": train.steps} | same


def _two(train: Any) -> tuple[Batch, Batch]:
    """The first batch, and its first two samples."""
    first = next(iter(train.ordered(2)))
    return first, tree_map_only(Tensor, lambda t: t[:2], first)


def _seed(seed: Any) -> int:
    seed, allowed = plain(seed), "a whole number of at least 0 and below 2**64"
    require(type(seed) is int and 0 <= seed < 2**64, "seed", seed, allowed)
    return seed


def _device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # each kind of device has its own
        raise InputError(f"device = {str(device)!r}: {first_line(error)}") from error
    require(found.type != "meta", "device", str(device), "a device that computes")
    return found


def _arguments(model: nn.Module, x: Any) -> Any:
    """The positional arguments of the model's forward for a batch's `x`."""
    if not isinstance(x, dict):
        return x
    try:
        bound = inspect.signature(model.forward).bind(**x)
    except TypeError as error:
        raise InputError(f"train = {sorted(x)}: not what forward takes: {error}") from None
    line = f"{sorted(bound.kwargs)} by keyword only, or behind an argument that is not given"
    require(not bound.kwargs, "train", sorted(x), f"forward takes {line}: cannot be traced")
    return bound.args


def _on_device(
    model: nn.Module, device: torch.device, example: tuple[Tensor, ...], source: str
) -> nn.Module:
    """A copy of `model` on `device`, in channels_last, which is faster, where it runs in it."""
    net = copied(model).to(device)
    _run_alone(net, model, example, source)
    if any(p.dim() == 4 for p in net.parameters()):
        fast = channels_last(copied(net))
        try:
            with evaluating(fast), torch.no_grad():
                fast(*example)
        except RuntimeError:  # `view` needs the other layout
            return net
        return fast
    return net


def _run_alone(net: nn.Module, model: nn.Module, x: tuple[Tensor, ...], source: str) -> None:
    """Call `net`, a copy of `model`; `InputError` if it fails, grows or uses tensors of `model`."""
    there = _names(net)
    with evaluating(net), torch.no_grad(), _Without(model):
        run_on(net, x, source)
    line = "is made in the first forward pass: call the model once on a batch beforehand"
    made = min(_names(net) - there, default=None)
    require(made is None, "module", made, line)


def _names(net: nn.Module) -> set[str]:
    return {name for name, _ in (*net.named_modules(), *net.named_parameters())}


class _Without(TorchFunctionMode):
    """Within, an operation on a parameter or buffer of `model` raises `InputError`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        name = next((n for t in tree_leaves((args, kwargs)) if (n := self.names.get(id(t)))), None)
        line = "its copy still uses that of the original (a function made in `__init__`?)"
        require(name is None, "model", name, line)
        return func(*args, **(kwargs or {}))


def _batches(name: str, given: Any, seed: int, device: torch.device) -> Any:
    """Batches as the loop reads them: those of this library, or any by a `Loader`."""
    ours = all(callable(getattr(given, name, None)) for name in ("epoch", "ordered"))
    found = given if ours else Loader(given, seed, device, name)
    there = torch.device(getattr(found, "device", device)).type
    require(there == device.type, name, f"batches on {there}", f"on {device.type}, as the net")
    return found


def _require_kinds(model: Any, precision: Any, *given: Any) -> None:
    require_net(model)
    kinds = (
        ("method", Method, "a method such as GDP(target=0.5)"),
        ("recipe", Recipe, "a Recipe"),
        ("metrics", Metrics | None, "a Metrics"),
        ("probe", Probe | None, "a Probe"),
        ("checkpoint_seconds", float | int, "a number"),
    )
    for value, (name, kind, allowed) in zip(given, kinds, strict=True):
        require(isinstance(value, kind), name, type(value).__name__, allowed)
    allowed = ("fp32", "tf32", "bf16")
    require(precision in allowed, "precision", precision, f"allowed are {', '.join(allowed)}")
