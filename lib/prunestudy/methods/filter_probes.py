"""What figures and records show of a layer's filters: angles, energy, ranks."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy.methods.base import At, Context
from prunestudy.methods.low_rank import LowRank, is_finite
from prunestudy.methods.probes import Probe
from prunestudy.shrink import energy_shares, fold, layer_speed_up, rank_at
from prunestudy.shrink.factors import Layer, weight_matrix

BINS = 36
_KEPT = 0.95  # the share of energy at which ranks are reported, whatever the target


class _Filters(Probe):
    """Ranks at 5% error; angles and energy before and after the training; the factors' score.

    Measures: `rank.NAME`, `rank_total`, its log2, `speed_up.NAME` (a layer's MACs over those of its
    factors at that rank); `rank_total_svd`, where 5% is meant of the norm, not of its square;
    `factor_rank.NAME` of the factors that the net has; `validation_factorised`, the metric before
    any fine-tuning of them, with batch norm's statistics estimated anew if they are.
    """

    noted = ("found", "drawn")
    method: LowRank

    def attach(self, method: LowRank, model: nn.Module, context: Context) -> None:
        super().attach(method, model, context)
        self.found: dict[str, float] = {}
        self.drawn = portraits(method.layers_of(model), "before")
        self._whole: nn.Module | None = None
        self._names = list(method.layers_of(model))

    def leaving(self, at: At) -> None:
        """Note ranks and angles of the net while it is whole."""
        if at.phase == "train" and self.method.fine_tune and is_finite(self.model):
            self._note()

    def update(self, at: At) -> None:
        """Score the factors before any fine-tuning."""
        if at.phase == "train" and at.last and self.method.ranks is not None:
            self._score(self.model)

    def finished(self, net: nn.Module) -> None:
        """Note the whole net and score the factors, where no fine-tuning has followed."""
        if self.method.ranks is None and is_finite(self.model):
            self._note()
            self._whole = fold(self.model)
            self._score(net)
        parts = {name: net.get_submodule(name) for name in self._names}
        ranks = {n: len(p[0].weight) for n, p in parts.items() if isinstance(p, nn.Sequential)}
        self.found |= {f"factor_rank.{name}": float(rank) for name, rank in ranks.items()}

    def measures(self) -> dict[str, float]:
        return self.found

    def others(self) -> dict[str, nn.Module]:
        """The net before factorisation, if not fine-tuned: its ranks go with its accuracy."""
        return {"whole": self._whole} if self._whole is not None else {}

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: tensor.cpu().numpy() for name, tensor in self.drawn.items()}

    def _score(self, net: nn.Module) -> None:
        if self.context.score:
            self.found["validation_factorised"] = self.context.score(net)

    def _note(self) -> None:
        layers, kinds = self.method.layers_of(self.model), ("pca", "svd")
        ranks, by_norm = ({n: rank_at(m, _KEPT, k) for n, m in layers.items()} for k in kinds)
        total = sum(ranks.values())
        self.found = {
            **{f"rank.{name}": float(rank) for name, rank in ranks.items()},
            "rank_total": float(total),
            "rank_total_svd": float(sum(by_norm.values())),
            "log2_rank_total": math.log2(total),
            **{f"speed_up.{n}": layer_speed_up(layers[n], rank) for n, rank in ranks.items()},
        }
        self.drawn |= portraits(layers, "after")


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


def portraits(layers: Mapping[str, Layer], when: str) -> dict[str, Tensor]:
    """Arrays for figures of `layers`: `energy_WHEN.LAYER` and `angles_WHEN.LAYER`.

    The share of the energy in the first 1, 2, ... directions, and the angle histogram.
    """
    energy = {f"energy_{when}.{name}": energy_shares(layer) for name, layer in layers.items()}
    angles = {f"angles_{when}.{name}": angle_histogram(layer) for name, layer in layers.items()}
    return {name: shares.float() for name, shares in energy.items()} | angles
