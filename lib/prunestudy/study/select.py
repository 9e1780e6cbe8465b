"""Which runs a comparison means: a card's rules, written out over the planned runs of a profile."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from prunestudy.papers import Card
from prunestudy.papers.claims import Rule
from prunestudy.study.plan import Planned
from prunestudy.study.settings import Target

# By label, net and data set, then by target, then by seed and total epochs, which pairs share.
Index = dict[tuple[str, str, str], dict[Target | None, dict[tuple[int, int], Planned]]]
# The controls that the searches chose, by net, data set and kind of target.
Chosen = Mapping[tuple[str, str, str], Collection[str]]
# No search and no run before the rules has used them: verdicts are made on these alone.
SEEDS = range(10, 18)


class Comparison(NamedTuple):
    """A rule on one net and data set, at all its targets of one kind, against one opponent.

    `control` is the opponent's label ("": the metric itself), and `chosen_by` says whether the
    claim names it, the search chose it, or it is one of "all" controls. `seeds` has a pair of runs
    for each of `targets` (without an opponent ours alone), of every seed that has all of them.
    """

    rule: Rule
    control: str
    chosen_by: str
    model: str
    dataset: str
    kind: str
    targets: tuple[float, ...]
    seeds: dict[int, list[tuple[Planned, ...]]]

    @property
    def planned(self) -> bool:
        """Whether a verdict is planned: with a chosen opponent, on all of `SEEDS`."""
        return self.rule.primary and self.chosen_by != "all" and set(SEEDS) <= self.seeds.keys()


def index(planned: Iterable[Planned]) -> Index:
    """The runs that are judged on test images, by what a comparison asks for."""
    found: Index = {}
    for item in planned:
        s = item.settings
        if item.purpose != "search":
            label = ", ".join(filter(None, (s.method, item.variant)))
            side = found.setdefault((label, s.model, s.dataset), {}).setdefault(s.aim, {})
            side.setdefault((s.seed, s.epochs), item)
    return found


def chosen(card: Card, profile: str) -> Chosen:
    """What the searches of `profile` chose, as the card has it."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for row in card.strongest:
        if row.profile == profile:
            found.setdefault((row.model, row.dataset, row.target_kind), set()).add(row.control)
    return found


def comparisons(rule: Rule, runs: Index, strongest: Chosen | None = None) -> list[Comparison]:
    """All that `rule` compares among `runs`: where both sides have runs that pair."""
    found = []
    for (label, model, dataset), targets in runs.items():
        kinds = dict.fromkeys(target.kind if target else "" for target in targets)
        for kind in kinds if label == rule.method else ():
            place = (model, dataset, kind)
            controls, chosen_by = [rule.against], "claim" if rule.against else ""
            if rule.controls:
                best = [name for name in rule.controls if name in (strongest or {}).get(place, ())]
                controls, chosen_by = best or rule.controls, "search" if best else "all"
            for control in controls:
                words = (rule, control, chosen_by, *place)
                found += [
                    Comparison(*words, *units) for units in _units(rule, runs, control, *place)
                ]
    return found


def _units(
    rule: Rule, runs: Index, control: str, model: str, dataset: str, kind: str
) -> Iterator[tuple[tuple[float, ...], dict[int, list[tuple[Planned, ...]]]]]:
    """Targets and pairs by seed, for each number of total epochs."""
    theirs = runs.get((control, model, dataset), {})
    found: dict[int, dict[int, dict[float, tuple[Planned, ...]]]] = {}
    for target, ours in runs[rule.method, model, dataset].items():
        share, own = (target.value, target.kind) if target else (0.0, "")
        if own == kind and rule.covers(model, dataset, share, kind):
            others = theirs.get(target) or theirs.get(None, {})
            for (seed, epochs), item in ours.items():
                if not control or (seed, epochs) in others:
                    pair = (item, others[seed, epochs]) if control else (item,)
                    found.setdefault(epochs, {}).setdefault(seed, {})[share] = pair
    for seeds in found.values():
        # The targets of the seeds that verdicts are made on, where these are planned.
        shares = [share for seed in seeds if seed in SEEDS for share in seeds[seed]]
        targets = tuple(sorted({*(shares or (s for pairs in seeds.values() for s in pairs))}))
        whole = {seed: seeds[seed] for seed in sorted(seeds) if seeds[seed].keys() >= {*targets}}
        if whole:
            yield targets, {seed: [pairs[t] for t in targets] for seed, pairs in whole.items()}
