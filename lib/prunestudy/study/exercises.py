"""Exercises that check themselves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def exercise(answer: Callable[..., Any], cases: Sequence[tuple[tuple, Any]]) -> None:
    """Check `answer` on `cases` of (arguments, expected); `AssertionError` if it is wrong."""
    for arguments, expected in cases:
        got = answer(*arguments)
        if got is None:
            return print(f"{answer.__name__}: not answered yet")
        given, wanted = (torch.as_tensor(value, dtype=torch.float64) for value in (got, expected))
        right = given.shape == wanted.shape and torch.allclose(given, wanted, atol=1e-6, rtol=1e-6)
        assert right, f"{answer.__name__}{arguments}: got {got}, expected {expected}"
    return print(f"{answer.__name__}: right")
