"""From a trained net to a smaller one: plain copies, sparse storage, sparse layers."""

from prunestudy.shrink.csr import CsrLinear, to_csr
from prunestudy.shrink.fold import fold
from prunestudy.shrink.low_rank import factorise, factorise_layer, narrow, speed_up
from prunestudy.shrink.ranks import ranks_by_energy, ranks_by_macs, ranks_by_share
from prunestudy.shrink.sparse import Storage, load_sparse, save_sparse, storage

__all__ = [
    "CsrLinear",
    "Storage",
    "factorise",
    "factorise_layer",
    "fold",
    "load_sparse",
    "narrow",
    "ranks_by_energy",
    "ranks_by_macs",
    "ranks_by_share",
    "save_sparse",
    "speed_up",
    "storage",
    "to_csr",
]
