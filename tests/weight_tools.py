"""What the tests of weight-level methods share: tiny layers, attached methods, small trainings."""

import torch
from conftest import BatchNormNet, randomise, toy_batches
from torch import nn
from torch.nn import functional as F

from prunestudy import measure, methods
from prunestudy.methods import At, Context
from prunestudy.methods.base import scalar
from prunestudy.train import Recipe, prune

MASKED = ("sparse_gates", "magnitude", "gradual_magnitude", "l1", "snip")
MASKED += ("magnitude_attention", "dpf")


def layer(*rows):
    """A linear layer without bias with these rows of weights, in float64."""
    weight = torch.tensor(rows, dtype=torch.float64)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    made.weight.data.copy_(weight)
    return made


def attached(name, model, target=0.5, seed=0, batch_list=(), **params):
    """A method on `model`, which may look at the batches of `batch_list`."""
    method, generator = methods.build(name, params, target), torch.Generator().manual_seed(seed)
    first = next(m for m in model.modules() if hasattr(m, "weight"))
    side = 16 if getattr(first, "kernel_size", 0) == (5, 5) else 8
    width = getattr(first, "in_features", 64)
    shape = (1, side, side) if width == 64 else (width,)
    context = Context((torch.zeros(2, *shape),), lambda out, x, y: F.cross_entropy(out, y))
    context.train, context.generator = lambda epoch=0: iter(batch_list), generator
    method.attach(model, context)
    return method


def at(step=1, steps=100, phase="gates", lr=0.1, loss=0.0):
    """Where the only phase of a training is, after `step`."""
    share, rate, value = scalar((step - 1) / steps, "cpu"), scalar(lr, "cpu"), torch.tensor(loss)
    return At(phase, step, steps, step, steps, share, rate, value)


def original(model):
    return model.parametrizations.weight.original


def masks_of(method):
    return torch.cat([each.mask.flatten() for each in method.masks]).clone()


def spied(method, look):
    """`method`, with `look(method, at)` after each of its updates."""
    update = method.update

    def watched(now):
        update(now)
        look(method, now)

    method.update = watched
    return method


def fit(method, net=None, batches=None, recipe=None, **options):
    """A training on noise, of 48 steps with momentum, decay and Nesterov unless told otherwise."""
    recipe = recipe or Recipe(epochs=12, lr=0.02, nesterov=True, weight_decay=0.02, period=1)
    options = {"probe": methods.probe_of(method.name), "validation": toy_batches(seed=9)} | options
    net = net or randomise(BatchNormNet())
    return prune(net, method, batches or toy_batches(shift=1), recipe, **options)


def weights_of(net):
    """The weights of a plain net's convolutions and linear layers."""
    return [weight for _, weight in measure.prunable_weights(net)]


def kept_of(net):
    """How many of these weights are not zero, and how many there are."""
    weights = weights_of(net)
    return sum(int(w.count_nonzero()) for w in weights), sum(w.numel() for w in weights)


def same(one, two):
    """Two results are equal to the bit: history, net, what was observed."""
    assert one.history == two.history
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name
    assert repr(one.probe.measures()) == repr(two.probe.measures())
    arrays = two.probe.arrays()
    for name, array in one.probe.arrays().items():
        assert array.tobytes() == arrays[name].tobytes(), name
