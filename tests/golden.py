"""Digests of what must not change: names of planned runs, values of the tables.

    python tests/golden.py            prints what differs from tests/golden.json
    python tests/golden.py --write    makes it anew, where a change is meant

A digest stands for one experiment's runs, or for one column of a table, so that a difference says
where it lies. Verdicts are left out: their rules change with the cards. The quick profile's numbers
differ in the last bits between processors; only the names of its runs are kept.
"""

import hashlib
import json
import sys
from pathlib import Path

import pandas as pd

from prunestudy.papers import PROFILES, cards
from prunestudy.study import tables
from prunestudy.study.plan import plan
from prunestudy.study.records import Store

FILE = Path(__file__).with_name("golden.json")
WITH_RECORDS = ("cpu", "cpu-long")
RUN_COLUMNS = (
    "run parent paper method variant model dataset seed epochs precision threads target_kind "
    "target sparsity parameters nonzeros macs nonzero_macs dense_parameters dense_macs "
    "metric_name metric dense_metric macro_f1 latency_b1_ms latency_b128_ms "
    "dense_latency_b1_ms dense_latency_b128_ms peak_memory_mb bytes train_seconds status"
).split()
SUMMARY_COLUMNS = (
    "paper method variant model dataset epochs precision threads target_kind target metric_name "
    "n diverged metric metric_sd dense_metric difference_n difference difference_sd "
    "difference_low difference_high sparsity nonzeros published mark source"
).split()


def digest(lines) -> str:
    """Twelve digits of the SHA-256 of `lines`."""
    return hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()[:12]


def planned(profile: str) -> dict[str, str]:
    """Paper and experiment to the number of runs and the digest of their names and labels."""
    found: dict[str, list[str]] = {}
    for item in plan(profile):
        row = f"{item.settings.run} {item.purpose} {item.variant}"
        found.setdefault(f"{item.paper}.{item.experiment}", []).append(row)
    return {name: f"{len(rows)} {digest(sorted(rows))}" for name, rows in found.items()}


def published() -> dict[str, str]:
    """Paper to the digest of its published numbers and ranks."""
    return {
        card.id: digest(
            json.dumps(each.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
            for each in (*card.published, *card.ranks)
        )
        for card in cards()
    }


def columns(table: pd.DataFrame, names: list[str]) -> dict[str, str]:
    """Column to the digest of its cells as the CSV file has them; rows in the order of all."""
    text = table[names].sort_values(names, ignore_index=True)
    return {"rows": str(len(text))} | {
        name: digest(tables.text_of(text[[name]]).splitlines()) for name in names
    }


def tabled(profile: str, results: str = "") -> dict[str, dict[str, str]]:
    """The columns of both tables, made anew from the records of `profile`."""
    runs, summary = tables.build(Store(profile, results or None), plan(profile))
    return {"runs": columns(runs, RUN_COLUMNS), "summary": columns(summary, SUMMARY_COLUMNS)}


def golden() -> dict[str, dict]:
    """Everything that is compared, as tests/golden.json has it."""
    found: dict[str, dict] = {f"plan {name}": planned(name) for name in PROFILES}
    found["published"] = published()
    for profile in WITH_RECORDS:
        for table, values in tabled(profile).items():
            found[f"{table} {profile}"] = values
    return found


def differences(before: dict, after: dict) -> list[str]:
    """One line for each digest that is not the same."""
    lines = []
    for part in sorted(before.keys() | after.keys()):
        old, new = before.get(part, {}), after.get(part, {})
        lines += [
            f"{part}: {name}: {old.get(name, '-')} is now {new.get(name, '-')}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
    return lines


def main(words: list[str]) -> int:
    """Compare, or write; return the number of differences."""
    found = golden()
    if words == ["--write"]:
        FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    lines = differences(json.loads(FILE.read_text(encoding="utf-8")), found)
    print(*lines, sep="\n")
    return len(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
