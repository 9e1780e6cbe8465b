"""The batch: what is to be done, by forks of this process or over a cluster by Snakemake.

Snakemake deletes declared outputs of failed jobs and keeps locks and half-done marks after a kill.
So nothing of value is ever its output: its jobs, `python -m prunestudy.study.batch KIND NAME`,
write markers into a temporary folder of this one call, and what is done is decided by records
alone. All that the jobs must know stands in that folder's batch.json.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from prunestudy import datasets, places
from prunestudy.errors import InputError, file_line, require
from prunestudy.study import notebooks
from prunestudy.study.plan import Planned, plan
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner
from prunestudy.study.session import is_untimed, measure_latency

_KINDS = ("train", "latency", "notebooks")  # of jobs, in order


def run(
    store: Store, profile: str, planned: list[Planned], count: int, data: str, executor: str
) -> dict[str, float]:
    """Do all that is missing of `planned` with `count` jobs side by side.

    Returns the seconds of each kind of job, {} where nothing was missing; progress goes to stderr.
    Raises `InputError` before anything starts for bad settings, records or data, and afterwards
    if something failed.
    """
    local = executor == "local"
    most = 4 * (os.cpu_count() or 1) if local else 1000
    require(1 <= count <= most, "jobs", count, f"1 to {most}" + ", four a core" * local)
    _require_executor(executor)
    batch = describe(store, profile, planned, data)
    if not any(map(batch.get, _KINDS)):
        return {}
    # In the user's cache, beside Snakemake's own: executors paste its path into command lines, so
    # that it cannot be below a results folder of any name.
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")  # noqa: PTH111
    cache = tempfile.gettempdir() if cache[0] == "~" else cache  # a user without a home
    stages = Path(cache) / "prunestudy"
    plain = local or bool(re.fullmatch(r"[\w./+-]+", str(stages), re.ASCII))
    require(plain, "XDG_CACHE_HOME", str(stages), "a path of letters, digits and ._/+- only")
    # Data is looked at (and downloaded) once here, not by each job.
    for name in batch["datasets"]:
        datasets.load(name, data)
    stages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stages, ignore_cleanup_errors=True) as folder:
        stage, seconds, at = Path(folder), {}, time.time()
        (stage / "batch.json").write_text(json.dumps(batch), encoding="ascii")
        words = stage, batch, count
        if _locally(*words) if local else _snakemake(*words, executor):
            print((stage / "log").read_text("utf-8", "replace").rstrip(), file=sys.stderr)
            raise InputError(f"study = {profile}: a job failed, see above; finished runs are kept")
        for kind in filter(batch.get, _KINDS):
            end = max(path.stat().st_mtime for path in stage.glob(f"{kind}.*.shown"))
            seconds[kind], at = end - at, end
    return seconds


def describe(store: Store, profile: str, planned: list[Planned], data: str) -> dict[str, Any]:
    """What is to be done, for batch.json: runs and papers by kind of job, parents first."""
    missing = [item.settings for item in planned if store.read(item.settings) is None]
    missing.sort(key=lambda settings: settings.parent is not None)  # so that no job waits long
    runs = {settings.run: settings.parent and settings.parent.run for settings in missing}
    papers = list(dict.fromkeys(item.paper for item in planned))
    stale = [name for name in papers if not notebooks.is_current(store, profile, name)]
    stale.sort(key=lambda name: -sum(item.paper == name for item in planned))  # longest first
    waiting = bool(runs) or any(is_untimed(store, item) for item in planned)
    return {
        "folder": str(Path.cwd()),
        "profile": profile,
        "papers": papers,
        "datasets": sorted({settings.dataset for settings in missing}),
        "results": str(store.folder.parent.resolve()),
        "data": data and str(Path(data).resolve()),
        "gpu": profile in ("gpu", "paper"),  # one run is trained at a time
        # on a cluster each run is a job
        "needs": {run: [parent] for run, parent in runs.items() if parent in runs},
        "train": list(runs),
        "latency": ["nets"] if waiting else [],
        "notebooks": stale,
    }


def _require_executor(name: str) -> None:
    plugin = f"snakemake_executor_plugin_{name.replace('-', '_')}"
    there = re.fullmatch("[a-z0-9-]+", name) and find_spec(plugin) is not None
    allowed = "local, or one whose package snakemake-executor-plugin-NAME is installed"
    require(bool(name == "local" or there), "executor", name, allowed)
    there = name != "slurm" or shutil.which("sbatch") is not None
    require(there, "executor", name, "only where Slurm is installed (sbatch)")


def _locally(stage: Path, batch: dict[str, Any], count: int) -> bool:
    """Do each kind of job in forks, to import all only once; return whether one failed."""
    torch.set_num_threads(1)  # a pool of threads would not outlive the fork
    context = get_context("fork")
    for kind in _KINDS:
        jobs = min(1 if batch["gpu"] and kind == "train" else count, len(batch[kind]))
        words = (kind, _untaken(batch[kind], stage), stage)
        forks = [context.Process(target=do_job, args=words) for _ in range(jobs)]
        with _held_back():
            for fork in forks:
                fork.start()
        _show_ready(stage, batch, lambda forks=forks: any(fork.is_alive() for fork in forks))
        if any(fork.exitcode for fork in forks):
            return True
    return False


@contextmanager
def _held_back() -> Iterator[None]:
    """Raise a Ctrl-C at the end: within `os.fork` Python runs hooks, and drops what they raise."""
    came: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = {number: handler for number, handler in usual.items() if callable(handler)}
    for number in usual:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _snakemake(stage: Path, batch: dict[str, Any], count: int, executor: str) -> bool:
    """Let Snakemake do the jobs on a cluster; return whether one failed."""
    own = (places.checkout() or Path()) / "profiles" / executor
    command = [sys.executable, "-m", "snakemake", "--nolock", "--keep-going", "--quiet", "all"]
    command += ["--snakefile", str(Path(__file__).with_name("Snakefile"))]
    command += ["--directory", str(stage), "--executor", executor, "--jobs", str(count)]
    command += ["--workflow-profile", str(own)] if own.is_dir() else []
    with (stage / "log").open("a") as log:
        # It cancels its jobs itself, so it must see a Ctrl-C once: the one that we send.
        streams = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, **streams)
        try:
            _show_ready(stage, batch, lambda: process.poll() is None)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    return process.returncode != 0


def _show_ready(stage: Path, batch: dict[str, Any], going: Callable[[], bool]) -> None:
    """While jobs are `going`, print on stderr the runs and notebooks that get ready."""
    goes = True
    while goes:
        time.sleep(0.1)
        goes = going()
        for path in sorted(stage.glob("*.ready"), key=lambda path: path.stat().st_mtime):
            kind, name = path.stem.split(".", 1)
            said = path.read_text(encoding="utf-8") or name
            path.rename(path.with_suffix(".shown"))
            number = len(list(stage.glob(f"{kind}.*.shown")))
            print(f"{kind} {number}/{len(batch[kind])} {said}", file=sys.stderr, flush=True)


def _untaken(names: list[str], stage: Path) -> Iterator[str]:
    """Those of `names` that no other fork has begun."""
    for name in names:
        with suppress(FileExistsError):
            (stage / f"{name}.taken").touch(exist_ok=False)
            yield name


def do_job(kind: str, names: Iterable[str], stage: Path) -> None:
    """Do `names` of `kind` (train, latency or notebooks); exit with 1 if one failed."""
    # A kernel is ended only if this process exits in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if callable(signal.getsignal(signal.SIGINT)):  # that of the fork's beginning; else ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with (stage / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    batch = json.loads((stage / "batch.json").read_text(encoding="ascii"))
    os.chdir(batch["folder"])
    profile, data = batch["profile"], batch["data"]
    store, planned = Store(profile, batch["results"]), plan(profile, tuple(batch["papers"]))
    runner, settings = Runner(store, data), {p.settings.run: p.settings for p in planned}
    do: Callable[[str], str] = {
        "train": lambda run: line_of_run(runner.ensure(settings[run])),
        "latency": lambda _: f"{measure_latency(store, planned)} nets timed",
        "notebooks": lambda paper: notebooks.execute(store, profile, paper, data).name,
    }[kind]  # each does one name, and returns a line for the progress
    failed = False
    for name in names:
        try:
            (stage / f"{kind}.{name}.ready").write_text(do(name), encoding="utf-8")
        except (InputError, OSError) as error:
            failed, said = True, error if isinstance(error, InputError) else file_line(error)
            print(f"{name}: {said}", file=sys.stderr)
    sys.exit(failed)


def line_of_run(record: dict[str, Any]) -> str:
    """A run's name, status and score."""
    score = record["metrics"].get("metric")
    return f"{record['run']} {record['status']} {'' if score is None else f'{score:.4f}'}"


if __name__ == "__main__":
    do_job(sys.argv[1], sys.argv[2:], Path.cwd())
