"""What figures and records show of a layer's filters: angles, energy, ranks, the filters."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunestudy import measure
from prunestudy.methods.base import At, Context
from prunestudy.methods.low_rank import LowRank, is_finite
from prunestudy.methods.probes import Probe
from prunestudy.shrink import energy_shares, factorise_layer, fold, layer_speed_up, rank_at
from prunestudy.shrink.factors import Layer, full_rank, merged, speed_up_at, weight_matrix

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
    `validation_factorised`, the metric before any fine-tuning of them.
    """

    method: LowRank

    def attach(self, method: LowRank, model: nn.Module, context: Context) -> None:
        """Note how the filters lie at the start."""
        super().attach(method, model, context)
        self._whole: nn.Module | None = None
        self._measures: dict[str, float] = {}
        self._macs = measure.layer_macs(model, context.example)
        self._arrays = portraits(method.layers_of(model), "before")

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
        if self._is_whole():
            layers = self.method.layers_of(self.model).values()
            return {"rank": float(sum(rank_at(layer, _KEPT) for layer in layers))}
        return {"rank": float(sum((self.method.ranks or {}).values()))}

    def views(self) -> dict[str, AbstractContextManager]:
        """The net as it would be if it were factorised now."""
        return {"low_rank": self._projected()} if self._is_whole() else {}

    def finish(self) -> None:
        """Note the whole net, where no fine-tuning has followed."""
        if self._is_whole():
            self._note()
            self._whole = fold(self.model)

    def finished(self, net: nn.Module) -> None:
        """Score the factors and count what they cost."""
        if self._whole is not None:
            self._score(net)
        ranks = self.method.ranks or {}
        self._measures |= {f"factor_rank.{name}": float(rank) for name, rank in ranks.items()}
        self._measures["factor_rank_total"] = float(sum(ranks.values()))
        if ranks:
            now = measure.layer_macs(net, self.context.example)
            factors = sum(now[f"{name}.{part}.weight"] for name in ranks for part in (0, 1))
            whole = sum(self._macs[f"{name}.weight"] for name in ranks)
            self._measures["factor_speed_up"] = whole / factors

    def measures(self) -> dict[str, float]:
        """The numbers that the class lists."""
        return self._measures

    def others(self) -> dict[str, nn.Module]:
        """The whole net, where no fine-tuning followed: ranks are those at its accuracy."""
        return {"whole": self._whole} if self._whole is not None else {}

    def arrays(self) -> dict[str, np.ndarray]:
        """`portraits` before and after."""
        return self._arrays

    def state(self) -> dict[str, Any]:
        """What was measured so far."""
        arrays = {name: torch.from_numpy(a) for name, a in self._arrays.items()}
        return {"measures": self._measures, "arrays": arrays}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self._measures = state["measures"]
        self._arrays = {name: a.cpu().numpy() for name, a in state["arrays"].items()}

    def _is_whole(self) -> bool:
        return self.method.ranks is None and is_finite(self.model)

    def _score(self, net: nn.Module) -> None:
        if self.context.score:
            self._measures["validation_factorised"] = self.context.score(net)

    def _note(self) -> None:
        layers = self.method.layers_of(self.model)
        ranks = {name: rank_at(layer, _KEPT) for name, layer in layers.items()}
        ratios = [rank / full_rank(layers[name]) for name, rank in ranks.items()]
        total = sum(ranks.values())
        self._measures = {
            **{f"rank.{name}": float(rank) for name, rank in ranks.items()},
            "rank_total": float(total),
            "rank_total_svd": float(sum(rank_at(x, _KEPT, "svd") for x in layers.values())),
            "log2_rank_total": math.log2(total),
            "rank_ratio": sum(ratios) / len(ratios),
            **{f"speed_up.{n}": layer_speed_up(layers[n], rank) for n, rank in ranks.items()},
            "speed_up": speed_up_at(self.model, self._macs, ranks),
        }
        self._arrays |= portraits(layers, "after")

    @contextmanager
    def _projected(self) -> Iterator[None]:
        ranks = self.method.wanted(self.model)
        layers = {name: self.model.get_submodule(name) for name in ranks}
        before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        with torch.no_grad():
            for name, layer in layers.items():
                pair = factorise_layer(layer, ranks[name], self.method.variant)
                layer.weight.copy_(merged(pair))
            try:
                yield
            finally:
                for name, layer in layers.items():
                    layer.weight.copy_(before[name])


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
    """Arrays for figures of `layers`: `energy_WHEN.LAYER`, `angles_WHEN.LAYER`, `filters_WHEN...`.

    The share of the squared energy in the first 1, 2, ... directions; the angle histogram; and the
    filters (N, D) of the first layers, up to 80,000 numbers in all.
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
