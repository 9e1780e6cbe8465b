"""Collecting: what goes into the tracked files, what is left out, what is refused."""

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import CARD, put_record, refusal, small_run, tree

from prunestudy.study import lines, runs, tables
from prunestudy.study.collect import collect
from prunestudy.study.lines import line_of, read_lines
from prunestudy.study.plan import plan
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner


def arrays_of(settings, add=0.0):
    return {"energy_before": np.arange(3.0) + settings.seed + add, "other": np.ones(2)}


@pytest.fixture
def settings(card_file):
    """Runs of the toy's quick profile: start, dense, magnitude, random, with two seeds each."""
    card_file(CARD.replace("seeds = 1", "seeds = 2"))
    return [item.settings for item in plan("quick")]


@pytest.fixture
def stores(tmp_path):
    return Store("quick", tmp_path / "here"), Store("quick", tmp_path / "there")


def fill(store, settings, **values):
    for each in settings:
        put_record(store, each, arrays=arrays_of(each), **values)


def run_collect(store, *folders, **values):
    return collect("quick", folders, store.folder.parent, **values)


def magnitude(settings):
    return next(s for s in settings if (s.method, s.seed) == ("magnitude", 0))


def tracked(store):
    paths = [*store.folder.glob("*.jsonl"), *store.folder.glob("arrays/*.safetensors")]
    return {path.name: path.read_bytes() for path in paths}


def lost(settings):
    return sorted(f"{s.run}: its arrays are missing or damaged" for s in settings)


def refused(*words, **values):
    return refusal(lambda: collect(*words, **values))


def test_finished_runs_become_lines_and_drawn_arrays(stores, settings):
    here, _ = stores
    fill(here, settings)
    assert run_collect(here) == []
    assert tracked(here).keys() == {"records.jsonl", "toy.safetensors"}
    text = here.collected.read_text()
    assert text.splitlines() == sorted(text.splitlines())
    assert list(read_lines(here.collected)) == sorted(s.run for s in settings)
    packed = lines.read_arrays(here.folder / "arrays" / "toy.safetensors")
    assert {key: a.tolist() for key, a in packed.items()} == {
        f"{s.run}/energy_before": [s.seed, s.seed + 1, s.seed + 2] for s in settings
    }
    before, stamps = tracked(here), tree(here.folder)
    assert run_collect(here) == []
    assert (tracked(here), tree(here.folder)) == (before, stamps)


def test_a_clone_reads_everything_and_trains_nothing(stores, settings, tmp_path, monkeypatch):
    here, _ = stores
    fill(here, settings)
    made = [here.require(s.run) for s in settings]
    table = tables.build(here, plan("quick"))
    run_collect(here)
    clone = Store("quick", tmp_path / "clone")
    for name in ("records.jsonl", "arrays/toy.safetensors"):
        (clone.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(here.folder / name, clone.folder / name)
    before = tree(clone.folder)
    monkeypatch.setattr(runs, "pruning", None)
    runner = Runner(clone)
    assert runner.device.type == "cpu"
    assert [runner.ensure(s) for s in settings] == made
    for one, other in zip(table, tables.build(clone, plan("quick")), strict=True):
        assert one.equals(other)
    ours = magnitude(settings)
    assert clone.arrays(ours.run)["energy_before"].tolist() == [0.0, 1.0, 2.0]
    assert clone.history(ours.run) == here.history(ours.run)
    assert run_collect(clone) == []
    shutil.rmtree(clone.folder / "work")
    assert tree(clone.folder) == before


@pytest.mark.parametrize("way", ["profile", "results", "collected"])
def test_records_of_another_machine_are_added(stores, settings, way):
    here, there = stores
    fill(here, settings[:3])
    fill(there, settings[2:])
    if way == "collected":
        run_collect(there)
        shutil.rmtree(there.runs)
    source = there.folder.parent if way == "results" else there.folder
    assert run_collect(here, source) == []
    assert list(read_lines(here.collected)) == sorted(s.run for s in settings)
    assert here.arrays(magnitude(settings).run)["energy_before"].tolist() == [0.0, 1.0, 2.0]


def test_a_stored_record_stays_and_the_newcomer_is_named(stores, settings):
    here, there = stores
    ours = magnitude(settings)
    put_record(here, ours, 0.5, arrays=arrays_of(ours))
    run_collect(here)
    before = tracked(here)
    put_record(there, ours, 0.6, arrays=arrays_of(ours, 1.0))
    named = [f"{ours.run}: is stored already with other numbers; that record is kept"]
    assert run_collect(here, there.folder) == named
    assert tracked(here) == before
    assert run_collect(here, there.folder, replace=True) == []
    assert here.require(ours.run)["metrics"]["metric"] == 0.6
    assert here.arrays(ours.run)["energy_before"].tolist() == [1.0, 2.0, 3.0]
    # the one trained here is the newcomer now
    assert run_collect(here) == named
    assert here.require(ours.run)["metrics"]["metric"] == 0.6
    assert run_collect(here, replace=True) == []
    assert tracked(here) == before


def test_a_missing_latency_is_taken_and_one_that_is_there_stays(stores, settings):
    here, there = stores
    fill(here, settings)
    run_collect(here)
    for ms in (0.5, 0.75):
        fill(there, settings[:1], latency={"latency_b1_ms": ms})
        assert run_collect(here, there.folder) == []
        assert here.require(settings[0].run)["latency"]["ms"] == {"latency_b1_ms": 0.5}
    assert here.require(settings[1].run)["latency"] is None
    here.write_latency(settings[1].run, {"ms": {"latency_b1_ms": 0.25}})
    run_collect(here)
    assert read_lines(here.collected)[settings[1].run]["latency"]["ms"] == {"latency_b1_ms": 0.25}


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("with other settings", lambda r: r["settings"]["recipe"].update(lr=0.06)),
        ("with other settings", lambda r: r["settings"].update(colour="red")),
        ("from other data", lambda r: r["data"].update(fingerprint="0")),
    ],
)
@pytest.mark.parametrize("replace", [False, True])
def test_other_settings_or_data_are_refused_and_nothing_changes(
    stores, settings, why, change, replace
):
    here, there = stores
    fill(here, settings[:2])
    run_collect(here)
    fill(here, settings)
    fill(there, settings)
    record = there.require(settings[1].run)
    change(record)
    path = there.path(settings[1].run) / "record.json"
    path.write_text(line_of(record) + "\n")
    before = tree(here.folder)
    line = refused("quick", [there.folder], here.folder.parent, replace)
    assert line.startswith(f"record = {settings[1].run}: was made {why} in {path.parent};")
    assert tree(here.folder) == before


def test_a_default_that_was_added_since_is_no_other_setting(stores, settings):
    here, _ = stores
    put_record(here, settings[0])
    record = here.require(settings[0].run)
    del record["settings"]["recipe"]["warmup_from"]
    lines.write_text(here.collected, line_of(record) + "\n")
    before = tracked(here)
    assert run_collect(here) == []
    assert tracked(here) == before


def test_a_run_on_cuda_stands_beside_the_one_on_the_cpu(stores, settings):
    here, there = stores
    ours = magnitude(settings)
    put_record(here, ours, 0.5, arrays=arrays_of(ours))
    put_record(there, ours, 0.6, arrays=arrays_of(ours, 1.0), device="NVIDIA H100")
    assert run_collect(here, there.folder) == []
    assert list(read_lines(here.collected)) == [ours.run, f"{ours.run}-cuda"]
    assert [record["metrics"]["metric"] for record in here.read_all(ours)] == [0.5, 0.6]
    found = [here.arrays_of(record)["energy_before"][0] for record in here.read_all(ours)]
    assert found == [0.0, 1.0]
    assert here.devices() == {"cpu", "cuda"}
    assert run_collect(here, there.folder) == []


def test_what_the_profile_does_not_plan_is_left_out_and_named(stores, settings):
    here, there = stores
    other = small_run(seed=9)
    fill(there, [*settings, other])
    assert run_collect(here, there.folder) == [f"{other.run}: is not planned in quick"]
    assert len(read_lines(here.collected)) == len(settings)
    put_record(Store("custom", here.folder.parent), other)
    assert collect("custom", results=here.folder.parent) == []


def test_of_a_searchs_runs_layers_and_groups_are_not_kept(tmp_path):
    store = Store("custom", tmp_path)
    for evaluate in ("test", "validation"):
        settings = small_run().model_copy(update={"evaluate": evaluate})
        put_record(store, settings, 0.75, layers={"a": 0.5}, report=[{"b": 1}])
    assert collect("custom", results=tmp_path) == []
    found = {r["settings"]["evaluate"]: r["metrics"] for r in read_lines(store.collected).values()}
    assert found["test"]["layers"] == {"a": 0.5}
    assert found["test"].keys() - found["validation"].keys() == {"layers", "report"}
    assert found["validation"]["metric"] == 0.75
    before = tracked(store)
    assert collect("custom", results=tmp_path) == []  # it is no other result
    assert tracked(store) == before


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_records_and_an_unknown_profile_are_refused(stores, tmp_path, name):
    (tmp_path / "empty").mkdir()
    line = refused("quick", [tmp_path / name], stores[0].folder.parent)
    assert line == f"folder = {str(tmp_path / name)!r}: has neither records.jsonl nor runs/"
    assert refused("quick", [""]).startswith("folder = '': the path of a file")
    assert refused("quik", results=stores[0].folder.parent).startswith("profile = 'quik': allowed")
    assert not stores[0].folder.exists()


@pytest.mark.parametrize("where", ["here", "there", "folder", "wrong folder"])
def test_damaged_records_stop_it_with_nothing_changed(stores, settings, where):
    here, there = stores
    fill(here, settings[:2])
    run_collect(here)
    fill(here, settings)
    fill(there, settings)
    run_collect(there)
    if where == "wrong folder":
        shutil.rmtree(here.path(settings[1].run))
        shutil.copytree(here.path(settings[0].run), here.path(settings[1].run))
    else:
        path = (here if where != "there" else there).collected
        path = here.path(settings[1].run) / "record.json" if where == "folder" else path
        path.write_text(path.read_text().replace("0.9", "0.8"))
    before = tree(here.folder)
    line = refused("quick", [there.folder], here.folder.parent)
    assert ("is that of another run" if where == "wrong folder" else "was edited") in line
    assert tree(here.folder) == before


def test_lost_arrays_are_named_and_come_back(stores, settings):
    here, _ = stores
    fill(here, settings)
    run_collect(here)
    before = tracked(here)
    packed = here.folder / "arrays" / "toy.safetensors"
    packed.write_bytes(packed.read_bytes()[:-1])
    runs_aside = here.runs.rename(here.folder / "aside")
    assert run_collect(here) == lost(settings)
    runs_aside.rename(here.runs)
    assert run_collect(here) == []
    assert tracked(here) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from prunestudy import papers
papers.files = lambda _: Path(sys.argv[1])
from prunestudy.study.collect import collect
for number, (call, at) in enumerate((("write_bytes", 1), ("replace", 1), ("replace", 2))):
    real, seen = getattr(Path, call), []
    def counted(self, *words):
        seen.append(self.name)
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *words)
    if not os.fork():
        setattr(Path, call, counted)
        collect("quick", [sys.argv[2]], f"{sys.argv[3]}{number}", True)
    print(os.wait()[1])
"""


def test_killed_in_the_middle_each_file_is_the_old_or_the_new(stores, settings, tmp_path):
    """At the writing of the first file, ahead of its renaming, and ahead of the second's."""
    here, there = stores
    for store, add in ((here, 0.0), (there, 1.0)):
        for each in settings:
            put_record(store, each, 0.5 + add / 10, arrays=arrays_of(each, add))
    run_collect(here)
    old, changed = tracked(here), []
    for number in range(3):
        shutil.copytree(here.folder.parent, tmp_path / f"killed{number}")
    words = map(str, (tmp_path / "cards", there.folder, tmp_path / "killed"))
    command = [sys.executable, "-c", KILLED, *words]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(int(signal.SIGKILL))] * 3
    for number in range(3):
        killed = Store("quick", tmp_path / f"killed{number}")
        middle = tracked(killed)
        run_collect(killed)  # as if nothing had happened
        assert killed.require(settings[0].run)["metrics"]["metric"] == 0.5
        assert run_collect(killed, there.folder, replace=True) == []
        new = tracked(killed)
        assert all(middle[name] in (old[name], new[name]) for name in old)
        assert [killed.require(s.run)["metrics"]["metric"] for s in settings] == [0.6] * len(
            settings
        )
        changed.append([name for name in old if middle[name] != old[name]])
    assert changed == [[], [], ["toy.safetensors"]]


def test_two_at_once_and_runs_written_meanwhile(stores, settings):
    """Three threads collect while the runs are written: none fails, nothing is lost."""
    here, there = stores
    fill(there, settings[4:])
    failed = []

    def work():
        try:
            for _ in range(5):
                run_collect(here, there.folder)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    fill(here, settings[:4])
    for thread in threads:
        thread.join()
    assert failed == []
    assert run_collect(here, there.folder) == []
    assert list(read_lines(here.collected)) == sorted(s.run for s in settings)
    assert {p.name for p in Path(here.folder).iterdir()} == {
        "arrays",
        "records.jsonl",
        "runs",
        "work",
    }
