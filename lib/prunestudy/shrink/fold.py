"""Parametrised nets as ordinary ones, and what no method can work on."""

import copy
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from prunestudy.errors import InputError, first_line, require
from prunestudy.shrink.layers import LAYERS


def fold(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in which every parametrised tensor is a plain parameter.

    The copy is in eval mode without gradients and computes what `model` computes in eval mode.
    Hooks of `nn.utils.prune`, `weight_norm` and `spectral_norm` are folded as well.
    """
    require(isinstance(model, nn.Module), "model", type(model).__name__, "a torch module")
    plain = copied(model).eval()
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            # torch keeps the tensor as a property of a class made for this one module, deepcopy
            # shares that class, and removal deletes the property: without a class of its own the
            # copy would take the weight of the original away.
            cls = type(module)
            module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
            # A tensor made of several frozen ones would come back as a buffer.
            module.parametrizations.requires_grad_(True)
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for number, hook in _rewriting(module):
            hook.remove(module)
            del module._forward_pre_hooks[number]
    return plain.requires_grad_(False)


def with_gradients(net: nn.Module) -> nn.Module:
    """`net`, whose parameters all require gradients, but for those of whole numbers."""
    for parameter in net.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    return net


def real_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The parameters of `net` that are real numbers, neither whole nor complex ones."""
    return [p for p in net.parameters() if p.is_floating_point()]


def channels_last(net: nn.Module) -> nn.Module:
    """`net`, with its tensors of four dimensions in channels_last; torch refuses those of five."""
    layout = torch.channels_last
    return net._apply(lambda t: t.to(memory_format=layout) if t.dim() == 4 else t)


def copied(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy without autograd history, but for tensors that are `shared`.

    Raises `InputError` for a net that cannot be copied.
    """
    memo = {id(tensor): tensor for tensor in shared}
    known = {name: id(t) for name, t in _tensors(model) if id(t) not in memo}
    try:
        with _Detached():
            made = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a net may hold
        line = f"cannot be copied: {first_line(error)}"
        raise InputError(f"model = {type(model).__name__!r}: {line}") from error
    same = next((name for name, t in _tensors(made) if known.get(name) == id(t)), None)
    line = f"a copy of it has the same {same!r}, not a copy (`__deepcopy__`)"
    require(same is None, "model", type(model).__name__, line)
    return made


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


class _Detached(TorchFunctionMode):
    """Tensors that have a history are copied without it, wherever they are kept."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if func is Tensor.__deepcopy__ and args[0].requires_grad:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def require_net(model: object) -> None:
    """Raise `InputError` for what is no torch module, or has parameters without values."""
    right, allowed = isinstance(model, nn.Module), "a torch module, not a scripted one"
    require(right, "model", type(model).__name__, allowed)
    for name, module in model.named_modules():
        right = not isinstance(module, torch.jit.ScriptModule)
        require(right, "module" if name else "model", name or type(model).__name__, allowed)
    for name, tensor in _tensors(model):
        here = not (is_lazy(tensor) or tensor.is_meta)
        require(here, "model", type(model).__name__, f"{name!r} has no values yet")


def require_ordinary(model: nn.Module) -> None:
    """Raise `InputError` for tied and complex weights, and for one that is made of others."""
    require_untied(model)
    for name, module in model.named_modules():
        made = "its weight is computed from others: use fold(net).requires_grad_()"
        require(not is_rewritten(module), "module", name, made)
        if isinstance(module, LAYERS):
            allowed = f"its weight is {module.weight.dtype}, only real ones can be pruned"
            require(not module.weight.is_complex(), "module", name, allowed)


def require_untied(model: nn.Module) -> None:
    """Raise `InputError` naming both modules where two share a parameter or its memory."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owner = owners.setdefault(parameter.data_ptr() or id(parameter), name)
                shared = f"shares a parameter with {owner!r}, tied weights cannot be pruned"
                require(owner == name, "module", name, shared)


def is_rewritten(module: nn.Module) -> bool:
    """Whether a tensor of `module` is parametrised or made by a hook."""
    return parametrize.is_parametrized(module) or any(_rewriting(module))


def _rewriting(module: nn.Module) -> Iterator[tuple[int, object]]:
    """The hooks that make a parameter anew at each forward pass, and can fold it."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if type(hook).__module__.startswith("torch.nn.utils.") and hasattr(hook, "remove"):
            yield number, hook
