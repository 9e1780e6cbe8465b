"""A parametrised net as an ordinary one."""

import copy

from torch import nn
from torch.nn.utils import parametrize


def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every parametrised tensor is a plain one of its present value.

    The copy is in eval mode without gradients, and computes what `model` computes in eval mode:
    parametrisations are evaluated there, so gates that are drawn in training take the value they
    have at test time. `model` is left untouched.
    """
    plain = copy.deepcopy(model).eval()
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            _unparametrise(module)
    return plain.requires_grad_(False)


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
