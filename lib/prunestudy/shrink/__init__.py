"""From a trained net to a smaller one: what goes together, removal, factors, files, export."""

from prunestudy.shrink.components import ComponentGroup, component_groups
from prunestudy.shrink.csr import CsrLinear, to_csr
from prunestudy.shrink.export import OnnxNet, export
from prunestudy.shrink.factors import (
    energy_shares,
    factorise,
    factorise_layer,
    layer_speed_up,
    rank_at,
    ranks_by_energy,
    ranks_by_macs,
    ranks_by_share,
    reduce_rank,
)
from prunestudy.shrink.files import about, load, save
from prunestudy.shrink.fold import fold, require_ordinary
from prunestudy.shrink.groups import Group, Member, find
from prunestudy.shrink.narrow import Constant, Narrow, Nothing, axis_of, narrow
from prunestudy.shrink.proof import groups, groups_of
from prunestudy.shrink.remove import folded, remove, remove_groups
from prunestudy.shrink.view import describe, draw

__all__ = [
    "ComponentGroup",
    "Constant",
    "CsrLinear",
    "Group",
    "Member",
    "Narrow",
    "Nothing",
    "OnnxNet",
    "about",
    "axis_of",
    "component_groups",
    "describe",
    "draw",
    "energy_shares",
    "export",
    "factorise",
    "factorise_layer",
    "find",
    "fold",
    "folded",
    "groups",
    "groups_of",
    "layer_speed_up",
    "load",
    "narrow",
    "rank_at",
    "ranks_by_energy",
    "ranks_by_macs",
    "ranks_by_share",
    "reduce_rank",
    "remove",
    "remove_groups",
    "require_ordinary",
    "save",
    "to_csr",
]
