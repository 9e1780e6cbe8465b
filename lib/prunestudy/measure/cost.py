"""What a net costs on paper, as it computes in eval mode: parameters, zeros, MACs.

A parametrised weight, or one that a hook of `torch.nn.utils` computes, counts as its value; gates
and masks are no parameters. MACs are multiply-accumulates.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from prunestudy.errors import require
from prunestudy.measure.forward import Example, inputs_for, run
from prunestudy.shrink import CsrLinear, fold
from prunestudy.shrink.fold import is_plain
from prunestudy.shrink.layers import LAYERS, TRANSPOSED


def parameters(model: nn.Module) -> int:
    """Number of weights, biases, and scales and shifts of norms; a shared one counts once."""
    return sum(p.numel() for p in _plain(model).parameters())


def nonzeros(model: nn.Module) -> int:
    """Number of `parameters`, biases included, that are not exactly zero."""
    return sum(int(p.count_nonzero()) for p in _plain(model).parameters())


def prunable_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Name (`conv1.weight`) and weight of each convolution, transposed ones too, and linear layer.

    In order of registration, detached; a weight that several layers share, once. Those of a plain
    net share memory with it, others are values in eval mode.
    """
    weights = {}  # names by weight
    for name, layer in _layers(_plain(model)):
        weights.setdefault(layer.weight, f"{name}.weight".lstrip("."))
    return [(name, weight.detach()) for weight, name in weights.items()]


def layer_sparsity(model: nn.Module) -> dict[str, float]:
    """Share (0-1) of exact zeros in each prunable weight, by its name in `prunable_weights`."""
    return {n: 1 - int(w.count_nonzero()) / w.numel() for n, w in prunable_weights(model)}


def removed_share(model: nn.Module, dense: nn.Module) -> float:
    """Share (0-1) of the prunable weights of `dense` that are zero in `model`, or gone."""
    left = sum(int(w.count_nonzero()) for _, w in prunable_weights(model))
    return 1 - left / sum(w.numel() for _, w in prunable_weights(dense))


def same_shapes(model: nn.Module, start: dict[str, Tensor]) -> bool:
    """Whether the prunable weights of `model` have the names and shapes of those in `start`."""
    shapes = {name: w.shape for name, w in prunable_weights(model)}
    return shapes == {name: w.shape for name, w in start.items()}


def kept_scale(model: nn.Module, start: dict[str, Tensor]) -> float:
    """Mean |w| of the weights that `model` kept, over that at the start; NaN where none was kept.

    Below 1 the kept weights were shrunk, as by LASSO; near 1 they were only selected.
    """
    now = then = 0.0
    for begin, end in _kept(model, start):
        now += end.abs().sum().item()
        then += begin.abs().sum().item()
    return now / then if then else float("nan")


def kept_sample(
    model: nn.Module, start: dict[str, Tensor], most: int = 2000
) -> dict[str, np.ndarray]:
    """At most `most` kept weights, evenly spaced, at the start and at the end."""
    begin, end = (torch.cat(weights) for weights in zip(*_kept(model, start), strict=True))
    step = -(-len(end) // most) or 1
    return {"kept_start": begin[::step].numpy(), "kept_end": end[::step].numpy()}


def _kept(model: nn.Module, start: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Per layer the weights that `model` kept: at the start, and now."""
    ends = [(name, w.detach().cpu()) for name, w in prunable_weights(model)]
    return [(start[name].cpu()[w != 0], w[w != 0]) for name, w in ends]


def macs(model: nn.Module, example: Example) -> int:
    """MACs of one input, the first of the batch `example`.

    Counts what runs, zeros included: convolutions and products of matrices and vectors, in layers,
    attention, recurrent layers and functional calls. Biases, pooling, normalisation, activations,
    embeddings and elementwise products count nothing. Raises `InputError` for a product that has
    no formula here, and for a net that does not run on `example`.
    """
    plain = _plain(model, copy=True)
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
    plain = _plain(model, copy=True)
    names = {layer: f"{name}.weight".lstrip(".") for name, layer in _layers(plain)}
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


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the convolutions and linear layers of `model`."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LAYERS)]


def _plain(model: nn.Module, copy: bool = False) -> nn.Module:
    """`model` folded; itself where it is plain already, unless a `copy` is asked for."""
    # CSR layers have neither parameters nor a weight: every count would silently miss them.
    csr = any(isinstance(module, CsrLinear) for module in model.modules())
    require(not csr, "model", type(model).__name__, "count the net before to_csr")
    return fold(model) if copy or not is_plain(model) else model
