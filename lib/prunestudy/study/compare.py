"""What differs between two runs: settings, data, environment, results, history."""

from collections.abc import Iterator
from typing import Any

from prunestudy.study.records import Store

# Of a record; what identifies the run and its files differs always.
_PARTS = ("settings", "data", "environment", "status", "validation", "metrics", "cost")
_ABSENT = "-"


def differences(store: Store, a: str, b: str) -> list[tuple[str, str, str]]:
    """(key, value of run `a`, value of run `b`) where the two differ, in the order of a record.

    Keys are dotted paths such as `settings.recipe.lr`; "-" stands for what a run does not have.
    The last row says at which epoch the two histories part. Raises `InputError` for a record that
    is missing or damaged.
    """
    first, second = (_flat(store.require(run)) for run in (a, b))
    keys = list(dict.fromkeys((*first, *second)))
    keys.sort(key=lambda key: _PARTS.index(key.split(".")[0]))
    rows = [(key, first.get(key, _ABSENT), second.get(key, _ABSENT)) for key in keys]
    return [row for row in rows if row[1] != row[2]] + list(_history(store, a, b))


def _flat(record: dict[str, Any]) -> dict[str, str]:
    return dict(_leaves({part: record[part] for part in _PARTS if part in record}))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, str(value)


def _history(store: Store, a: str, b: str) -> Iterator[tuple[str, str, str]]:
    first, second = store.history(a), store.history(b)
    same = 0
    for mine, other in zip(first, second, strict=False):
        if mine != other:
            break
        same += 1
    if same < max(len(first), len(second)):
        rows = (f"{len(rows)} epochs" for rows in (first, second))
        yield (f"history from epoch {same + 1}", *rows)
