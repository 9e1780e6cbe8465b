"""What a job of the batch does, in the batch's folder: `python -m prunestudy.study.worker`.

Several jobs may share their runs or notebooks: each takes the next that no other has taken. What
is done is said in NAME.said, a line of time and text, which the command `study` passes on.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunestudy.errors import InputError


def main(kind: str, name: str) -> int:
    """Do the job `name` of `kind` (train, latency or notebooks); return the exit code."""
    # A kernel must be ended: that it is when this process ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stage = Path.cwd()
    log = stage / f"{kind}.{name}.said"
    _say(log, "")
    batch = json.loads((stage / "batch.json").read_text(encoding="ascii"))
    os.chdir(batch["folder"])
    for thing, error in KINDS[kind](batch, name, stage):
        _say(log, f"{thing} failed" if error else thing)
        if error:
            (stage / f"{thing}.failed").touch()
            print(f"{thing}: {error}", file=sys.stderr)
    return 1 if list(stage.glob("*.failed")) else 0


def _say(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{time.time()}\t{text}\n")


Done = Iterator[tuple[str, InputError | None]]


def _train(batch: dict[str, Any], name: str, stage: Path) -> Done:
    from prunestudy.study.plan import plan
    from prunestudy.study.runs import Runner

    store = _store(batch)
    runner = Runner(store, batch["data"] or None)
    planned = plan(batch["profile"], tuple(batch["papers"]))
    settings = {item.settings.run: item.settings for item in planned}
    for run in _taken(stage, batch["train"][name]["runs"]):
        if store.read(settings[run]) is not None:
            continue
        try:
            record = runner.ensure(settings[run])
        except InputError as error:
            yield run, error
        else:
            score = record["metrics"].get("metric")
            yield f"{run} {record['status']} {'' if score is None else f'{score:.4f}'}", None


def _latency(batch: dict[str, Any], _name: str, _stage: Path) -> Done:
    from prunestudy.study.plan import plan
    from prunestudy.study.session import measure_latency

    number = measure_latency(_store(batch), plan(batch["profile"], tuple(batch["papers"])))
    yield f"{number} nets timed", None


def _notebooks(batch: dict[str, Any], name: str, stage: Path) -> Done:
    from prunestudy.study import notebooks

    with notebooks.Kernel() as kernel:
        for paper in _taken(stage, batch["notebooks"][name]):
            if notebooks.is_current(_store(batch), batch["profile"], paper):
                continue
            try:
                where = batch["results"], batch["data"]
                path = notebooks.execute(paper, batch["profile"], *where, kernel=kernel)
                yield path.name, None
            except InputError as error:
                yield paper, error


def _store(batch: dict[str, Any]) -> Any:
    from prunestudy.study.records import Store

    return Store(batch["profile"], batch["results"])


KINDS = {"train": _train, "latency": _latency, "notebooks": _notebooks}


def _taken(stage: Path, names: list[str]) -> Iterator[str]:
    """Those of `names` that no other job of the batch is at and that did not fail, in order."""
    for name in names:
        with suppress(Timeout), FileLock(stage / f"{name}.taken", timeout=0):
            if not (stage / f"{name}.failed").exists():
                yield name


class Progress:
    """What the jobs of the batch in the folder `stage` say, while they run."""

    def __init__(self, stage: Path) -> None:
        self.stage, self._lines, self._done = stage, {}, 0
        batch = json.loads((stage / "batch.json").read_text(encoding="ascii"))
        self._total = len({run for job in batch["train"].values() for run in job["runs"]})

    def show(self) -> None:
        """Print on stderr what is new, a line per finished run and notebook."""
        for path in sorted(self.stage.glob("*.said")):
            kind, before = path.name.split(".")[0], self._lines.get(path, [])
            text = path.read_text(encoding="utf-8")
            lines = [line.split("\t") for line in text.splitlines(keepends=True) if "\n" in line]
            self._lines[path] = lines
            for _, line in lines[len(before) :]:
                if line.strip():
                    self._done += kind == "train"
                    number = f" {self._done}/{self._total}" if kind == "train" else ""
                    print(f"{kind}{number} {line.strip()}", file=sys.stderr, flush=True)

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, from the start of its first job to the end of its last."""
        times: dict[str, list[float]] = {}
        for path, lines in self._lines.items():
            times.setdefault(path.name.split(".")[0], []).extend(float(at) for at, _ in lines)
        return {kind: max(times[kind]) - min(times[kind]) for kind in KINDS if kind in times}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
