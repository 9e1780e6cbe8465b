"""What a net costs on paper: parameters, nonzero weights, multiplications.

All counts are of the net as it computes in eval mode: parametrised weights count as what they
evaluate to, and gates or masks under a parametrisation do not count as parameters.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunestudy.errors import require
from prunestudy.measure.forward import evaluating, zeros
from prunestudy.shrink import CsrLinear, fold
from prunestudy.shrink.trace import LAYERS, TRANSPOSED


def parameters(model: nn.Module) -> int:
    """Number of parameters: weights, biases, batch-norm scales and shifts; no buffers."""
    return sum(p.numel() for p in _plain(model).parameters())


def nonzeros(model: nn.Module) -> int:
    """Number of parameters (biases included) that are not exactly zero."""
    return sum(int(p.count_nonzero()) for p in _plain(model).parameters())


def prunable_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Name (`conv1.weight`) and weight of each convolution, transposed ones too, and linear layer.

    In order of registration, detached. A plain layer's tensor shares memory with the layer; a
    parametrised one's is its value in eval mode.
    """
    weights = []
    for name, layer in _layers(model):
        with evaluating(layer), torch.no_grad():
            weights.append((f"{name}.weight".lstrip("."), layer.weight.detach()))
    return weights


def layer_sparsity(model: nn.Module) -> dict[str, float]:
    """Share (0-1) of exact zeros in each prunable weight, by its name in `prunable_weights`."""
    return {n: 1 - int(w.count_nonzero()) / w.numel() for n, w in prunable_weights(model)}


def macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one input of `shape` (no batch), counted by ptflops.

    Counts what runs, functional calls too: convolutions and matrix products, zeros in them
    included. Biases, pooling, normalisation and activations count nothing. `model` is left
    untouched. Raises `RuntimeError` with ptflops' reason if it could not count.
    """
    import ptflops  # late: it takes seconds

    _refuse_csr(model)
    plain, said = fold(model), io.StringIO()
    zeros(plain, shape, 1)  # refuses a bad shape
    # Not inference_mode: there linear and conv2d reach ptflops whole, under names it ignores.
    with torch.no_grad(), redirect_stdout(said), redirect_stderr(said):
        count, _ = ptflops.get_model_complexity_info(
            plain,
            tuple(shape),
            backend="aten",  # the default backend misses parametrised and functional layers
            as_strings=False,
            print_per_layer_stat=False,
            custom_modules_hooks=_without_bias(),
        )
    if count is None:
        reason = next((line for line in said.getvalue().splitlines() if line[:1] == "<"), "unknown")
        raise RuntimeError(f"ptflops could not count {type(model).__name__} on {shape}: {reason}")
    return int(count)


def _without_bias() -> dict[Callable, Callable]:
    """ptflops counts a bias as one MAC per output; the literature counts multiplications only."""
    from ptflops.aten_ops import addmm_flop, conv_flop

    aten = torch.ops.aten
    return {
        aten.addmm: lambda args, out: addmm_flop([None, *args[1:]], out),
        aten.convolution: lambda args, out: conv_flop([*args[:2], None, *args[3:]], out),
    }


def nonzero_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """MACs of one input of `shape` that a net needs which skips every zero weight."""
    return sum(layer_macs(model, shape, Tensor.count_nonzero).values())


def layer_macs(
    model: nn.Module, shape: tuple[int, ...], count: Callable[[Tensor], Any] = Tensor.numel
) -> dict[str, int]:
    """MACs of each layer, by the name of its weight: output positions times `count` of the weight.

    Sees convolution and linear modules only. For a transposed convolution it is input positions.
    """
    _refuse_csr(model)
    plain = fold(model)
    names = {layer: f"{name}.weight".lstrip(".") for name, layer in _layers(plain)}
    found = dict.fromkeys(names.values(), 0)

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[names[layer]] += _positions(layer, inputs[0], output) * int(count(layer.weight))

    for layer in names:
        layer.register_forward_hook(add)
    with torch.inference_mode():
        plain(zeros(plain, shape, 1))
    return found


def _positions(layer: nn.Module, x: Tensor, y: Tensor) -> int:
    """How often each weight of `layer` is used."""
    if isinstance(layer, nn.Linear):
        return y.numel() // layer.out_features
    if isinstance(layer, TRANSPOSED):
        return x.numel() // layer.in_channels
    return y.numel() // layer.out_channels


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    _refuse_csr(model)
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LAYERS)]


def _plain(model: nn.Module) -> nn.Module:
    """`model` itself if nothing in it is parametrised, else a folded copy."""
    _refuse_csr(model)
    return fold(model) if any(map(parametrize.is_parametrized, model.modules())) else model


def _refuse_csr(model: nn.Module) -> None:
    # CSR layers have neither parameters nor a weight: every count would silently miss them.
    csr = any(isinstance(module, CsrLinear) for module in model.modules())
    require(not csr, "model", type(model).__name__, "count the net before to_csr")
