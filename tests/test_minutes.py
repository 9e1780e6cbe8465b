"""The study of one device: its order, its clock, and what it leaves."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import one_line

from prunestudy.errors import InputError
from prunestudy.study import cli, minutes
from prunestudy.study.plan import plan
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner


@pytest.fixture
def planned():
    """Eight runs of a second: a dense net and what begins with it, for each of two seeds."""
    chosen = plan("quick", ("sparse_gates",), seeds=2, epochs=1)
    dense = [item for item in chosen if item.settings.method == "dense"]
    ours = [item for item in chosen if item.settings.method in ("magnitude", "sparse_gates")]
    return [*dense, *(item for item in ours if item.settings.target.value == 0.9)]


@pytest.fixture(scope="module")
def whole():
    return plan("gpu")


def test_a_borrowed_machine_needs_none_of_jupyter():
    code = "import sys; from prunestudy.study import commands; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    needed = {name.split(".")[0] for name in done.stdout.split()}
    assert "torch" in needed
    assert not needed & {"IPython", "ipykernel", "nbclient", "nbformat", "papermill", "snakemake"}


def test_runs_go_net_by_net_and_seed_by_seed_through_the_papers_in_turns(whole):
    found = minutes.in_order(whole)
    assert len({each.run for each in found}) == len(found)
    keys = [(each.model, each.seed) for each in found]
    nets = ("resnet20", "resnet56", "vgg16_cifar")
    assert list(dict.fromkeys(keys)) == [(net, seed) for net in nets for seed in range(3)]
    first = {each.method for each in found[:30]}
    assert {"dense", "sparse_gates", "force", "gdp", "magnitude_attention"} <= first
    seen = set()
    for each in found:
        assert each.parent is None or each.parent.run in seen
        seen.add(each.run)


@pytest.mark.parametrize(
    ("folders", "dataset"),
    [
        ((), "cifar10"),
        (("cifar10-jpeg",), "cifar10_jpeg"),
        (("cifar-10-batches-py", "cifar10-jpeg"), "cifar10"),
    ],
)
def test_the_copy_of_cifar10_that_is_there_is_taken(folders, dataset, whole, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir()
    chosen = minutes.here(whole, str(tmp_path))
    assert {item.settings.dataset for item in chosen} == {dataset}
    assert len(chosen) == len(whole) / 2


def test_a_study_in_turns_gives_the_records_of_one_run_after_another(planned, tmp_path, capsys):
    store = Store("custom", tmp_path)
    lines = list(minutes.study(store, planned, "", 10.0, 3, "cpu"))
    path = tmp_path / "custom" / "gpu.md"
    assert lines == [f"{len(planned)} of {len(planned)} runs are done", str(path)]
    assert len((tmp_path / "custom" / "records.jsonl").read_text().splitlines()) == len(planned)
    alone = Runner(Store("quick", tmp_path / "alone"), device="cpu")
    names = {item.settings.run for item in planned}
    for item in planned:
        one, other = store.require(item.settings.run), alone.ensure(item.settings)
        for key in ("metrics", "history", "validation", "files"):
            assert one[key] == other[key]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(names)
    assert said[-1].startswith(f"{len(names)}/{len(names)} ")
    assert minutes.run(Runner(store, device="cpu"), planned, 10, 3) == 0
    assert capsys.readouterr().err == ""
    rows = path.read_text().splitlines()
    assert rows[0] == "# CIFAR-10 on one GPU"
    assert rows[2].startswith("cpu, torch ")
    assert f"{len(planned)} of {len(planned)} runs are done. Settings are" in rows[2]
    assert "| method | n | none removed | 90% of weights |" in rows[4]
    assert sum("| one-shot magnitude | 2 |" in row for row in rows) == 1


def test_time_that_is_up_leaves_checkpoints_and_the_next_call_goes_on(
    planned, tmp_path, monkeypatch
):
    """The clock moves by a second each time it is read, until the time is up."""
    clock = iter(range(10**9))
    monkeypatch.setattr(minutes.time, "monotonic", lambda: float(next(clock)))
    store, calls, left = Store("quick", tmp_path), 0, 1
    while left:
        left = minutes.run(Runner(store, device="cpu"), planned, 1.0, 2)
        calls += 1
        assert calls < 50
    assert calls > 3
    alone = Runner(Store("quick", tmp_path / "alone"), device="cpu")
    for item in planned:
        one, other = store.require(item.settings.run), alone.ensure(item.settings)
        assert (one["metrics"], one["history"]) == (other["metrics"], other["history"])


@pytest.mark.parametrize("error", [InputError("loss = 'x': fails"), RuntimeError("fails")])
def test_a_run_that_cannot_be_made_is_named_and_its_children_wait(error, planned, tmp_path, capsys):
    class Failing(Runner):
        def _train(self, settings):
            if settings.method == "dense" and settings.seed == 0:
                raise error
            return super()._train(settings)

    left = minutes.run(Failing(Store("quick", tmp_path), device="cpu"), planned, 10, 2)
    seeds = [item.settings.seed for item in planned]
    assert 0 < left <= seeds.count(0)
    assert re.search(r"^dense-lenet300-digits-\w+: .*fails$", capsys.readouterr().err, re.MULTILINE)


def test_what_a_fresh_clone_has_the_record_of_but_not_the_net_is_trained_again(
    planned, tmp_path, capsys
):
    store = Store("custom", tmp_path)
    starts = [item for item in planned if item.settings.method == "dense"]
    list(minutes.study(store, starts, "", 10.0, 2, "cpu"))
    shutil.rmtree(store.runs)
    fresh = Store("custom", tmp_path)
    before = [fresh.require(item.settings.run)["metrics"] for item in starts]
    lines = list(minutes.study(fresh, planned, "", 10.0, 2, "cpu"))
    assert f"{len(planned)} of {len(planned)} runs are done" in lines
    assert [fresh.require(item.settings.run)["metrics"] for item in starts] == before
    assert ": " not in capsys.readouterr().err.replace("prunestudy: ", "")


def test_missing_data_is_one_line_before_any_run(whole, tmp_path, monkeypatch):
    chosen = [item for item in whole if item.settings.dataset == "cifar10_jpeg"]
    runner = Runner(Store("gpu", tmp_path), tmp_path / "none", device="cpu")
    with pytest.raises(InputError) as caught:
        minutes.run(runner, chosen, 10, 2)
    assert one_line(caught).endswith("cifar10_jpeg needs this folder")
    assert not (tmp_path / "gpu").exists()


def test_without_cuda_there_is_one_line(whole, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError) as caught:
        Runner(Store("gpu"), device="cuda").ensure(whole[0].settings)
    assert one_line(caught) == "device = 'cuda': no CUDA device here; allowed are auto, cpu"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "device = 'cuda': no CUDA device here; allowed are auto, cpu"),
        (("--minutes", "0"), "minutes = 0.0: above 0"),
        (("--minutes", "nan"), "minutes = nan: above 0"),
        (("--gang", "0"), "gang = 0: 1 to 64 runs at a time"),
    ],
)
def test_the_command_says_in_one_line_what_is_missing(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["study", "--profile", "gpu", "--results", str(tmp_path), *words]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"prunestudy: {line}\n"
    assert list(tmp_path.iterdir()) == []
