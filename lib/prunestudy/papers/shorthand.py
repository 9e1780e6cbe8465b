"""What a card says once for several places, and how it is written out.

- `[profiles.NAME]`: what an experiment may have (net, data, recipes, targets, seeds) is the default
  of the profile's experiments; of a recipe they state the keys that differ. `start` states what
  differs from `recipe`, but for a start of 0 epochs, which trains nothing.
- `[sets]`: a list of methods has a name, which stands for them in `methods` of an experiment or of
  a later set and in a rule ("NAME, fine-tuned": all at that stage).
  `{ set = "NAME", seeds = 3 }` changes all of them; `params` are added to theirs.
- `methods = ["dense"]`: a name that is no set's is a method with its defaults.
- `[...experiments.readings.METHOD]`: its other `params` by the reading's name, each an entry more.
- `[[published]]`, `[[ranks]]`, `[[unknown]]` and experiments that are alike are `rows` of `columns`
  under what they share; a row may lack the last ones.
"""

from collections.abc import Iterator
from typing import Any

from prunestudy.errors import require, require_one_of

_DEFAULTS = ("dataset", "model", "start", "recipe", "target_kind", "targets", "seeds", "validation")
_Sets = dict[str, list[dict[str, Any]]]


def written_out(values: dict[str, Any]) -> dict[str, Any]:
    """The card with every claim, number and experiment whole; what is no shorthand stays as it is.

    Raises `AttributeError`, `KeyError` or `TypeError` where a card is of another form, which the
    schema then refuses.
    """
    sets: _Sets = {}
    for name, entries in values.get("sets", {}).items():
        sets[name] = list(_entries(entries, sets))
    whole = {key: value for key, value in values.items() if key != "sets"}
    for part in {"published", "ranks", "unknown"} & values.keys():
        whole[part] = [row for group in values[part] for row in _rows(group)]
    whole["claims"] = [_claim(claim, sets) for claim in values.get("claims", [])]
    whole["profiles"] = {name: _profile(p, sets) for name, p in values["profiles"].items()}
    return whole


def _rows(group: dict[str, Any]) -> list[dict[str, Any]]:
    shared = {key: value for key, value in group.items() if key not in ("columns", "rows")}
    columns, rows = group.get("columns", []), group.get("rows", [[]])
    for row in rows:
        allowed = f"at most {len(columns)} values, one for each of columns"
        require(len(row) <= len(columns), "row", row, allowed)
    return [shared | dict(zip(columns, row, strict=False)) for row in rows]


def _claim(claim: dict[str, Any], sets: _Sets) -> dict[str, Any]:
    tests = []
    for rule in claim.get("tests", []):
        method, *more = _labels(rule["method"], sets)
        require(not more, "method", rule["method"], "a method, or a set of one")
        against = [label for name in rule.get("against", []) for label in _labels(name, sets)]
        tests.append(rule | {"method": method, "against": against})
    return claim | {"tests": tests}


def _labels(name: str, sets: _Sets) -> list[str]:
    known, _, stage = name.partition(", ")
    if known not in sets:
        return [name]
    entries = [(e["method"], e.get("variant"), e.get("stage"), stage) for e in sets[known]]
    return [", ".join(filter(None, words)) for words in entries]


def _profile(profile: dict[str, Any], sets: _Sets) -> dict[str, Any]:
    shared = {key: profile[key] for key in _DEFAULTS if key in profile}
    own = {key: value for key, value in profile.items() if key not in shared}
    experiments = [row for group in profile["experiments"] for row in _rows(group)]
    return own | {"experiments": [_experiment(e, shared, sets) for e in experiments]}


def _experiment(own: dict[str, Any], shared: dict[str, Any], sets: _Sets) -> dict[str, Any]:
    whole = {key: value for key, value in (shared | own).items() if key != "readings"}
    whole["methods"] = [
        *_entries(own.get("methods", []), sets),
        *(
            {"method": method, "variant": variant, "params": params}
            for method, readings in own.get("readings", {}).items()
            for variant, params in readings.items()
        ),
    ]
    recipe = shared.get("recipe", {}) | own.get("recipe", {})
    if "start" in whole:
        start = shared.get("start", {}) | own.get("start", {})
        whole["start"] = start if start.get("epochs") == 0 else recipe | start
    return whole | {"recipe": recipe}


def _entries(methods: list[Any], sets: _Sets) -> Iterator[dict[str, Any]]:
    """The entries that `methods` of an experiment, or of a set, stand for."""
    for item in methods:
        changes = {"set" if item in sets else "method": item} if isinstance(item, str) else item
        if "set" in changes:
            require_one_of("set", changes["set"], sets)
        own = {key: value for key, value in changes.items() if key != "set"}
        for entry in sets[changes["set"]] if "set" in changes else [{}]:
            params = entry.get("params", {}) | own.get("params", {})
            yield entry | own | ({"params": params} if params else {})
