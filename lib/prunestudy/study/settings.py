"""What a run is: its resolved settings, and the name that is a hash of them."""

import functools
import hashlib
import json
import re
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunestudy import datasets, methods, models
from prunestudy.errors import InputError, require, require_one_of
from prunestudy.train import Recipe


class Target(BaseModel):
    """How much to remove: `value` is the share removed of what `kind` counts."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["sparsity", "macs", "parameters", "rank", "energy"]
    value: Annotated[float, Field(gt=0, lt=1)]


class RunSettings(BaseModel):
    """Resolved settings of one run; equal settings are one run, whoever asks for it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

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
    threads: Annotated[int, Field(ge=1)] = 1
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

    @property
    def run(self) -> str:
        """Name of the run: method, model, data set and a hash of all that is not a default."""
        values = self.model_dump(mode="json", exclude_defaults=True, exclude={"parent", "params"})
        params = methods.params_of(self.method, self.params)
        values["params"] = params.model_dump(mode="json", exclude_defaults=True)
        values["parent"] = self.parent.run if self.parent else None
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return re.sub(
            r"[^A-Za-z0-9_.-]", "_", f"{self.method}-{self.model}-{self.dataset}-{digest}"
        )

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
    known = _facts(dataset, root)
    target = rest.get("target")
    require(
        bool(target) == bool(kind.target_kinds), "target", target, f"{method} takes {_takes(kind)}"
    )
    shaped = not kind.from_scratch or rest.get("parent") is not None
    require(shaped, "parent", None, f"{method} needs the run whose shape it takes; see a card")
    try:
        settings = RunSettings(
            dataset=dataset,
            dataset_version=known.version,
            model=model,
            method=method,
            revision=kind.revision,
            params=methods.params_of(method, params or {}).model_dump(mode="json"),
            **rest,
        )
    except ValidationError as error:
        raise InputError(first_error(error)) from None
    trained = settings.recipe.epochs > 0 or settings.parent is not None or settings.pretrained
    allowed = "at least 1 for a run without a parent or pretrained weights"
    require(trained, "epochs", settings.recipe.epochs, allowed)
    there = models.has_pretrained(model) and not settings.parent
    allowed = "for a run without a parent, of a net that torchvision has weights of"
    require(not settings.pretrained or there, "pretrained", settings.pretrained, allowed)
    wanted = (target.value, target.kind) if target else ()
    _fits(settings, known, methods.build(method, settings.params, *wanted))
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
    unknown = sorted(set(rest) - set(Recipe.model_fields) - _TARGET)
    allowed = sorted({*_OWN, *Recipe.model_fields, *_TARGET})
    require(not unknown, "setting", unknown and unknown[0], f"allowed are {', '.join(allowed)}")
    target, kind = rest.pop("target", None), rest.pop("target_kind", None)
    made = recipe(**rest)
    if target is not None:
        target = target_of(kind or first_kind(str(own["method"])), target)
    return resolve(params=params, recipe=made, target=target, root=root, **own)


_OWN = ("dataset", "model", "pretrained", "method", "seed", "precision", "threads", "validation")
_TARGET = {"target", "target_kind"}


def first_kind(method: str) -> str:
    """What a target of `method` is a share of, unless another kind is named."""
    return (methods.method_class(method).target_kinds or ("sparsity",))[0]


def target_of(kind: str, value: Any) -> Target:
    """Return the checked target of removing the share `value` of what `kind` counts."""
    require_one_of("target_kind", kind, methods.TARGETS)
    try:
        return Target(kind=kind, value=value)
    except ValidationError:
        allowed = f"the share of {methods.TARGETS[kind]} to remove, above 0 and below 1"
        raise InputError(f"target = {value!r}: {allowed}") from None


def first_error(error: ValidationError) -> str:
    """One line for the first thing that pydantic found wrong."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where} = {first['input']!r}: {first['msg'].lower()}"


def recipe(**values: Any) -> Recipe:
    """Return the checked recipe, or raise `InputError` naming the wrong value."""
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    try:
        return Recipe(**(values | lists))
    except ValidationError as error:
        raise InputError(first_error(error)) from None


def _facts(dataset: str, root: str) -> datasets.DatasetInfo:
    if not str(dataset).startswith("folder:"):
        require_one_of("dataset", dataset, datasets.names())
    return datasets.info(dataset, root or None)


def _takes(kind: type[methods.Method]) -> str:
    what = " or ".join(methods.TARGETS[name] for name in kind.target_kinds)
    return f"the share of {what} to remove, above 0 and below 1" if what else "no target"


@functools.lru_cache(maxsize=32)
def _shapes_of(model: str, shape: tuple[int, int, int]) -> torch.nn.Module:
    """The net without numbers, to be looked at only."""
    with torch.device("meta"):
        return models.build(model, shape, 1)


def _fits(settings: RunSettings, known: datasets.DatasetInfo, method: methods.Method) -> None:
    fits = (models.task_of(settings.model) == "segment") == known.masks
    allowed = f"{known.name} has {'masks' if known.masks else 'one label an image'}"
    require(fits, "model", settings.model, allowed)
    # A net that cannot take these images says so here, and a method that cannot take the net.
    method.check(_shapes_of(settings.model, (known.channels, known.height, known.width)))
    shift, side = settings.recipe.shift, min(known.height, known.width)
    require(shift < side, "shift", shift, f"below {side}, the images' size in pixels")
    total = known.train_images
    held_out = settings.validation
    require(held_out < total, "validation", held_out, f"below {total}, the training images")
    left = total - held_out
    size = settings.recipe.batch_size
    require(size <= left, "batch_size", size, f"at most {left}, the training images left")
    pieces = settings.recipe.pieces
    require(pieces <= size, "pieces", pieces, f"at most {size}, the images of a batch")
