"""What a run is: its resolved settings, and the name that is a hash of them."""

import functools
import hashlib
import json
import re
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from prunestudy import datasets, measure, methods, models
from prunestudy.errors import InputError, require, require_one_of
from prunestudy.papers import RunRecipe
from prunestudy.papers.claims import TargetKind
from prunestudy.values import Values, checked


class Target(Values):
    """How much to remove: `value` is the share removed of what `kind` counts."""

    kind: TargetKind
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
    recipe: RunRecipe
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    validation: Annotated[int, Field(ge=1)] = 5000
    evaluate: Literal["test", "validation"] = "test"
    parent: "RunSettings | None" = None

    def model_copy(self, **values: Any) -> "RunSettings":
        """The same with `update`, as of any model; its name is another."""
        copied = super().model_copy(**values)
        copied.__dict__.pop("run", None)
        return copied

    @functools.cached_property
    def run(self) -> str:
        """Name of the run: method, model, data set and a hash of all that is not a default."""
        values = self.model_dump(mode="json", exclude_defaults=True, exclude={"parent", "params"})
        values["params"] = self._named()
        values["parent"] = self.parent.run if self.parent else None
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self.method}-{self.model}-{self.dataset}")
        return f"{name[:200]}-{digest}"  # it is a folder, whose name may have 255 bytes

    def _named(self) -> dict[str, Any]:
        """The method's settings but for those that names leave out, which old records lack."""
        left_out = methods.method_class(self.method).unnamed
        params = methods.params_of(self.method, left_out | self.params)
        changed = params.model_dump(mode="json", exclude_defaults=True)
        every = changed | params.model_dump(mode="json", include=set(left_out))
        return {n: v for n, v in every.items() if n not in left_out or v != left_out[n]}

    def kept(self) -> dict[str, Any]:
        """What a record keeps: all settings, of the parents only those that are no defaults."""
        parent = self.parent and self.parent.model_dump(mode="json", exclude_defaults=True)
        return self.model_dump(mode="json", exclude={"parent"}) | {"parent": parent}

    @property
    def aim(self) -> Target | None:
        """The run's target, or the one that its parent had before it."""
        return self.target or (self.parent.aim if self.parent else None)

    @property
    def epochs(self) -> int:
        """Epochs of this run and its parents, but for a parent whose shape alone is taken."""
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
    kind, known = methods.method_class(method), datasets.info(dataset, root)
    parent = rest.get("parent")
    allowed = f"{method} needs a parent run, whose architecture it trains; see a card"
    require(bool(parent) or not kind.from_scratch, "parent", None, allowed)
    own = methods.params_of(method, params or {}).model_dump(mode="json")
    facts = {"dataset": dataset, "dataset_version": known.version, "revision": kind.revision}
    facts |= {"model": model, "method": method, "params": own}
    settings = checked(RunSettings, facts | rest)
    pretrained, epochs = settings.pretrained, settings.recipe.epochs
    allowed = "at least 1 for a run without a parent or pretrained weights"
    require(bool(epochs or parent or pretrained), "epochs", epochs, allowed)
    there = models.has_pretrained(model) and not parent
    allowed = "for a run without a parent, of a net that torchvision has weights of"
    require(there or not pretrained, "pretrained", pretrained, allowed)
    fits = (models.task_of(model) == "segment") == known.masks
    allowed = f"{known.name} has {'masks' if known.masks else 'one label an image'}"
    require(fits, "model", model, allowed)
    built = method_of(settings)
    try:
        net = dense_net(model, known)
    except InputError as error:
        raise InputError(f"model = {model!r}: not for {known.name}: {error}") from None
    built.check(net)
    recipe, side, total = settings.recipe, min(known.height, known.width), known.train_images
    held_out, size, left = settings.validation, recipe.batch_size, total - settings.validation
    require(recipe.shift < side, "shift", recipe.shift, f"below {side}, the images' size in pixels")
    require(left > 0, "validation", held_out, f"below {total}, the training images")
    require(size <= left, "batch_size", size, f"at most {left}, the training images left")
    allowed = f"at most {size}, the images of a batch"
    require(recipe.pieces <= size, "pieces", recipe.pieces, allowed)
    return settings


_OWN = ("dataset", "model", "pretrained", "method", "seed", "precision", "threads", "validation")


def own_settings(values: dict[str, Any], root: str = "") -> RunSettings:
    """Return the settings of a run outside the cards, from flat `values`; raises `InputError`.

    Keys are those of a run (dataset, model, method, seed, validation, ...), of the recipe (epochs,
    lr, ...), `target` (share removed), `target_kind` (of what, a key of `methods.TARGETS`) and
    `params.NAME`.
    """
    rest = {"dataset": "digits", "model": "lenet300", "method": "dense", "seed": 0}
    rest |= {"epochs": 20, "lr": 0.05, "validation": 200} | values
    allowed = sorted({*_OWN, *RunRecipe.model_fields, "target", "target_kind", "params.NAME"})
    params = {k.removeprefix("params."): rest.pop(k) for k in values if k.startswith("params.")}
    for name in sorted(rest):
        require(name in allowed, "setting", name, f"allowed are {', '.join(allowed)}")
    own = {name: rest.pop(name) for name in _OWN if name in rest}
    target = target_of(own["method"], rest.pop("target", None), rest.pop("target_kind", None))
    return resolve(params=params, recipe=RunRecipe(**rest), target=target, root=root, **own)


def target_of(method: str, value: Any, kind: str | None = None) -> Target | None:
    """The checked target of a run of `method`: to remove the share `value` of what `kind` counts.

    `kind` is by default what the method counts first. Raises `InputError` for a wrong one, and for
    a value that is missing, wrong or too much.
    """
    counts = methods.method_class(method).counts
    allowed = f"{method} takes {' or '.join(counts) or 'no target'}"
    require(kind is None or kind in counts, "target_kind", kind, allowed)
    made = methods.build(method, {}, value, kind)
    found = {"kind": made.of, "value": made.target}
    return None if made.target is None else checked(Target, found, "target")


@functools.lru_cache(maxsize=64)
def dense_net(model: str, known: datasets.DatasetInfo) -> torch.nn.Module:
    """The dense net for images as in `known`; on the meta device, for inspection only."""
    with torch.device("meta"):
        return models.build(model, known.shape, known.num_classes)


@functools.lru_cache(maxsize=64)
def dense_macs(model: str, known: datasets.DatasetInfo) -> int:
    """MACs of that net, of one image."""
    return measure.macs(dense_net(model, known), torch.zeros(1, *known.shape, device="meta"))


def method_of(settings: RunSettings) -> methods.Method:
    """The method of a run, as its settings say."""
    target = (settings.target.value, settings.target.kind) if settings.target else ()
    params = methods.method_class(settings.method).unnamed | settings.params
    return methods.build(settings.method, params, *target)
