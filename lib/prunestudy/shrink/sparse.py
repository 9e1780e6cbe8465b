"""Finished nets, stored small: one safetensors file, with CSR arrays where weights are zero.

A convolution's weight is seen as a matrix (out, in * k * k), a linear layer's as it is. Each is
kept as values (float32), column indices (int16 where they fit, else int32) and row pointers
(int32), or dense where that takes no more bytes. Everything else is dense. The metadata hold the
names to rebuild the net with, its structure where that is not the factory's (layers that are
narrower, or factorised), and a sha256 over all of it. Nothing is ever unpickled.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunestudy import models
from prunestudy.errors import InputError, require, writable_file, written_whole
from prunestudy.shrink.csr import CsrLinear, csr_arrays
from prunestudy.shrink.fold import fold
from prunestudy.shrink.structure import Entry, restructure, structure_of
from prunestudy.shrink.trace import LAYERS

FORMAT = "prunestudy-sparse-1"
PARTS = ("rows", "columns", "values")


@dataclass(frozen=True)
class Storage:
    """What it takes to store a net.

    `nonzeros`: parameters that are not zero, biases included.
    `numbers_with_indices`: one index more for each, as the paper counts ("9.8M, 19.6M with
    indices": twice the nonzeros; no row pointers).
    `numbers_stored`: what the file really has: values, column indices and row pointers of the
    CSR layers, and every number of the dense tensors, buffers included.
    `bytes`: the size of the file that `save_net` writes.
    """

    nonzeros: int
    numbers_with_indices: int
    numbers_stored: int
    bytes: int


def save_net(
    model: nn.Module, path: str | Path, factory: str, shape: tuple[int, int, int], num_classes: int
) -> None:
    """Write `model`, folded, to `path`; `factory`, `shape`, `num_classes` rebuild it (`build`).

    Its layers may be smaller than the factory's, or a Sequential in place of one layer. The file
    appears whole or not at all. Raises `InputError` for a path that no file can be written to (see
    `writable_file`), if `model` differs from the factory's net in what cannot be stored, or if a
    weight is not float32.
    """
    writable_file(path)
    plain = fold(model)
    structure = _structure(plain, factory, shape, num_classes)
    data = _serialise(_pack(plain), factory, shape, num_classes, structure)
    with written_whole(path) as part:
        part.write_bytes(data)


def load_net(path: str | Path, factory: str | None = None) -> nn.Module:
    """The net that `save_net` wrote: an ordinary module on the CPU, in eval mode.

    Weights come back bit for bit, except that a negative zero comes back as zero. Raises
    `InputError` if the file is missing, damaged, of another kind, or (when `factory` is given)
    saved from another factory.
    """
    tensors, metadata = _read(path)
    name = metadata["factory"]
    require(factory in (None, name), "factory", factory, f"{path} was saved from {name}")
    try:
        with torch.random.fork_rng(devices=[]):  # a file read during training changes no draw
            *sizes, num_classes = _sizes(metadata)
            model = models.build(name, tuple(sizes), num_classes)
            restructure(model, json.loads(metadata.get("structure", "[]")))
        model.load_state_dict(_unpack(tensors, model))
    except Exception as error:  # whatever a file says that another version wrote, or a person
        why = str(error).partition("\n")[0]
        raise InputError(f"path = {str(path)!r}: does not fit today's {name}: {why}") from None
    return model.eval()


def input_shape(path: str | Path) -> tuple[int, int, int]:
    """(channels, height, width) of the images that the net stored in `path` takes.

    Raises `InputError` if the file is missing, damaged or of another kind.
    """
    _, metadata = _read(path)
    return _sizes(metadata)[:3]


def storage(
    model: nn.Module, factory: str = "", shape: tuple[int, ...] = (), num_classes: int = 0
) -> Storage:
    """Count what storing `model` takes; see `Storage`.

    With the arguments given to `save_net`, `bytes` is its file's size exactly; without them
    (a net of no factory) the metadata are some bytes shorter. Raises `InputError` as it does.
    """
    plain = fold(model)
    tensors = _pack(plain)
    structure = _structure(plain, factory, shape, num_classes) if factory else []
    nonzeros = sum(int(p.count_nonzero()) for p in plain.parameters())
    return Storage(
        nonzeros=nonzeros,
        numbers_with_indices=2 * nonzeros,
        numbers_stored=sum(t.numel() for t in tensors.values()),
        bytes=len(_serialise(tensors, factory, shape, num_classes, structure)),
    )


def _pack(plain: nn.Module) -> dict[str, Tensor]:
    """The tensors of the file, by name; a CSR layer's have `:rows`, `:columns`, `:values`."""
    sparse = {f"{name}.weight".lstrip(".") for name, _ in _prunable(plain)}
    tensors = {}
    for name, tensor in plain.state_dict().items():
        right = not tensor.is_floating_point() or tensor.dtype == torch.float32
        require(right, name, str(tensor.dtype), "only float32 can be stored")
        # The copy: safetensors refuses tensors that share memory.
        dense = {name: tensor.cpu().clone(memory_format=torch.contiguous_format)}
        csr = _csr(name, dense[name]) if name in sparse else dense
        tensors |= csr if _bytes(csr) < _bytes(dense) else dense
    return tensors


def _csr(name: str, weight: Tensor) -> dict[str, Tensor]:
    matrix = weight.flatten(1)
    rows, columns, values = csr_arrays(matrix)
    if matrix.shape[1] - 1 <= torch.iinfo(torch.int16).max:
        columns = columns.to(torch.int16)
    arrays = (rows, columns, values)
    return {f"{name}:{part}": array for part, array in zip(PARTS, arrays, strict=True)}


def _unpack(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The dense tensors of the file, for `model` to load."""
    return {
        name: _dense(tensors, name, like) if f"{name}:values" in tensors else tensors[name]
        for name, like in model.state_dict().items()
    }


def _dense(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    rows, columns, values = (tensors[f"{name}:{part}"] for part in PARTS)
    matrix = torch.zeros_like(like).flatten(1)
    if len(rows) != len(matrix) + 1 or (len(columns) and int(columns.max()) >= matrix.shape[1]):
        raise KeyError(name)
    row = torch.repeat_interleave(torch.arange(len(matrix)), rows.diff())
    matrix[row, columns.long()] = values
    return matrix.view_as(like)


def _structure(
    plain: nn.Module, factory: str, shape: tuple[int, int, int], num_classes: int
) -> list[Entry]:
    """What of `plain` is not as its factory makes it; with that its tensors must fit."""
    with torch.device("meta"):  # shapes only
        fresh = models.build(factory, shape, num_classes)
        structure = structure_of(plain, fresh)
        restructure(fresh, structure)
    expected, found = fresh.state_dict(), plain.state_dict()
    for name in expected | found:
        sizes = [tuple(s[name].shape) if name in s else "absent" for s in (expected, found)]
        require(sizes[0] == sizes[1], name, sizes[1], f"its layer in {factory} has {sizes[0]}")
    if structure:
        _require_runs(fresh, shape)
    return structure


def _require_runs(meta: nn.Module, shape: tuple[int, int, int]) -> None:
    try:
        meta.eval()(torch.zeros(1, *shape, device="meta"))
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"model = {type(meta).__name__!r}: its layers do not fit: {why}") from None


def _prunable(plain: nn.Module) -> list[tuple[str, nn.Module]]:
    layers = list(plain.named_modules())
    csr = any(isinstance(layer, CsrLinear) for _, layer in layers)
    require(not csr, "model", type(plain).__name__, "store the net before to_csr")
    return [(name, layer) for name, layer in layers if isinstance(layer, LAYERS)]


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _serialise(
    tensors: dict[str, Tensor],
    factory: str,
    shape: tuple,
    num_classes: int,
    structure: list[Entry],
) -> bytes:
    sizes = " ".join(str(n) for n in (*shape, num_classes))
    metadata = {"format": FORMAT, "factory": factory, "sizes": sizes}
    if structure:  # without it the file is what it was before structures
        metadata["structure"] = json.dumps(structure, separators=(",", ":"))
    metadata["sha256"] = _digest(tensors, metadata)
    return safetensors.torch.save(tensors, metadata)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    keys = ("format", "factory", "sizes", "structure")
    digest = hashlib.sha256(repr([metadata[k] for k in keys if k in metadata]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of ours, checked against its sha256."""
    try:
        require(Path(path).is_file(), "path", str(path), "a file that save_net wrote")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        raise InputError(f"path = {str(path)!r}: not a whole safetensors file") from None
    ours = metadata.get("format") == FORMAT and {"factory", "sizes", "sha256"} <= set(metadata)
    ours = ours and re.fullmatch(r"\d{1,9}( \d{1,9}){3}", metadata["sizes"])
    require(bool(ours), "path", str(path), "a file that save_net wrote")
    whole = metadata["sha256"] == _digest(tensors, metadata)
    require(whole, "path", str(path), "its contents do not match their sha256")
    return tensors, metadata


def _sizes(metadata: dict[str, str]) -> tuple[int, ...]:
    """Channels, height, width and classes."""
    return tuple(int(size) for size in metadata["sizes"].split())
