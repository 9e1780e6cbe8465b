"""What the study itself costs: the start of a command, tables of many records."""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial

from common import Row, compare, main
from prunestudy.measure import Ratio
from prunestudy.study import tables
from prunestudy.study.plan import Planned, plan
from prunestudy.study.records import FORMAT, Store, canonical, checksum, write_text


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
    """Write `count` records that differ by their seed into `store`."""
    first = next(p for p in plan("quick") if p.settings.target)
    made = []
    for seed in range(count):
        settings = first.settings.model_copy(update={"seed": seed, "parent": None})
        record = {
            "format": FORMAT,
            "run": settings.run,
            "parent": None,
            "status": "done",
            "settings": settings.model_dump(mode="json"),
            "metrics": {"metric_name": "top1", "metric": 0.9 + 1e-6 * seed, "sparsity": 0.9},
            "cost": {"train_seconds": 1.0},
        }
        record["metrics"] |= {"nonzeros": 1000}
        record = json.loads(canonical(record))
        record["checksum"] = checksum(record)
        write_text(store.path(settings.run) / "record.json", canonical(record))
        made.append(Planned(first.paper, first.experiment, first.purpose, "", settings))
    return made


ROWS: dict[str, Row] = {
    "The start of a command / importing torch": start,
    "Both tables from 10,000 records": many_records,
}

if __name__ == "__main__":
    main(ROWS)
