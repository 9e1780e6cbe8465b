"""Making a trained net smaller: dependency groups, removal, low-rank factors, files, export."""

# ruff: noqa: F401  (public names of the package)

from prunestudy.shrink.components import ComponentGroup, component_groups
from prunestudy.shrink.csr import CsrLinear, to_csr
from prunestudy.shrink.export import OnnxNet, export
from prunestudy.shrink.factors import factorise, factorise_layer, layer_speed_up, reduce_rank
from prunestudy.shrink.files import about, load, save
from prunestudy.shrink.fold import fold, require_ordinary
from prunestudy.shrink.groups import Group, find
from prunestudy.shrink.layers import Constant
from prunestudy.shrink.narrow import axis_of, narrow
from prunestudy.shrink.proof import groups
from prunestudy.shrink.ranks import (
    energy_shares,
    rank_at,
    ranks_by_energy,
    ranks_by_macs,
    ranks_by_share,
)
from prunestudy.shrink.remove import folded, remove, remove_groups
