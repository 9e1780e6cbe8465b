"""A net run on random numbers in float64: what ran, where it failed, what it depends on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prunestudy.errors import InputError, require

_READS = set(
    """__array__ __bool__ __complex__ __float__ __index__ __int__ allclose argwhere equal
    is_nonzero item masked_select nonzero numpy tolist unique unique_consecutive""".split()
)
# What reshaping leaves in autograd's graph depends on strides, and so on the size of the batch.
_LAYOUT = ("view", "alias", "clone", "expand", "asstrided", "transpose", "permute", "squeeze")


class Watch:
    """Which modules of a net ran, in order, which is at work, and which lost the gradient.

    `first` is what the first of them got that has a weight of two dimensions or more.
    """

    def __init__(self) -> None:
        self.order: dict[str, nn.Module] = {}
        self.stack: list[str] = []
        self.cut: str | None = None
        self.first: tuple[nn.Module, Tensor] | None = None

    def enter(self, name: str, module: nn.Module, given: tuple) -> None:
        """Called before the forward pass of each module."""
        self.stack.append(name)
        weighted = getattr(module, "weight", None) is not None
        if self.first is None and weighted and given and isinstance(given[0], Tensor):
            self.first = module, given[0]

    def leave(self, module: nn.Module, output: Any) -> None:
        """Called after the forward pass of each module."""
        name = self.stack.pop()
        self.order.setdefault(name, module)
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if self.cut is None and tensors and not any(t.requires_grad for t in tensors):
            self.cut = name


@contextmanager
def watching(net: nn.Module, failed: str) -> Iterator[Watch]:
    """Watch the modules of `net`; what is raised becomes `InputError`.

    Its line names the innermost module at work, says that it `failed` and why.
    """
    watch, handles = Watch(), []
    for name, module in net.named_modules():
        enter = lambda module, given, name=name: watch.enter(name, module, given)  # noqa: E731
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(lambda m, _, out: watch.leave(m, out)))
    try:
        yield watch
    except InputError:
        raise
    except Exception as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        name = called(watch.stack[-1] if watch.stack else "")
        raise InputError(f"module = {name!r}: {failed}: {line}") from error
    finally:
        for handle in handles:
            handle.remove()


class _Plain(TorchFunctionMode):
    """Dropout does nothing; with `strict` no value of a tensor may be read but of `known` ones."""

    def __init__(self, strict: bool, known: set[int]) -> None:
        super().__init__()
        self.strict, self.known = strict, known

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):  # noqa: ARG002
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            return args[0]
        if self.strict and name in _READS:
            read = [t for t in args if isinstance(t, Tensor)]
            if any(t.untyped_storage().data_ptr() not in self.known for t in read):
                raise RuntimeError("what it does depends on the values of its input")
        return func(*args, **(kwargs or {}))


def outputs_of(
    net: nn.Module, example: tuple[Tensor, ...], strict: bool = False, seed: int = 0
) -> list[Tensor]:
    """All tensors that `net` returns for `example`; in float64, without dropout, seeded.

    With `strict` the net may not read values of tensors but its own.
    """
    known = {t.untyped_storage().data_ptr() for t in net.state_dict().values()} if strict else set()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]), _Plain(strict, known):
            torch.manual_seed(seed)
            found = tree_leaves(net(*(x.clone() for x in example)))
    finally:
        torch.set_default_dtype(usual)
    return [t for t in found if isinstance(t, Tensor)]


def fresh(plain: nn.Module) -> nn.Module:
    """Make `plain` one of float64 with random parameters and batch-norm statistics; return it."""
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor, low: float | None, scale: float) -> None:
        make = torch.randn if low is None else torch.rand
        values = make(like.shape, generator=generator, dtype=like.dtype) * scale + (low or 0.0)
        like.data.copy_(values)

    plain.double()
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
        last = name.rpartition(".")[2]
        if not tensor.is_floating_point():
            continue
        if last == "running_mean" or (isinstance(tensor, nn.Parameter) and "bias" in last):
            draw(tensor, None, 0.3)
        elif last == "running_var" or (isinstance(tensor, nn.Parameter) and tensor.dim() < 2):
            draw(tensor, 0.5, 1.0)
        elif isinstance(tensor, nn.Parameter):
            draw(tensor, None, math.sqrt(2 / max(tensor[0].numel(), 1)))
    return plain


def drawn(
    example: tuple[Tensor, ...], net: nn.Module, batch: int = 2, seed: int = 0, positive: bool = False
) -> tuple[Tensor, ...]:
    """`batch` inputs as those of `example`, on the device of `net`: random numbers in float64.

    With `positive` uniform in 0-1, else normal; integers and booleans are those of `example`.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next((t.device for t in net.state_dict().values()), torch.device("cpu"))
    made = []
    for x in example:
        if x.is_floating_point():
            draw = torch.rand if positive else torch.randn
            new = draw((batch, *x.shape[1:]), generator=generator, dtype=torch.float64)
        else:
            new = torch.cat([x.detach()] * batch)[:batch]
        made.append(new.to(device))
    return tuple(made)


def survey(net: nn.Module, example: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], bool]:
    """Random inputs on which `net` gives finite numbers, and whether their last axis is channels.

    Raises `InputError` naming the module where the net fails, where it reads values of a tensor,
    and for a net whose graph depends on its input or on the size of the batch.
    """
    fails = f"cannot be traced on {[tuple(x.shape) for x in example]}"
    for positive in (False, True):
        batch = drawn(example, net, positive=positive)
        with watching(net, fails) as watch:
            found = outputs_of(net, batch, strict=True)
        if all(bool(t.isfinite().all()) for t in found):
            break
    others = [tuple(-x if x.is_floating_point() else x for x in batch)]
    others.append(tuple(x[:1] for x in batch))
    first = (list(watch.order), _operations(found))
    for other, what in zip(others, ("the values of its input", "the size of the batch"), strict=True):
        with watching(net, fails) as again:
            done = _operations(outputs_of(net, other))
        ran = (list(again.order), done)
        apart = [a for a, b in zip(first[0], ran[0], strict=False) if a != b]
        name = called(apart[0] if apart else "")
        require(ran == first, "module", name, f"cannot be traced: what runs depends on {what}")
    layer, given = watch.first or (None, None)
    linear = isinstance(layer, nn.Linear | nn.LayerNorm) and given.dim() > 2
    return batch, linear and any(x.shape[-1] == given.shape[-1] for x in batch)


def called(name: str) -> str:
    """The name of a module as errors give it."""
    return name or "the net itself"


def _operations(outputs: list[Tensor]) -> list[str]:
    """The operations in autograd's graph of `outputs`, but for those of layout."""
    seen, waiting, names = set(), [t.grad_fn for t in outputs], []
    while waiting:
        operation = waiting.pop()
        if operation is not None and operation not in seen:
            seen.add(operation)
            waiting += [before for before, _ in operation.next_functions]
            if not any(word in operation.name().lower() for word in _LAYOUT):
                names.append(operation.name())
    return names
