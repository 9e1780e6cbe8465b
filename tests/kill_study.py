"""Kill a study at random moments, finish it, and compare every record with an undisturbed one.

    python tests/kill_study.py --kills 10 --folder FOLDER

`FOLDER` gets two results folders, `calm` and `killed`. Exit code 1 if a record differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from prunestudy.study.plan import plan
from prunestudy.study.records import Store

# Seconds and memory of a process differ from one execution to the next; nothing else may.
TIMES = ("cost", "latency", "checksum")


def start(command: list[str], results: Path) -> subprocess.Popen:
    words = [*command, "--results", str(results)]
    return subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL)


def finish(command: list[str], results: Path) -> None:
    if code := start(command, results).wait():
        raise SystemExit(f"{' '.join(command)}: exit code {code}")


def kill_at_random(
    command: list[str], results: Path, kills: int, longest: float, seed: int
) -> list[float]:
    """Start `command` and kill -9 its process group, `kills` times; return the moments."""
    draw, moments = random.Random(seed), []
    for _ in range(kills):
        process, moment = start(command, results), draw.uniform(1.0, longest)
        time.sleep(moment)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            moments.append(moment)
        process.wait()
    return moments


def records(results: Path, profile: str = "quick") -> dict[str, dict]:
    """Every record below `results`, its history and arrays, without what time changes."""
    store, found = Store(profile, results), {}
    for run in store.names():
        record = {key: value for key, value in store.require(run).items() if key not in TIMES}
        arrays = {name: array.tobytes() for name, array in store.arrays(run).items()}
        found[run] = record | {"history": store.history(run), "arrays": arrays}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--longest", type=float, default=25.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experiment", default="", help="PAPER.EXPERIMENT: the runs of its seed 0")
    a = parser.parse_args()
    runs = [
        item.settings.run
        for item in plan("quick")
        if f"{item.paper}.{item.experiment}" == a.experiment and item.settings.seed == 0
    ]
    command = [
        sys.executable,
        "-m",
        "prunestudy.study.cli",
        *(["run", *runs] if runs else ["study"]),
    ]
    finish(command, a.folder / "calm")
    moments = kill_at_random(command, a.folder / "killed", a.kills, a.longest, a.seed)
    finish(command, a.folder / "killed")
    calm, killed = records(a.folder / "calm"), records(a.folder / "killed")
    different = [name for name in calm | killed if calm.get(name) != killed.get(name)]
    print(f"{len(moments)} kills at {', '.join(f'{m:.1f} s' for m in moments)}")
    print(f"{len(calm)} records, {len(different)} differ {' '.join(different)}")
    return 1 if different or not calm else 0


if __name__ == "__main__":
    sys.exit(main())
