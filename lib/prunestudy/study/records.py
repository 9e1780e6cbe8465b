"""Records: one folder per finished run, written whole, checked when read.

results/<profile>/records/<run>/record.json          settings, metrics, versions, checksum
                                history.csv          one row per epoch
                                arrays.safetensors   what figures need, at most 1 MB
                                weights.safetensors  the finished net, not tracked
                                cuts.safetensors     when each weight was cut, where the method
                                                     says so; not tracked, as large as the net
                                latency.json         measured later, alone on the machine
results/<profile>/work/<run>/   checkpoint of an unfinished run, and locks
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from pydantic import ValidationError
from safetensors.numpy import load, load_file, save

from prunestudy.errors import InputError
from prunestudy.places import home as repository
from prunestudy.study.settings import RunSettings

FORMAT = 1
MAX_ARRAY_BYTES = 1_000_000
# What differs from one execution of the same run to the next.
TIMES = "cost"


def canonical(values: Any) -> str:
    """JSON text of `values` that is the same for equal values; NaN becomes null."""
    return json.dumps(_finite(values), sort_keys=True, indent=1, allow_nan=False) + "\n"


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def checksum(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its own checksum."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(canonical(rest).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Store:
    """The records of one profile."""

    def __init__(self, profile: str, root: Path | str | None = None) -> None:
        self.folder = Path(root or repository() / "results") / profile
        self.records = self.folder / "records"

    def path(self, run: str) -> Path:
        """Folder of the finished run `run`."""
        return self.records / run

    def work(self, run: str) -> Path:
        """Folder of the unfinished run `run`."""
        return self.folder / "work" / run

    def weights(self, run: str) -> Path:
        """File of the finished net of `run`."""
        return self.path(run) / "weights.safetensors"

    def cuts(self, run: str) -> Path:
        """File of what became of each single weight in `run`, where its method tells."""
        return self.path(run) / "cuts.safetensors"

    def require_weights(self, run: str) -> None:
        """Raise `InputError` unless the net on disk is the one of the run's record."""
        noted = self.require(run)["files"]["weights.safetensors"]
        if _content(self.weights(run)) != noted:
            raise InputError(f"weights = {run}: not those of its record; delete them")

    def names(self) -> list[str]:
        """Names of the finished runs, sorted."""
        return sorted(path.parent.name for path in self.records.glob("*/record.json"))

    @contextlib.contextmanager
    def lock(self, run: str) -> Iterator[None]:
        """Hold run `run`: two processes that ask for it train it once."""
        locks = self.folder / "work" / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{run}.lock"):
            yield

    def read(self, settings: RunSettings) -> dict[str, Any] | None:
        """Return the record of `settings`, or None if that run is not done.

        Raises `InputError` for a record that is corrupt, edited or of other settings.
        """
        record = self.load(settings.run)
        if record is None:
            return None
        try:
            found = _settings(record)
        except (ValidationError, KeyError, InputError):
            found = None
        if found != settings:
            raise InputError(_refusal(settings.run, "was made with other settings"))
        return record

    def load(self, run: str) -> dict[str, Any] | None:
        """Return the record of the run named `run`, its checksum verified, or None."""
        path = self.path(run) / "record.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise InputError(_refusal(run, "is not valid JSON")) from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise InputError(_refusal(run, f"is not of format {FORMAT}"))
        if record.get("checksum") != checksum(record):
            raise InputError(_refusal(run, "was edited or damaged (checksum)"))
        return record

    def require(self, run: str) -> dict[str, Any]:
        """Return the record of the run named `run` as `load` does; `InputError` if it has none."""
        record = self.load(run)
        if record is None:
            raise InputError(f"run = {run}: has no record in {self.folder.name}")
        return record

    def read_all(self, settings: RunSettings) -> list[dict[str, Any]]:
        """Return the records of `settings`, one per device that it was trained on."""
        record = self.read(settings)
        return [record] if record else []

    def latency(self, run: str) -> dict[str, float]:
        """Milliseconds of the run's net and of the dense one, {} while it was not timed."""
        path = self.path(run) / "latency.json"
        return json.loads(path.read_text(encoding="utf-8"))["ms"] if path.exists() else {}

    def shown(self, run: str) -> str:
        """The record of `run` and its history, a line per epoch; raises `InputError` if missing."""
        record = self.require(run)
        lines = [
            " ".join(f"{key}={value}" for key, value in row.items() if value != "")
            for row in self.history(run)
        ]
        return canonical(record) + "".join(f"{line}\n" for line in lines)

    def history(self, run: str) -> list[dict[str, Any]]:
        """Rows of the run's history, numbers as floats; raises `InputError` if it was changed."""
        rows = csv.DictReader(io.StringIO(self._verified(run, "history.csv").decode()))
        return [{key: _number(text) for key, text in row.items()} for row in rows]

    def arrays(self, run: str) -> dict[str, np.ndarray]:
        """Arrays that the run left for figures; raises `InputError` if they were changed."""
        return load(self._verified(run, "arrays.safetensors"))

    def _verified(self, run: str, name: str) -> bytes:
        """File `name` of the finished `run`, its SHA-256 compared with the record's."""
        noted = self.require(run)["files"][name]
        try:
            data = (self.path(run) / name).read_bytes()
        except FileNotFoundError:
            raise InputError(_refusal(run, f"its {name} is missing")) from None
        if _sha256(data) != noted:
            raise InputError(_refusal(run, f"its {name} was edited or damaged (checksum)"))
        return data

    def write(
        self,
        record: dict[str, Any],
        history: list[dict[str, Any]],
        arrays: dict[str, np.ndarray],
        weights: Path,
        cuts: dict[str, np.ndarray] | None = None,
    ) -> dict[str, Any]:
        """Write a finished run's folder under a temporary name, then rename it; return the record.

        `weights` is the file of the finished net, moved in; `cuts` what the method knows of single
        weights. A run that has a record already (its weights were lost) must have come out the
        same; then only these two are put back.
        """
        run = record["run"]
        payload = save({key: np.ascontiguousarray(a) for key, a in arrays.items()})
        if len(payload) > MAX_ARRAY_BYTES:
            raise RuntimeError(f"arrays of {run}: {len(payload)} bytes, above {MAX_ARRAY_BYTES}")
        text = _csv(history)
        record["files"] = {
            "history.csv": _sha256(text.encode()),
            "arrays.safetensors": _sha256(payload),
            "weights.safetensors": _content(weights),
        }
        record = json.loads(canonical(record))
        record["checksum"] = checksum(record)
        before = self.load(run)
        if before is not None:
            _same(before, record)
            if cuts:
                self.cuts(run).write_bytes(save(cuts))
            weights.replace(self.weights(run))
            return before
        temporary = self.work(run) / "finished"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "history.csv").write_text(text, encoding="utf-8")
        (temporary / "arrays.safetensors").write_bytes(payload)
        if cuts:
            (temporary / "cuts.safetensors").write_bytes(save(cuts))
        weights.replace(temporary / "weights.safetensors")
        (temporary / "record.json").write_text(canonical(record), encoding="utf-8")
        self.records.mkdir(parents=True, exist_ok=True)
        # Left by a record that somebody deleted: without record.json the run is not done.
        shutil.rmtree(self.path(run), ignore_errors=True)
        temporary.rename(self.path(run))
        return record


def _settings(record: dict[str, Any]) -> RunSettings:
    return RunSettings.model_validate_json(json.dumps(record["settings"])).filled()


def _same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Refuse `after` unless it has all that `before` has; newer code may write more."""
    same = {
        key: all(after[key].get(name) == value for name, value in before[key].items())
        for key in ("data", "metrics", "validation", "files")
    }
    same["status"] = before["status"] == after["status"]
    same["settings"] = _settings(before) == _settings(after)
    for key, right in same.items():
        if not right:
            raise InputError(
                f"record = {before['run']}: trained again for its missing weights, it did not"
                f" reproduce its {key}; delete its folder to accept the new one"
            )


def _refusal(run: str, why: str) -> str:
    return f"record = {run}: {why}; delete its folder to train it again"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _content(path: Path) -> str:
    """SHA-256 of the tensors in `path`: the order of a safetensors file's metadata is random."""
    digest = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _csv(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
