"""From a trained net to a smaller one: plain copies, sparse storage, sparse layers."""

from prunestudy.shrink.csr import CsrLinear, to_csr
from prunestudy.shrink.fold import fold
from prunestudy.shrink.groups import Group, Member, find, groups
from prunestudy.shrink.sparse import Storage, load_sparse, save_sparse, storage
from prunestudy.shrink.view import describe, draw

__all__ = [
    "CsrLinear",
    "Group",
    "Member",
    "Storage",
    "describe",
    "draw",
    "find",
    "fold",
    "groups",
    "load_sparse",
    "save_sparse",
    "storage",
    "to_csr",
]
