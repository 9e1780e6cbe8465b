"""Notebooks through papermill, with tiny settings; bad parameters change nothing on disk."""

import base64

import nbformat
import papermill
import psutil
import pytest
from conftest import one_line

from prunestudy.errors import InputError
from prunestudy.papers import cards
from prunestudy.study import notebooks
from prunestudy.study.records import Store
from prunestudy.study.session import Session

PAPERS = [card.id for card in cards()]


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


@pytest.mark.parametrize("paper", PAPERS)
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
        # Twice the pixels of the size on the page: the width is in bytes 16 to 19 of a PNG.
        pixels = int.from_bytes(base64.b64decode(output.data["image/png"])[16:20])
        assert about["width"] == pixels // 2


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

    monkeypatch.setattr(notebooks, "run_cells", run_cells)
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
                notebooks.run_cells(notebook)
        else:
            notebooks.run_cells(notebook)
        pids.append(int(cell.outputs[0].text))
    assert len(set(pids)) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_colab_badge_waits_for_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks.places, "checkout", lambda: tmp_path)
    page = tmp_path / "pyproject.toml"
    page.write_text('[tool.prunestudy]\nrepository = ""\n')
    assert notebooks.colab_badge("a.ipynb") == ""
    page.write_text('[tool.prunestudy]\nrepository = "owner/name"\n')
    assert "owner/name/blob/main/notebooks/a.ipynb" in notebooks.colab_badge("a.ipynb")
