"""The methods, one file per paper, and the controls that they are compared with."""

from typing import Any

from prunestudy.errors import require_one_of
from prunestudy.methods.base import TARGETS, Context, Method, Params, Phase, Progress
from prunestudy.methods.channel_ranking import GroupL2, L1Filter
from prunestudy.methods.component_aware import ComponentAware
from prunestudy.methods.dpf import Dpf
from prunestudy.methods.force import Force
from prunestudy.methods.gdp import GDP
from prunestudy.methods.hard_concrete import HardConcrete
from prunestudy.methods.l1 import L1
from prunestudy.methods.magnitude import GradualMagnitude, Magnitude
from prunestudy.methods.magnitude_attention import MagnitudeAttention
from prunestudy.methods.network_slimming import NetworkSlimming
from prunestudy.methods.plain_low_rank import PlainLowRank
from prunestudy.methods.random import Random
from prunestudy.methods.scratch import Scratch
from prunestudy.methods.snip import Snip
from prunestudy.methods.sparse_gates import SparseGates
from prunestudy.methods.uniform import Uniform
from prunestudy.values import checked

_METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        *(Method, SparseGates, Magnitude, GradualMagnitude, Random, L1),
        *(MagnitudeAttention, Dpf, Snip),
        *(GDP, L1Filter, GroupL2, NetworkSlimming, HardConcrete, Scratch),
        *(ComponentAware, Uniform),
        *(Force, PlainLowRank),
    )
}

__all__ = [
    "TARGETS",
    "Context",
    "Method",
    "Params",
    "Phase",
    "Progress",
    "build",
    "method_class",
    "names",
    "params_of",
]


def names() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(_METHODS)


def method_class(name: str) -> type[Method]:
    """Return the class of method `name`; raises `InputError` for an unknown one."""
    require_one_of("method", name, _METHODS)
    return _METHODS[name]


def params_of(name: str, values: dict[str, Any]) -> Params:
    """Return the checked settings of method `name`; raises `InputError` naming a bad one."""
    return checked(method_class(name).Params, values, "params")


def build(
    name: str, values: dict[str, Any], target: float | None = None, kind: str | None = None
) -> Method:
    """Return method `name` with settings `values`, aiming at `target`.

    `target` is the share removed of what `kind` counts (a key of `TARGETS`; None: the method's
    first). Raises `InputError` for a bad value.
    """
    return method_class(name)(params_of(name, values), target, kind)
