"""Where images come from, and how batches are made of them.

A data set is one uint8 tensor in memory, or a list of files to be streamed. `info` says what a set
looks like (without reading it and without torch, so that planning a study stays light), `load`
reads and verifies it, `split` takes validation images from the training images, `batches_of` makes
batches of either.

    data = load("mnist")
    train, validation = split(data.train, 5000)
    for x, y in batches_of(train, data.info, 128, shift=2, seed=1).epoch(0):
        ...
"""

from importlib import import_module
from typing import Any

from prunestudy.datasets.catalogue import DatasetInfo, data_root, fingerprint, info, names

# These need torch, whose import takes two seconds: they come at their first use.
_WITH_TORCH = {
    "Batches": "batches",
    "Dataset": "sources",
    "ImageSet": "sources",
    "StreamBatches": "stream_batches",
    "StreamSet": "streams",
    "batches_of": "stream_batches",
    "load": "sources",
    "split": "sources",
}
__all__ = ["DatasetInfo", "data_root", "fingerprint", "info", "names"]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
