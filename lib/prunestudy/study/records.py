"""Records: what is kept of every finished run, checked whenever it is read.

results/<profile>/records.jsonl              one line per run and device, sorted: settings, data,
                                             metrics, history, latency, cost, environment
                  arrays/<paper>.safetensors what the notebooks draw, as RUN/NAME
                  runs/<run>/record.json     the same line for a run that was trained here
                             arrays.safetensors, weights.safetensors
                             cuts.safetensors  when each weight was cut, where the method says so
                  work/<run>/                checkpoint of an unfinished run, and locks

The first two are tracked and written by `prunestudy collect`; the rest stays on the machine.
A run on CUDA has `-cuda` behind its name wherever a file or a line is called by it.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save

from prunestudy import datasets
from prunestudy.errors import InputError
from prunestudy.places import home as repository
from prunestudy.study.lines import (
    content,
    digest,
    line_of,
    parse,
    place,
    read_lines,
    refusal,
    write_text,
)
from prunestudy.study.settings import RunSettings

MAX_ARRAY_BYTES = 1_000_000
# What a second training of the same run on the same machine must reproduce.
_REPRODUCED = ("status", "data", "metrics", "validation", "history", "files")


class Store:
    """The records of one profile, of `device` ("cpu" or "cuda") or of any."""

    def __init__(self, profile: str, root: Path | str | None = None, device: str = "") -> None:
        self.folder = Path(root or repository() / "results") / profile
        self.runs = self.folder / "runs"
        self.lines = self.folder / "records.jsonl"
        self.device = device

    def path(self, run: str) -> Path:
        """Folder of `run` once it was trained here."""
        return self.runs / (f"{run}-cuda" if self.device == "cuda" else run)

    def work(self, run: str) -> Path:
        """Folder of the unfinished run `run`."""
        return self.folder / "work" / self.path(run).name

    def weights(self, run: str) -> Path:
        """File of the finished net of `run`."""
        return self.path(run) / "weights.safetensors"

    def cuts(self, run: str) -> Path:
        """File of what became of each single weight in `run`, where its method tells."""
        return self.path(run) / "cuts.safetensors"

    def require_weights(self, run: str) -> None:
        """Raise `InputError` unless the net of `run` on disk is the one that it was left with."""
        trained = self.trained(run)
        if trained is None or not _has_weights(self.weights(run), trained):
            raise InputError(
                f"weights = {run}: not there, or not those of its record, in {self.weights(run)};"
                " `prunestudy run RUN --weights` trains the run again"
            )

    def has_all(self, run: str) -> bool:
        """Whether all files that training `run` leaves are here, and unharmed."""
        trained = self.trained(run)
        if trained is None or not _has_weights(self.weights(run), trained):
            return False
        try:
            arrays = load_file(self.path(run) / "arrays.safetensors")
        except (OSError, SafetensorError):
            return False
        return {name: digest(array) for name, array in arrays.items()} == trained["files"]["arrays"]

    @contextlib.contextmanager
    def lock(self, run: str) -> Iterator[None]:
        """Hold run `run`: two processes that ask for it train it once."""
        locks = self.folder / "work" / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{run}.lock"):
            yield

    def names(self) -> list[str]:
        """Names of the finished runs."""
        folders = {path.parent.name for path in self.runs.glob("*/record.json")}
        return sorted({name.removesuffix("-cuda") for name in {*read_lines(self.lines), *folders}})

    def devices(self) -> set[str]:
        """Kinds of device, "cpu" or "cuda", that the finished runs were trained on."""
        names = {*read_lines(self.lines), *(p.parent.name for p in self.runs.glob("*/record.json"))}
        return {"cuda" if name.endswith("-cuda") else "cpu" for name in names}

    def read(self, settings: RunSettings) -> dict[str, Any] | None:
        """Return the record of `settings`, or None if that run is not done.

        Raises `InputError` for a record that was edited, or made with other settings or data.
        """
        record = self.load(settings.run)
        return None if record is None else self._of(record, settings)

    def read_all(self, settings: RunSettings) -> list[dict[str, Any]]:
        """Return the records of `settings`, one per device that it was trained on."""
        run = settings.run
        records = (self._at(name) for name in (run, f"{run}-cuda"))
        return [self._of(record, settings) for record in records if record]

    def load(self, run: str) -> dict[str, Any] | None:
        """Return the record of the run named `run`, its checksum verified, or None."""
        names = {"cpu": (run,), "cuda": (f"{run}-cuda",), "": (run, f"{run}-cuda")}[self.device]
        return next((record for name in names if (record := self._at(name))), None)

    def require(self, run: str) -> dict[str, Any]:
        """Return the record of the run named `run` as `load` does; `InputError` if it has none."""
        record = self.load(run)
        if record is None:
            raise InputError(f"run = {run}: has no record in {self.folder}")
        return record

    def trained(self, run: str) -> dict[str, Any] | None:
        """The record that training `run` on this machine left, or None."""
        return self._in_folder(self.path(run).name)

    def _at(self, name: str) -> dict[str, Any] | None:
        """The collected record, with the latency that was measured since, or the one here."""
        record = read_lines(self.lines).get(name)
        if record is None:
            return self._in_folder(name)
        if record["latency"] is None and (self.runs / name / "record.json").exists():
            own = self._in_folder(name)
            return record | {"latency": own["latency"]} if own and _alike(own, record) else record
        return record

    def _in_folder(self, name: str) -> dict[str, Any] | None:
        path = self.runs / name / "record.json"
        try:
            text = path.read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return None
        record = parse(text.removesuffix("\n"), path)
        if place(record) != name:
            raise InputError(refusal(name, f"is that of another run, {record['run']},", path))
        return record

    def _of(self, record: dict[str, Any], settings: RunSettings) -> dict[str, Any]:
        """`record`, unless it was made with other settings, or with images of another day."""
        if record["settings"] != settings.model_dump(mode="json") and not _means(record, settings):
            raise InputError(
                refusal(settings.run, "was made with other settings", self._file(record))
            )
        known = "" if ":" in settings.dataset else datasets.info(settings.dataset).fingerprint
        self.require_data(record, known or record["data"]["fingerprint"])
        return record

    def require_data(self, record: dict[str, Any], fingerprint: str) -> None:
        """Raise `InputError` for a record that was not made from the data of `fingerprint`."""
        if record["data"]["fingerprint"] != fingerprint:
            why = "was made from other data than today's"
            raise InputError(refusal(record["run"], why, self._file(record)))

    def _file(self, record: dict[str, Any]) -> Path:
        """Where the record is read from."""
        name = place(record)
        return self.lines if name in read_lines(self.lines) else self.runs / name

    def shown(self, run: str) -> str:
        """The record of `run`, then its history, a line per epoch; `InputError` if missing."""
        record = self.require(run)
        text = json.dumps(record | {"history": None}, indent=1, sort_keys=True)
        rows = [row.items() for row in self.history(run)]
        lines = [" ".join(f"{k}={v}" for k, v in row if str(v) != "nan") for row in rows]
        return "\n".join([text, *lines]) + "\n"

    def history(self, run: str) -> list[dict[str, Any]]:
        """Rows of the run's history, an epoch each; NaN where a number was not there."""
        columns = self.require(run)["history"]
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, map(_number, row), strict=True)) for row in rows]

    def latency(self, run: str) -> dict[str, float]:
        """Milliseconds of the run's net and of the dense one, {} while it was not timed."""
        return (self.require(run)["latency"] or {}).get("ms", {})

    def arrays(self, run: str) -> dict[str, np.ndarray]:
        """Arrays of `run` for figures: all where it was trained, those that are drawn elsewhere.

        Raises `InputError` if they are missing or not those of its record.
        """
        return self.arrays_of(self.require(run))

    def arrays_of(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        """Arrays of the run of `record`, as `arrays` does."""
        name, noted = place(record), record["files"]["arrays"]
        own, packed = self.runs / name / "arrays.safetensors", self.folder / "arrays"
        for paths, prefix in (([own], ""), (sorted(packed.glob("*.safetensors")), f"{name}/")):
            arrays = {k: a for path in paths for k, a in _load(path, prefix).items()}
            if arrays and all(digest(a) == noted.get(k) for k, a in arrays.items()):
                return arrays
        if not noted:
            return {}
        raise InputError(
            f"arrays = {name}: missing or damaged, in {own} and in {packed};"
            " `prunestudy run RUN --weights` makes them again"
        )

    def write(
        self,
        record: dict[str, Any],
        arrays: dict[str, np.ndarray],
        weights: Path,
        cuts: dict[str, np.ndarray] | None = None,
    ) -> dict[str, Any]:
        """Put a finished run's folder in place under a temporary name, rename it; its record.

        `weights` is the file of the finished net, moved in; `cuts` what the method knows of single
        weights. A run that was trained here before (its weights were lost) must have come out the
        same, or `InputError`.
        """
        run = record["run"]
        payload = save({key: np.ascontiguousarray(a) for key, a in arrays.items()})
        if len(payload) > MAX_ARRAY_BYTES:
            raise RuntimeError(f"arrays of {run}: {len(payload)} bytes, above {MAX_ARRAY_BYTES}")
        record["files"] = {
            "arrays": {name: digest(array) for name, array in arrays.items()},
            "weights": content(weights),
        }
        line = line_of(record)
        record, before = json.loads(line), self.trained(run)
        if before is not None:
            _require_same(before, record, self.path(run))
            record, line = before, line_of(before)
        temporary = self.work(run) / "finished"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "arrays.safetensors").write_bytes(payload)
        if cuts:
            (temporary / "cuts.safetensors").write_bytes(save(cuts))
        weights.replace(temporary / "weights.safetensors")
        (temporary / "record.json").write_text(line + "\n", encoding="utf-8")
        self.runs.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.path(run), ignore_errors=True)
        temporary.rename(self.path(run))
        return record

    def write_latency(self, run: str, latency: dict[str, Any]) -> None:
        """Add what was measured of the net of `run`, which was trained here, to its record."""
        record = self.trained(run)
        if record is None:
            raise InputError(f"run = {run}: was not trained in {self.folder}")
        write_text(self.path(run) / "record.json", line_of(record | {"latency": latency}) + "\n")


def _means(record: dict[str, Any], settings: RunSettings) -> bool:
    """Whether the record's settings, with today's defaults, are `settings`."""
    try:
        return RunSettings.model_validate_json(json.dumps(record["settings"])).filled() == settings
    except (ValidationError, KeyError, InputError):
        return False


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in _REPRODUCED)


def _require_same(before: dict[str, Any], after: dict[str, Any], folder: Path) -> None:
    for key in _REPRODUCED:
        if before[key] != after[key]:
            raise InputError(
                f"record = {before['run']}: trained again, it did not reproduce its {key};"
                f" delete {folder} to accept the new one"
            )


def _has_weights(path: Path, record: dict[str, Any]) -> bool:
    try:
        return content(path) == record["files"]["weights"]
    except (OSError, SafetensorError):
        return False


def _load(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of a file whose names begin with `prefix`, without it; none of a damaged file."""
    try:
        data = load(path.read_bytes())
    except (OSError, SafetensorError):
        return {}
    return {k.removeprefix(prefix): a for k, a in data.items() if k.startswith(prefix)}


def _number(value: Any) -> Any:
    if value is None:
        return math.nan
    return value if isinstance(value, str) else float(value)
