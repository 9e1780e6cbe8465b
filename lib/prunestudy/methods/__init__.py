"""The methods, one file per paper, and the controls that they are compared with."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from prunestudy.errors import require_one_of
from prunestudy.methods.base import TARGETS, At, Context, Method, Phase
from prunestudy.methods.probes import Probe
from prunestudy.values import Values, checked

# Where each method is, and what is observed of it.
_METHODS = {
    "dense": ("base:Method", ""),
    "sparse_gates": ("sparse_gates:SparseGates", "weight_probes:Gates"),
    "magnitude": ("weights:Magnitude", ""),
    "gradual_magnitude": ("weights:GradualMagnitude", ""),
    "random": ("channel_controls:Random", ""),
    "l1": ("weights:L1", ""),
    "magnitude_attention": (
        "magnitude_attention:MagnitudeAttention",
        "weight_probes:AttentionTrail",
    ),
    "dpf": ("weights:Dpf", "weight_probes:Trail"),
    "snip": ("weights:Snip", ""),
    "gdp": ("gdp:GDP", "channel_probes:GatePaths"),
    "l1_filter": ("channel_controls:L1Filter", ""),
    "group_l2": ("channel_controls:GroupL2", ""),
    "taylor_channels": ("channel_controls:TaylorChannels", ""),
    "network_slimming": ("channel_controls:NetworkSlimming", ""),
    "hard_concrete": ("hard_concrete:HardConcrete", "channel_probes:ConcretePaths"),
    "scratch": ("base:Scratch", ""),
    "component_aware": ("component_aware:ComponentAware", "channel_probes:Pictures"),
    "uniform": ("search:Uniform", "channel_probes:Pictures"),
    "force": ("force:Force", "filter_probes:Filters"),
    "plain_low_rank": ("low_rank:PlainLowRank", "filter_probes:Filters"),
}

__all__ = [
    "TARGETS",
    "At",
    "Context",
    "Method",
    "Phase",
    "Probe",
    "build",
    "method_class",
    "names",
    "params_of",
    "probe_of",
]


def names() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(_METHODS)


def method_class(name: str) -> type[Method]:
    """Return the class of method `name`; raises `InputError` for an unknown one."""
    require_one_of("method", name, _METHODS)
    return _found(_METHODS[name][0])


def params_of(name: str, values: dict[str, Any]) -> Values:
    """Return the checked settings of method `name`; raises `InputError` naming a bad one."""
    return checked(method_class(name).Settings, values, "params")


def build(
    name: str, values: dict[str, Any], target: float | None = None, of: str | None = None
) -> Method:
    """Return method `name` with settings `values`, aiming at `target`.

    `target` is the share removed of what `of` counts (a key of `TARGETS`; None: the method's
    first). Raises `InputError` for a bad value.
    """
    return method_class(name)(target, of, **values)


def probe_of(name: str, pixels: Callable[[Tensor], Tensor] | None = None) -> Probe:
    """A new probe for method `name`: what the study observes of its training.

    `pixels` maps inputs to the images that they stand for.
    """
    require_one_of("method", name, _METHODS)
    place = _METHODS[name][1]
    probe = _found(place)() if place else Probe()
    probe.pixels = pixels or probe.pixels
    return probe


def _found(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"prunestudy.methods.{module}"), name)
