"""Abbreviations in cards, for values that hold in several places.

- `[profiles.NAME]` has defaults for its experiments; recipes are merged key by key, `start` over
  `recipe` unless it has 0 epochs and trains nothing.
- `[sets]` names lists of methods, for experiments, later sets and rules ("NAME, fine-tuned": all at
  that stage). `{ set = "NAME", seeds = 3 }` changes all of them; `params` are merged. Any other
  string is a method with its defaults.
- `[...experiments.readings.METHOD]` adds an entry for each reading: its name and its `params`. Such
  an experiment is an ablation, and one with `grids` a search, unless its `purpose` says otherwise.
- An experiment whose `model` or `dataset` is a list is one for each pair, by default named so.
- `[[...experiments.grids]]` adds `methods` at every combination of a grid's lists: `lr`, and
  parameters of the method by name; its other values hold for all entries.
- A group is what its `rows` of `columns` share; a row may lack the last columns. `[[tests]]` name
  their `claim`.
"""

from collections.abc import Iterator
from itertools import chain, product
from typing import Any

from prunestudy.errors import require, require_one_of

_DEFAULTS = "dataset model start recipe target_kind targets first_seed seeds validation".split()
_Table = dict[str, Any]
_Sets = dict[str, list[_Table]]


def written_out(values: _Table) -> _Table:
    """Return the card with every claim, number and experiment in full.

    Raises `InputError`, and without a card's form `AttributeError`, `KeyError` or `TypeError`.
    """
    sets: _Sets = {}
    for name, methods in values.get("sets", {}).items():
        sets[name] = list(_entries(methods, sets))
    whole = {key: value for key, value in values.items() if key not in ("sets", "tests")}
    for part in {"strongest", "published", "ranks", "unknown"} & values.keys():
        whole[part] = _rows(values[part])
    whole["claims"], claims = _rows(values.get("claims", [])), {}
    for claim in whole["claims"]:
        claims[claim["id"]] = claim["tests"] = [
            _rule(rule, sets) for rule in claim.get("tests", [])
        ]
    for test in _rows(values.get("tests", [])):
        name = test.pop("claim", "")
        require_one_of("claim", name, claims)
        claims[name].append(_rule(test, sets))
    whole["profiles"] = {name: _profile(p, sets) for name, p in values["profiles"].items()}
    return whole


def _rows(groups: list[_Table]) -> list[_Table]:
    whole = []
    for group in groups:
        shared = {key: value for key, value in group.items() if key not in ("columns", "rows")}
        columns = group.get("columns", [])
        for row in group.get("rows", [[]]):
            allowed = f"at most {len(columns)} values, one for each of columns"
            require(len(row) <= len(columns), "row", row, allowed)
            whole.append(shared | dict(zip(columns, row, strict=False)))
    return whole


def _rule(rule: _Table, sets: _Sets) -> _Table:
    whole = dict(rule)
    for side in {"method", "against"} & rule.keys():
        whole[side], *more = _labels(rule[side], sets)
        require(not more, side, rule[side], "a method, or a set of one")
    controls = [label for name in rule.get("controls", []) for label in _labels(name, sets)]
    return whole | ({"controls": controls} if controls else {})


def _labels(name: str, sets: _Sets) -> list[str]:
    known, _, stage = name.partition(", ")
    if known not in sets:
        return [name]
    entries = [(e["method"], e.get("variant"), e.get("stage"), stage) for e in sets[known]]
    return [", ".join(filter(None, words)) for words in entries]


def _profile(profile: _Table, sets: _Sets) -> _Table:
    shared = {key: profile[key] for key in _DEFAULTS if key in profile}
    own = {key: value for key, value in profile.items() if key not in shared}
    groups = (_experiments(each, shared, sets) for each in _rows(profile["experiments"]))
    return own | {"experiments": [*chain.from_iterable(groups)]}


def _experiments(own: _Table, shared: _Table, sets: _Sets) -> Iterator[_Table]:
    """One experiment for each net and data set."""
    whole = shared | own
    readings, grids = whole.pop("readings", {}), whole.pop("grids", [])
    whole["methods"] = list(_entries(own.get("methods", []), sets))
    for method, named in readings.items():
        found = [{"method": method, "variant": n, "params": params} for n, params in named.items()]
        whole["methods"] += found
    for grid in grids:
        whole["methods"] += _grid(grid, sets)
    whole.setdefault("purpose", "search" if grids else "ablation" if readings else "results")
    whole["recipe"] = recipe = shared.get("recipe", {}) | own.get("recipe", {})
    if "start" in whole:
        start = shared.get("start", {}) | own.get("start", {})
        whole["start"] = start if start.get("epochs") == 0 else recipe | start
    pair = whole.get("model"), whole.get("dataset")
    for model, dataset in product(*(v if isinstance(v, list) else [v] for v in pair)):
        yield {"name": f"{model}_{dataset}"} | whole | {"model": model, "dataset": dataset}


def _grid(grid: _Table, sets: _Sets) -> Iterator[_Table]:
    rest = dict(grid)
    methods = rest.pop("methods")
    lists = {n: rest.pop(n) for n in grid if isinstance(rest.get(n), list)}
    for entry in _entries(methods, sets):
        own = entry.get("variant")
        label = ", ".join(filter(None, (entry["method"], own, entry.get("stage"))))
        for values in product(*lists.values()):
            params = dict(zip(lists, values, strict=True))
            variant = ", ".join(filter(None, (own, *(f"{k} {v:g}" for k, v in params.items()))))
            at = {"variant": variant, "lr": params.pop("lr"), "grid": label}
            yield entry | rest | at | {"params": entry.get("params", {}) | params}


def _entries(methods: list[Any], sets: _Sets) -> Iterator[_Table]:
    for item in methods:
        own = {"set" if item in sets else "method": item} if isinstance(item, str) else dict(item)
        if name := own.pop("set", ""):
            require_one_of("set", name, sets)
        for entry in sets[name] if name else [{}]:
            params = entry.get("params", {}) | own.get("params", {})
            yield entry | own | ({"params": params} if params else {})
