"""The batch: what is to be done, by forks of this process or over a cluster by Snakemake.

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
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from prunestudy import datasets, places
from prunestudy.errors import InputError, require
from prunestudy.study import notebooks, worker
from prunestudy.study.plan import Planned, jobs, needed_jobs
from prunestudy.study.records import Store
from prunestudy.study.session import is_untimed

_SNAKEFILE = Path(__file__).with_name("Snakefile")
_ON_GPU = ("gpu", "paper")  # profiles; of these one run is trained at a time
_KINDS = ("train", "latency", "notebooks")  # of jobs, in order


def run(
    store: Store, profile: str, planned: list[Planned], count: int, data: str, executor: str
) -> dict[str, float]:
    """Do all that is missing of `planned` with `count` jobs side by side.

    Returns the seconds of each stage, {} where nothing was missing. Says on stderr what is done.
    Raises `InputError` before anything starts for bad settings, records or data, and afterwards
    if something failed.
    """
    local = executor == "local"
    most = 4 * (os.cpu_count() or 1) if local else 1000
    require(1 <= count <= most, "jobs", count, f"1 to {most}" + ", four a core" * local)
    _require_executor(executor)
    batch = describe(store, profile, planned, count if local else 0, data)
    if not any(batch[kind] for kind in _KINDS):
        return {}
    # Data is looked at (and downloaded) once here, not by each job.
    for name in batch["datasets"]:
        datasets.load(name, data or None)
    with _stage() as stage:
        (stage / "batch.json").write_text(json.dumps(batch), encoding="ascii")
        seconds, at = {}, time.time()
        failed = _locally(stage, batch) if local else _snakemake(stage, batch, count, executor)
        if failed:
            print((stage / "log").read_text("utf-8", "replace").rstrip(), file=sys.stderr)
            raise InputError(f"study = {profile}: a job failed, see above; finished runs are kept")
        for kind in (kind for kind in _KINDS if batch[kind]):
            end = max(path.stat().st_mtime for path in stage.glob(f"{kind}.*.ready"))
            seconds[kind], at = end - at, end
    return seconds


def describe(
    store: Store, profile: str, planned: list[Planned], count: int, data: str
) -> dict[str, Any]:
    """What is to be done, for batch.json: of each kind of job, name to the runs or papers in it.

    With `count` > 0, as many jobs share the runs and the notebooks, each taking the next that no
    other has taken; with 0 (on a cluster) a job is one seed or method, and one notebook.
    """
    missing = [item for item in planned if store.read(item.settings) is None]
    papers = list(dict.fromkeys(item.paper for item in planned))
    stale = [name for name in papers if not notebooks.is_current(store, profile, name)]
    stale.sort(key=lambda name: -sum(item.paper == name for item in planned))  # longest first
    if count:
        # Parents first, so that nobody waits for them long.
        ordered = sorted((i.settings for i in missing), key=lambda s: s.parent is not None)
        runs, needs = list(dict.fromkeys(settings.run for settings in ordered)), {}
        sharers = min(1 if profile in _ON_GPU else count, len(runs))
        train = dict.fromkeys(map(str, range(sharers)), runs)
        books = dict.fromkeys(map(str, range(min(count, len(stale)))), stale)
    else:
        groups = jobs(profile, missing)
        train = {name: [item.settings.run for item in items] for name, items in groups.items()}
        needs = {name: sorted(before) for name, before in needed_jobs(groups).items()}
        books = {name: [name] for name in stale}
    waiting = bool(train) or any(is_untimed(store, item) for item in planned)
    return {
        "folder": str(Path.cwd()),
        "profile": profile,
        "papers": papers,
        "datasets": sorted({item.settings.dataset for item in missing}),
        "results": str(store.folder.parent.resolve()),
        "data": data and str(Path(data).resolve()),
        "gpu": profile in _ON_GPU,
        "needs": needs,
        "train": train,
        "latency": {"all": ["nets"]} if waiting else {},
        "notebooks": books,
    }


def _require_executor(name: str) -> None:
    plugin = f"snakemake_executor_plugin_{name.replace('-', '_')}"
    there = re.fullmatch("[a-z0-9-]+", name) and find_spec(plugin) is not None
    allowed = "local, or one whose package snakemake-executor-plugin-NAME is installed"
    require(bool(name == "local" or there), "executor", name, allowed)
    allowed = "where Slurm is: sbatch is found and sinfo answers"
    require(name != "slurm" or _slurm_answers(), "executor", name, allowed)


def _slurm_answers() -> bool:
    command = ["sinfo", "--noheader"]
    there = shutil.which("sbatch") and shutil.which("sinfo")
    return bool(there) and not subprocess.run(command, capture_output=True, check=False).returncode


def _locally(stage: Path, batch: dict[str, Any]) -> bool:
    """Do one kind of job after the other, in forks: to import all anew takes seconds each time."""
    torch.set_num_threads(1)  # a pool of threads would not outlive the fork
    context, shown = get_context("fork"), set()
    for kind in _KINDS:
        names = batch[kind]
        jobs = [context.Process(target=worker.main, args=(kind, name, stage)) for name in names]
        for job in jobs:
            job.start()
        while any(job.is_alive() for job in jobs):
            time.sleep(0.1)
            _show_ready(stage, batch, shown)
        _show_ready(stage, batch, shown)
        if any(job.exitcode for job in jobs):
            return True
    return False


def _snakemake(stage: Path, batch: dict[str, Any], count: int, executor: str) -> bool:
    """Call Snakemake for the jobs of a cluster; return whether one failed."""
    own, shown = (places.checkout() or Path()) / "profiles" / executor, set()
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(_SNAKEFILE), "--nolock"]
    command += ["--directory", str(stage), "--keep-going", "--quiet", "all"]
    command += ["--executor", executor, "--jobs", str(count)]
    command += ["--workflow-profile", str(own)] if own.is_dir() else []
    with (stage / "log").open("a") as log:
        # It cancels its jobs itself: of a Ctrl-C it gets ours alone, once.
        streams = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, **streams)
        try:
            while process.poll() is None:
                time.sleep(0.3)
                _show_ready(stage, batch, shown)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    _show_ready(stage, batch, shown)
    return process.returncode != 0


def _show_ready(stage: Path, batch: dict[str, Any], shown: set[Path]) -> None:
    """Say on stderr which runs and notebooks are ready that are not yet `shown`."""
    for path in sorted(set(stage.glob("*.ready")) - shown, key=lambda path: path.stat().st_mtime):
        shown.add(path)
        kind, name = path.name.removesuffix(".ready").split(".", 1)
        number = len([other for other in shown if other.name.startswith(f"{kind}.")])
        total = len({thing for things in batch[kind].values() for thing in things})
        said = path.read_text(encoding="utf-8") or name
        print(f"{kind} {number}/{total} {said}", file=sys.stderr, flush=True)


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
