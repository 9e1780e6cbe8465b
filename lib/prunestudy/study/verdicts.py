"""Verdicts on a paper's claims, made from records.

Verdicts are a rule: *confirmed* if the 95% interval of the paired per-seed difference lies on the
claimed side, *contradicted* if on the other, *undecided* otherwise.
"""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from prunestudy import methods
from prunestudy.papers import Card, Claim, Comparison
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store


class Interval:
    """Mean of paired differences with its 95% t-interval."""

    def __init__(self, n: int, mean: float, sd: float, low: float, high: float) -> None:
        self.n, self.mean, self.sd, self.low, self.high = n, mean, sd, low, high

    @classmethod
    def of(cls, values: list[float]) -> "Interval":
        """Return the interval of `values`; without bounds for fewer than two."""
        n = len(values)
        if not n:
            return cls(0, *[math.nan] * 4)
        mean = math.fsum(values) / n
        if n == 1:
            return cls(1, mean, *[math.nan] * 3)
        from scipy import stats  # late: it takes a second

        sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
        half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
        return cls(n, mean, sd, mean - half, mean + half)

    def verdict(self, at_least: float) -> str:
        """Judge the claim that the difference is at least `at_least`."""
        if self.n < 2:
            return "undecided"
        if self.low >= at_least:
            return "confirmed"
        return "contradicted" if self.high < at_least else "undecided"


def paired(store: Store, planned: list[Planned], test: Comparison) -> Interval:
    """Paired per-seed difference `test.method - test.against` of `test.metric`."""
    return _interval(pairs(store, planned, test), test.metric)


def _interval(
    compared: list[tuple[dict[str, Any], dict[str, Any] | None]], metric: str
) -> Interval:
    return Interval.of(
        [
            ours["metrics"][metric] - (theirs["metrics"][metric] if theirs else 0)
            for ours, theirs in compared
        ]
    )


def pairs(
    store: Store, planned: list[Planned], test: Comparison
) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """The records that `test` compares, by seed; without a control the second is None.

    Pairs share model, data, seed, target (where the control has one) and total epochs.
    """
    ours = _records(store, planned, test, (test.method, test.variant))
    if not test.against:
        return [(ours[key], None) for key in sorted(ours)]
    theirs = _records(store, planned, test, (test.against, test.against_variant))
    both = [(ours[key], theirs[key]) for key in sorted(ours) if key in theirs]
    return [(a, b) for a, b in both if _as_sparse(a["metrics"], b["metrics"], test)]


def _as_sparse(ours: dict[str, Any], theirs: dict[str, Any], test: Comparison) -> bool:
    """Whether the pair is close enough in what was removed, or ours removed more."""
    if test.within is None:
        return True
    more = _left(ours, test.target_kind) - _left(theirs, test.target_kind)
    return more <= test.within


def _left(metrics: dict[str, Any], kind: str) -> float:
    """Share (0-1) of the parameters or MACs that is left; else of the prunable weights."""
    if kind in ("parameters", "macs"):
        return metrics[kind] / metrics[f"dense_{kind}"]
    return 1 - metrics["sparsity"]


def _records(
    store: Store, planned: list[Planned], test: Comparison, side: tuple[str, str]
) -> dict[tuple[int, int], dict[str, Any]]:
    found = {}
    for item in planned:
        s = item.settings
        wanted = (*side, test.model, test.dataset) == (
            *(s.method, item.variant),
            *(s.model, s.dataset),
        )
        at_target = s.aim is None or (s.aim.value, s.aim.kind) == (test.target, test.target_kind)
        if wanted and at_target and item.purpose != "search":
            record = store.read(s)
            if record and record["metrics"].get(test.metric) is not None:
                found[s.seed, s.epochs] = record
    return found


def verdicts_table(store: Store, planned: list[Planned], paper: Card) -> pd.DataFrame:
    """One row per claim and comparison: difference, interval, n and verdict."""
    return judged(store, planned, paper).drop(columns="record")


def judged(store: Store, planned: list[Planned], paper: Card) -> pd.DataFrame:
    """`verdicts_table`, and in `record` the names of the compared runs of the first seed."""
    rows = [row for claim in paper.claims for row in _judge(store, planned, claim)]
    return pd.DataFrame(rows)


def _judge(store: Store, planned: list[Planned], claim: Claim) -> list[dict[str, Any]]:
    base = {"claim": claim.id, "says": claim.text, "mark": claim.mark}
    if claim.not_testable:
        return [base | {"verdict": "not testable here", "why": claim.not_testable, "record": ""}]
    rows = []
    for test in claim.tests:
        compared = pairs(store, planned, test)
        got = _interval(compared, test.metric)
        first = compared[0] if compared else ()
        record = " - ".join(side["run"] for side in first if side)
        sides = (test.method, test.variant), (test.against, test.against_variant)
        ours, theirs = (f"{name} ({label})" if label else name for name, label in sides)
        minus = f" - {theirs}" if theirs else ""
        rule = f"{ours}{minus} of {test.metric} >= {test.at_least:g}"
        where = f"{test.model}, {test.dataset}"
        if test.target:
            where += f", {removed(test.target, test.target_kind)} removed"
        numbers = {"difference": got.mean, "low": got.low, "high": got.high, "n": got.n}
        verdict = got.verdict(test.at_least) if got.n else "no runs in this profile"
        told = {"rule": rule, "where": where} | numbers
        rows.append(base | told | {"verdict": verdict, "record": record})
    return rows


def margin_to_dense(paper: Card, row: Mapping[str, Any]) -> float | None:
    """By how much at least this setting's metric is above dense, as the paper claims; or None."""
    keys = ("method", "variant", "model", "dataset", "target", "target_kind")
    for test in (test for claim in paper.claims for test in claim.tests):
        same = all(getattr(test, key) == row[key] for key in keys)
        if same and not test.variant and (test.against, test.metric) == ("dense", "metric"):
            return test.at_least
    return None


def removed(target: float, kind: str) -> str:
    """The target for people: "95% of weights"."""
    return f"{100 * target:g}% of {methods.TARGETS[kind]}"
