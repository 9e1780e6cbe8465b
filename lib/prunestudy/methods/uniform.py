"""The controls of the soft coefficients: one ranking or one share, no search.

Each with the components looked at or not: usual group importance does not.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunestudy import measure
from prunestudy.methods.base import Params
from prunestudy.methods.channel_budget import Budget, spread_out
from prunestudy.methods.channel_choice import Choice, ChoiceParams, Point
from prunestudy.methods.channel_method import ChannelMethod
from prunestudy.shrink import ComponentGroup


class UniformParams(ChoiceParams):
    """`ranking`: the same share of every group ("uniform"), one ranking of all channels by their
    importance ("global"), or a random one. With `aware` each component gives up the same share of
    its parameters and coupling groups stay; without, components are not looked at.
    """

    ranking: Literal["uniform", "global", "random"] = "uniform"
    importance: Literal["taylor", "group_l2"] = "group_l2"
    aware: bool = False


class Uniform(ChannelMethod):
    """The controls: no coefficients, one common offset."""

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "no coefficients"
    Params: ClassVar[type[Params]] = UniformParams

    def solve(self, choice: Choice) -> tuple[Budget, Sequence[float], Point]:
        """The point at zero coefficients."""
        coupling = [len(each.components) > 1 for each in choice.groups]
        budget = choice.budget(self._positions(choice), coupling if self.params.aware else ())
        zero, parts = [0.0] * len(choice.groups), []
        for name in _components(choice.groups) if self.params.aware else ():
            inside = [i for i, each in enumerate(choice.groups) if each.components == (name,)]
            layers = {m.layer for i in inside for m in choice.plain[i].members}
            size = sum(measure.parameters(choice.model.get_submodule(name)) for name in layers)
            parts.append((inside, size / choice.channels.dense))
        return budget, zero, choice.reach(budget, zero, [part for part in parts if part[0]])

    def _positions(self, choice: Choice) -> list[Tensor]:
        if self.params.ranking == "random":
            make = self.generator
            return [torch.rand(n, generator=make, device=make.device).cpu() for n in choice.full]
        scores = choice.scores()
        if self.params.ranking == "uniform":
            return spread_out(scores)
        return [score.cpu().double().clamp(min=1e-30).log() for score in scores]


def _components(groups: list[ComponentGroup]) -> list[str]:
    return list(dict.fromkeys(name for each in groups for name in each.components))
