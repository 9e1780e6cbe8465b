"""Notebooks through papermill, with tiny settings; bad parameters change nothing on disk."""

import base64
import hashlib
import json
import re
import symtable
from functools import partial
from types import SimpleNamespace

import nbformat
import pandas as pd
import papermill
import psutil
import pytest
from conftest import one_line

from prunestudy import methods
from prunestudy.errors import InputError
from prunestudy.papers import cards
from prunestudy.study import kernel, notebooks, sentences, tables
from prunestudy.study.records import Store, repository
from prunestudy.study.select import index
from prunestudy.study.session import Session

ROOT = repository()
PAPERS = [card.id for card in cards()]
STEMS = [card.notebook for card in cards()]


def _execute(paper, target, **values):
    source = notebooks.source_of(paper)
    papermill.execute_notebook(
        str(source),
        str(target),
        parameters=values,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(source.parent),
    )


@pytest.mark.parametrize("paper", PAPERS, ids=STEMS)
@pytest.mark.filterwarnings("ignore")  # of papermill's and the kernel's own, in this process
def test_runs_alone_with_tiny_settings(paper, tmp_path):
    _execute(paper, tmp_path / "out.ipynb", seeds=1, epochs=1, results=str(tmp_path))
    found = list((tmp_path / "custom" / "runs").glob("*/record.json"))
    assert len(found) >= 5
    assert list((tmp_path / "custom" / "figures").glob("*.png"))
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert drawn
    for output in drawn:
        about = output.metadata["image/png"]
        assert about["alt"], output
        # One and a half times the size on the page: the width is in bytes 16 to 19 of a PNG.
        pixels = int.from_bytes(base64.b64decode(output.data["image/png"])[16:20])
        assert about["width"] == round(pixels / 1.5)
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    assert not [page for page in pages if "…" in page or re.search(r"<t[dh][^>]*>\.\.\.<", page)]


def _code(paper):
    """The code cells of the paper's notebook that sentences are made in, and what these need."""
    cells = nbformat.read(notebooks.source_of(paper), as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    return [cell.source for cell in code if re.search(r"\.says\(|\bsentences\b", cell.source)]


def _said(paper, monkeypatch):
    """The notebook's sentences on the committed records of cpu, each with how it is made again."""
    found, study = [], Session(paper, "cpu", results=ROOT / "results")

    def says(self, *words, **what):
        made = sentences.says(self.store, self.planned, self.card, *words, **what)
        found.append((words, made, partial(sentences.says, *base, *words, **what)))
        return made

    base = (study.store, study.planned, study.card)
    monkeypatch.setattr(Session, "says", says)
    monkeypatch.setattr(Session, "of", lambda *a: study)
    room = {"display": lambda *shown: None, "pd": pd}
    for source in _code(paper):
        exec(source, room)
        room["study"] = study
    return study, found


SPEAKING = [card for card in cards() if any(".says(" in source for source in _code(card.id))]


@pytest.fixture(params=SPEAKING, ids=lambda card: card.notebook)
def said(request, monkeypatch):
    return _said(request.param.id, monkeypatch)


def test_every_sentence_holds_for_the_committed_records(said):
    """Its numbers are those of the summary table, which is made another way."""
    study, found = said
    assert len(found) >= 3
    assert sum(bool(made.direction) for _, made, _ in found) >= 3
    table = tables.readable(study.summary)
    counted = table.n.astype(str).str.split().str[0]  # without those that diverged
    known = {*(table["minus dense"] + ", n = " + counted)}
    for words, made, _ in found:
        assert made.endswith((".", ")")) and "nan" not in made, made
        for mean, rest in re.findall(r"([+-][\d.]+) points( \[.*?\], n = \d+)", made):
            assert words[1:] != ("dense",) or mean + rest in known, made


def test_with_method_and_control_swapped_in_the_records_directions_turn(said, monkeypatch):
    study, found = said
    turned = {"above": "below", "below": "above"}
    runs, read = index(study.planned), Store.read_all
    for (ours, *against), made, again in found:
        control, other = (against or ["dense"])[0], {}
        for (label, *place), targets in runs.items():
            opponents = runs.get((control, *place), {})
            for target, items in targets.items() if label == ours else ():
                theirs = opponents.get(target) or opponents.get(None, {})
                for key in items.keys() & theirs.keys():
                    pair = items[key].settings, theirs[key].settings
                    other |= dict(zip((each.run for each in pair), reversed(pair), strict=True))
        monkeypatch.setattr(Store, "read_all", lambda s, at, o=other: read(s, o.get(at.run, at)))
        swapped = again()
        monkeypatch.setattr(Store, "read_all", read)
        assert again() == made
        if made.direction:
            assert swapped != made
            if against and control != "dense":  # of which one run pairs with those of all targets
                assert swapped.direction == turned.get(made.direction, made.direction), made


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "results").glob("*/notebooks/*.ipynb")),
    ids=lambda path: "/".join(path.parts[-3::2]),
)
def test_current_copies_show_whole_tables_and_names_for_people(path):
    """Of copies that are older than their source, a study makes new ones."""
    copy = json.loads(path.read_text(encoding="utf-8"))
    source = (ROOT / "notebooks" / path.name).read_bytes()
    if copy["metadata"]["prunestudy"]["source"] != hashlib.sha256(source).hexdigest():
        return
    raw = "|".join(name for name in methods.names() if "_" in name)
    for cell in copy["cells"]:
        for output in cell.get("outputs", ()):
            data = output.get("data", {}) | {"stream": output.get("text", "")}
            for kind in ("text/html", "text/markdown", "stream"):
                text = re.sub(r"base64,[^\"]*|https?://\S+", "", "".join(data.get(kind, "")))
                cut = re.search(rf"…|<t[dh][^>]*>[^<]*\.\.\.<|\b({raw})\b|-[0-9a-f]{{12}}\b", text)
                assert not cut, (cell["id"], text[max(0, cut.start() - 60) : cut.end() + 20])


def _reads(tables):
    """Names of the notebook that code in the scopes `tables` reads, or in scopes inside them."""
    found, left = set(), [*tables]
    while left:
        table = left.pop()
        top = table.get_type() == "module"
        symbols = (s for s in table.get_symbols() if s.is_referenced() and (top or s.is_global()))
        found |= {s.get_name() for s in symbols}
        left += table.get_children()
    return found


def _rebound(cells):
    """(cell, name, later cell) where the later cell changes what running the first again finds.

    Cells of tag "loop" or "exercise" need what they, and the functions that they call, read but do
    not set. A slider's functions are called after the last cell, so they need all that they read.
    """
    tables = [symtable.symtable(cell.source, cell.id, "exec") for cell in cells]
    symbols = [table.get_symbols() for table in tables]
    sets = [{s.get_name() for s in each if s.is_assigned() or s.is_imported()} for each in symbols]
    bodies, found = {}, []  # bodies: what functions of this or an earlier cell read
    for i, (cell, table) in enumerate(zip(cells, tables, strict=True)):
        bodies |= {child.get_name(): _reads([child]) for child in table.get_children()}
        needs, left, own = set(), set(), set()
        if "slide(" in cell.source:
            called = {s.get_name() for s in symbols[i] if s.is_referenced()} & bodies.keys()
            left = _reads(table.get_children()).union(*(bodies[name] for name in called))
        elif {"loop", "exercise"} & {*cell.metadata.get("tags", ())}:
            left, own = _reads([table]), sets[i]
        while left:
            needs |= left
            left = set().union(*(bodies.get(name, ()) for name in left)) - needs
        for later, names in zip(cells[i + 1 :], sets[i + 1 :], strict=True):
            found += [(cell.id, name, later.id) for name in sorted(names & needs - own)]
    return found


def _cells(*sources):
    """Code cells; of a first line "# TAG" with that tag."""
    new = nbformat.v4.new_code_cell
    return [new(s, metadata={"tags": re.findall(r"^# (\w+)", s)}) for s in sources]


def test_names_that_a_later_cell_takes_are_found():
    loop, used = "# loop\nimport torch\nfor x in data: y = f(x)", "def f(x): return g(x)"
    cells = _cells("def g(x): return x + seen", used, loop, "y = torch = x = 1", "seen, d = 1, 2")
    assert [name for _, name, _ in _rebound(cells)] == ["seen"]
    assert [name for _, name, _ in _rebound(cells[:3] + _cells("data, h = f, 2"))] == ["data"]
    assert [name for _, name, _ in _rebound(cells[:3] + _cells("def g(): pass"))] == ["g"]
    assert not _rebound(cells[:3] + _cells("[seen for seen in x]", "def h(g): data = g"))
    slider = _cells("axes = 1", "def show(a, s): a.plot(s)", "slide(lambda s: show(axes, s))")
    assert [name for _, name, _ in _rebound(slider + _cells("fig, axes = 1, 2"))] == ["axes"]
    assert [name for _, name, _ in _rebound(slider + _cells("import show"))] == ["show"]
    drawn = _cells("def draw(s): axes.plot(s)", "axes = 1\nslide(draw)", "def draw(): pass")
    assert not _rebound(drawn)
    assert [name for _, name, _ in _rebound(drawn + _cells("axes = 2"))] == ["axes"]


@pytest.mark.parametrize("paper", PAPERS, ids=STEMS)
def test_loops_exercises_and_sliders_work_after_the_last_cell(paper):
    cells = nbformat.read(notebooks.source_of(paper), as_version=4).cells
    assert _rebound([cell for cell in cells if cell.cell_type == "code"]) == []


@pytest.mark.filterwarnings("ignore")
def test_plain_papermill_with_a_bad_parameter_stops_in_the_first_cells(tmp_path):
    results = tmp_path / "results"
    with pytest.raises(papermill.exceptions.PapermillExecutionError) as caught:
        _execute(PAPERS[0], tmp_path / "out.ipynb", results=str(results), sedes=1)
    assert caught.value.ename == "InputError"
    assert "parameter = 'sedes'" in caught.value.evalue
    assert caught.value.exec_count <= 4
    assert not results.exists()


def test_parameters_are_refused_by_name_and_by_type():
    space = {"profile": "quick", "seeds": 1, "epochs": 0} | dict.fromkeys(("results", "data"), "")
    space |= {"device": "cpu"}
    names = {"In": [], "Out": {}, "_": 3, "figures": notebooks, "Session": Session}
    assert Session.of(PAPERS[0], space | names).seeds == 1
    with pytest.raises(InputError, match="parameter = 'sedes': allowed are data, device"):
        Session.of(PAPERS[0], space | {"sedes": 1})
    shell = SimpleNamespace(user_ns_hidden={"sedes": 1})  # of the user's startup file
    assert Session.of(PAPERS[0], space | {"sedes": 1, "get_ipython": lambda: shell}).seeds == 1
    with pytest.raises(InputError, match=r"parameter seeds = 1\.5: of type int"):
        Session.of(PAPERS[0], space | {"seeds": 1.5})
    with pytest.raises(InputError, match=r"parameter seeds = None: of type int"):
        Session.of(PAPERS[0], {name: value for name, value in space.items() if name != "seeds"})


@pytest.mark.filterwarnings("ignore")  # of a source without ids of cells
@pytest.mark.parametrize("text", ["", "\0", "[]", "3", '{"cells": 3}', "[" * 100_000])
def test_a_damaged_notebook_is_refused_and_a_damaged_copy_made_again(text, tmp_path, monkeypatch):
    store, paper = Store("quick", tmp_path / "results"), "overview"
    source = tmp_path / "source.ipynb"
    monkeypatch.setattr(notebooks, "source_of", lambda _: source)

    def run_cells(notebook):
        assert [cell.source.split()[0] for cell in notebook.cells] == ["x", "profile", "1"]

    def execute():
        return notebooks.execute(store, "quick", paper, "some where")

    def refusal():
        with pytest.raises(InputError) as caught:
            execute()
        return one_line(caught)

    monkeypatch.setattr(kernel, "run_cells", run_cells)
    assert refusal().startswith(f"notebook = {source}: not there or damaged")
    given = nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]})
    cells = [given, nbformat.v4.new_code_cell("1 / 2")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), source)
    target = execute()
    whole = target.read_text()
    assert "some where" not in whole
    assert str(tmp_path) not in whole
    assert notebooks.is_current(store, "quick", paper)
    for damaged in (text, whole[:-9], whole.replace("1 / 2", "1 / 3"), whole.replace("[]", "3")):
        target.write_text(damaged)
        assert not notebooks.is_current(store, "quick", paper)
    target.write_text(whole)
    source.write_text(source.read_text() + " ")
    assert not notebooks.is_current(store, "quick", paper)
    source.write_text(text)
    assert refusal().startswith(f"notebook = {source}: not there or damaged")
    assert target.read_text() == whole


@pytest.mark.filterwarnings("ignore")
def test_each_notebook_has_a_kernel_of_its_own_and_a_failing_cell_is_named():
    pids = []
    for end in ("", "\n1 / 0"):
        cell = nbformat.v4.new_code_cell(f"import os\nprint(os.getpid()){end}")
        notebook = nbformat.v4.new_notebook(cells=[cell])
        if end:
            with pytest.raises(InputError, match=r"^ZeroDivisionError: division by zero$"):
                kernel.run_cells(notebook)
        else:
            kernel.run_cells(notebook)
        pids.append(int(cell.outputs[0].text))
    assert len(set(pids)) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
