"""Collecting: finished runs of this machine, and records of others, into the tracked files."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from prunestudy.errors import InputError
from prunestudy.papers import PROFILES, card
from prunestudy.study.lines import line_of, place, read_lines, write_bytes
from prunestudy.study.plan import plan
from prunestudy.study.records import Store


def collect(
    profile: str,
    folders: Iterable[str | Path] = (),
    results: str | Path = "",
    replace: bool = False,
) -> list[str]:
    """Merge finished runs into `records.jsonl` and `arrays/`; return a line for each one left out.

    `folders` are results of the same profile that another machine brought back: a folder with
    records.jsonl and arrays/, one that has such a folder of the profile's name, or the file itself.
    A run that is stored stays (with `replace` the newcomer takes its place), but for a latency
    that it lacks. Raises `InputError`, with nothing changed, where the two were made with
    different settings or from different data.
    """
    store = Store(profile, results or None)
    sources = [_source(profile, Path(folder)) for folder in folders]
    with store.lock("collect"):
        records = dict(read_lines(store.lines))
        origin, left = dict.fromkeys(records, store), []
        for source in (store, *sources):
            for record in _records(source):
                name = place(record)
                before = records.get(name)
                if before:
                    _require_same_run(before, record)
                if before is None or (replace and source is not store):
                    records[name], origin[name] = record, source
                elif before["metrics"] == record["metrics"]:
                    records[name] = before | {"latency": before["latency"] or record["latency"]}
                else:
                    left.append(f"{name}: is stored already, with other numbers; that stays")
        _write(store, records, origin)
    return left


def _source(profile: str, path: Path) -> Store:
    folder = path.parent if path.name == "records.jsonl" else path
    for each in (folder, folder / profile):
        if (each / "records.jsonl").is_file() or (each / "runs").is_dir():
            return Store(each.name, each.parent)
    raise InputError(f"folder = {str(path)!r}: has neither records.jsonl nor runs/")


def _records(store: Store) -> Iterator[dict[str, Any]]:
    for path in (store.lines, *sorted(store.runs.glob("*/record.json"))):
        yield from read_lines(path).values()


def _require_same_run(before: dict[str, Any], record: dict[str, Any]) -> None:
    for key, one, other in (
        ("settings", before["settings"], record["settings"]),
        ("data", before["data"]["fingerprint"], record["data"]["fingerprint"]),
    ):
        if one != other:
            raise InputError(f"record = {place(record)}: its {key} differs from the stored one's")


def _write(store: Store, records: dict[str, dict[str, Any]], origin: dict[str, Store]) -> None:
    drawn = _drawn(store.folder.name)
    packed: dict[str, dict[str, Any]] = {paper: {} for paper, _ in drawn.values()}
    for name, record in sorted(records.items()):
        paper, keys = drawn.get(record["run"], ("", ()))
        for key, array in origin[name].arrays_of(record).items() if keys else ():
            if key.partition(".")[0] in keys:
                packed[paper][f"{name}/{key}"] = array
    for paper, arrays in packed.items():
        if arrays:
            _replace(store.folder / "arrays" / f"{paper}.safetensors", save(arrays))
    text = "".join(line_of(record) + "\n" for _, record in sorted(records.items()))
    if text:
        _replace(store.lines, text.encode())


def _replace(path: Path, data: bytes) -> None:
    if not path.exists() or path.read_bytes() != data:
        write_bytes(path, data)


def _drawn(profile: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Run to its paper and the names of its arrays that the paper's notebook draws."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for item in plan(profile) if profile in PROFILES else ():
        for rule in card(item.paper).drawn:
            if rule.holds(item.settings.method, item.variant, item.settings.seed):
                paper, keys = found.get(item.settings.run, (item.paper, ()))
                found[item.settings.run] = paper, (*keys, *rule.names)
    return found
