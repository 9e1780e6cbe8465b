"""What a profile would cost, before anything runs: epochs, samples, MACs, hours, disk.

MACs of a training step are counted as three forward passes (one forward, two for the gradients),
of the dense net throughout: an upper bound for methods that make it smaller. Hours follow from a
rate and are an estimate.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from prunestudy import datasets, measure, models
from prunestudy.errors import require
from prunestudy.papers import Comparison, card
from prunestudy.study.plan import Planned
from prunestudy.study.settings import RunSettings

# Assumed, not measured here: 10^12 MACs of training a second.
RATE = 3.0
_PASSES = 3
_ARRAYS = 2**20  # bytes; the bound on a run's arrays file


@dataclass(frozen=True)
class Cost:
    """Of one run without its parents: `macs` of its training, `disk` in bytes."""

    epochs: int
    samples: int
    macs: float
    disk: int

    def hours(self, rate: float) -> float:
        """At `rate` times 10^12 MACs a second."""
        return self.macs / (rate * 1e12) / 3600


def cost(settings: RunSettings) -> Cost:
    """Of the run with these settings; needs no data on disk."""
    info = datasets.info(settings.dataset)
    shape = (info.channels, info.height, info.width)
    macs, parameters = _dense(settings.model, shape, info.num_classes)
    recipe = settings.recipe
    samples = recipe.epochs * (info.train_images - settings.validation)
    if recipe.steps:
        samples = min(samples, recipe.steps * recipe.batch_size)
    return Cost(recipe.epochs, samples, _PASSES * float(samples) * macs, 4 * parameters + _ARRAYS)


@functools.lru_cache(maxsize=64)
def _dense(model: str, shape: tuple[int, int, int], num_classes: int) -> tuple[int, int]:
    net = models.build(model, shape, num_classes)
    return measure.macs(net, shape), measure.parameters(net)


def forecast(planned: Iterable[Planned], rate: float = RATE) -> pd.DataFrame:
    """One row per paper and experiment, and their sum; a run that two ask for counts once.

    Raises `InputError` unless `rate` (10^12 MACs of training a second) is positive.
    """
    _require_positive("rate", rate)
    rows, seen = {}, set()
    for item in planned:
        row = rows.setdefault((item.paper, item.experiment), [0, 0, 0, 0.0, 0.0, 0.0])
        if item.settings.run in seen:
            continue
        seen.add(item.settings.run)
        of_run = cost(item.settings)
        added = (1, of_run.epochs, of_run.samples, of_run.macs / 1e15)
        for place, value in enumerate((*added, of_run.hours(rate), of_run.disk / 1e9)):
            row[place] += value
    columns = ["runs", "epochs", "samples", "PMACs", "hours", "disk GB"]
    index = pd.MultiIndex.from_tuples(rows, names=["paper", "experiment"])
    table = pd.DataFrame(list(rows.values()), index, columns)
    table.loc[("all", ""), :] = table.sum()
    return table.astype(dict.fromkeys(columns[:3], int)).reset_index()


def choose(planned: Iterable[Planned], hours: float, rate: float = RATE) -> list[Planned]:
    """The runs that tell most within `hours`, parents before children.

    First both sides of every comparison of a claim, seed by seed and the cheapest first; with
    what is left the other runs: results, then ablations, then searches. What does not fit is
    passed over. Raises `InputError` unless both numbers are positive.
    """
    _require_positive("hours", hours)
    _require_positive("rate", rate)
    runs = {item.settings.run: item for item in reversed(list(planned))}
    chosen: dict[str, Planned] = {}
    left = hours
    for group in (*_pairs(runs.values()), *([item] for item in _by_purpose(runs.values()))):
        new = _missing(group, runs, chosen)
        price = sum(cost(item.settings).hours(rate) for item in new)
        if price <= left:
            left -= price
            chosen |= {item.settings.run: item for item in new}
    return list(chosen.values())


def _missing(
    group: list[Planned], runs: dict[str, Planned], chosen: dict[str, Planned]
) -> list[Planned]:
    """The runs of `group` and their parents that are not chosen yet, parents first."""
    needed: dict[str, Planned] = {}
    for item in group:
        line, settings = [], item.settings
        while settings:
            parent = Planned(item.paper, item.experiment, item.purpose, "start", settings)
            line.append(runs.get(settings.run, parent))
            settings = settings.parent
        needed |= {each.settings.run: each for each in reversed(line)}
    return [item for name, item in needed.items() if name not in chosen]


def _pairs(planned: Iterable[Planned]) -> list[list[Planned]]:
    planned = [item for item in planned if item.purpose == "results"]
    tests = [
        (paper, test)
        for paper in sorted({item.paper for item in planned})
        for claim in card(paper).claims
        for test in claim.tests
    ]
    pairs = []
    for paper, test in tests:
        ours = _side(planned, paper, test, test.method, test.variant)
        if not test.against:
            pairs += [[item] for item in ours.values()]
            continue
        others = _side(planned, paper, test, test.against, test.against_variant)
        pairs += [[ours[seed], others[seed]] for seed in sorted(set(ours) & set(others))]
    return sorted(pairs, key=_seed_and_price)


def _seed_and_price(pair: list[Planned]) -> tuple[int, float, str]:
    ours = pair[0].settings
    return ours.seed, sum(cost(item.settings).macs for item in pair), ours.run


def _side(
    planned: list[Planned], paper: str, test: Comparison, method: str, variant: str
) -> dict[int, Planned]:
    """Seed to run, of one side of a comparison; the dense net has no target."""
    found = {}
    for item in planned:
        s = item.settings
        aim = (s.aim.value, s.aim.kind) if s.aim else (None, test.target_kind)
        wanted = (test.target if s.aim else None, test.target_kind)
        same = (item.paper, s.method, item.variant, s.model, s.dataset) == (
            (paper, method, variant, test.model, test.dataset)
        )
        if same and aim == wanted:
            found[s.seed] = item
    return found


def _by_purpose(planned: Iterable[Planned]) -> list[Planned]:
    order = ("results", "ablation", "search")

    def key(item: Planned) -> tuple[int, int, float, str]:
        s = item.settings
        return order.index(item.purpose), s.seed, cost(s).macs, s.run

    return sorted(planned, key=key)


def _require_positive(name: str, value: float) -> None:
    require(0 < value < float("inf"), name, value, "a finite number above 0")
