"""Checkpoints: written whole or not at all, checked before they are believed, never a pickle."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from prunestudy.errors import InputError

_MAGIC = b"prunestudy checkpoint 1\n"


def write_checkpoint(path: Path, run: str, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) of run `run` to `path`, replacing what was there.

    The file is a magic line, the SHA-256 of the rest, and a `torch.save` archive.
    """
    buffer = io.BytesIO()
    torch.save({"run": run, **state}, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest().encode()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(_MAGIC + digest + b"\n" + payload)
    temporary.replace(path)


def read_checkpoint(
    path: Path, run: str, device: torch.device | str = "cpu"
) -> dict[str, Any] | None:
    """Return the state that `write_checkpoint` wrote for `run`, its tensors on `device`, or None.

    Raises `InputError` for a file that is corrupt, of another format or of another run.
    """
    if not path.exists():
        return None
    magic, _, rest = path.read_bytes().partition(b"\n")
    digest, _, payload = rest.partition(b"\n")
    way_out = "delete it to start this run again"
    if magic + b"\n" != _MAGIC:
        raise InputError(f"checkpoint = {path.name!r} of {run}: not of this version; {way_out}")
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise InputError(f"checkpoint = {path.name!r} of {run}: corrupt (checksum); {way_out}")
    state = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    if state.pop("run") != run:
        raise InputError(f"checkpoint = {path.name!r} of {run}: of another run; {way_out}")
    return state
