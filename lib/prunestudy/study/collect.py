"""Collecting: finished runs of this machine, and records of others, into the tracked files."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from prunestudy.errors import InputError, path_of, require_one_of, written_whole
from prunestudy.papers import PROFILES
from prunestudy.study.lines import changed, line_of, read_lines
from prunestudy.study.plan import plan
from prunestudy.study.records import Store


def collect(
    profile: str,
    folders: Iterable[str | Path] = (),
    results: str | Path = "",
    replace: bool = False,
) -> list[str]:
    """Merge finished runs into `records.jsonl` and `arrays/`; return a line per run left out.

    `folders` are results of the same profile that another machine brought back: a folder with
    records.jsonl and arrays/, or one that has such a folder of the profile's name. A stored record
    stays, though it may gain a missing latency; with `replace` the newcomer takes its place (one of
    `folders` if there are any, else one trained here). Raises `InputError`, with nothing changed,
    where the two were made with different settings or from different data. Of a run that a search
    made, what it left in each layer and group is not kept.
    """
    require_one_of("profile", profile, (*PROFILES, "custom"))
    store, drawn = Store(profile, results), drawn_arrays(profile)
    sources = [_source(profile, path_of(folder, "folder")) for folder in folders]
    store.here()  # refused before anything is written, if it cannot be read
    with store.lock("collect"):
        news = [(store, name, store.trained(name)) for name in store.here()]
        news += [(source, name, source.at(name)) for source in sources for name in source.places()]
        records, left = dict(read_lines(store.collected)), []
        for source, name, record in news:
            if record is None:  # it is being trained again at this moment
                continue
            if drawn and record["run"] not in drawn:
                left.append(f"{name}: is not planned in {profile}")
                continue
            before = records.setdefault(name, record)
            source.require_same(record, before["settings"], before["data"]["fingerprint"])
            if not changed(before, record):
                records[name] = before | {"latency": before["latency"] or record["latency"]}
            elif replace and (source is not store or not sources):
                records[name] = record
            else:
                left.append(f"{name}: is stored already with other numbers; that record is kept")
        packed, lost = _pack(records, [store, *sources], drawn)
        text = "".join(line_of(_lean(record)) + "\n" for _, record in sorted(records.items()))
        for paper, arrays in packed.items():
            _write(store.folder / "arrays" / f"{paper}.safetensors", save(arrays))
        _write(store.collected, text.encode())
    return left + lost


def _source(profile: str, path: Path) -> Store:
    """The store whose folder is `path`, or that of the profile in it."""
    for folder in (path, path / profile):
        if (folder / "records.jsonl").is_file() or (folder / "runs").is_dir():
            return Store(folder.name, folder.parent)
    raise InputError(f"folder = {str(path)!r}: has neither records.jsonl nor runs/")


def _lean(record: dict[str, Any]) -> dict[str, Any]:
    """The record, of a search without what its net has left in each layer and group."""
    if record["settings"]["evaluate"] == "test":
        return record
    details, found = ("layers", "groups", "report"), record["metrics"].items()
    return record | {"metrics": {name: each for name, each in found if name not in details}}


def _write(path: Path, data: bytes) -> None:
    """Write `data` unless it is empty or already there."""
    if data and not (path.exists() and path.read_bytes() == data):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            part.write_bytes(data)


# What the notebooks draw, by the beginnings of the arrays' names: of runs of the first seed with
# the methods' own settings, some of the paper's method alone; the energy of layers of all runs.
_DRAWN = {
    "sparse_gates": ("kept",),
    "force": ("angles",),
    "gdp": ("final_gates",),
    "magnitude_attention": ("trail_step", "trail_size", "trail_cut", "trail_ret"),
    "component_aware": ("shown", "output"),
}
_OF_OURS = ("gate_", "cost_path", "attention")
_OF_ALL = ("energy_before",)
_Drawn = dict[str, tuple[str, tuple[str, ...]]]


def drawn_arrays(profile: str) -> _Drawn:
    """Planned run to the paper that draws it, and the beginnings of the names of its arrays."""
    drawn: _Drawn = {}
    for item in plan(profile) if profile in PROFILES else ():
        paper, names = drawn.get(item.settings.run, (item.paper, _OF_ALL))
        if item.first and not item.variant:
            names += _DRAWN.get(item.paper, ())
            names += _OF_OURS if item.settings.method == item.paper else ()
        drawn[item.settings.run] = paper, names
    return drawn


def _pack(
    records: dict[str, dict[str, Any]], stores: list[Store], drawn: _Drawn
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Arrays to keep, by paper, and a line for each run that no store has whole arrays of."""
    packed: dict[str, dict[str, Any]] = {}
    lost = []
    for name, record in sorted(records.items()):
        paper, names = drawn.get(record["run"], ("", ()))
        keys = [key for key in record["files"]["arrays"] if key.startswith(names)]
        for store in stores if keys else ():
            with contextlib.suppress(InputError):
                arrays = store.arrays_of(record)
                if arrays.keys() >= set(keys):
                    packed.setdefault(paper, {}).update({f"{name}/{k}": arrays[k] for k in keys})
                    break
        else:
            lost += [f"{name}: its arrays are missing or damaged"] if keys else []
    return packed, lost
