"""The batch: what Snakemake is asked to do, and how it is called.

Snakemake deletes declared outputs of failed jobs and keeps locks and half-done marks after a kill.
So nothing of value is ever its output: its jobs write markers into a folder of this one call,
which is thrown away, and what is done is decided by records alone.
"""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from prunestudy import datasets
from prunestudy.errors import InputError, require
from prunestudy.study import notebooks
from prunestudy.study.plan import Planned, jobs, needed_jobs, plan
from prunestudy.study.records import Store, repository
from prunestudy.study.session import is_untimed


class Batch:
    """The jobs of a profile, which of them are still to do, and what they wait for."""

    def __init__(self, profile: str, papers: tuple[str, ...], results: str = "") -> None:
        self.profile, self.store = profile, Store(profile, results or None)
        self.planned = plan(profile, papers)
        self.papers = tuple(dict.fromkeys(item.paper for item in self.planned))
        self.jobs = jobs(profile, self.planned)
        self._needs = needed_jobs(self.jobs)
        missing = {run.settings.run for run in self.missing()}
        self.open = {
            name for name, runs in self.jobs.items() if any(r.settings.run in missing for r in runs)
        }

    def missing(self) -> list[Planned]:
        """Planned runs without a record; raises `InputError` for a record that is not valid."""
        return [item for item in self.planned if self.store.read(item.settings) is None]

    def needs(self, job: str) -> list[str]:
        """Open jobs that must be done before `job`."""
        return sorted(self._needs[job] & self.open)

    def open_notebooks(self) -> list[str]:
        """Papers whose executed notebook is missing or older than its source or records."""
        return [
            paper
            for paper in self.papers
            if not notebooks.is_current(self.store, self.profile, paper)
        ]

    def latency_is_open(self) -> bool:
        """Whether some net is still to be timed."""
        return bool(self.open) or any(is_untimed(self.store, item) for item in self.planned)

    def finished(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.open or self.latency_is_open() or self.open_notebooks())


def run(
    profile: str,
    papers: tuple[str, ...] = (),
    count: int = 2,
    results: str = "",
    data: str = "",
    executor: str = "local",
) -> None:
    """Do all that is missing through Snakemake with `count` jobs side by side.

    Raises `InputError` before anything starts for bad settings, records or data.
    """
    require(count >= 1, "jobs", count, "at least 1")
    _require_executor(executor)
    batch = Batch(profile, papers, results)
    if batch.finished():
        return
    # Data is looked at (and downloaded) once here, not by each job.
    for name in sorted({item.settings.dataset for item in batch.missing()}):
        datasets.load(name, data or None)
    with _stage(batch.store) as stage:
        config = {"profile": profile, "papers": " ".join(papers), "stage": str(stage)}
        config |= {"results": results and str(Path(results).resolve())}
        config |= {"data": data and str(Path(data).resolve())}
        code = subprocess.run(_command(stage, count, executor, config), check=False).returncode
    if code:
        raise InputError(f"study = {profile}: a job failed, see above; finished runs are kept")


def _require_executor(name: str) -> None:
    plugin = f"snakemake_executor_plugin_{name.replace('-', '_')}"
    there = name == "local" or find_spec(plugin) is not None
    require(there, "executor", name, f"local, or one whose package {plugin} is installed")
    allowed = "where Slurm is: sbatch is found and sinfo answers"
    require(name != "slurm" or _slurm_answers(), "executor", name, allowed)


def _slurm_answers() -> bool:
    if not shutil.which("sbatch"):
        return False
    return subprocess.run(["sinfo", "--noheader"], capture_output=True, check=False).returncode == 0


def _command(stage: Path, count: int, executor: str, config: dict[str, str]) -> list[str]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(repository() / "Snakefile")]
    command += ["--directory", str(stage), "--nolock", "--keep-going", "--quiet", "rules"]
    if executor == "local":
        command += ["--cores", str(count)]
    else:
        command += ["--executor", executor, "--jobs", str(count)]
    own = repository() / "profiles" / executor
    command += ["--workflow-profile", str(own)] if own.is_dir() else []
    return [*command, "--config", *(f"{key}={value}" for key, value in config.items() if value)]


@contextmanager
def _stage(store: Store) -> Iterator[Path]:
    """A folder for one call's markers; those of calls that were killed are cleared away."""
    stages = store.folder / "work" / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    for old in stages.glob("*.lock"):
        try:
            with FileLock(old, timeout=0):
                shutil.rmtree(old.with_suffix(""), ignore_errors=True)
        except Timeout:
            continue
        old.unlink(missing_ok=True)
    stage = stages / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with FileLock(f"{stage}.lock"):
        stage.mkdir()
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    Path(f"{stage}.lock").unlink(missing_ok=True)
