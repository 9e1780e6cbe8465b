"""What of a net is other than its factory makes it, as plain values: for files without code.

A structure is a list of entries [path, kind, arguments]: the module at `path` is a new layer of
class `kind`, made with the keyword `arguments`; those of a Sequential are entries of its own
layers, with names in place of paths. Only the layers listed here are ever written or made.
"""

from typing import Any

from torch import nn

from prunestudy.errors import require
from prunestudy.shrink.remove import Constant, Nothing

Entry = list[Any]

_CONV = "in_channels out_channels kernel_size stride padding groups dilation padding_mode"
_NORM = "num_features eps momentum affine track_running_stats"
_FIELDS: dict[type[nn.Module], str] = {
    nn.Conv1d: f"{_CONV} bias",
    nn.Conv2d: f"{_CONV} bias",
    nn.ConvTranspose2d: f"{_CONV} output_padding bias",
    nn.Linear: "in_features out_features bias",
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.LayerNorm: "normalized_shape eps elementwise_affine bias",
    nn.PReLU: "num_parameters",
    nn.Identity: "",
    Constant: "channels geometry bias",
    Nothing: "geometry",
}
_KINDS = {cls.__name__: cls for cls in _FIELDS}


def structure_of(net: nn.Module, fresh: nn.Module) -> list[Entry]:
    """The modules of `net` that are others than those of `fresh`, its factory's net.

    Raises `InputError`, naming the path, for one that is no layer of the list.
    """
    same = type(net) is type(fresh)
    require(same, "model", type(net).__name__, f"the factory makes a {type(fresh).__name__}")
    return _differences(net, fresh, "")


def restructure(net: nn.Module, structure: Any) -> None:
    """Put the layers that `structure` describes into `net`, with fresh weights.

    Raises `ValueError`, one line, for what `structure_of` does not write.
    """
    if not isinstance(structure, list):
        raise ValueError("its structure is not a list")
    for entry in structure:
        try:
            path, layer = entry[0], _made(entry)
            net.get_submodule(path)  # the path must be there already
            net.set_submodule(path, layer)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            raise ValueError(f"its structure has {str(entry)[:100]!r}, not a layer") from None


def _differences(net: nn.Module, fresh: nn.Module, path: str) -> list[Entry]:
    children, others = dict(net.named_children()), dict(fresh.named_children())
    if type(net) is type(fresh) and others and list(children) == list(others):
        pairs = ((name, child, others[name]) for name, child in children.items())
        return [
            e for name, *pair in pairs for e in _differences(*pair, f"{path}.{name}".strip("."))
        ]
    return [] if _same(net, fresh) else [_entry(net, path, path)]


def _same(net: nn.Module, fresh: nn.Module) -> bool:
    if type(net) is not type(fresh) or list(net.named_children()):
        return False
    if type(net) in _FIELDS:
        return _entry(net, "", "") == _entry(fresh, "", "")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (net, fresh)]
    return shapes[0] == shapes[1] and net.extra_repr() == fresh.extra_repr()


def _entry(layer: nn.Module, name: str, path: str) -> Entry:
    if type(layer) is nn.Sequential:
        inner = layer.named_children()
        return [name, "Sequential", [_layer(m, n, f"{path}.{n}") for n, m in inner]]
    return _layer(layer, name, path)


def _layer(layer: nn.Module, name: str, path: str) -> Entry:
    kind = type(layer).__name__
    allowed = f"other than the factory's; can be stored: {', '.join(_KINDS)}, Sequential of these"
    require(type(layer) in _FIELDS, path or "model", kind, allowed)
    values = {field: getattr(layer, field) for field in _FIELDS[type(layer)].split()}
    if "bias" in values:
        values["bias"] = layer.bias is not None
    # As JSON gives it back.
    return [name, kind, {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}]


def _made(entry: Entry) -> nn.Module:
    name, kind, arguments = entry
    if kind == "Sequential":
        layer = nn.Sequential()
        for inner in arguments:
            layer.add_module(inner[0], _made_layer(*inner))
    else:
        layer = _made_layer(*entry)
    if _entry(layer, name, name) != entry:  # also what torch takes and we never write
        raise ValueError(name)
    return layer


def _made_layer(_: str, kind: str, arguments: dict[str, Any]) -> nn.Module:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return _KINDS[kind](**values)
