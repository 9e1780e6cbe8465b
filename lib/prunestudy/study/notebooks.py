"""Notebooks: parameters checked beforehand, executed by papermill, kept only when whole."""

import ast
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

from prunestudy.errors import InputError, require, require_one_of
from prunestudy.papers import card
from prunestudy.study.plan import plan
from prunestudy.study.records import Store, repository, write_text
from prunestudy.study.session import state_of


def source_of(paper: str) -> Path:
    """Path of the paper's notebook."""
    return repository() / "notebooks" / f"{card(paper).notebook}.ipynb"


def executed(store: Store, paper: str) -> Path:
    """Where the executed notebook of `paper` goes."""
    return store.folder / "notebooks" / f"{card(paper).notebook}.ipynb"


def stamp(store: Store, profile: str, paper: str) -> dict[str, str]:
    """What an executed notebook was made from: its source and the records, of a paper or of all."""
    source = hashlib.sha256(source_of(paper).read_bytes()).hexdigest()
    papers = (paper,) if card(paper).is_paper else ()
    return {"source": source, "records": state_of(store, plan(profile, papers))}


def is_current(store: Store, profile: str, paper: str) -> bool:
    """Whether the executed notebook is there and made from today's source and records."""
    path = executed(store, paper)
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("prunestudy")
    except (json.JSONDecodeError, KeyError):
        return False
    return found == stamp(store, profile, paper)


def check(path: Path, values: dict[str, Any]) -> None:
    """Refuse parameters that the notebook does not have, or of another type than its own."""
    import papermill

    known = papermill.inspect_notebook(str(path))
    for name, value in values.items():
        require_one_of("parameter", name, known)
        wanted = type(ast.literal_eval(known[name]["default"]))
        allowed = f"must be of type {wanted.__name__}"
        require(type(value) is wanted, f"parameter {name}", value, allowed)


def execute(paper: str, profile: str, results: str = "", data: str = "") -> Path:
    """Run the notebook of `paper` in `profile`; return the executed copy's path.

    A failed run leaves the earlier copy as it was. Raises `InputError` for what the notebook
    refuses.
    """
    import nbformat

    plan(profile, (paper,))  # refuses a profile or paper that is not there
    store = Store(profile, results or None)
    source, target = source_of(paper), executed(store, paper)
    values = {"profile": profile, "results": str(results), "data": str(data)}
    check(source, values)
    work = store.folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    temporary = work / f"{source.stem}.{hashlib.sha256(str(target).encode()).hexdigest()[:8]}.ipynb"
    try:
        _papermill(source, temporary, values)
        notebook = nbformat.read(temporary, as_version=4)
        notebook.metadata["prunestudy"] = stamp(store, profile, paper)
        write_text(target, nbformat.writes(_without_machine(notebook)))
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _papermill(source: Path, target: Path, values: dict[str, Any]) -> None:
    import papermill

    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                str(source),
                str(target),
                parameters=values,
                kernel_name="python3",
                progress_bar=False,
                cwd=str(source.parent),
            )
            return
        except papermill.exceptions.PapermillExecutionError as error:
            raise InputError(f"notebook {source.stem}: {error.ename}: {error.evalue}") from None
        except RuntimeError:
            # Starting a kernel races for a port now and then.
            if attempt == 2:
                raise


def _without_machine(notebook: Any) -> Any:
    """Drop what names this machine or the time, and the folders given as parameters."""
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            lines = cell.source.splitlines()
            kept = [x for x in lines if not x.startswith(("results =", "data ="))]
            cell.source = "\n".join(kept)
    return notebook


def colab_badge(notebook: str) -> str:
    """Markdown of a Colab badge, or "" while the repository's address is not filled in."""
    path = repository() / "pyproject.toml"
    settings = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    address = settings.get("tool", {}).get("prunestudy", {}).get("repository", "")
    if not address:
        return ""
    place = f"https://colab.research.google.com/github/{address}/blob/main/notebooks/{notebook}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({place})"
