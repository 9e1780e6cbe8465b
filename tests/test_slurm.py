"""A study over a real Slurm of one node (.ci/slurm starts it): most of the time is waiting."""

import shutil
import subprocess
import textwrap
import time
from importlib.util import find_spec

import pytest
from conftest import CARD, NASTY
from kill_study import records

from prunestudy.study.plan import plan
from prunestudy.study.records import Store

PLUGIN = find_spec("snakemake_executor_plugin_slurm") is not None
METHODS = '[{ method = "dense" }, { method = "magnitude" }, { method = "random" }]'
# A dense start, and a run of a few seconds, long enough to be killed in the middle.
LONG = (
    CARD.replace("start = { epochs = 1,", "start = { epochs = 10,")
    .replace("recipe = { epochs = 1,", "recipe = { epochs = 100,")
    .replace(METHODS, '[{ method = "magnitude" }]')
)


@pytest.fixture
def long_card(checkout, tmp_path, monkeypatch):
    """The checkout with the long card, and a Snakemake profile of a user's own."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("slurm-init-seconds-before-status-checks: 2\n")
    monkeypatch.setenv("SNAKEMAKE_PROFILE", str(mine))
    (checkout / "lib/prunestudy/papers/toy.toml").write_text(textwrap.dedent(LONG))


def slurm_jobs():
    """Comment and state of every job that Slurm remembers, by its number."""
    words = ["squeue", "--noheader", "--states=all", "--format=%A %k %T"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    rows = map(str.split, said.splitlines())
    return {int(job): (comment, state) for job, comment, state in rows}


def slurm_answers():
    words = ["sinfo", "--noheader"]
    return bool(shutil.which("sinfo")) and not subprocess.run(words, check=False).returncode


def wait_for(found, process, seconds=120):
    """The first true value of `found()`, while `process` runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(process.communicate())


@pytest.mark.slow
@pytest.mark.skipif(not PLUGIN, reason="snakemake-executor-plugin-slurm is not installed")
@pytest.mark.skipif(not slurm_answers(), reason="no Slurm here, or it is not running")
def test_a_study_over_slurm_outlives_the_kill_of_a_job(start, long_card, tmp_path, card_file):
    card_file(LONG)
    names, before = [item.settings.run for item in plan("quick")], slurm_jobs()
    calm, killed = tmp_path / "calm", tmp_path / NASTY
    study = start("study", "--executor", "slurm", "--results", str(killed))
    work = Store("quick", killed).folder / "work"
    wait_for(lambda: list(work.glob("magnitude*/checkpoint.pt")), study)
    victim = max(set(slurm_jobs()) - set(before))
    subprocess.run(["scancel", "--signal=KILL", str(victim)], check=True)
    # While Snakemake waits.
    undisturbed = start("run", *names, "--results", str(calm))
    for process in (undisturbed, study):
        said = "".join(process.communicate(timeout=300))
        assert process.returncode == 0, said
    first, train = (f"rule_train_wildcards_{name}" for name in names)
    notebook = "rule_notebooks_wildcards_toy"
    assert [state for job, state in sorted(slurm_jobs().items()) if job not in before] == [
        (first, "COMPLETED"),
        (train, "CANCELLED"),
        (train, "COMPLETED"),
        ("rule_latency", "COMPLETED"),
        (notebook, "COMPLETED"),
    ]
    assert records(killed) == records(calm)
    assert min(record["metrics"]["metric"] for record in records(calm).values()) > 0.8
    assert sorted(records(calm)) == sorted(names)
    assert (killed / "quick/notebooks/99_toy.ipynb").exists()
