"""Sentences about results, made from records: numbers, directions and names follow from them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from prunestudy import models
from prunestudy.errors import require, require_one_of
from prunestudy.methods import TARGETS
from prunestudy.papers import Card
from prunestudy.study.lines import Record
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store
from prunestudy.study.select import index, side_by_side
from prunestudy.study.statistics import interval
from prunestudy.study.tables import UNITS, datasets_title
from prunestudy.study.verdicts import called, removed

_SCORES = {"top1": "test accuracy", "miou": "mean IoU", "psnr": "test PSNR"}
_WAYS = {"above": "above", "below": "below", "level": "not told apart from"}


class Quantity(NamedTuple):
    """What a sentence is about: `factor` times what `of` finds in a record (None: not there)."""

    name: str
    of: Callable[[Record], float | None]
    unit: str = ""
    factor: float = 1

    def __call__(self, record: Record) -> float | None:
        """The value in `record`."""
        value = self.of(record)
        return None if value is None or math.isnan(value) else self.factor * value

    def minus(self, other: "Quantity", name: str) -> "Quantity":
        """The difference to `other` in the same record."""

        def of(record: Record) -> float | None:
            pair = self(record), other(record)
            return None if None in pair else pair[0] - pair[1]

        return Quantity(name, of, self.unit.replace("%", " points"))


def metric(key: str, name: str, unit: str = "", factor: float = 1) -> Quantity:
    """The number `key` of a record's metrics."""
    return Quantity(name, lambda record: record["metrics"].get(key), unit, factor)


def speed_up(batch: int) -> Quantity:
    """How many times faster than the dense net, as measured on `batch` images (1 or 128)."""

    def of(record: Record) -> float | None:
        ms = (record["latency"] or {}).get("ms")
        return ms and ms[f"dense_latency_b{batch}_ms"] / ms[f"latency_b{batch}_ms"]

    return Quantity(f"measured speed-up on {batch} image{'s' * (batch > 1)}", of, "x")


def when_trained(column: str, name: str, phase: str, unit: str = "", factor: float = 1) -> Quantity:
    """The number in `column` of the history after the last epoch of `phase`."""

    def of(record: Record) -> float | None:
        rows = zip(record["history"]["phase"], record["history"].get(column, ()), strict=False)
        return next((value for at, value in reversed([*rows]) if at == phase), None)

    return Quantity(name, of, unit, factor)


class Sentence(str):
    """Text, and the `direction` that the records gave: above, below, level, mixed, or "" (none).

    A notebook shows it, or for all of a cell that have no `runs` in this profile one line.
    """

    direction, runs, _quiet = "", True, 0

    def _ipython_display_(self) -> None:
        from IPython import display, get_ipython  # late: notebooks alone show it

        shown, cell = str(self), get_ipython().execution_count
        if not self.runs:
            shown = "*Not shown: what this profile did not run.*" * (Sentence._quiet != cell)
            Sentence._quiet = cell
        if shown:
            display.display({"text/markdown": shown, "text/plain": shown}, raw=True)


class _Seen(NamedTuple):
    """A result at one setting: place, quantity's name, mean, mean and interval told, direction."""

    where: str
    name: str
    mean: float
    told: str
    way: str


def says(
    store: Store,
    planned: Sequence[Planned],
    paper: Card,
    method: str,
    against: str = "",
    of: Quantity | None = None,
    than: float | str | None = None,
    then: Mapping[str, str] | None = None,
    **where: Any,
) -> Sentence:
    """A sentence on `of` (default: score) of `method`: minus `against`, beside `than`, or alone.

    Methods are labels of the card ("sparse_gates, from scratch"). `where` picks settings by
    `model`, `dataset`, `target` and `kind`; several make one sentence that counts directions.
    `than` is a number in the unit of `of`, or "published": the paper's for each setting. Above and
    below: the 95% interval over seeds leaves out zero (or `than`); level: it does not. One seed
    has no direction. `then` maps directions ("mixed": above in some settings, below in others) to a
    sentence to add, with the number of settings it holds in if the others have no direction.
    """
    for name in where:
        require_one_of("where", name, ("model", "dataset", "target", "kind"))
    right = than in (None, "published") or isinstance(than, int | float)
    require(right, "than", than, 'a number or "published"')
    none = wanting = "This profile has no runs for"
    runs, seen = index(planned), []
    for (label, model, dataset), targets in runs.items():
        opponents = runs.get((against, model, dataset), {})
        for target, ours in targets.items() if label == method else ():
            share, kind = (target.value, target.kind) if target else (None, "")
            at = {"model": model, "dataset": dataset, "target": share, "kind": kind}
            held = _published(paper, method, *at.values()) if than == "published" else than
            theirs = opponents.get(target) or opponents.get(None, {})
            both = [ours, theirs] if against else [ours]
            if at | where == at and held is None and than:
                wanting = "Nothing is published in this profile's settings beside"
            elif at | where == at:
                wanting = "The records of this profile do not hold" if all(both) else wanting
                keys = sorted(set.intersection(*map(set, both)))
                pairs = [[side[key] for side in both] for key in keys]
                seen += _seen(store, pairs, _place(**at), of, 0.0 if against else held)
    other = called(against) if against else "what is published"
    versus = f" against {other}" if against or than == "published" else ""
    if than is not None and not versus:
        other = f"{than:g}{of.unit if of else ''}"
        versus = f" beside {other}"
    ways = [each.way for each in seen]
    mixed = "above" in ways and "below" in ways
    way = "mixed" if mixed else next((way for way in _WAYS if way in ways), "")
    if not seen:
        place = _place(**where)
        on = "on" if {"model", "dataset"} & where.keys() else "at"
        place = f" {on} {place}" if place else ""
        if "kind" in where and "target" not in where:
            place += f" at targets on {TARGETS[where['kind']]}"
        versus = "" if wanting.endswith("beside") or isinstance(than, int | float) else versus
        text = f"{wanting} the {of.name if of else 'score'} of {called(method)}{versus}{place}."
    elif len(seen) == 1:
        alone = f" minus that of {other} is" if against else f"{versus} is"
        verb = f" is {_WAYS[way]} {'that of ' * bool(against)}{other}:" if way else alone
        place, name, _, told, _ = seen[0]
        text = f"{place[0].upper()}{place[1:]}: the {name} of {called(method)}{verb} {told}."
    else:
        name = seen[0].name
        text = f"{name[0].upper()}{name[1:]}, {called(method)}{versus}, {_range(seen)}."
    added, count = (then or {}).get(way, ""), ways.count(way)
    if added and way in ("above", "below") and count < len(ways):
        added = added.removeprefix("So ").rstrip(".")
        some = f"In {count} of {len(ways)} settings"
        added = f"{some} {added[0].lower()}{added[1:]}; the others leave it open."
    sentence = Sentence(f"{text} {added}".strip())
    sentence.direction, sentence.runs = way, wanting != none
    return sentence


def measured(
    store: Store, planned: Sequence[Planned], labels: Iterable[str], quantities: Sequence[Quantity]
) -> pd.DataFrame:
    """Means of `quantities` over the seeds that have them, a row for each setting of `labels`."""
    rows, runs = [], index(planned)
    for label, place in ((label, place) for label in labels for place in runs):
        for target, items in runs[place].items() if place[0] == label else ():
            records = [r for item in items.values() for r in store.read_all(item.settings)]
            done = [record for record in records if record["status"] == "done"]
            row = {"net": models.title(place[1]), "data": datasets_title(place[2])}
            row["method"] = called(label)
            row["removed"] = removed(target.value, target.kind) if target else ""
            for each in quantities:
                values = [value for value in map(each, done) if value is not None]
                row[each.name] = sum(values) / len(values) if values else math.nan
            rows.append(row)
    names = [each.name for each in quantities] if rows else None  # the profile may have none
    return pd.DataFrame(rows).dropna(how="all", subset=names)


def _seen(
    store: Store, pairs: list[list[Planned]], place: str, of: Quantity | None, held: float | None
) -> list[_Seen]:
    """The result of `pairs` on each device that has any, held against `held`."""
    values: dict[str, list[float]] = {}
    lost, paired, scored = 0, bool(pairs and pairs[0][1:]), of is None
    for items in pairs:
        for device, pair in side_by_side(store, items).items():
            if any(record["status"] != "done" for record in pair):
                lost += 1
                continue
            name = pair[0]["metrics"]["metric_name"]
            of = of or metric("metric", _SCORES[name], *UNITS[name][::-1])
            ours, *theirs = map(of, pair)
            if None not in (ours, *theirs):
                values.setdefault(device, []).append(ours - sum(theirs))
    seen = []
    for device, numbers in values.items():
        n, mean, _, low, high = interval(numbers)
        way = "" if held is None or n < 2 else "level"
        way = "above" if way and low > held else "below" if way and high < held else way
        unit, sign = (of.unit.replace("%", " points"), "+") if paired else (of.unit, "")
        told = f"{mean:{sign}.2f}{unit}"
        told += f" [{low:{sign}.2f}, {high:{sign}.2f}], n = {n}" if n > 1 else ", one seed"
        told += f", {lost} failed" if lost else ""
        told += f", beside {held:.2f}{unit}" if held and scored else ""
        where = f"{place}, {device}" if len(values) > 1 else place
        seen.append(_Seen(where, of.name, mean, told, way))
    return seen


def _range(seen: list[_Seen]) -> str:
    """How many settings are above, below and level, and the two ends."""
    ways = [each.way for each in seen]
    counts = [f"{words.removesuffix(' from')} in {ways.count(w)}" for w, words in _WAYS.items()]
    counts += [f"of one seed only in {ways.count('')}"] * ("" in ways)
    told = f"{', '.join(counts)}; " * any(ways)
    least, most = (end(seen, key=lambda each: each.mean) for end in (min, max))
    ends = f"from {least.told} ({least.where}), to {most.told} ({most.where})"
    ends = f"{least.told} in each" if least is most else ends
    return f"in {len(seen)} settings: {told}{ends}"


def _place(
    model: str = "", dataset: str = "", target: float | None = None, kind: str = "sparsity"
) -> str:
    """A setting, or a part of one, for people."""
    net = " on ".join(f(x) for f, x in ((models.title, model), (datasets_title, dataset)) if x)
    share = f"{removed(target, kind)} removed" if target is not None else ""
    return ", ".join(filter(None, (net, share)))


def _published(paper: Card, *place: Any) -> float | None:
    """The paper's own number for this setting, in its unit."""
    number = paper.published_at(*place)
    return number and UNITS[number.metric][0] * number.value
