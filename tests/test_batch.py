"""A whole study as a batch, on a card of four runs: any path, a second call, Ctrl-C, damage."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import matplotlib as mpl
import nbformat
import psutil
import pytest
import torch
from conftest import NASTY, put_record, tree
from nbclient import NotebookClient

from prunestudy.errors import InputError
from prunestudy.study import batch, kernel, notebooks
from prunestudy.study.plan import plan
from prunestudy.study.records import Store


def study(start, *words):
    """Run `study` to its end; returns what it said on stdout and stderr."""
    out, err = (process := start("study", *words)).communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


@pytest.mark.usefixtures("toy_card")
def test_any_path_is_a_path_and_a_second_study_does_nothing(start, checkout, tmp_path):
    results, data = tmp_path / NASTY, tmp_path / f"-data {NASTY}"
    data.mkdir()
    out, err = study(start, f"--results={results}", f"--data={data.name}")
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"checkout", "cards", "my cache", results.name, data.name}
    store = Store("quick", results)
    names = [item.settings.run for item in plan("quick")]
    assert store.names() == sorted(names)
    lines = [line.split() for line in err.splitlines()]
    assert [words[1] for words in lines[:4]] == ["1/4", "2/4", "3/4", "4/4"]
    assert {words[2] for words in lines[:4]} == set(names)
    assert [" ".join(words) for words in lines[4:]] == [
        "latency 1/1 3 nets timed",
        "notebooks 1/1 99_toy.ipynb",
    ]
    text = notebooks.executed(store, "toy").read_text()
    assert "touch" not in text
    seconds = out.splitlines()[-1].split()
    assert seconds[0] == "seconds:"
    assert seconds[1::2] == ["train", "latency", "notebooks", "tables", "total"]
    assert list((tmp_path / "my cache/prunestudy").iterdir()) == []

    before = tree(results / "quick/runs"), notebooks.executed(store, "toy").stat().st_mtime_ns
    out, err = study(start, f"--results={results.name}", f"--data={data}")
    assert err == ""
    assert out.splitlines()[-1].split()[1::2] == ["tables", "total"]
    now = tree(results / "quick/runs"), notebooks.executed(store, "toy").stat().st_mtime_ns
    assert now == before

    # Of a failed job all is shown, and the earlier copy stays.
    source = checkout / "notebooks/99_toy.ipynb"
    notebook = nbformat.read(source, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("1 / 0"))
    nbformat.write(notebook, source)
    process = start("study", "--results", results.name)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "toy: notebook 99_toy: ZeroDivisionError: division by zero" in err
    assert err.splitlines()[-1] == (
        "prunestudy: study = quick: a job failed, see above; finished runs are kept"
    )
    now = tree(results / "quick/runs"), notebooks.executed(store, "toy").stat().st_mtime_ns
    assert now == before


def test_a_job_that_cannot_write_says_one_line(start, tmp_path):
    (tmp_path / "r/quick").mkdir(parents=True)
    (tmp_path / "r/quick/work").write_text("")
    process = start("study", "--results", "r")
    *lines, last = process.communicate(timeout=300)[1].splitlines()
    assert process.returncode == 2
    assert all(": file = " in line for line in lines), lines
    assert last.startswith("prunestudy: study = quick: a job failed, see above")


def test_a_user_without_a_home(tmp_path, monkeypatch):
    store, started = Store("quick", tmp_path), []
    monkeypatch.setattr(os.path, "expanduser", str)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(batch, "_locally", lambda stage, *_: started.append(stage))
    with pytest.raises(ValueError, match="max"):
        batch.run(store, "quick", plan("quick"), 1, "", "local")
    assert started[0].parent == tmp_path / "prunestudy"


@pytest.mark.usefixtures("toy_card")
def test_what_is_missing_is_done_parents_first(tmp_path):
    store, planned = Store("quick", tmp_path), plan("quick")
    names = [item.settings.run for item in planned]
    found = batch.describe(store, "quick", planned, "")
    assert (found["train"], found["notebooks"]) == (names, ["toy"])
    assert found["needs"] == {name: [names[0]] for name in names[1:]}
    same = {"results": str(tmp_path), "gpu": False, "papers": ["toy"], "datasets": ["digits"]}
    assert found | same | {"latency": ["nets"]} == found
    put_record(store, planned[0].settings)  # the parent is there
    found = batch.describe(store, "quick", planned, "")
    assert (found["train"], found["needs"]) == (names[1:], {})


def alive(process):
    """Commands that `process` has begun."""
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("command", "number"), [("train", signal.SIGTERM), ("study", signal.SIGINT)]
)
def test_ctrl_c_ends_all_and_says_how_to_go_on(start, tmp_path, command, number):
    words = {"train": ("train", "--set", "epochs=100000"), "study": ("study",)}[command]
    process = start(*words, "--results", str(tmp_path / "results"))
    profile = "quick" if command == "study" else "custom"
    work = tmp_path / "results" / profile / "work"
    while not list(work.glob("dense*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = alive(process)
    assert bool(children) is (command == "study")
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)  # an impatient one changes nothing
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == (
        "prunestudy: stopped; finished work is kept: run the same command again to continue"
    )
    assert "Traceback" not in err
    assert not [child for child in children if child.is_running()]


FORKS = """
import os, signal
from multiprocessing import get_context
from prunestudy.study import batch
fork = get_context("fork").Process(target=print, args=("worked",), daemon=True)
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    with batch._held_back():
        fork.start()
    print("not stopped")
except KeyboardInterrupt:
    fork.join()
    print(fork.exitcode, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_a_ctrl_c_that_comes_while_a_fork_begins_counts():
    words = [sys.executable, "-c", FORKS]
    made = subprocess.run(words, capture_output=True, text=True, check=True)
    assert made.stdout.split("\n")[:2] == ["worked", "0 True"]


def test_a_ctrl_c_that_the_shell_has_off_stays_off():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with batch._held_back():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


STATE = """
import os
import matplotlib as mpl, matplotlib.pyplot as plt, torch
names = sorted(name for name in globals() if not name.startswith("_"))
print(names, os.getcwd(), __name__, torch.get_num_threads())
print({name: str(value) for name, value in mpl.rcParams.items()}, mpl.get_backend())
plt.plot([1, 2]);
"""
SPOILT = """
import os, matplotlib as mpl, torch
spoilt = torch.manual_seed(1)
mpl.rcParams["lines.linewidth"] = 9
os.chdir("/")
torch.Tensor.mine = 1
"""


def outputs_of(text, run):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text)])
    run(notebook)
    return notebook.cells[0].outputs


@pytest.mark.filterwarnings("ignore")  # of the kernel's own
def test_a_notebooks_kernel_is_as_new_as_one_of_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = outputs_of(STATE, lambda notebook: NotebookClient(notebook).execute())
    assert [output.output_type for output in alone] == ["stream", "display_data"]
    drawn = []
    for seed in (1, 2):
        assert outputs_of(SPOILT, kernel.run_cells) == []
        with torch.random.fork_rng(), mpl.rc_context({"lines.linewidth": 5}):
            torch.manual_seed(seed)
            assert outputs_of(STATE, kernel.run_cells) == alone
            drawn += outputs_of("import torch; print(torch.rand(3))", kernel.run_cells)
    assert drawn[0] == drawn[1]  # on a kernel of its own, a cell without a seed differs
    assert not hasattr(torch.Tensor, "mine")
    with pytest.raises(InputError, match="its kernel died"):
        outputs_of("import os; os._exit(1)", kernel.run_cells)


@pytest.mark.filterwarnings("ignore")
def test_a_kernel_has_nothing_of_the_users_and_takes_a_long_temporary_path(monkeypatch, tmp_path):
    startup, far = tmp_path / "startup.py", tmp_path / ("x" * 90)
    startup.write_text("histfile = 1")
    far.mkdir()
    (tmp_path / "profile_default/startup").mkdir(parents=True)
    (tmp_path / "profile_default/startup/a.py").write_text("histfile = 2")
    monkeypatch.setenv("PYTHONSTARTUP", str(startup))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(far))
    (said,) = outputs_of("print('histfile' in globals())", kernel.run_cells)
    assert said.text == "False\n"
