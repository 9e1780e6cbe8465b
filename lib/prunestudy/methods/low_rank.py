"""Training, then low-rank factors: what Force Regularization and its control share.

The net is trained; then each convolution becomes a few basis filters and a 1x1 mixture of them
(`prunestudy.shrink.factors`), batch norm's statistics may be estimated anew, and the factorised net
may be fine-tuned. Batch norm amplifies small differences between aligned filters, so directions
with little energy may matter much.

The target is the share removed: of each layer's energy (0.05: "at most 5% reconstruction
error"), of each layer's full rank (equal ranks for every method), or of the net's MACs. For MACs,
all layers lose the same share of energy, or ranks are chosen by the loss on validation images
(ours). Ours: a layer whose factors would cost as many MACs as the layer stays whole.

Dynamic rank pruning, the paper's other way to factorise: all layers start at full rank, and the PCA
is run again on the basis `rounds` times during fine-tuning, at the target's energy each time; the
mixture is multiplied by the kept directions. The optimiser starts anew after each round, since its
momentum belongs to directions that are gone (ours).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunestudy import measure, shrink
from prunestudy.errors import refused, require
from prunestudy.measure.forward import evaluating
from prunestudy.methods.base import At, Context, Method, Phase, call, mean_loss, samples_in
from prunestudy.shrink import factors
from prunestudy.shrink.factors import Layer, full_rank
from prunestudy.shrink.ranks import cheaper, least_share
from prunestudy.values import Count, Positive


class LowRank(Method):
    """Settings and steps of the factorisation; shares are of the steps.

    `factorise`: names of the layers, patterns with `*` allowed, separated by spaces; "": all
    convolutions larger than 1x1. `variant`: energy is the squared norm ("pca") or norm ("svd").
    `by`: how a target of MACs is shared over the layers, by "energy" or by "loss", measured on
    `samples` of validation (training if there is none). `recalibrate`: training batches that give
    batch norm's statistics anew whenever factors change, 0 to keep the old ones. `fine_tune`: share
    in which the factorised net is trained, 0 for none; `fine_tune_lr`: its learning rate, times the
    recipe's; `rounds` of dynamic rank pruning in it, 0 to factorise once.
    """

    counts = ("energy", "rank", "macs")
    factorise: str = ""
    variant: Literal["pca", "svd"] = "pca"
    by: Literal["energy", "loss"] = "energy"
    samples: Count = 512
    recalibrate: Annotated[int, Field(ge=0)] = 0
    fine_tune: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fine_tune_lr: Positive = 1.0
    rounds: Annotated[int, Field(ge=0, le=1000)] = 0

    def __init__(self, *target: Any, **settings: Any) -> None:
        super().__init__(*target, **settings)
        fits = not self.rounds or (self.fine_tune > 0 and self.of == "energy")
        require(fits, "rounds", self.rounds, "0 unless fine_tune > 0 and of = energy")
        fits = self.by == "energy" or self.of == "macs"
        require(fits, "by", self.by, "must be energy unless of = macs")

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
        factors.require_factorisable(model, self.layers_of(model))

    def attach(self, model: nn.Module, context: Context) -> None:
        """Keep the model, whose layers are replaced later; refuse what would fail then."""
        self.check(model)
        layers = self.layers_of(model)
        factors.require_called(model, layers, context.example)
        if self.by == "loss":
            needs = "by='loss' needs the task's loss"
            require(context.loss is not None, "context.loss", None, needs)
            context.samples(1)
        if self.of == "macs":
            least = least_share(measure.layer_macs(model, context.example), layers)
            allowed = f"at most {1 - least:.4f}, the share of MACs that rank 1 everywhere removes"
            require(1 - self.target >= least, "target", self.target, allowed)
        self._held = [model, context]
        self._full = {name: full_rank(layer) for name, layer in layers.items()}
        self.ranks: dict[str, int] | None = None  # of the model's factors; None: it is whole
        self.narrowed = False  # whether a round was made
        self.passes = 0  # samples that the choice of ranks and batch norm's statistics took

    def update(self, at: At) -> None:
        """Factorise at the end of the training; narrow the factors at the end of each round."""
        model = self._held[0]
        if not at.last or at.phase == self.phases()[-1].name or not is_finite(model):
            return
        if at.phase == "train":
            self._factorise(self._full if self.rounds else self.wanted(model))
        elif self.ranks is not None:
            self.ranks, self.narrowed = self._narrow(model), True
        else:
            return
        self.passes += recalibrate(model, self._held[1], self.recalibrate)

    def finish(self, model: nn.Module, context: Context) -> nn.Module:
        """The factorised net; a net that diverged stays as it is."""
        plain = shrink.fold(model)
        if not is_finite(model):
            return plain
        if self.ranks is None:
            plain = shrink.factorise(plain, self.wanted(plain))
        elif self.rounds and not self.narrowed:  # the rounds were shorter than a step
            self._narrow(plain)
        else:
            return plain
        self.passes += recalibrate(plain, context, self.recalibrate)
        return plain.requires_grad_(False)

    def log(self) -> dict[str, float]:
        """Share left of the full rank of the layers."""
        full, ranks = self._full, self.ranks or {}
        return {"kept": sum(ranks.get(name, n) for name, n in full.items()) / sum(full.values())}

    def layers_of(self, model: nn.Module) -> Mapping[str, Layer]:
        """The layers of `model` that become factors, by name."""
        return factors.layers_to_factorise(model, tuple(self.factorise.split()), "factorise")

    def wanted(self, model: nn.Module) -> dict[str, int]:
        """The ranks that the target asks for, of the layers that become cheaper by them."""
        patterns, kept = tuple(self.factorise.split()), 1 - self.target
        if self.of == "macs":
            macs = measure.layer_macs(model, self._held[1].example)
            loss = self._loss() if self.by == "loss" else None
            return shrink.ranks_by_macs(model, macs, kept, patterns, loss)
        if self.of == "rank":
            return cheaper(model, shrink.ranks_by_share(model, kept, patterns))
        return cheaper(model, shrink.ranks_by_energy(model, kept, patterns, self.variant))

    def get_extra_state(self) -> dict[str, Any]:
        """The ranks of the factors, whether a round was made, and the passes."""
        return {"ranks": self.ranks, "narrowed": self.narrowed, "passes": self.passes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Give the model factors of these ranks; their weights are loaded next."""
        if state["ranks"] is not None:
            self._factorise(state["ranks"])
        self.narrowed, self.passes = state["narrowed"], state["passes"]

    def report(self) -> dict[str, Any]:
        """`low_rank_passes`: samples that the choice of ranks and batch norm's statistics took."""
        return {"low_rank_passes": self.passes} if self.passes else {}

    def _factorise(self, ranks: Mapping[str, int]) -> None:
        factors.factorise_in_place(self._held[0], ranks)
        self.ranks = dict(ranks)

    def _loss(self) -> Callable[[nn.Module], float]:
        """The loss of a net on the samples, its batch norm estimated from one training batch."""
        context, batches = self._held[1], min(1, self.recalibrate)
        data, train = context.samples(self.samples), list(context.batches(batches))
        context = replace(context, train=lambda _: train)
        judged = sum(samples_in(x) for x, _ in data)

        def loss(net: nn.Module) -> float:
            self.passes += recalibrate(net, context, batches) + judged
            return mean_loss(net, context.loss, data)

        return loss

    def _narrow(self, model: nn.Module) -> dict[str, int]:
        ranks = {}
        for name in self.ranks:
            pair = model.get_submodule(name)
            ranks[name] = shrink.rank_at(pair[0], 1 - self.target, self.variant)
            factors.replace(model, name, shrink.reduce_rank(pair, ranks[name]))
        return ranks


class PlainLowRank(LowRank):
    """The control: plain training, then factors, then (optionally) fine-tuning of the factors."""

    name, title = "plain_low_rank", "low rank without force"


def is_finite(model: nn.Module) -> bool:
    """Whether all parameters of `model` are finite."""
    return all(bool(p.isfinite().all()) for p in model.parameters())


def recalibrate(model: nn.Module, context: Context, batches: int) -> int:
    """Estimate the running statistics of `model` anew, in place; return the samples it took.

    Each is the mean over the first `batches` training batches, or all if there are fewer, of what
    the layer normalises by in training. All other modules are in eval mode meanwhile (no dropout).
    Nothing is read or changed with 0 batches, or in a net without such statistics. Raises
    `InputError` if there is no batch.
    """
    kinds = (m for m in model.modules() if isinstance(m, _BatchNorm))
    norms = {norm: norm.momentum for norm in kinds if norm.running_mean is not None}
    if not (batches and norms):
        return 0
    data, seen = context.batches(batches), 0
    first = next(data)  # refused before anything is changed
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.train().reset_running_stats()
            norm.momentum = None  # the mean of all batches
        try:
            for number, (x, _) in enumerate(chain([first], data)):
                with refused("context.train", f"batch {number}"):
                    call(model, x)
                seen += samples_in(x)
        finally:
            for norm, momentum in norms.items():
                norm.momentum = momentum
    return seen
