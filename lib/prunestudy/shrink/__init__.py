"""From a trained net to a smaller one: what goes together, removal, storage, export."""

from prunestudy.shrink.components import ComponentGroup, component_groups
from prunestudy.shrink.csr import CsrLinear, to_csr
from prunestudy.shrink.fold import fold, require_ordinary
from prunestudy.shrink.groups import Group, Member, find
from prunestudy.shrink.importance import taylor
from prunestudy.shrink.low_rank import factorise, factorise_layer, reduce_rank, speed_up
from prunestudy.shrink.narrow import Narrow, axis_of, narrow
from prunestudy.shrink.onnx import OnnxNet, export_onnx, onnx_runs_on
from prunestudy.shrink.proof import folded, groups, groups_of, remove, remove_groups
from prunestudy.shrink.ranks import ranks_by_energy, ranks_by_macs, ranks_by_share
from prunestudy.shrink.remove import Constant, Nothing
from prunestudy.shrink.sparse import Storage, input_shape, load_net, save_net, storage
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
    "Storage",
    "axis_of",
    "component_groups",
    "describe",
    "draw",
    "export_onnx",
    "factorise",
    "factorise_layer",
    "find",
    "fold",
    "folded",
    "groups",
    "groups_of",
    "input_shape",
    "load_net",
    "narrow",
    "onnx_runs_on",
    "ranks_by_energy",
    "ranks_by_macs",
    "ranks_by_share",
    "reduce_rank",
    "remove",
    "remove_groups",
    "require_ordinary",
    "save_net",
    "speed_up",
    "storage",
    "taylor",
    "to_csr",
]
