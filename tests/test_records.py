"""Records and runs: trained once, read back as they were, refused in one line otherwise."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import child_run, one_line, put_record, small_run, tree
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from torch import nn

from prunestudy import datasets, measure
from prunestudy.errors import InputError
from prunestudy.study import cli, lines, provenance, records, runs
from prunestudy.study.commands import differences
from prunestudy.study.lines import line_of, parse
from prunestudy.study.records import Store, name_of
from prunestudy.study.runs import Runner
from prunestudy.train import read_checkpoint

DIVERGED = {"epochs": 2, "lr": 1e18}
KEYS = {*"run format parent status settings data metrics validation history latency cost".split()}
KEYS |= {"environment", "files", "right"}


def own(store, run):
    return store.path(run) / "record.json"


def edited(store, run, change, sign=True):
    """Change the record of `run` on disk; with `sign` its checksum is made to fit."""
    record = json.loads(own(store, run).read_text())
    change(record)
    text = line_of(record) if sign else json.dumps(record, separators=(",", ":"))
    own(store, run).write_text(text + "\n")


def collected(store, *found):
    """Write `found` into the file of collected records."""
    lines.write_text(store.collected, "".join(line_of(record) + "\n" for record in found))


def without_cost(record):
    return {k: v for k, v in record.items() if k not in ("cost", "checksum")}


@pytest.fixture
def count(monkeypatch):
    """Names of the runs that were trained."""
    trained, real = [], runs.pruning
    noted = lambda *a, **k: (trained.append(k["run"]), real(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(runs, "pruning", noted)
    return trained


@pytest.fixture
def done(runner):
    """A finished run."""
    settings = small_run()
    runner.ensure(settings)
    return settings


def refused(ask, *words):
    """Call `ask`, which must refuse in one line; that line."""
    with pytest.raises(InputError) as caught:
        ask(*words)
    return one_line(caught)


# --- lines


def test_a_line_and_back(store):
    record = put_record(store, small_run(), folder=False) | {"more": (1, 2.5)}
    record |= {"metrics": {"b": math.nan, "a": [-math.inf, "ä"]}}
    text = line_of(record)
    assert line_of(dict(reversed(record.items()))) == text
    read = parse(text, Path("x"))
    assert (read["metrics"], read["more"]) == ({"a": [None, "ä"], "b": None}, [1, 2.5])
    assert list(read)[:2] == ["run", "checksum"]
    assert list(read)[2:] == sorted(list(read)[2:])
    assert line_of(read) == text
    assert text.isascii()
    assert "\n" not in text


# --- what a record says


def test_record_of_a_dense_run(runner, store):
    settings = small_run(seed=2)
    record = runner.ensure(settings)
    assert record == store.require(settings.run) == store.read(settings)
    assert store.read_all(settings) == [record]
    assert record.keys() == KEYS | {"checksum"}
    assert (record["format"], record["status"], record["parent"]) == (lines.FORMAT, "done", None)
    assert (record["run"], record["latency"]) == (settings.run, None)
    assert record["settings"] == json.loads(settings.model_dump_json())
    for key, value in {"seed": 2, "precision": "fp32", "threads": 1, "evaluate": "test"}.items():
        assert record["settings"][key] == value
    assert record["data"] == {
        "name": "digits",
        "title": "Digits",
        "version": "1",
        "fingerprint": datasets.load("digits").fingerprint,
        "train": 1237,
        "validation": 200,
        "test": 360,
    }
    environment = record["environment"]
    for name in ("prunestudy", "torch", "torchvision", "numpy"):
        assert environment[name] == version(name)
    assert environment["python"] == sys.version.split()[0]
    assert (environment["device"], environment["commit"]) == ("cpu", provenance.commit())
    assert sorted(record["cost"]) == ["seconds", "train_seconds"]
    assert 0 < record["cost"]["train_seconds"] <= record["cost"]["seconds"]
    (last,) = store.history(settings.run)
    assert record["validation"] == {k: last[f"validation_{k}"] for k in ("top1", "loss")}
    files = sorted(p.name for p in store.path(settings.run).iterdir())
    assert files == ["arrays.safetensors", "record.json", "weights.safetensors"]
    assert not store.work(settings.run).exists()
    assert store.names() == store.places() == [settings.run]


def test_metrics_are_those_of_the_net_on_disk(runner, store):
    settings = child_run("magnitude", 0.9)
    metrics = runner.ensure(settings)["metrics"]
    net, data = runner.net(settings), datasets.load("digits")
    test = datasets.Batches(data.test, data.info, 360)
    scores = measure.Task().evaluate(net, test.ordered(), 10)
    assert metrics["metric"] == scores.metric
    assert (metrics["metric_name"], metrics["images"]) == ("top1", 360)
    assert metrics["macro_f1"] == scores.more["macro_f1"]
    assert metrics["sparsity"] == 0.9
    assert metrics["parameters"] == metrics["dense_parameters"] == 64 * 300 + 30_000 + 1000 + 410
    assert metrics["nonzeros"] == 5020 + 410
    assert metrics["macs"] == metrics["dense_macs"] == 50_200
    assert metrics["nonzero_macs"] == 5020
    assert metrics["bytes"] == store.weights(settings.run).stat().st_size
    assert metrics["stored_with_indices"] == 2 * metrics["stored_values"] == 2 * 5430
    assert metrics["peak_memory_mb"] == measure.peak_memory_mb(net, torch.zeros(128, 1, 8, 8))
    scale, _ = measure.kept_weights(net, runner.net(settings.parent))
    assert metrics["kept_scale"] == scale["kept_scale"]
    assert 0.9 < metrics["kept_scale"] < 1.5
    arrays = store.arrays(settings.run)
    assert len(arrays["kept_start"]) == len(arrays["kept_end"]) <= 2000
    assert arrays["kept_end"].all()


def test_kept_scale_by_hand():
    net, start = nn.Linear(4, 1), nn.Linear(4, 1)
    net.weight.data.copy_(torch.tensor([[0.0, -1.0, 2.0, 0.0]]))
    start.weight.data.copy_(torch.tensor([[9.0, 2.0, -4.0, 1.0]]))
    scale, sample = measure.kept_weights(net, start)
    assert scale == {"kept_scale": 0.5}
    assert {name: each.tolist() for name, each in sample.items()} == {
        "kept_start": [2.0, -4.0],
        "kept_end": [-1.0, 2.0],
    }
    assert measure.kept_weights(nn.Linear(3, 1), start) == ({}, {})
    net.weight.data.zero_()
    assert math.isnan(measure.kept_weights(net, start)[0]["kept_scale"])
    wide = nn.Linear(2001, 1)
    sample = measure.kept_weights(wide, wide)[1]["kept_end"]
    assert sample.tolist() == wide.weight[0, ::2].tolist()


def test_a_search_looks_at_validation_images_only(runner):
    name = (dense := small_run()).run
    settings = dense.model_copy(update={"evaluate": "validation"})
    assert settings.run != name == dense.run
    record = runner.ensure(settings)
    assert record["metrics"]["images"] == 200
    assert record["metrics"]["metric"] == record["validation"]["top1"]


def test_history_arrays_and_files_of_gates(runner, store):
    settings = child_run("sparse_gates", 0.9, epochs=2)
    record = runner.ensure(settings)
    rows = store.history(settings.run)
    assert [(row["epoch"], row["phase"]) for row in rows][1:] == [(2, "fine_tune")]
    assert rows[-1]["kept"] == pytest.approx(0.1)
    arrays = store.arrays(settings.run)
    assert arrays["gate_histograms"].shape == (2, 40)
    assert record["parent"] == settings.parent.run
    # of the parents' settings, what is a default is left out
    assert name_of(record["settings"]) == settings.run
    assert record["settings"]["recipe"].keys() > record["settings"]["parent"]["recipe"].keys()
    assert record["files"] == {
        "arrays": {name: lines.digest(array) for name, array in arrays.items()},
        "weights": lines.noted(load_file(store.weights(settings.run)), "weights"),
    }


def test_a_diverged_run_has_a_record_and_is_not_trained_again(runner, store, count):
    settings = small_run(**DIVERGED)
    record = runner.ensure(settings)
    assert record["status"] == "diverged"
    assert record["metrics"] == {"dense_parameters": 50_610, "dense_macs": 50_200}
    assert runner.ensure(settings) == record == store.read(settings)
    assert count == [settings.run]
    child = runner.ensure(child_run(parent=settings))
    assert child["status"] == "diverged"
    assert count == [settings.run, child["run"]]


# --- asked twice


def test_the_same_settings_give_the_same_record_elsewhere(tmp_path):
    settings = child_run("sparse_gates", 0.8)
    made = []
    for name in ("a", "b"):
        torch.manual_seed(len(made))
        store = Store("custom", tmp_path / name)
        made.append(Runner(store, device="cpu").ensure(settings))
    assert without_cost(made[0]) == without_cost(made[1])  # digests of weights and arrays too


def test_a_run_asked_for_twice_is_trained_once(runner, store, count):
    first = runner.ensure(child_run("magnitude", 0.9))
    assert count == [child_run().parent.run, child_run().run]
    before = tree(store.runs)
    assert runner.ensure(child_run("magnitude", 0.9)) == first
    assert Runner(store, device="cpu").ensure(child_run("magnitude", 0.9)) == first
    runner.ensure(child_run("magnitude", 0.8))
    assert count == [child_run().parent.run, child_run().run, child_run(target=0.8).run]
    assert {k: v for k, v in tree(store.runs).items() if k in before} == before


def script(body, folder, settings):
    """The command of a process that has `store` below `folder`, and `settings`."""
    head = """
        import json, os, signal, sys, time
        from pathlib import Path
        from prunestudy.study.records import Store
        from prunestudy.study.runs import Runner
        from prunestudy.study.settings import RunSettings
        from prunestudy.train import loop, pruning
        store = Store("custom", sys.argv[1])
        settings = RunSettings.model_validate_json(sys.argv[2])
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    return [sys.executable, "-W", "error", "-c", code, str(folder), settings.model_dump_json()]


def test_two_processes_at_the_same_time_train_once(store):
    settings = child_run("magnitude", 0.9, epochs=3)
    body = """
        # both are in ensure() before either is done
        me, other = sys.argv[3:]
        real = Store.read
        def read(self, settings, *words):
            Path(self.folder.parent, me).touch()
            while not Path(self.folder.parent, other).exists():
                time.sleep(0.01)
            return real(self, settings, *words)
        Store.read = read
        import prunestudy.study.runs as runs
        prune = runs.pruning
        trained = []
        runs.pruning = lambda *a, **k: (trained.append(k["run"]), prune(*a, **k))[1]
        record = Runner(store, device="cpu").ensure(settings)
        print(json.dumps({"trained": trained, "record": record}))
    """
    command = script(body, store.folder.parent, settings)
    store.folder.parent.mkdir(parents=True)
    both = [
        subprocess.Popen([*command, *pair], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for pair in (("a", "b"), ("b", "a"))
    ]
    said = [process.communicate(timeout=100) for process in both]
    assert [(process.returncode, err) for process, (_, err) in zip(both, said, strict=True)] == [
        (0, b"")
    ] * 2
    one, two = (json.loads(out) for out, _ in said)
    assert one["record"] == two["record"] == store.read(settings)
    assert sorted(one["trained"] + two["trained"]) == sorted([settings.run, settings.parent.run])


# --- records that cannot be used


def better(record):
    record["metrics"]["metric"] = 1.0


CHECKSUM, FORMAT = "was edited or cut off (checksum)", "is not of format 2"
SETTINGS, DATA = "was made with other settings", "was made from other data"
VERSION = "is of another version"


@pytest.mark.parametrize(
    ("why", "sign", "change"),
    [
        (CHECKSUM, False, better),
        (CHECKSUM, False, lambda r: r.update(latency={"ms": "<script>"})),
        (CHECKSUM, False, lambda r: r.pop("cost")),
        (FORMAT, True, lambda r: r.update(format=1)),
        (FORMAT, True, lambda r: r.pop("format")),
        (SETTINGS, True, lambda r: r["settings"]["recipe"].update(lr=0.06)),
        (SETTINGS, True, lambda r: r["settings"].update(colour="red")),
        (VERSION, True, lambda r: r.update(settings=None)),
        (VERSION, True, lambda r: r.pop("environment")),
        (VERSION, True, lambda r: r["files"].pop("arrays")),
        (VERSION, True, lambda r: r.update(metrics=None)),
        (VERSION, True, lambda r: r.update(latency="<script>")),
        (VERSION, True, lambda r: r["history"].update(epoch=[1, 2])),
        (DATA, True, lambda r: r["data"].update(fingerprint="0")),
    ],
)
def test_bad_records_are_refused_in_one_line(runner, store, done, count, change, sign, why):
    good = store.require(done.run)
    edited(store, done.run, change, sign)
    before = tree(store.folder)
    line = f"record = {done.run}: {why} in {store.path(done.run)};"
    for ask in (store.read, runner.ensure, runner.net):
        assert refused(ask, done) == f"{line} delete that folder to train the run again"
    assert tree(store.folder) == before
    # the collected record counts, whatever became of the one in the folder
    collected(store, good | {"latency": {"ms": {}}})
    assert runner.ensure(done)["metrics"] == good["metrics"]
    shutil.rmtree(store.path(done.run))
    change(good)
    text = line_of(good) if sign else json.dumps(good, separators=(",", ":"))
    store.collected.write_text(text + "\n")
    line = f"record = {done.run}: {why} in {store.collected}; delete that line to train the run"
    for ask in (store.read, runner.ensure):
        assert refused(ask, done) == f"{line} again"
    assert count == []


def cut(text):
    return text[: len(text) * 2 // 3]


EDITED, NONE, TWICE = "was edited or cut off", "is no record", "is there twice"
DAMAGES = [
    (EDITED, cut),
    (EDITED, lambda t: t.replace(b'"cpu"', b'"\xff"')),
    (EDITED, lambda t: t.replace(b"dense", b"force", 1)),
    (EDITED, lambda t: t[:-2]),
    (NONE, lambda t: b"<<<<<<< ours\n" + t),
    (NONE, lambda _: b'null\n{"run": "'),
]
OF_LINES = [
    (EDITED, lambda t: t.replace(b"\n", b"", 1)),
    (TWICE, lambda t: t + t.split(b"\n")[0] + b"\n"),
    (NONE, lambda t: t.replace(b"\n", b"\n\n", 1)),
    (NONE, lambda t: t + b"[1]\n"),
]


def test_a_damaged_record_of_a_folder_is_refused(store):
    settings = small_run()
    put_record(store, settings, 0.5)
    path = own(store, settings.run)
    data = path.read_bytes()
    end = f"in {path.parent}; delete that folder to train the run again"
    for what, damage in [*DAMAGES, (EDITED, lambda t: t + t), (NONE, lambda _: b"")]:
        path.write_bytes(damage(data))
        line = refused(store.read, settings)
        assert what in line
        assert line.endswith(end)


@pytest.mark.parametrize(("what", "damage"), DAMAGES + OF_LINES)
def test_damaged_lines_are_refused_by_name(store, runner, count, damage, what):
    settings = [small_run(seed=seed) for seed in (0, 1)]
    collected(store, *(put_record(store, s, 0.5, folder=False) for s in settings))
    assert [store.read(s)["metrics"]["metric"] for s in settings] == [0.5, 0.5]
    store.collected.write_bytes(damage(store.collected.read_bytes()))
    before = tree(store.folder)
    for ask in (store.read, runner.ensure, store.read_all):
        line = refused(ask, settings[0])
        assert what in line
        assert line.endswith(f"in {store.collected}; delete that line to train the run again")
    assert (count, tree(store.folder)) == ([], before)


def test_what_is_no_file_is_not_read(store):
    store.folder.mkdir(parents=True)
    os.mkfifo(store.collected)
    line = f"file = {str(store.collected)!r}: a regular file"
    assert refused(store.read, small_run()) == line
    store.collected.unlink()
    own(store, small_run().run).parent.mkdir(parents=True)
    os.mkfifo(own(store, small_run().run))
    assert "record.json': a regular file" in refused(store.read, small_run())


def test_an_empty_file_has_no_records_and_a_last_line_may_be_unfinished(store):
    lines.write_text(store.collected, "")
    assert store.read(small_run()) is None
    lines.write_text(store.collected, line_of(put_record(store, small_run(), folder=False)))
    assert store.read(small_run())["run"] == small_run().run


def test_a_record_in_anothers_folder_is_refused(store):
    one, other = small_run(), small_run(seed=1)
    put_record(store, one)
    shutil.copytree(store.path(one.run), store.path(other.run))
    why = f"record = {other.run}: is that of another run, {one.run}, in {store.path(other.run)};"
    for ask, word in ((store.read, other), (store.require, other.run)):
        assert refused(ask, word).startswith(why)
    put_record(store, one, device="NVIDIA H100")
    shutil.copytree(store.runs / f"{one.run}-cuda", store.path(one.run), dirs_exist_ok=True)
    assert "is that of another run" in refused(store.read, one)


def test_what_has_no_record_is_refused_by_the_name_of_the_run(store, done):
    shutil.rmtree(store.path(done.run))
    for ask in (store.require, store.history, store.arrays):
        assert refused(ask, done.run) == f"run = {done.run}: has no record in {store.folder}"
    assert "has no record" in refused(lambda r: differences(store, r, r), done.run)
    assert refused(store.write_latency, done.run, {}).endswith(f"not trained in {store.folder}")


# --- files of a run that were lost


@pytest.mark.parametrize("damage", [None, cut, lambda _: b"", lambda t: t[:-1] + b"!", "other"])
def test_lost_weights_are_trained_again_and_reproduce(runner, store, count, damage):
    settings = child_run()
    parent, path = settings.parent, store.weights(settings.parent.run)
    first = runner.ensure(parent)
    before = load_file(path)
    if damage is None:
        path.unlink()
    elif damage == "other":
        runner.ensure(small_run(seed=1))
        shutil.copy(store.weights(small_run(seed=1).run), path)
    else:
        path.write_bytes(damage(path.read_bytes()))
    line = refused(store.require_weights, parent.run)
    assert line.startswith(f"weights = {parent.run}: missing, or not as its record says, in ")
    count.clear()
    assert runner.ensure(parent) == first
    assert (count, store.has(parent.run, "arrays", "weights")) == ([], False)
    runner.ensure(settings)
    assert count == [parent.run, settings.run]
    assert lines.noted(load_file(path), "weights") == lines.noted(before, "weights")
    store.require_weights(parent.run)
    assert store.has(parent.run, "arrays", "weights")
    assert store.require(parent.run) == first
    assert not store.work(parent.run).exists()


def test_a_kill_while_a_run_is_put_back_keeps_its_record(runner, store, monkeypatch):
    first = runner.ensure(small_run())
    store.weights(small_run().run).unlink()

    def killed(self, target, real=Path.replace):
        if target.is_relative_to(store.runs):
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(Path, name, killed)
        with pytest.raises(KeyboardInterrupt):
            runner.ensure(small_run(), weights=True)
    assert store.require(small_run().run) == first
    assert runner.ensure(small_run(), weights=True) == first


def test_damaged_arrays_are_refused_and_come_back(runner, store):
    settings = small_run("magnitude_attention", 0.9)
    first = runner.ensure(settings)
    path = store.path(settings.run) / "arrays.safetensors"
    good, data = store.arrays(settings.run), path.read_bytes()
    for changed in (data[:-1], cut(data), b"", data[:-1] + b"!"):
        path.write_bytes(changed)
        line = refused(store.arrays, settings.run)
        assert line.startswith(f"arrays = {settings.run}: ")
        assert str(path) in line
    path.unlink()
    assert f"arrays = {settings.run}: " in refused(store.arrays, settings.run)
    assert runner.ensure(settings, weights=True) == first
    assert sorted(store.arrays(settings.run)) == sorted(good)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("metrics", better),
        ("validation", lambda r: r["validation"].update(top1=0.0)),
        ("history", lambda r: r["history"].update(epoch=[2])),
        ("files", lambda r: r["files"].update(weights="0")),
    ],
)
def test_a_changed_reproduction_is_refused(runner, store, done, key, change):
    edited(store, done.run, change)
    store.weights(done.run).unlink()
    before = tree(store.runs)
    assert refused(runner.net, done) == (
        f"record = {done.run}: trained again, it did not reproduce its {key};"
        f" delete {store.path(done.run)} to accept the new one"
    )
    assert tree(store.runs) == before


def test_a_record_from_before_a_default_was_added_is_reproduced(runner, store):
    settings = child_run()
    runner.ensure(settings)

    def older(record):
        del record["settings"]["params"]["scope"], record["settings"]["recipe"]["warmup_from"]
        del record["metrics"]["images"]

    edited(store, settings.run, older)
    store.weights(settings.run).unlink()
    before = own(store, settings.run).read_bytes()
    runner.net(settings)
    assert own(store, settings.run).read_bytes() == before


def test_a_latency_is_added_to_the_record_and_stays(runner, store, done):
    first, timed = store.require(done.run), {"ms": {"latency_b1_ms": 0.5}}
    store.write_latency(done.run, timed)
    assert without_cost(store.require(done.run)) == without_cost(first | {"latency": timed})
    store.weights(done.run).unlink()
    runner.net(done)
    assert store.require(done.run)["latency"] == timed
    # the collected record lacks it still
    collected(store, first)
    assert store.require(done.run)["latency"] == timed
    # one that came out otherwise was another net's
    collected(store, first | {"metrics": first["metrics"] | {"metric": 0.0}})
    assert store.require(done.run)["latency"] is None


def test_packed_arrays_are_checked_one_by_one(store):
    settings = [small_run(seed=seed) for seed in (0, 1)]
    arrays = [{"a": np.arange(3.0) + seed, "b": np.ones(2)} for seed in (0, 1)]
    both = zip(settings, arrays, strict=True)
    collected(store, *(put_record(store, s, arrays=a, folder=False) for s, a in both))
    packed = {f"{s.run}/a": a["a"] for s, a in zip(settings, arrays, strict=True)}
    path = store.folder / "arrays" / "toy.safetensors"
    path.parent.mkdir()
    save_file(packed, path)
    found = store.arrays(settings[1].run)
    assert {name: array.tolist() for name, array in found.items()} == {"a": [1.0, 2.0, 3.0]}
    found["a"] *= 2  # a figure may: it is not the store's own
    assert store.arrays(settings[1].run)["a"].tolist() == [1.0, 2.0, 3.0]
    save_file(packed | {f"{settings[0].run}/a": np.arange(3)}, path)
    assert len(store.arrays(settings[1].run)) == 1
    line = refused(store.arrays, settings[0].run)
    assert line.startswith(f"arrays = {settings[0].run}: missing or damaged, in ")
    assert "`prunestudy run RUN --weights`" in line
    path.write_bytes(cut(path.read_bytes()))
    assert "missing or damaged" in refused(store.arrays, settings[1].run)


# --- written whole or not at all


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["write_text", "write_bytes", "rename", "replace", "mkdir"])
def test_a_full_disk_leaves_earlier_results_and_no_half_folder(
    runner, store, done, place, monkeypatch
):
    before, settings = tree(store.runs), small_run(seed=7)
    with monkeypatch.context() as patch:
        patch.setattr(Path, place, full)
        with pytest.raises(OSError, match="No space left"):
            runner.ensure(settings)
    assert tree(store.runs) == before
    assert store.read(settings) is None
    # there is space again
    assert runner.ensure(settings)["status"] == "done"
    assert {k: v for k, v in tree(store.runs).items() if k in before} == before
    assert not store.work(settings.run).exists()


def test_runs_may_be_on_another_disk_than_work(runner, store, monkeypatch):
    real = os.rename

    def rename(old, new):
        if Path(old).parts[:-2] != Path(new).parts[:-2] and Path(old).parent != Path(new).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    settings = small_run()
    runner.ensure(settings)
    store.require_weights(settings.run)
    assert [path.name for path in store.runs.iterdir()] == [settings.run]


def test_numpy_cannot_read_bfloat16(tmp_path):
    save_torch({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a")
    assert lines.read_arrays(tmp_path / "a") == {}


def test_a_run_that_is_refused_late_leaves_no_folder(runner, store):
    settings = small_run("gdp", 0.5, p_leave="nope")
    assert refused(runner.ensure, settings).startswith("leave = 'nope': no such layer among ")
    assert not store.work(settings.run).exists()


def test_arrays_keep_their_order_of_axes(store):
    settings = small_run()
    weights = store.work(settings.run) / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    save_file({"w": np.ones(1)}, weights)
    arrays = {"t": np.arange(6).reshape(2, 3).T}
    store.write(put_record(store, settings, folder=False), weights, arrays=arrays)
    assert store.arrays(settings.run)["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


# --- killed


@pytest.mark.parametrize("method", ["sparse_gates", "gradual_magnitude"])
def test_a_killed_process_ends_with_the_same_record(method, runner, store, tmp_path):
    """SIGKILL after the 25th of 57 steps; checkpoints at each step."""
    settings = child_run(method, 0.9, epochs=3)
    runner.ensure(settings.parent)
    body = """
        real, count = loop.write_checkpoint, []
        def write(*words):
            real(*words)
            count.append(1)
            if len(count) == 25:
                os.kill(os.getpid(), signal.SIGKILL)
        loop.write_checkpoint = write
        pruning.__kwdefaults__["checkpoint_seconds"] = 0.0
        Runner(store, device="cpu").ensure(settings)
    """
    command = script(body, store.folder.parent, settings)
    killed = subprocess.run(command, capture_output=True, timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not store.path(settings.run).exists()
    checkpoint = store.work(settings.run) / "checkpoint.pt"
    saved = read_checkpoint(checkpoint, settings.run)
    assert 20 < saved["state"]["step"] < 30
    record = runner.ensure(settings)
    straight = Runner(Store("custom", tmp_path / "straight"), device="cpu").ensure(settings)
    assert without_cost(record) == without_cost(straight)
    assert record["cost"]["train_seconds"] > saved["state"]["seconds"] / 2
    assert not store.work(settings.run).exists()


# --- data and device


def test_devices(monkeypatch):
    assert runs.device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.device_of("auto") == torch.device("cpu")
    none = "device = 'cuda': no CUDA device here; allowed are auto, cpu"
    assert refused(runs.device_of, "cuda") == none
    assert refused(runs.device_of, "tpu") == "device = 'tpu': allowed are auto, cpu, cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runs.device_of("auto") == runs.device_of("cuda") == torch.device("cuda")


def test_a_profile_goes_on_where_its_records_were_made(store, monkeypatch, count):
    one, other = small_run(), small_run(seed=1)
    put_record(store, one, 0.5, device="NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runner = Runner(store)
    assert (runner.device.type, runner.ensure(one)["metrics"]["metric"]) == ("cuda", 0.5)
    before = tree(store.folder)
    assert refused(runner.ensure, other).startswith("device = 'cuda': no CUDA device here")
    assert (count, tree(store.folder)) == ([], before)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    put_record(store, one, 0.6)
    assert Runner(store).device.type == "cuda"  # both: as where nothing is stored
    shutil.rmtree(store.runs / f"{one.run}-cuda")
    runner = Runner(store)
    assert (runner.device.type, runner.ensure(one)["metrics"]["metric"]) == ("cpu", 0.6)
    assert Runner(store, device="cuda").store.read(one) is None


def test_a_run_on_cuda_is_a_record_of_its_own(store):
    settings = small_run()
    put_record(store, settings, 0.6, device="NVIDIA H100")
    assert store.require(settings.run)["metrics"]["metric"] == 0.6
    assert store.path(settings.run).name == f"{settings.run}-cuda"
    assert store.weights(settings.run).parent == store.path(settings.run)
    put_record(store, settings, 0.5)
    assert store.path(settings.run).name == settings.run
    assert [record["metrics"]["metric"] for record in store.read_all(settings)] == [0.5, 0.6]
    assert (store.names(), store.devices()) == ([settings.run], {"cpu", "cuda"})
    for device, metric in (("cpu", 0.5), ("cuda", 0.6), ("", 0.5)):
        found = Store("custom", store.folder.parent, device).read(settings)
        assert found["metrics"]["metric"] == metric


def test_the_commit_is_that_of_the_checkout(monkeypatch, tmp_path):
    command = ["git", "-C", str(records.repository()), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not head:
        pytest.skip("no git checkout")
    assert provenance.commit() in (head, f"{head}-dirty")
    # neither a repository that the environment names nor one around the files counts
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert provenance.commit() in (head, f"{head}-dirty")
    for folder in (records.repository() / "lib", None):
        monkeypatch.setattr(provenance.places, "checkout", lambda folder=folder: folder)
        assert provenance.commit() == "unknown"


FOLDER = {"validation": 8, "batch_size": 8}


def pictures(folder, count, seed=0):
    """Bitmaps (so that all are of one size in bytes) of noise."""
    rng = np.random.default_rng(seed)
    for part in ("train", "test"):
        for name in ("a", "b"):
            place = folder / part / name
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.bmp")
    return f"folder:{folder}"


def status_of(store, capsys):
    words = ["status", "--profile", "custom", "--results", str(store.folder.parent)]
    assert cli.main(words) == 0
    return capsys.readouterr().out.splitlines()


def test_an_image_folder_overwritten_with_others_of_the_same_sizes(tmp_path, store, capsys):
    """Names and sizes are in the run's name; what the images show is in the record."""
    dataset = pictures(tmp_path / "images", 20)
    settings, runner = small_run(dataset=dataset, **FOLDER), Runner(store, device="cpu")
    record = runner.ensure(settings)
    counts = {k: record["data"][k] for k in ("train", "validation", "test")}
    assert counts == {"train": 32, "validation": 8, "test": 40}
    assert runner.ensure(settings) == record
    assert status_of(store, capsys) == ["done      1", "missing   0"]
    pictures(tmp_path / "images", 20, seed=1)
    assert status_of(store, capsys) == ["missing   0", "other data 1"]
    (tmp_path / "images").rename(tmp_path / "away")
    assert status_of(store, capsys) == ["data not here 1", "missing   0"]
    (tmp_path / "away").rename(tmp_path / "images")
    assert small_run(dataset=dataset, **FOLDER) == settings
    for each in (runner, Runner(store, device="cpu")):
        assert refused(each.ensure, settings) == (
            f"record = {settings.run}: was made from other data in"
            f" {store.path(settings.run)}; delete that folder to train the run again"
        )
    shutil.rmtree(store.path(settings.run))
    again = runner.ensure(settings)  # and not from the images in memory
    assert again["data"]["fingerprint"] != record["data"]["fingerprint"]
    pictures(tmp_path / "images", 21)
    assert small_run(dataset=dataset, **FOLDER).run != settings.run
