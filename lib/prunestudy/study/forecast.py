"""What a profile would cost, before anything runs: epochs, samples, MACs, hours, disk.

MACs of a training step are counted as three forward passes (one forward, two for the gradients),
of the dense net throughout: an upper bound for methods that make it smaller. Hours follow from a
rate and are an estimate.
"""

import functools
import math

import pandas as pd
import torch

from prunestudy import datasets, measure, models
from prunestudy.errors import require
from prunestudy.papers import card
from prunestudy.study.plan import Planned
from prunestudy.study.select import of_card
from prunestudy.study.settings import RunSettings

# Assumed, not measured here: 10^12 MACs of training a second.
RATE = 3.0
_COLUMNS = ["runs", "epochs", "samples", "PMACs", "hours", "disk GB"]


def forecast(planned: list[Planned], rate: float = RATE) -> pd.DataFrame:
    """One row per paper and experiment, and their sum; a run that two ask for counts once.

    Raises `InputError` unless `rate` (10^12 MACs of training a second) is positive.
    """
    _require_positive("rate", rate)
    names = ["paper", "experiment"]
    rows = [[p.paper, p.experiment, p.settings.run, 1, *cost(p.settings, rate)] for p in planned]
    table = pd.DataFrame(rows, columns=[*names, "run", *_COLUMNS]).drop_duplicates("run")
    table = table.groupby(names, sort=False)[_COLUMNS].sum()
    table.loc[("all", ""), :] = table.sum()
    return table.astype(dict.fromkeys(_COLUMNS[:3], int)).reset_index()


def cost(settings: RunSettings, rate: float = RATE) -> tuple[int, int, float, float, float]:
    """Epochs, samples, PMACs, hours and GB on disk (arrays: 1 MiB) of a run without its parents."""
    info, recipe = datasets.info(settings.dataset), settings.recipe
    shape = (info.channels, info.height, info.width)
    macs, parameters = _dense(settings.model, shape, info.num_classes)
    samples = recipe.epochs * (info.train_images - settings.validation)
    if recipe.steps:
        samples = min(samples, recipe.steps * recipe.batch_size)
    trained = 3 * float(samples) * macs
    hours = trained / (rate * 1e12) / 3600
    return recipe.epochs, samples, trained / 1e15, hours, (4 * parameters + 2**20) / 1e9


@functools.lru_cache(maxsize=64)
def _dense(model: str, shape: tuple[int, int, int], num_classes: int) -> tuple[int, int]:
    net = models.build(model, shape, num_classes)
    return measure.macs(net, torch.zeros(1, *shape)), measure.parameters(net)


def choose(planned: list[Planned], hours: float, rate: float = RATE) -> list[Planned]:
    """The runs that tell most within `hours`, parents before children.

    First both sides of every comparison of a claim, seed by seed and the cheapest first; with
    what is left the other runs: results, then ablations, then searches. What does not fit is
    passed over. Raises `InputError` unless both numbers are positive.
    """
    _require_positive("hours", hours)
    _require_positive("rate", rate)
    runs = {item.settings.run: item for item in reversed(planned)}
    price = {name: cost(item.settings, rate)[3] for name, item in runs.items()}

    def order(group: tuple[Planned, ...]) -> tuple[int, int, float, str]:
        names, first = [item.settings.run for item in group], group[0]
        purpose = ("results", "ablation", "search").index(first.purpose)
        return purpose, first.settings.seed, sum(price[name] for name in names), names[0]

    results = [item for item in runs.values() if item.purpose == "results"]
    compared = [c for paper in {p.paper for p in results} for c in of_card(card(paper), results)]
    pairs = [pair for comparison in compared for pair in comparison.pairs]
    chosen: dict[str, Planned] = {}
    for group in sorted(pairs, key=order) + sorted(((each,) for each in runs.values()), key=order):
        line = [name for item in group for name in _line(item.settings)]
        new = {name: runs[name] for name in line if name not in chosen}
        needed = sum(price[name] for name in new)
        if needed <= hours:
            hours -= needed
            chosen |= new
    return list(chosen.values())


def _line(settings: RunSettings) -> list[str]:
    """Names of the run and of all that is trained before it, parents first."""
    return [*(_line(settings.parent) if settings.parent else []), settings.run]


def _require_positive(name: str, value: float) -> None:
    require(0 < value < math.inf, name, value, "a finite number above 0")
