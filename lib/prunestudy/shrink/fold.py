"""A net whose weights are computed, as an ordinary one."""

import copy

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)


def is_plain(model: nn.Module) -> bool:
    """Whether no tensor of `model` is parametrised or computed by a hook of `torch.nn.utils`."""
    return not any(parametrize.is_parametrized(m) or _hooks(m) for m in model.modules())


def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every computed tensor is a plain one of its present value.

    Computed are parametrised tensors and those of `torch.nn.utils`' hooks: pruning, weight norm,
    spectral norm. The copy is in eval mode without gradients, and computes what `model` computes
    in eval mode: gates that are drawn in training take the value they have at test time. `model`
    is left untouched.
    """
    # What a hook computed last is no leaf, which deepcopy refuses.
    found = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor))
    plain = copy.deepcopy(model, {id(v): v.detach() for v in found if not v.is_leaf}).eval()
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            _unparametrise(module)
        for key, hook in _hooks(module).items():
            _unhook(module, key, hook)
    return plain.requires_grad_(False)


def _hooks(module: nn.Module) -> dict[int, BasePruningMethod | WeightNorm | SpectralNorm]:
    return {k: h for k, h in module._forward_pre_hooks.items() if isinstance(h, _HOOKS)}


def _unhook(module: nn.Module, key: int, hook: BasePruningMethod | WeightNorm | SpectralNorm):
    name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
    hook(module, ())
    value = getattr(module, name).detach()
    del module._forward_pre_hooks[key]
    for made in [f"{name}_{end}" for end in ("orig", "mask", "g", "v", "u")]:
        module._parameters.pop(made, None)
        module._buffers.pop(made, None)
    delattr(module, name)
    setattr(module, name, nn.Parameter(value))  # not register_parameter: an LSTM notes it here


def _unparametrise(module: nn.Module) -> None:
    # torch keeps the tensor as a property of a class made for this one module, deepcopy shares
    # that class, and removal deletes the property: without a class of its own the copy would
    # take the weight of the original away.
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    # A tensor made of several frozen ones would come back as a buffer.
    module.parametrizations.requires_grad_(True)
    for name in list(module.parametrizations):
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
