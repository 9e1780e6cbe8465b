"""A job of the batch, in the batch's folder: `python -m prunestudy.study.worker KIND NAME`.

Local jobs share their runs or notebooks: each takes the next that no other has taken.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunestudy.errors import InputError
from prunestudy.study import notebooks
from prunestudy.study.plan import plan
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner
from prunestudy.study.session import measure_latency


def main(kind: str, name: str) -> int:
    """Do the job `name` of `kind` (train, latency or notebooks); return the exit code."""
    # A kernel must be ended: that it is when this process ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stage = Path.cwd()
    batch = json.loads((stage / "batch.json").read_text(encoding="ascii"))
    os.chdir(batch["folder"])
    with ExitStack() as stack:
        do = _doing(kind, batch, stack)
        for thing in batch[kind][name]:
            failed = stage / f"{thing}.failed"
            with suppress(Timeout), FileLock(stage / f"{thing}.taken", timeout=0):
                try:
                    if not failed.exists():
                        do(thing)
                        (stage / f"{kind}.{thing}.ready").touch()
                except InputError as error:
                    failed.touch()
                    print(f"{thing}: {error}", file=sys.stderr)
    return 1 if list(stage.glob("*.failed")) else 0


def _doing(kind: str, batch: dict[str, Any], stack: ExitStack) -> Callable[[str], object]:
    """What does one thing of a job of `kind`, unless it is done."""
    profile, data = batch["profile"], batch["data"]
    store, planned = Store(profile, batch["results"]), plan(profile, tuple(batch["papers"]))
    if kind == "train":
        runner = Runner(store, data or None)
        settings = {item.settings.run: item.settings for item in planned}
        return lambda run: runner.ensure(settings[run])
    if kind == "latency":
        return lambda _: measure_latency(store, planned)
    execute = partial(notebooks.execute, stack.enter_context(notebooks.kernel()), store, profile)
    current = partial(notebooks.is_current, store, profile)
    return lambda paper: current(paper) or execute(paper, data)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
