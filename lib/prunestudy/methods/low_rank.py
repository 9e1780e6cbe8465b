"""Training, then low-rank factors: what Force Regularization and its control share.

The net is trained; then each convolution becomes a few basis filters and a 1x1 mixture of them
(`prunestudy.shrink.factors`), and the factorised net may be fine-tuned.

The target is the share removed: of each layer's squared energy (0.05: "at most 5% reconstruction
error"), of each layer's full rank (equal ranks for every method), or of the net's MACs (all layers
then lose the same share of energy). Ours: a layer whose factors would cost as many MACs as the
layer stays whole.

Dynamic rank pruning, the paper's other way to factorise: all layers start at full rank, and the PCA
is run again on the basis `rounds` times during fine-tuning, at the target's energy each time; the
mixture is multiplied by the kept directions. The optimiser starts anew after each round, since its
momentum belongs to directions that are gone (ours).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from prunestudy import measure
from prunestudy.errors import require
from prunestudy.methods.base import At, Context, Method, Phase
from prunestudy.shrink import (
    factorise,
    fold,
    rank_at,
    ranks_by_energy,
    ranks_by_macs,
    ranks_by_share,
    reduce_rank,
)
from prunestudy.shrink.factors import (
    Layer,
    factorise_in_place,
    full_rank,
    layers_to_factorise,
    replace,
    require_called,
    require_factorisable,
)
from prunestudy.shrink.ranks import cheaper, least_share


class LowRank(Method):
    """Settings and steps of the factorisation; shares are of the steps.

    `factorise`: names of the layers, patterns with `*` allowed, separated by spaces; "": all
    convolutions larger than 1x1. `variant`: "pca", or "svd", which asks the energy of the norm.
    `fine_tune`: share in which the factorised net is trained, 0 for none; `fine_tune_lr`: its
    learning rate, times the recipe's; `rounds` of dynamic rank pruning in it, 0 to factorise once.
    """

    counts: ClassVar[tuple[str, ...]] = ("energy", "rank", "macs")
    factorise: str = ""
    variant: Literal["pca", "svd"] = "pca"
    fine_tune: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fine_tune_lr: Annotated[float, Field(gt=0)] = 1.0
    rounds: Annotated[int, Field(ge=0, le=1000)] = 0

    def __init__(self, *target: Any, **settings: Any) -> None:
        super().__init__(*target, **settings)
        fits = not self.rounds or (self.fine_tune > 0 and self.of == "energy")
        require(fits, "rounds", self.rounds, "0 without fine_tune and a target of energy")
        self.ranks: dict[str, int] | None = None  # of the model's factors; None: it is whole
        self.narrowed = False  # whether a round was made

    def phases(self) -> tuple[Phase, ...]:
        """Training; then, if wanted, fine-tuning in one part more than there are rounds."""
        if not self.fine_tune:
            return (Phase("train"),)
        share = self.fine_tune / (1 + self.rounds)
        tune = [
            Phase(f"fine_tune_{i}" if i else "fine_tune", share, self.fine_tune_lr, restart=not i)
            for i in range(1 + self.rounds)
        ]
        return Phase("train", 1 - self.fine_tune), *tune

    def check(self, model: nn.Module) -> None:
        """Refuse patterns that name no layer of `model`, and layers that factors cannot replace."""
        require_factorisable(model, self.layers_of(model))

    def attach(self, model: nn.Module, context: Context) -> None:
        """Keep the model, whose layers are replaced later; refuse what would fail then."""
        self.check(model)
        layers = self.layers_of(model)
        require_called(model, layers, context.example)
        if self.of == "macs":
            least = least_share(measure.layer_macs(model, context.example), layers)
            allowed = f"at most {1 - least:.4f}, the share of MACs that rank 1 everywhere removes"
            require(1 - self.target >= least, "target", self.target, allowed)
        self._held, self.ranks, self.narrowed = [model, context.example], None, False

    def update(self, at: At) -> None:
        """Factorise at the end of the training; narrow the factors at the end of each round."""
        model = self._held[0]
        if not at.last or at.phase == self.phases()[-1].name or not is_finite(model):
            return
        if at.phase == "train":
            full = {name: full_rank(layer) for name, layer in self.layers_of(model).items()}
            self._factorise(full if self.rounds else self.wanted(model))
        elif self.ranks is not None:
            self.ranks, self.narrowed = self._narrow(model), True

    def finish(self, model: nn.Module, context: Context) -> nn.Module:  # noqa: ARG002
        """The factorised net; a net that diverged stays as it is."""
        plain = fold(model)
        if not is_finite(model):
            return plain
        if self.ranks is None:
            return factorise(plain, self.wanted(plain), self.variant)
        if self.rounds and not self.narrowed:  # the rounds were shorter than a step
            self._narrow(plain)
        return plain.requires_grad_(False)

    def layers_of(self, model: nn.Module) -> Mapping[str, Layer]:
        """The layers of `model` that become factors, by name."""
        return layers_to_factorise(model, tuple(self.factorise.split()), "factorise")

    def wanted(self, model: nn.Module) -> dict[str, int]:
        """The ranks that the target asks for, of the layers that become cheaper by them."""
        patterns, kept = tuple(self.factorise.split()), 1 - self.target
        if self.of == "macs":
            macs = measure.layer_macs(model, self._held[1])
            return ranks_by_macs(model, macs, kept, patterns)
        if self.of == "rank":
            return cheaper(model, ranks_by_share(model, kept, patterns))
        return cheaper(model, ranks_by_energy(model, kept, patterns, self.variant))

    def get_extra_state(self) -> dict[str, Any]:
        """The ranks of the factors, and whether a round was made."""
        return {"ranks": self.ranks, "narrowed": self.narrowed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Give the model factors of these ranks; their weights are loaded next."""
        if state["ranks"] is not None:
            self._factorise(state["ranks"])
        self.narrowed = state["narrowed"]

    def _factorise(self, ranks: Mapping[str, int]) -> None:
        factorise_in_place(self._held[0], ranks, self.variant)
        self.ranks = dict(ranks)

    def _narrow(self, model: nn.Module) -> dict[str, int]:
        pairs = {name: model.get_submodule(name) for name in self.ranks}
        ranks = {n: rank_at(pair[0], 1 - self.target, self.variant) for n, pair in pairs.items()}
        for name, pair in pairs.items():
            replace(model, name, reduce_rank(pair, ranks[name], self.variant))
        return ranks


class PlainLowRank(LowRank):
    """The control: plain training, then factors, then (optionally) fine-tuning of the factors."""

    name: ClassVar[str] = "plain_low_rank"
    title: ClassVar[str] = "low rank, no force"


def is_finite(model: nn.Module) -> bool:
    """Whether all parameters of `model` are finite."""
    return all(bool(p.isfinite().all()) for p in model.parameters())
