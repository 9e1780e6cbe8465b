"""A record: what is kept of one finished run, as one line of JSON with a checksum.

Keys are run, status, parent, settings, data, metrics, validation, history (a list per column),
latency (None until it was measured), cost, environment, files (digests of its arrays and weights).
"""

import hashlib
import json
import math
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from prunestudy.errors import InputError

FORMAT = 2


def finite(values: Any) -> Any:
    """The same values with None for every number that JSON cannot say."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def line_of(record: dict[str, Any]) -> str:
    """The line of `record`: name and checksum of the rest first, then its keys in order."""
    rest = {key: record[key] for key in sorted(record) if key not in ("run", "checksum")}
    text = json.dumps(finite(rest), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f'{{"run":"{record["run"]}","checksum":"{_checksum(record["run"], text)}",{text[1:]}'


def _checksum(run: str, rest: str) -> str:
    return hashlib.sha256(f"{run} {rest}".encode()).hexdigest()


_LINE = re.compile(r'\{"run":"([A-Za-z0-9_.-]+)","checksum":"([0-9a-f]{64})",')


def parse(line: str, path: Path, number: int = 1) -> dict[str, Any]:
    """Return the record in `line` of `path`; `InputError` if it is not as it was written."""
    start = _LINE.match(line)
    name = start[1] if start else f"line {number}"
    if not start or _checksum(start[1], "{" + line[start.end() :]) != start[2]:
        why = "was edited or cut off (checksum)" if start else "is no record"
        raise InputError(refusal(name, why, path))
    record = json.loads(line)
    if record.get("format") != FORMAT:
        raise InputError(refusal(name, f"is not of format {FORMAT}", path))
    return record


def refusal(run: str, why: str, path: Path) -> str:
    """The line that refuses a record: what is wrong with it, where it is, the way out."""
    way = "delete its line" if path.suffix == ".jsonl" else "delete that folder"
    return f"record = {run}: {why} in {path}; {way} to train it again"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def place(record: dict[str, Any]) -> str:
    """What `record` is called in the store: its run, and the device unless that is the CPU."""
    on_cpu = record["environment"]["device"] == "cpu"
    return record["run"] if on_cpu else f"{record['run']}-cuda"


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Records of the file at `path` by place; none if it is not there.

    Raises `InputError` for a line that was edited, cut off or repeated. Read once while the file
    stays the same.
    """
    try:
        state = path.stat()
    except FileNotFoundError:
        return {}
    return _lines(path, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(maxsize=8)
def _lines(path: Path, *_state: int) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    text = path.read_bytes().decode("utf-8", errors="replace")
    for number, line in enumerate(text.split("\n")[: None if text[-1:] != "\n" else -1], 1):
        record = parse(line, path, number)
        if place(record) in records:
            raise InputError(refusal(record["run"], "is there twice", path))
        records[place(record)] = record
    return records


def digest(array: np.ndarray) -> str:
    """Sixteen digits of the SHA-256 of an array's type, shape and numbers."""
    head = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def content(path: Path) -> str:
    """SHA-256 of the tensors in `path`: the order of a safetensors file's metadata is random."""
    total = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
