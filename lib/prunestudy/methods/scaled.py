"""Gates on kernels: each regular kernel times the gates of the channels that it consumes."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunestudy.methods.channels import Channels
from prunestudy.shrink.groups import CONSUMES
from prunestudy.shrink.layers import TRANSPOSED

_SHARED_ON = ("cuda",)  # devices on which layers share one call of the gates


class _Scaled(nn.Module):
    """Parametrisation: a kernel times the gates of its input channels.

    `gates()` gives g (N,) of the whole net; `numbers` says which of them belongs to each place of
    the input axis, N where there is none. Scaling the kernel equals scaling the activations but
    costs only the weights, and absorbing a gate later means keeping the product.
    """

    def __init__(
        self, gates: nn.Module, once: Any, numbers: Tensor, size: int, layer: nn.Module
    ) -> None:
        super().__init__()
        self.gates, self.once, self.partly = gates, once, bool((numbers == size).any())
        axis = 0 if isinstance(layer, TRANSPOSED) else 1
        # The groups of a grouped convolution lose channels together: the first stands for all.
        self.register_buffer("numbers", numbers[: layer.weight.shape[axis]], persistent=False)
        self.form = [-1 if i == axis else 1 for i in range(layer.weight.dim())]

    def forward(self, weight: Tensor) -> Tensor:
        g = self.once(self.gates).to(weight.dtype)
        if self.partly:
            g = torch.cat([g, g.new_ones(1)])
        return weight * g.index_select(0, self.numbers).view(self.form)


class _Once:
    """Calls the gates once per training step on CUDA, where every kernel launch has a cost.

    The first layer that runs calls them, and the others reuse the result until the backward pass.
    Elsewhere each layer calls them itself, so that gradients are summed as in all earlier runs.
    """

    def __init__(self) -> None:
        self.found: Tensor | None = None

    def __call__(self, gates: nn.Module, first: bool) -> Tensor:
        trains = gates.training and torch.is_grad_enabled()
        made_of = [tensor._version for tensor in gates.state_dict().values()]
        if trains and not first and self.found is not None and made_of == self.made_of:
            return self.found
        g = gates()
        if first:
            self.found, self.made_of = None, made_of
            if trains and g.requires_grad and g.device.type in _SHARED_ON:
                self.found = g
                g.register_hook(self._forget)
        return g

    def _forget(self, _: Tensor) -> None:
        self.found = None

    def __deepcopy__(self, _: Any) -> "_Once":
        return _Once()


def scale_consumers(model: nn.Module, channels: Channels, gates: nn.Module) -> None:
    """Scale each regular kernel that consumes `channels` by `gates()`, one number each, (N,)."""
    once = _Once()
    consumers = {m.layer for group in channels.groups for m in group.having(CONSUMES)}
    for i, name in enumerate(sorted(consumers, key=list(channels.traced.layers).index)):
        layer = model.get_submodule(name)
        numbers = channels.numbers(name, "in").to(layer.weight.device)
        made = _Scaled(gates, partial(once, first=not i), numbers, channels.size, layer)
        parametrize.register_parametrization(layer, "weight", made)
