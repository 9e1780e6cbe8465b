"""A reproducible study of five papers on making neural networks smaller, and its library.

    import prunestudy as ps

    method = ps.GDP(target=0.5, of="macs")
    result = ps.prune(model, method, train_loader, ps.Recipe(epochs=10, lr=0.05),
                      validation=val_loader)
    print(result.report())
    result.save("small.safetensors")
    net = ps.load("small.safetensors", MyNet())

The subpackages, each importing only those before it: `models`, `datasets`, `shrink`, `measure`,
`methods`, `train`, `papers`, `study`.
"""

import os
from importlib import import_module
from importlib.metadata import version
from typing import Any

# cuBLAS reads it once, before its first call, and is deterministic with it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = version("prunestudy")

# The public names; torch is imported when the first of them is accessed.
_PLACES = {
    "errors": "InputError",
    "shrink": "Group export fold groups load remove save",
    "measure": "Metrics",
    "methods": "At Context Method",
    "methods.sparse_gates": "SparseGates",
    "methods.force": "Force",
    "methods.gdp": "GDP",
    "methods.magnitude_attention": "MagnitudeAttention",
    "methods.component_aware": "ComponentAware",
    "methods.weights": "Dpf GradualMagnitude L1 Magnitude Snip",
    "methods.channel_controls": "GroupL2 L1Filter NetworkSlimming Random TaylorChannels",
    "methods.hard_concrete": "HardConcrete",
    "methods.search": "Uniform",
    "methods.low_rank": "PlainLowRank",
    "train": "Recipe Result prune shrink_to",
}
_PUBLIC = {name: place for place, names in _PLACES.items() for name in names.split()}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'prunestudy' has no attribute {name!r}")
    return getattr(import_module(f"prunestudy.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
