"""A sixth paper, as the page on adding one says: its method, card and notebook, and two lines."""

import json
import re
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from conftest import CARD

from prunestudy.study.records import repository

ROOT = repository()
PAGE = (ROOT / "docs/add_a_paper.md").read_text(encoding="utf-8")
ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from arrange import paper_page, verdicts_page
from prunestudy.papers import card
from prunestudy.study.records import Store
from readme import judged, lines
found = judged(Store("quick", sys.argv[2]), "quick")
pages = paper_page(card("halfway"), found["halfway"]), verdicts_page(found)
print(json.dumps([*lines(found), *pages]))
"""
NOTEBOOK = """
from prunestudy.study import figures
study = Session.of("halfway", globals())
study.run()
figures.metric_against_target(study.summary, study.card, "lenet300", "digits")
study.says("halfway", "random")
"""


@pytest.fixture
def sixth(checkout):
    """The checkout with that paper beside the toy one."""
    methods, papers = checkout / "lib/prunestudy/methods", checkout / "lib/prunestudy/papers"
    (methods / "halfway.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    for path, before, line in (
        (methods / "__init__.py", "_METHODS = {\n", '    "halfway": ("halfway:Halfway", ""),\n'),
        (
            checkout / "lib/prunestudy/study/figures/__init__.py",
            "_LOOK = {\n",
            '    "halfway": ("#000000", "o"),\n',
        ),
    ):
        text = path.read_text()
        assert text.count(before) == 1
        path.write_text(text.replace(before, before + line))
    card = CARD.replace("99_toy", "06_halfway").replace("A toy", "Half-way pruning")
    card = card.replace('"toy"', '"halfway"').replace('"magnitude"', '"halfway"')
    card = card.replace("epochs = 1", "epochs = 4").replace("[0.9]", "[0.5]")
    lines = [line.removeprefix("    ") for line in card.splitlines()]
    (papers / "halfway.toml").write_text("\n".join(lines).replace("seeds = 1", "seeds = 2"))
    source = nbformat.read(ROOT / "notebooks/01_training_sparse_networks.ipynb", as_version=4)
    given = [cell for cell in source.cells if "parameters" in cell.metadata.get("tags", [])]
    source.cells = [*given, nbformat.v4.new_code_cell(NOTEBOOK.strip())]
    nbformat.write(source, checkout / "notebooks/06_halfway.ipynb")
    return checkout


def test_a_paper_is_its_method_card_and_notebook(sixth, start, tmp_path):
    """Planned, trained, judged, executed, and on the pages that papers are on."""
    words = "study", "--profile", "quick", "--paper", "halfway", "--results", "results"
    out, err = (process := start(*words)).communicate(timeout=300)
    assert process.returncode == 0, out + err
    folder = tmp_path / "results/quick"
    verdicts = pd.read_csv(folder / "tables/verdicts.csv")
    judged = verdicts[["paper", "method", "control", "n"]].to_numpy().tolist()
    assert judged[0] == ["halfway", "halfway", "random", 2]
    summary = pd.read_csv(folder / "tables/summary.csv").set_index("method")
    assert summary.sparsity["halfway"] == pytest.approx(0.5, abs=1e-4)
    executed = nbformat.read(folder / "notebooks/06_halfway.ipynb", as_version=4).cells[-1]
    shown = [output.get("data", {}) for output in executed.outputs]
    assert any("half-way magnitude" in data.get("text/markdown", "") for data in shown)
    assert any("image/png" in data for data in shown)

    env = {"PYTHONPATH": str(sixth / "lib"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    asked = [sys.executable, "-c", ASK, str(ROOT / "docs"), str(tmp_path / "results")]
    said = subprocess.run(asked, env=env, capture_output=True, text=True, check=True)
    row, toy, page, table = json.loads(said.stdout)
    assert toy["nets"] == "none"
    assert row["paper"] == "Half-way pruning (2000)"
    assert row["nets"] == "1: LeNet-300-100 on Digits"
    assert re.search(r"So far .* on .* on Digits, against random\.$", row["came out"])
    assert "[The notebook, executed](../notebooks/06_halfway.ipynb)" in page
    assert table.count('data-paper="Half-way pruning"') == 1
