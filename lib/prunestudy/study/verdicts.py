"""Verdicts on a paper's claims, made from records.

A verdict is a rule: *confirmed* if the 95% interval of the paired per-seed difference lies on the
claimed side, *contradicted* if on the other, *undecided* otherwise.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from prunestudy import methods
from prunestudy.papers import Card, Rule
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store
from prunestudy.study.select import Comparison, comparisons, index

Record = dict[str, Any]
NO_RUNS = "no runs in this profile"
_COLUMNS = "claim says mark rule where difference low high n verdict record".split()
_NO = {"where": "", "n": 0, "record": ""}


def interval(values: Sequence[float]) -> tuple[int, float, float, float, float]:
    """Number, mean, standard deviation and 95% t-interval (low, high) of paired differences.

    NaN stands for what fewer than two values do not determine.
    """
    n = len(values)
    if n < 2:
        return n, *(values or [math.nan]), math.nan, math.nan, math.nan
    from scipy.special import stdtrit  # late: it takes a second

    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
    return n, mean, sd, mean - half, mean + half


def verdict(low: float, high: float, at_least: float) -> str:
    """Judge the claim that a difference is at least `at_least` by its interval (NaN: none)."""
    if low >= at_least:
        return "confirmed"
    return "contradicted" if high < at_least else "undecided"


def pairs(store: Store, comparison: Comparison) -> list[list[Record]]:
    """The records that `comparison` is on, by seed; without an opponent of one side.

    A pair is of one device and has the metric; with the rule's `within` it counts only where ours
    removed as much, or at most that share less.
    """
    rule, kind = comparison.rule, comparison.target.kind if comparison.target else ""
    found = []
    for items in comparison.pairs:
        sides = [
            {
                record["environment"]["device"]: record
                for record in store.read_all(item.settings)
                if record["metrics"].get(rule.metric) is not None
            }
            for item in items
        ]
        for device in sorted(set.intersection(*map(set, sides))):
            pair = [side[device] for side in sides]
            if rule.within is None or _left(pair[0], kind) - _left(pair[-1], kind) <= rule.within:
                found.append(pair)
    return found


def _left(record: Record, kind: str) -> float:
    """Share (0-1) of the parameters or MACs that is left; else of the prunable weights."""
    metrics = record["metrics"]
    if kind in ("parameters", "macs"):
        return metrics[kind] / metrics[f"dense_{kind}"]
    return 1 - metrics["sparsity"]


def verdicts_table(store: Store, planned: list[Planned], paper: Card) -> pd.DataFrame:
    """One row per claim and comparison: difference, interval, n and verdict.

    `record` names the compared runs of the first seed. For a claim that is not tested, `rule` is
    the reason why not.
    """
    runs = index(item for item in planned if item.paper == paper.id)
    rows: list[dict[str, Any]] = []
    for claim in paper.claims:
        said = {"claim": claim.id, "says": claim.text, "mark": claim.mark}
        if claim.not_testable:
            rows.append(said | {"rule": claim.not_testable, "verdict": "not testable here"} | _NO)
        for rule in claim.tests:
            found = [judged(store, comparison) for comparison in comparisons(rule, runs)]
            told = _told(rule, rule.against, rule.margin("other"))
            rows += [said | row for row in found or [{"rule": told, "verdict": NO_RUNS} | _NO]]
    return pd.DataFrame(rows, columns=_COLUMNS)


def judged(store: Store, comparison: Comparison) -> dict[str, Any]:
    """The result of `comparison`: its rule and place for people, the difference, the verdict."""
    rule, against, model, dataset, target, _ = comparison
    margin, compared = rule.margin(dataset), pairs(store, comparison)
    values = [[record["metrics"][rule.metric] for record in pair] for pair in compared]
    n, mean, _, low, high = interval([ours - sum(theirs) for ours, *theirs in values])
    share = [f"{removed(target.value, target.kind)} removed"] if target else []
    return {
        "rule": _told(rule, (against,) * bool(against), margin),
        "where": ", ".join([model, dataset, *share]),
        "difference": mean,
        "low": low,
        "high": high,
        "n": n,
        "verdict": verdict(low, high, margin) if n else NO_RUNS,
        "record": " - ".join(record["run"] for pair in compared[:1] for record in pair),
    }


def _told(rule: Rule, against: tuple[str, ...], margin: float) -> str:
    """The rule for people: "magnitude - random (rows) of metric >= 0"."""
    words = [label.partition(", ") for label in (rule.method, *against)]
    ours, *theirs = [f"{name} ({more})" if more else name for name, _, more in words]
    sides = f"{ours} - {' or '.join(theirs)}" if theirs else ours
    return f"{sides} of {rule.metric} >= {margin:g}"


def removed(target: float, kind: str) -> str:
    """The target for people: "95% of weights"."""
    return f"{100 * target:g}% of {methods.TARGETS[kind]}"
