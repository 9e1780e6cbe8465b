"""Which settings a method gets: the best of its grid, by one rule for every method and control.

The best has the best mean score on validation images over the seeds of the search. A setting with
a failed run (status not "done") ranks last, and so does a control's of which a run fails among the
results. Ties go to the lower learning rate, then to the setting that comes first.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from prunestudy.papers import card
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store
from prunestudy.study.select import chosen
from prunestudy.study.settings import RunSettings
from prunestudy.study.tables import datasets_title
from prunestudy.study.verdicts import removed

# What is the same in all grids of a net, beside what each varies.
_COMMON = ("weight_decay", "schedule", "one_schedule")


class _Tried(NamedTuple):
    """A setting, its score for each seed, and whether a run of it fails among the results."""

    settings: RunSettings
    scores: list[float]
    failed: bool

    @property
    def mean(self) -> float:
        """The mean over the seeds; NaN where a run is missing, -inf if one failed."""
        return -math.inf if self.failed else sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class _Grid:
    """The settings `tried` for the entry `label`, and those that its results have `now`."""

    paper: str
    label: str
    tried: list[_Tried]
    now: list[RunSettings]

    @property
    def complete(self) -> bool:
        """Whether no run is missing."""
        return not any(math.isnan(tried.mean) for tried in self.tried)

    @cached_property
    def best(self) -> _Tried:
        """The setting that the rule chooses, of a complete grid."""
        return max(self.tried, key=lambda tried: (tried.mean, -tried.settings.recipe.lr))

    @cached_property
    def varied(self) -> dict[str, list[Any]]:
        """What the grid varies, by name: its values in order."""
        every = [tried.settings for tried in self.tried]
        params = every[0].params
        names = ["lr", *(n for n in params if any(s.params[n] != params[n] for s in every))]
        return {name: sorted({_of(settings, name) for settings in every}) for name in names}

    @property
    def edges(self) -> list[str]:
        """Where the best is the first or last of three values or more: "lr lowest"."""
        ends = {n: values for n, values in self.varied.items() if len(values) > 2}
        words = {n: {v[0]: "lowest", v[-1]: "highest"} for n, v in ends.items()}
        places = {n: words[n].get(_of(self.best.settings, n)) for n in ends}
        return [f"{name} {place}" for name, place in places.items() if place]

    @property
    def differences(self) -> list[str]:
        """Where the runs of the card differ from the best: "lr 0.05 instead of 0.1"."""
        found = [] if self.now else ["no such runs"]
        for name in (*self.varied, *_COMMON):
            right = _of(self.best.settings, name)
            wrong = {_of(settings, name) for settings in self.now} - {right}
            found += [f"{name} {_text(value)} instead of {_text(right)}" for value in sorted(wrong)]
        return found

    @property
    def gain(self) -> float:
        """Mean of the best minus that of the setting that has what the card has; NaN if none."""
        now = [[_of(settings, name) for name in self.varied] for settings in self.now]
        same = [t for t in self.tried if [_of(t.settings, name) for name in self.varied] in now]
        return self.best.mean - max((tried.mean for tried in same), default=math.nan)


def _of(settings: RunSettings, name: str) -> Any:
    """The recipe's value of `name`, or else the method's parameter."""
    recipe = name in ("lr", *_COMMON)
    return getattr(settings.recipe, name) if recipe else settings.params[name]


def _text(value: Any) -> str:
    return f"{value:g}" if type(value) is float else str(value).lower()


def grids(store: Store, planned: list[Planned]) -> list[_Grid]:
    """The grids of all searches among `planned`, with what the records say so far."""
    tried: dict[tuple[str, ...], dict[str, list[RunSettings]]] = {}
    now: dict[tuple[str, ...], list[RunSettings]] = {}
    failed = []
    for item in planned:
        s = item.settings
        place = item.paper, s.model, s.dataset
        if item.purpose == "results":
            label = ", ".join(filter(None, (s.method, item.variant)))
            now.setdefault((*place, label), []).append(s)
            if s.method != item.paper and _score(store, s) == -math.inf:
                failed.append((place, _setting(s)))
        elif item.grid:  # none of an ablation, which is compared with its own base alone
            tried.setdefault((*place, item.grid), {}).setdefault(item.variant, []).append(s)
    found = []
    for place, by in tried.items():
        grid = _Grid(place[0], place[-1], [], now.get(place, []))
        for seeds in by.values():
            fails = (place[:-1], _setting(seeds[0])) in failed
            grid.tried.append(_Tried(seeds[0], [_score(store, s) for s in seeds], fails))
        found.append(grid)
    return found


def _setting(settings: RunSettings) -> list[Any]:
    """What a search varies, and what is the same in all grids of a net."""
    return [settings.method, settings.params, *(_of(settings, n) for n in ("lr", *_COMMON))]


def _score(store: Store, settings: RunSettings) -> float:
    """NaN if the run is missing, -inf if it failed."""
    record = store.read(settings) or {"status": "done", "metrics": {"metric": math.nan}}
    return record["metrics"]["metric"] if record["status"] == "done" else -math.inf


def strongest(found: list[_Grid], profile: str) -> dict[tuple[str, ...], tuple[str, str]]:
    """The best control and that of the card ("": none) by paper, net, data, target and method.

    For the tests of which all grids are complete; one whose best setting fails is not eligible.
    """
    places: dict[tuple[str, ...], list[_Grid]] = {}
    for grid in (grid for grid in found if grid.tried[0].settings.aim):
        first = grid.tried[0].settings
        place = (grid.paper, first.model, first.dataset, first.aim.kind)
        for rule in (rule for claim in card(grid.paper).claims for rule in claim.tests):
            if grid.label in rule.controls:
                places.setdefault((*place, rule.method), []).append(grid)
    best = {}
    for (paper, *where, method), grids in places.items():
        able = [g for g in grids if g.complete and math.isfinite(g.best.mean)]
        if able and all(g.complete for g in grids):
            named = chosen(card(paper), profile)
            now = " and ".join(sorted({g.label for g in grids if (*where, g.label) in named}))
            best[paper, *where, method] = max(able, key=lambda g: g.best.mean).label, now
    return best


def lines(grid: _Grid) -> list[str]:
    """The grid for people: its settings with a score per seed and their mean, the best marked."""
    first, best = grid.tried[0].settings, grid.best if grid.complete else None
    share = f", {removed(first.aim.value, first.aim.kind)} removed" if first.aim else ""
    text = [f"{grid.paper}: {grid.label}, {first.model} on {datasets_title(first.dataset)}{share}"]
    for tried in grid.tried:
        name = ", ".join(f"{name} {_text(_of(tried.settings, name))}" for name in grid.varied)
        told = "".join(f"{score:9.4f}" for score in (*tried.scores, tried.mean))
        told = told.replace("nan", "  -")
        told = told.replace("  -inf", "failed") + "  among the results" * tried.failed
        text.append(f"  {'*' if tried is best else ' '} {name:26}{told}")
    if best:
        gain = "" if math.isnan(grid.gain) else f", {grid.gain:+.4f} by the search"
        edges = "".join(f"; best at {edge}" for edge in grid.edges)
        text.append(f"    card: {'; '.join(grid.differences) or 'the best'}{gain}{edges}")
    return text
