"""The base class of all methods: settings, hooks of the training loop, and phases."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from inspect import get_annotations
from itertools import accumulate, chain, count, islice
from typing import Any, ClassVar, get_origin, get_type_hints

import torch
from pydantic import create_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunestudy.errors import require
from prunestudy.measure import Metrics
from prunestudy.shrink import folded
from prunestudy.values import Values, checked, plain

# What a target may be a share of.
TARGETS = {"sparsity": "weights", "macs": "MACs"} | {n: n for n in ("parameters", "rank", "energy")}
Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Phase:
    """A named part of the training: `share` of all steps, learning rates times `lr_scale`.

    `restart` begins the learning-rate schedule anew; otherwise it runs on from the phase before.
    `schedule` replaces the recipe's.
    """

    name: str
    share: float = 1.0
    lr_scale: float = 1.0
    restart: bool = False
    schedule: str | None = None


def then_fine_tune(
    name: str, share: float, lr_scale: float = 1.0, schedule: str | None = "constant"
) -> tuple[Phase, Phase]:
    """Phase `name`, and for the rest of the steps fine-tuning of what it left."""
    first = Phase(name, share, lr_scale, schedule=schedule)
    return first, Phase("fine_tune", 1 - share, restart=True)


@dataclass(frozen=True)
class At:
    """Where the training is when a hook is called.

    This is step `step` of `steps` in `phase`, from 1, and `total_step` of `total_steps` over all
    phases. Hooks of a step read the tensors only, each 0-d and on the device: `share` of the phase
    done before this step (float64), `lr` of the weights, and `loss`, that of the task.
    """

    phase: str
    step: int
    steps: int
    total_step: int
    total_steps: int
    share: Tensor
    lr: Tensor
    loss: Tensor

    @property
    def first(self) -> bool:
        """Whether the phase begins with this step."""
        return self.step == 1

    @property
    def last(self) -> bool:
        """Whether the phase ends with this step."""
        return self.step == self.steps


@dataclass
class Context:
    """What a method may look at: never test images.

    `example`: a tuple of input batches of two samples or more, on the device of the model;
    `loss(output, x, y)`: the task's; `score(model)`: the validation metric; `metrics`: what a net
    is judged by on other batches; `train(epoch)` and `validation()` start reading batches (x, y)
    anew; `generator`: for all random draws; `weight_decay`: what the optimiser adds to the
    gradient after `after_backward`; `period`: steps between two calls of `update`.
    """

    example: tuple[Tensor, ...]
    loss: Callable[[Any, Any, Any], Tensor] | None = None
    score: Callable[[nn.Module], float] | None = None
    metrics: Metrics | None = None
    train: Callable[[int], Iterable[Batch]] = lambda _: ()
    validation: Callable[[], Iterable[Batch]] = tuple
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    weight_decay: float = 0.0
    period: int = 1

    @property
    def device(self) -> torch.device:
        """The device of the model and of all batches."""
        return self.example[0].device

    def batches(self, count: int) -> Iterator[Batch]:
        """The first `count` training batches; fewer if there are no more, `InputError` if none."""
        return _some(islice(self.train(0), count)) if count else iter(())

    def samples(self, number: int) -> list[Batch]:
        """The first `number` samples of validation, or else of training; `InputError` if none."""
        return _first(self.validation(), number) or _first(_some(self.train(0)), number)

    def stream(self) -> Iterator[Batch]:
        """Training batches without end, epoch after epoch; `InputError` if there is none."""
        return chain.from_iterable(_some(self.train(epoch)) for epoch in count())


def _some(batches: Iterable[Batch]) -> Iterator[Batch]:
    batch = None
    for batch in batches:
        yield batch
    require(batch is not None, "context.train", "no batch", "batches (x, y)")


def _first(batches: Iterable[Batch], number: int) -> list[Batch]:
    found: list[Batch] = []
    for batch in batches:
        found.append(tree_map_only(Tensor, lambda t, n=number: t[:n], tuple(batch)))
        number -= samples_in(batch[0])
        if number <= 0:
            break
    return found


def samples_in(x: Any) -> int:
    """The number of samples of a batch's inputs `x`."""
    return len(tree_leaves(x)[0])


def call(model: nn.Module, x: Any) -> Any:
    """The output of `model` for a batch's inputs `x`: a tensor, a tuple of them, or a dict."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, list | tuple) else model(x)


def mean_loss(model: nn.Module, loss: Callable, batches: Iterable[Batch]) -> float:
    """The mean of `loss(output, x, y)` over all samples of `batches`."""
    total, samples = 0.0, 0
    with torch.no_grad():
        for x, y in batches:
            total += loss(call(model, x), x, y).item() * samples_in(x)
            samples += samples_in(x)
    return total / samples


def _noted(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `attach` or `finish` of a class: `finish` without `attach` raises `InputError`."""

    @wraps(hook)
    def noted(self: "Method", model: nn.Module, context: Context) -> Any:
        ready = self.attached or hook.__name__ == "attach"
        require(ready, "method", self.name, "is not attached to a model: call attach first")
        found, self.attached = hook(self, model, context), True
        return found

    return noted


class Method(nn.Module):
    """Base class of methods, which act through training hooks; itself, it trains the dense net.

    Settings are the annotated fields of the class: `GDP(target=0.5, of="macs", gate_lr=0.1)`.
    `target` is the share removed of what `of` counts, one of the class's `counts` (the first by
    default). Raises `InputError` for a bad setting.

    `attach` comes first, on a model that is on its device; then for each step `after_backward`, the
    optimisers, `after_step`; every `context.period` steps and at the end of each phase `update`;
    and `finish` last. `after_backward` and `after_step` read no value on the host, so that a step
    can be captured as a CUDA graph. The state is the `state_dict`. `revision` counts changes of a
    method's numbers; names of runs leave out the settings `unnamed`, which were defaults once.
    With `from_scratch` the run takes the shape of its parent only.
    """

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "dense"
    revision: ClassVar[int] = 1
    unnamed: ClassVar[dict[str, Any]] = {}
    counts: ClassVar[tuple[str, ...]] = ()
    from_scratch: ClassVar[bool] = False
    part: ClassVar[str] = "train"  # the name of the phase, where there is only one
    attached: ClassVar[bool] = False  # of a method: whether `attach` is done
    Settings: ClassVar[type[Values]] = Values

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hints = get_type_hints(cls, include_extras=True)
        fields = [name for name in get_annotations(cls) if get_origin(hints[name]) is not ClassVar]
        own, base = {n: (hints[n], getattr(cls, n)) for n in fields}, cls.__bases__[0].Settings
        cls.Settings = made = create_model(f"{cls.__name__}Settings", __base__=base, **own)
        made.__module__, made.__qualname__ = cls.__module__, f"{cls.__qualname__}.Settings"
        for hook in {"attach", "finish"} & vars(cls).keys():
            setattr(cls, hook, _noted(getattr(cls, hook)))

    def __init__(self, target: float | None = None, of: str | None = None, **settings: Any) -> None:
        super().__init__()
        target, counts = plain(target), self.counts or (None,)
        of = counts[0] if of is None else of
        takes = f"{self.name} takes {', '.join(self.counts) or 'no target'}"
        require(of in counts, "of", of, takes)
        allowed = f"the share of {TARGETS[of]} to remove, above 0 and below 1" if of else takes
        right = isinstance(target, float) and 0 < target < 1 if of else target is None
        require(right, "target", target, allowed)
        self.target, self.of = target, of
        self.settings = checked(self.Settings, settings)
        vars(self).update(dict(self.settings))

    def phases(self) -> tuple[Phase, ...]:
        """Parts of the training in order; their shares sum to 1."""
        return (Phase(self.part),)

    def check(self, model: nn.Module) -> None:
        """Raise `InputError` for a net that the method cannot take; `model` is only looked at."""

    @_noted
    def attach(self, model: nn.Module, context: Context) -> None:
        """Put gates or masks on `model`, in place, on its device; here, only try to fold it."""
        folded(model, context.example)  # what `finish` would refuse after all the training

    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimiser of the method's own variables; asked for at the start of each phase."""

    def trained(self, model: nn.Module, own: torch.optim.Optimizer | None) -> list[nn.Parameter]:
        """The parameters of `model` that the loop trains: all but those of `own`, the method's."""
        taken = {id(p) for group in own.param_groups for p in group["params"]} if own else set()
        return [p for p in model.parameters() if p.requires_grad and id(p) not in taken]

    def after_backward(self, at: At) -> None:
        """Change gradients before the optimisers step; tensors only."""

    def after_step(self, at: At) -> None:
        """Change weights, gates or masks after the optimisers' step; tensors only."""

    def update(self, at: At) -> None:
        """Decide on the host: new masks, closing, steering; and what the end of a phase needs."""

    @_noted
    def finish(self, model: nn.Module, context: Context) -> nn.Module:
        """A frozen plain module equal to `model` in eval mode; on target even without any step."""
        return folded(model, context.example)

    def log(self) -> dict[str, float]:
        """Numbers for the history; `kept` is the share left of what the target counts."""
        return {"kept": 1.0}

    def grew(self) -> float:
        """How many times larger the weights have become, for methods that watch it."""
        return 1.0

    def report(self) -> dict[str, Any]:
        """Results of the finished method by name, for the run's record."""
        return {}

    def at(self, step: int, total: int, loss: Tensor, lr: float = 1.0) -> At:
        """Where step number `step` (from 1) of `total` lies, for a training loop of one's own."""
        require(0 < step <= total, "step", step, f"from 1 to total, {total}")
        ends = boundaries(phases := self.phases(), total)
        index = next(i for i, end in enumerate(ends) if step <= end)
        begin = ends[index - 1] if index else 0
        here, steps = step - begin, ends[index] - begin
        share, rate = scalar((here - 1) / steps, loss.device), scalar(lr, loss.device)
        return At(phases[index].name, here, steps, step, total, share, rate, loss.detach())


def boundaries(phases: tuple[Phase, ...], total: int) -> list[int]:
    """The last step of each phase, of `total` steps; the last is `total`, whatever the rounding."""
    shares = accumulate(phase.share for phase in phases[:-1])
    return [*(round(total * share) for share in shares), total]


def scalar(value: float, device: torch.device | str) -> Tensor:
    """`value` as a 0-d float64 tensor on `device`."""
    return torch.tensor(value, dtype=torch.float64, device=device)


class _Scratch(Method):
    """The found shape from scratch: does pruning give good weights, or just a good shape?

    Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019. The parent's net keeps its
    layers and draws all weights anew, from the run's seed, as its factory does.
    """

    name, title, from_scratch = "scratch", "found shape, from scratch", True

    def attach(self, model: nn.Module, context: Context) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.generator.initial_seed())
            for module in model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            if hasattr(model, "initialise"):
                model.initialise()
