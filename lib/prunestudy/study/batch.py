"""The batch: what Snakemake is asked to do, and how it is called.

Snakemake deletes declared outputs of failed jobs and keeps locks and half-done marks after a kill.
So nothing of value is ever its output: its jobs (`worker.py`) write markers into a folder of this
one call, which is thrown away, and what is done is decided by records alone. All that the jobs
must know stands in that folder's batch.json.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunestudy import datasets, places
from prunestudy.errors import InputError, require
from prunestudy.study import notebooks, worker
from prunestudy.study.plan import Planned, jobs, needed_jobs
from prunestudy.study.records import Store
from prunestudy.study.session import is_untimed

_SNAKEFILE = Path(__file__).with_name("Snakefile")
_ON_GPU = ("gpu", "paper")  # profiles; of these one run is trained at a time


def run(
    store: Store,
    profile: str,
    planned: list[Planned],
    count: int = 2,
    data: str = "",
    executor: str = "local",
) -> dict[str, float]:
    """Do all that is missing of `planned` with `count` jobs side by side.

    Returns the seconds of each stage, {} where nothing was missing. Says on stderr what is done.
    Raises `InputError` before anything starts for bad settings, records or data, and afterwards
    if something failed.
    """
    most = 4 * (os.cpu_count() or 1) if executor == "local" else 1000
    allowed = f"1 to {most}" + (", four a core" if executor == "local" else "")
    require(1 <= count <= most, "jobs", count, allowed)
    _require_executor(executor)
    batch = describe(store, profile, planned, count if executor == "local" else 0, data)
    if not (batch["train"] or batch["latency"] or batch["notebooks"]):
        return {}
    # Data is looked at (and downloaded) once here, not by each job.
    for name in sorted({item.settings.dataset for item in _missing(store, planned)}):
        datasets.load(name, data or None)
    with _stage() as stage:
        (stage / "batch.json").write_text(json.dumps(batch), encoding="ascii")
        code, seconds = _snakemake(stage, count, executor)
    if code:
        raise InputError(f"study = {profile}: a job failed, see above; finished runs are kept")
    return seconds


def describe(
    store: Store, profile: str, planned: list[Planned], count: int, data: str = ""
) -> dict[str, Any]:
    """What is to be done, for batch.json.

    With `count` > 0, as many jobs share the runs and the notebooks, each taking the next that no
    other has taken; with 0 (on a cluster) a job is one seed or method, and one notebook.
    """
    missing = {item.settings.run for item in _missing(store, planned)}
    groups = jobs(profile, planned)
    needs = needed_jobs(groups)
    train = {
        name: {
            "runs": [item.settings.run for item in runs if item.settings.run in missing],
            "needs": sorted(needs[name]),
        }
        for name, runs in groups.items()
    }
    train = {name: job for name, job in train.items() if job["runs"]}
    for job in train.values():
        job["needs"] = [name for name in job["needs"] if name in train]
    papers = dict.fromkeys(item.paper for item in planned)
    papers = [name for name in papers if not notebooks.is_current(store, profile, name)]
    papers.sort(key=lambda name: -sum(item.paper == name for item in planned))
    books = {name: [name] for name in papers}
    if count:
        # Parents first, so that nobody waits for them long.
        runs = [item.settings for item in planned if item.settings.run in missing]
        runs = list(dict.fromkeys(s.run for s in sorted(runs, key=lambda s: s.parent is not None)))
        sharers = min(1 if profile in _ON_GPU else count, len(runs))
        train = {str(i): {"runs": runs, "needs": []} for i in range(sharers)}
        books = {str(i): papers for i in range(min(count, len(papers)))}
    return {
        "folder": str(Path.cwd()),
        "profile": profile,
        "papers": list(dict.fromkeys(item.paper for item in planned)),
        "results": str(store.folder.parent.resolve()),
        "data": data and str(Path(data).resolve()),
        "gpu": profile in _ON_GPU,
        "train": train,
        "latency": bool(train) or any(is_untimed(store, item) for item in planned),
        "notebooks": books,
    }


def _missing(store: Store, planned: list[Planned]) -> list[Planned]:
    return [item for item in planned if store.read(item.settings) is None]


def _require_executor(name: str) -> None:
    plugin = f"snakemake_executor_plugin_{name.replace('-', '_')}"
    there = re.fullmatch("[a-z0-9-]+", name) and find_spec(plugin) is not None
    allowed = "local, or one whose package snakemake-executor-plugin-NAME is installed"
    require(bool(name == "local" or there), "executor", name, allowed)
    allowed = "where Slurm is: sbatch is found and sinfo answers"
    require(name != "slurm" or _slurm_answers(), "executor", name, allowed)


def _slurm_answers() -> bool:
    if not shutil.which("sbatch"):
        return False
    return subprocess.run(["sinfo", "--noheader"], capture_output=True, check=False).returncode == 0


def _snakemake(stage: Path, count: int, executor: str) -> tuple[int, dict[str, float]]:
    """Call Snakemake, pass on what its jobs say; return its exit code and seconds per stage."""
    local, own = executor == "local", (places.checkout() or Path()) / "profiles" / executor
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(_SNAKEFILE), "--nolock"]
    command += ["--directory", str(stage), "--keep-going", "--quiet", "all"]
    command += ["--cores", str(count)] if local else ["--executor", executor, "--jobs", str(count)]
    command += ["--workflow-profile", str(own)] if own.is_dir() else []
    said = worker.Progress(stage)
    with (stage / "snakemake.log").open("w+", encoding="utf-8", errors="replace") as log:
        # A cluster's jobs are cancelled by Snakemake: of a Ctrl-C it gets ours alone, once.
        streams = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": not local}
        process = subprocess.Popen(command, **streams)
        try:
            while process.poll() is None:
                time.sleep(0.3)
                said.show()
        except KeyboardInterrupt:
            if not local:
                process.send_signal(signal.SIGINT)
                process.wait()
            raise
        said.show()
        if process.returncode:
            log.seek(0)
            print(log.read().rstrip(), file=sys.stderr)
    return process.returncode, said.seconds()


@contextmanager
def _stage() -> Iterator[Path]:
    """A folder for one call's markers; those of calls that were killed are cleared away.

    It lies in the user's cache, beside Snakemake's own: executors paste its path into command
    lines, so that it cannot be below a results folder of any name.
    """
    stages = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prunestudy"
    plain = bool(re.fullmatch(r"[\w./+-]+", str(stages), re.ASCII))
    require(plain, "XDG_CACHE_HOME", str(stages), "a path of letters, digits and ._/+- only")
    stages.mkdir(parents=True, exist_ok=True)
    for old in stages.glob("*.lock"):
        with suppress(Timeout), FileLock(old, timeout=0):
            shutil.rmtree(old.with_suffix(""), ignore_errors=True)
            old.unlink(missing_ok=True)
    stage = stages / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with FileLock(f"{stage}.lock"):
        stage.mkdir()
        yield stage  # after an error it stays, for the next call to clear away
        shutil.rmtree(stage, ignore_errors=True)
        Path(f"{stage}.lock").unlink()
