"""A record: what is kept of one finished run, as one line of JSON with a checksum.

Its keys are `KEYS`. `history` is a list per column, `latency` None until it was measured, and
`files` has digests of the run's arrays, weights and cuts.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from prunestudy.errors import InputError, written_whole

FORMAT = 2
KEYS = frozenset(
    "run checksum format parent status settings data metrics validation history latency cost "
    "environment files".split()
)
_REPRODUCED = ("status", "data", "metrics", "validation", "history", "files")


def finite(values: Any) -> Any:
    """The same values with None for every number that JSON cannot say."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def line_of(record: dict[str, Any]) -> str:
    """The line of `record`: name and checksum of the rest first, then its keys in order."""
    rest = {key: record[key] for key in record if key not in ("run", "checksum")}
    text = json.dumps(finite(rest), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f'{{"run":"{record["run"]}","checksum":"{_checksum(record["run"], text)}",{text[1:]}'


def _checksum(run: str, rest: str) -> str:
    return hashlib.sha256(f"{run} {rest}".encode()).hexdigest()


_LINE = re.compile(r'\{"run":"([A-Za-z0-9_.-]+)","checksum":"([0-9a-f]{64})",')


def parse(line: str, path: Path, number: int = 1) -> dict[str, Any]:
    """Return the record in `line` of `path`; `InputError` if it is not as it was written."""
    start = _LINE.match(line)
    if not start:
        raise InputError(refusal(f"line {number}", "is no record", path))
    if _checksum(start[1], "{" + line[start.end() :]) != start[2]:
        raise InputError(refusal(start[1], "was edited or cut off (checksum)", path))
    record = json.loads(line)
    if record.get("format") != FORMAT or record.keys() != KEYS:
        raise InputError(refusal(start[1], f"is not of format {FORMAT}", path))
    return record


def refusal(run: str, why: str, path: Path) -> str:
    """The line that refuses a record: what is wrong with it, where it is, the way out.

    `path` is a file of many records, or a run's record.json, with which its folder goes.
    """
    where, what = (path.parent, "folder") if path.name == "record.json" else (path, "line")
    return f"record = {run}: {why} in {where}; delete that {what} to train the run again"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_bytes(data)


def called(run: str, device: str) -> str:
    """What `run` is called in a store, where it was trained on `device` ("cpu" or a CUDA one)."""
    return run if device == "cpu" else f"{run}-cuda"


def place(record: dict[str, Any]) -> str:
    """What the run of `record` is called in a store."""
    return called(record["run"], record["environment"]["device"])


def _read_once(read: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    """`read`, but {} where no file is, and called again only when the file has changed."""
    cached = lru_cache(maxsize=16)(lambda path, _: read(path))

    @wraps(read)
    def reader(path: Path) -> dict[str, Any]:
        try:
            state = path.stat()
        except FileNotFoundError:
            return {}
        return cached(path, (state.st_mtime_ns, state.st_size, state.st_ino))

    return reader


@_read_once
def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Records of the file at `path` by their place; none if it is not there.

    Raises `InputError` for a line that was edited, cut off or repeated.
    """
    records: dict[str, dict[str, Any]] = {}
    text = path.read_bytes().decode("utf-8", errors="replace")
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        record = parse(line, path, number)
        if place(record) in records:
            raise InputError(refusal(record["run"], "is there twice", path))
        records[place(record)] = record
    return records


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of the file at `path`; none if it is not there or damaged."""
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):
        return {}


read_packed = _read_once(read_arrays)


def digest(array: np.ndarray) -> str:
    """Sixteen digits of the SHA-256 of an array's type, shape and numbers."""
    head = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def digest_of(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of named arrays: that of a safetensors file would change with its metadata."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def noted(arrays: dict[str, np.ndarray], kind: str) -> Any:
    """What a record says of a file's arrays: of those for figures each, as they may be packed."""
    named = {name: digest(array) for name, array in arrays.items()}
    return named if kind == "arrays" else digest_of(arrays)


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a second training of a run did not reproduce; what only `new` has does not count."""
    return [key for key in _REPRODUCED if not _within(old[key], new[key])]


def _within(old: Any, new: Any) -> bool:
    if not isinstance(old, dict):
        return old == new
    return all(key in new and _within(old[key], new[key]) for key in old)
