"""From cards to the list of runs, and what they would cost; needs no data on disk."""

import itertools
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prunestudy import datasets, measure, methods
from prunestudy.errors import InputError, require, require_one_of
from prunestudy.papers import PROFILES, Entry, Experiment, Profile, RunRecipe, card, cards
from prunestudy.study.settings import RunSettings, dense_macs, dense_net, resolve, target_of

# Assumed, not measured here: 10^12 MACs of training a second.
RATE = 3.0
_COLUMNS = ["runs", "epochs", "samples", "PMACs", "hours", "disk GB"]


@dataclass(frozen=True)
class Planned:
    """A run as an experiment of a paper asks for it.

    `variant` is its label for people. It says which `reading` of the method this is, at which
    `stage` ("" an ordinary result, "start" the dense parent, "half" the beginning of a combination,
    "fine-tuned", "combined"), and for a combination which method came before it (`after`). The
    `first` seed of an experiment is the one that is drawn and timed. In a search, `grid` is the
    label of the entry whose settings it tries.
    """

    paper: str
    experiment: str
    purpose: str
    variant: str
    settings: RunSettings
    reading: str = ""
    stage: str = ""
    after: str = ""
    first: bool = True
    grid: str = ""


def plan(
    profile: str, papers: tuple[str, ...] = (), seeds: int = 0, epochs: int = 0
) -> list[Planned]:
    """Return the runs of `papers` (none named: all) in `profile`, parents before children.

    For a first look or a test: at most `seeds`, and exactly `epochs` for every training that has
    any; 0 leaves what the card says. Raises `InputError` for unknown names and negative numbers.
    """
    require_one_of("profile", profile, PROFILES)
    for name, value in (("seeds", seeds), ("epochs", epochs)):
        require(value >= 0, name, value, "0 (as the card says) or more")
    chosen = [card(name) for name in dict.fromkeys(papers)] or list(cards())
    sizes = {paper.id: paper.profiles[profile] for paper in chosen if profile in paper.profiles}
    if not sizes:
        has = sorted({name for paper in chosen for name in paper.profiles})
        raise InputError(f"profile = {profile!r}: the chosen papers have {', '.join(has)}")
    return [
        run
        for paper, size in sizes.items()
        for experiment in size.experiments
        for run in _of_experiment(paper, size, experiment, seeds, epochs)
    ]


def _of_experiment(
    paper: str, size: Profile, experiment: Experiment, seeds: int, epochs: int
) -> list[Planned]:
    names = ("dataset", "model", "validation")
    common = {name: getattr(experiment, name) for name in names} | {
        "precision": experiment.precision or size.precision,
        "threads": size.threads,
        "evaluate": "validation" if experiment.purpose == "search" else "test",
    }
    seeds_of = {e.label: _seeds(experiment, e, seeds) for e in experiment.methods}
    every, starts = sorted(set().union(*seeds_of.values())), {}
    if experiment.start:
        own = {"method": "dense", "recipe": _sized(experiment.start, epochs)}
        starts = _by_seed(every, {}, **common, **own, pretrained=experiment.pretrained)
    trained: dict[tuple[str, float | None], dict[int, RunSettings]] = {}
    runs: dict[tuple[str, str], Planned] = {}
    for entry in experiment.methods:
        after = experiment.entry(entry.after).method if entry.after else ""
        own = {"method": entry.method, "params": entry.params}
        own |= {"recipe": _recipe(experiment, entry, epochs)}
        parents, targets = {} if entry.fresh else starts, _targets(experiment, entry)
        for target in targets:
            if after:
                before = (entry.after, entry.after_target or target)
                require(
                    before in trained, "after_target", before[1], f"a target of {entry.after!r}"
                )
                parents = trained[before]
            if methods.method_class(entry.method).counts:
                kind = entry.target_kind or experiment.target_kind
                own["target"] = target_of(entry.method, target, kind)
            trained[entry.label, target] = _by_seed(every, parents, **common, **own)
        for seed, target in itertools.product(seeds_of[entry.label], targets):
            found = [(trained[entry.label, target][seed], entry.variant, entry.stage, after)]
            if parents and not after:
                found.insert(0, (starts[seed], "", "start", ""))
            for settings, *words in found:
                item = (experiment.name, experiment.purpose, _label(*words), settings, *words)
                first = seed == seeds_of[entry.label].start
                run = Planned(paper, *item, first, "" if "start" in words else entry.grid)
                runs.setdefault((run.variant, settings.run), run)
    return list(runs.values())


def _seeds(experiment: Experiment, entry: Entry, most: int) -> range:
    """The seeds of an entry; for a `most` other than 0 at most so many."""
    own = entry.first_seed
    first, count = experiment.first_seed if own is None else own, entry.seeds or experiment.seeds
    return range(first, first + min(count, most or count))


def _by_seed(
    seeds: list[int], parents: dict[int, RunSettings], **values: Any
) -> dict[int, RunSettings]:
    """The settings for each seed, with its parent; checked once, as no check looks at the seed."""
    first = resolve(**values, seed=seeds[0], parent=parents.get(seeds[0]))
    own = {seed: {"seed": seed, "parent": parents.get(seed)} for seed in seeds}
    return {seed: first.model_copy(update=update) for seed, update in own.items()}


def _label(reading: str, stage: str, after: str) -> str:
    """The variant: "one ranking, fine-tuned", "after GDP", "start"; "" for the default."""
    if stage == "combined":
        name = methods.method_class(after).title.split()[0]
        stage = f"after {name if name.isupper() else after}"  # GDP, force
    return ", ".join(filter(None, (reading, stage)))


def _targets(experiment: Experiment, entry: Entry) -> tuple[float | None, ...]:
    """Shares removed, one per run; a method without a target has those of the entry before it."""
    if methods.method_class(entry.method).counts:
        return entry.targets or experiment.targets
    return _targets(experiment, experiment.entry(entry.after)) if entry.after else (None,)


def _sized(recipe: RunRecipe, epochs: int) -> RunRecipe:
    """The recipe with so many `epochs` (0: its own), if it trains at all."""
    if not (epochs and recipe.epochs):
        return recipe
    return recipe.model_copy(update={"epochs": epochs, "steps": 0})


def _recipe(experiment: Experiment, entry: Entry, epochs: int) -> RunRecipe:
    recipe, start = _sized(experiment.recipe, epochs), experiment.start
    own: dict[str, Any] = {"lr": entry.lr, "weight_decay": entry.weight_decay}
    own["epochs"] = entry.epochs and (epochs or entry.epochs)
    own = {name: value for name, value in own.items() if value is not None}
    fresh = entry.fresh or methods.method_class(entry.method).from_scratch
    if start and fresh and entry.epochs is None:
        first = _sized(start, epochs)
        own |= {"epochs": recipe.epochs + first.epochs, "steps": recipe.steps + first.steps}
    return recipe.model_copy(update=own)


def forecast(planned: list[Planned]) -> pd.DataFrame:
    """One row per paper and experiment, and their sum; a run that two ask for counts once.

    A training step counts as three forward passes (one forward, two for the gradients) of the
    dense net throughout: an upper bound for methods that make it smaller. Hours are at `RATE`.
    """
    names = ["paper", "experiment"]
    rows = [[item.paper, item.experiment, item.settings.run, *_cost(item)] for item in planned]
    table = pd.DataFrame(rows, columns=[*names, "run", *_COLUMNS]).drop_duplicates("run")
    table = table.groupby(names, sort=False)[_COLUMNS].sum()
    table.loc[("all", ""), :] = table.sum()
    return table.astype(dict.fromkeys(_COLUMNS[:3], int)).reset_index()


def _cost(item: Planned) -> tuple[int, int, int, float, float, float]:
    """`_COLUMNS` of one run without its parents; its arrays count as 1 MiB."""
    settings, info = item.settings, datasets.info(item.settings.dataset)
    recipe, parameters = settings.recipe, measure.parameters(dense_net(settings.model, info))
    samples = recipe.epochs * (info.train_images - settings.validation)
    if recipe.steps:
        samples = min(samples, recipe.steps * recipe.batch_size)
    trained = 3 * float(samples) * dense_macs(settings.model, info)
    hours, disk = trained / (RATE * 1e12) / 3600, (4 * parameters + 2**20) / 1e9
    return 1, recipe.epochs, samples, trained / 1e15, hours, disk
