"""Checkpoints: written whole or not at all, verified before use, loaded with weights_only."""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch.serialization import default_restore_location

from prunestudy.errors import InputError, written_whole
from prunestudy.shrink.runs import tensors_of

AGAIN = "delete it to start this run again"
_MAGIC = b"prunestudy checkpoint 1\n"


def write_checkpoint(path: Path, run: str, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) of run `run` to `path`, replacing what was there.

    The file is a magic line, the SHA-256 of the rest, and a `torch.save` archive.
    """
    buffer = io.BytesIO()
    torch.save({"run": run, **state}, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest().encode()
    with written_whole(path) as part:
        part.write_bytes(_MAGIC + digest + b"\n" + payload)


def read_checkpoint(
    path: Path, run: str, device: torch.device | str = "cpu"
) -> dict[str, Any] | None:
    """Return the state that `write_checkpoint` wrote for `run`, or None.

    What was not on the CPU comes back on `device`.
    Raises `InputError` for a file that is corrupt, of another format or of another run.
    """

    def refuse_if(wrong: bool, why: str) -> None:
        if wrong:
            raise InputError(f"checkpoint = {str(path)!r} of {run}: {why}; {AGAIN}")

    def placed(storage: Any, where: str) -> Any:
        return storage if where == "cpu" else default_restore_location(storage, str(device))

    if not path.exists():
        return None
    magic, _, rest = path.read_bytes().partition(b"\n")
    digest, _, payload = rest.partition(b"\n")
    refuse_if(magic + b"\n" != _MAGIC, "not of this version")
    refuse_if(hashlib.sha256(payload).hexdigest().encode() != digest, "corrupt (checksum)")
    state = torch.load(io.BytesIO(payload), map_location=placed, weights_only=True)
    refuse_if(state.pop("run") != run, "of another run")
    return state


def digest_of(tree: Any) -> str:
    """The SHA-256 of all tensors of nested lists and dicts."""
    plain = [torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for t in tensors_of(tree)]
    return hashlib.sha256(save({str(i): t for i, t in enumerate(plain)})).hexdigest()
