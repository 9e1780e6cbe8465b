import json

import golden
import pytest


@pytest.fixture(scope="module")
def before():
    return json.loads(golden.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("profile", golden.PROFILES)
def test_planned_runs_keep_their_names(before, profile):
    part = f"plan {profile}"
    assert golden.differences({part: before[part]}, {part: golden.planned(profile)}) == []


def test_published_numbers_stay(before):
    part = {"published": before["published"]}
    assert golden.differences(part, {"published": golden.published()}) == []


@pytest.mark.parametrize("profile", golden.WITH_RECORDS)
def test_tables_of_the_packed_records_keep_every_value(before, profile):
    now = {f"{table} {profile}": found for table, found in golden.tabled(profile).items()}
    assert golden.differences({name: before[name] for name in now}, now) == []


def test_a_changed_value_is_named():
    before = {"runs cpu": {"rows": "2", "metric": "a", "seed": "b"}}
    after = {"runs cpu": {"rows": "2", "metric": "c", "seed": "b"}}
    assert golden.differences(before, after) == ["runs cpu: metric: a is now c"]
