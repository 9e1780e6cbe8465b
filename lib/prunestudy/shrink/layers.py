"""What of a net is another than its factory made it, as plain text: for files without code.

Only layers named here are written or made; a file can ask for nothing else.
"""

import math
from typing import Any

from torch import nn

from prunestudy.errors import InputError, require
from prunestudy.shrink.remove import Constant, Nothing

Spec = dict[str, Any]

_CONV = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
_NORM = "num_features eps momentum affine track_running_stats"
_FIELDS = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), f"{_CONV} output_padding"
    ),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _NORM),
    nn.Linear: "in_features out_features",
    nn.LayerNorm: "normalized_shape eps elementwise_affine",
    nn.PReLU: "num_parameters",
    nn.Identity: "",
    nn.ReLU: "",
    Constant: "channels geometry",
    Nothing: "geometry",
}
_WITH_BIAS = (*list(_FIELDS)[:6], nn.Linear, nn.LayerNorm, Constant)
_BY_NAME = {cls.__name__: cls for cls in (*_FIELDS, nn.Sequential)}


def differences(net: nn.Module, fresh: nn.Module) -> dict[str, Spec]:
    """Specs, by name, of the modules of `net` that are others than those of `fresh`.

    Raises `InputError` for one that cannot be written down.
    """
    found: dict[str, Spec] = {}
    _differ(net, fresh, "", found)
    return found


def apply(net: nn.Module, specs: dict[str, Spec]) -> None:
    """Put modules made from `specs` into `net`, in place; `KeyError` for what is not understood."""
    for name, spec in specs.items():
        parent, _, child = name.rpartition(".")
        holder = net.get_submodule(parent)
        if child not in holder._modules:
            raise KeyError(name)
        setattr(holder, child, make(spec))


def spec_of(module: nn.Module, name: str = "") -> Spec:
    """Class and settings of a layer, or of a sequence of layers; `InputError` for another."""
    if type(module) is nn.Sequential:
        inside = {child: spec_of(m, f"{name}.{child}") for child, m in module.named_children()}
        return {"kind": "Sequential", "children": inside}
    known = type(module) in _FIELDS
    require(known, "module", name or type(module).__name__, "a layer that can be stored")
    values = {field: _plain(getattr(module, field)) for field in _FIELDS[type(module)].split()}
    if type(module) in _WITH_BIAS:
        values["bias"] = module.bias is not None
    return {"kind": type(module).__name__, **values}


def make(spec: Spec) -> nn.Module:
    """The layer that `spec` describes, with fresh weights; `KeyError` if it is not understood."""
    try:
        values = dict(spec)
        cls = _BY_NAME[values.pop("kind")]
        if cls is nn.Sequential:
            made = nn.Sequential()
            for child, inner in values["children"].items():
                made.add_module(child, make(inner))
            return made
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except (TypeError, ValueError, AttributeError, RuntimeError, InputError) as error:
        raise KeyError(f"{spec}: {error}") from None


def _differ(net: nn.Module, fresh: nn.Module, name: str, found: dict[str, Spec]) -> None:
    children, others = dict(net.named_children()), dict(fresh.named_children())
    if type(net) is type(fresh) and children and list(children) == list(others):
        for child, module in children.items():
            _differ(module, others[child], f"{name}.{child}".lstrip("."), found)
    elif type(net) is not type(fresh) or _settings(net) != _settings(fresh):
        found[name] = spec_of(net, name)


def _settings(module: nn.Module) -> Spec | None:
    """The spec of a layer that could be stored; None for one that has nothing to store."""
    stores = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    return spec_of(module) if stores and type(module) in _FIELDS else None


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back; not a number becomes none."""
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
