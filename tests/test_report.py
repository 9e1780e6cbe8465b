"""Site and slides: made by make from executed notebooks, looked at in Chromium, network off."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from browser import CHROMIUM, DRIVER, Browser
from bs4 import BeautifulSoup
from conftest import one_line, tree
from filelock import FileLock

from prunestudy.errors import InputError
from prunestudy.papers import cards
from prunestudy.study.notebooks import executed, stamp
from prunestudy.study.records import Store, repository

ROOT = repository()
REAL, CURRENT = ("overview", "sparse_gates"), "gdp"
chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver here")
# Boxes of tables that are wider than the screen, and scroll.
_SCROLLING = """
return [...document.querySelectorAll(".table-wrapper, .output.text_html")].filter((box) =>
  box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX === "auto").length
"""


def make(*words, results):
    """Call make, with this interpreter's programs in place of those in .venv."""
    words = [*words, f"RESULTS={results}", f"BIN={Path(sys.executable).parent}"]
    words = ["make", "-o", ".venv/ready", *words]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def soup(path):
    return BeautifulSoup(path.read_bytes(), "html.parser")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Profile quick with two real notebooks and four of a line; that of GDP is current.

    With the pages made of them; the processes that run tests share them, made by the first.
    """
    root = tmp_path_factory.getbasetemp() / "some results"
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parents[1] / root.name
    with FileLock(f"{root}.lock"):
        if not root.exists():
            fill(Store("quick", root))
            if "PRUNESTUDY_PAGES" not in os.environ:
                said = make("report", "slides", "PROFILE=quick", results=root)
                assert (said.returncode, said.stderr) == (0, "")
    return root


def fill(store):
    (store.folder / "notebooks").mkdir(parents=True)
    for paper in (each.id for each in cards()):
        path = executed(store, paper)
        shutil.copy(ROOT / f"results/cpu/notebooks/{path.name}", path)
        if paper not in REAL:
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {paper}")])
            if paper == CURRENT:
                cells = json.loads(nbformat.writes(notebook))["cells"]
                notebook.metadata["prunestudy"] = stamp(store, "quick", paper, cells)
            nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def pages(results):
    """The folder with report/ and slides/; that of PRUNESTUDY_PAGES, where it is set."""
    return Path(os.environ.get("PRUNESTUDY_PAGES", results / "quick")).resolve()


@pytest.fixture(scope="module")
def browser():
    opened = Browser()
    yield opened
    opened.close()


def html(folder):
    found = [
        page for place in ("", "notebooks/", "papers/") for page in folder.glob(f"{place}*.html")
    ]
    assert len(found) >= 6
    return sorted(found)


def assert_whole(seen, page):
    for wrong in ("console", "outside", "marks", "wrong", "unloaded", "silent"):
        assert seen[wrong] == [], page.name


# --- in the browser


@chromium
def test_every_page_of_the_site_is_whole_with_the_network_off(pages, browser):
    formulas = images = scrolling = 0
    for page in html(pages / "report"):
        seen = browser.open(page)
        assert_whole(seen, page)
        formulas, images = formulas + seen["drawn"], images + seen["images"]
        assert browser.background() > 200
        browser.screen(390, dark=True)
        assert browser.background() < 60, page.name
        assert browser.overflow() <= 0, page.name
        scrolling += browser.run(_SCROLLING)
    assert formulas > 50
    assert images > 10
    assert scrolling > 5


@chromium
def test_verdicts_are_filtered_by_paper_net_and_outcome(pages, browser):
    browser.open(pages / "report/verdicts.html")
    rows = "return [...document.querySelectorAll('table.verdicts tbody tr')]"
    seen = f"{rows}.filter((row) => row.offsetParent).map((row) => row.dataset.paper)"
    everything = browser.run(seen)
    assert set(everything) == {card.short or card.title for card in cards() if card.is_paper}
    choose = """const choice = document.querySelector(`select[data-filter=${arguments[0]}]`);
        choice.value = arguments[1]; choice.dispatchEvent(new Event("change"));"""
    browser.run(choose, "paper", "GDP")
    of_gdp = browser.run(seen)
    assert set(of_gdp) == {"GDP"}
    assert len(of_gdp) == everything.count("GDP")
    browser.run(choose, "outcome", "by construction")
    both = browser.run(seen)
    assert 0 < len(both) < len(of_gdp)
    said = browser.run("return document.querySelector('output.shown').textContent")
    assert said == f"{len(both)} of {len(everything)} rows"


@chromium
def test_slides_are_whole_with_the_network_off(pages, browser):
    formulas = 0
    for page in html(pages / "slides"):
        seen = browser.open(page)
        assert_whole(seen, page)
        formulas += seen["drawn"]
        assert browser.run("return Reveal.hasPlugin('notes')")
        steps = "for (let i = 0; i < 999; i++) Reveal.next(); return Reveal.isLastSlide()"
        assert browser.run(steps)
        # Nothing sticks out to the side: what is wide scrolls inside its box.
        wide = """return Reveal.getSlides().filter((s) => s.scrollWidth > s.clientWidth + 1)
            .map((s) => s.innerText.slice(0, 60))"""
        assert browser.run(wide) == [], page.name
        assert browser.console() == []
    assert formulas > 30
    browser.open(pages / "slides/01_training_sparse_networks.slides.html")
    texts = browser.run("return Reveal.getSlides().map((s) => s.textContent)")
    name = "01_training_sparse_networks.ipynb"
    cells = nbformat.read(ROOT / f"results/cpu/notebooks/{name}", as_version=4).cells
    solved = [cell for cell in cells if "def " in cell.source and "Solution" in cell.source]
    assert sum("def " in text and "Solution" in text for text in texts) == len(solved) > 4


# --- without one


@pytest.mark.parametrize("name", ["report", "slides"])
def test_links_and_files_hold(name, pages):
    parsed = {page: soup(page) for page in html(pages / name)}
    named = {page: {tag["id"] for tag in found.find_all(id=True)} for page, found in parsed.items()}
    checked = 0
    for page, found in parsed.items():
        wanted = [tag["href"] for tag in found.find_all(["a", "link"], href=True)]
        wanted += [tag["src"] for tag in found.find_all(["img", "script"], src=True)]
        for address in wanted:
            if address.startswith(("http:", "https:", "data:")):
                continue
            path, _, anchor = unquote(address).partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            assert target.is_file(), f"{page.name}: {address}"
            if anchor and target in named:
                assert anchor in named[target], f"{page.name}: {address}"
            checked += 1
    assert checked > 50


def test_the_first_page_names_the_notebooks_older_than_their_records(pages):
    texts = soup(pages / "report/index.html").find_all("p")
    line = next(text for text in texts if text.text.startswith("Executed before"))
    old = sorted(each.notebook for each in cards() if each.id != CURRENT)
    assert [tag["href"] for tag in line.find_all("a")] == [f"notebooks/{n}.html" for n in old]


def test_each_paper_has_a_page_with_its_claims_and_its_notebook(pages):
    for card in (each for each in cards() if each.is_paper):
        page = soup(pages / f"report/papers/{card.id}.html")
        claims = [row.find("td").text for row in page.find("table").find_all("tr")[1:]]
        wanted = [f"{claim.text} [{claim.mark}]" for claim in card.claims]
        assert [re.sub(r"\W", "", text) for text in claims] == [
            re.sub(r"\W", "", text) for text in wanted
        ]
        assert page.find("a", href=f"../notebooks/{card.notebook}.html")


def test_figures_keep_their_text_and_size_and_empty_outputs_go(pages, results):
    cells = nbformat.read(executed(Store("quick", results), "sparse_gates"), as_version=4).cells
    shown = [output for cell in cells for output in cell.get("outputs", [])]
    wanted = [out.metadata["image/png"] for out in shown if "image/png" in out.get("data", {})]
    page = soup(pages / "report/notebooks/01_training_sparse_networks.html")
    found = page.select("img.figure")
    assert [(f["alt"], int(f["width"])) for f in found] == [(w.alt, w.width) for w in wanted]
    assert "IPython.core.display" not in page.text


@pytest.mark.parametrize("text", [None, "cut off", "no JSON", "[1]", "{}"])
def test_a_notebook_that_is_not_whole_is_refused_before_anything_is_written(
    text, results, tmp_path, monkeypatch
):
    shutil.copytree(results / "quick/notebooks", tmp_path / "quick/notebooks")
    path = tmp_path / "quick/notebooks/00_overview.ipynb"
    whole = path.read_text()
    path.unlink()
    if text:
        path.write_text(whole[:5000] if text == "cut off" else text)
    before = tree(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs")
    arrange = runpy.run_path(str(ROOT / "docs/arrange.py"))["main"]
    with pytest.raises(InputError) as caught:
        arrange("quick", str(tmp_path))
    way_out = "is not a whole notebook; `make study PROFILE=quick` executes it anew"
    assert one_line(caught) == f"notebook = {path}: {way_out}"
    assert tree(tmp_path) == before


def test_make_says_one_line(tmp_path):
    line, stopped = make("report", "PROFILE=fast", results=tmp_path).stderr.splitlines()
    assert line.startswith("profile = 'fast': allowed are")
    assert re.match(r"make(\[\d+\])?: \*\*\* ", stopped)
    assert tree(tmp_path) == {}
