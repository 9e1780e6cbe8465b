"""What figures and records show of a layer's filters: angles, energy, ranks, the filters."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy import measure
from prunestudy.methods.base import At, Context
from prunestudy.methods.low_rank import LowRank, is_finite
from prunestudy.methods.probes import Probe
from prunestudy.shrink import energy_shares, factorise_layer, fold, layer_speed_up, rank_at
from prunestudy.shrink.factors import Layer, full_rank, merged, weight_matrix
from prunestudy.shrink.ranks import Variant

BINS = 36
_KEPT = 0.95  # the share of energy at which ranks are reported, whatever the target
# 320 kB of filters twice, before and after, stay below what a run may leave.
_MOST_NUMBERS = 80_000


class Filters(Probe):
    """Ranks at 5% error, angles and filters before and after the training; scores of the factors.

    Measures: `rank.NAME`, `rank_total`, its log2, `rank_ratio` (mean over the layers of rank over
    full rank), `speed_up` (MACs of these layers over those of their factors at those ranks),
    `speed_up.NAME`; `rank_total_svd`, where 5% is meant of the norm, not of its square;
    `factor_rank.NAME`, `factor_rank_total`, `factor_speed_up` of the factors that the net has;
    `validation_factorised`, the metric before any fine-tuning of them, with batch norm's statistics
    estimated anew if they are.
    """

    noted: ClassVar[tuple[str, ...]] = ("found", "drawn")
    method: LowRank

    def attach(self, method: LowRank, model: nn.Module, context: Context) -> None:
        """Note how the filters lie at the start."""
        super().attach(method, model, context)
        self.found: dict[str, float] = {}
        self.drawn = portraits(method.layers_of(model), "before")
        self._whole: nn.Module | None = None
        self._names = list(method.layers_of(model))
        self._macs = measure.layer_macs(model, context.example)

    def leaving(self, at: At) -> None:
        """Note ranks, angles and filters of the net while it is whole."""
        if at.phase == "train" and self.method.fine_tune and is_finite(self.model):
            self._note()

    def update(self, at: At) -> None:
        """Score the factors before any fine-tuning."""
        if at.phase == "train" and at.last and self.method.ranks is not None:
            self._score(self.model)

    def row(self) -> dict[str, float]:
        """The total rank at 5% error, or that of the factors; 0 if weights are not finite."""
        ranks = self._ranks() if self._is_whole() else self.method.ranks or {}
        return {"rank": float(sum(ranks.values()))}

    def views(self) -> dict[str, AbstractContextManager]:
        """The net as it would be if it were factorised now, where that takes no trials.

        With the statistics that its batch norm has.
        """
        seen = self._is_whole() and self.method.by == "energy"
        return {"low_rank": self._projected()} if seen else {}

    def finish(self) -> None:
        """Note the whole net, where no fine-tuning has followed."""
        if self._is_whole():
            self._note()
            self._whole = fold(self.model)

    def finished(self, net: nn.Module) -> None:
        """Score the factors and count what they cost."""
        if self._whole is not None:
            self._score(net)
        parts = {name: net.get_submodule(name) for name in self._names}
        ranks = {n: len(p[0].weight) for n, p in parts.items() if isinstance(p, nn.Sequential)}
        self.found |= {f"factor_rank.{name}": float(rank) for name, rank in ranks.items()}
        self.found["factor_rank_total"] = float(sum(ranks.values()))
        if ranks:
            now = measure.layer_macs(net, self.context.example)
            factors = sum(now[f"{name}.{part}.weight"] for name in ranks for part in (0, 1))
            whole = sum(self._macs[f"{name}.weight"] for name in ranks)
            self.found["factor_speed_up"] = whole / factors

    def measures(self) -> dict[str, float]:
        """The numbers that the class lists."""
        return self.found

    def others(self) -> dict[str, nn.Module]:
        """The whole net, where no fine-tuning followed: ranks are those at its accuracy."""
        return {"whole": self._whole} if self._whole is not None else {}

    def arrays(self) -> dict[str, np.ndarray]:
        """`portraits` before and after."""
        return {name: tensor.cpu().numpy() for name, tensor in self.drawn.items()}

    def _is_whole(self) -> bool:
        return self.method.ranks is None and is_finite(self.model)

    def _ranks(self, variant: Variant = "pca") -> dict[str, int]:
        """Ranks at 5% error of the layers of the whole net."""
        layers = self.method.layers_of(self.model)
        return {name: rank_at(layer, _KEPT, variant) for name, layer in layers.items()}

    def _score(self, net: nn.Module) -> None:
        if self.context.score:
            self.found["validation_factorised"] = self.context.score(net)

    def _note(self) -> None:
        layers, ranks = self.method.layers_of(self.model), self._ranks()
        total = sum(ranks.values())
        self.found = {
            **{f"rank.{name}": float(rank) for name, rank in ranks.items()},
            "rank_total": float(total),
            "rank_total_svd": float(sum(self._ranks("svd").values())),
            "log2_rank_total": math.log2(total),
            "rank_ratio": sum(m / full_rank(layers[n]) for n, m in ranks.items()) / len(ranks),
            **{f"speed_up.{n}": layer_speed_up(layers[n], rank) for n, rank in ranks.items()},
            "speed_up": speed_up_at(self.model, self._macs, ranks),
        }
        self.drawn |= portraits(layers, "after")

    @contextmanager
    def _projected(self) -> Iterator[None]:
        ranks = self.method.wanted(self.model)
        weights = {name: self.model.get_submodule(name).weight for name in ranks}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                layer = self.model.get_submodule(name)
                weight.copy_(merged(factorise_layer(layer, ranks[name])))
            try:
                yield
            finally:
                for name, weight in weights.items():
                    weight.copy_(before[name])


def speed_up_at(model: nn.Module, macs: Mapping[str, int], ranks: Mapping[str, int]) -> float:
    """MACs of the layers in `ranks` over those of their factors; `macs` by `measure.layer_macs`."""
    whole = {name: macs[f"{name}.weight"] for name in ranks}
    low = (whole[n] / layer_speed_up(model.get_submodule(n), rank) for n, rank in ranks.items())
    return sum(whole.values()) / sum(low)


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
    """Arrays for figures of `layers`: `energy_WHEN.LAYER`, `angles_WHEN.LAYER`, `filters_WHEN...`.

    The share of the squared energy in the first 1, 2, ... directions; the angle histogram; and the
    filters (N, D) of the first layers, up to 80,000 numbers in all.
    """
    found, numbers = {}, 0
    for name, layer in layers.items():
        found[f"energy_{when}.{name}"] = energy_shares(layer).float()
        found[f"angles_{when}.{name}"] = angle_histogram(layer)
        numbers += layer.weight.numel()
        if numbers <= _MOST_NUMBERS:
            filters = layer.weight.detach().flatten(1)
            found[f"filters_{when}.{name}"] = filters.to(torch.float32, copy=True)
    return found
