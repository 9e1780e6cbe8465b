"""What a net costs on paper, as it computes in eval mode: parameters, zeros, MACs.

A parametrised weight, or one that a hook of `torch.nn.utils` computes, counts as its value; gates
and masks are no parameters. MACs are multiply-accumulates.
"""

import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from prunestudy.errors import require
from prunestudy.measure.forward import Example, evaluating, inputs_for, run
from prunestudy.shrink import CsrLinear, fold
from prunestudy.shrink.fold import is_rewritten
from prunestudy.shrink.layers import LAYERS


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
    for name, layer in _layers(_plain(model)).items():
        weights.setdefault(layer.weight, name)
    return [(name, weight.detach()) for weight, name in weights.items()]


def layer_sparsity(model: nn.Module) -> dict[str, float]:
    """Share (0-1) of exact zeros in each prunable weight, by its name in `prunable_weights`."""
    return {n: 1 - int(w.count_nonzero()) / w.numel() for n, w in prunable_weights(model)}


def removed_share(model: nn.Module, dense: nn.Module) -> float:
    """Share (0-1) of the prunable weights of `dense` that are zero in `model`, or gone."""
    left = sum(int(w.count_nonzero()) for _, w in prunable_weights(model))
    return 1 - left / sum(w.numel() for _, w in prunable_weights(dense))


def kept_weights(
    model: nn.Module, start: nn.Module
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The prunable weights of `start` that `model` kept; two empty dicts if shapes differ.

    `kept_scale`: their mean |w| over that at the start, NaN where none was kept (below 1 they were
    shrunk, as by LASSO); `kept_start`, `kept_end`: at most 2000 of them, evenly spaced.
    """
    now, then = ({n: w.cpu() for n, w in prunable_weights(net)} for net in (model, start))
    if {n: w.shape for n, w in now.items()} != {n: w.shape for n, w in then.items()}:
        return {}, {}
    begin, end = ([each[n][w != 0] for n, w in now.items()] for each in (then, now))
    before, after = (sum(w.abs().sum().item() for w in each) for each in (begin, end))
    step = -(-sum(map(len, end)) // 2000) or 1
    arrays = {"kept_start": begin, "kept_end": end}
    samples = {name: torch.cat(each)[::step].numpy() for name, each in arrays.items()}
    return {"kept_scale": after / before if before else float("nan")}, samples


def macs(model: nn.Module, example: Example) -> int:
    """MACs of one input, the first of the batch `example`.

    Counts what runs, zeros included: convolutions and products of matrices and vectors, in layers,
    attention, recurrent layers and functional calls. Biases, pooling, normalisation, activations,
    embeddings and elementwise products count nothing. Raises `InputError` for a product that has
    no formula here, and for a net that does not run on `example`.
    """
    return _count(_plain(model), example)["Global"]


def layer_macs(model: nn.Module, example: Example) -> dict[str, int]:
    """MACs of one input by weight name, for each convolution and linear layer; 0 if not called."""
    plain = _plain(model)
    counts = _count(plain, example)
    return {name: counts.get(name, 0) for name in _layers(plain)}


def nonzero_macs(model: nn.Module, example: Example) -> int:
    """MACs of one input in a net that skips each zero weight of a convolution or linear layer."""
    plain = _plain(model)
    counts = _count(plain, example)
    zeros = (
        counts.get(name, 0) // layer.weight.numel() * int((layer.weight == 0).sum())
        for name, layer in _layers(plain).items()
    )
    return counts["Global"] - sum(zeros)


def _count(plain: nn.Module, example: Example) -> dict[str, int]:
    """MACs of all ("Global"), and of each layer that is called, by the name of its weight."""
    from ptflops.aten_engine import FlopCounterMode  # late: it takes seconds
    from ptflops.aten_ops import ATEN_OPS_MAPPING

    def refuse(warning: str) -> None:
        op = warning.split()[1]  # that ptflops counts as nothing
        require(not _PRODUCT.search(op), "model", type(plain).__name__, f"MACs of {op} are unknown")

    known = {**_TORCH, **ATEN_OPS_MAPPING}
    hooks = {op: partial(_formula, op, ATEN_OPS_MAPPING.get(op)) for op in known}
    counter = FlopCounterMode(None, True, False, {"print_params": {}}, hooks)
    counter.print_fn = refuse
    with ExitStack() as stack:
        for name, layer in _layers(plain).items():
            stack.enter_context(layer.register_forward_pre_hook(counter.enter_module(name)))
            stack.enter_context(layer.register_forward_hook(counter.exit_module(name)))
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        for context in (
            evaluating(plain),
            warnings.catch_warnings(action="ignore"),
            torch.no_grad(),  # in inference mode layers reach the counter whole
            sdpa_kernel(SDPBackend.MATH),  # attention, and recurrent layers on CUDA, as the
            cudnn.flags(enabled=False),  # products that they consist of
            counter,
        ):
            stack.enter_context(context)
        run(plain, inputs_for(plain, example, first=True))
    return {"Global": 0} | {part: sum(n.values()) for part, n in counter.flop_counts.items()}


def _formula(op: Any, ptflops: Callable | None, args: tuple, outputs: tuple) -> int:
    """MACs of a call of `op` without bias, by `ptflops` and by torch; refused where they differ."""
    args = [None if place == _BIAS.get(op) else value for place, value in enumerate(args)]
    found = {ptflops(args, outputs)} if ptflops else set()
    if op in _TORCH:
        found.add(_TORCH[op](*args, out_val=outputs[0]) // 2)  # 2 FLOPs per MAC
    require(len(found) == 1, "model", str(op), f"ptflops and torch count {sorted(found)} MACs")
    return found.pop()


# Operations that multiply matrices; not upsampling, nor the pointwise kernels of RNN cells.
_PRODUCT = re.compile(
    r"^(?!.*(upsample|thnn_fused)).*"
    r"((mm|mv|dot)(_|\.|$)|dot_product|conv(?!ert)|linear|rnn|lstm|gru|attention|transformer)"
)
_ATEN = torch.ops.aten
_BIAS = {_ATEN.addmm: 0, _ATEN.convolution: 2}  # place of the argument
_TORCH = {  # FLOPs by operation: torch's formulas, and those that it lacks
    **flop_registry,
    **dict.fromkeys((_ATEN.mv, _ATEN.dot, _ATEN.vdot), lambda a, *_, **__: 2 * a.numel()),
    _ATEN.addmv: lambda _, a, *__, **___: 2 * a.numel(),
    _ATEN.addbmm: lambda _, a, b, *__, **___: 2 * a.numel() * b.shape[2],
    # of a Bilinear: x W for each output, times y
    _ATEN._trilinear: lambda x, w, *_, **__: 2 * len(x) * (w.numel() + w.shape[0] * w.shape[2]),
    # an LSTM on CPU, of one layer in one direction: for each step and sample
    _ATEN.mkldnn_rnn_layer: lambda x, w, u, *_, **__: (
        2 * x.shape[0] * x.shape[1] * (w.numel() + u.numel())
    ),
}


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers of `model` by the names of their weights."""
    named = [(n, layer) for n, layer in model.named_modules() if isinstance(layer, LAYERS)]
    return {f"{name}.weight".lstrip("."): layer for name, layer in named}


def _plain(model: nn.Module) -> nn.Module:
    """`model` folded; itself where it is plain already: copying takes longer than counting."""
    # CSR layers have neither parameters nor a weight: every count would silently miss them.
    csr = any(isinstance(module, CsrLinear) for module in model.modules())
    require(not csr, "model", type(model).__name__, "count the net before to_csr")
    return fold(model) if any(map(is_rewritten, model.modules())) else model
