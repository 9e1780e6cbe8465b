"""The study on one device, in one process and so many minutes: several runs at a time.

It needs no Snakemake, papermill or virtual environment, which a borrowed machine has not. Runs go
net by net and seed by seed, the papers in turns, so that what is done by any minute is a study.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prunestudy import datasets, methods
from prunestudy.errors import first_line, require
from prunestudy.methods.search import Search
from prunestudy.study import tables
from prunestudy.study.batch import line_of_run
from prunestudy.study.collect import collect
from prunestudy.study.lines import write_text
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner
from prunestudy.study.settings import RunSettings
from prunestudy.train import Steps, gang


def study(
    store: Store, planned: list[Planned], data: str, minutes: float, size: int, kind: str = "cuda"
) -> Iterator[str]:
    """Train what is missing on a device of `kind`, collect it, write gpu.md; yield a log."""
    require(minutes > 0, "minutes", minutes, "above 0")
    require(1 <= size <= 64, "gang", size, "1 to 64 runs at a time")
    runner, planned = Runner(store, data, kind), here(planned, data)
    run(runner, planned, minutes, size)
    yield from collect(store.folder.name, results=store.folder.parent)
    yield from page(runner.store, planned)


def page(store: Store, planned: list[Planned]) -> Iterator[str]:
    """Write gpu.md, a summary of the records of `planned` in `store`; yield a log."""
    settings, path = {i.settings.run: i.settings for i in planned}, store.folder / "gpu.md"
    made = [record for each in settings.values() if (record := store.read(each))]
    # Of the copies of CIFAR-10 those count that have records, if any has.
    found = {record["settings"]["dataset"] for record in made}
    planned = [item for item in planned if not made or item.settings.dataset in found]
    done = f"{len(made)} of {len({item.settings.run for item in planned})} runs are done"
    where = {(r["environment"]["device"], r["environment"]["torch"]) for r in made}
    where = "".join(f"{device}, torch {version}. " for device, version in sorted(where))
    text = f"# CIFAR-10 on one GPU\n\n{where}{done}. Settings are those of the searches on the CPU;"
    text += " none was made on a GPU.\n\n"
    shown = tables.by_share(tables.build(store, planned)[1]) if made else ()
    text += tables.markdown(shown) if len(shown) else ""
    write_text(path, text)
    yield done
    yield str(path)


def here(planned: list[Planned], data: str) -> list[Planned]:
    """Those of `planned` on the copy of CIFAR-10 that is there: the original, else the JPEG one."""
    root = datasets.data_root(data)
    copied = (root / "cifar10-jpeg").is_dir() and not (root / "cifar-10-batches-py").is_dir()
    other = "cifar10" if copied else "cifar10_jpeg"
    return [item for item in planned if item.settings.dataset != other]


def in_order(planned: list[Planned]) -> list[RunSettings]:
    """The runs of `planned`, each once: by net and seed, then in turns through the papers."""
    nets = list(dict.fromkeys(item.settings.model for item in planned))
    counts: Counter[Any] = Counter()
    places: dict[str, tuple[int, int, bool, int]] = {}
    for item in planned:
        settings, net = item.settings, nets.index(item.settings.model)
        counts[item.paper, net, settings.seed] += 1
        # A search before the training holds up all others: behind those of its seed.
        searches = issubclass(methods.method_class(settings.method), Search)
        place = net, settings.seed, searches, counts[item.paper, net, settings.seed]
        places[settings.run] = min(place, places.get(settings.run, place))
    runs = {item.settings.run: item.settings for item in planned}
    return [runs[name] for name in sorted(runs, key=places.get)]


def run(runner: Runner, planned: list[Planned], minutes: float, size: int) -> int:
    """Train what is missing of `planned`, `size` runs at a time; how many runs are still missing.

    After so many `minutes` what is under way is saved, and the next call goes on from there. A line
    for each finished run, and for one that cannot be made, goes to stderr.
    """
    end, order = time.monotonic() + 60 * minutes, in_order(planned)
    parents = {each.parent.run for each in order if each.parent}
    todo = [s for s in order if not runner.done(s, weights=s.run in parents)]
    finished = {each.run for each in order} - {each.run for each in todo}
    for name in sorted({each.dataset for each in todo}):
        runner.load(name)

    def begun() -> Iterator[Steps[Any] | None]:
        """The trainings, each once its parent is finished; None where all must wait."""
        while todo and time.monotonic() < end:
            ready = next((s for s in todo if not s.parent or s.parent.run in finished), None)
            if ready:
                todo.remove(ready)
            yield ready and _until(end, ready.run, runner.training(ready, ready.run in parents))

    for record in gang(begun(), size):
        if record:
            finished.add(record["run"])
            _say(f"{len(finished)}/{len(order)} {line_of_run(record)}")
    return len(order) - len(finished)


def _until(end: float, run: str, training: Steps[Any]) -> Steps[Any]:
    """`training`, closed when time is up; its record, None without one."""
    try:
        while time.monotonic() < end:
            yield next(training)
    except StopIteration as made:
        return made.value
    except Exception as error:  # the other runs go on
        _say(f"{run}: {first_line(error)}")
    finally:
        training.close()
    return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
