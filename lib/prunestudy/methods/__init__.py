"""The methods, one file per paper, and the controls that they are compared with."""

# ruff: noqa: F401  (public names of the package)

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from prunestudy.errors import require_one_of
from prunestudy.methods.base import TARGETS, At, Context, Method, Phase
from prunestudy.methods.probes import Probe
from prunestudy.values import Values, checked

# Each method: the file and class of the method, and those of its probe if it has one.
_METHODS = {
    "dense": ("base:Method", ""),
    "sparse_gates": ("sparse_gates:SparseGates", "weight_probes:_Gates"),
    "magnitude": ("weights:Magnitude", ""),
    "gradual_magnitude": ("weights:GradualMagnitude", ""),
    "random": ("channel_controls:Random", ""),
    "l1": ("weights:L1", ""),
    "magnitude_attention": ("magnitude_attention:MagnitudeAttention", "weight_probes:_Attentions"),
    "dpf": ("weights:Dpf", "weight_probes:_Trail"),
    "snip": ("weights:Snip", ""),
    "gdp": ("gdp:GDP", "channel_probes:_GatePaths"),
    "l1_filter": ("channel_controls:L1Filter", ""),
    "group_l2": ("channel_controls:GroupL2", ""),
    "taylor_channels": ("channel_controls:TaylorChannels", ""),
    "network_slimming": ("channel_controls:NetworkSlimming", ""),
    "hard_concrete": ("hard_concrete:HardConcrete", "channel_probes:_ConcretePaths"),
    "scratch": ("base:_Scratch", ""),
    "component_aware": ("component_aware:ComponentAware", "channel_probes:_Pictures"),
    "uniform": ("search:Uniform", "channel_probes:_Pictures"),
    "force": ("force:Force", "filter_probes:_Filters"),
    "plain_low_rank": ("low_rank:PlainLowRank", "filter_probes:_Filters"),
}


def names() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(_METHODS)


def method_class(name: str) -> type[Method]:
    """The class of method `name`; raises `InputError` for an unknown one."""
    require_one_of("method", name, _METHODS)
    return _found(_METHODS[name][0])


def params_of(name: str, values: dict[str, Any]) -> Values:
    """Return the checked settings of method `name`; raises `InputError` naming a bad one."""
    return checked(method_class(name).Settings, values, "params")


def build(
    name: str, values: dict[str, Any], target: float | None = None, of: str | None = None
) -> Method:
    """Return method `name` with settings `values`; see `Method`. `InputError` for a bad value."""
    return method_class(name)(target, of, **values)


def probe_of(name: str, pixels: Callable[[Tensor], Tensor] | None = None) -> Probe:
    """What the study observes of method `name`; `pixels` maps inputs to images."""
    require_one_of("method", name, _METHODS)
    place = _METHODS[name][1]
    probe = _found(place)() if place else Probe()
    probe.pixels = pixels or probe.pixels
    return probe


def _found(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"prunestudy.methods.{module}"), name)
