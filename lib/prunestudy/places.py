"""Where things are: the checkout that the package lies in, else the current folder."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """Folder of the checkout, None where the package was installed without one."""
    folder = _PACKAGE.parents[1]
    inside = (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir()
    return folder if inside and _PACKAGE.parent.name == "lib" else None


def home() -> Path:
    """Folder of results/ and data/: the checkout, else the current folder."""
    return checkout() or Path.cwd()


def notebooks() -> Path:
    """Folder of the notebooks as they are stored: the checkout's, else those of the wheel."""
    folder = checkout()
    return folder / "notebooks" if folder else _PACKAGE / "notebooks"
