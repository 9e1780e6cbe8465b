r"""Force Regularization (Wen, Xu, Wu, Wang, Chen, Li: "Coordinating Filters for Faster Deep Neural
Networks", ICCV 2017, arXiv 1703.09746).

The filters of a layer attract each other while the net trains, so that fewer basis filters span
them afterwards. With W_i a filter as a vector, w_i = W_i / |W_i|, the force of j on i is

    L2:  f_ji = w_j - w_i              L1:  f_ji = (w_j - w_i) / |w_j - w_i|             [P]

and only its part tangential to w_i acts, so lengths do not change to first order:

    dW_i = |W_i| sum_j (f_ji - (f_ji . w_i) w_i)                                         [P]
    W_i <- W_i - lr (dE/dW_i - lambda dW_i)                                              [P]

There is no 1/N: the strength grows with the number of filters. L2 has a closed form in O(N D):
S = sum_j w_j, dW_i = |W_i| (S - (S . w_i) w_i). Both are gradients: dW_i = -(|W_i|^2 / 2) dR/dW_i
of R = 1/2 sum |w_j - w_i|^2 (L2) and sum |w_j - w_i| (L1), over ordered pairs [D].

| paper | code |
|---|---|
| W_i | a row of `weight_matrix(layer)` |
| dW | `force(weight, kind)` |
| lambda | `strength` times the layer's factor in `strengths`; below 0 filters repel each other |
| rank ratio, 5% error | `filter_probes`, `shrink.factors` |

Order in a step: gradient, weight decay, force, momentum [P]. Here the force joins the gradient
before SGD adds the decay; the sum is the same, and where the strength or the sign depends on the
gradient it is the one with the decay.

Ours, where the paper is silent: filters shorter than 1e-8 neither pull nor are pulled; two
directions closer than 5e-7, which float32 cannot tell apart, exert no L1 force; which components
"agree" (the force moves a weight the way descent does). Unknown: lambda for ResNet-20 and
GoogLeNet.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunestudy.methods.base import At, Context
from prunestudy.methods.low_rank import LowRank
from prunestudy.shrink.factors import Layer, groups_of, layers_to_factorise, require_factorisable
from prunestudy.values import Share

Kind = Literal["l2", "l1"]
_SHORTEST = 1e-8
_CLOSEST = 5e-7
_FAR = 0.05  # a distance at which float32 rounds 2 - 2 w_i . w_j to 4 digits


def force(weight: Tensor, kind: Kind = "l2", groups: int = 1) -> Tensor:
    """dW of a layer, in the shape of `weight` (filters first); each of `groups` by itself.

    L2 takes O(N D) operations, L1 O(N^2 D) and no memory beyond N x N. A short filter gets 0.
    """
    length, unit = _directions(weight, groups)
    if kind == "l2":
        pull = unit.sum(1, keepdim=True)
    else:
        squared = _squared(unit)
        far = squared > _FAR**2
        pull = _inverse(squared, far) @ unit
        # Closer pairs by their difference, in float64.
        exact = _directions(weight.double(), groups)[1]
        squared = _squared(exact)
        near = _inverse(squared, ~far & (squared > _CLOSEST**2))
        pull = pull + (near @ exact - near.sum(2, keepdim=True) * exact).to(pull)
    along = (pull * unit).sum(2, keepdim=True)
    turned = torch.where(length > _SHORTEST, length, 0.0) * (pull - along * unit)
    return turned.reshape(weight.shape)


def _directions(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Lengths (G, N / G, 1) and unit vectors (G, N / G, D) of the filters; 0 for a short one."""
    rows = weight.detach().reshape(groups, len(weight) // groups, -1)
    length = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    return length, torch.where(length > _SHORTEST, rows / length, 0.0)


def _squared(unit: Tensor) -> Tensor:
    """|w_j - w_i|^2 of all pairs, (G, N / G, N / G)."""
    return 2 - 2 * (unit @ unit.mT)


def _inverse(squared: Tensor, pairs: Tensor) -> Tensor:
    """1 / |w_j - w_i| of `pairs`, 0 for all others."""
    return torch.where(pairs, squared, 1.0).rsqrt() * pairs


class Force(LowRank):
    """Filters pulled together while the net trains, then low-rank factors.

    `kind` of force; `strength`: lambda; `adaptive`: lambda times |gradient| / |force| instead,
    layer by layer; `agree`: only components that the gradient agrees with; `stop`: share of the
    training after which the force is off; `layers` on which it acts, named as in `factorise`
    ("": all convolutions larger than 1x1); `strengths`: factors of lambda by layer or pattern.
    """

    name, title = "force", "Force Regularization"
    kind: Kind = "l2"
    strength: float = 1e-4
    adaptive: bool = False
    agree: bool = False
    stop: Share = 1.0
    layers: str = ""
    strengths: dict[str, float] = {}

    def check(self, model: nn.Module) -> None:
        """Refuse, as for factors, layers on which no force can act."""
        super().check(model)
        require_factorisable(model, self._strengths(model))

    def attach(self, model: nn.Module, context: Context) -> None:
        """Choose the layers on which the force acts, and take the decay of their gradient."""
        super().attach(model, context)
        self.weight_decay = context.weight_decay
        self.forced: dict[Any, list[tuple[Layer, float]]] = {}  # layers of one shape
        for name, strength in self._strengths(model).items():
            layer = model.get_submodule(name)
            kind = groups_of(layer), tuple(layer.weight.shape), layer.weight.dtype
            self.forced.setdefault(kind, []).append((layer, strength))

    @torch.no_grad()
    def after_backward(self, at: At) -> None:
        """Add -lambda dW to the gradients of the chosen layers."""
        if at.phase != "train":
            return
        acting = (at.share < self.stop).double()
        for (groups, *_), forced in self.forced.items():
            # Others are frozen, or not part of this loss.
            found = [(layer.weight, s) for layer, s in forced if layer.weight.grad is not None]
            if not found:
                continue
            # All at once: on a GPU the number of kernels is what this costs.
            joined = torch.cat([weight.detach() for weight, _ in found])
            pulls = force(joined, self.kind, groups * len(found)).chunk(len(found))
            for (weight, strength), pull in zip(found, pulls, strict=True):
                weight.grad.add_(self._gradient(weight, pull, strength * acting))

    def _gradient(self, weight: Tensor, pull: Tensor, strength: Tensor) -> Tensor:
        """What the force adds to the gradient of `weight`."""
        if not (self.adaptive or self.agree):
            return pull.mul_(-strength)
        descent = weight.grad.add(weight, alpha=self.weight_decay)
        if self.adaptive:
            size = pull.norm()
            pull = torch.where(size >= _SHORTEST, pull * (descent.norm() / size), 0.0)
        added = pull.mul_(-strength)
        return torch.where(added * descent > 0, added, 0.0) if self.agree else added

    def _strengths(self, model: nn.Module) -> dict[str, float]:
        """Lambda of each layer on which the force acts."""
        chosen = layers_to_factorise(model, tuple(self.layers.split()), "layers")
        factors = dict.fromkeys(chosen, 1.0)
        for pattern, factor in self.strengths.items():
            named = layers_to_factorise(model, (pattern,), "strengths")
            factors.update((name, factor) for name in named if name in factors)
        return {name: self.strength * factor for name, factor in factors.items()}
