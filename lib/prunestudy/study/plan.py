"""From cards to the list of runs, and what they would cost; needs no data on disk."""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from prunestudy import datasets, measure, methods
from prunestudy.errors import InputError, require, require_one_of
from prunestudy.papers import PROFILES, Entry, Experiment, Profile, RunRecipe, card, cards
from prunestudy.study.settings import RunSettings, dense_macs, dense_net, resolve, target_of

RATE = 3.0  # 10^12 MACs of training a second: assumed, not measured here


@dataclass(frozen=True)
class Planned:
    """A run as an experiment of a paper asks for it.

    It is a `reading` of the method at a `stage` ("" an ordinary result, "start" the dense parent,
    "half" the beginning of a combination, "fine-tuned", "combined"; then another method came before
    it, `after`). The `first` seed of an experiment is the one that is drawn and timed. In a search,
    `grid` is the label of the entry whose settings it tries.
    """

    paper: str
    experiment: str
    purpose: str
    settings: RunSettings
    reading: str = ""
    stage: str = ""
    after: str = ""
    first: bool = True
    grid: str = ""

    @cached_property
    def variant(self) -> str:
        """Its label for people: "one ranking, fine-tuned", "after GDP", "start"; or ""."""
        stage = self.stage
        if stage == "combined":
            name = methods.method_class(self.after).title.split()[0]
            stage = f"after {name if name.isupper() else self.after}"  # GDP, force
        return ", ".join(filter(None, (self.reading, stage)))


def plan(
    profile: str, papers: tuple[str, ...] = (), seeds: int = 0, epochs: int = 0
) -> list[Planned]:
    """Return the runs of `papers` (none named: all) in `profile`, parents before children.

    For a first look or a test: at most `seeds`, and exactly `epochs` for every training that has
    any; 0 leaves what the card says. Raises `InputError` for unknown names and other numbers.
    """
    require_one_of("profile", profile, PROFILES)
    for name, value in {"seeds": seeds, "epochs": epochs}.items():
        require(0 <= value <= 100_000, name, value, "0 (as the card says) to 100000")
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
    common = experiment.model_dump(include={"dataset", "model", "validation"}) | {
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
        recipe = _recipe(experiment, entry, epochs)
        own = {"method": entry.method, "params": entry.params, "recipe": recipe}
        parents, targets = {} if entry.fresh else starts, _targets(experiment, entry)
        for target in targets:
            if after:
                before = (entry.after, entry.after_target or target)
                allowed = f"a target of {entry.after!r}"
                require(before in trained, "after_target", before[1], allowed)
                parents = trained[before]
            if methods.method_class(entry.method).counts:
                kind = entry.target_kind or experiment.target_kind
                own["target"] = target_of(entry.method, target, kind)
            trained[entry.label, target] = _by_seed(every, parents, **common, **own)
        for seed, target in itertools.product(seeds_of[entry.label], targets):
            found = [(trained[entry.label, target][seed], entry.variant, entry.stage, after)]
            if parents and not after:
                found.insert(0, (starts[seed], "", "start", ""))
            first = seed == seeds_of[entry.label].start
            for words in found:
                grid = "" if "start" in words else entry.grid
                item = Planned(paper, experiment.name, experiment.purpose, *words, first, grid)
                runs.setdefault((item.variant, item.settings.run), item)
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
    own: dict[str, Any] = {"epochs": entry.epochs and (epochs or entry.epochs)}
    own |= {"lr": entry.lr, "weight_decay": entry.weight_decay}
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
    rows: dict[str, tuple[Any, ...]] = {}
    for item in planned:
        s, info = item.settings, datasets.info(item.settings.dataset)
        samples = s.recipe.epochs * (info.train_images - s.validation)
        if s.recipe.steps:
            samples = min(samples, s.recipe.steps * s.recipe.batch_size)
        petas = 3 * samples * dense_macs(s.model, info) / 1e15
        hours = petas / RATE * 1000 / 3600
        # Its arrays count as 1 MiB.
        disk = (4 * measure.parameters(dense_net(s.model, info)) + 2**20) / 1e9
        cost = 1, s.recipe.epochs, samples, petas, hours, disk
        rows.setdefault(s.run, (item.paper, item.experiment, *cost))
    whole = ["runs", "epochs", "samples"]
    names = ["paper", "experiment", *whole, "PMACs", "hours", "disk GB"]
    table = pd.DataFrame(rows.values(), columns=names).groupby(names[:2], sort=False).sum()
    table.loc[("all", ""), :] = table.sum()
    return table.astype(dict.fromkeys(whole, int)).reset_index()
