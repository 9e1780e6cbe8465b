import copy
import csv
import errno
import hashlib
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
from conftest import child_run, one_line, small_run, tree
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import nn

from prunestudy import datasets, measure, models, shrink
from prunestudy.errors import InputError
from prunestudy.study import records, runs
from prunestudy.study.inspect import differences
from prunestudy.study.records import Store, canonical, checksum
from prunestudy.study.runs import Runner, kept_scale


def edited(store, run, change, sign=False):
    """Change a record on disk; with `sign` its checksum is made to fit."""
    path = store.path(run) / "record.json"
    record = json.loads(path.read_text())
    change(record)
    if sign:
        record["checksum"] = checksum(record)
    path.write_text(canonical(record))


def without_cost(record):
    return {k: v for k, v in record.items() if k not in ("cost", "checksum")}


def counting(monkeypatch):
    """Count the trainings."""
    count = []
    real = runs.train
    monkeypatch.setattr(runs, "train", lambda *a, **k: (count.append(k["run"]), real(*a, **k))[1])
    return count


# --- text and checksums


def test_canonical_text():
    values = {"b": (1, 2.5), "a": [math.nan, {"x": -math.inf}], "c": "ä"}
    text = canonical(values)
    assert json.loads(text) == {"a": [None, {"x": None}], "b": [1, 2.5], "c": "ä"}
    assert text == canonical(dict(reversed(values.items())))
    assert text.endswith("}\n")


def test_checksum_leaves_itself_out_and_nothing_else():
    record = {"run": "r", "metrics": {"metric": 0.5}}
    first = checksum(record)
    assert checksum(record | {"checksum": first}) == first
    assert checksum({"run": "r", "metrics": {"metric": 0.5000000001}}) != first


# --- what a record says


def test_record_of_a_dense_run(runner, store):
    settings = small_run(seed=2)
    record = runner.ensure(settings)
    assert record == store.load(settings.run) == store.read(settings)
    data = datasets.load("digits")
    assert (record["format"], record["status"], record["parent"]) == (records.FORMAT, "done", None)
    assert record["run"] == settings.run
    assert record["checksum"] == checksum(record)
    assert record["settings"] == json.loads(settings.model_dump_json())
    for key, value in {"seed": 2, "precision": "fp32", "threads": 1, "evaluate": "test"}.items():
        assert record["settings"][key] == value
    assert record["data"] == {
        "name": "digits",
        "title": "Digits",
        "version": "1",
        "fingerprint": data.fingerprint,
        "train": 1237,
        "validation": 200,
        "test": 360,
    }
    environment = record["environment"]
    for name in ("prunestudy", "torch", "torchvision", "numpy"):
        assert environment[name] == version(name)
    assert environment["python"] == sys.version.split()[0]
    assert environment["device"] == "cpu"
    assert environment["commit"] == runs.commit()
    assert sorted(record["cost"]) == ["process_peak_mb", "seconds", "train_seconds"]
    assert 0 < record["cost"]["train_seconds"] <= record["cost"]["seconds"]
    assert record["cost"]["process_peak_mb"] > 100
    history = store.history(settings.run)
    assert record["validation"] == {
        "top1": history[-1]["validation_top1"],
        "loss": history[-1]["validation_loss"],
    }
    assert sorted(p.name for p in store.path(settings.run).iterdir()) == [
        "arrays.safetensors",
        "history.csv",
        "record.json",
        "weights.safetensors",
    ]
    assert not store.work(settings.run).exists()


def test_metrics_are_those_of_the_net_on_disk(runner, store):
    settings = child_run("magnitude", 0.9)
    metrics = runner.ensure(settings)["metrics"]
    net, data = runner.net(settings), datasets.load("digits")
    test = datasets.Batches(data.test, data.info, 360)
    quality = measure.evaluate(net, test.ordered(), 10)
    assert metrics["metric"] == quality.top1
    assert (metrics["metric_name"], metrics["images"]) == ("top1", 360)
    assert metrics["macro_f1"] == quality.macro_f1
    assert metrics["sparsity"] == 0.9
    assert metrics["parameters"] == metrics["dense_parameters"] == 64 * 300 + 30_000 + 1000 + 410
    assert metrics["nonzeros"] == 5020 + 410
    assert metrics["macs"] == metrics["dense_macs"] == 50_200
    assert metrics["nonzero_macs"] == 5020
    assert metrics["bytes"] == store.weights(settings.run).stat().st_size
    assert metrics["stored_with_indices"] == 2 * metrics["stored_values"] == 2 * 5430
    assert metrics["peak_memory_mb"] == measure.peak_memory_mb(net, (1, 8, 8))
    start = {n: w.clone() for n, w in measure.prunable_weights(runner.net(settings.parent))}
    assert metrics["kept_scale"] == kept_scale(net, start)
    assert 0.9 < metrics["kept_scale"] < 1.5
    arrays = store.arrays(settings.run)
    assert len(arrays["kept_start"]) == len(arrays["kept_end"]) <= 2000
    assert arrays["kept_end"].all()


def test_kept_scale_by_hand():
    net = nn.Linear(4, 1)
    net.weight.data.copy_(torch.tensor([[0.0, -1.0, 2.0, 0.0]]))
    start = {"weight": torch.tensor([[9.0, 2.0, -4.0, 1.0]])}
    assert kept_scale(net, start) == 0.5
    net.weight.data.zero_()
    assert math.isnan(kept_scale(net, start))


def test_a_search_looks_at_validation_images_only(runner):
    settings = small_run().model_copy(update={"evaluate": "validation"})
    record = runner.ensure(settings)
    assert record["metrics"]["images"] == 200
    assert record["metrics"]["metric"] == record["validation"]["top1"]
    assert settings.run != small_run().run


def test_history_and_arrays_of_gates(runner, store):
    settings = child_run("sparse_gates", 0.9, epochs=2)
    record = runner.ensure(settings)
    rows = store.history(settings.run)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["phase"] for row in rows][-1] == "fine_tune"
    assert rows[-1]["kept"] == pytest.approx(0.1)
    with (store.path(settings.run) / "history.csv").open(newline="") as file:
        assert list(csv.DictReader(file))[1]["epoch"] == "2"
    arrays = store.arrays(settings.run)
    assert arrays["gate_histograms"].shape == (2, 40)
    assert record["parent"] == settings.parent.run
    assert sorted(record["files"]) == ["arrays.safetensors", "history.csv", "weights.safetensors"]
    for name in ("history.csv", "arrays.safetensors"):
        data = (store.path(settings.run) / name).read_bytes()
        assert record["files"][name] == hashlib.sha256(data).hexdigest()
    assert (store.path(settings.run) / "arrays.safetensors").stat().st_size <= 1_000_000


def test_a_diverged_run_has_a_record(runner, store):
    record = runner.ensure(small_run(epochs=2, lr=1e20))
    assert record["status"] == "diverged"
    assert record["metrics"] == {"dense_macs": 50_200, "dense_parameters": 50_610}
    assert record["validation"] == {"top1": None, "loss": None}
    assert store.history(record["run"]) == []
    again = counting_free(runner, small_run(epochs=2, lr=1e20))
    assert again == record


def counting_free(runner, settings):
    """Ensure a run that must not be trained."""
    with pytest.MonkeyPatch.context() as patch:
        count = counting(patch)
        record = runner.ensure(settings)
    assert count == []
    return record


def test_bf16_and_two_threads_are_runs_of_their_own(runner):
    names = set()
    for values in ({}, {"precision": "bf16"}, {"threads": 2}):
        record = runner.ensure(small_run(**values))
        assert record["status"] == "done"
        names.add(record["run"])
    assert len(names) == 3
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()


# --- asked twice


def test_the_same_settings_give_the_same_record_elsewhere(tmp_path):
    settings = child_run("sparse_gates", 0.8)
    made = []
    for name in ("a", "b"):
        torch.manual_seed(len(made))
        store = Store("custom", tmp_path / name)
        made.append((store, Runner(store, device="cpu").ensure(settings)))
    (one, first), (two, second) = made
    assert without_cost(first) == without_cost(second)
    for name in ("history.csv", "arrays.safetensors"):
        a, b = (s.path(settings.run) / name for s in (one, two))
        assert a.read_bytes() == b.read_bytes()
    assert same_tensors(one.weights(settings.run), two.weights(settings.run))


def same_tensors(one, two):
    """Whether two files hold the same; the order of safetensors' metadata is random."""
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def test_a_run_asked_for_twice_is_trained_once(runner, store, monkeypatch):
    count = counting(monkeypatch)
    first = runner.ensure(child_run("magnitude", 0.9))
    assert count == [child_run().parent.run, child_run().run]
    before = tree(store.records)
    assert runner.ensure(child_run("magnitude", 0.9)) == first
    assert Runner(store, device="cpu").ensure(child_run("magnitude", 0.9)) == first
    runner.ensure(child_run("magnitude", 0.8))
    assert count == [child_run().parent.run, child_run().run, child_run(target=0.8).run]
    assert {k: v for k, v in tree(store.records).items() if k in before} == before


def script(body, folder, **names):
    """A process that trains on digits below `folder`; returns its command."""
    head = """
        import json, os, signal, sys
        import torch
        from pathlib import Path
        from prunestudy.study.records import Store
        from prunestudy.study.runs import Runner
        from prunestudy.study.settings import RunSettings
        from prunestudy.train import checkpoint, loop
        store = Store("custom", sys.argv[1])
        settings = RunSettings.model_validate_json(sys.argv[2])
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    settings = names["settings"].model_dump_json()
    return [sys.executable, "-W", "error", "-c", code, str(folder), settings]


def test_two_processes_at_the_same_time_train_once(store):
    settings = child_run("magnitude", 0.9, epochs=3)
    body = """
        # both are in ensure() before either is done
        me, other = sys.argv[3:]
        real = Store.read
        def read(self, settings):
            Path(self.folder.parent, me).touch()
            while not Path(self.folder.parent, other).exists():
                pass
            return real(self, settings)
        Store.read = read
        import prunestudy.study.runs as runs
        train = runs.train
        trained = []
        runs.train = lambda *a, **k: (trained.append(k["run"]), train(*a, **k))[1]
        record = Runner(store, device="cpu").ensure(settings)
        print(json.dumps({"trained": trained, "record": record}))
    """
    command = script(body, store.folder.parent, settings=settings)
    store.folder.parent.mkdir(parents=True)
    both = [
        subprocess.Popen([*command, *pair], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for pair in (("a", "b"), ("b", "a"))
    ]
    said = [process.communicate(timeout=60) for process in both]
    assert [(process.returncode, err) for process, (_, err) in zip(both, said, strict=True)] == [
        (0, b"")
    ] * 2
    one, two = (json.loads(out) for out, _ in said)
    assert one["record"] == two["record"] == store.read(settings)
    assert sorted(one["trained"] + two["trained"]) == sorted([settings.run, settings.parent.run])


# --- records that cannot be used


@pytest.fixture
def done(runner):
    """A finished run."""
    settings = small_run()
    runner.ensure(settings)
    return settings


def older(record):
    record["format"] = 0


def foreign(record):
    record["settings"]["recipe"]["lr"] = 0.06


def unknown_setting(record):
    record["settings"]["colour"] = "red"


def no_settings(record):
    del record["settings"]


def better(record):
    record["metrics"]["metric"] = 1.0


@pytest.mark.parametrize(
    ("change", "sign", "why"),
    [
        (better, False, "was edited or damaged (checksum)"),
        (lambda r: r.pop("cost"), False, "was edited or damaged (checksum)"),
        (lambda r: r.update(checksum=""), False, "was edited or damaged (checksum)"),
        (older, True, "is not of format 1"),
        (lambda r: r.pop("format"), True, "is not of format 1"),
        (foreign, True, "was made with other settings"),
        (unknown_setting, True, "was made with other settings"),
        (no_settings, True, "was made with other settings"),
    ],
)
def test_bad_records_are_refused_in_one_line(runner, store, done, change, sign, why):
    edited(store, done.run, change, sign)
    before = tree(store.folder)
    for ask in (store.read, runner.ensure, runner.net):
        with pytest.raises(InputError) as caught:
            ask(done)
        assert one_line(caught) == (
            f"record = {done.run}: {why}; delete its folder to train it again"
        )
    assert tree(store.folder) == before


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is not valid JSON"),
        (b'{"format": 1', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1]", "is not of format 1"),
        (b"null", "is not of format 1"),
        (b'"text"', "is not of format 1"),
    ],
)
def test_files_that_are_no_records_are_refused_in_one_line(store, done, data, why):
    (store.path(done.run) / "record.json").write_bytes(data)
    with pytest.raises(InputError) as caught:
        store.read(done)
    assert one_line(caught) == f"record = {done.run}: {why}; delete its folder to train it again"


def test_a_record_in_anothers_folder_is_refused(store, done):
    other = small_run(seed=1)
    shutil.copytree(store.path(done.run), store.path(other.run))
    with pytest.raises(InputError, match="was made with other settings"):
        store.read(other)


@pytest.mark.parametrize("name", ["history.csv", "arrays.safetensors"])
def test_a_missing_or_changed_file_of_a_record_is_refused_by_name(store, done, name):
    read = store.history if name == "history.csv" else store.arrays
    path, before = store.path(done.run) / name, read(done.run)
    assert store.history(done.run)[0]["epoch"] == 1
    data = path.read_bytes()
    for changed in (data + b"9", data[:-1], b""):
        path.write_bytes(changed)
        with pytest.raises(InputError, match=f"{done.run}: its {name} was edited or damaged") as it:
            read(done.run)
        assert one_line(it)
    path.write_bytes(data)
    assert str(read(done.run)) == str(before)
    path.unlink()
    with pytest.raises(InputError, match=f"{done.run}: its {name} is missing"):
        read(done.run)


def test_files_without_their_record_are_refused_by_the_name_of_the_run(store, done):
    (store.path(done.run) / "record.json").unlink()
    other = small_run(seed=1).run
    for run, asks in (
        (done.run, (store.history, store.arrays, store.shown, store.require_weights)),
        (other, (store.history, store.require_weights, lambda r: differences(store, r, r))),
    ):
        for ask in asks:
            with pytest.raises(InputError) as caught:
                ask(run)
            assert one_line(caught) == f"run = {run}: has no record in custom"


def test_a_bad_parent_is_refused_before_the_child_trains(runner, store, monkeypatch):
    settings = child_run()
    runner.ensure(settings.parent)
    edited(store, settings.parent.run, better)
    count, before = counting(monkeypatch), tree(store.records)
    with pytest.raises(InputError, match="edited or damaged"):
        runner.ensure(settings)
    assert count == []
    assert tree(store.records) == before


def test_damaged_weights_of_a_parent_are_refused(runner, store):
    settings = child_run()
    runner.ensure(settings.parent)
    path = store.weights(settings.parent.run)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="contents do not match their sha256") as caught:
        runner.ensure(settings)
    assert one_line(caught)
    assert store.read(settings) is None


def test_weights_of_another_run_are_not_taken_for_the_parents(runner, store):
    """A whole file, only not the one that the parent's record has the sha256 of."""
    settings, other = child_run(), small_run(seed=1)
    runner.ensure(settings.parent)
    runner.ensure(other)
    shutil.copy(store.weights(other.run), store.weights(settings.parent.run))
    with pytest.raises(InputError, match="weights"):
        runner.ensure(settings)


# --- weights that were lost


def test_missing_weights_are_trained_again_and_reproduce(runner, store, monkeypatch):
    settings = child_run()
    parent = settings.parent
    first = runner.ensure(parent)
    weights = store.weights(parent.run).rename(store.folder / "kept.safetensors")
    before = tree(store.path(parent.run))
    count = counting(monkeypatch)
    assert runner.ensure(parent) == first
    assert count == []
    runner.ensure(settings)
    assert count == [parent.run, settings.run]
    assert same_tensors(store.weights(parent.run), weights)
    after = tree(store.path(parent.run))
    del after["weights.safetensors"]
    assert after == before
    assert not store.work(parent.run).exists()
    store.weights(settings.run).unlink()
    assert isinstance(runner.net(settings), models.LeNet300)
    assert store.weights(settings.run).exists()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("metrics", better),
        ("data", lambda r: r["data"].update(fingerprint="0")),
        ("validation", lambda r: r["validation"].update(top1=0.0)),
        ("files", lambda r: r["files"].update({"weights.safetensors": "0"})),
    ],
)
def test_a_changed_reproduction_is_refused(runner, store, done, key, change):
    edited(store, done.run, change, sign=True)
    store.weights(done.run).unlink()
    before = tree(store.records)
    with pytest.raises(InputError) as caught:
        runner.net(done)
    assert one_line(caught) == (
        f"record = {done.run}: trained again for its missing weights, it did not reproduce its"
        f" {key}; delete its folder to accept the new one"
    )
    assert tree(store.records) == before


def test_a_record_from_before_a_default_was_added_is_reproduced(runner, store):
    settings = child_run()
    runner.ensure(settings)

    def older(record):
        del record["settings"]["params"]["scope"], record["settings"]["recipe"]["warmup_from"]
        del record["settings"]["parent"]["recipe"]["warmup_from"], record["metrics"]["images"]

    edited(store, settings.run, older, sign=True)
    store.weights(settings.run).unlink()
    before = (store.path(settings.run) / "record.json").read_bytes()
    runner.net(settings)
    assert (store.path(settings.run) / "record.json").read_bytes() == before


def test_weights_of_a_diverged_run_are_not_asked_for(runner, store):
    settings = small_run(epochs=2, lr=1e20)
    record = runner.ensure(settings)
    store.weights(settings.run).unlink()
    assert runner.ensure(settings, weights=True) == record


# --- written whole or not at all


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["write_text", "write_bytes", "rename", "replace", "mkdir"])
def test_a_full_disk_leaves_earlier_results_and_no_half_folder(
    runner, store, done, place, monkeypatch
):
    before, settings = tree(store.records), small_run(seed=7)
    with monkeypatch.context() as patch:
        patch.setattr(Path, place, full)
        with pytest.raises(OSError, match="No space left"):
            runner.ensure(settings)
    assert tree(store.records) == before
    assert store.read(settings) is None
    # there is space again
    assert runner.ensure(settings)["status"] == "done"
    assert {k: v for k, v in tree(store.records).items() if k in before} == before
    assert not store.work(settings.run).exists()


def test_a_disk_that_fills_at_the_record_itself(runner, store, done, monkeypatch):
    before, settings, real = tree(store.records), small_run(seed=7), Path.write_text

    def write_text(path, *args, **kwargs):
        return full() if path.name == "record.json" else real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        with pytest.raises(OSError, match="No space left"):
            runner.ensure(settings)
    assert tree(store.records) == before
    # the training was saved: it is not repeated
    count = []
    real_epoch = datasets.Batches.epoch
    monkeypatch.setattr(
        datasets.Batches, "epoch", lambda *a, **k: (count.append(1), real_epoch(*a, **k))[1]
    )
    straight = Runner(Store("custom", store.folder.parent / "b"), device="cpu").ensure(settings)
    trained = len(count)
    assert without_cost(runner.ensure(settings)) == without_cost(straight)
    assert (trained, len(count)) == (1, 1)


def test_what_is_left_of_a_deleted_record_is_replaced(runner, store, done):
    first = store.load(done.run)
    (store.path(done.run) / "record.json").unlink()
    (store.path(done.run) / "latency.json").write_text("{}")
    assert without_cost(runner.ensure(done)) == without_cost(first)
    assert not (store.path(done.run) / "latency.json").exists()


def written(store, settings, arrays):
    weights = store.work(settings.run) / "weights.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.ones(1)}, weights)
    record = {"run": settings.run, "format": 1, "settings": settings.model_dump(mode="json")}
    history = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "extra": "x,y"}]
    return store.write(record, history, arrays, weights)


def test_arrays_of_at_most_a_megabyte(store):
    settings = small_run()
    most = (1_000_000 - 200) // 4
    written(store, settings, {"a": np.zeros(most, np.float32), "t": np.arange(6).reshape(2, 3).T})
    assert store.arrays(settings.run)["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    size = (store.path(settings.run) / "arrays.safetensors").stat().st_size
    assert 999_000 < size <= records.MAX_ARRAY_BYTES == 1_000_000
    other = small_run(seed=1)
    with pytest.raises(RuntimeError, match=rf"arrays of {other.run}: \d+ bytes, above 1000000"):
        written(store, other, {"a": np.zeros(250_001, np.float32)})
    assert store.load(other.run) is None
    assert not store.path(other.run).exists()


def test_history_round_trip(store):
    settings = small_run()
    record = written(store, settings, {})
    assert store.history(settings.run) == [
        {"epoch": 1.0, "loss": 0.5, "extra": ""},
        {"epoch": 2.0, "loss": 0.25, "extra": "x,y"},
    ]
    assert store.arrays(settings.run) == {}
    assert store.read(settings) == record


def test_write_text_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    records.write_text(path, "one")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space"):
            records.write_text(path, "two")
    assert tree(tmp_path).keys() == {"folder", "folder/file"}
    assert path.read_text() == "one"


# --- killed


@pytest.mark.parametrize("method", ["sparse_gates", "gradual_magnitude"])
def test_a_killed_process_ends_with_the_same_record(method, runner, store, tmp_path):
    """SIGKILL after the 25th of 57 steps; checkpoints at each step."""
    settings = child_run(method, 0.9, epochs=3)
    runner.ensure(settings.parent)
    body = """
        real, count = loop.Loop._save, []
        def save(self, path, run):
            real(self, path, run)
            count.append(1)
            if len(count) == 25:
                os.kill(os.getpid(), signal.SIGKILL)
        loop.Loop._save = save
        loop.train.__kwdefaults__["checkpoint_seconds"] = 0.0
        Runner(store, device="cpu").ensure(settings)
    """
    command = script(body, store.folder.parent, settings=settings)
    killed = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (store.work(settings.run) / "checkpoint.pt").exists()
    assert not store.path(settings.run).exists()
    saved = runs.train.__globals__["read_checkpoint"](
        store.work(settings.run) / "checkpoint.pt", settings.run
    )
    assert 20 < saved["at"]["step"] < 30
    record = runner.ensure(settings)
    elsewhere = Runner(Store("custom", tmp_path / "straight"), device="cpu")
    straight = elsewhere.ensure(settings)
    assert without_cost(record) == without_cost(straight)
    assert record["cost"]["train_seconds"] > saved["at"]["seconds"] / 2
    assert not store.work(settings.run).exists()


def test_a_corrupt_checkpoint_is_refused_in_one_line(runner, store):
    settings = small_run()
    store.work(settings.run).mkdir(parents=True)
    path = store.work(settings.run) / "checkpoint.pt"
    path.write_bytes(b"prunestudy checkpoint 1\nnonsense")
    with pytest.raises(InputError) as caught:
        runner.ensure(settings)
    assert one_line(caught) == (
        f"checkpoint = 'checkpoint.pt' of {settings.run}: corrupt (checksum);"
        " delete it to start this run again"
    )
    assert path.exists()
    path.unlink()
    assert runner.ensure(settings)["status"] == "done"


# --- data and device


def test_missing_data_is_refused_before_anything_is_written(no_data, store):
    settings = small_run(dataset="mnist", validation=5000)
    for root in (None, no_data, no_data / "nowhere"):
        with pytest.raises(InputError) as caught:
            Runner(store, root, device="cpu").ensure(settings)
        assert one_line(caught).startswith("data = ")
        assert "mnist" in one_line(caught)
    assert not store.folder.exists()
    assert list(no_data.iterdir()) == []


def test_devices(monkeypatch):
    assert runs.device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.device_of("auto") == torch.device("cpu")
    with pytest.raises(InputError) as caught:
        runs.device_of("cuda")
    assert one_line(caught) == "device = 'cuda': no CUDA device here; allowed are auto, cpu"
    with pytest.raises(InputError) as caught:
        runs.device_of("tpu")
    assert one_line(caught) == "device = 'tpu': allowed are auto, cpu, cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runs.device_of("auto") == runs.device_of("cuda") == torch.device("cuda")


def test_the_commit_is_that_of_the_checkout(monkeypatch):
    def git(*words):
        command = ["git", "-C", str(records.repository()), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "HEAD")
    if not head:
        pytest.skip("no git checkout")
    runs.commit.cache_clear()
    assert runs.commit() in (head, f"{head}-dirty")
    runs.commit.cache_clear()
    monkeypatch.setattr(runs, "repository", lambda: Path(os.sep))
    assert runs.commit() == "unknown"
    runs.commit.cache_clear()


def test_an_image_folder_can_be_trained_on(tmp_path, runner):
    picture(tmp_path / "images", 20)
    dataset = f"folder:{tmp_path / 'images'}"
    record = runner.ensure(small_run(dataset=dataset, validation=8, batch_size=8))
    assert record["status"] == "done"
    assert {k: record["data"][k] for k in ("train", "validation", "test")} == {
        "train": 32,
        "validation": 8,
        "test": 40,
    }


def test_an_image_folder_that_changed_is_another_run(tmp_path):
    """Its name has the data's version; datasets.info has one for a folder, too."""
    values = {"dataset": f"folder:{tmp_path / 'images'}", "validation": 8, "batch_size": 8}
    names = set()
    for count in (20, 21):
        picture(tmp_path / "images", count)
        names.add(small_run(**values).run)
    assert len(names) == 2


@pytest.mark.parametrize("key", ["batch_size", "validation"])
def test_an_image_folder_that_is_too_small_changes_nothing(key, tmp_path, store):
    picture(tmp_path / "images", 20)
    values = {"dataset": f"folder:{tmp_path / 'images'}", "validation": 8, "batch_size": 8}
    with pytest.raises(InputError) as caught:
        Runner(store, device="cpu").ensure(small_run(**(values | {key: 40})))
    assert one_line(caught).startswith(f"{key} = 40: ")
    assert not store.folder.exists()


def picture(folder, count):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            place = folder / part / name
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")


def test_a_finished_net_is_an_ordinary_module(runner):
    net = runner.net(child_run("sparse_gates", 0.9))
    assert type(net) is models.LeNet300
    assert measure.sparsity(net) == 0.9
    fresh = models.build("lenet300", (1, 8, 8), 10)
    fresh.load_state_dict(copy.deepcopy(net.state_dict()))
    assert shrink.storage(net).nonzeros == 5430
