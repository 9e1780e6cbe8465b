"""What a run is: its resolved settings, and the name that is a hash of them."""

import functools
import hashlib
import json
import re
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from prunestudy import datasets, methods, models
from prunestudy.errors import InputError, require, require_one_of
from prunestudy.train import Recipe
from prunestudy.values import Values, checked


class Target(Values):
    """How much to remove: `value` is the share removed of what `kind` counts."""

    kind: Literal["sparsity", "macs", "parameters", "rank", "energy"]
    value: Annotated[float, Field(gt=0, lt=1)]


class RunSettings(Values):
    """Resolved settings of one run; equal settings are one run, whoever asks for it."""

    dataset: str
    dataset_version: str
    model: str
    pretrained: bool = False
    method: str
    revision: int
    params: dict[str, Any] = {}
    target: Target | None = None
    recipe: Recipe
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    validation: Annotated[int, Field(ge=1)] = 5000
    evaluate: Literal["test", "validation"] = "test"
    parent: "RunSettings | None" = None

    def filled(self) -> "RunSettings":
        """The same with today's defaults for parameters that did not exist when it was written.

        Raises `InputError` for parameters that are not valid any more.
        """
        params = methods.params_of(self.method, self.params).model_dump(mode="json")
        parent = self.parent.filled() if self.parent else None
        return self.model_copy(update={"params": params, "parent": parent})

    def model_copy(self, **values: Any) -> "RunSettings":
        """The same with `update`, as of any model; its name is another."""
        copied = super().model_copy(**values)
        copied.__dict__.pop("run", None)
        return copied

    @functools.cached_property
    def run(self) -> str:
        """Name of the run: method, model, data set and a hash of all that is not a default."""
        values = self.model_dump(mode="json", exclude_defaults=True, exclude={"parent", "params"})
        params = methods.params_of(self.method, self.params)
        values["params"] = params.model_dump(mode="json", exclude_defaults=True)
        values["parent"] = self.parent.run if self.parent else None
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self.method}-{self.model}-{self.dataset}")
        return f"{name[:_LONGEST]}-{digest}"

    @property
    def aim(self) -> Target | None:
        """The run's target, or the one that its parent had before it."""
        return self.target or (self.parent.aim if self.parent else None)

    @property
    def epochs(self) -> int:
        """Epochs of this run and of its parents together.

        Of a parent whose shape alone is taken nothing counts.
        """
        inherits = self.parent and not methods.method_class(self.method).from_scratch
        return self.recipe.epochs + (self.parent.epochs if inherits else 0)


_LONGEST = 200  # characters of a name before the hash: it is a folder, and paths may be longer


def resolve(
    *,
    dataset: str,
    model: str,
    method: str,
    params: dict[str, Any] | None = None,
    root: str = "",
    **rest: Any,
) -> RunSettings:
    """Check every name and value and return the settings with all defaults filled in.

    Needs no data on disk, but for an image folder, which is looked for below the data `root`.
    Raises `InputError` with one line for the first thing that is wrong.
    """
    require_one_of("model", model, models.names())
    kind = methods.method_class(method)
    known = datasets.info(dataset, root or None)
    target, takes = rest.get("target"), " or ".join(map(methods.TARGETS.get, kind.target_kinds))
    allowed = _share_of(takes) if takes else "no target"
    right = bool(target) == bool(takes)
    require(right, "target", target and target.value, f"{method} takes {allowed}")
    shaped = not kind.from_scratch or rest.get("parent") is not None
    require(shaped, "parent", None, f"{method} needs the run whose shape it takes; see a card")
    own = methods.params_of(method, params or {}).model_dump(mode="json")
    facts = {"dataset": dataset, "dataset_version": known.version, "revision": kind.revision}
    names = {"model": model, "method": method, "params": own}
    settings = checked(RunSettings, facts | names | rest)
    trained = settings.recipe.epochs > 0 or settings.parent is not None or settings.pretrained
    allowed = "at least 1 for a run without a parent or pretrained weights"
    require(trained, "epochs", settings.recipe.epochs, allowed)
    there = models.has_pretrained(model) and not settings.parent
    allowed = "for a run without a parent, of a net that torchvision has weights of"
    require(not settings.pretrained or there, "pretrained", settings.pretrained, allowed)
    _fits(settings, known)
    return settings


def own_settings(values: dict[str, Any], root: str = "") -> RunSettings:
    """Return the settings of a run outside the cards, from flat `values`.

    Keys are those of a run (dataset, model, method, seed, validation, ...), of the recipe (epochs,
    lr, ...), `target` (share removed), `target_kind` (of what, a key of `methods.TARGETS`) and
    `params.NAME`. Raises `InputError`.
    """
    values = {"dataset": "digits", "model": "lenet300", "method": "dense", "seed": 0} | values
    values = {"epochs": 20, "lr": 0.05, "validation": 200} | values
    params = {k.removeprefix("params."): v for k, v in values.items() if k.startswith("params.")}
    own = {k: v for k, v in values.items() if k in _OWN}
    rest = {k: v for k, v in values.items() if k not in own and not k.startswith("params.")}
    allowed = sorted({*_OWN, *Recipe.model_fields, "target", "target_kind", "params.NAME"})
    unknown = sorted(set(rest) - set(allowed))
    require(not unknown, "setting", unknown and unknown[0], f"allowed are {', '.join(allowed)}")
    target, kind = rest.pop("target", None), rest.pop("target_kind", None)
    made = checked(Recipe, rest)
    if target is not None:
        kinds = methods.method_class(own["method"]).target_kinds or ("sparsity",)
        target = target_of(kind or kinds[0], target)
    return resolve(params=params, recipe=made, target=target, root=root, **own)


_OWN = ("dataset", "model", "pretrained", "method", "seed", "precision", "threads", "validation")


def target_of(kind: str, value: Any) -> Target:
    """Return the checked target of removing the share `value` of what `kind` counts."""
    require_one_of("target_kind", kind, methods.TARGETS)
    try:
        return checked(Target, {"kind": kind, "value": value})
    except InputError:
        raise InputError(f"target = {value!r}: {_share_of(methods.TARGETS[kind])}") from None


def _share_of(what: str) -> str:
    return f"the share of {what} to remove, above 0 and below 1"


@functools.lru_cache(maxsize=32)
def _shapes_of(model: str, shape: tuple[int, int, int]) -> torch.nn.Module:
    """The net without numbers, to be looked at only."""
    with torch.device("meta"):
        return models.build(model, shape, 1)


def _fits(settings: RunSettings, known: datasets.DatasetInfo) -> None:
    """Refuse a net that cannot take these images, a method that cannot take the net, and so on."""
    fits = (models.task_of(settings.model) == "segment") == known.masks
    allowed = f"{known.name} has {'masks' if known.masks else 'one label an image'}"
    require(fits, "model", settings.model, allowed)
    target = (settings.target.value, settings.target.kind) if settings.target else ()
    method = methods.build(settings.method, settings.params, *target)
    try:
        net = _shapes_of(settings.model, (known.channels, known.height, known.width))
    except InputError as error:
        raise InputError(f"model = {settings.model!r}: not for {known.name}: {error}") from None
    method.check(net)
    plan, side = settings.recipe, min(known.height, known.width)
    total, held_out = known.train_images, settings.validation
    left, size = total - held_out, plan.batch_size
    require(plan.shift < side, "shift", plan.shift, f"below {side}, the images' size in pixels")
    require(held_out < total, "validation", held_out, f"below {total}, the training images")
    require(size <= left, "batch_size", size, f"at most {left}, the training images left")
    require(plan.pieces <= size, "pieces", plan.pieces, f"at most {size}, the images of a batch")
