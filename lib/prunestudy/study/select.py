"""Which runs a comparison means: a card's rules, written out over the planned runs of a profile."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prunestudy.papers import Card, Rule
from prunestudy.study.plan import Planned
from prunestudy.study.settings import Target

# By seed and total epochs, which pairs share.
Side = dict[tuple[int, int], Planned]
# By label, net and data set, then by target.
Index = dict[tuple[str, str, str], dict[Target | None, Side]]


@dataclass(frozen=True)
class Comparison:
    """A rule on one net, data set and target, against one opponent ("": the metric itself).

    `theirs` has the keys of `ours`: seed and total epochs. Without an opponent it is empty.
    """

    rule: Rule
    against: str
    model: str
    dataset: str
    target: Target | None
    ours: Side
    theirs: Side

    @property
    def at_least(self) -> float:
        """The least difference that the claim is about."""
        return self.rule.margin(self.dataset)

    def pairs(self) -> Iterator[tuple[Planned, Planned | None]]:
        """The runs of both sides, by seed."""
        return ((self.ours[key], self.theirs.get(key)) for key in sorted(self.ours))


def index(planned: Iterable[Planned]) -> Index:
    """The runs that are looked at on test images, by what a comparison asks for, in one pass."""
    found: Index = {}
    for item in planned:
        s = item.settings
        if item.purpose != "search":
            label = ", ".join(filter(None, (s.method, item.variant)))
            side = found.setdefault((label, s.model, s.dataset), {}).setdefault(s.aim, {})
            side.setdefault((s.seed, s.epochs), item)
    return found


def comparisons(rule: Rule, runs: Index) -> list[Comparison]:
    """All that `rule` compares among `runs`: where both sides have runs that pair."""
    found = []
    for (label, model, dataset), targets in runs.items():
        for target, ours in targets.items() if label == rule.method else ():
            if not _covers(rule, model, dataset, target):
                continue
            for against in rule.against or ("",):
                at = runs.get((against, model, dataset), {})
                theirs = at.get(target) or at.get(None, {})
                both = {key: ours[key] for key in ours if key in theirs or not against}
                if both:
                    other = {key: theirs[key] for key in both} if against else {}
                    found.append(Comparison(rule, against, model, dataset, target, both, other))
    return found


def _covers(rule: Rule, model: str, dataset: str, target: Target | None) -> bool:
    kind = target.kind if target else ""
    return rule.covers(model, dataset, target.value if target else None, kind)


def of_card(card: Card, planned: Iterable[Planned]) -> list[Comparison]:
    """Every comparison of the card's claims among its planned runs."""
    runs = index(item for item in planned if item.paper == card.id)
    tests = [rule for claim in card.claims for rule in claim.tests]
    return [comparison for rule in tests for comparison in comparisons(rule, runs)]
