"""Data sets, and batches made of them.

They lie in memory as one uint8 tensor, or on disk as files that worker processes decode.

    data = load("mnist")
    train, validation = split(data.train, 5000)
    for x, y in batches_of(train, data.info, 128, shift=2, seed=1).epoch(0):
        ...
"""

from importlib import import_module
from typing import Any

from prunestudy.datasets.catalogue import DatasetInfo, data_root, fingerprint, info, names

# These need torch, which takes two seconds to import; planning does without them.
_WITH_TORCH = {"Batches": "batches", "Stream": "streams", "batches_of": "streams"}
_WITH_TORCH |= dict.fromkeys(("Dataset", "ImageSet", "load", "split"), "sources")
__all__ = ["DatasetInfo", "data_root", "fingerprint", "info", "names"]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
