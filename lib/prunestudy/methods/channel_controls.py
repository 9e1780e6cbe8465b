"""Controls that remove channels once, by a ranking, and fine-tune what is left.

Importances are torch-pruning's, divided by their mean over the dependency group, so that one
ranking holds for the whole net. The lowest channels go until the target is met.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunestudy.errors import InputError, require
from prunestudy.measure.forward import inputs_for
from prunestudy.methods.base import At, Batch, Context, Phase, call, then_fine_tune
from prunestudy.methods.channels import Channelled, Channels, become
from prunestudy.methods.masks import Masked, Scope
from prunestudy.shrink import axis_of, fold
from prunestudy.shrink.fold import with_gradients
from prunestudy.shrink.groups import FOLLOWS, PRODUCES
from prunestudy.shrink.layers import is_depthwise
from prunestudy.shrink.runs import outputs_of
from prunestudy.values import Count, Part, Positive


class _Removal(Channelled):
    """Removes channels in `attach`; a resumed run starts with the same net and removes the same."""

    measure = None

    def attach(self, model: nn.Module, context: Context) -> None:
        self.number(model, context)
        self.remove(model, self.scores(model, context))

    def number(self, model: nn.Module, context: Context) -> None:
        self.channels = Channels(model, context.example, self.of, leave=self.leave)
        self.left = torch.ones(self.channels.size, dtype=torch.bool)

    def open(self) -> Tensor:
        return self.left

    def scores(self, model: nn.Module, context: Context) -> Tensor:  # noqa: ARG002
        """What the ranking is by (N,), on the CPU: the lowest go first, infinite ones never."""
        return importance(self.channels, with_gradients(fold(model)), self.measure)

    def remove(self, model: nn.Module, scores: Tensor) -> None:
        """Remove channels from `model`, in place, until the target is met."""
        order = scores.argsort(stable=True)[: int(scores.isfinite().sum())]
        self.left = self.channels.close(order, self.left, self.target)
        become(model, self.channels.smaller(model, self.left))


class GroupL2(_Removal):
    """Squared weights of all layers that hold a slice of the channel, their mean.

    DepGraph (Fang et al., CVPR 2023), without its sparse training.
    """

    name, title = "group_l2", "group L2, one shot"
    measure = torch_pruning.importance.GroupMagnitudeImportance(p=2)


class L1Filter(_Removal):
    """The L1 norm of the filter that produces the channel (Li et al., ICLR 2017)."""

    name, title = "l1_filter", "L1 filter norm, one shot"
    measure = torch_pruning.importance.MagnitudeImportance(p=1, group_reduction="first")


class TaylorChannels(_Removal):
    """|sum of w dL/dw| over each slice of the channel, their mean (Molchanov et al., CVPR 2019).

    L is the summed loss of the first training `batches`.
    """

    name, title = "taylor_channels", "Taylor, one shot"
    measure = torch_pruning.importance.GroupTaylorImportance(multivariable=True)
    batches: Count = 10

    def scores(self, model: nn.Module, context: Context) -> Tensor:
        """Importance by the gradient of the summed loss of the first batches."""
        require(context.loss is not None, "context.loss", None, "Taylor needs the task's loss")
        net = with_gradients(fold(model))
        add_gradients(net, context.loss, list(context.batches(self.batches)))
        return importance(self.channels, net, self.measure)


class NetworkSlimming(_Removal):
    """|gamma| of the channel's batch norm, after training with an L1 penalty on all gamma.

    Liu et al., ICCV 2017: the opposite of polarization. `strength`: lambda of the penalty; `cut`:
    share of the steps before the removal. Channels that several batch norms scale (residual
    streams) are ranked by the mean; those without any stay.
    """

    name, title = "network_slimming", "network slimming"
    strength: Positive = 1e-4
    cut: Part = 0.5

    def phases(self) -> tuple[Phase, ...]:
        """Scales are pressed down, then the smaller net is fine-tuned."""
        return then_fine_tune("slim", self.cut, schedule=None)

    def check(self, model: nn.Module) -> None:
        """Refuse a net without batch norm."""
        name, why = type(model).__name__, "network_slimming needs a net with batch norm"
        require(bool(_scales(model)), "model", name, why)

    def attach(self, model: nn.Module, context: Context) -> None:
        """Number the channels; none is removed yet."""
        self.check(model)
        self.model = (model,)  # a tuple, since its parameters are not the method's
        self.number(model, context)

    def after_backward(self, at: At) -> None:
        """Add lambda sign(gamma)."""
        if at.phase == "slim":
            for scale in _scales(*self.model):
                if scale.grad is not None:
                    scale.grad.add_(scale.detach().sign(), alpha=self.strength)

    def update(self, at: At) -> None:
        """Remove channels at the end of the first phase."""
        if at.phase == "slim" and at.last:
            self.remove(*self.model, scale_sizes(self.channels, *self.model))

    def finish(self, model: nn.Module, context: Context) -> nn.Module:
        """Remove channels, if no step was made."""
        if self.left.all():
            self.remove(model, scale_sizes(self.channels, model))
        return super().finish(model, context)

    def log(self) -> dict[str, float]:
        """The share left; the mean size of the scales."""
        scales = torch.cat([scale.detach().abs() for scale in _scales(*self.model)])
        return super().log() | {"scale": float(scales.mean())}

    def get_extra_state(self) -> Tensor:
        """Which channels are left."""
        return self.left

    def set_extra_state(self, state: Tensor) -> None:
        """Remove the channels that were removed."""
        self.left = state.cpu()
        if not self.left.all():
            become(*self.model, self.channels.smaller(*self.model, self.left))


class Random(_Removal):
    """A random mask of single weights in `scope`, or random channels for MACs and parameters."""

    name = title = "random"
    counts = ("sparsity", "macs", "parameters")
    scope: Scope = "all"

    def __init__(self, target: float | None = None, of: str | None = None, **settings: Any) -> None:
        super().__init__(target, of, **settings)
        allowed = "all, where channels are removed"
        require(self.of == "sparsity" or self.scope == "all", "scope", self.scope, allowed)

    def check(self, model: nn.Module) -> None:
        """Refuse a net without weights to mask, and a target that masks none of them."""
        if self.of == "sparsity":
            Masked(self.target, scope=self.scope).check(model)

    def attach(self, model: nn.Module, context: Context) -> None:
        """Mask weights or remove channels."""
        if self.of != "sparsity":
            super().attach(model, context)
            return
        masked = Masked(self.target, scope=self.scope)
        masked.attach(model, context)
        masked.scores = lambda: [_noise(weight.shape, context) for weight in masked.weights]
        masked.cut(self.target)
        self.kept = masked.kept()

    def scores(self, model: nn.Module, context: Context) -> Tensor:  # noqa: ARG002
        """Uniform noise."""
        return _noise((self.channels.size,), context).cpu()

    def log(self) -> dict[str, float]:
        """Share left of the weights, MACs or parameters."""
        return {"kept": self.kept} if self.of == "sparsity" else super().log()

    def report(self) -> dict[str, Any]:
        """Of channels: whether the target was met, and what is kept."""
        return {} if self.of == "sparsity" else super().report()


def add_gradients(net: nn.Module, loss: Callable, batches: Iterable[Batch]) -> None:
    """Add the gradient of each batch's loss; zero for parameters that no loss depends on."""
    for x, y in batches:
        loss(call(net, x), x, y).backward()
    for parameter in net.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def taylor(channels: Channels, net: nn.Module) -> list[Tensor]:
    """First-order Taylor of a loss whose gradients lie in the weights: one (channels,) per group.

    As torch-pruning's: the sum of |w dL/dw| over each slice of a channel, their mean, divided by
    the mean over the group's channels. Biases do not count.
    """
    found = []
    for group in channels.groups:
        sums = []
        for m in group.members:
            layer = net.get_submodule(m.layer)
            if getattr(layer, "weight", None) is not None:
                along = axis_of(layer, FOLLOWS if m.role == FOLLOWS else m.axis)
                terms = (layer.weight.detach() * layer.weight.grad).abs().movedim(along, 0)
                places = terms.reshape(len(terms), -1).sum(1)
                # One axis of a grouped convolution's weight is the same for all groups.
                places = places.repeat(m.size // len(places))
                sums.append(places[torch.tensor(m.indices, device=places.device)].sum(1))
        score = torch.stack(sums).mean(0)
        found.append(score / score.mean().clamp(min=torch.finfo(score.dtype).tiny))
    return found


def scale_sizes(channels: Channels, model: nn.Module) -> Tensor:
    """Mean |gamma| of the batch norms of each channel (N,), on the CPU; infinite without any."""
    found = []
    for group in channels.groups:
        layers = [(m, model.get_submodule(m.layer)) for m in group.having(FOLLOWS)]
        sizes = [
            layer.weight.detach().abs().cpu()[torch.tensor(m.indices)].mean(1)
            for m, layer in layers
            if isinstance(layer, _BatchNorm) and layer.affine
        ]
        none = torch.full((group.channels,), torch.inf)
        found.append(torch.stack(sizes).mean(0) if sizes else none)
    return torch.cat(found)


def importance(channels: Channels, net: nn.Module, measure: Any) -> Tensor:
    """torch-pruning's `measure` of every channel (N,), on the CPU; `net` is plain and trainable."""
    example = inputs_for(net, channels.example)
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(
            net, example, forward_fn=outputs_of, verbose=False
        )
    roots, slices = [group.having(PRODUCES)[0] for group in channels.groups], []
    try:
        for root in roots:
            layer = net.get_submodule(root.layer)
            cut = graph.get_pruner_of_module(layer).prune_out_channels
            slices.append(graph.get_pruning_group(layer, cut, list(range(root.size))))
        try:
            scores = [measure(each).cpu() for each in slices]
        except IndexError:  # it takes some convolutions of several groups for dense ones
            for module in net.modules():
                if getattr(module, "groups", 1) > 1 and not is_depthwise(module):
                    _make_dense(module)
            scores = [measure(each).cpu() for each in slices]
    except (IndexError, ValueError) as error:  # it is wrong about the net's channels
        name, why = type(net).__name__, "its channels cannot be ranked; use the method random"
        raise InputError(f"model = {name!r}: {why}") from error
    found = zip(scores, roots, strict=True)
    return torch.cat([score[torch.tensor(root.indices)].mean(1) for score, root in found])


def _make_dense(layer: nn.Module) -> None:
    """Give a convolution of several groups the kernel (and gradient) of one, zero between them."""
    eye = torch.eye(layer.groups).to(layer.weight)

    def dense(t: Tensor) -> Tensor:
        blocks = t.detach().unflatten(0, (layer.groups, -1))
        return torch.einsum("grc...,gh->grhc...", blocks, eye).flatten(2, 3).flatten(0, 1)

    gradient, layer.weight = layer.weight.grad, nn.Parameter(dense(layer.weight))
    layer.weight.grad = None if gradient is None else dense(gradient)
    layer.groups = 1


def _scales(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, _BatchNorm) and m.affine]


def _noise(shape: tuple[int, ...], context: Context) -> Tensor:
    return torch.rand(shape, generator=context.generator, device=context.generator.device)
