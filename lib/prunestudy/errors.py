"""The one error that a user's input can cause."""

from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """A parameter that cannot be used: one line with its name, its value and what is allowed."""


_NAMED = 60  # names in one line


def require(ok: bool, parameter: str, value: Any, allowed: str) -> None:
    """Raise `InputError` naming `parameter`, `value` and what is `allowed`, unless `ok`."""
    if not ok:
        raise InputError(f"{parameter} = {value!r}: {allowed}")


def require_one_of(parameter: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `InputError` unless `value` is one of `choices`; of many, it names the first."""
    names = sorted(choices)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    require(value in names, parameter, value, f"allowed are {', '.join(names[:_NAMED])}{more}")
