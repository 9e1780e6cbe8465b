"""Notebooks: executed each on a kernel of its own, kept only when whole."""

import hashlib
import json
from pathlib import Path
from typing import Any

from prunestudy import places
from prunestudy.errors import InputError
from prunestudy.papers import card
from prunestudy.study.lines import line_of, write_text
from prunestudy.study.plan import plan
from prunestudy.study.records import Store


def source_of(paper: str) -> Path:
    """Path of the paper's notebook."""
    return places.notebooks() / f"{card(paper).notebook}.ipynb"


def executed(store: Store, paper: str) -> Path:
    """Where the executed notebook of `paper` goes."""
    return store.folder / "notebooks" / f"{card(paper).notebook}.ipynb"


def stamp(store: Store, profile: str, paper: str, cells: list[Any]) -> dict[str, str]:
    """Digests of the executed `cells`, the source, and the records: the paper's, or all papers'."""
    planned = plan(profile, (paper,) if card(paper).is_paper else ())
    records = {run: store.at(store.place(run)) for run in (p.settings.run for p in planned)}
    lines = {run: record and line_of(record) for run, record in records.items()}
    values = {"records": lines, "cells": cells}
    made = {name: json.dumps(each, sort_keys=True).encode() for name, each in values.items()}
    made["source"] = source_of(paper).read_bytes()
    return {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}


def is_current(store: Store, profile: str, paper: str) -> bool:
    """Whether the executed notebook is there, whole, and made from today's source and records."""
    try:
        notebook = json.loads(executed(store, paper).read_text(encoding="utf-8"))
        found, cells = notebook["metadata"]["prunestudy"], notebook["cells"]
    except (FileNotFoundError, ValueError, TypeError, LookupError, RecursionError):
        return False
    return found == stamp(store, profile, paper, cells)


def execute(store: Store, profile: str, paper: str, data: str) -> Path:
    """Run the notebook of `paper` in `profile`; return the path of the executed copy.

    A failed run leaves the earlier copy as it was. Raises `InputError` for what the notebook
    refuses, and for one that is not there or damaged.
    """
    import nbformat

    from prunestudy.study import kernel  # late: it imports all that notebooks do

    source, target = source_of(paper), executed(store, paper)
    try:
        notebook = nbformat.read(source, as_version=4)
        tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
        place = ["parameters" in each for each in tags].index(True) + 1
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        why = f"not there or damaged ({type(error).__name__}); get it back from git"
        raise InputError(f"notebook = {source}: {why}") from None
    values = {"profile": profile, "results": str(store.folder.parent), "data": data}
    lines = [f"{name} = {value!r}" for name, value in values.items()]
    given = nbformat.v4.new_code_cell("\n".join(lines), id="injected-parameters")
    given.metadata["tags"] = ["injected-parameters"]  # as papermill calls it
    notebook.cells.insert(place, given)
    try:
        kernel.run_cells(notebook)
    except InputError as error:
        raise InputError(f"notebook {source.stem}: {error}") from None
    given.source = lines[0]  # drop local paths, and (below) times
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    cells = json.loads(nbformat.writes(notebook))["cells"]
    notebook.metadata["prunestudy"] = stamp(store, profile, paper, cells)
    write_text(target, nbformat.writes(notebook))
    return target
