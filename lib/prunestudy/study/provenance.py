"""What a run was made with, and whether a card's rules are older than the runs that they judge."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prunestudy import places
from prunestudy.papers.claims import rules_of


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, the device's name, the commit, and the hash of the library's files in it."""
    packages = ("prunestudy", "torch", "torchvision", "numpy", "ptflops")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "commit": commit(),
        "tree": _once("rev-parse", "HEAD:lib/prunestudy"),
    }


def commit() -> str:
    """Git commit of the checkout, "-dirty" when its library differs.

    Outside git what PRUNESTUDY_COMMIT says, else "unknown".
    """
    head = _once("rev-parse", "HEAD") or os.environ.get("PRUNESTUDY_COMMIT") or "unknown"
    dirty = _once("status", "--porcelain", "--", "lib", "pyproject.toml")
    return f"{head}-dirty" if dirty else head


def rules_commit(checkout: Path, card: Path, *place: str) -> str:
    """The last commit that changed what the file `card` judges a net by.

    `place`: profile, model and data set.

    Empty where that is not known: outside git, and while the rules in the file are not committed.
    """
    if not card.resolve().is_relative_to(checkout.resolve()):
        return ""
    path = card.resolve().relative_to(checkout.resolve()).as_posix()
    today, last = rules_of(card.read_text(encoding="utf-8"), *place), ""
    for commit in _git(checkout, "log", "--format=%H", "--", path).split():
        if rules_of(_git(checkout, "show", f"{commit}:{path}"), *place) != today:
            break
        last = commit
    return last


@cache
def is_before(checkout: Path, old: str, new: str) -> bool:
    """Whether commit `old` is an ancestor of the commit `new` of a record, or the same."""
    ancestor = ("merge-base", "--is-ancestor", old, new.removesuffix("-dirty"))
    return bool(old) and _run(checkout, *ancestor).returncode == 0


@cache
def _once(*words: str) -> str:
    folder = places.checkout()
    return _git(folder, *words) if folder else ""


def _git(checkout: Path, *words: str) -> str:
    """What git prints, "" where it fails."""
    made = _run(checkout, *words)
    return made.stdout.strip() if made.returncode == 0 else ""


def _run(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(checkout), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return subprocess.CompletedProcess(command, 127, "", "")
