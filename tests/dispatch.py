"""A mode that refuses what a CUDA graph cannot capture: what hooks of a step must do without."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "is_set_to")
_SHAPES = ("nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "bincount")


class TensorsOnly(TorchDispatchMode):
    """Refuses reads of a value, other devices, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in _READS:
            raise AssertionError(f"{func}: reads a value on the host")
        if name in _SHAPES or (name == "repeat_interleave" and "Tensor" in str(func)):
            raise AssertionError(f"{func}: its shape depends on values")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise AssertionError(f"{func}: its shape depends on values (a mask as an index)")
        if name in ("_to_copy", "to") and kwargs.get("device") is not None:
            moved = torch.device(kwargs["device"]).type != args[0].device.type
            if moved:
                raise AssertionError(f"{func}: changes the device")
        return func(*args, **kwargs)
