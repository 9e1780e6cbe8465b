"""A job of the batch, in the batch's folder: `python -m prunestudy.study.worker KIND NAME`.

Local jobs share their runs or notebooks: each takes the next that no other has taken. What is
done is said in KIND.NAME.said, lines of time and text, which the command `study` passes on.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunestudy.errors import InputError


def main(kind: str, name: str) -> int:
    """Do the job `name` of `kind` (train, latency or notebooks); return the exit code."""
    # A kernel must be ended: that it is when this process ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stage = Path.cwd()
    _say(stage, kind, name, "")
    batch = json.loads((stage / "batch.json").read_text(encoding="ascii"))
    os.chdir(batch["folder"])
    with ExitStack() as stack:
        do = KINDS[kind](batch, stack)
        for thing in _taken(stage, batch[kind][name]):
            try:
                text = do(thing)
            except InputError as error:
                text = f"{thing} failed"
                (stage / f"{thing}.failed").touch()
                print(f"{thing}: {error}", file=sys.stderr)
            _say(stage, kind, name, text)
    return 1 if list(stage.glob("*.failed")) else 0


def _say(stage: Path, kind: str, name: str, text: str) -> None:
    with (stage / f"{kind}.{name}.said").open("a", encoding="utf-8") as file:
        file.write(f"{time.time()}\t{text}\n")


def said(stage: Path) -> list[tuple[str, float, str]]:
    """Kind of job, time and text of all that the jobs in the folder `stage` have said."""
    rows = []
    for path in sorted(stage.glob("*.said")):
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        lines = (line.split("\t") for line in whole.splitlines())
        rows += [(path.name.split(".")[0], float(at), text) for at, text in lines]
    return rows


def _taken(stage: Path, names: list[str]) -> Iterator[str]:
    """Those of `names` that no other job is at and that did not fail, in order."""
    for name in names:
        with suppress(Timeout), FileLock(stage / f"{name}.taken", timeout=0):
            if not (stage / f"{name}.failed").exists():
                yield name


# Each kind gives a function that does one thing, and returns what to say of it ("": nothing).
_Do = Callable[[str], str]


def _train(batch: dict[str, Any], _: ExitStack) -> _Do:
    from prunestudy.study.plan import plan
    from prunestudy.study.runs import Runner

    runner = Runner(_store(batch), batch["data"] or None)
    planned = plan(batch["profile"], tuple(batch["papers"]))
    settings = {item.settings.run: item.settings for item in planned}

    def train(run: str) -> str:
        done = runner.store.read(settings[run]) is not None
        return "" if done else line_of_run(runner.ensure(settings[run]))

    return train


def line_of_run(record: dict[str, Any]) -> str:
    """A run's name, status and score."""
    score = record["metrics"].get("metric")
    return f"{record['run']} {record['status']} {'' if score is None else f'{score:.4f}'}"


def _latency(batch: dict[str, Any], _: ExitStack) -> _Do:
    from prunestudy.study.plan import plan
    from prunestudy.study.session import measure_latency

    planned = plan(batch["profile"], tuple(batch["papers"]))
    return lambda _: f"{measure_latency(_store(batch), planned)} nets timed"


def _notebooks(batch: dict[str, Any], stack: ExitStack) -> _Do:
    from prunestudy.study import notebooks

    kernel, profile = stack.enter_context(notebooks.Kernel()), batch["profile"]

    def execute(paper: str) -> str:
        if notebooks.is_current(_store(batch), profile, paper):
            return ""
        return notebooks.execute(kernel, paper, profile, batch["results"], batch["data"]).name

    return execute


def _store(batch: dict[str, Any]) -> Any:
    from prunestudy.study.records import Store

    return Store(batch["profile"], batch["results"])


KINDS = {"train": _train, "latency": _latency, "notebooks": _notebooks}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
