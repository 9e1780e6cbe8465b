"""A study over a real Slurm of one node (.ci/slurm starts it): most of the time is waiting."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from conftest import CARD
from kill_study import records

from prunestudy.study import batch
from prunestudy.study.plan import plan
from prunestudy.study.records import Store, repository

ROOT = repository()
PLUGIN = find_spec("snakemake_executor_plugin_slurm") is not None
METHODS = '[{ method = "dense" }, { method = "magnitude" }, { method = "random" }]'
# One job: a dense start, and a run of a few seconds, long enough to be killed in the middle.
LONG = (
    CARD.replace("start = { epochs = 1,", "start = { epochs = 10,")
    .replace("recipe = { epochs = 1,", "recipe = { epochs = 100,")
    .replace(METHODS, '[{ method = "magnitude" }]')
)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout whose one card is the toy paper's."""
    place = tmp_path / "checkout"
    shutil.copytree(ROOT / "lib", place / "lib", ignore=shutil.ignore_patterns("*.toml", "__py*"))
    shutil.copytree(ROOT / "profiles", place / "profiles")
    shutil.copy(ROOT / "Snakefile", place)
    (place / "lib/prunestudy/papers/toy.toml").write_text(textwrap.dedent(LONG))
    (place / "notebooks").mkdir()
    cell = nbformat.v4.new_code_cell('profile = "quick"\nresults = ""\ndata = ""')
    cell.metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    nbformat.write(notebook, place / "notebooks/99_toy.ipynb")
    return place


@pytest.fixture
def call(checkout, tmp_path):
    """Start a command of that checkout, as a user with a Snakemake profile of his own."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("slurm-init-seconds-before-status-checks: 2\n")
    env = os.environ | {"PYTHONPATH": str(checkout / "lib"), "SNAKEMAKE_PROFILE": str(mine)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    begun = []

    def start(*words):
        command, place = ["prunestudy", *words], {"env": env, "cwd": checkout}
        begun.append(subprocess.Popen(command, start_new_session=True, **place, **streams))
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def slurm_jobs():
    """Comment and state of every job that Slurm remembers, by its number."""
    words = ["squeue", "--noheader", "--states=all", "--format=%A %k %T"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    rows = map(str.split, said.splitlines())
    return {int(job): (comment, state) for job, comment, state in rows}


def wait_for(found, process, seconds=120):
    """The first true value of `found()`, while `process` runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(process.communicate()[0])


@pytest.mark.skipif(not PLUGIN, reason="snakemake-executor-plugin-slurm is not installed")
@pytest.mark.skipif(not batch._slurm_answers(), reason="no Slurm here, or it is not running")
def test_a_study_over_slurm_outlives_the_kill_of_a_job(call, checkout, tmp_path, card_file):
    card_file(LONG)
    names, before = [item.settings.run for item in plan("quick")], slurm_jobs()
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    study = call("study", "--executor", "slurm", "--results", str(killed))
    work = Store("quick", killed).folder / "work"
    wait_for(lambda: list(work.glob("magnitude*/checkpoint.pt")), study)
    (victim,) = set(slurm_jobs()) - set(before)
    subprocess.run(["scancel", "--signal=KILL", str(victim)], check=True)
    # While Snakemake waits.
    undisturbed = call("run", *names, "--results", str(calm))
    for process in (undisturbed, study):
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    train, latency, notebook = "rule_train_wildcards_toy.digits.s0", "rule_latency", "rule_notebook"
    assert [state for job, state in sorted(slurm_jobs().items()) if job not in before] == [
        (train, "CANCELLED"),
        (train, "COMPLETED"),
        (latency, "COMPLETED"),
        (f"{notebook}_wildcards_toy", "COMPLETED"),
    ]
    assert records(killed) == records(calm)
    assert min(record["metrics"]["metric"] for record in records(calm).values()) > 0.8
    assert sorted(records(calm)) == sorted(names)
    assert (killed / "quick/notebooks/99_toy.ipynb").exists()
