"""Nets in files: safetensors and a log of the layers, which `load` replays on a fresh net.

The log lists modules as [path, class, arguments]: the constructor's arguments for the layers of
`_FIELDS`, the [name, class, arguments] of each part for a Sequential of these, and null for other
modules, which a fresh net must have already. For a subclass of a layer, the arguments also have
"of", the layer's class, and "own", the shapes to give the fresh net's; [path, "=", first] is
another name of a tensor. Only layers of `_FIELDS` are ever made, and nothing is unpickled. Their
weights, as matrices (out, everything else), are stored as compressed sparse rows (CSR) if these
take fewer bytes: values, columns (int16 if they fit, else int32) and row pointers (int32).
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
from torch.nn.parameter import is_lazy

from prunestudy.errors import InputError, path_of, require, written_whole
from prunestudy.shrink.csr import CsrLinear, csr_arrays
from prunestudy.shrink.factors import replace
from prunestudy.shrink.fold import fold, with_gradients
from prunestudy.shrink.layers import CONVOLUTIONS, TRANSPOSED, Constant

FORMAT = "prunestudy-sparse-1"
_OURS = ("format", "structure", "sha256")
_CSR = ("rows", "columns", "values")
_CONV = "in_channels out_channels kernel_size stride padding groups dilation padding_mode"
_NORM = "num_features eps momentum affine track_running_stats"
_FIELDS: dict[type[nn.Module], str] = {
    **dict.fromkeys(CONVOLUTIONS, f"{_CONV} bias"),
    **dict.fromkeys(TRANSPOSED, f"{_CONV} output_padding bias"),
    nn.Linear: "in_features out_features bias",
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _NORM),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _NORM),
    nn.LayerNorm: "normalized_shape eps elementwise_affine bias",
    nn.GroupNorm: "num_groups num_channels eps affine",
    nn.PReLU: "num_parameters",
    nn.Embedding: "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq",
    nn.Identity: "",
    Constant: "channels geometry bias",
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
    to keep with the net. Raises `InputError` for a path that no file can be written to, and
    naming a module or tensor that cannot be stored.
    """
    plain, name = fold(_module(net)), type(net).__name__
    texts = dict(about or {}) if isinstance(about or {}, Mapping) else {None: about}
    right = all(type(each) is str for pair in texts.items() for each in pair)
    allowed = f"texts by name; {', '.join(_OURS)} are taken"
    require(right and not texts.keys() & set(_OURS), "about", about, allowed)
    csr = any(isinstance(module, CsrLinear) for module in plain.modules())
    require(not csr, "net", name, "save the net before to_csr")
    others = {} if like is None else dict(fold(like).named_modules(remove_duplicate=False))
    log = _log(plain, others)
    if like is not None:
        try:
            rebuilt = _replayed(fold(like), log)
        except (AttributeError, ValueError) as error:
            raise InputError(f"net = {name!r}: not as `like`, and not rebuilt: {error}") from None
        same = str(rebuilt) == str(plain) and _shapes(rebuilt) == _shapes(plain)
        require(same, "net", name, "not as `like` in modules or tensors that are not rebuilt")
    tensors, ties = _packed(plain)
    metadata = {"format": FORMAT, **texts}
    if log or ties:
        short = {"separators": (",", ":"), "default": lambda number: number.item()}
        metadata["structure"] = json.dumps([*log, *ties], **short)
    metadata["sha256"] = _digest(tensors, metadata)
    with written_whole(path) as part:
        part.write_bytes(safetensors.torch.save(tensors, metadata))


def load(path: str | Path, net: nn.Module) -> nn.Module:
    """The saved net, rebuilt on a copy of the fresh `net`: on the CPU, in eval mode, trainable.

    Tensors come back bit for bit, in torch's default memory layout (in CSR, -0 comes back as 0).
    Raises `InputError` if the file is missing, damaged or of another kind, or of another net.
    """
    tensors, metadata = _read(path)
    fresh = fold(_module(net))
    try:
        log = json.loads(metadata.get("structure", "[]"))
        fresh = _replayed(fresh, [entry for entry in log if entry[1] != "="])
        _fill(fresh, tensors, {name: first for name, kind, first in log if kind == "="})
        fresh.cpu()
    except Exception as error:  # whatever a file may say that another version wrote, or a person
        why = " ".join(str(error).split())[:300]
        raise InputError(f"net = {type(net).__name__!r}: does not fit {path}: {why}") from None
    return with_gradients(fresh)


def about(path: str | Path) -> dict[str, str]:
    """The text that `save` kept with the net; `InputError` for a file that `load` refuses."""
    return {key: value for key, value in _read(path)[1].items() if key not in _OURS}


def _module(net: Any) -> nn.Module:
    require(isinstance(net, nn.Module), "net", net, "a torch module")
    lazy = any(map(is_lazy, (*net.parameters(), *net.buffers())))
    require(not lazy, "net", type(net).__name__, "parameters without values: call it first")
    return net


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(t, "shape", ())) for name, t in module.state_dict().items()}


def _log(plain: nn.Module, others: Mapping[str, nn.Module]) -> list[Entry]:
    """An entry for each module of `plain` that differs from that of its name in `others`."""
    log, whole = [], set()
    for path, module in plain.named_modules(remove_duplicate=False):
        if path.rpartition(".")[0] in whole:
            whole.add(path)  # its entry is part of its Sequential's
            continue
        other, parts = others.get(path), list(dict(module.named_children()))
        if parts and type(other) is type(module) and parts == list(dict(other.named_children())):
            continue  # what differs is inside
        entry = _entry(path, module)
        if _is_made(entry):
            made = _made(*entry)
            allowed = f"has the tensors {_shapes(module)}, not those of {made}"
            require(_shapes(made) == _shapes(module), "module", path, allowed)
            whole.add(path or None)
        if other is None or entry != _entry(path, other):
            log.append(entry)
    return log


def _entry(path: str, module: nn.Module) -> Entry:
    """[path, class, arguments] of `module`; see the top of this file."""
    kind = type(module)
    if path and kind is nn.Sequential and len(module):
        inner = [_entry(name, part) for name, part in module.named_children()]
        made = len(inner) == len(module) and all(map(_is_made, inner))
        return [path, "Sequential", inner if made else None]
    of = next((cls for cls in kind.__mro__ if cls in _FIELDS), None)
    if of is None:
        return [path, kind.__name__, None]
    values = {field: getattr(module, field) for field in _FIELDS[of].split()}
    if of is not kind:
        values["of"] = of.__name__
        values["own"] = [[name, *n] for name, n in _shapes(module).items() if "." not in name]
    if "bias" in values:
        values["bias"] = module.bias is not None
    # As JSON gives it back.
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return [path, kind.__name__, values]


def _is_made(entry: Entry) -> bool:
    """Whether `_made` makes the layer: neither the fresh net's module nor a subclass."""
    return entry[2] is not None and "of" not in entry[2]


def _made(path: str, kind: str, arguments: Any) -> nn.Module:
    """The layer of an entry on the meta device: no numbers are drawn."""
    if kind == "Sequential":
        layer = nn.Sequential()
        for name, *part in arguments:
            layer.add_module(name, _made(name, *part))
    else:
        values = {field: arguments[field] for field in _FIELDS[_KINDS[kind]].split()}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        with torch.device("meta"):
            layer = _KINDS[kind](**values)
    if _entry(path, layer) != [path, kind, arguments]:  # also what torch takes and we never write
        raise ValueError(f"{path!r} is no {kind}")
    return layer.eval()


def _replayed(net: nn.Module, log: list[Entry]) -> nn.Module:
    """`net` with the layers of `log`; `ValueError` for what is not there.

    A layer of the same class changes its size only: hooks, attributes and other holders stay.
    """
    for path, kind, arguments in log:
        try:
            there = net.get_submodule(path)
        except AttributeError:
            raise ValueError(f"{path!r} is a {kind} in the file, absent from this net") from None
        if type(there).__name__ != kind and (arguments is None or not path or "of" in arguments):
            raise ValueError(f"{path or 'the whole'!r} is a {kind}, here a {type(there).__name__}")
        parts = [name for name, _ in there.named_children()]
        if arguments is None or _entry(path, there) == [path, kind, arguments]:
            continue
        if "of" in arguments or type(there) is _KINDS.get(kind):
            _resize(there, **{"of": kind, **arguments})
        elif type(there).__name__ == kind and [name for name, *_ in arguments] == parts:
            _replayed(there, arguments)
        else:
            replace(net, path, _made(path, kind, arguments))
    return net


def _resize(layer: nn.Module, of: str, own: Any = (), **arguments: Any) -> None:
    """Make `layer` as large as one `of` its class, or of the class below, with `arguments`."""
    made = _made("", of, arguments)
    if not isinstance(layer, type(made)):
        raise ValueError(f"a {type(layer).__name__} that is no {of}")
    layer._parameters.update(made._parameters)
    layer._buffers.update(made._buffers)
    for name, *shape in own:  # a subclass may have more of them
        new = getattr(layer, name).detach().new_empty(shape)
        setattr(layer, name, nn.Parameter(new, False) if name in layer._parameters else new)
    inner = vars(nn.Module())
    vars(layer).update({name: v for name, v in vars(made).items() if name not in inner})


def _fill(net: nn.Module, tensors: dict[str, Tensor], ties: dict[str, str]) -> None:
    """Give `net` the tensors of the file, of the same names and shapes."""
    dense = {n: tensor for n, tensor in tensors.items() if n.rpartition(":")[2] not in _CSR}
    own = net.state_dict()
    for name, like in own.items():
        if f"{name}:values" in tensors:
            dense[name] = _dense(*(tensors[f"{name}:{part}"] for part in _CSR), like.shape)
    dense |= {name: dense[first] for name, first in ties.items()}
    filled = type(own)(dense)
    filled._metadata = own._metadata  # versions of modules, which some ask for
    net.load_state_dict(filled, assign=True)
    for name, first in ties.items():
        (owner, slot), (other, origin) = (n.rpartition(".")[::2] for n in (name, first))
        setattr(net.get_submodule(owner), slot, getattr(net.get_submodule(other), origin))


def _packed(plain: nn.Module) -> tuple[dict[str, Tensor], list[Entry]]:
    """The tensors of the file (of a CSR matrix NAME:rows, ...), and entries of further names."""
    layers = {n for n, m in plain.named_modules(remove_duplicate=False) if type(m) in _FIELDS}
    packed, ties, first = {}, [], {}
    for name, tensor in plain.state_dict(keep_vars=True).items():
        kind = str(getattr(tensor, "dtype", type(tensor).__name__))
        dense = getattr(tensor, "layout", None) == torch.strided and not tensor.is_meta
        right = dense and (not tensor.is_complex() or tensor.dtype == torch.complex64)
        require(right, name, kind, "only dense tensors of real numbers or complex64 are stored")
        if first.setdefault(id(tensor), name) != name:
            ties.append([name, "=", first[id(tensor)]])
            continue
        # The copy: safetensors refuses tensors that share memory.
        packed[name] = dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if tensor.dim() > 1 and name.endswith("weight") and name.rpartition(".")[0] in layers:
            csr = dict(zip(_CSR, csr_arrays(dense.flatten(1)), strict=True))
            if dense.shape[1:].numel() - 1 <= torch.iinfo(torch.int16).max:
                csr["columns"] = csr["columns"].to(torch.int16)
            if sum(array.nbytes for array in csr.values()) < dense.nbytes:
                del packed[name]
                packed |= {f"{name}:{part}": array for part, array in csr.items()}
    return packed, ties


def _dense(rows: Tensor, columns: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    matrix = torch.zeros(shape, dtype=values.dtype).flatten(1)
    if len(rows) != len(matrix) + 1:
        raise ValueError(f"{len(rows) - 1} rows, here {len(matrix)}")
    row = torch.repeat_interleave(torch.arange(len(matrix)), rows.diff())
    matrix[row, columns.long()] = values
    return matrix.view(shape)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    names = ("format", *sorted(metadata.keys() - set(_OURS)), "structure")
    digest = hashlib.sha256(repr([metadata[n] for n in names if n in metadata]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of ours, checked against its sha256."""
    try:
        require(path_of(path).is_file(), "path", str(path), "a file that save wrote")
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
