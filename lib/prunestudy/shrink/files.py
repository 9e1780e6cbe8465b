"""Nets in files: safetensors and a log of the layers, which `load` replays on a fresh net.

The log lists modules as [path, class, arguments]: the constructor's arguments for the layers of
`_FIELDS`, the [name, class, arguments] of each part for a Sequential of these, and null for other
modules, which a fresh net must have already; [path, "=", first] is another name of a tensor. Only
layers of `_FIELDS` are ever made, and nothing is unpickled. Their weights, as matrices
(out, everything else), are stored as compressed sparse rows (CSR) where this takes fewer bytes:
values, column indices (int16 if they fit, else int32) and row pointers (int32).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunestudy.errors import InputError, require, writable_file, written_whole
from prunestudy.shrink.csr import CsrLinear, csr_arrays
from prunestudy.shrink.factors import replace
from prunestudy.shrink.fold import fold
from prunestudy.shrink.remove import Constant, Nothing

FORMAT = "prunestudy-sparse-1"
_OURS = ("format", "structure", "sha256")
_PARTS = ("rows", "columns", "values")
_CONV = "in_channels out_channels kernel_size stride padding groups dilation padding_mode"
_NORM = "num_features eps momentum affine track_running_stats"
_FIELDS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), f"{_CONV} bias"),
    nn.ConvTranspose1d: f"{_CONV} output_padding bias",
    nn.ConvTranspose2d: f"{_CONV} output_padding bias",
    nn.ConvTranspose3d: f"{_CONV} output_padding bias",
    nn.Linear: "in_features out_features bias",
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _NORM),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _NORM),
    nn.LayerNorm: "normalized_shape eps elementwise_affine bias",
    nn.GroupNorm: "num_groups num_channels eps affine",
    nn.PReLU: "num_parameters",
    nn.Embedding: "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq",
    nn.Identity: "",
    Constant: "channels geometry bias",
    Nothing: "geometry",
}
_KINDS = {cls.__name__: cls for cls in _FIELDS}
Entry = list[Any]


def save(
    net: nn.Module,
    path: str | Path,
    *,
    like: nn.Module | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write `net`, folded, to `path`, for `load` to rebuild; the file appears whole or not at all.

    With a fresh net `like` only what differs from it is logged: a smaller file. `about` is text
    to keep with the net. Raises `InputError` for a path that no file can be written to (see
    `writable_file`), and naming a module or tensor that cannot be stored.
    """
    writable_file(path)
    texts = dict(about or {})
    right = all(type(each) is str for pair in texts.items() for each in pair)
    allowed = f"texts by name; {', '.join(_OURS)} are taken"
    require(right and not texts.keys() & set(_OURS), "about", about, allowed)
    plain = fold(_module(net))
    csr = any(isinstance(module, CsrLinear) for module in plain.modules())
    require(not csr, "net", type(net).__name__, "save the net before to_csr")
    log = _differences(plain, like)
    first = {}
    for name, tensor in plain.state_dict(keep_vars=True).items():
        real = isinstance(tensor, Tensor) and not tensor.is_complex() and not tensor.is_meta
        kind = str(getattr(tensor, "dtype", type(tensor).__name__))
        require(real, name, kind, "only tensors of real numbers can be stored")
        if first.setdefault(id(tensor), name) != name:
            log.append([name, "=", first[id(tensor)]])
    data = _serialise(_packed(plain, first.values()), texts, log)
    with written_whole(path) as part:
        part.write_bytes(data)


def load(path: str | Path, net: nn.Module) -> nn.Module:
    """The saved net, rebuilt on a copy of the fresh `net`: on the CPU, in eval mode, trainable.

    Tensors come back bit for bit, in torch's default memory layout (in CSR, -0 comes back as 0).
    Raises `InputError` if the file is missing, damaged or of another kind, or of another net.
    """
    tensors, metadata = _read(path)
    fresh = fold(_module(net))
    try:
        log = json.loads(metadata.get("structure", "[]"))
        for entry in log:
            fresh = _replayed(fresh, *entry)
        _fill(fresh, tensors, {name: first for name, kind, first in log if kind == "="})
        fresh.cpu()
    except _OtherNetError as error:
        name = type(net).__name__
        raise InputError(f"net = {name!r}: {path} is of another net, where {error}") from None
    except Exception as error:  # whatever a file may say that another version wrote, or a person
        why = str(error).partition("\n")[0]
        raise InputError(f"path = {str(path)!r}: its log cannot be replayed: {why}") from None
    for tensor in fresh.parameters():
        tensor.requires_grad_(tensor.is_floating_point())
    return fresh


def about(path: str | Path) -> dict[str, str]:
    """The text that `save` kept with the net; `InputError` for a file that `load` refuses."""
    return {key: value for key, value in _read(path)[1].items() if key not in _OURS}


class _OtherNetError(Exception):
    """The fresh net is not that of the file."""


def _module(net: Any) -> nn.Module:
    require(isinstance(net, nn.Module), "net", net, "a torch module")
    return net


def _differences(plain: nn.Module, like: nn.Module | None) -> list[Entry]:
    """The log of `plain`: all modules, or those that differ from the modules of `like`."""
    others = {} if like is None else dict(fold(like).named_modules(remove_duplicate=False))
    log, whole = [], set()
    for path, module in plain.named_modules(remove_duplicate=False):
        if path.rpartition(".")[0] in whole:
            continue  # told with its Sequential
        other = others.get(path)
        alike = type(other) is type(module) and _parts(module) and _parts(module) == _parts(other)
        entry = [path, type(module).__name__, None] if alike else _entry(path, module)
        if entry[2] is None:
            kinds = f"not as in `like`; can be stored: {', '.join(_KINDS)}, Sequential of these"
            same = like is None or (type(other) is type(module) and _rest(module) == _rest(other))
            require(same, path or "net", type(module).__name__, kinds)
        else:
            _require_rebuilds(entry, module)
            whole.add(path or None)
        if like is None or (entry[2] is not None and entry != (other and _entry(path, other))):
            log.append(entry)
    return log


def _parts(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_children()]


def _rest(module: nn.Module) -> tuple:
    """What the fresh net must have, of a module that is not rebuilt."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor.shape for name, tensor in own}, _parts(module), module.extra_repr()


def _entry(path: str, module: nn.Module) -> Entry:
    if path and type(module) is nn.Sequential and len(module):
        inner = [_layer(name, part) for name, part in module.named_children()]
        return [path, "Sequential", None if any(part[2] is None for part in inner) else inner]
    return _layer(path, module)


def _layer(name: str, layer: nn.Module) -> Entry:
    if type(layer) not in _FIELDS:
        return [name, type(layer).__name__, None]
    values = {field: getattr(layer, field) for field in _FIELDS[type(layer)].split()}
    if "bias" in values:
        values["bias"] = layer.bias is not None
    # As JSON gives it back.
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return [name, type(layer).__name__, values]


def _require_rebuilds(entry: Entry, module: nn.Module) -> None:
    path, made, own = entry[0], _made(*entry).state_dict(), module.state_dict()
    for name in made | own:
        sizes = [tuple(each[name].shape) if name in each else "absent" for each in (made, own)]
        allowed = f"by the settings of its {entry[1]} it is {sizes[0]}"
        require(sizes[0] == sizes[1], f"{path}.{name}".lstrip("."), sizes[1], allowed)


def _made(name: str, kind: str, arguments: Any) -> nn.Module:
    """The layer of an entry on the meta device: no numbers are drawn."""
    if kind == "Sequential":
        layer = nn.Sequential()
        for part in arguments:
            layer.add_module(part[0], _made(*part))
    else:
        values = {field: arguments[field] for field in _FIELDS[_KINDS[kind]].split()}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        with torch.device("meta"):
            layer = _KINDS[kind](**values)
    if _entry(name, layer) != [name, kind, arguments]:  # also what torch takes and we never write
        raise ValueError(f"{name} is no {kind}")
    return layer.eval()


def _replayed(net: nn.Module, path: str, kind: str, arguments: Any) -> nn.Module:
    """`net` with the layer of one entry in its place, if it is not there already."""
    if kind == "=":
        return net
    try:
        there = net.get_submodule(path)
    except AttributeError:
        raise _OtherNetError(f"{path!r} is a {kind}") from None
    if (arguments is None or not path) and type(there).__name__ != kind:
        raise _OtherNetError(f"{path or 'the whole'!r} is a {kind}")
    if arguments is not None and _entry(path, there) != [path, kind, arguments]:
        new = _made(path, kind, arguments)
        if not path:
            return new
        replace(net, path, new)
    return net


def _fill(net: nn.Module, tensors: dict[str, Tensor], ties: dict[str, str]) -> None:
    """Give `net` the tensors of the file, of the same names and shapes."""
    slots = net.state_dict(keep_vars=True)
    stored = {name.partition(":")[0] for name in tensors} | ties.keys()
    for name in sorted(slots.keys() ^ stored):
        raise _OtherNetError(f"{name!r} is {'a tensor' if name in stored else 'absent'}")
    new = {}
    for name in sorted(slots, key=ties.__contains__):  # the shared ones last
        if name in ties:
            new[name] = new[ties[name]]
        else:
            value = _dense(tensors, name, slots[name])
            if value.shape != slots[name].shape:
                raise _OtherNetError(f"{name!r} has the shape {tuple(value.shape)}")
            is_parameter = isinstance(slots[name], nn.Parameter)
            new[name] = nn.Parameter(value, requires_grad=False) if is_parameter else value
        owner, _, last = name.rpartition(".")
        setattr(net.get_submodule(owner), last, new[name])


def _packed(plain: nn.Module, names: Any) -> dict[str, Tensor]:
    """The tensors of the file by name; those of a CSR matrix end in `:rows`, `:columns`, ..."""
    layers = {n for n, m in plain.named_modules(remove_duplicate=False) if type(m) in _FIELDS}
    values, packed = plain.state_dict(), {}
    for name in names:
        # The copy: safetensors refuses tensors that share memory.
        dense = {name: values[name].cpu().clone(memory_format=torch.contiguous_format)}
        owner, _, last = name.rpartition(".")
        matrix = last == "weight" and owner in layers and dense[name].dim() > 1
        csr = _csr(name, dense[name].flatten(1)) if matrix else dense
        packed |= csr if _bytes(csr) < _bytes(dense) else dense
    return packed


def _csr(name: str, matrix: Tensor) -> dict[str, Tensor]:
    rows, columns, values = csr_arrays(matrix)
    if matrix.shape[1] - 1 <= torch.iinfo(torch.int16).max:
        columns = columns.to(torch.int16)
    return dict(zip((f"{name}:{part}" for part in _PARTS), (rows, columns, values), strict=True))


def _dense(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name in tensors:
        return tensors[name]
    rows, columns, values = (tensors[f"{name}:{part}"] for part in _PARTS)
    matrix = torch.zeros(like.shape, dtype=values.dtype).flatten(1)
    if len(rows) != len(matrix) + 1 or (len(columns) and int(columns.max()) >= matrix.shape[1]):
        raise _OtherNetError(f"{name!r} has another shape than {tuple(like.shape)}")
    row = torch.repeat_interleave(torch.arange(len(matrix)), rows.diff())
    matrix[row, columns.long()] = values
    return matrix.view(like.shape)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _serialise(tensors: dict[str, Tensor], texts: Mapping[str, str], log: list[Entry]) -> bytes:
    metadata = {"format": FORMAT, **texts}
    if log:
        metadata["structure"] = json.dumps(log, separators=(",", ":"))
    metadata["sha256"] = _digest(tensors, metadata)
    return safetensors.torch.save(tensors, metadata)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    texts = [metadata[key] for key in sorted(metadata) if key not in _OURS]
    said = [
        metadata["format"],
        *texts,
        *([metadata["structure"]] if "structure" in metadata else []),
    ]
    digest = hashlib.sha256(repr(said).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of ours, checked against its sha256."""
    try:
        require(Path(path).is_file(), "path", str(path), "a file that save wrote")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # The copy: safetensors maps the file, which may change.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        raise InputError(f"path = {str(path)!r}: not a whole safetensors file") from None
    ours = metadata.get("format") == FORMAT and "sha256" in metadata
    require(ours, "path", str(path), "a file that save wrote")
    whole = metadata["sha256"] == _digest(tensors, metadata)
    require(whole, "path", str(path), "its contents do not match their sha256")
    return tensors, metadata
