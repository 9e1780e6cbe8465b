"""Notebooks through papermill, with tiny settings; bad parameters change nothing on disk."""

import base64

import nbformat
import papermill
import pytest

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
    found = list((tmp_path / "custom" / "records").glob("*/record.json"))
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
    [({"sedes": 1}, "parameter sedes"), ({"seeds": "many"}, "parameter seeds = 'many'")],
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
    with pytest.raises(InputError, match=r"parameter sedes: unknown; allowed are seeds"):
        check_parameters(space | {"sedes": 1}, {"before"}, seeds=int)
    with pytest.raises(InputError, match=r"parameter seeds = 1\.5: must be of type int"):
        check_parameters(space | {"seeds": 1.5}, {"before"}, seeds=int)


def test_executed_copy_is_stale_when_nothing_is_there(tmp_path):
    assert not notebooks.is_current(Store("quick", tmp_path), "quick", PAPERS[0])


def test_colab_badge_waits_for_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "repository", lambda: tmp_path)
    page = tmp_path / "pyproject.toml"
    page.write_text('[tool.prunestudy]\nrepository = ""\n')
    assert notebooks.colab_badge("a.ipynb") == ""
    page.write_text('[tool.prunestudy]\nrepository = "owner/name"\n')
    assert "owner/name/blob/main/notebooks/a.ipynb" in notebooks.colab_badge("a.ipynb")
