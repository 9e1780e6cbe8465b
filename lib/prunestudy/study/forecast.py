"""What a profile would cost, before anything runs: epochs, samples, MACs, hours, disk.

A training step counts as three forward passes (one forward, two for the gradients) of the dense
net throughout: an upper bound for methods that make it smaller. Hours are an estimate, from a rate.
"""

import functools
import math

import pandas as pd

from prunestudy import datasets, measure, models
from prunestudy.errors import require
from prunestudy.study.plan import Planned
from prunestudy.study.settings import RunSettings

# Assumed, not measured here: 10^12 MACs of training a second.
RATE = 3.0
_COLUMNS = ["runs", "epochs", "samples", "PMACs", "hours", "disk GB"]


def forecast(planned: list[Planned], rate: float = RATE) -> pd.DataFrame:
    """One row per paper and experiment, and their sum; a run that two ask for counts once.

    Raises `InputError` unless `rate` (10^12 MACs of training a second) is positive.
    """
    require(0 < rate < math.inf, "rate", rate, "a finite number above 0")
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
    return measure.macs(net, shape), measure.parameters(net)
