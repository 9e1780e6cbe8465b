"""The report and the slides: made from committed records, looked at in Chromium, network off."""

import io
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from browser import CHROMIUM, DRIVER, Browser
from bs4 import BeautifulSoup
from conftest import one_line, tree
from IPython.core.pylabtools import retina_figure
from PIL import Image

from prunestudy.errors import InputError
from prunestudy.papers import card
from prunestudy.study import report, tables
from prunestudy.study.figures import inline
from prunestudy.study.records import Store, repository
from prunestudy.study.report import lessons, outputs, slides

ROOT = repository()
PAPER, NOTEBOOK = "sparse_gates", "01_training_sparse_networks"
chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver here")


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Profile cpu with one paper alone: its executed notebook, tables and records."""
    root = tmp_path_factory.mktemp("results")
    real, small = ROOT / "results/cpu", root / "cpu"
    (small / "notebooks").mkdir(parents=True)
    shutil.copy(real / f"notebooks/{NOTEBOOK}.ipynb", small / "notebooks")
    runs, summary = (tables.read_table(real / f"tables/{n}.csv") for n in ("runs", "summary"))
    own = runs[runs["paper"] == PAPER]
    (small / "tables").mkdir()
    (small / "tables/runs.csv").write_text(tables.text_of(own))
    (small / "tables/summary.csv").write_text(tables.text_of(summary[summary["paper"] == PAPER]))
    (small / "records").mkdir()
    for run in own["run"]:
        (small / "records" / run).symlink_to(real / "records" / run)
    return root


@pytest.fixture(scope="session")
def site(results, tmp_path_factory):
    """A report; that of the environment variable PRUNESTUDY_REPORT, where it is set."""
    there = os.environ.get("PRUNESTUDY_REPORT")
    made = tmp_path_factory.mktemp("report") / "site"
    return Path(there).resolve() if there else report.build("cpu", str(results), str(made))


@pytest.fixture(scope="session")
def shown(results, tmp_path_factory):
    """A folder of slides; that of PRUNESTUDY_SLIDES, where it is set."""
    there = os.environ.get("PRUNESTUDY_SLIDES")
    made = tmp_path_factory.mktemp("slides")
    if not there:
        slides.build("cpu", [PAPER], str(results), str(made))
    return Path(there).resolve() if there else made


@pytest.fixture(scope="module")
def browser():
    opened = Browser()
    yield opened
    opened.close()


def html(folder):
    found = sorted(path for path in folder.rglob("*.html") if "_static" not in path.parts)
    assert found
    return found


# --- in the browser


@chromium
def test_every_page_of_the_report_is_whole_with_the_network_off(site, browser):
    formulas = images = 0
    for page in html(site):
        seen = browser.open(page)
        for wrong in ("console", "outside", "marks", "wrong", "unloaded", "silent"):
            assert seen[wrong] == [], page.name
        formulas, images = formulas + seen["drawn"], images + seen["images"]
        assert browser.background() > 200
        browser.screen(390, dark=True)
        assert browser.background() < 60, page.name
        assert browser.overflow() <= 0, page.name
        browser.screen(390)
        assert browser.overflow() <= 0, page.name
    assert formulas > 50
    assert images > 10


@chromium
def test_tables_sort_by_click_and_by_key(site, browser):
    browser.open(site / "tables.html")
    column = """
        const table = document.querySelector("table.sortable");
        const heads = [...table.tHead.rows[0].cells];
        const at = heads.findIndex((cell) => cell.innerText.startsWith("result"));
        const head = heads[at];
        if (arguments[0] === "click") head.click();
        else head.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
        return [head.ariaSort, ...[...table.tBodies[0].rows].map((r) => r.cells[at].innerText)];
    """
    order, *up = browser.run(column, "click")
    numbers = [float(text.split()[0].strip("%")) for text in up]
    assert order == "ascending"
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 3
    order, *down = browser.run(column, "key")
    assert order == "descending"
    assert [float(text.split()[0].strip("%")) for text in down] == sorted(numbers, reverse=True)


@chromium
def test_slides_are_whole_with_the_network_off(shown, browser):
    for page in html(shown):
        seen = browser.open(page)
        for wrong in ("console", "outside", "marks", "wrong", "unloaded", "silent"):
            assert seen[wrong] == [], page.name
        assert seen["drawn"] > 5
        count = browser.run("return Reveal.getTotalSlides()")
        assert count > 20
        steps = "for (let i = 0; i < 999; i++) Reveal.next(); return Reveal.isLastSlide()"
        assert browser.run(steps)
        # Nothing sticks out to the side: what is wide scrolls inside its box.
        wide = """return Reveal.getSlides().filter((s) => s.scrollWidth > s.clientWidth + 1)
            .map((s) => s.innerText.slice(0, 60))"""
        assert browser.run(wide) == [], page.name
        assert browser.console() == []


@chromium
def test_the_browser_sees_what_is_wrong(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        """<!DOCTYPE html><meta name="viewport" content="width=device-width">
        <p>$$x$$ and \\(y\\)</p><code>$$code$$</code>
        <img src="none.png" alt=" "><img src="https://elsewhere.test/x.png" alt="x">
        <span class="katex-error">z</span><div style="width: 500px">wide</div>
        <script>console.error("oh")</script>"""
    )
    seen = browser.open(page, 390, dark=True)
    assert seen["marks"] == ["$$x$$ and \\(y\\)"]
    assert seen["wrong"] == ["z"]
    assert seen["unloaded"] == [f"{tmp_path.as_uri()}/none.png", "https://elsewhere.test/x.png"]
    assert seen["silent"] == [f"{tmp_path.as_uri()}/none.png"]
    assert seen["outside"] == ["https://elsewhere.test/x.png"]
    assert any("oh" in line for line in seen["console"])
    assert browser.overflow() > 100


# --- without one


@pytest.mark.parametrize("made", ["site", "shown"])
def test_links_and_files_hold(made, request):
    folder = request.getfixturevalue(made)
    parsed = {page: BeautifulSoup(page.read_bytes(), "html.parser") for page in html(folder)}
    named = {page: {tag["id"] for tag in soup.find_all(id=True)} for page, soup in parsed.items()}
    for page, soup in parsed.items():
        wanted = [tag["href"] for tag in soup.find_all(["a", "link"], href=True)]
        wanted += [tag["src"] for tag in soup.find_all(["img", "script"], src=True)]
        for address in wanted:
            if address.startswith(("http:", "https:", "data:")):
                continue
            path, _, anchor = unquote(address).partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            assert target.is_file(), f"{page.name}: {address}"
            if anchor and target in named:
                assert anchor in named[target], f"{page.name}: {address}"


@pytest.mark.parametrize("changed", [False, True])
def test_the_first_page_names_notebooks_older_than_their_records(
    changed, results, tmp_path, monkeypatch
):
    monkeypatch.setattr(report.pages, "is_current", lambda *_: not changed)
    monkeypatch.setattr(report.pages, "_front", lambda _: dict.fromkeys(("says", "figure", "alt")))
    store = Store("cpu", results)
    notebooks = sorted((results / "cpu/notebooks").iterdir())
    report.pages.write(tmp_path, store, "cpu", notebooks, report.pages.read_tables(store))
    line = "Executed before their text or their records became what they are now: [01](notebooks/"
    assert (line in (tmp_path / "index.md").read_text()) == changed


def test_a_row_leads_to_its_runs_and_a_run_to_its_record(site, results):
    summary = tables.read_table(results / "cpu/tables/summary.csv")
    soup = BeautifulSoup((site / "tables.html").read_bytes(), "html.parser")
    rows = soup.select_one("table.sortable").select("tbody tr")
    shown = tables.readable(summary)
    assert [[td.text for td in row.select("td")] for row in rows] == shown.astype(
        str
    ).values.tolist()
    runs = BeautifulSoup((site / f"runs/{PAPER}.html").read_bytes(), "html.parser")
    for row, setting in zip(rows, summary.itertuples(), strict=True):
        anchor = row.select_one("a")["href"].partition("#")[2]
        first = runs.find(id=anchor)
        run = Store("cpu", results).load(first.text)["settings"]
        assert (run["method"], run["model"], run["dataset"]) == (
            *(setting.method, setting.model),
            setting.dataset,
        )
        record = site / "runs" / first.select_one("a")["href"]
        assert record.read_text() == Store("cpu", results).shown(first.text)


def test_a_paper_s_page_has_every_claim_with_its_rule_and_every_published_number(site):
    page = BeautifulSoup((site / f"papers/{PAPER}.html").read_bytes(), "html.parser")
    text = " ".join(page.get_text(" ").split())
    paper = card(PAPER)
    for claim in paper.claims:
        assert claim.text in text
        assert claim.place in text
    for number in paper.published:
        assert number.source in text
    assert "sparse_gates - dense of metric >= -0.001 lenet5, mnist, 95% of weights removed" in text


def test_figures_say_what_they_carry_or_what_stands_above_them(tmp_path):
    pixel = "iVBORw0KGgo="
    picture = {"output_type": "display_data", "data": {"image/png": pixel}}
    remote = "[![Open](https://elsewhere/x.svg)](https://elsewhere)"
    about = {"image/png": {"alt": 'a <b> & "c"', "width": 7, "height": 5}}
    cells = [
        {"cell_type": "markdown", "source": "## Head\n\nSee *what* [is](a.ipynb) here. More."},
        {"cell_type": "code", "outputs": [{**picture, "metadata": about}]},
        {"cell_type": "code", "outputs": [{**picture, "metadata": {}}]},
        {"cell_type": "code", "outputs": [said(**{"text/markdown": remote})]},
        {"cell_type": "code", "outputs": [said(**{"text/markdown": ""})]},
    ]
    notebook = nbformat.from_dict({"cells": [{"metadata": {}, **cell} for cell in cells]})
    outputs.with_figure_files(notebook, tmp_path / "f", "nb", "../f", ())
    assert notebook.cells.pop().outputs == []
    first, second, badge = (cell.outputs[0].data for cell in notebook.cells[1:])
    assert first["text/html"] == (
        '<a class="figure" href="../f/nb-1.png"><img src="../f/nb-1.png" '
        'alt="a &lt;b&gt; &amp; &#34;c&#34;" width="7" height="5"></a>'
    )
    assert 'alt="See what is here."' in second["text/html"]
    assert badge["text/markdown"] == "[Open](https://elsewhere)"
    assert notebook.cells[0].source == "## Head\n\nSee *what* is here. More."
    assert (tmp_path / "f/nb-2.png").read_bytes() == b"\x89PNG\r\n\x1a\n"


def test_alternative_text_is_made_of_titles_axes_and_legends():
    figure, (left, right) = plt.subplots(1, 2)
    assert inline.alt_text(figure) == ""
    left.set(title="gates\nof fc1", xlabel="step", ylabel="gate g")
    left.plot([1, 2], label="kept")
    left.legend()
    right.set(xlabel="layer")
    assert inline.alt_text(figure) == "gates of fc1: gate g against step (kept). layer"
    figure.suptitle("LeNet")
    right.set(xlabel="")
    right.plot([1, 2], label="of all")
    figure.legend(handles=right.lines)
    assert inline.alt_text(figure) == "LeNet. gates of fc1: gate g against step (kept). of all"
    plt.close(figure)


def test_figures_in_notebooks_have_a_palette_and_show_the_same():
    figure, axes = plt.subplots()
    axes.imshow(np.linspace(0, 1, 400).reshape(20, 20))
    plain, _ = retina_figure(figure)
    png, shown = inline._display(figure)
    assert (shown["alt"], len(png) < 0.6 * len(plain)) == ("", True)
    small, large = (Image.open(io.BytesIO(data)) for data in (png, plain))
    assert (small.mode, small.size) == ("P", large.size)
    pixels = [np.asarray(picture.convert("RGB"), int) for picture in (small, large)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 0.5
    assert (pixels[0][0, 0] == 255).all()
    figure.patch.set_alpha(0)
    clear, _ = inline._display(figure)
    assert Image.open(io.BytesIO(clear)).mode == "RGBA"
    plt.close(figure)


# --- bad input


def test_report_of_a_profile_that_has_no_executed_notebook(tmp_path):
    for make in (report.build, lambda *a: slides.build(a[0], [], *a[1:])):
        with pytest.raises(InputError) as caught:
            make("cpu-long", str(tmp_path), str(tmp_path / "out"))
        assert one_line(caught) == (
            "profile = 'cpu-long': has no executed notebook; "
            "`make study PROFILE=cpu-long` makes them"
        )
        with pytest.raises(InputError, match="profile = 'fast': allowed are"):
            make("fast", str(tmp_path), str(tmp_path / "out"))
    assert tree(tmp_path) == {}


def test_a_folder_of_others_is_not_replaced(results, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="a new or empty folder, or one that this command made"):
        report.build("cpu", str(results), str(tmp_path))
    with pytest.raises(InputError, match=r"out = '.*': a folder"):
        slides.build("cpu", [], str(results), str(tmp_path / "mine.txt"))
    assert tree(tmp_path) == before
    (tmp_path / ".buildinfo").touch()
    report.require_own(tmp_path, ".buildinfo")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gdp", f"of profile cpu there are {NOTEBOOK}; or a path to an .ipynb"),
        ("nothing.ipynb", "a file that is there"),
    ],
)
def test_slides_of_a_notebook_that_is_not_there(name, words, results, tmp_path):
    with pytest.raises(InputError) as caught:
        slides.build("cpu", [name], str(results), str(tmp_path / "out"))
    assert one_line(caught) == f"notebook = {name!r}: {words}"
    assert tree(tmp_path) == {}


def test_tables_that_are_missing_and_records_that_are_gone(results, tmp_path):
    (tmp_path / "cpu").mkdir()
    shutil.copytree(results / "cpu/notebooks", tmp_path / "cpu/notebooks")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"table = runs\.csv: not there; run the study first"):
        report.build("cpu", str(tmp_path), str(tmp_path / "new/site"))
    assert tree(tmp_path) == before
    with pytest.raises(InputError, match=r"run = dense-x: has no record in cpu"):
        Store("cpu", tmp_path).shown("dense-x")


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, results):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"package = 'myst_nb': not installed; `pip install -e"):
        report.build("cpu", str(results))


# --- slides and lessons


def cell(kind, source, tags=(), outputs=(), **metadata):
    made = {"cell_type": kind, "source": source, "id": sha256(source.encode()).hexdigest()[:9]}
    made["metadata"] = {"tags": list(tags), **metadata}
    return made | ({"outputs": list(outputs)} if kind == "code" else {})


def said(size=None, **data):
    about = {"image/png": dict(zip(("width", "height"), size, strict=True))} if size else {}
    return {"output_type": "display_data", "metadata": about, "data": data}


NOTES = [
    cell("markdown", "# A title\n\nwords words"),
    cell("code", "import torch"),
    cell("code", "profile = 'cpu'", ["injected-parameters"]),
    cell("markdown", "## One\n\nwords\n## Two\n\n" + "line\n" * 9),
    cell("code", "short()", outputs=[said(**{"text/plain": "3"})]),
    cell("code", "draw()", outputs=[said(**{"image/png": ""}), said(**{"image/png": ""})]),
    cell("markdown", "about"),
    cell("code", "flat()", outputs=[said(size=(9, 1), **{"image/png": ""})]),
    cell("code", "named()", outputs=[said(**{"text/markdown": t}) for t in ("**a**", "|\n" * 20)]),
    cell("markdown", "own place", slideshow={"slide_type": "notes"}),
    cell("code", "line\n" * 13, outputs=[said(**{"text/plain": "4"})]),
    cell("markdown", "**1.** What is `x | y`?\n\nSay."),
    cell(
        "code", "def f(x):\n    return None\n\n\nexercise(f, [((1,), 2), ((2,), 3)])", ["exercise"]
    ),
    cell("markdown", "<details>no\n## words</details>", ["solution"]),
]


def notes():
    return nbformat.from_dict({"cells": NOTES, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def test_every_cell_has_its_place_on_the_slides():
    arranged = slides.arrange(notes())
    found = [
        (
            c.source.split("\n")[0][:9],
            c.metadata["slideshow"]["slide_type"],
            "output-only" in c.metadata.tags,
        )
        for c in arranged.cells
    ]
    assert found == [
        ("# A title", "slide", False),
        ("import to", "skip", False),
        ("profile =", "skip", False),
        ("## One", "slide", False),
        ("## Two", "slide", False),
        ("short()", "-", False),
        ("draw()", "subslide", True),
        ("draw()", "subslide", True),
        ("about", "subslide", False),
        ("flat()", "-", True),
        ("named()", "subslide", True),
        ("own place", "notes", False),
        ("line", "subslide", True),
        ("**1.** Wh", "subslide", False),
        ("def f(x):", "-", False),
        ("<details ", "fragment", False),
    ]


def test_a_lesson_is_counted_in_its_notebook(tmp_path, monkeypatch):
    nbformat.write(notes(), tmp_path / "07_toy.ipynb")
    for name, value in (("WORDS", 10), ("LINES", 5)):
        monkeypatch.setattr(lessons, f"_{name}_A_MINUTE", value)
    # 34 words, 19 lines of code, one exercise: 3.4 + 3.8 + 8, rounded to 5.
    exercise = lessons.Exercise("f", "What is `x | y`? Say.", 2)
    assert lessons.lesson(tmp_path / "07_toy.ipynb") == lessons.Lesson(
        "07_toy", "A title", 15, (exercise,)
    )
    page = lessons.page(tmp_path)
    assert "All 1 notebooks together: 0 hours 15 minutes, 1 exercises." in page
    assert "### 07 A title: 15 minutes" in page
    assert "| `f` | What is `x \\| y`? Say. | 2 |" in page


def test_the_instructors_page_says_what_students_can_do_after_each_notebook():
    text = (ROOT / "notebooks/README.md").read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"| [{path.stem[:2]}]({path.name}) " in text


def test_the_page_s_command_takes_the_solutions_out(tmp_path):
    text = (ROOT / "notebooks/README.md").read_text()
    words = next(line for line in text.splitlines() if line.startswith("jupyter nbconvert")).split()
    at = words.index("notebooks/*.ipynb")
    words[at : at + 1] = [str(ROOT / f"notebooks/{NOTEBOOK}.ipynb")]
    words[words.index("class")] = str(tmp_path)
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    before = outputs.read(ROOT / f"notebooks/{NOTEBOOK}.ipynb")
    after = outputs.read(tmp_path / f"{NOTEBOOK}.ipynb")
    kept = [c.source for c in before.cells if "solution" not in outputs.tags(c)]
    assert [c.source for c in after.cells] == kept
    assert len(kept) < len(before.cells)


def test_what_is_vendored_is_what_was_published():
    folder = report.HERE / "vendor"
    sums = dict(reversed(line.split()) for line in (folder / "SHA256SUMS").read_text().splitlines())
    there = {str(p.relative_to(folder)) for p in folder.glob("*/**/*") if p.is_file()}
    assert set(sums) == there
    for name, expected in sums.items():
        assert sha256((folder / name).read_bytes()).hexdigest() == expected, name
