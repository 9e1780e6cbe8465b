"""CIFAR-10 and CIFAR-100 in their Python version: pickles of arrays.

They are read only after their md5 was verified, and even then nothing but arrays is built.
"""

import codecs
import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy._core import multiarray

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): multiarray._reconstruct,
    # how Python 3 writes bytes for Python 2
    ("_codecs", "encode"): codecs.encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no array")
        return _ALLOWED[module, name]


def parse(files: Mapping[str, bytes]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, 32, 32, 3) uint8 and (fine) labels (N,) int64 of `train` and `test`.

    `files` maps names to contents; those whose name starts with "test" are the test part. Raises
    `pickle.UnpicklingError` for a file that holds anything but arrays and plain values.
    """
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for name in sorted(files):
        # Written by Python 2: its text comes back as latin-1.
        batch = _ArraysOnly(io.BytesIO(files[name]), encoding="latin1").load()
        parts["test" if name.startswith("test") else "train"].append(batch)
    return {part: _stack(batches) for part, batches in parts.items()}


def _stack(batches: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.concatenate([batch["data"] for batch in batches])
    labels = [batch["labels" if "labels" in batch else "fine_labels"] for batch in batches]
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.concatenate(labels).astype(np.int64)
