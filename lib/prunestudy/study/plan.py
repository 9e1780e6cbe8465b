"""From cards to the list of runs; needs no data on disk."""

from dataclasses import dataclass

from prunestudy import methods
from prunestudy.errors import InputError, require, require_one_of
from prunestudy.papers import PROFILES, Card, Entry, Experiment, Profile, card, cards
from prunestudy.study.settings import RunSettings, resolve, target_of
from prunestudy.train import Recipe


@dataclass(frozen=True)
class Planned:
    """A run as an experiment of a paper asks for it.

    `variant` is its label for people. It says which `reading` of the method this is, at which
    `stage` ("" an ordinary result, "start" the dense parent, "half" the beginning of a combination,
    "fine-tuned", "combined"), and for a combination which method came before it (`after`).
    """

    paper: str
    experiment: str
    purpose: str
    variant: str
    settings: RunSettings
    reading: str = ""
    stage: str = ""
    after: str = ""


def _label(reading: str, stage: str, after: str) -> str:
    """The variant: "one ranking, fine-tuned", "after GDP", "start"; "" for the default."""
    if stage == "combined":
        name = methods.method_class(after).title.split()[0]
        stage = f"after {name if name.isupper() else after}"  # GDP, force
    return ", ".join(filter(None, (reading, stage)))


@dataclass(frozen=True)
class Tiny:
    """Other sizes than the card's, for a first look or a test; 0 leaves what the card says.

    At most `seeds`; exactly `epochs` for every training, where the card has any.
    """

    seeds: int = 0
    epochs: int = 0

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs"):
            value = getattr(self, name)
            require(value >= 0, name, value, "0 (as the card says) or more")


def plan(profile: str, papers: tuple[str, ...] = (), tiny: Tiny = Tiny()) -> list[Planned]:
    """Return the runs of `papers` (none named: all) in `profile`, parents before children."""
    require_one_of("profile", profile, PROFILES)
    chosen = [card(name) for name in dict.fromkeys(papers)] or list(cards())
    with_profile = [c for c in chosen if profile in c.profiles]
    if not with_profile:
        has = sorted({name for c in chosen for name in c.profiles})
        raise InputError(f"profile = {profile!r}: the chosen papers have {', '.join(has)}")
    return [run for each in with_profile for run in _of_card(each, profile, tiny)]


def _of_card(paper: Card, profile: str, tiny: Tiny) -> list[Planned]:
    size = paper.profiles[profile]
    return [
        run
        for experiment in size.experiments
        for run in _of_experiment(paper.id, size, _sized(experiment, tiny))
    ]


def _sized(experiment: Experiment, tiny: Tiny) -> Experiment:
    """The experiment with `tiny`'s seeds at most, and its epochs wherever anything is trained."""
    entries = experiment.methods
    changes: dict = {}
    if tiny.seeds:
        changes["seeds"] = min(tiny.seeds, experiment.seeds)
        few = [{"seeds": min(tiny.seeds, entry.seeds)} if entry.seeds else {} for entry in entries]
        entries = [e.model_copy(update=u) for e, u in zip(entries, few, strict=True)]
    if tiny.epochs:
        own = {"epochs": tiny.epochs}
        entries = [entry.model_copy(update=own) if entry.epochs else entry for entry in entries]
        for name in ("recipe", "start"):
            recipe = getattr(experiment, name)
            if recipe and recipe.epochs:
                changes[name] = recipe.model_copy(update=own | {"steps": 0})
    return experiment.model_copy(update=changes | {"methods": tuple(entries)})


def _of_experiment(paper: str, size: Profile, experiment: Experiment) -> list[Planned]:
    runs: dict[tuple[str, str], Planned] = {}
    for entry in experiment.methods:
        after = experiment.entry(entry.after).method if entry.after else ""
        own, start = (entry.variant, entry.stage, after), ("", "start", "")
        for seed in range(entry.seeds or experiment.seeds):
            for target in _targets(experiment, entry):
                settings = _settings(size, experiment, entry, seed, target)
                of_parent = [(start, settings.parent)] if settings.parent and not after else []
                for words, run in (*of_parent, (own, settings)):
                    label = _label(*words)
                    item = Planned(paper, experiment.name, experiment.purpose, label, run, *words)
                    runs.setdefault((label, run.run), item)
    return list(runs.values())


def _targets(experiment: Experiment, entry: Entry) -> tuple[float | None, ...]:
    """Shares removed, one per run; a method without a target has those of the entry before it."""
    if methods.method_class(entry.method).target_kinds:
        return entry.targets or experiment.targets
    return _targets(experiment, experiment.entry(entry.after)) if entry.after else (None,)


def _settings(
    size: Profile, experiment: Experiment, entry: Entry, seed: int, target: float | None
) -> RunSettings:
    kind = entry.target_kind or experiment.target_kind
    takes = bool(methods.method_class(entry.method).target_kinds)
    return resolve(
        method=entry.method,
        params=entry.params,
        target=target_of(kind, target) if takes else None,
        recipe=_recipe(experiment, entry),
        parent=_parent(size, experiment, entry, seed, target),
        **_common(size, experiment, seed),
    )


def _parent(
    size: Profile, experiment: Experiment, entry: Entry, seed: int, target: float | None
) -> RunSettings | None:
    if entry.after:
        before = experiment.entry(entry.after)
        there = entry.after_target or target
        return _settings(size, experiment, before, seed, there)
    if not experiment.start or entry.fresh:
        return None
    return resolve(
        method="dense",
        recipe=experiment.start,
        pretrained=experiment.pretrained,
        **_common(size, experiment, seed),
    )


def _common(size: Profile, experiment: Experiment, seed: int) -> dict:
    return {
        "dataset": experiment.dataset,
        "model": experiment.model,
        "seed": seed,
        "precision": experiment.precision or size.precision,
        "threads": size.threads,
        "validation": experiment.validation,
        "evaluate": "validation" if experiment.purpose == "search" else "test",
    }


def _recipe(experiment: Experiment, entry: Entry) -> Recipe:
    own = {"lr": entry.lr, "weight_decay": entry.weight_decay}
    changes: dict = {name: value for name, value in own.items() if value is not None}
    if entry.epochs is not None:
        changes["epochs"] = entry.epochs
    elif experiment.start and (entry.fresh or methods.method_class(entry.method).from_scratch):
        for name in ("epochs", "steps"):
            changes[name] = getattr(experiment.recipe, name) + getattr(experiment.start, name)
    return experiment.recipe.model_copy(update=changes)


def jobs(profile: str, planned: list[Planned]) -> dict[str, list[Planned]]:
    """Group runs into jobs of the batch, by paper, experiment, seed (and method), in order."""
    groups: dict[str, list[Planned]] = {}
    kinds = {name: card(name).profiles[profile].job for name in {run.paper for run in planned}}
    for run in planned:
        by_method = kinds[run.paper] == "method"
        start = run.settings.parent is None and run.settings.method == "dense"
        kind = "start" if start else run.settings.method
        parts = [run.paper, run.experiment, f"s{run.settings.seed}"] + [kind] * by_method
        groups.setdefault(".".join(parts), []).append(run)
    return groups


def needed_jobs(groups: dict[str, list[Planned]]) -> dict[str, set[str]]:
    """For each job, the jobs before it that train its runs, or parents of them."""
    owner: dict[str, str] = {}
    for name, runs in groups.items():
        for run in runs:
            owner.setdefault(run.settings.run, name)
    return {
        name: {
            owner.get(each.run, name)
            for run in runs
            for each in (run.settings, run.settings.parent)
            if each
        }
        - {name}
        for name, runs in groups.items()
    }
