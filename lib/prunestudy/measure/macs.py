"""Multiply-accumulates (MACs) of a net as it computes in eval mode, with its zeros or without."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from prunestudy.errors import require
from prunestudy.measure.forward import inputs_for, run
from prunestudy.measure.weights import layers_of, plain_net
from prunestudy.shrink.trace import TRANSPOSED

Example = Tensor | tuple[Tensor, ...]


def macs(model: nn.Module, example: Example) -> int:
    """MACs of one input, the first of the batch `example`.

    Counts what runs: convolutions and products of matrices and vectors, in layers, attention,
    recurrent layers and functional calls alike, zeros included. Biases, pooling, normalisation,
    activations, embeddings and products element by element count nothing. Raises `InputError` for
    a product that has no formula here, and for a net that does not run on `example`.
    """
    plain = plain_net(model, copy=True)
    counter = FlopCounterMode(display=False, custom_mapping=_MORE)  # 2 FLOPs per MAC
    # no_grad: in inference mode layers reach the counter whole
    with torch.no_grad(), _unfused(), _Refusing(type(model).__name__), counter:
        run(plain, inputs_for(plain, example, first=True))
    return counter.get_total_flops() // 2


def nonzero_macs(model: nn.Module, example: Example) -> int:
    """MACs of one input in a net that skips each zero weight of a convolution or linear layer."""
    dense, kept = layer_macs(model, example), layer_macs(model, example, Tensor.count_nonzero)
    return macs(model, example) - sum(dense.values()) + sum(kept.values())


def layer_macs(
    model: nn.Module, example: Example, count: Callable[[Tensor], Any] = Tensor.numel
) -> dict[str, int]:
    """MACs of one input in each convolution and linear module, by the name of its weight.

    The `count` of the weight times the positions it is used at: those of the output, or of the
    input of a transposed convolution. A module that is not called has 0.
    """
    plain = plain_net(model, copy=True)
    names = {layer: f"{name}.weight".lstrip(".") for name, layer in layers_of(plain)}
    found = dict.fromkeys(names.values(), 0)

    def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            positions = output.numel() // layer.out_features
        elif isinstance(layer, TRANSPOSED):
            positions = args[0].numel() // layer.in_channels
        else:
            positions = output.numel() // layer.out_channels
        found[names[layer]] += positions * int(count(layer.weight))

    for layer in names:
        layer.register_forward_hook(add)
    with torch.inference_mode():
        run(plain, inputs_for(plain, example, first=True))
    return found


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention and recurrent layers as the matrix products that they consist of."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(mkldnn.flags(enabled=False))
        stack.enter_context(cudnn.flags(enabled=False))
        yield


class _Refusing(TorchDispatchMode):
    """Refuses the net `name` when it calls a product that has no formula."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func._overloadpacket
        known = op in flop_registry or op in _MORE or not _PRODUCT.search(func.name())
        require(known, "model", self.name, f"MACs of the operation {func.name()} are unknown")
        return func(*args, **(kwargs or {}))


# Names of operations that multiply matrices, but upsampling and cells after their products.
_PRODUCT = re.compile(
    r"^(?!.*(upsample|thnn_fused)).*"
    r"((mm|mv|dot)(_|\.|$)|dot_product|conv(?!ert)|linear|rnn|lstm|gru|attention|transformer)"
)
_ATEN = torch.ops.aten
_MORE = {
    _ATEN.mv: lambda a, *_, **__: 2 * prod(a),
    _ATEN.addmv: lambda _, a, *__, **___: 2 * prod(a),
    _ATEN.dot: lambda a, *_, **__: 2 * prod(a),
    _ATEN.vdot: lambda a, *_, **__: 2 * prod(a),
    _ATEN.addbmm: lambda _, a, b, *__, **___: 2 * prod(a) * b[2],
    # of a Bilinear: x W for each output, times y
    _ATEN._trilinear: lambda x, w, *_, **__: 2 * prod(x[:-1]) * (prod(w) + w[0] * w[2]),
}
