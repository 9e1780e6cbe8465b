"""Names that people type: of models, data sets, methods, papers, profiles and finished runs."""

import json
import sys
from collections.abc import Callable, Iterable

from prunestudy import datasets, methods, models
from prunestudy.errors import InputError
from prunestudy.papers import PROFILES, cards
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store, write_text
from prunestudy.study.settings import RunSettings


def _datasets() -> dict[str, str]:
    known = {name: datasets.info(name).title for name in datasets.names()}
    return known | {"folder:NAME": "your images, NAME/{train,test}/<class>/ below the data root"}


def _profiles() -> dict[str, str]:
    has = {name: [card.id for card in cards() if name in card.profiles] for name in PROFILES}
    return {name: ", ".join(papers) for name, papers in has.items()} | {"custom": "your own runs"}


# Kind of name to what gives the names and what each is.
LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "models": models.describe,
    "datasets": _datasets,
    "methods": lambda: {name: methods.method_class(name).title for name in methods.names()},
    "papers": lambda: {card.id: card.title for card in cards()},
    "profiles": _profiles,
}


def of_method(name: str) -> dict[str, str]:
    """What `train --set` takes for the method `name`: its targets, its parameters and defaults."""
    kind = methods.method_class(name)
    takes = " or ".join(f"{key} (of {methods.TARGETS[key]})" for key in kind.target_kinds)
    fields = kind.Params.model_fields.items()
    params = {f"params.{key}": json.dumps(field.get_default()) for key, field in fields}
    return {"method": f"{name} ({kind.title})", "target_kind": takes or "none, no target"} | params


def own(store: Store) -> list[Planned]:
    """The finished runs of the profile custom, in the form of planned ones."""
    records = [store.require(name) for name in store.names()]
    settings = [RunSettings.model_validate_json(json.dumps(r["settings"])) for r in records]
    return [Planned("custom", "train", "results", "", each.filled()) for each in settings]


def choose(begins: str, names: Iterable[str], store: Store) -> str:
    """The one of `names` that begins so; of several the one that `train` was last called for.

    Says on stderr which it took then. Raises `InputError` for none or several.
    """
    found = [name for name in names if name.startswith(begins)]
    if begins in found or len(found) == 1:
        return begins if begins in found else found[0]
    path = store.folder / "latest"
    latest = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if latest in found:
        print(f"{len(found)} runs begin so; this is the last trained: {latest}", file=sys.stderr)
        return latest
    some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    why = f"{len(found)} runs begin so, {some}; write more of the name" if found else "no such run"
    raise InputError(f"run = {begins!r}: {why}; `prunestudy list` names them")


def note_latest(store: Store, run: str) -> None:
    """Remember that `train` was called for `run`, for `choose`."""
    write_text(store.folder / "latest", run)
