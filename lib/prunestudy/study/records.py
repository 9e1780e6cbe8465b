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

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors.numpy import save

from prunestudy import datasets
from prunestudy.errors import InputError
from prunestudy.places import home as repository
from prunestudy.study import lines
from prunestudy.study.lines import CUDA, place, read_arrays, read_lines, refusal, write_text
from prunestudy.study.settings import RunSettings


class Store:
    """The records of one profile: of `device` ("cpu" or "cuda"), or "" of the CPU before CUDA."""

    def __init__(self, profile: str, root: Path | str | None = None, device: str = "") -> None:
        self.folder = Path(root or repository() / "results") / profile
        self.runs = self.folder / "runs"
        self.collected = self.folder / "records.jsonl"
        self.device = device

    def place(self, run: str) -> str:
        """Where `run` is in this store: under its name, or that with `-cuda`."""
        only_cuda = not self._has(run) and self._has(run + CUDA)
        cuda = self.device == "cuda" if self.device else only_cuda
        return run + CUDA if cuda else run

    def _has(self, name: str) -> bool:
        return name in read_lines(self.collected) or self._own(name).exists()

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
        """To be held while `run` is trained: two processes that ask for it train it once."""
        locks = self.folder / "work" / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{run}.lock")

    # --- records

    def places(self) -> list[str]:
        """What the finished runs are called: their names, with `-cuda` for those on CUDA."""
        folders = {path.parent.name for path in self.runs.glob("*/record.json")}
        return sorted({*read_lines(self.collected), *folders})

    def names(self) -> list[str]:
        """Names of the finished runs."""
        return sorted({name.removesuffix(CUDA) for name in self.places()})

    def devices(self) -> set[str]:
        """Kinds of device, "cpu" or "cuda", that the finished runs were trained on."""
        return {"cuda" if name.endswith(CUDA) else "cpu" for name in self.places()}

    def read(
        self, settings: RunSettings, fingerprint: str = "", name: str = ""
    ) -> dict[str, Any] | None:
        """Return the record of `settings`, or None if that run is not done.

        `fingerprint` is that of today's data, where a data set's name does not tell; `name` the
        place to look in. Raises `InputError` for a record that was edited, or made with other
        settings or data.
        """
        name = name or self.place(settings.run)
        record = self.at(name)
        if record is None:
            return None
        if not fingerprint and ":" not in settings.dataset:
            fingerprint = datasets.info(settings.dataset).fingerprint
        require_same(record, settings.model_dump(mode="json"), fingerprint, self.file(name))
        return record

    def read_all(self, settings: RunSettings) -> list[dict[str, Any]]:
        """Return the records of `settings`, one per device that it was trained on."""
        names = (settings.run, settings.run + CUDA)
        records = (self.read(settings, name=name) for name in names)
        return [record for record in records if record]

    def load(self, run: str) -> dict[str, Any] | None:
        """Return the record of the run named `run`, its checksum verified, or None."""
        return self.at(self.place(run))

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
            raise refusal(name, f"is that of another run, {record['run']},", path)
        return record

    def file(self, name: str) -> Path:
        """The file that the record in place `name` is read from."""
        return self.collected if name in read_lines(self.collected) else self._own(name)

    def shown(self, run: str) -> str:
        """The record of `run`, then its history, a line per epoch; `InputError` if missing."""
        record = self.require(run)
        rows = (" ".join(f"{k}={v}" for k, v in row if v is not None) for row in _epochs(record))
        return "\n".join([json.dumps(record | {"history": None}, indent=1), *rows]) + "\n"

    def history(self, run: str) -> list[dict[str, Any]]:
        """Rows of the run's history, an epoch each; NaN where a number was not there."""
        rows = _epochs(self.require(run))
        return [{key: math.nan if v is None else v for key, v in row} for row in rows]

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

    def has_all(self, run: str) -> bool:
        """Whether all files that training `run` leaves are here, and unharmed."""
        record = self.trained(self.place(run))
        return record is not None and all(
            lines.noted(read_arrays(self.path(run) / f"{kind}.safetensors"), kind) == digests
            for kind, digests in record["files"].items()
        )

    def kept(self, run: str, kind: str) -> dict[str, np.ndarray]:
        """What is in the file `kind` ("weights", "cuts") that training `run` left here.

        Raises `InputError` if the file is missing or not the one that it was left with.
        """
        path, record = self.path(run) / f"{kind}.safetensors", self.trained(self.place(run))
        arrays = read_arrays(path)
        if record is None or not arrays or lines.noted(arrays, kind) != record["files"].get(kind):
            raise InputError(
                f"{kind} = {run}: not there, or not those of its record, in {path};"
                " `prunestudy run RUN --weights` trains the run again"
            )
        return arrays

    def write(self, record: dict[str, Any], weights: Path, **files: dict[str, np.ndarray]) -> None:
        """Put a finished run's folder in place under a temporary name, rename it.

        `weights` is the file of the finished net, moved in; `files` are named arrays each. A run
        that was trained here before (its weights were lost) must have come out the same, or
        `InputError`.
        """
        folder, temporary = self.path(record["run"]), self.work(record["run"]) / "finished"
        files["weights"] = read_arrays(weights)
        record["files"] = {kind: lines.noted(named, kind) for kind, named in files.items()}
        line, before = lines.line_of(record), self.trained(place(record))
        if before is not None:
            for key in lines.changed(before, json.loads(line)):
                why = f"trained again, it did not reproduce its {key}"
                way_out = f"delete {folder} to accept the new one"
                raise InputError(f"record = {record['run']}: {why}; {way_out}")
            line = lines.line_of(before)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for kind in files.keys() - {"weights"}:
            data = save({name: np.ascontiguousarray(a) for name, a in files[kind].items()})
            (temporary / f"{kind}.safetensors").write_bytes(data)
        weights.replace(temporary / "weights.safetensors")
        (temporary / "record.json").write_text(line + "\n", encoding="utf-8")
        self.runs.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    def write_latency(self, run: str, latency: dict[str, Any]) -> None:
        """Add what was measured of the net of `run`, which was trained here, to its record."""
        name = self.place(run)
        record = self.trained(name)
        if record is None:
            raise InputError(f"run = {run}: was not trained in {self.folder}")
        write_text(self._own(name), lines.line_of(record | {"latency": latency}) + "\n")


def require_same(
    record: dict[str, Any], settings: dict[str, Any], fingerprint: str, path: Path
) -> None:
    """Raise `InputError` for a record of `path` that was made with other settings or data."""
    if record["settings"] != settings and meaning(record["settings"]) != meaning(settings):
        raise refusal(record["run"], "was made with other settings", path)
    if fingerprint not in ("", record["data"]["fingerprint"]):
        raise refusal(record["run"], "was made from other data", path)


def meaning(settings: dict[str, Any]) -> RunSettings | dict[str, Any]:
    """A record's settings with today's defaults; as they are if they are not valid any more."""
    try:
        return RunSettings.model_validate_json(json.dumps(settings)).filled()
    except ValueError:
        return settings


def _epochs(record: dict[str, Any]) -> Iterator[Iterator[tuple[str, Any]]]:
    columns = record["history"]
    return (zip(columns, row, strict=True) for row in zip(*columns.values(), strict=True))
