"""The channels of a net that may go, as one numbered list, and what the net costs without them.

With g (N,) holding one number per channel (a gate, or 1 for kept and 0 for closed),

    cost(g) = sum over layers of  n k^2 / groups * (sum of g over its inputs) * (... its outputs)
              + what is one number per channel (depth-wise kernels, batch norm, biases)

n is the number of places where the kernel is used for MACs, and 1 for parameters: bilinear in the
gates of neighbouring layers (GDP; papers' claim 6). On zeros and ones it is what the small net
costs.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from prunestudy import measure, shrink
from prunestudy.errors import require
from prunestudy.measure.forward import evaluating
from prunestudy.methods.base import Context
from prunestudy.shrink.groups import CONSUMES, PRODUCES, signal_remains, silent_layers
from prunestudy.shrink.proof import groups_of, remove_groups
from prunestudy.shrink.remove import require_whole
from prunestudy.shrink.trace import LAYERS, TRANSPOSED, channels_of, is_follower, trace


class Channels:
    """Numbers the channels of all dependency groups of `model` from 0 on, group after group.

    `kind` is what `cost` counts: "macs" of one input of `shape`, or "parameters". With `only`
    just the groups of these names; all other channels stay. A layer norm's statistics are of all
    its channels, so that none goes without a trace: its groups are left out, but for `norms`.
    Raises `InputError` for a net that cannot be traced or has no channel that could go, and for a
    group that does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        kind: str,
        only: Sequence[str] = (),
        norms: bool = False,
    ) -> None:
        require_whole(model)
        self.shape, self.example = shape, torch.zeros(2, *shape)
        self.traced = trace(model, self.example)
        found = groups_of(self.traced)
        self.groups = [g for g in found if norms or all(m.kind != "LayerNorm" for m in g.members)]
        if only:
            self.groups = [shrink.find(self.groups, name) for name in only]
        require(bool(self.groups), "model", type(model).__name__, "has no channels that could go")
        ends = list(accumulate(group.channels for group in self.groups))
        self.slices = [slice(e - g.channels, e) for e, g in zip(ends, self.groups, strict=True)]
        self.size = ends[-1]
        self.group_of = torch.cat(
            [torch.full((group.channels,), i) for i, group in enumerate(self.groups)]
        )
        self._numbers = self._places()
        self._count(kind, measure.layer_macs(model, shape))
        self.dense = float(self.cost(torch.ones(self.size)))

    def numbers(self, layer: str, axis: str) -> Tensor | None:
        """The channel at each place of a layer's axis ("in", "out"); `size` where it never goes.

        None where none of the axis may go.
        """
        return self._numbers.get((layer, axis))

    def cost(self, g: Tensor) -> Tensor:
        """MACs or parameters at the numbers `g` (N,); float64, differentiable."""
        g = g.double()
        inputs = self._fixed_in + self._in @ g
        outputs = self._fixed_out + self._out @ g
        return self._factor @ (inputs * outputs) + self._single @ g + self._constant

    def cost_at(self, kept: Sequence[int]) -> float:
        """The cost with so many channels kept of each group: all of a group cost the same."""
        inside, outside, single = self._each
        fixed, k = (self._fixed_in.numpy(), self._fixed_out.numpy()), np.array(kept, float)
        kernels = self._factor.numpy() @ ((fixed[0] + inside @ k) * (fixed[1] + outside @ k))
        return float(kernels + single @ k) + self._constant

    @cached_property
    def _each(self) -> list[np.ndarray]:
        """What one channel of each group has of inputs, of outputs and alone."""
        first = [part.start for part in self.slices]
        return [each[..., first].numpy() for each in (self._in, self._out, self._single)]

    def shares(self, g: Tensor) -> Tensor:
        """d cost / d g at `g`, over the dense cost: each channel's share c (N,), float64."""
        g = g.double()
        inputs = self._factor * (self._fixed_in + self._in @ g)
        outputs = self._factor * (self._fixed_out + self._out @ g)
        return (self._in.T @ outputs + self._out.T @ inputs + self._single) / self.dense

    def removed(self, open_: Tensor) -> float:
        """Share (0-1) of the cost that is gone with the channels that `open_` (N,) closes."""
        return 1 - float(self.cost(open_)) / self.dense

    def close(self, order: Tensor, open_: Tensor, target: float) -> Tensor:
        """Close channels in `order` until `target` of the cost is removed; return what is open.

        Channels that must stay (see `may_close`) are passed over; stops at the first channel
        with which the target is met, or at the end of `order`.
        """
        open_ = open_.clone()
        for number in order.tolist():
            if self.removed(open_) >= target - 1e-12:
                break
            if open_[number] and self.may_close(number, open_):
                open_[number] = False
                open_ = self.settle(open_)
        return open_

    def may_close(self, number: int, open_: Tensor) -> bool:
        """Whether a channel may go: where no skip carries the signal one of its group stays."""
        i = int(self.group_of[number])
        if int(open_[self.slices[i]].sum()) > 1:
            return True
        emptied = [*self._emptied(open_), self.groups[i]]
        return self.groups[i].skippable and signal_remains(self.traced, emptied)

    def settle(self, open_: Tensor) -> Tensor:
        """Close as well the groups that only layers of an emptied branch say or hear."""
        while emptied := self._emptied(open_):
            silent = silent_layers(self.traced.layers, emptied)
            useless = [
                part
                for group, part in zip(self.groups, self.slices, strict=True)
                if open_[part].any() and _useless(group, silent)
            ]
            if not useless:
                break
            for part in useless:
                open_[part] = False
        return open_

    def most_removable(self) -> float:
        """Largest share (0-1) of the cost that can be removed."""
        open_ = torch.ones(self.size, dtype=torch.bool)
        for part in self.slices:
            open_[part.start + 1 : part.stop] = False
        return self.removed(self.close(open_.nonzero().flatten(), open_, 1.0))

    def kept(self, open_: Tensor) -> dict[str, int]:
        """Channels kept of each group, by name."""
        pairs = zip(self.groups, self.slices, strict=True)
        return {group.name: int(open_[part].sum()) for group, part in pairs}

    def smaller(self, model: nn.Module, open_: Tensor) -> nn.Module:
        """A smaller copy of `model` with the open channels only; see `remove_groups`."""
        kept = [open_[part].nonzero().flatten() for part in self.slices]
        return remove_groups(model, self.groups, kept, self.example)

    def _emptied(self, open_: Tensor) -> list[shrink.Group]:
        pairs = zip(self.groups, self.slices, strict=True)
        return [group for group, part in pairs if not open_[part].any()]

    def _places(self) -> dict[tuple[str, str], Tensor]:
        found: dict[tuple[str, str], Tensor] = {}
        for group, part in zip(self.groups, self.slices, strict=True):
            for m in group.members:
                numbers = found.setdefault((m.layer, m.axis), torch.full((m.size,), self.size))
                here = m.channel_of >= 0
                numbers[here] = m.channel_of[here] + part.start
        return found

    def _count(self, kind: str, macs: dict[str, int]) -> None:
        layers = self.traced.layers
        sizes = {
            name: macs[f"{name}.weight"] if kind == "macs" else layer.weight.numel()
            for name, layer in layers.items()
            if isinstance(layer, LAYERS)
        }
        kernels = [n for n, m in layers.items() if isinstance(m, LAYERS) and not is_follower(m)]
        self._in, self._fixed_in = self._axis(kernels, "in")
        self._out, self._fixed_out = self._axis(kernels, "out")
        self._factor = torch.tensor(
            [
                sizes[n] / math.prod(channels_of(layers[n], s) for s in ("in", "out"))
                for n in kernels
            ],
            dtype=torch.float64,
        )
        self._single, self._constant = torch.zeros(self.size + 1, dtype=torch.float64), 0.0
        for name, layer in layers.items():
            each = _alone(layer, kind, sizes.get(name, 0)) / channels_of(layer, "out")
            numbers = self.numbers(name, "out")
            if numbers is None:
                numbers = torch.full((channels_of(layer, "out"),), self.size)
            self._single.index_add_(0, numbers, torch.full((len(numbers),), each).double())
        self._single, self._constant = self._single[:-1].clone(), float(self._single[-1])

    def _axis(self, kernels: list[str], axis: str) -> tuple[Tensor, Tensor]:
        """How often each channel is on the axis of each kernel, and what is always there."""
        count = torch.zeros(len(kernels), self.size + 1, dtype=torch.float64)
        for row, name in zip(count, kernels, strict=True):
            numbers = self.numbers(name, axis)
            if numbers is None:
                row[-1] = channels_of(self.traced.layers[name], axis)
            else:
                row.index_add_(0, numbers, torch.ones(len(numbers), dtype=torch.float64))
        return count[:, :-1].contiguous(), count[:, -1].contiguous()


class Scaled(nn.Module):
    """Parametrisation: a kernel times the gates of its input channels.

    `gates()` gives g (N,) of the whole net; `numbers` says which of them belongs to each place of
    the input axis, N where there is none. Scaling the kernel is scaling the activations, at the
    cost of the weights, and absorbing a gate later is keeping the product.
    """

    def __init__(self, gates: nn.Module, numbers: Tensor, size: int, layer: nn.Module) -> None:
        super().__init__()
        self.gates, self.partly = gates, bool((numbers == size).any())
        axis = 0 if isinstance(layer, TRANSPOSED) else 1
        # The groups of a grouped convolution go together: the first stands for all.
        self.register_buffer("numbers", numbers[: layer.weight.shape[axis]], persistent=False)
        self.form = [-1 if i == axis else 1 for i in range(layer.weight.dim())]

    def forward(self, weight: Tensor) -> Tensor:
        """The scaled kernel (same shape)."""
        g = self.gates()
        if self.partly:
            g = torch.cat([g, g.new_ones(1)])
        return weight * g.index_select(0, self.numbers).view(self.form)


def scale_consumers(model: nn.Module, channels: Channels, gates: nn.Module) -> None:
    """Put `Scaled` on every regular convolution and linear layer that reads gated channels."""
    readers = {m.layer for group in channels.groups for m in group.having(CONSUMES)}
    for name in sorted(readers, key=list(channels.traced.layers).index):
        layer = model.get_submodule(name)
        numbers = channels.numbers(name, "in").to(layer.weight.device)
        made = Scaled(gates, numbers, channels.size, layer)
        parametrize.register_parametrization(layer, "weight", made)


def become(model: nn.Module, small: nn.Module) -> None:
    """Make `model` what `small` is, in place: the training loop holds on to the object."""
    model.__dict__ = small.requires_grad_(True).__dict__


def agreement(before: nn.Module, after: nn.Module, context: Context) -> dict[str, float]:
    """How far two nets agree on the validation images, in eval mode.

    `unchanged`: share (0-1) of the images with the same largest output; `removal_gap`: largest
    difference of an output, over the largest output.
    """
    same = count = 0
    gap = largest = 0.0
    with evaluating(before), evaluating(after), torch.inference_mode():
        for x, _ in context.validation.ordered(512):
            for a, b in zip(tree_leaves(before(x)), tree_leaves(after(x)), strict=True):
                same += int((a.flatten(1).argmax(1) == b.flatten(1).argmax(1)).sum())
                count += len(a)
                gap = max(gap, float((a - b).abs().max()))
                largest = max(largest, float(a.abs().max()))
    return {"unchanged": same / count, "removal_gap": gap / largest if largest else 0.0}


def _useless(group: shrink.Group, silent: set[str]) -> bool:
    """Whether all that say the channels of `group`, or all that hear them, are silent."""
    return any(
        all(member.layer in silent for member in group.having(role))
        for role in (PRODUCES, CONSUMES)
        if group.having(role)
    )


def _alone(layer: nn.Module, kind: str, size: int) -> float:
    """What the outputs cost whatever goes in: depth-wise kernels; batch norm and biases."""
    if kind == "macs":
        return size if is_follower(layer) else 0
    own = [p for name, p in layer.named_parameters() if is_follower(layer) or name != "weight"]
    return sum(p.numel() for p in own)
