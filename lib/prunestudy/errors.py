"""The one error that a user's input can cause, and the checks that many places share."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """A parameter that cannot be used: one line with its name, its value and what is allowed.

    Names of files may hold line breaks and bytes that are not UTF-8: these are escaped.
    """

    def __init__(self, line: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


_NAMED = 60  # names in one line
_QUOTED = 1000  # characters of a value


def require(ok: bool, parameter: str, value: Any, allowed: str) -> None:
    """Raise `InputError` naming `parameter`, `value` and what is `allowed`, unless `ok`."""
    if not ok:
        raise InputError(f"{parameter} = {quoted(value)}: {allowed}")


def quoted(value: Any) -> str:
    """The `repr` of `value`, cut off if it is very long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or its kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def file_line(error: OSError) -> str:
    """One line on a file that cannot be read or written."""
    gone = "." if error.errno == errno.ENOENT else "?"  # without a name: the current folder
    return f"file = {error.filename or gone}: {error.strerror or error}"


@contextlib.contextmanager
def refused(parameter: str, value: Any, how: str = "cannot be used") -> Iterator[None]:
    """Turn what torch or a user's code raises inside into `InputError` on `value`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        line = f"{parameter} = {value!r}: {how}: {first_line(error)}"
        raise InputError(line) from error


def require_one_of(parameter: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `InputError` unless `value` is one of `choices`; of many, it names the first."""
    names = sorted(choices)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    require(value in names, parameter, value, f"allowed are {', '.join(names[:_NAMED])}{more}")


def path_of(path: Any, parameter: str = "path") -> Path:
    """Return `path` as a `Path`; raise `InputError` for what cannot be the name of a file."""
    named = isinstance(path, str | Path) and path != "" and "\0" not in str(path)
    try:
        os.fsencode(path if named else "")
    except UnicodeEncodeError:
        named = False
    require(named, parameter, path, "the path of a file, as text or a Path")
    return Path(path)


def writable_file(path: str | Path, parameter: str = "path") -> Path:
    """Return `path`, to which a file can be written: a regular file, or nothing yet.

    Raises `InputError` for a folder, a device, a pipe, a link (also one to nothing), and if the
    folder that it is to lie in does not exist.
    """
    path = path_of(path, parameter)
    try:
        require(path.parent.is_dir(), parameter, str(path), "a file in a folder that exists")
        right = stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return path
    except OSError as error:
        raise InputError(f"{parameter} = {str(path)!r}: {error.strerror}") from None
    require(right, parameter, str(path), "a regular file, or a name that is not in use")
    return path


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give the path of a temporary file beside `path`, which replaces `path` if nothing fails.

    Raises `InputError` as `writable_file` does, and `OSError` naming `path` for a full disk.
    """
    path = writable_file(path)
    # of a long name the first letters only: the system allows 255 bytes
    part = path.with_name(f".{path.name[:50]}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)
