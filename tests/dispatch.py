"""Modes that refuse what a CUDA graph cannot capture, and a stand-in for one on the CPU."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunestudy.train.capture import refused


class TensorsOnly(TorchDispatchMode):
    """Refuses reads of a value, other devices, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        why = refused(func, args, kwargs or {})
        if why:
            raise AssertionError(why)
        return func(*args, **(kwargs or {}))


class Tape(TensorsOnly):
    """Keeps the calls of `function`, and makes them again with the same tensors.

    As with a CUDA graph, nothing of Python runs in a replay: a number, a branch or a tensor that
    has changed since is not seen. A capture does nothing, so that its calls count as the first
    replay.
    """

    def __init__(self, function):
        super().__init__()
        self.calls, self.done = [], True
        with self:
            self.result = function()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        if self.done:
            self.done = False
            return
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    assert old.shape == new.shape
                    old.copy_(new)
