"""From a trained net to a smaller one: plain copies, sparse storage, sparse layers."""

from prunestudy.shrink.budget import Budget, Parameters, require_target, spread_out
from prunestudy.shrink.components import ComponentGroup, component_groups, listing
from prunestudy.shrink.csr import CsrLinear, to_csr
from prunestudy.shrink.fold import fold
from prunestudy.shrink.groups import Group, Member, find, groups
from prunestudy.shrink.importance import group_l2, taylor
from prunestudy.shrink.narrow import Narrow, axis_of, narrow
from prunestudy.shrink.sparse import Storage, load_sparse, save_sparse, storage
from prunestudy.shrink.view import describe, draw

__all__ = [
    "Budget",
    "ComponentGroup",
    "CsrLinear",
    "Group",
    "Member",
    "Narrow",
    "Parameters",
    "Storage",
    "axis_of",
    "component_groups",
    "describe",
    "draw",
    "find",
    "fold",
    "group_l2",
    "groups",
    "listing",
    "load_sparse",
    "narrow",
    "require_target",
    "save_sparse",
    "spread_out",
    "storage",
    "taylor",
    "to_csr",
]
