"""Verdicts on a paper's claims, made from records; what each is tested by stands in the card.

A test's unit is a seed: the paired difference of its runs, averaged over the claim's targets. Two
one-sided paired t-tests ask whether it lies above the bound (0, or minus the margin) or below; each
is adjusted by Holm's method over the paper's tests in the profile. A claim that has a test in the
card, and runs, but is tested on no net counts as one more, so that leaving it out helps no other.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from prunestudy import datasets, methods, places
from prunestudy.papers import Card, path_of
from prunestudy.papers.claims import Rule
from prunestudy.study.lines import Record, right_of
from prunestudy.study.plan import Planned
from prunestudy.study.provenance import is_before, rules_commit
from prunestudy.study.records import Store
from prunestudy.study.select import SEEDS, Comparison, chosen, comparisons, index, side_by_side
from prunestudy.study.statistics import OUTCOMES, decided, drawn, holm, interval, one_sided

Pairs = dict[int, list[list[Record]]]  # by seed, a pair of records for each target
# How much counts as nothing: of accuracy by data set, and in dB.
MARGINS = {"mnist": 0.001, "fashion_mnist": 0.003, "cifar10": 0.005, "cifar10_jpeg": 0.005}
PSNR_MARGIN = 0.2
_EQUAL = 1e-12  # a smaller deviation is that of rounding
MANY = 3  # seeds on which ours fails contradict a claim
BY_CONSTRUCTION, NOT_TESTABLE = "by construction", "not testable here"
NO_RUNS, YOUNGER = "no runs in this profile", "rule younger than its runs"
NO_AGE = "age of the rule not known: no full git history"
COLUMNS = (
    "paper claim kind model dataset method control chosen_by targets n mean low high "
    "p p_adjusted p_opposite p_opposite_adjusted verdict runs"
).split()
_WORDS = [*COLUMNS, *"says mark why metric scored margin failures".split()]
_NUMBERS = [*COLUMNS[10:17], "images_low", "images_high"]
_BLANK = dict.fromkeys(_WORDS, "") | dict.fromkeys(_NUMBERS, math.nan) | {"n": 0}


def called(label: str) -> str:
    """A label of the card for people: "gate variables (from scratch)"."""
    name, _, variant = label.partition(", ")
    title = methods.method_class(name).title.removesuffix(" (ours)")
    return f"{title} ({variant})" if variant else title


def fails(record: Record) -> bool:
    """Whether a run did not finish, or ended below twice chance on the validation images."""
    score, name = record["validation"].get("top1"), record["settings"]["dataset"]
    poor = score is not None and score < 2 / datasets.info(name).num_classes
    return record["status"] != "done" or poor


def observed(store: Store, comparison: Comparison) -> Pairs:
    """The records of `comparison` of those seeds that have all, on the device that has most."""
    by_device: dict[str, Pairs] = {}
    for seed in comparison.planned or comparison.seeds:
        pairs = comparison.seeds[seed]
        found = [side_by_side(store, pair) for pair in pairs]
        for device in set.intersection(*map(set, found)):
            by_device.setdefault(device, {})[seed] = [pair[device] for pair in found]
    return max(by_device.items(), key=lambda found: (len(found[1]), found[0]), default=("", {}))[1]


def verdicts_table(
    store: Store, planned: list[Planned], paper: Card, images: bool = False
) -> pd.DataFrame:
    """One row per claim, net and data set, and per control where none was chosen.

    `COLUMNS`, then what people read: the claim, why it has no test, failures, and with `images` the
    interval over seeds and images. Without a test p is empty, and `verdict` is too or says why.
    """
    runs = index(item for item in planned if item.paper == paper.id)
    best, rows = chosen(paper, store.folder.name), []
    for claim in paper.claims:
        said = {"paper": paper.id, "claim": claim.id, "says": claim.text, "mark": claim.mark}
        if claim.not_testable:
            rows.append(said | {"why": claim.not_testable, "verdict": NOT_TESTABLE})
        for rule in claim.tests:
            said |= {"kind": rule.kind, "method": rule.method, "metric": rule.metric}
            if rule.kind == "by_construction":
                rows.append(said | {"why": rule.why, "verdict": BY_CONSTRUCTION})
                continue
            found = [row_of(store, each, images) for each in comparisons(rule, runs, best)]
            none = {"control": "" if rule.controls else rule.against, "verdict": NO_RUNS}
            rows += [said | row for row in found or [none]]
    _test(rows, paper, store.folder.name)
    return pd.DataFrame([_BLANK | row for row in rows], columns=[*_BLANK])


def row_of(store: Store, comparison: Comparison, images: bool = False) -> dict[str, Any]:
    """What the records say of `comparison`; with its `p` if it is a test that can be made."""
    rule, control, chosen_by, model, dataset, kind, targets, _ = comparison
    found = observed(store, comparison)
    ours = [seed for seed in found if any(fails(pair[0]) for pair in found[seed])]
    theirs = [seed for seed in found if any(fails(r) for pair in found[seed] for r in pair[1:])]
    values = {s: _difference(rule, kind, found[s]) for s in found if s not in (*ours, *theirs)}
    d = {seed: value for seed, value in values.items() if not math.isnan(value)}
    n, mean, sd, low, high = interval([*d.values()])
    first = found[next(iter(d))] if d else []
    records = [record for pairs in found.values() for pair in pairs for record in pair]
    failures = [
        f"{called(who)} fails on seed{'s' * (len(at) > 1)} {', '.join(map(str, at))}"
        for who, at in ((rule.method, ours), (control, theirs))
        if at
    ]
    row = {
        "kind": rule.kind,
        "control": control,
        "chosen_by": chosen_by,
        "model": model,
        "dataset": dataset,
        "targets": " ".join([kind, *(f"{target:g}" for target in targets)] if kind else []),
        **{"n": n, "mean": mean, "low": low, "high": high},
        "runs": "; ".join(" - ".join(record["run"] for record in pair) for pair in first),
        "failures": "; ".join(failures),
        **{"primary": rule.primary, "planned": bool(comparison.planned), "there": bool(found)},
    }
    if first and rule.metric == "metric":
        row["scored"] = first[0][0]["metrics"]["metric_name"]
        row |= _with_images([found[seed] for seed in d]) if images and control and n > 1 else {}
    if not (rule.primary and found):
        return row if found else row | {"verdict": NO_RUNS}
    margin: float | None = 0.0  # None: nothing is agreed on
    if rule.kind == "non_inferiority":
        names = {record["metrics"].get("metric_name") for record in records}
        margin = row["margin"] = PSNR_MARGIN if "psnr" in names else MARGINS.get(dataset)
    if why := _why_not(comparison, margin, n, len(found), len(ours), len(theirs)):
        return row | {"kind": "description", "verdict": f"not tested: {why}"}
    if sd < _EQUAL and not ours:
        return row | {"kind": "by_construction", "verdict": BY_CONSTRUCTION}
    p, opposite = map(float, one_sided(np.array([*d.values()]) - rule.at_least + (margin or 0.0)))
    return row | {
        "p": math.nan if ours else p,  # a seed that fails never helps ours
        "p_opposite": opposite,
        "lost": len(ours),
        "commits": {record["environment"]["commit"] for record in records},
    }


def _why_not(
    comparison: Comparison, margin: float | None, n: int, found: int, ours: int, theirs: int
) -> str:
    """Why there is no test: `n` of `found` seeds count, and a side fails on some."""
    if comparison.chosen_by == "all":
        return "the card names no strongest control yet"
    if comparison.planned and ours >= MANY:
        return ""
    if comparison.planned and theirs:
        return "the control fails"
    if not comparison.planned or n + ours < len(SEEDS):
        larger = bool(comparison.planned) and found == len(SEEDS)
        return "ours is larger on some seeds" if larger else "fewer than eight seeds"
    return "no margin for this data set" if margin is None else ""


def _test(rows: list[dict[str, Any]], paper: Card, profile: str) -> None:
    """Adjust the p-values, and give the verdicts, in place; of data sets that have any run."""
    there, checkout = {row["dataset"] for row in rows if row.get("there")}, places.checkout()
    family = [row for row in rows if row.get("planned") and row["dataset"] in there]
    primary = {row["claim"] for row in rows if row.get("primary") and row["there"]}
    tests = [row for row in family if "commits" in row]
    places_of = [(row["model"], row["dataset"], row["chosen_by"] == "search") for row in tests]
    nets = dict.fromkeys(places_of if checkout else [])
    since = {net: rules_commit(checkout, path_of(paper.id), profile, *net) for net in nets}
    for row, net in zip(tests, places_of, strict=True):
        old = {is_before(checkout, since.get(net, ""), commit) for commit in row["commits"]}
        if old != {True}:
            verdict = YOUNGER if False in old else NO_AGE
            row.update(p=math.nan, p_opposite=math.nan, verdict=verdict)
    left_out = [math.nan] * len(primary - {row["claim"] for row in family})
    for name in ("p", "p_opposite"):
        values = [*(row.get(name, math.nan) for row in family), *left_out]
        for row, p in zip(family, holm(np.array(values)), strict=False):
            row[f"{name}_adjusted"] = float(p)
    for row in tests:
        outcome = str(decided(row["p_adjusted"], row["p_opposite_adjusted"]))
        row.setdefault("verdict", OUTCOMES[2] if row["lost"] >= MANY else outcome)


def claims_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per claim of `verdicts_table`: its text and mark, and what came out on top."""
    found = [
        (*key, f"{rows['says'].iloc[0]} [{rows['mark'].iloc[0]}]", _on_top(rows))
        for key, rows in table.groupby(["paper", "claim"], sort=False)
    ]
    return pd.DataFrame(found, columns=["paper", "claim", "text", "verdict"])


def _on_top(rows: pd.DataFrame) -> str:
    """The verdicts of a claim's `rows` in one line, or why there are none."""
    tested = rows["verdict"][rows["verdict"].isin(OUTCOMES)]
    if n := len(tested):
        counts = [f"{word} on {k}" for word in OUTCOMES if (k := int((tested == word).sum()))]
        return f"{', '.join(counts)} of {n} net{'s' * (n > 1)}"
    # The reason why a test was not made comes first, what needs none second.
    for begins in (YOUNGER, NO_AGE, "not tested", BY_CONSTRUCTION, NOT_TESTABLE):
        for verdict, why in rows[["verdict", "why"]].itertuples(index=False):
            if verdict.startswith(begins):
                return f"{verdict}: {why}" if why else verdict
    return NO_RUNS if (rows["verdict"] == NO_RUNS).all() else "described, not tested"


def _difference(rule: Rule, kind: str, pairs: list[list[Record]]) -> float:
    """Mean of ours minus theirs (or ours); NaN: one lacks it, or ours is larger than allowed."""
    found, name = [], rule.metric.removeprefix("-")
    for pair in pairs:
        values = [record["metrics"].get(name) for record in pair]
        more = 0.0 if rule.within is None else _left(pair[0], kind) - _left(pair[-1], kind)
        if None in values or more > (rule.within or 0.0):
            return math.nan
        found.append(values[0] - sum(values[1:]))
    return math.fsum(found) / len(found) * (1 if name == rule.metric else -1)


def _left(record: Record, kind: str) -> float:
    """Share (0-1) of the parameters or MACs that is left; else of the prunable weights."""
    metrics = record["metrics"]
    if kind in ("parameters", "macs"):
        return metrics[kind] / metrics[f"dense_{kind}"]
    return 1 - metrics["sparsity"]


def _with_images(seeds: list[list[list[Record]]]) -> dict[str, float]:
    """The interval over seeds and images, where all records say which images were right."""
    right = [[[right_of(record) for record in pair] for pair in pairs] for pairs in seeds]
    if any(each is None for pairs in right for pair in pairs for each in pair):
        return {}
    sides = np.array(right, dtype=float)  # seeds, targets, two, images
    return dict(zip(_NUMBERS[-2:], drawn((sides[:, :, 0] - sides[:, :, 1]).mean(1)), strict=True))


def removed(target: float, kind: str) -> str:
    """The target for people: "95% of weights"."""
    return f"{100 * target:g}% of {methods.TARGETS[kind]}"
