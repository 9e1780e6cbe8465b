"""Which runs a comparison means: a card's rules, written out over the planned runs of a profile."""

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple

from prunestudy.papers import Card
from prunestudy.papers.claims import Rule
from prunestudy.study.lines import Record
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store
from prunestudy.study.settings import Target

# By label, net and data set, then by target, then by seed and total epochs, which pairs share.
Index = dict[tuple[str, str, str], dict[Target | None, dict[tuple[int, int], Planned]]]
Pair = tuple[Planned, ...]  # ours and theirs, or ours alone
# No search and no run before the rules has used them: verdicts are made on these alone; on later
# ones where a rule or the method itself is younger than runs on the first.
SEEDS, LATER = range(10, 18), (range(20, 28), range(30, 38))


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
    seeds: dict[int, list[Pair]]

    @property
    def planned(self) -> range | None:
        """Seeds of the verdict, if one is planned: on all of eight, against a chosen opponent."""
        if not self.rule.primary or self.chosen_by == "all":
            return None
        return next((each for each in (SEEDS, *LATER) if set(each) <= self.seeds.keys()), None)


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


def side_by_side(store: Store, items: Sequence[Planned]) -> dict[str, list[Record]]:
    """The records of `items` by device, of those devices that have all of them."""
    sides = [{r["environment"]["device"]: r for r in store.read_all(i.settings)} for i in items]
    devices = sorted(set.intersection(*map(set, sides)))
    return {device: [side[device] for side in sides] for device in devices}


def chosen(card: Card, profile: str) -> set[tuple[str, ...]]:
    """Net, data set, kind of target and control, as the card has it from searches of `profile`."""
    rows = [row for row in card.strongest if row.profile == profile]
    return {(row.model, row.dataset, row.target_kind, row.control) for row in rows}


def comparisons(
    rule: Rule, runs: Index, strongest: Set[tuple[str, ...]] = frozenset()
) -> list[Comparison]:
    """All that `rule` compares among `runs`: where both sides have runs that pair."""
    found = []
    for (label, model, dataset), targets in runs.items():
        kinds = dict.fromkeys(target.kind if target else "" for target in targets)
        for kind in kinds if label == rule.method else ():
            place = (model, dataset, kind)
            controls, chosen_by = [rule.against], "claim" if rule.against else ""
            if rule.controls:
                best = [name for name in rule.controls if (*place, name) in strongest]
                controls, chosen_by = best or rule.controls, "search" if best else "all"
            for control in controls:
                units = _units(rule, runs, control, *place)
                found += [Comparison(rule, control, chosen_by, *place, *each) for each in units]
    return found


def _units(
    rule: Rule, runs: Index, control: str, model: str, dataset: str, kind: str
) -> Iterator[tuple[tuple[float, ...], dict[int, list[Pair]]]]:
    """Targets and pairs by seed, for each number of total epochs."""
    theirs = runs.get((control, model, dataset), {})
    found: dict[int, dict[int, dict[float, Pair]]] = {}
    for target, ours in runs[rule.method, model, dataset].items():
        share, own = (target.value, target.kind) if target else (0.0, "")
        at = {"models": model, "datasets": dataset, "targets": share}
        covered = all(at[name] in allowed for name, allowed in rule.where.items())
        if own == kind and covered and rule.target_kind in (None, kind):
            others = theirs.get(target) or theirs.get(None, {})
            for (seed, epochs), item in ours.items():
                if not control or (seed, epochs) in others:
                    pair = (item, others[seed, epochs]) if control else (item,)
                    found.setdefault(epochs, {}).setdefault(seed, {})[share] = pair
    for seeds in found.values():
        # The targets of the seeds that verdicts are made on, where these are planned.
        judged = [[seed for seed in seeds if seed in block] for block in (SEEDS, *LATER)]
        first = max(judged, key=len) or list(seeds)
        targets = tuple(sorted({share for seed in first for share in seeds[seed]}))
        whole = {seed: seeds[seed] for seed in sorted(seeds) if seeds[seed].keys() >= {*targets}}
        if whole:
            yield targets, {seed: [pairs[t] for t in targets] for seed, pairs in whole.items()}
