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


@cache
def environment(device: torch.device) -> dict[str, Any]:
    """Versions, the device's name, the commit, and the hash of the library's files in it."""
    packages = ("prunestudy", "torch", "torchvision", "numpy", "ptflops")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "commit": commit(),
        "tree": _git(places.checkout(), "rev-parse", "HEAD:lib/prunestudy") or "",
    }


def commit() -> str:
    """Commit of the checkout, "-dirty" if its library differs; else PRUNESTUDY_COMMIT's."""
    folder = places.checkout()
    head = _git(folder, "rev-parse", "HEAD") or os.environ.get("PRUNESTUDY_COMMIT") or "unknown"
    dirty = _git(folder, "status", "--porcelain", "--", "lib", "pyproject.toml")
    return f"{head}-dirty" if dirty else head


def rules_commit(checkout: Path, card: Path, *place: Any) -> str:
    """The last commit that changed what the file `card` judges a net by: `rules_of` at `place`.

    Empty where that is not known: outside git, and while the rules in the file are not committed.
    """
    card, checkout, last = card.resolve(), checkout.resolve(), ""
    if not card.is_relative_to(checkout):
        return ""
    path, today = card.relative_to(checkout).as_posix(), rules_of(card.read_text("utf-8"), *place)
    for commit in (_git(checkout, "log", "--format=%H", "--", path) or "").split():
        if rules_of(_git(checkout, "show", f"{commit}:{path}") or "", *place) != today:
            break
        last = commit
    return last


@cache
def is_before(checkout: Path | None, old: str, new: str) -> bool | None:
    """Whether commit `old` is an ancestor of the commit `new` of a record, or the same.

    None where that cannot be told: `new` is not known here, or the history is not whole.
    """
    new = new.removesuffix("-dirty")
    whole = _git(checkout, "rev-parse", "--is-shallow-repository") == "false"
    if not whole or _git(checkout, "cat-file", "-e", f"{new}^{{commit}}") is None:
        return None
    return bool(old) and _git(checkout, "merge-base", old, new) == old


def _git(checkout: Path | None, *words: str) -> str | None:
    """What git prints of the checkout itself; None where it fails, or there is no git or checkout.

    Neither a repository around the checkout nor one that the environment names counts.
    """
    if not checkout:
        return None
    command = ["git", "-C", str(checkout), "--git-dir=.git", *words]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    options = {"capture_output": True, "text": True, "env": env}
    try:
        return subprocess.run(command, check=True, **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
