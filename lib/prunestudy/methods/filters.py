"""What figures show of a layer's filters: their angles, their energy, the filters themselves."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from prunestudy.shrink.factors import Layer, energy_shares, weight_matrix

BINS = 36
# 320 kB of filters twice, before and after, stay below what a run may leave.
_MOST_NUMBERS = 80_000


def angle_histogram(layer: Layer) -> Tensor:
    """Counts of the angles between the filters of each group, 36 bins over 0-180 degrees.

    Each pair once; filters of zeros are left out.
    """
    counts = torch.zeros(BINS, dtype=torch.int64)
    for rows in weight_matrix(layer).double().cpu():
        length = rows.norm(dim=1, keepdim=True)
        unit = (rows / length)[length[:, 0] > 0]
        first, second = torch.triu_indices(len(unit), len(unit), 1)
        degrees = (unit @ unit.T)[first, second].clamp(-1, 1).acos().rad2deg()
        counts += torch.histc(degrees, BINS, 0, 180).to(torch.int64)
    return counts


def portraits(layers: Mapping[str, Layer], when: str) -> dict[str, np.ndarray]:
    """Arrays for figures of `layers`, named `energy_WHEN.LAYER`, `angles_...` and `filters_...`.

    Energy shares by rank, the angle histogram and, of the first layers up to 80,000 numbers in
    all, the filters (N, D).
    """
    arrays, numbers = {}, 0
    for name, layer in layers.items():
        arrays[f"energy_{when}.{name}"] = energy_shares(layer).float().cpu().numpy()
        arrays[f"angles_{when}.{name}"] = angle_histogram(layer).numpy()
        numbers += layer.weight.numel()
        if numbers <= _MOST_NUMBERS:
            filters = layer.weight.detach().float().flatten(1)
            arrays[f"filters_{when}.{name}"] = filters.cpu().numpy().copy()
    return arrays
