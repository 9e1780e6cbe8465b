"""Looking into finished runs: what differs between two, and what became of one weight."""

import math

import numpy as np
import pandas as pd

from prunestudy.errors import InputError, require_one_of
from prunestudy.study.records import Store

# Of a record; what identifies the run and its files differs always.
_PARTS = ("settings", "data", "environment", "status", "validation", "metrics", "cost")


def differences(store: Store, a: str, b: str) -> pd.DataFrame:
    """A column each for runs `a` and `b`, a row for all that differs; "-" for what one lacks.

    The index is dotted paths such as `settings.recipe.lr`; the last row says at which epoch the
    two histories part. Raises `InputError` for a record that is missing or damaged.
    """
    records = [store.require(run) for run in (a, b)]
    flat = [pd.json_normalize({part: record[part] for part in _PARTS}) for record in records]
    table = pd.concat(flat).astype(object).T.fillna("-").astype(str).set_axis([a, b], axis=1)
    table = table[table.iloc[:, 0] != table.iloc[:, 1]]
    first, second = (list(zip(*record["history"].values(), strict=True)) for record in records)
    if first != second:
        same = [one == other for one, other in zip(first, second, strict=False)]
        at = f"history from epoch {[*same, False].index(False) + 1}"
        table.loc[at] = f"{len(first)} epochs", f"{len(second)} epochs"
    return table


def weight_line(store: Store, run: str, layer: str, index: str) -> str:
    """Say when the weight of `layer` (`conv1` or `conv1.weight`) at `index` was cut, and why.

    `index` is its place, `3,0,2,2`, or a single number that counts through the layer. Raises
    `InputError` for a run whose method keeps no trail, a missing file, a wrong layer or index.
    """
    if not (store.path(run) / "cuts.safetensors").exists():
        why = "no file (it is not tracked, and only magnitude_attention and dpf write one)"
        raise InputError(f"cuts = {run}: {why}; `prunestudy run RUN --weights` makes it")
    cuts, name = store.kept(run, "cuts"), layer.removesuffix(".weight") + ".weight"
    names = [key.removesuffix(":when") for key in cuts if key.endswith(":when")]
    require_one_of("layer", name, names)
    place = _place(index, cuts[f"{name}:when"].shape)
    of = {key: cuts[f"{name}:{key}"][place] for key in ("when", "times", "magnitude", "kept")}
    where, number = f"{name}[{', '.join(map(str, place))}]: ", of["when"]
    if number == 0:
        return where + "kept, never cut"
    step, smallest = cuts["step"][number - 1], cuts["threshold"][number - 1]
    when = f"at mask update {number} of {len(cuts['step'])} (step {step})"
    why = f"|w| = {of['magnitude']:.4g}, the smallest kept was {smallest:.4g}"
    if of["kept"]:
        return f"{where}kept; last cut {when}, {why}, and came back; cut {of['times']} times in all"
    again = f"; cut {of['times']} times, and back each time before" if of["times"] > 1 else ""
    return f"{where}cut for good {when}: {why}{again}"


def _place(index: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    try:
        numbers = [int(part) for part in index.split(",")]
        flat = np.ravel_multi_index(numbers, shape) if len(numbers) > 1 else numbers[0]
        return tuple(map(int, np.unravel_index(flat, shape)))
    except (ValueError, TypeError, OverflowError):
        allowed = f"a place in {list(shape)}, as 1,2,..., or a number below {math.prod(shape)}"
        raise InputError(f"index = {index!r}: {allowed}") from None
