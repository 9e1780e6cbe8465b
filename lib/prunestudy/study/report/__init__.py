"""The report: a static site from executed notebooks, tables and cards, that needs no network.

Sphinx makes it from a folder of Markdown pages (`pages`) and the executed notebooks (`outputs`);
`site/` has its configuration, style and page templates, `vendor/` what the pages load. Slides of
one notebook are in `slides`, what a teacher wants to know of it in `lessons`.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from prunestudy.errors import InputError, require, require_one_of
from prunestudy.papers import PROFILES
from prunestudy.study.records import Store

HERE = Path(__file__).parent
# Sphinx leaves it in every site it made: only such a folder is replaced.
_MADE = ".buildinfo"


def executed_notebooks(store: Store, profile: str) -> list[Path]:
    """The executed notebooks of a profile, in their order; raises `InputError` if there is none."""
    require_one_of("profile", profile, PROFILES)
    found = sorted((store.folder / "notebooks").glob("*.ipynb"))
    hint = f"has no executed notebook; `make study PROFILE={profile}` makes them"
    require(bool(found), "profile", profile, hint)
    return found


def need(package: str) -> None:
    """Raise `InputError` unless `package` of the extra `report` is installed."""
    hint = "not installed; `pip install -e '.[report]'` brings what reports and slides need"
    require(find_spec(package) is not None, "package", package, hint)


def build(profile: str, results: str = "", out: str = "") -> Path:
    """Write the report of `profile` into `out` (default: results/<profile>/report); return it.

    An earlier report there is replaced when the new one is whole. Raises `InputError` for a
    profile without executed notebooks or tables, and for a folder that holds something else.
    """
    need("myst_nb")
    from prunestudy.study.report import pages

    store = Store(profile, results or None)
    notebooks = executed_notebooks(store, profile)
    target = Path(out) if out else store.folder / "report"
    require_own(target, _MADE)
    known = pages.read_tables(store)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".report-") as folder:
        source, made = Path(folder) / "source", Path(folder) / "site"
        pages.write(source, store, profile, notebooks, known)
        _sphinx(source, made, profile)
        shutil.copytree(source / "files", made, dirs_exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    return target


def require_own(folder: Path, mark: str) -> None:
    """Raise `InputError` if `folder` is there with something in it, but not the file `mark`."""
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    allowed = "a new or empty folder, or one that this command made"
    require(not taken or (folder / mark).exists(), "out", str(folder), allowed)


def _sphinx(source: Path, made: Path, profile: str) -> None:
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going"]
    command += ["-c", str(HERE / "site"), "-d", str(made.parent / "doctrees")]
    command += ["-D", f"html_title=prunestudy: profile {profile}", str(source), str(made)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise InputError(f"report = {profile}: Sphinx says {said.stderr.strip()}")
