"""Exercises that check themselves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def exercise(answer: Callable[..., Any], cases: Sequence[tuple[tuple, Any]]) -> None:
    """Check `answer` on `cases` of (arguments, expected value).

    An answer that still returns None is not yet given; a wrong one raises `AssertionError` with
    the arguments, what came and what was expected.
    """
    for arguments, expected in cases:
        got = answer(*arguments)
        if got is None:
            print(f"{answer.__name__}: not answered yet")
            return
        wanted = torch.as_tensor(expected, dtype=torch.float64)
        given = torch.as_tensor(got, dtype=torch.float64)
        right = given.shape == wanted.shape and torch.allclose(given, wanted, atol=1e-6, rtol=1e-6)
        assert right, f"{answer.__name__}{arguments}: got {got}, expected {expected}"
    print(f"{answer.__name__}: right")
