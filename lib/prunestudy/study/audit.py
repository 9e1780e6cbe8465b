"""What became of one weight: when it was cut, and at what magnitude."""

import math

import numpy as np

from prunestudy.errors import InputError, require, require_one_of
from prunestudy.study.records import Store


def weight_line(store: Store, run: str, layer: str, index: str) -> str:
    """Return the answer for the weight of `layer` (`conv1` or `conv1.weight`) at `index`.

    `index` is its place, `3,0,2,2`, or a single number that counts through the layer. Raises
    `InputError` for a run whose method keeps no trail, a missing file, a wrong layer or index.
    """
    path = store.cuts(run)
    if not path.exists():
        raise InputError(
            f"cuts = {run}: no file (it is not tracked, and only magnitude_attention and dpf write"
            " one); delete the run's folder to train it again"
        )
    cuts = store.read_cuts(run)
    name = layer if layer.endswith(".weight") else f"{layer}.weight"
    names = [key.removesuffix(":when") for key in cuts if key.endswith(":when")]
    require_one_of("layer", name, names)
    place = _place(index, cuts[f"{name}:when"].shape)
    where = f"{name}[{', '.join(map(str, place))}]"
    return f"{where}: {_fate(cuts, name, place)}"


def _fate(cuts: dict[str, np.ndarray], name: str, place: tuple[int, ...]) -> str:
    number, times = int(cuts[f"{name}:when"][place]), int(cuts[f"{name}:times"][place])
    if number == 0:
        return "kept, never cut"
    steps, threshold = cuts["step"], cuts["threshold"][number - 1]
    size = cuts[f"{name}:magnitude"][place]
    when = f"at mask update {number} of {len(steps)} (step {steps[number - 1]})"
    why = f"|w| = {size:.4g}, the smallest kept was {threshold:.4g}"
    before = "" if times == 1 else f"; cut {times} times, and back each time before"
    if cuts[f"{name}:kept"][place]:
        return f"kept; last cut {when}, {why}, and came back; cut {times} times in all"
    return f"cut for good {when}: {why}{before}"


def _place(index: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    allowed = f"a place in {list(shape)}, as 1,2,..., or a number below {math.prod(shape)}"
    try:
        numbers = tuple(int(part) for part in index.split(","))
    except ValueError:
        raise InputError(f"index = {index!r}: {allowed}") from None
    if len(numbers) == 1 and len(shape) > 1:
        require(0 <= numbers[0] < math.prod(shape), "index", index, allowed)
        return tuple(int(i) for i in np.unravel_index(numbers[0], shape))
    inside = len(numbers) == len(shape) and all(
        0 <= n < size for n, size in zip(numbers, shape, strict=True)
    )
    require(inside, "index", index, allowed)
    return numbers
