"""Executed notebooks as pages and slides need them: figures as files, with alternative text."""

import base64
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import nbformat
from markupsafe import escape

_ENDING = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}
# A picture from elsewhere would be a request; its link stays.
_REMOTE_PICTURE = re.compile(r"!\[([^\]]*)\]\(https?:[^)]*\)")
_LOCAL_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")


def read(path: Path) -> Any:
    """Read the notebook at `path`."""
    return nbformat.read(path, as_version=4)


def tags(cell: Any) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def without_dead_links(markdown: str, there: Container[str]) -> str:
    """Links to files become their text, unless the file is one of those `there`; no pictures."""

    def keep(link: re.Match[str]) -> str:
        return link[0] if link[2] in there else link[1]

    return _LOCAL_LINK.sub(keep, _REMOTE_PICTURE.sub(r"\1", markdown))


def with_figure_files(
    notebook: Any, folder: Path, stem: str, address: str, there: Container[str] = ()
) -> Any:
    """Write every figure of `notebook` into `folder` and put an HTML image in its place.

    Files are named after `stem`; pages find them below `address`. The alternative text is the one
    the figure carries (`figures.inline`), else the first sentence of the text above it. Links to
    files that are not `there` become text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, above = 0, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = without_dead_links(cell.source, there)
            above = _first_sentence(cell.source) or above
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _is_seen(output)]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                data["text/markdown"] = without_dead_links(data["text/markdown"], there)
            kind = next((kind for kind in _ENDING if kind in data), None)
            if kind:
                count += 1
                name = f"{stem}-{count}.{_ENDING[kind]}"
                (folder / name).write_bytes(_bytes(data[kind]))
                about = output.metadata.get(kind, {})
                output.data = {"text/html": _image(f"{address}/{name}", about, above)}
    return notebook


def _is_seen(output: Any) -> bool:
    """Whether there is something to see: not the badge of a repository without an address."""
    return output.get("data", {}).get("text/markdown") != ""


def _bytes(data: str) -> bytes:
    return data.encode() if data.lstrip().startswith("<") else base64.b64decode(data)


def _image(address: str, about: dict[str, Any], above: str) -> str:
    """An image that opens in full size; without a known size it has the file's own."""
    alt = escape(about.get("alt") or above or "Figure")
    size = "".join(f' {key}="{int(about[key])}"' for key in ("width", "height") if key in about)
    picture = f'<img src="{address}" alt="{alt}"{size}>'
    return f'<a class="figure" href="{address}">{picture}</a>'


def _first_sentence(markdown: str) -> str:
    """The first sentence of a text cell that is neither heading, table nor formula, as plain text.

    "" if there is none.
    """
    for block in re.split(r"\n\s*\n", markdown):
        if block.strip() and not block.lstrip().startswith(("#", "|", "$$", "<", "*  ", "```")):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(block.split()))
            plain = re.sub(r"[*`$\\]", "", plain)
            return re.split(r"(?<=[.!?:]) ", plain)[0]
    return ""
