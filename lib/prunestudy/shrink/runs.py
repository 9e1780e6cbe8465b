"""Forward passes of a net on random numbers: what ran, and where it failed."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from prunestudy.errors import InputError, first_line, require
from prunestudy.shrink.layers import is_one_node

_READS = set(
    """__array__ __bool__ __complex__ __float__ __index__ __int__ allclose argwhere equal
    is_nonzero item masked_select nonzero numpy tolist unique unique_consecutive""".split()
)


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def device_of(net: nn.Module) -> torch.device:
    """The device of the first parameter or buffer of `net`; the CPU if it has none."""
    tensors = chain(net.parameters(), net.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put `net` in eval mode, and afterwards each of its modules back into its former mode."""
    former = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in former:
            module.training = training


@dataclass
class Watch:
    """What a forward pass did.

    `order`: the modules that ran, by name; `last`: the last output of each that has no children;
    `cut`: the first module whose output has no gradient.
    """

    order: dict[str, nn.Module] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    cut: str | None = None


@contextmanager
def watching(net: nn.Module, failed: str) -> Iterator[Watch]:
    """Watch `net`; any exception becomes `InputError`, which says what module `failed`, and why."""
    watch, at_work, handles = Watch(), [""], []

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        name, tensors = at_work.pop(), tensors_of(output)
        watch.order.setdefault(name, module)
        if not any(module.children()):
            watch.last[name] = output
        if watch.cut is None and tensors and not any(t.requires_grad for t in tensors):
            watch.cut = name

    for name, module in net.named_modules():
        enter = lambda _, __, name=name: at_work.append(name)  # noqa: E731
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield watch
    except InputError:
        raise
    except Exception as error:
        why = f"{failed}: {first_line(error)}"
        raise InputError(f"module = {called(at_work[-1])!r}: {why}") from error
    finally:
        for handle in handles:
            handle.remove()


class _Plain(TorchFunctionMode):
    """Dropout does nothing; with `strict`, only values of the `known` tensors may be read.

    A gated linear unit is written out: autograd shows which of its halves meet.
    """

    def __init__(self, strict: bool, known: set[int]) -> None:
        super().__init__()
        self.strict, self.known = strict, known

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            return args[0]
        if name == "glu":
            return _written_out(*args, **(kwargs or {}))
        if self.strict and name in _READS:
            read = [t for t in args if isinstance(t, Tensor) and t.layout == torch.strided]
            if any(t.untyped_storage().data_ptr() not in self.known for t in read):
                raise RuntimeError("what it does depends on the values of its input")
        return func(*args, **(kwargs or {}))


def _written_out(x: Tensor, dim: int = -1) -> Tensor:
    a, b = x.chunk(2, dim)
    return a * b.sigmoid()


def outputs_of(
    net: nn.Module,
    batch: tuple[Tensor, ...],
    strict: bool = False,
    last: bool = False,
    bare: bool = False,
) -> list[Tensor]:
    """All tensors that `net` returns for `batch`, without dropout, seeded; `InputError` for none.

    With `strict` the net may not read values of tensors other than its own. With `last` the next
    random number comes last: the same if as many were drawn. With `bare` there are no
    hooks and no gradients: some torch modules then take their fast path.
    """
    own = tensors_of(net.state_dict()) if strict else []
    known = {t.untyped_storage().data_ptr() for t in own if t.layout == torch.strided}
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype_of(net) or usual)
    try:
        mode = torch.no_grad() if bare else _Plain(strict, known)
        with torch.random.fork_rng(devices=[]), mode:
            torch.manual_seed(0)
            found = tensors_of(net(*(x.clone() for x in batch)))
            end = [torch.rand((), device=batch[0].device)] * last
    finally:
        torch.set_default_dtype(usual)
    allowed = "its output must be a tensor, or tensors in tuples, lists or dicts"
    require(bool(found), "model", type(net).__name__, allowed)
    return found + end


def dtype_of(net: nn.Module) -> torch.dtype | None:
    """The precision of the first floating-point parameter or buffer of `net`; None without any."""
    tensors = chain(net.parameters(), net.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), None)


def fresh(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give `net` random parameters and batch-norm statistics, in place; return it.

    With an odd `seed` none is negative, so that no ReLU is silent. Each eps is at least 0.1, so
    that rounding errors stay small in training mode.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = max(module.eps, 0.1)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        last, own = name.rpartition(".")[2], isinstance(tensor, nn.Parameter)
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator)
        values = values.abs() if seed % 2 else values
        if last == "running_mean" or (own and "bias" in last):
            tensor.data.copy_(0.3 * values)
        elif last == "running_var" or (own and tensor.dim() < 2):
            tensor.data.copy_(0.5 + values.abs())
        elif own:
            tensor.data.copy_(values * math.sqrt(2 / max(tensor.shape[1:].numel(), 1)))
    return net


def drawn(example: tuple[Tensor, ...], net: nn.Module) -> tuple[Tensor, ...]:
    """Batches of two as `example`, on the device and in the precision of `net`.

    Random numbers in 0-1, most of them small; integers and booleans are those of `example`.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for x in example:
        new = torch.cat([x.detach(), x.detach()])[:2]
        if x.is_floating_point():
            new = torch.rand(new.shape, generator=generator, dtype=torch.float64).pow(4)
            new = new.to(dtype_of(net) or torch.get_default_dtype())
        made.append(new.to(device_of(net)))
    return tuple(made)


def given(example: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first two of `example` as they are, on the device and in the precision of `batch`.

    A constant tensor (zeros) is taken as a placeholder: that of `batch` is used instead.
    """
    made = []
    for x, like in zip(example, batch, strict=True):
        own = torch.cat([x.detach(), x.detach()])[:2].to(like)
        blank = like.is_floating_point() and own[0].numel() > 1 and (own == own.flatten()[0]).all()
        made.append(like if blank else own)
    return tuple(made)


class _Node(torch.autograd.Function):
    """A call of a module as one node of autograd's graph, whatever operations it is made of."""

    @staticmethod
    def forward(ctx: Any, call: Callable, anchor: Tensor, *tensors: Tensor) -> Any:  # noqa: ARG004
        return call(tensors)


@contextmanager
def one_node_each(net: nn.Module, copies: Collection[nn.Module]) -> Iterator[set]:
    """Make a call of each layer a node of autograd's graph (`copies` copy); gives these nodes."""
    nodes, anchor = set(), torch.zeros((), requires_grad=True)

    def wrapped(before: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            result = []

            def call(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                given = iter(tensors)
                inner, named = tree_map_only(Tensor, lambda _: next(given), (args, kwargs))
                made = before(*inner, **named)
                # A view could not be worked on in place behind the node.
                result.append(
                    tree_map_only(Tensor, lambda t: t.clone() if t._is_view() else t, made)
                )
                return tuple(tensors_of(result[0]))

            made = iter(_Node.apply(call, anchor, *tensors_of((args, kwargs))))
            out = tree_map_only(Tensor, lambda _: next(made), result[0])
            nodes.update(t.grad_fn for t in tensors_of(out))
            return out

        return forward

    changed = [m for m in net.modules() if is_one_node(m)]
    for module in changed:
        module.forward = wrapped(Tensor.clone if module in copies else module.forward)
    try:
        yield nodes
    finally:
        for module in changed:
            del module.forward


def called(name: str) -> str:
    """The name of a module as errors give it."""
    return name or "the net itself"
