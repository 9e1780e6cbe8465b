"""The checkout itself: one source of dependencies, notebooks without outputs, a README in step."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from prunestudy import datasets, places
from prunestudy.errors import InputError
from prunestudy.study import provenance, tables
from prunestudy.study.collect import drawn_arrays
from prunestudy.study.exercises import exercise
from prunestudy.study.lines import read_lines
from prunestudy.study.plan import plan
from prunestudy.study.records import Store, repository

ROOT = repository()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_names_only_python_pip_and_the_project():
    lines = (ROOT / "environment.yml").read_text().split("dependencies:")[1].splitlines()
    names = [line.strip().lstrip("- ") for line in lines if line.strip()]
    assert [re.split(r"[<>=:]", name)[0] for name in names] == ["python", "pip", "pip", "e ."]


def test_torch_is_bounded_below_and_not_to_one_minor_version():
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "torch>=2.11,<3" in needs
    assert "torchvision>=0.26,<1" in needs


def test_the_lock_names_every_dependency_with_hashes_and_no_host():
    text = (ROOT / "environment.lock").read_text()
    assert "//" not in text
    locked = re.findall(r"^([a-z0-9.-]+)==[^ ]+ \\\n    --hash=sha256:[0-9a-f]{64}", text, re.M)
    assert len(locked) == len(re.findall(r"^[^ ]", text, re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.match(r"[a-zA-Z0-9-]+", need)[0] for group in groups for need in group}
    names -= {"prunestudy"}
    assert names <= set(locked)


@pytest.mark.parametrize(
    ("listed", "variables"),
    [
        ("", {}),
        ("global.timeout='9'", {}),
        ("global.index-url='file:///a b'", {"UV_DEFAULT_INDEX": "file:///a b"}),
        (
            "global.extra-index-url='a\\nb'\n:env:.find-links='x y'\nglobal.find-links='z'",
            {
                "UV_INDEX": "a b",
                "UV_FIND_LINKS": "x,y",
                "UV_INDEX_STRATEGY": "unsafe-best-match",
            },
        ),
    ],
)
def test_uv_is_told_what_pip_is_told(listed, variables, monkeypatch):
    install = runpy.run_path(str(ROOT / ".ci/install"))
    said = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: said)
    assert install["settings"]() == variables


def test_where_uv_fails_pip_installs(monkeypatch, capsys):
    install = runpy.run_path(str(ROOT / ".ci/install"))
    called = []

    def run(command, **options):
        called.append(command[2:])
        failed = command[2] == "uv"
        return subprocess.CompletedProcess(command, int(failed), stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    assert install["main"](["-e", "."]) == 0
    pip = ["pip", "--disable-pip-version-check", "install"]
    assert called[0] == [*pip, "-qq", "uv"]
    assert called[-1] == [*pip, "-qq", "-e", "."]
    assert capsys.readouterr().err == "uv did not install it, see above: pip does, and is slower\n"


def test_outside_a_checkout_results_and_data_are_below_the_current_folder(tmp_path, monkeypatch):
    package = tmp_path / "site-packages/prunestudy"
    monkeypatch.setattr(places, "_PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNESTUDY_DATA", raising=False)
    assert places.checkout() is None
    assert places.notebooks() == package / "notebooks"
    assert Store("quick").folder == tmp_path / "results/quick"
    assert datasets.data_root() == tmp_path / "data"
    # nor is a project that has a copy of the package below it
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    assert places.checkout() is None
    monkeypatch.setattr(places, "_PACKAGE", tmp_path / "lib/prunestudy")
    assert places.checkout() == tmp_path


def test_the_wheel_holds_workflow_cards_and_notebooks():
    """The notebooks by a link, which setuptools follows."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    lib = ROOT / "lib"
    for package, patterns in data["package-data"].items():
        folder = lib / package.replace(".", "/")
        assert all(list(folder.glob(pattern)) for pattern in patterns), package
    shipped = {path.name for path in (lib / "prunestudy/notebooks").glob("*.ipynb")}
    assert shipped == {path.name for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stored_without_outputs_and_say_more_than_they_compute(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert len(notebook.cells) - len(code) > len(code)
    shown = [cell for cell in code if "loop" not in cell.metadata.get("tags", [])]
    lengths = {cell.id: sum(map(bool, map(str.strip, cell.source.splitlines()))) for cell in shown}
    assert not {name: lines for name, lines in lengths.items() if lines > 12}
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_exercises_take_their_solution_and_refuse_a_wrong_answer(path):
    cells = nbformat.read(path, as_version=4).cells
    tagged = {"exercise": [], "solution": []}
    for cell in cells:
        for tag in cell.metadata.get("tags", []):
            tagged.get(tag, []).append(cell.source)
    assert len(tagged["exercise"]) == len(tagged["solution"]) >= 5
    for question, text in zip(tagged["exercise"], tagged["solution"], strict=True):
        solution = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
        blank, check = question.split("\n\n\n", 1)
        name = re.match(r"def (\w+)\(", blank)[1]
        room = {"exercise": exercise}
        exec("import torch", room)
        exec(f"{blank}\n{check}", room)  # not answered: no error
        exec(f"{solution}\n{check}", room)
        with pytest.raises(AssertionError):
            exec(
                f"{name} = type('Wrong', (), {{'__call__': lambda *a: 7.0, "
                f"'__name__': 'wrong'}})()\n{check}",
                room,
            )
        if "lambda r" in check:  # what knows the cases by heart fails on random ones
            room["exercise"] = lambda answer, cases, draw: exercise(
                _by_heart(answer.__name__, cases), cases, draw
            )
            with pytest.raises(AssertionError, match=f"(?s){name}.*got 7"):
                exec(f"{solution}\n{check}", room)


def test_a_wrong_answer_is_wrong_with_optimised_code():
    code = "from prunestudy.study.exercises import exercise; exercise(lambda: 1, [((), 2)])"
    said = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, check=False)
    assert b"AssertionError: <lambda>(): got 1, expected 2" in said.stderr


def test_what_a_user_sets_for_make_is_one_word(tmp_path):
    (tmp_path / "prunestudy").write_text('#!/bin/sh\nprintf "%s\\n" "$@"')
    (tmp_path / "prunestudy").chmod(0o755)
    (tmp_path / ".venv").mkdir()
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOBS": "'; touch OWNED; '"}
    env.pop("MAKEFLAGS", None)  # of `make test`
    words = ["make", "--no-print-directory", "-f", ROOT / "Makefile", "-o", ".venv/ready", "study"]
    words += ["PROFILE=x'; touch OWNED; echo 'y", "PAPER=gdp *", 'RESULTS="; touch OWNED; "']
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env}
    said = subprocess.run(words, check=True, **options).stdout.splitlines()
    assert said == [
        *("study", "--profile", "x'; touch OWNED; echo 'y", "--results", '"; touch OWNED; "'),
        *("--paper", "gdp", "--paper", "*", "--jobs", "'; touch OWNED; '", "--executor", "local"),
    ]
    assert not (tmp_path / "OWNED").exists()


def _by_heart(name, cases):
    known = {str(arguments): expected for arguments, expected in cases}

    def answer(*arguments):
        return known.get(str(arguments), 7.0)

    answer.__name__ = name
    return answer


@pytest.fixture(scope="module")
def readme():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs/readme.py")))


def test_readme_has_a_row_for_each_paper_made_from_the_committed_records(readme):
    page = (ROOT / "README.md").read_text()
    found = readme.judged(Store("cpu", ROOT / "results"), "cpu")
    assert readme.filled(page, found) == page
    rows = [*readme.lines(found)]
    assert [row["notebook"][1:3] for row in rows] == ["01", "02", "03", "04", "05"]
    ways = {"confirmed": "contradicted", "contradicted": "confirmed"}
    turned = {
        paper: t.assign(low=-t.high, high=-t.low, verdict=t.verdict.replace(ways))
        for paper, t in found.items()
    }
    for row, other in zip(rows, readme.lines(turned), strict=True):
        even = r"ahead on (\d+), behind on \1 of|^Undecided on (\d+) of \2 net"
        even = re.search(even, row["came out"])
        assert even or row["came out"] != other["came out"]
    with pytest.raises(InputError, match="no pair of results comments"):
        readme.filled("nothing", found)


def test_a_row_of_readme_says_on_how_many_nets(readme):
    """Of two controls the harder one counts on each net; a verdict takes the place of both."""
    names = "paper claim says mark why scored model dataset control n mean low high verdict".split()
    few = "not tested: fewer than eight seeds"
    base = ("gdp", "ahead", "It is ahead.", "P", "", "top1")
    rows = pd.DataFrame(
        [
            (*base, "lenet5", "mnist", "random", 5, 0.2, 0.1, 0.3, few),
            (*base, "lenet5", "mnist", "group_l2", 5, 0.1, -0.1, 0.3, few),
            (*base, "lenet5", "fashion_mnist", "random", 5, -0.2, -0.3, -0.1, few),
            (*base, "lenet5", "fashion_mnist", "group_l2", 5, 0.2, 0.1, 0.3, few),
            (*base, "resnet20", "cifar10", "group_l2", 5, 0.2, 0.1, 0.3, few),
            (*base, "resnet8", "cifar10", "group_l2", 5, 0.2, 0.1, 0.3, ""),
        ],
        columns=names,
    ).assign(failures="", chosen_by="all")
    said = (
        "So far ahead on 1, behind on 1, not told apart on 1 of 3 nets, against the strongest of 2 "
    )
    assert readme.came_out(rows) == f"{said}controls."
    assert readme.nets(rows).startswith("3: LeNet-5 on MNIST, LeNet-5 on Fashion-MNIST, ResNet-20")
    one = rows[rows.model == "resnet20"]
    said_of_one = "So far ahead on ResNet-20 on CIFAR-10, against group L2, one shot."
    assert readme.came_out(one) == said_of_one
    chosen = one.assign(chosen_by="search")
    assert readme.came_out(chosen).endswith("on CIFAR-10, against the strongest control.")
    rows = rows.assign(chosen_by="claim")
    rows.loc[4, "verdict"] = "confirmed"
    assert (
        readme.came_out(rows[rows.model == "resnet20"])
        == "Confirmed on 1 of 1 net (+20.00 points), against group L2, one shot."
    )
    assert (
        readme.came_out(rows[rows.model == "resnet20"].assign(scored=""))
        == "Confirmed on 1 of 1 net, against group L2, one shot."
    )
    assert readme.nets(rows[rows.model == "resnet20"]) == "1: ResNet-20 on CIFAR-10"
    rows.loc[4, "chosen_by"] = "search"
    said = "Confirmed on 1 of 1 net (+20.00 points), against the strongest control."
    more = "So far behind on 1, not told apart on 1 of 2 nets, against the strongest of 2 controls."
    assert readme.came_out(rows) == f"{said} {more}"
    assert readme.came_out(rows.tail(1)) == "Described, not tested."
    one = rows[rows.model == "resnet20"].assign(failures="random fails on seed 11")
    more = "On ResNet-20 on CIFAR-10, random fails on seed 11; on the others the difference is"
    assert readme.came_out(one) == f"{said} {more} +20.00 points."
    assert readme.nets(rows.tail(1)) == "none"


def test_the_instructors_page_leads_to_every_notebook_and_counts_its_exercises():
    text = (ROOT / "notebooks/README.md").read_text()
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        exercises = sum("exercise" in cell.metadata.get("tags", []) for cell in cells)
        row = rf"^\| \[{path.stem[:2]}\]\({path.name}\) [^|]+ \| \d+ \| {exercises} \| "
        assert re.search(row, text, re.MULTILINE), path.name


def test_the_instructors_command_takes_the_solutions_out(tmp_path):
    text = (ROOT / "notebooks/README.md").read_text()
    words = next(line for line in text.splitlines() if line.startswith("jupyter nbconvert")).split()
    source = ROOT / "notebooks/01_training_sparse_networks.ipynb"
    words[words.index("notebooks/*.ipynb")] = str(source)
    words[words.index("class")] = str(tmp_path)
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    before, after = (
        nbformat.read(f / source.name, as_version=4).cells for f in (source.parent, tmp_path)
    )
    kept = [c.source for c in before if "solution" not in c.metadata.get("tags", [])]
    assert [cell.source for cell in after] == kept
    assert len(kept) < len(before)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_of_notebooks_hold_in_executed_copies_too(path):
    """A copy lies in another folder: it can link to other notebooks and to the web only."""
    cells = nbformat.read(path, as_version=4).cells
    text = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = {link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    assert links <= {each.name for each in NOTEBOOKS}


@pytest.mark.parametrize("profile", ["cpu", "cpu-long"])
def test_committed_tables_are_those_of_the_records(profile):
    """Of cpu-long, of the records that the tables name: a study that goes on has more."""
    names, folder = ["runs", "summary"], ROOT / f"results/{profile}/tables"
    shallow = provenance._git(ROOT, "rev-parse", "--is-shallow-repository")
    names += ["verdicts"] * (shallow == "false")  # else no rule has an age
    paths = {name: folder / f"{name}.csv" for name in names}
    listed = set(pd.read_csv(paths["runs"])["run"])
    items = [item for item in plan(profile) if profile == "cpu" or item.settings.run in listed]
    store = Store(profile, ROOT / "results")
    made = (*tables.build(store, items), tables.verdicts(store, items))
    for (name, path), table in zip(paths.items(), made, strict=False):
        assert path.read_text(encoding="utf-8") == tables.text_of(table), name


@pytest.mark.parametrize("profile", ["cpu", "cpu-long"])
def test_committed_records_are_whole_and_have_the_arrays_that_are_drawn(profile):
    store = Store(profile, ROOT / "results")
    records, drawn = read_lines(store.collected), drawn_arrays(profile)
    assert records.keys() <= drawn.keys()
    for item in plan(profile):
        record = store.read(item.settings)
        assert record or profile != "cpu" or item.purpose == "search"  # it is not at its end
        if record:
            assert store.history(record["run"]) or record["status"] == "diverged"
    for run, record in records.items():
        names = {name for name in record["files"]["arrays"] if name.startswith(drawn[run][1])}
        assert not names or store.arrays(run).keys() == names


def tracked(folder="."):
    """Files that git tracks below `folder` of the checkout."""
    call = ["git", "-C", str(ROOT), "ls-files", "-z", folder]
    names = subprocess.run(call, capture_output=True, text=True, check=False).stdout.split("\0")
    return [ROOT / name for name in names if name]


def test_files_cards_and_results_stay_within_their_budgets():
    files = tracked()
    assert len(files) <= 450
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    for folder in (ROOT / "results").iterdir():
        assert len(tracked(folder)) <= 35, folder.name
    cards = [path.read_text("utf-8").splitlines() for path in (ROOT / "lib").rglob("*.toml")]
    assert sum(map(len, cards)) <= 1900
    assert max(len(line) for card in cards for line in card) <= 100
    code = {
        path: len(path.read_text("utf-8").splitlines()) for path in (ROOT / "lib").rglob("*.py")
    }
    assert max(code.values()) <= 300


def test_tracked_results_hold_no_path_or_name_of_a_machine():
    for path in tracked("results"):
        if path.suffix in (".json", ".csv", ".md", ".ipynb", ".svg"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\Users)", text), path


@pytest.mark.slow
def test_killed_job_ends_with_the_records_of_an_undisturbed_one(tmp_path):
    script = Path(__file__).with_name("kill_study.py")
    words = [sys.executable, str(script), "--kills", "2", "--longest", "9", "--folder"]
    words += [str(tmp_path), "--experiment", "sparse_gates.digits"]
    said = subprocess.run(words, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "0 differ" in said.stdout
