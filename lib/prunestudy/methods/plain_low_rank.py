"""Low-rank factors of a plainly trained net: the control of Force Regularization.

The net is trained as ever; then each convolution becomes a few basis filters and a 1x1 mixture of
them (`prunestudy.shrink.factors`), and the factorised net may be fine-tuned. `force` does the
same after, or while, its forces pull the filters together.

The target is the share removed: of each layer's squared energy (0.05: "at most 5% reconstruction
error"), of each layer's full rank (equal ranks for every method), or of the net's MACs (shared so
that all layers lose the same share of energy). Ours: a layer whose factors would cost as many MACs
as itself stays whole.

Dynamic rank pruning (the paper's other way to factorise): all layers start at full rank and the PCA
is run again on the basis, `rounds` times during fine-tuning, at the target's energy each time; the
mixture is multiplied by the kept directions. The optimiser's momentum starts anew then, since the
old one belongs to directions that are gone (ours).
"""

import contextlib
import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from prunestudy import measure
from prunestudy.errors import require
from prunestudy.methods.base import Context, Method, Params, Phase
from prunestudy.methods.filters import portraits
from prunestudy.shrink import (
    factorise,
    fold,
    ranks_by_energy,
    ranks_by_macs,
    ranks_by_share,
    reduce_rank,
)
from prunestudy.shrink.factors import (
    Layer,
    cheaper,
    factorise_in_place,
    factorise_layer,
    full_rank,
    layer_speed_up,
    layers_to_factorise,
    merged,
    pairs_of,
    rank_at,
    speed_up_at,
    speed_up_of_pairs,
)

ERROR = 0.05  # the error at which ranks are reported, whatever the target


class LowRankParams(Params):
    """How the net is factorised; shares are of the steps.

    `factorise`: names of the layers, patterns with `*` allowed, separated by spaces; "": all
    convolutions larger than 1x1. `variant`: "pca", or "svd", which asks the energy of the norm.
    `fine_tune`: share in which the factorised net is trained, 0 for none; `fine_tune_lr`: its
    learning rate, times the recipe's; `rounds` of dynamic rank pruning in it, 0 to factorise once.
    """

    factorise: str = ""
    variant: Literal["pca", "svd"] = "pca"
    fine_tune: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fine_tune_lr: Annotated[float, Field(gt=0)] = 1.0
    rounds: Annotated[int, Field(ge=0, le=1000)] = 0


class PlainLowRank(Method):
    """Plain training, then low-rank factors, then (optionally) fine-tuning of the factors."""

    name: ClassVar[str] = "plain_low_rank"
    title: ClassVar[str] = "low rank, no force"
    target_kinds: ClassVar[tuple[str, ...]] = ("energy", "rank", "macs")
    Params: ClassVar[type[Params]] = LowRankParams

    def __init__(
        self, params: LowRankParams, target: float | None = None, target_kind: str | None = None
    ) -> None:
        super().__init__(params, target, target_kind)
        self.context: Context | None = None
        self._whole: nn.Module | None = None
        self._ranks: dict[str, int] = {}
        self._measures: dict[str, float] = {}
        self._arrays: dict[str, np.ndarray] = {}
        fits = not params.rounds or (params.fine_tune > 0 and self.target_kind == "energy")
        require(fits, "params.rounds", params.rounds, "0 without fine_tune and a target of energy")

    def phases(self) -> tuple[Phase, ...]:
        """The training; then, if wished, the fine-tuning, in which ranks may still fall."""
        p = self.params
        if not p.fine_tune:
            return (Phase("train"),)
        share = p.fine_tune / (1 + p.rounds)
        tune = [
            Phase(f"fine_tune_{i}" if i else "fine_tune", share, p.fine_tune_lr, restart=not i)
            for i in range(1 + p.rounds)
        ]
        return Phase("train", 1 - p.fine_tune), *tune

    def check(self, model: nn.Module) -> None:
        """Refuse patterns that name no layer of `model`."""
        self._layers(model)

    def prepare(self, model: nn.Module, context: Context) -> None:  # noqa: ARG002
        """Remember the images: MACs depend on their shape, validation looks at them."""
        self.context = context

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:  # noqa: ARG002
        """Remember how the filters lie at the start."""
        self._arrays = portraits(self._layers(model), "before")

    def start(self, model: nn.Module, phase: str) -> None:
        """Factorise at the start of the fine-tuning; narrow the factors at each later round."""
        if phase == "fine_tune":
            self._note(model)
            ranks = self._wanted(model)
            if self.params.rounds:
                ranks = ranks_by_share(model, 1.0, tuple(self.params.factorise.split()))
            self._factorise(model, ranks)
            self._score(model)
        elif phase.startswith("fine_tune"):
            self._narrow(model)

    def reshape(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Give `model` the factorised layers that it had when `state` was saved."""
        self._factorise(model, state["ranks"])

    def finish(self, model: nn.Module) -> nn.Module:
        """The factorised net, in the layout in which it will be loaded; a diverged one as it is."""
        plain = fold(model).to(memory_format=torch.contiguous_format)
        if self._ranks or not _is_finite(model):
            return plain
        self._note(plain)
        self._whole = plain
        small = factorise(plain, self._wanted(plain), self.params.variant)
        self._score(small)
        return small

    def views(self, model: nn.Module) -> dict[str, contextlib.AbstractContextManager]:
        """What the net would be if it were factorised now."""
        finite = not self._ranks and _is_finite(model)
        return {"low_rank": self._projected(model)} if finite else {}

    def row(self, model: nn.Module) -> dict[str, float]:
        """Total rank at 5% error, or of the factors."""
        if self._ranks or not _is_finite(model):
            return {"rank": float(sum(self._ranks.values()))}
        return {"rank": float(sum(rank_at(x, 1 - ERROR) for x in self._layers(model).values()))}

    def measures(self, model: nn.Module) -> dict[str, float]:
        """Ranks at 5% error before factorising, and the theoretical speed-up of these layers.

        `rank.NAME`, `rank_total`, its log2, `rank_ratio` (mean over layers of rank / full rank),
        `speed_up` (MACs of these layers over those of their factors at those ranks) and
        `speed_up.NAME`; `rank_total_svd`, where 5% is meant of the norm, not of its square;
        `factor_rank.NAME`, `factor_rank_total`, `factor_speed_up` the same of the factors that the
        net has got; `validation_factorised`: the metric before any fine-tuning of them.
        """
        ranks = {name: float(len(pair[0].weight)) for name, pair in pairs_of(model).items()}
        own = {f"factor_rank.{name}": rank for name, rank in ranks.items()}
        own["factor_rank_total"] = sum(ranks.values())
        if ranks and self.context:
            own["factor_speed_up"] = speed_up_of_pairs(model, self._macs(model))
        return self._measures | own

    def others(self, model: nn.Module) -> dict[str, nn.Module]:  # noqa: ARG002
        """The net before it was factorised, where no fine-tuning followed: its ranks are measured
        at the accuracy of this one.
        """
        return {"whole": self._whole} if self._whole else {}

    def arrays(self) -> dict[str, np.ndarray]:
        """Per layer, before and after: energy shares, pairwise angles, and small layers' filters.

        `energy_WHEN.NAME` share of the squared energy in the first 1, 2, ... directions;
        `angles_WHEN.NAME` histogram of the angles between filters, 36 bins over 0-180 degrees;
        `filters_WHEN.NAME` (N, D). See `portraits`.
        """
        return self._arrays

    def state(self) -> dict[str, Any]:
        """Ranks of the factorised layers and what was measured before."""
        return {
            "ranks": self._ranks,
            "measures": self._measures,
            "arrays": {name: torch.from_numpy(a) for name, a in self._arrays.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self._ranks, self._measures = state["ranks"], state["measures"]
        self._arrays = {name: a.numpy() for name, a in state["arrays"].items()}

    def _layers(self, model: nn.Module) -> dict[str, Layer]:
        return layers_to_factorise(model, tuple(self.params.factorise.split()), "params.factorise")

    def _macs(self, model: nn.Module) -> dict[str, int]:
        return measure.layer_macs(model, torch.zeros(1, *self.context.shape))

    def _wanted(self, model: nn.Module) -> dict[str, int]:
        """The ranks that the target asks for, of layers that become cheaper by them."""
        p, kept = self.params, 1 - self.target
        patterns = tuple(p.factorise.split())
        if self.target_kind == "macs":
            return ranks_by_macs(model, self._macs(model), kept, patterns)
        if self.target_kind == "rank":
            return cheaper(model, ranks_by_share(model, kept, patterns))
        return cheaper(model, ranks_by_energy(model, kept, patterns, p.variant))

    def _factorise(self, model: nn.Module, ranks: dict[str, int]) -> None:
        factorise_in_place(model, ranks, self.params.variant)
        self._ranks = dict(ranks)

    def _score(self, model: nn.Module) -> None:
        """Note the validation metric of the factors as they are."""
        if self.context:
            images = self.context.validation.ordered(512)
            classes = self.context.validation.info.num_classes
            scores = self.context.task.evaluate(model, images, classes)
            self._measures["validation_factorised"] = scores.metric

    def _narrow(self, model: nn.Module) -> None:
        for name in self._ranks:
            pair = model.get_submodule(name)
            self._ranks[name] = rank_at(pair[0], 1 - self.target, self.params.variant)
            model.set_submodule(name, reduce_rank(pair, self._ranks[name], self.params.variant))

    def _note(self, model: nn.Module) -> None:
        """Ranks, angles and filters of the net as it is now, still whole."""
        layers = self._layers(model)
        ranks = {name: rank_at(layer, 1 - ERROR) for name, layer in layers.items()}
        ratios = [rank / full_rank(layers[name]) for name, rank in ranks.items()]
        self._measures = {f"rank.{name}": float(rank) for name, rank in ranks.items()}
        self._measures["rank_total"] = float(sum(ranks.values()))
        by_norm = (rank_at(layer, 1 - ERROR, "svd") for layer in layers.values())
        self._measures["rank_total_svd"] = float(sum(by_norm))
        self._measures["log2_rank_total"] = math.log2(sum(ranks.values()))
        self._measures["rank_ratio"] = sum(ratios) / len(ratios)
        faster = {f"speed_up.{n}": layer_speed_up(layers[n], rank) for n, rank in ranks.items()}
        self._measures |= faster
        if self.context:
            self._measures["speed_up"] = speed_up_at(model, self._macs(model), ranks)
        self._arrays |= portraits(layers, "after")

    @contextlib.contextmanager
    def _projected(self, model: nn.Module):
        before = {}
        with torch.no_grad():
            for name, rank in self._wanted(model).items():
                layer = model.get_submodule(name)
                before[layer] = layer.weight.clone()
                layer.weight.copy_(merged(factorise_layer(layer, rank, self.params.variant)))
        try:
            yield
        finally:
            with torch.no_grad():
                for layer, weight in before.items():
                    layer.weight.copy_(weight)


def _is_finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())
