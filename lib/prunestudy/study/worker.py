"""A job of the batch, in the batch's folder: `python -m prunestudy.study.worker KIND NAME`.

Local jobs share their runs or notebooks: each takes the next that no other has taken.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunestudy.errors import InputError
from prunestudy.study import notebooks
from prunestudy.study.plan import plan
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner
from prunestudy.study.session import measure_latency


def main(kind: str, name: str, stage: Path) -> None:
    """Do the job `name` of `kind` (train, latency or notebooks); exits with 1 if a part failed."""
    # A kernel must be ended: that it is when this process ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (stage / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    batch = json.loads((stage / "batch.json").read_text(encoding="ascii"))
    os.chdir(batch["folder"])
    with ExitStack() as stack:
        do = _doing(kind, batch, stack)
        for thing in batch[kind][name]:
            failed = stage / f"{thing}.failed"
            with suppress(Timeout), FileLock(stage / f"{thing}.taken", timeout=0):
                try:
                    if not failed.exists():
                        said = do(thing)
                        (stage / f"{kind}.{thing}.ready").write_text(said, encoding="utf-8")
                except InputError as error:
                    failed.touch()
                    print(f"{thing}: {error}", file=sys.stderr)
    sys.exit(bool(list(stage.glob("*.failed"))))


def _doing(kind: str, batch: dict[str, Any], stack: ExitStack) -> Callable[[str], str]:
    """What does one thing of a job of `kind`, unless it is done, and returns what to say of it."""
    profile, data = batch["profile"], batch["data"]
    store, planned = Store(profile, batch["results"]), plan(profile, tuple(batch["papers"]))
    if kind == "train":
        runner = Runner(store, data or None)
        settings = {item.settings.run: item.settings for item in planned}
        return lambda run: line_of_run(runner.ensure(settings[run]))
    if kind == "latency":
        return lambda _: f"{measure_latency(store, planned)} nets timed"
    client = stack.enter_context(notebooks.kernel())

    def execute(paper: str) -> str:
        if notebooks.is_current(store, profile, paper):
            return paper
        return notebooks.execute(client, store, profile, paper, data).name

    return execute


def line_of_run(record: dict[str, Any]) -> str:
    """A run's name, status and score."""
    score = record["metrics"].get("metric")
    return f"{record['run']} {record['status']} {'' if score is None else f'{score:.4f}'}"


if __name__ == "__main__":
    main(*sys.argv[1:], Path.cwd())
