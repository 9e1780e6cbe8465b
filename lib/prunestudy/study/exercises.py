"""Exercises that check themselves."""

import copy
import itertools
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from prunestudy import places
from prunestudy.errors import InputError

_RANDOM_CASES = 20


def exercise(
    answer: Callable[..., Any],
    cases: Sequence[tuple[tuple, Any]],
    draw: Callable[[torch.Generator], tuple] | None = None,
) -> None:
    """Check `answer` on `cases` of (arguments, expected); `AssertionError` if it is wrong.

    With `draw`, then also on random arguments, against the notebooks' solution of that name.
    """
    name, random = answer.__name__, torch.Generator().manual_seed(0)
    drawn = (draw(random) for _ in range(_RANDOM_CASES)) if draw else ()
    solved = ((case, _solution(name)(*copy.deepcopy(case))) for case in drawn)
    for arguments, expected in itertools.chain(cases, solved):
        got = answer(*copy.deepcopy(arguments))
        if got is None:
            return print(f"{name}: not answered yet")
        given, wanted = (torch.as_tensor(value, dtype=torch.float64) for value in (got, expected))
        right = given.shape == wanted.shape and torch.allclose(given, wanted, atol=1e-6, rtol=1e-6)
        if not right:  # an `assert` counts for nothing with PYTHONOPTIMIZE
            raise AssertionError(f"{name}{arguments}: got {got}, expected {expected}")
    return print(f"{name}: right")


@cache
def _solution(name: str) -> Callable[..., Any]:
    """The solution called `name`, as it stands in a notebook."""
    for path in sorted(places.notebooks().glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            code = re.search(rf"```python\n(.*?def {name}\(.*?)```", text, re.DOTALL)
            if code and "solution" in cell["metadata"].get("tags", ()):
                room: dict[str, Any] = {"torch": torch}
                exec(code[1], room)
                return room[name]
    raise InputError(f"exercise = {name}: no notebook has its solution")
