"""Which settings a method gets: the best of its grid, by one rule for every method and control.

A card's searches have a grid per method and control: of six settings each, on validation images.
The best has the best mean score over the seeds. A setting of which a run fails (its status is not
"done") is the worst; equals go to the lower learning rate, then to the one that comes first.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunestudy.papers import card
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store
from prunestudy.study.settings import RunSettings
from prunestudy.study.tables import datasets_title
from prunestudy.study.verdicts import removed

# What the search settles beside the lists of its grids, for all methods alike.
_COMMON = ("lr", "weight_decay", "schedule", "one_schedule")


@dataclass(frozen=True)
class Tried:
    """A setting of a grid, with a score per seed: None if not done, -inf for a run that failed."""

    settings: RunSettings
    scores: tuple[float | None, ...]

    @property
    def mean(self) -> float:
        """The mean score; NaN while a seed is not done."""
        done = [score for score in self.scores if score is not None]
        return math.nan if len(done) < len(self.scores) else sum(done) / len(done)


@dataclass(frozen=True)
class Grid:
    """The settings tried for the entry `label` of a paper, and those of its other runs (`used`)."""

    paper: str
    label: str
    tried: tuple[Tried, ...]
    used: tuple[RunSettings, ...]

    @cached_property
    def place(self) -> tuple[str, str, str]:
        """Paper, net and data set: where all grids are equally large."""
        first = self.tried[0].settings
        return self.paper, first.model, first.dataset

    @cached_property
    def complete(self) -> bool:
        """Whether all runs are done."""
        return not any(math.isnan(tried.mean) for tried in self.tried)

    @cached_property
    def best(self) -> Tried:
        """The setting that the rule chooses, of a complete grid."""
        return max(self.tried, key=lambda tried: (tried.mean, -tried.settings.recipe.lr))

    @cached_property
    def lists(self) -> dict[str, list[Any]]:
        """What the grid varies, by name: its values in order."""
        every = [tried.settings for tried in self.tried]
        names = ["lr", *(n for n in every[0].params if len({str(s.params[n]) for s in every}) > 1)]
        return {name: sorted({_of(settings, name) for settings in every}) for name in names}

    @property
    def edges(self) -> list[str]:
        """Lists, of three values or more, at whose end the best lies: "lr lowest"."""
        found = []
        for name, values in self.lists.items():
            value = _of(self.best.settings, name)
            if len(values) > 2 and value in (values[0], values[-1]):
                found.append(f"{name} {'lowest' if value == values[0] else 'highest'}")
        return found

    @property
    def differences(self) -> list[str]:
        """Where the runs of the card differ from the best: "lr 0.05 instead of 0.1"."""
        found = [] if self.used else ["no such runs"]
        for name in dict.fromkeys((*_COMMON, *self.lists)):
            right = _of(self.best.settings, name)
            wrong = {_of(settings, name) for settings in self.used} - {right}
            found += [f"{name} {_text(value)} instead of {_text(right)}" for value in sorted(wrong)]
        return found

    @property
    def gain(self) -> float:
        """What the best scores more than the settings of the grid that the card has; NaN if none.

        Those are the same in what the grid varies; what is common to all grids may differ.
        """
        now = {tuple(_of(settings, name) for name in self.lists) for settings in self.used}
        means = [t.mean for t in self.tried if tuple(_of(t.settings, n) for n in self.lists) in now]
        return self.best.mean - max(means) if means else math.nan


def _of(settings: RunSettings, name: str) -> Any:
    return settings.params[name] if name in settings.params else getattr(settings.recipe, name)


def _text(value: Any) -> str:
    return f"{value:g}" if type(value) is float else str(value).lower()


def grids(store: Store, planned: list[Planned]) -> list[Grid]:
    """The grids of all searches among `planned`, with what the records say so far."""
    of = {
        (paper, experiment.name, entry.method, entry.variant): entry.grid
        for paper in dict.fromkeys(item.paper for item in planned)
        for profile in card(paper).profiles.values()
        for experiment in profile.experiments
        for entry in experiment.methods
        if entry.grid
    }
    used: dict[tuple[str, ...], list[RunSettings]] = {}
    runs: dict[tuple[str, ...], dict[str, list[RunSettings]]] = {}
    for item in planned:
        s = item.settings
        place = (item.paper, s.model, s.dataset)
        label = of.get((item.paper, item.experiment, s.method, item.variant))
        if label:
            runs.setdefault((*place, label), {}).setdefault(item.variant, []).append(s)
        elif item.purpose != "search":
            label = ", ".join(filter(None, (s.method, item.variant)))
            used.setdefault((*place, label), []).append(s)
    return [
        Grid(
            paper=place[0],
            label=place[-1],
            tried=tuple(_tried(store, seeds) for seeds in variants.values()),
            used=tuple(used.get(place, ())),
        )
        for place, variants in runs.items()
    ]


def _tried(store: Store, seeds: list[RunSettings]) -> Tried:
    records = [store.read(settings) for settings in seeds]
    scores = (record and _score_of(record) for record in records)
    return Tried(seeds[0], tuple(scores))


def _score_of(record: dict[str, Any]) -> float:
    return record["metrics"]["metric"] if record["status"] == "done" else -math.inf


def unequal(found: list[Grid]) -> list[str]:
    """A line for each place whose grids are not equally large."""
    sizes: dict[tuple[str, str, str], dict[int, str]] = {}
    for grid in found:
        sizes.setdefault(grid.place, {}).setdefault(len(grid.tried), grid.label)
    return [
        f"{', '.join(place)}: " + ", ".join(f"{n} settings of {label}" for n, label in own.items())
        for place, own in sizes.items()
        if len(own) > 1
    ]


def lines(grid: Grid) -> list[str]:
    """The grid for people: its settings with a score per seed and their mean, the best marked."""
    first, best = grid.tried[0].settings, grid.best if grid.complete else None
    share = f", {removed(first.aim.value, first.aim.kind)} removed" if first.aim else ""
    text = [f"{grid.paper}: {grid.label}, {first.model} on {datasets_title(first.dataset)}{share}"]
    for tried in grid.tried:
        name = ", ".join(f"{n} {_text(_of(tried.settings, n))}" for n in grid.lists)
        scores = map(_score, (*tried.scores, tried.mean))
        text.append(f"  {'*' if tried is best else ' '} {name:26}{''.join(scores)}")
    if best:
        gain = "" if math.isnan(grid.gain) else f", {grid.gain:+.4f} by the search"
        card = "; ".join(grid.differences) or "the best"
        text.append(f"    card: {card}{gain}" + "".join(f"; best at {edge}" for edge in grid.edges))
    return text


def _score(score: float | None) -> str:
    if score is None or math.isnan(score):
        return f"{'-':>9}"
    return f"{score:9.4f}" if math.isfinite(score) else f"{'failed':>9}"
