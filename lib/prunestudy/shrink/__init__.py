"""From a trained net to a smaller one: plain copies, sparse storage, sparse layers."""

from prunestudy.shrink.csr import CsrLinear, to_csr
from prunestudy.shrink.fold import fold
from prunestudy.shrink.sparse import Storage, load_net, save_net, storage

__all__ = ["CsrLinear", "Storage", "fold", "load_net", "save_net", "storage", "to_csr"]
