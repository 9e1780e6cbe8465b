"""Records: what is kept of every finished run, checked whenever it is read.

results/<profile>/records.jsonl              one line per run and device, sorted: settings, data,
                                             metrics, history, latency, cost, environment
                  arrays/<paper>.safetensors what the notebooks draw, as RUN/NAME
                  runs/<run>/record.json     the same line for a run that was trained here
                             arrays.safetensors, weights.safetensors
                  work/<run>/                checkpoint of an unfinished run, and locks

The first two are tracked and written by `prunestudy collect`; the rest stays on the machine.
A run trained on CUDA is filed under its name with `-cuda` added.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors.numpy import save

from prunestudy import datasets
from prunestudy.errors import InputError, path_of
from prunestudy.places import home as repository
from prunestudy.study import lines
from prunestudy.study.lines import CUDA, place, read_arrays, read_lines, refusal, write_text
from prunestudy.study.settings import RunSettings


class Store:
    """The records of one profile: of `device` ("cpu" or "cuda"), or "" for CPU records first."""

    def __init__(self, profile: str, root: Path | str | None = None, device: str = "") -> None:
        self.folder = path_of(root or repository() / "results", "results") / profile
        self.runs = self.folder / "runs"
        self.collected = self.folder / "records.jsonl"
        self.device = device

    def place(self, run: str) -> str:
        """The name that `run` is filed under in this store: its own, or that with `-cuda`."""
        if self.device:
            return run + CUDA if self.device == "cuda" else run
        stored = read_lines(self.collected)
        first = (name for name in (run, run + CUDA) if name in stored or self._own(name).exists())
        return next(first, run)

    def _own(self, name: str) -> Path:
        return self.runs / name / "record.json"

    def path(self, run: str) -> Path:
        """Folder of `run` once it was trained here."""
        return self.runs / self.place(run)

    def work(self, run: str) -> Path:
        """Folder of the unfinished run `run`."""
        return self.folder / "work" / self.place(run)

    def weights(self, run: str) -> Path:
        """File of the finished net of `run`."""
        return self.path(run) / "weights.safetensors"

    def lock(self, run: str) -> FileLock:
        """Lock to hold while `run` is trained, so that of two processes only one trains it."""
        locks = self.folder / "work" / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{run}.lock")

    # --- records

    def places(self) -> list[str]:
        """What the finished runs are filed under: their names, with `-cuda` for those on CUDA."""
        return sorted({*read_lines(self.collected), *self.here()})

    def here(self) -> list[str]:
        """What the runs are filed under that were trained here."""
        try:
            names = [path.name for path in self.runs.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(n for n in names if not n.startswith(".") and self._own(n).exists())

    def names(self) -> list[str]:
        """Names of the finished runs."""
        return sorted({name.removesuffix(CUDA) for name in self.places()})

    def devices(self) -> set[str]:
        """Kinds of device, "cpu" or "cuda", that the finished runs were trained on."""
        return {"cuda" if name.endswith(CUDA) else "cpu" for name in self.places()}

    def read(self, settings: RunSettings, fingerprint: str = "") -> dict[str, Any] | None:
        """Return the record of `settings`, or None if that run is not done.

        `fingerprint` is that of today's data, needed where the data set's name does not determine
        it. Raises `InputError` for a record that was edited, or made with other settings or data.
        """
        return self._checked(self.place(settings.run), settings, fingerprint)

    def read_all(self, settings: RunSettings) -> list[dict[str, Any]]:
        """Return the records of `settings`, one per device that it was trained on."""
        records = [self._checked(settings.run + end, settings) for end in ("", CUDA)]
        return [record for record in records if record]

    def _checked(
        self, name: str, settings: RunSettings, fingerprint: str = ""
    ) -> dict[str, Any] | None:
        record = self.at(name)
        if record:
            if not fingerprint and ":" not in settings.dataset:
                fingerprint = datasets.info(settings.dataset).fingerprint
            self.require_same(record, settings.kept(), fingerprint)
        return record

    def require(self, run: str) -> dict[str, Any]:
        """Return the record of the run named `run`; `InputError` if it has none."""
        if record := self.at(self.place(run)):
            return record
        raise InputError(f"run = {run}: has no record in {self.folder}")

    def at(self, name: str) -> dict[str, Any] | None:
        """The record filed under `name` or None: the collected one, else that of training here.

        The collected one counts even after a second training; from an equal one trained here it
        takes a latency that was measured since.
        """
        record = read_lines(self.collected).get(name)
        if record and record["latency"]:
            return record
        own = self.trained(name)
        if record and own and not lines.changed(record, own):
            return record | {"latency": own["latency"]}
        return record or own

    def trained(self, name: str) -> dict[str, Any] | None:
        """The record that training here left under `name`, or None."""
        path = self._own(name)
        if (text := lines.text_of(path)) is None:
            return None
        record = lines.parse(text.removesuffix("\n"), path)
        if place(record) != name:
            raise refusal(name, f"is that of another run, {record['run']},", path)
        return record

    def require_same(self, record: dict[str, Any], settings: dict[str, Any], data: str) -> None:
        """Raise `InputError` if `record` of this store was made with other settings or `data`."""
        # A setting that is newer than the record has its default: the name is the same.
        if record["settings"] != settings and name_of(record["settings"]) != name_of(settings):
            why = "was made with other settings"
        elif data not in ("", record["data"]["fingerprint"]):
            why = "was made from other data"
        else:
            return
        raise self._refusal(record, why)

    def _refusal(self, record: dict[str, Any], why: str) -> InputError:
        stored = place(record) in read_lines(self.collected)
        return refusal(record["run"], why, self.collected if stored else self._own(place(record)))

    def settings(self, run: str) -> RunSettings:
        """The settings of the finished run named `run`; `InputError` if no such run is made now."""
        record = self.require(run)
        if name_of(record["settings"]) != run:
            raise self._refusal(record, "is of another version")
        return RunSettings.model_validate_json(json.dumps(record["settings"]))

    def history(self, run: str) -> list[dict[str, Any]]:
        """Rows of the run's history, one per epoch; NaN where a number is missing."""
        columns = self.require(run)["history"]
        filled = ([math.nan if v is None else v for v in values] for values in columns.values())
        return [dict(zip(columns, row, strict=True)) for row in zip(*filled, strict=True)]

    # --- files

    def arrays(self, run: str) -> dict[str, np.ndarray]:
        """Arrays of `run` for figures: all where it was trained, elsewhere those that are drawn."""
        return self.arrays_of(self.require(run))

    def arrays_of(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        """Those of the run of `record`; `InputError` if they are missing or not as it says."""
        name, digests = place(record), record["files"]["arrays"]
        own, packed = self.runs / name / "arrays.safetensors", {}
        for path in (self.folder / "arrays").glob("*.safetensors"):
            packed |= read_arrays(path, f"{name}/")
        for arrays in (read_arrays(own), packed):
            if arrays and all(lines.digest(a) == digests.get(k) for k, a in arrays.items()):
                return arrays
        if not digests:
            return {}
        raise InputError(
            f"arrays = {name}: missing or damaged, in {own} and in {self.folder / 'arrays'};"
            " `prunestudy run RUN --weights` makes them again"
        )

    def has(self, run: str, *kinds: str) -> bool:
        """Whether those files ("arrays", "weights") of `run` are here, and as its record says."""
        record, folder = self.trained(self.place(run)), self.path(run)
        files = {kind: read_arrays(folder / f"{kind}.safetensors") for kind in kinds}
        noted = {kind: lines.noted(arrays, kind) for kind, arrays in files.items()}
        return record is not None and noted.items() <= record["files"].items()

    def require_weights(self, run: str) -> Path:
        """Return the file of the finished net of `run`; `InputError` unless it is unharmed."""
        path = self.weights(run)
        if not self.has(run, "weights"):
            why = f"weights = {run}: missing, or not as its record says, in {path}"
            raise InputError(f"{why}; `prunestudy run RUN --weights` trains the run again")
        return path

    def write(self, record: dict[str, Any], weights: Path, arrays: dict[str, np.ndarray]) -> None:
        """Put a finished run's folder in place: write it under a temporary name, rename it.

        `weights` is the file of the finished net, moved in. A run that was trained here before
        (its weights were lost) must have come out the same, or `InputError`.
        """
        folder = self.path(record["run"])
        temporary = folder.with_name(f".{folder.name}")  # `runs` may be on another disk than `work`
        files = {"arrays": arrays, "weights": read_arrays(weights)}
        record["files"] = {kind: lines.noted(found, kind) for kind, found in files.items()}
        line, before = lines.line_of(record), self.trained(place(record))
        if before:
            for key in lines.changed(before, json.loads(line)):
                why = f"record = {record['run']}: trained again, it did not reproduce its {key}"
                raise InputError(f"{why}; delete {folder} to accept the new one")
            line = lines.line_of(before)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
            (temporary / "arrays.safetensors").write_bytes(data)
            shutil.move(weights, temporary / "weights.safetensors")
            (temporary / "record.json").write_text(line + "\n", encoding="utf-8")
            if before:  # file by file: at no moment is there no record
                for path in temporary.iterdir():
                    path.replace(folder / path.name)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def write_latency(self, run: str, latency: dict[str, Any]) -> None:
        """Add the latency measured of the net of `run`, which was trained here, to its record."""
        record, name = self.trained(self.place(run)), self.place(run)
        if record is None:
            raise InputError(f"run = {run}: was not trained in {self.folder}")
        write_text(self._own(name), lines.line_of(record | {"latency": latency}) + "\n")


def name_of(settings: dict[str, Any]) -> str:
    """The name of the run of a record's `settings`; "" if they are no longer valid."""
    try:
        return RunSettings.model_validate_json(json.dumps(settings)).run
    except ValueError:
        return ""
