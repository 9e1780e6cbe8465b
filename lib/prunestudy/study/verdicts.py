"""Verdicts on a paper's claims, made from records.

Verdicts are a rule: *confirmed* if the 95% interval of the paired per-seed difference lies on the
claimed side, *contradicted* if on the other, *undecided* otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prunestudy import methods
from prunestudy.papers import Card, Rule
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store
from prunestudy.study.select import Comparison, comparisons, index

Record = dict[str, Any]
NO_RUNS = "no runs in this profile"


@dataclass(frozen=True)
class Interval:
    """Mean of `n` paired differences with its standard deviation and 95% t-interval."""

    n: int
    mean: float
    sd: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Interval":
        """Return the interval of `values`; without bounds for fewer than two."""
        n = len(values)
        if not n:
            return cls(0, *[math.nan] * 4)
        mean = math.fsum(values) / n
        if n == 1:
            return cls(1, mean, *[math.nan] * 3)
        from scipy.special import stdtrit  # late: it takes a second

        sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
        half = float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
        return cls(n, mean, sd, mean - half, mean + half)

    def verdict(self, at_least: float) -> str:
        """Judge the claim that the difference is at least `at_least`."""
        if self.n < 2:
            return "undecided"
        if self.low >= at_least:
            return "confirmed"
        return "contradicted" if self.high < at_least else "undecided"


def pairs(store: Store, comparison: Comparison) -> list[tuple[Record, Record | None]]:
    """The records that `comparison` is on, by seed; without an opponent the second is None.

    A pair is of one device and has the metric; with the rule's `within` it counts only where ours
    removed as much, or at most that share less.
    """
    rule, found = comparison.rule, []
    for ours, theirs in comparison.pairs():
        others = _by_device(store, theirs, rule.metric) if theirs else None
        for device, record in _by_device(store, ours, rule.metric).items():
            if others is None:
                found.append((record, None))
            elif device in others and _as_small(record, others[device], comparison):
                found.append((record, others[device]))
    return found


def _by_device(store: Store, item: Planned, metric: str) -> dict[str, Record]:
    records = store.read_all(item.settings)
    with_metric = [r for r in records if r["metrics"].get(metric) is not None]
    return {record.get("environment", {}).get("device", ""): record for record in with_metric}


def _as_small(ours: Record, theirs: Record, comparison: Comparison) -> bool:
    within, target = comparison.rule.within, comparison.target
    if within is None:
        return True
    kind = target.kind if target else ""
    return _left(ours["metrics"], kind) - _left(theirs["metrics"], kind) <= within


def _left(metrics: dict[str, Any], kind: str) -> float:
    """Share (0-1) of the parameters or MACs that is left; else of the prunable weights."""
    if kind in ("parameters", "macs"):
        return metrics[kind] / metrics[f"dense_{kind}"]
    return 1 - metrics["sparsity"]


def difference(compared: list[tuple[Record, Record | None]], metric: str) -> Interval:
    """Interval of what `metric` differs by in `compared` pairs of records."""
    sides = [(a["metrics"][metric], b["metrics"][metric] if b else 0.0) for a, b in compared]
    return Interval.of([ours - theirs for ours, theirs in sides])


def verdicts_table(store: Store, planned: list[Planned], paper: Card) -> pd.DataFrame:
    """One row per claim and comparison: difference, interval, n and verdict."""
    return judged(store, planned, paper).drop(columns="record")


def judged(store: Store, planned: list[Planned], paper: Card) -> pd.DataFrame:
    """`verdicts_table`, and in `record` the names of the compared runs of the first seed."""
    runs = index(item for item in planned if item.paper == paper.id)
    rows: list[dict[str, Any]] = []
    for claim in paper.claims:
        base = {"claim": claim.id, "says": claim.text, "mark": claim.mark}
        if claim.not_testable:
            why = {"verdict": "not testable here", "why": claim.not_testable, "record": ""}
            rows.append(base | why)
        for rule in claim.tests:
            found = [_judge(store, comparison) for comparison in comparisons(rule, runs)]
            rows += [base | row for row in found or [_without_runs(rule)]]
    return pd.DataFrame(rows)


def _judge(store: Store, comparison: Comparison) -> dict[str, Any]:
    c, compared = comparison, pairs(store, comparison)
    got = difference(compared, c.rule.metric)
    where = [c.model, c.dataset]
    if c.target:
        where.append(f"{removed(c.target.value, c.target.kind)} removed")
    return {
        "rule": _told(c.rule, c.against, f"{c.at_least:g}"),
        "where": ", ".join(where),
        "difference": got.mean,
        "low": got.low,
        "high": got.high,
        "n": got.n,
        "verdict": got.verdict(c.at_least) if got.n else NO_RUNS,
        "record": " - ".join(side["run"] for side in compared[0] if side) if compared else "",
    }


def _without_runs(rule: Rule) -> dict[str, Any]:
    margin = "its margin" if isinstance(rule.at_least, dict) else f"{rule.at_least:g}"
    nothing = {"where": "", **dict.fromkeys(("difference", "low", "high"), math.nan), "n": 0}
    told = {"rule": _told(rule, ", ".join(rule.against), margin)}
    return told | nothing | {"verdict": NO_RUNS, "record": ""}


def _told(rule: Rule, against: str, margin: str) -> str:
    words = (label.partition(", ") for label in (rule.method, against) if label)
    sides = (f"{name} ({variant})" if variant else name for name, _, variant in words)
    return f"{' - '.join(sides)} of {rule.metric} >= {margin}"


def margin_to_dense(paper: Card, row: Mapping[str, Any]) -> float | None:
    """By how much at least this setting's metric is above dense, as the paper claims; or None."""
    where = (row["model"], row["dataset"], row["target"], row["target_kind"])
    for rule in (rule for claim in paper.claims for rule in claim.tests):
        plain = rule.metric == "metric" and "dense" in rule.against
        if plain and not row["variant"] and rule.method == row["method"] and rule.covers(*where):
            return rule.margin(row["dataset"])
    return None


def removed(target: float, kind: str) -> str:
    """The target for people: "95% of weights"."""
    return f"{100 * target:g}% of {methods.TARGETS[kind]}"
