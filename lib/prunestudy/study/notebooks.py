"""Notebooks: parameters checked beforehand, executed by papermill, kept only when whole."""

import ast
import hashlib
import json
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Self

from prunestudy import places
from prunestudy.errors import InputError, require, require_one_of
from prunestudy.papers import card
from prunestudy.study.plan import plan
from prunestudy.study.records import Store, write_text
from prunestudy.study.session import state_of


def source_of(paper: str) -> Path:
    """Path of the paper's notebook."""
    return places.notebooks() / f"{card(paper).notebook}.ipynb"


def executed(store: Store, paper: str) -> Path:
    """Where the executed notebook of `paper` goes."""
    return store.folder / "notebooks" / f"{card(paper).notebook}.ipynb"


def read(path: Path) -> dict[str, Any]:
    """Return the notebook in `path`, as its JSON says it.

    Raises `InputError` where it is not there, cut off or something else. nbformat's own check
    takes seconds to import.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"notebook = {path}: not there") from None
    except (ValueError, RecursionError):
        content = None
    if not _is_notebook(content):
        why = "damaged, or no notebook of format 4; get it back from git, or make it again"
        raise InputError(f"notebook = {path}: {why}")
    return content


def _is_notebook(content: Any) -> bool:
    if not isinstance(content, dict) or content.get("nbformat") != 4:
        return False
    cells = content.get("cells")
    whole = isinstance(content.get("metadata"), dict) and isinstance(cells, list)
    needed = {"cell_type": str, "metadata": dict, "source": str | list}
    code = needed | {"outputs": list}
    return whole and all(
        isinstance(cell, dict)
        and all(
            isinstance(cell.get(key), kind)
            for key, kind in (code if cell.get("cell_type") == "code" else needed).items()
        )
        for cell in cells
    )


def stamp(store: Store, profile: str, paper: str) -> dict[str, str]:
    """What an executed notebook was made from: its source and the records, of a paper or of all."""
    source = hashlib.sha256(source_of(paper).read_bytes()).hexdigest()
    papers = (paper,) if card(paper).is_paper else ()
    return {"source": source, "records": state_of(store, plan(profile, papers))}


def is_current(store: Store, profile: str, paper: str) -> bool:
    """Whether the executed notebook is there, whole, and made from today's source and records."""
    try:
        found = read(executed(store, paper))["metadata"].get("prunestudy")
    except InputError:
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


_ARGUMENTS = ["--HistoryManager.hist_file=:memory:"]
_NOTE_START = "from prunestudy.study.kernel import note_start; note_start(get_ipython())"


class Kernel:
    """A Python kernel on which notebooks are executed one after the other, each from a fresh start.

    It starts with the first one; a context manager ends it.
    """

    def __init__(self) -> None:
        self._manager: Any = None
        self._client: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        from jupyter_core.utils import run_sync

        if self._client:
            self._client.stop_channels()
        if self._manager:
            run_sync(self._manager.shutdown_kernel)(now=True)
        self._manager = self._client = None

    def execute(self, source: Path, target: Path, values: dict[str, Any]) -> None:
        """Execute `source` with parameters `values` into `target`.

        Raises `InputError` with what the notebook raised; the next one gets a new kernel then.
        """
        import papermill

        if not self._manager:
            self._start()
        options = {"kernel_name": "python3", "progress_bar": False, "km": self._manager}
        try:
            papermill.execute_notebook(str(source), str(target), parameters=values, **options)
            self._run("get_ipython().start_afresh()")
        except papermill.exceptions.PapermillExecutionError as error:
            self.__exit__()
            raise InputError(f"notebook {source.stem}: {error.ename}: {error.evalue}") from None

    def _start(self) -> None:
        from jupyter_client import AsyncKernelManager
        from jupyter_core.utils import run_sync

        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        for attempt in (1, 2):
            self._manager = AsyncKernelManager(kernel_name="python3")
            # nbclient asks for a client for each notebook, and leaves it open.
            new_client = self._manager.client
            self._manager.client = lambda new=new_client: self._one_client(new())
            run_sync(self._manager.start_kernel)(extra_arguments=_ARGUMENTS, **quiet)
            try:
                self._run(_NOTE_START)
                return
            except RuntimeError:
                # Starting a kernel races for a port now and then.
                self.__exit__()
                if attempt == 2:
                    raise

    def _one_client(self, client: Any) -> Any:
        if self._client:
            self._client.stop_channels()
        self._client = client
        return client

    def _run(self, code: str) -> None:
        from jupyter_core.utils import run_sync

        client = self._manager.client()
        client.start_channels()
        run_sync(client.wait_for_ready)(timeout=120)
        content = run_sync(client.execute_interactive)(code, store_history=False)["content"]
        if content["status"] != "ok":
            raise RuntimeError(f"{content['ename']}: {content['evalue']}")


def execute(
    paper: str, profile: str, results: str = "", data: str = "", kernel: Kernel | None = None
) -> Path:
    """Run the notebook of `paper` in `profile`, on `kernel` if given; return the copy's path.

    A failed run leaves the earlier copy as it was. Raises `InputError` for what the notebook
    refuses.
    """
    import nbformat

    plan(profile, (paper,))  # refuses a profile or paper that is not there
    store = Store(profile, results or None)
    source, target = source_of(paper), executed(store, paper)
    values = {"profile": profile, "results": str(results), "data": str(data)}
    read(source)
    check(source, values)
    if kernel is None:
        with Kernel() as own:
            return execute(paper, profile, results, data, own)
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / source.name
        kernel.execute(source, temporary, values)
        notebook = nbformat.read(temporary, as_version=4)
        notebook.metadata["prunestudy"] = stamp(store, profile, paper)
        write_text(target, nbformat.writes(_without_machine(notebook)))
    return target


def _without_machine(notebook: Any) -> Any:
    """Drop what names this machine or the time, the folders given as parameters, a random id."""
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            lines = cell.source.splitlines()
            kept = [x for x in lines if not x.startswith(("results =", "data ="))]
            cell.source, cell.id = "\n".join(kept), "injected-parameters"
    return notebook


def colab_badge(notebook: str) -> str:
    """Markdown of a Colab badge, or "" while the repository's address is not filled in."""
    path = (places.checkout() or Path()) / "pyproject.toml"
    settings = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    address = settings.get("tool", {}).get("prunestudy", {}).get("repository", "")
    if not address:
        return ""
    place = f"https://colab.research.google.com/github/{address}/blob/main/notebooks/{notebook}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({place})"
