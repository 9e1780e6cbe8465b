"""Which runs a comparison means: a card's rules, written out over the planned runs of a profile."""

from collections.abc import Iterable
from typing import NamedTuple

from prunestudy.papers import Rule
from prunestudy.study.plan import Planned
from prunestudy.study.settings import Target

# By label, net and data set, then by target, then by seed and total epochs, which pairs share.
Index = dict[tuple[str, str, str], dict[Target | None, dict[tuple[int, int], Planned]]]


class Comparison(NamedTuple):
    """A rule on one net, data set and target, against one opponent ("": the metric itself).

    `pairs` are the runs of both sides by seed, without an opponent of one side.
    """

    rule: Rule
    against: str
    model: str
    dataset: str
    target: Target | None
    pairs: list[tuple[Planned, ...]]


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


def comparisons(rule: Rule, runs: Index) -> list[Comparison]:
    """All that `rule` compares among `runs`: where both sides have runs that pair."""
    found = []
    for (label, model, dataset), targets in runs.items():
        for target, ours in targets.items() if label == rule.method else ():
            share, kind = (target.value, target.kind) if target else (None, "")
            for against in rule.against or ("",):
                at = runs.get((against, model, dataset), {})
                theirs = at.get(target) or at.get(None, {})
                pairs = [(ours[key], theirs[key]) for key in sorted(ours) if key in theirs]
                if not against:
                    pairs = [(ours[key],) for key in sorted(ours)]
                if pairs and rule.covers(model, dataset, share, kind):
                    found.append(Comparison(rule, against, model, dataset, target, pairs))
    return found
