"""What a teacher wants to know of a notebook, counted in the notebook itself."""

import ast
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from prunestudy.study.report import outputs

# How long a class takes is a rule, the same for every notebook.
_WORDS_A_MINUTE = 130
_LINES_A_MINUTE = 12
_MINUTES_AN_EXERCISE = 8
_ROUNDED_TO = 5


@dataclass(frozen=True)
class Exercise:
    """An exercise: the function to write, what is asked, and on how many cases it is checked."""

    name: str
    asks: str
    cases: int


@dataclass(frozen=True)
class Lesson:
    """A notebook as a lesson; `minutes` follow from its words, lines of code and exercises."""

    stem: str
    title: str
    minutes: int
    exercises: tuple[Exercise, ...]


def lesson(path: Path) -> Lesson:
    """Count the notebook at `path`; solutions take no time."""
    cells = [c for c in outputs.read(path).cells if "solution" not in outputs.tags(c)]
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    exercises = tuple(
        _exercise(before.source, cell.source)
        for before, cell in pairwise(cells)
        if "exercise" in outputs.tags(cell)
    )
    code = [c.source for c in cells if c.cell_type == "code" and "exercise" not in outputs.tags(c)]
    words = sum(len(text.split()) for text in texts)
    lines = sum(bool(line.strip()) for source in code for line in source.splitlines())
    minutes = words / _WORDS_A_MINUTE + lines / _LINES_A_MINUTE
    minutes += _MINUTES_AN_EXERCISE * len(exercises)
    title = texts[0].partition("\n")[0].removeprefix("# ")
    return Lesson(path.stem, title, _ROUNDED_TO * round(minutes / _ROUNDED_TO), exercises)


def _exercise(asked: str, source: str) -> Exercise:
    """The exercise of a cell and of the text above it, whose last paragraph begins "**1.**"."""
    text = re.split(r"\*\*\d+\.\*\*", asked)[-1]
    tree = ast.parse(source)
    name = next(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    check = next(node for node in ast.walk(tree) if _is_check(node))
    return Exercise(name, " ".join(text.split()), len(check.args[1].elts))


def _is_check(node: Any) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "exercise"


def page(folder: Path) -> str:
    """Markdown: minutes and exercises of every notebook in `folder`."""
    found = [lesson(path) for path in sorted(folder.glob("*.ipynb"))]
    total = sum(each.minutes for each in found)
    rule = (
        f"Minutes are a rule: {_WORDS_A_MINUTE} words or {_LINES_A_MINUTE} lines of code a minute, "
        f"{_MINUTES_AN_EXERCISE} minutes an exercise, rounded to {_ROUNDED_TO}. All "
        f"{len(found)} notebooks together: {total // 60} hours {total % 60} minutes, "
        f"{sum(len(each.exercises) for each in found)} exercises.\n"
    )
    return "\n".join([rule, *map(_section, found)])


def _section(each: Lesson) -> str:
    lines = [f"### {each.stem[:2]} {each.title}: {each.minutes} minutes\n"]
    lines += ["| function | what is asked | cases |", "| --- | --- | --- |"]
    for task in each.exercises:
        asks = task.asks.replace("|", "\\|")
        lines.append(f"| `{task.name}` | {asks} | {task.cases} |")
    return "\n".join(lines) + "\n"
