"""What the study itself costs: the start of a command, tables of many records."""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

from common import Ratio, Row, compare, main
from prunestudy.study import tables
from prunestudy.study.lines import line_of, write_text
from prunestudy.study.plan import Planned, plan
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner


def start(seconds: float) -> Ratio:
    """From the shell to the list of planned runs, over importing torch alone."""
    run = partial(subprocess.run, check=True, capture_output=True)
    both = {
        "command": partial(run, [sys.executable, "-m", "prunestudy.study.cli", "list"]),
        "torch": partial(run, [sys.executable, "-c", "import torch"]),
    }
    return compare(both, "command", "torch", seconds)


def many_records(seconds: float) -> str:
    """Seconds for both tables from 10,000 records, 500 for a look."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store("quick", folder)
        planned = _records(store, 10_000 if seconds else 500)
        started = time.perf_counter()
        tables.write(store, planned)
        return f"{time.perf_counter() - started:.1f} s for {len(planned):,}"


def _records(store: Store, count: int) -> list[Planned]:
    """Put a run of the quick profile, trained now, into `store` under `count` seeds."""
    item = next(each for each in plan("quick") if each.settings.target)
    record, lines, planned = Runner(store, device="cpu").ensure(item.settings), [], []
    for seed in range(count):
        settings = item.settings.model_copy(update={"seed": seed})
        same = {"run": settings.run, "settings": settings.kept()}
        lines.append(line_of(record | same))
        planned.append(replace(item, settings=settings))
    write_text(store.collected, "\n".join([*lines, ""]))
    return planned


ROWS: dict[str, Row] = {
    "The start of a command / importing torch": start,
    "Both tables from 10,000 records": many_records,
}

if __name__ == "__main__":
    main(ROWS)
