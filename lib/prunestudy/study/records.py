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
from safetensors.numpy import save

from prunestudy import datasets
from prunestudy.errors import InputError
from prunestudy.places import home as repository
from prunestudy.study import lines
from prunestudy.study.lines import called, place, read_arrays, read_lines, refusal, write_text
from prunestudy.study.settings import RunSettings

MAX_ARRAY_BYTES = 1_000_000


class Store:
    """The records of one profile: of `device` ("cpu" or "cuda"), or "" of the CPU before CUDA."""

    def __init__(self, profile: str, root: Path | str | None = None, device: str = "") -> None:
        self.folder = Path(root or repository() / "results") / profile
        self.runs = self.folder / "runs"
        self.collected = self.folder / "records.jsonl"
        self.device = device

    def path(self, run: str) -> Path:
        """Folder of `run` once it was trained here."""
        return self.runs / self.called(run)

    def work(self, run: str) -> Path:
        """Folder of the unfinished run `run`."""
        return self.folder / "work" / self.called(run)

    def weights(self, run: str) -> Path:
        """File of the finished net of `run`."""
        return self.path(run) / "weights.safetensors"

    def cuts(self, run: str) -> Path:
        """File of what became of each single weight in `run`, where its method tells."""
        return self.path(run) / "cuts.safetensors"

    def called(self, run: str) -> str:
        """Where `run` is in this store: its place, of the CPU unless only CUDA has one."""
        if self.device:
            return called(run, self.device)
        names = (called(run, device) for device in ("cpu", "cuda"))
        return next(filter(self._has, names), run)

    def _has(self, name: str) -> bool:
        return name in read_lines(self.collected) or self._own(name).exists()

    @contextlib.contextmanager
    def lock(self, run: str) -> Iterator[None]:
        """Hold run `run`: two processes that ask for it train it once."""
        locks = self.folder / "work" / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{run}.lock"):
            yield

    # --- records

    def places(self) -> list[str]:
        """What the finished runs are called: their names, with `-cuda` for those on CUDA."""
        folders = {path.parent.name for path in self.runs.glob("*/record.json")}
        return sorted({*read_lines(self.collected), *folders})

    def names(self) -> list[str]:
        """Names of the finished runs."""
        return sorted({name.removesuffix("-cuda") for name in self.places()})

    def devices(self) -> set[str]:
        """Kinds of device, "cpu" or "cuda", that the finished runs were trained on."""
        return {"cuda" if name.endswith("-cuda") else "cpu" for name in self.places()}

    def read(self, settings: RunSettings) -> dict[str, Any] | None:
        """Return the record of `settings`, or None if that run is not done.

        Raises `InputError` for a record that was edited, or made with other settings or data.
        """
        record = self.load(settings.run)
        return None if record is None else self._of(record, settings)

    def read_all(self, settings: RunSettings) -> list[dict[str, Any]]:
        """Return the records of `settings`, one per device that it was trained on."""
        run = settings.run
        records = (self.at(called(run, device)) for device in ("cpu", "cuda"))
        return [self._of(record, settings) for record in records if record]

    def load(self, run: str) -> dict[str, Any] | None:
        """Return the record of the run named `run`, its checksum verified, or None."""
        return self.at(self.called(run))

    def require(self, run: str) -> dict[str, Any]:
        """Return the record of the run named `run` as `load` does; `InputError` if it has none."""
        record = self.load(run)
        if record is None:
            raise InputError(f"run = {run}: has no record in {self.folder}")
        return record

    def at(self, name: str) -> dict[str, Any] | None:
        """The record in place `name`: the collected one, with the latency measured since, or ours.

        Of both the collected one counts: a second training on another machine changes nothing.
        """
        record = read_lines(self.collected).get(name)
        if record is None or record["latency"] is not None:
            return record or self.trained(name)
        own = self.trained(name)
        here = own is not None and not lines.changed(record, own)
        return record | {"latency": own["latency"]} if here else record

    def trained(self, name: str) -> dict[str, Any] | None:
        """The record that was left in place `name` by training here, or None."""
        path = self._own(name)
        try:
            text = path.read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return None
        record = lines.parse(text.removesuffix("\n"), path)
        if place(record) != name:
            raise InputError(refusal(name, f"is that of another run, {record['run']},", path))
        return record

    def file(self, name: str) -> Path:
        """The file that the record in place `name` is read from."""
        return self.collected if name in read_lines(self.collected) else self._own(name)

    def _own(self, name: str) -> Path:
        return self.runs / name / "record.json"

    def _of(self, record: dict[str, Any], settings: RunSettings) -> dict[str, Any]:
        """`record`, unless it was made with other settings, or with images of another day."""
        dumped = settings.model_dump(mode="json")
        if record["settings"] != dumped and meaning(record) != settings:
            why = "was made with other settings"
            raise InputError(refusal(record["run"], why, self.file(place(record))))
        known = "" if ":" in settings.dataset else datasets.info(settings.dataset).fingerprint
        self.require_data(record, known or record["data"]["fingerprint"])
        return record

    def require_data(self, record: dict[str, Any], fingerprint: str) -> None:
        """Raise `InputError` for a record that was not made from the data of `fingerprint`."""
        if record["data"]["fingerprint"] != fingerprint:
            why = "was made from other data than today's"
            raise InputError(refusal(record["run"], why, self.file(place(record))))

    def shown(self, run: str) -> str:
        """The record of `run`, then its history, a line per epoch; `InputError` if missing."""
        record = self.require(run)
        text, columns = json.dumps(record | {"history": None}, indent=1), record["history"]
        rows = (zip(columns, row, strict=True) for row in zip(*columns.values(), strict=True))
        epochs = (" ".join(f"{k}={v}" for k, v in row if v is not None) for row in rows)
        return "\n".join([text, *epochs]) + "\n"

    def history(self, run: str) -> list[dict[str, Any]]:
        """Rows of the run's history, an epoch each; NaN where a number was not there."""
        columns = self.require(run)["history"]
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, map(_number, row), strict=True)) for row in rows]

    def latency(self, run: str) -> dict[str, float]:
        """Milliseconds of the run's net and of the dense one, {} while it was not timed."""
        return (self.require(run)["latency"] or {}).get("ms", {})

    # --- files

    def arrays(self, run: str) -> dict[str, np.ndarray]:
        """Arrays of `run` for figures: all where it was trained, those that are drawn elsewhere.

        Raises `InputError` if they are missing or not those of its record.
        """
        return self.arrays_of(self.require(run))

    def arrays_of(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        """Arrays of the run of `record`, as `arrays` does."""
        name, noted = place(record), record["files"]["arrays"]
        own = self.runs / name / "arrays.safetensors"
        packed = {
            key.removeprefix(f"{name}/"): array.copy()
            for path in sorted((self.folder / "arrays").glob("*.safetensors"))
            for key, array in lines.read_packed(path).items()
            if key.startswith(f"{name}/")
        }
        for arrays in (read_arrays(own), packed):
            if arrays and all(lines.digest(a) == noted.get(k) for k, a in arrays.items()):
                return arrays
        if not noted:
            return {}
        raise InputError(
            f"arrays = {name}: missing or damaged, in {own} and in {self.folder / 'arrays'};"
            " `prunestudy run RUN --weights` makes them again"
        )

    def has_all(self, run: str) -> bool:
        """Whether all files that training `run` leaves are here, and unharmed."""
        record = self.trained(self.called(run))
        return record is not None and all(
            lines.noted(read_arrays(self.path(run) / f"{kind}.safetensors"), kind) == files
            for kind, files in record["files"].items()
        )

    def require_weights(self, run: str) -> None:
        """Raise `InputError` unless the net of `run` on disk is the one that it was left with."""
        self._require_file(run, "weights")

    def read_cuts(self, run: str) -> dict[str, np.ndarray]:
        """What is in the file `cuts(run)`; `InputError` if it is missing or not that of the run."""
        return self._require_file(run, "cuts")

    def _require_file(self, run: str, kind: str) -> dict[str, np.ndarray]:
        path, record = self.path(run) / f"{kind}.safetensors", self.trained(self.called(run))
        arrays = read_arrays(path)
        if record is None or not arrays or lines.noted(arrays, kind) != record["files"].get(kind):
            raise InputError(
                f"{kind} = {run}: not there, or not those of its record, in {path};"
                " `prunestudy run RUN --weights` trains the run again"
            )
        return arrays

    def write(
        self,
        record: dict[str, Any],
        arrays: dict[str, np.ndarray],
        weights: Path,
        cuts: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Put a finished run's folder in place under a temporary name, rename it.

        `weights` is the file of the finished net, moved in; `cuts` what the method knows of single
        weights. A run that was trained here before (its weights were lost) must have come out the
        same, or `InputError`.
        """
        run, folder = record["run"], self.path(record["run"])
        files = {"arrays": arrays, "weights": read_arrays(weights)}
        files |= {"cuts": cuts} if cuts else {}
        payload = save({key: np.ascontiguousarray(a) for key, a in arrays.items()})
        if len(payload) > MAX_ARRAY_BYTES:
            raise RuntimeError(f"arrays of {run}: {len(payload)} bytes, above {MAX_ARRAY_BYTES}")
        record["files"] = {kind: lines.noted(named, kind) for kind, named in files.items()}
        line, before = lines.line_of(record), self.trained(place(record))
        if before is not None:
            for key in lines.changed(before, json.loads(line)):
                why = f"trained again, it did not reproduce its {key}"
                raise InputError(f"record = {run}: {why}; delete {folder} to accept the new one")
            line = lines.line_of(before)
        temporary = self.work(run) / "finished"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "arrays.safetensors").write_bytes(payload)
        if cuts:
            (temporary / "cuts.safetensors").write_bytes(save(cuts))
        weights.replace(temporary / "weights.safetensors")
        (temporary / "record.json").write_text(line + "\n", encoding="utf-8")
        self.runs.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    def write_latency(self, run: str, latency: dict[str, Any]) -> None:
        """Add what was measured of the net of `run`, which was trained here, to its record."""
        name = self.called(run)
        record = self.trained(name)
        if record is None:
            raise InputError(f"run = {run}: was not trained in {self.folder}")
        write_text(self._own(name), lines.line_of(record | {"latency": latency}) + "\n")


def meaning(record: dict[str, Any]) -> RunSettings | None:
    """The record's settings with today's defaults; None if they are not valid any more."""
    try:
        return RunSettings.model_validate_json(json.dumps(record["settings"])).filled()
    except (ValidationError, KeyError, InputError):
        return None


def _number(value: Any) -> Any:
    if value is None:
        return math.nan
    return value if isinstance(value, str) else float(value)
