"""Notebooks through papermill, with tiny settings; bad parameters change nothing on disk."""

import base64
import json

import nbformat
import papermill
import pytest
from conftest import one_line

from prunestudy.errors import InputError
from prunestudy.papers import cards
from prunestudy.study import notebooks
from prunestudy.study.records import Store
from prunestudy.study.session import check_parameters

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


@pytest.mark.parametrize(
    ("values", "words"),
    [({"sedes": 1}, "parameter = 'sedes'"), ({"seeds": "many"}, "parameter seeds = 'many'")],
)
@pytest.mark.filterwarnings("ignore")
def test_plain_papermill_with_a_bad_parameter_stops_in_the_first_cells(values, words, tmp_path):
    results = tmp_path / "results"
    with pytest.raises(papermill.exceptions.PapermillExecutionError) as caught:
        _execute(PAPERS[0], tmp_path / "out.ipynb", results=str(results), **values)
    assert caught.value.ename == "InputError"
    assert words in caught.value.evalue
    assert caught.value.exec_count <= 4
    assert not results.exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("nothing", 1, "parameter = 'nothing'"),
        ("seeds", "1", "parameter seeds = '1': must be of type int"),
        ("profile", 3, "must be of type str"),
        ("seeds", True, "must be of type int"),
    ],
)
def test_command_refuses_before_a_kernel_starts(name, value, words):
    with pytest.raises(InputError, match="parameter") as caught:
        notebooks.check(notebooks.source_of(PAPERS[0]), {name: value})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_parameters_names_what_is_wrong():
    space = {"before": 0, "seeds": 1}
    check_parameters(space, {"before"}, seeds=int)
    with pytest.raises(InputError, match="parameter = 'sedes': allowed are seeds"):
        check_parameters(space | {"sedes": 1}, {"before"}, seeds=int)
    with pytest.raises(InputError, match=r"parameter seeds = 1\.5: must be of type int"):
        check_parameters(space | {"seeds": 1.5}, {"before"}, seeds=int)


WHOLE = json.dumps({"nbformat": 4, "metadata": {}, "cells": []})


@pytest.mark.parametrize(
    "text",
    [
        *("", "\0", "[]", "3", '{"cells": 3}', WHOLE[:-3], "[" * 100_000),
        WHOLE.replace("4", "3"),
        WHOLE.replace("[]", '[{"cell_type": "code", "metadata": {}, "source": ""}]'),
        WHOLE.replace("[]", '[{"cell_type": "markdown", "metadata": {}, "source": 7}]'),
    ],
)
def test_what_is_no_notebook_is_refused_in_one_line_and_made_again(text, tmp_path, monkeypatch):
    store = Store("quick", tmp_path)
    path = notebooks.executed(store, PAPERS[0])
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        notebooks.read(path)
    assert one_line(caught) == (
        f"notebook = {path}: damaged, or no notebook of format 4; get it back from git, or make it"
        " again"
    )
    assert not notebooks.is_current(store, "quick", PAPERS[0])
    monkeypatch.setattr(notebooks, "source_of", lambda _: path)
    with pytest.raises(InputError, match="damaged, or no notebook"):
        notebooks.execute(PAPERS[0], "quick", str(tmp_path))
    path.unlink()
    assert not notebooks.is_current(store, "quick", PAPERS[0])
    with pytest.raises(InputError, match="not there"):
        notebooks.read(path)


DIRTY = """
import builtins, os, random, sys, warnings
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from prunestudy import errors
clean = [
    not set(dir()) & {"left", "clean_before"}, not plt.get_fignums(), len(In) == 2, Out == {},
    plt.rcParams["lines.linewidth"] == 1.5, not hasattr(builtins, "left"),
    not hasattr(errors, "left"), "LEFT" not in os.environ, "left" not in sys.path,
    os.path.basename(os.getcwd()) != "..", ("ignore", None, UserWarning, None, 7)
    not in warnings.filters, pd.get_option("display.max_rows") == 60,
    torch.get_default_dtype() is torch.float32, torch.is_grad_enabled(),
    get_ipython().display_formatter.formatters["image/png"].type_printers.get(Figure) is not id,
]
drawn = [float(torch.rand(1)), float(np.random.rand()), random.random(), os.getcwd()]
clean_before = left = builtins.left = errors.left = 1
plt.figure(), plt.rc("lines", linewidth=9)
os.environ["LEFT"] = "1"
sys.path.append("left")
os.chdir("/")
warnings.filterwarnings("ignore", category=UserWarning, lineno=7)
pd.set_option("display.max_rows", 7)
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
get_ipython().display_formatter.formatters["image/png"].type_printers[Figure] = id
print(clean, drawn)
"""


@pytest.mark.filterwarnings("ignore")
def test_on_one_kernel_nothing_of_a_notebook_is_left_for_the_next(tmp_path):
    def notebook(name, *sources):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / name)
        return tmp_path / name

    dirty = notebook("dirty.ipynb", DIRTY)
    broken = notebook("broken.ipynb", "import os\nprint(os.getpid())\n1 / 0")
    number = notebook("number.ipynb", "import os\nprint(os.getpid())")
    said = []
    with notebooks.Kernel() as kernel:
        for source in (dirty, dirty, number, number, broken, number, dirty):
            try:
                kernel.execute(source, tmp_path / "out.ipynb", {})
            except InputError as error:
                assert str(error) == "notebook broken: ZeroDivisionError: division by zero"
            (cell,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1:]
            assert cell.execution_count == 1
            said.append(cell.outputs[0].text)
    first, second, *numbers, last = said
    assert first.startswith(f"[{', '.join(['True'] * 15)}] [")
    assert first == second
    assert first.split("]")[0] == last.split("]")[0]  # what chance begins with differs
    # One kernel, until a notebook fails.
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]


def test_colab_badge_waits_for_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks.places, "checkout", lambda: tmp_path)
    page = tmp_path / "pyproject.toml"
    page.write_text('[tool.prunestudy]\nrepository = ""\n')
    assert notebooks.colab_badge("a.ipynb") == ""
    page.write_text('[tool.prunestudy]\nrepository = "owner/name"\n')
    assert "owner/name/blob/main/notebooks/a.ipynb" in notebooks.colab_badge("a.ipynb")
