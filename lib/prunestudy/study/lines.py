"""A record: what is kept of one finished run, as one line of JSON with a checksum.

`history` is a list per column, `latency` None until it was measured, and `files` has digests of
the run's arrays and weights. `right`, of newer records of classifiers, has a bit for each test
image, in the data set's order: whether the net was right.
"""

import base64
import gc
import hashlib
import json
import re
import stat
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from prunestudy.errors import InputError, require, written_whole

Record = dict[str, Any]
FORMAT = 2
CUDA = "-cuda"
_START = re.compile(r'\{"run":"([A-Za-z0-9_.-]+)","checksum":"([0-9a-f]{64})",')
_REPRODUCED = ("status", "data", "metrics", "validation", "history", "files")


def place(record: Record) -> str:
    """The name that `record` is filed under: its run's, with `-cuda` if it was trained there."""
    return record["run"] + ("" if record["environment"]["device"] == "cpu" else CUDA)


def line_of(record: Record) -> str:
    """The line of `record`: its name, the checksum of the rest, then its keys in order."""
    rest = json.dumps({key: record[key] for key in record if key not in ("run", "checksum")})
    rest = json.loads(rest, parse_constant=lambda _: None)  # for numbers that are not finite
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return f'{{"run":"{record["run"]}","checksum":"{_checksum(record["run"], text)}",{text[1:]}'


def _checksum(run: str, rest: str) -> str:
    return hashlib.sha256(f"{run} {rest}".encode()).hexdigest()


def parse(line: str, path: Path, number: int = 1) -> Record:
    """Return the record in `line` of `path`; `InputError` if it is not as it was written."""
    start = _START.match(line)
    if not start:
        raise refusal(f"line {number}", "is no record", path)
    if _checksum(start[1], "{" + line[start.end() :]) != start[2]:
        raise refusal(start[1], "was edited or cut off (checksum)", path)
    record = json.loads(line)
    if record.get("format") != FORMAT:
        raise refusal(start[1], f"is not of format {FORMAT}", path)
    if not _is_whole(record):
        raise refusal(start[1], "is of another version", path)
    return record


def _is_whole(record: Record) -> bool:
    """Whether `record` has all that its readers take for granted."""
    match record:
        case {
            "status": str(),
            "settings": {"dataset": str(), "evaluate": str()},
            "data": {"fingerprint": str()},
            "metrics": dict(),
            "validation": dict(),
            "history": dict(history),
            "latency": None | {"ms": dict()},
            "cost": dict(),
            "environment": {"device": str(), "commit": str(), "torch": str()},
            "files": {"arrays": dict(), "weights": str()},
        }:
            columns = history.values()
            return all(isinstance(each, list) for each in columns) and len({*map(len, columns)}) < 2
    return False


def refusal(run: str, why: str, path: Path) -> InputError:
    """The error for a bad record in `path`: a file of many, or the record.json of a run."""
    where, what = (path.parent, "folder") if path.name == "record.json" else (path, "line")
    return InputError(
        f"record = {run}: {why} in {where}; delete that {what} to train the run again"
    )


def text_of(path: Path) -> str | None:
    """The text of the file at `path`; None if there is none, `InputError` for a pipe or folder."""
    try:
        right = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return None
    require(right, "file", str(path), "a regular file")
    return path.read_bytes().decode("utf-8", errors="replace")


def read_lines(path: Path) -> dict[str, Record]:
    """Records of the file at `path`, if there, by place; `InputError` for one not as written."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return {}
    return _read_lines(path, (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=16)
def _read_lines(path: Path, _state: tuple[int, ...]) -> dict[str, Record]:
    records: dict[str, Record] = {}
    text = text_of(path)
    collects = gc.isenabled()
    gc.disable()  # it would look at all that is read so far again and again, half of the time
    try:
        for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
            record = parse(line, path, number)
            if records.setdefault(place(record), record) is not record:
                raise refusal(record["run"], "is there twice", path)
    finally:
        if collects:
            gc.enable()
    return records


def bits_of(right: np.ndarray) -> str:
    """The text that a record has for `right`, a truth value for each test image."""
    return base64.b64encode(zlib.compress(np.packbits(right).tobytes(), 9)).decode()


def right_of(record: Record) -> np.ndarray | None:
    """Whether the net of `record` was right, for each test image; None if it is not noted."""
    if not record.get("right"):
        return None
    packed = np.frombuffer(zlib.decompress(base64.b64decode(record["right"])), dtype=np.uint8)
    return np.unpackbits(packed, count=record["metrics"]["images"]).astype(bool)


def changed(old: Record, new: Record) -> list[str]:
    """What a second training of a run did not reproduce, of what both records have."""
    return [key for key in _REPRODUCED if not _agree(old[key], new[key])]


def _agree(old: Any, new: Any) -> bool:
    if not isinstance(old, dict):
        return old == new
    return all(_agree(old[key], new[key]) for key in old.keys() & new.keys())


def read_arrays(path: Path, begin: str = "") -> dict[str, np.ndarray]:
    """Arrays at `path` by the rest of names with `begin`; {} of a missing or damaged file."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(begin)]  # noqa: SIM118
            return {name.removeprefix(begin): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, TypeError):  # numpy has no bfloat16
        return {}


def digest(array: np.ndarray) -> str:
    """Sixteen digits of the SHA-256 of an array's type, shape and numbers."""
    head = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()[:16]


def noted(arrays: dict[str, np.ndarray], kind: str) -> Any:
    """What a record notes of the file `kind`: a digest of each of "arrays", else one of all."""
    if kind == "arrays":
        return {name: digest(array) for name, array in arrays.items()}
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")
