"""A net run on random numbers: what ran, where it failed, what it depends on."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from prunestudy.errors import InputError, require
from prunestudy.shrink.layers import is_one_node

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

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
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
    """All tensors that `net` returns for `example`, without dropout, seeded.

    With `strict` the net may not read values of tensors but its own.
    """
    known = {t.untyped_storage().data_ptr() for t in net.state_dict().values()} if strict else set()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype_of(net))
    try:
        with torch.random.fork_rng(devices=[]), _Plain(strict, known):
            torch.manual_seed(seed)
            found = tree_leaves(net(*(x.clone() for x in example)))
    finally:
        torch.set_default_dtype(usual)
    return [t for t in found if isinstance(t, Tensor)]


def dtype_of(net: nn.Module) -> torch.dtype:
    """The precision of the first parameter or buffer of `net` that has one."""
    kinds = (t.dtype for t in net.state_dict().values() if t.is_floating_point())
    return next(kinds, torch.get_default_dtype())


def fresh(net: nn.Module) -> nn.Module:
    """Give `net` random parameters and batch-norm statistics, in place; return it.

    Norms divide by no small number, so that rounding errors stay small in training mode.
    """
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = max(module.eps, 0.1)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        last, own = name.rpartition(".")[2], isinstance(tensor, nn.Parameter)
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if not tensor.is_floating_point():
            continue
        if last == "running_mean" or (own and "bias" in last):
            tensor.data.copy_(0.3 * values)
        elif last == "running_var" or (own and tensor.dim() < 2):
            tensor.data.copy_(0.5 + values.abs())
        elif own:
            tensor.data.copy_(values * math.sqrt(2 / max(tensor[0].numel(), 1)))
    return net


def drawn(
    example: tuple[Tensor, ...], net: nn.Module, positive: bool = False
) -> tuple[Tensor, ...]:
    """Two inputs as those of `example`, random, on the device and in the precision of `net`.

    With `positive` uniform in 0-1, else normal; integers and booleans are those of `example`.
    """
    generator = torch.Generator().manual_seed(0)
    device = next((t.device for t in net.state_dict().values()), torch.device("cpu"))
    made = []
    for x in example:
        if x.is_floating_point():
            draw = torch.rand if positive else torch.randn
            new = draw((2, *x.shape[1:]), generator=generator, dtype=torch.float64)
            made.append(new.to(device, dtype_of(net)))
        else:
            made.append(torch.cat([x.detach(), x.detach()])[:2].to(device))
    return tuple(made)


def survey(net: nn.Module, example: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], bool]:
    """Random inputs on which `net` gives finite numbers, and whether their last axis is channels.

    Raises `InputError` naming the module where the net fails, where it reads values of a tensor,
    and for a net whose graph depends on its inputs or on how many there are.
    """
    fails = f"cannot be traced on {[tuple(x.shape) for x in example]}"
    for positive in (False, True):
        batch = drawn(example, net, positive)
        with watching(net, fails) as watch, one_node_each(net):
            found = outputs_of(net, batch, strict=True)
        if all(bool(t.isfinite().all()) for t in found):
            break
    finite = any(bool(t.isfinite().any()) for t in found)
    require(finite, "module", called(""), "cannot be traced: on random inputs nothing is finite")
    with watching(net, fails) as again, one_node_each(net):
        other = tuple(-x[:1] if x.is_floating_point() else x[:1] for x in batch)
        done = _operations(outputs_of(net, other))
    differ = [a for a, b in zip(watch.order, again.order, strict=False) if a != b]
    same = not differ and _operations(found) == done and len(watch.order) == len(again.order)
    why = "cannot be traced: what runs depends on the values or the number of its inputs"
    require(same, "module", called(differ[0] if differ else ""), why)
    layer, given = watch.first or (None, None)
    linear = isinstance(layer, nn.Linear | nn.LayerNorm) and given.dim() > 2
    return batch, linear and any(x.shape[-1] == given.shape[-1] for x in batch)


class _Node(torch.autograd.Function):
    """A call of a module as one node of autograd's graph, whatever operations it is made of."""

    @staticmethod
    def forward(ctx: Any, call: Callable, anchor: Tensor, *tensors: Tensor) -> Any:  # noqa: ARG004
        return call(tensors)


@contextmanager
def one_node_each(net: nn.Module, copies: Collection[nn.Module] = ()) -> Iterator[set]:
    """Make a call of each layer one node of autograd's graph; gives the set of these nodes.

    Those of `copies` only copy what they get.
    """
    nodes, anchor = set(), torch.zeros((), requires_grad=True)
    changed = [m for m in net.modules() if is_one_node(m)]

    def wrapped(before: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            flat, spec = tree_flatten((args, kwargs))
            where = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
            form = []

            def call(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                for i, tensor in zip(where, tensors, strict=True):
                    flat[i] = tensor
                inner_args, inner_kwargs = tree_unflatten(flat, spec)
                form.append(tree_flatten(before(*inner_args, **inner_kwargs)))
                leaves = form[0][0]
                return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

            made = iter(_Node.apply(call, anchor, *(flat[i] for i in where)))
            leaves, out = form[0]
            leaves = [next(made) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            nodes.update(leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor))
            return tree_unflatten(leaves, out)

        return forward

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
