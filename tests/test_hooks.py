"""What holds for every method: hooks of tensors only, exact resume, targets without a step."""

import pytest
import torch
from dispatch import TensorsOnly
from test_face import MyNet, loader
from torch import nn
from torch.nn.utils import parametrize

import prunestudy as ps
from prunestudy import measure, methods
from prunestudy.methods import scaled

SETTINGS = {
    "l1": {"harden": 0.5},
    "dpf bounded": {"period": 2, "bounded": True},
    "magnitude_attention bounded": {"period": 2, "ramp": 0.5, "bounded": True, "normalise": True},
    "dpf": {"period": 2},
    "magnitude_attention": {"period": 2, "ramp": 0.5},
    "magnitude_attention max": {"period": 2, "ramp": 0.5, "norm": "layer_max"},
    "gradual_magnitude": {"period": 2, "harden": 0.6},
    "sparse_gates sgd": {"gate_optimizer": "sgd", "gate_lr": 1.0},
    "force": {"kind": "l1", "fine_tune": 0.5, "rounds": 1},
    "force agree": {"adaptive": True, "agree": True, "stop": 0.5},
    "plain_low_rank": {"fine_tune": 0.5, "recalibrate": 3},
    "component_aware": {"steps": 4, "check": 2, "refuse": False},
    "uniform": {"refuse": False},
}
VARIANTS = [*methods.names(), *(name for name in SETTINGS if " " in name)]
KINDS = {"force": "energy", "random": "macs"}


def made(variant, target=0.4):
    name = variant.split()[0]
    counts = methods.method_class(name).counts
    of = KINDS.get(name, counts[0] if counts else None)
    return methods.build(name, SETTINGS.get(variant, {}), target if counts else None, of)


def net(seed=0):
    torch.manual_seed(seed)
    return MyNet()


def pruned(method, model=None, epochs=2, **options):
    recipe = ps.Recipe(epochs=epochs, lr=0.02, weight_decay=1e-3, period=options.pop("period", 1))
    options = {"validation": loader(seed=1)} | options
    probe = methods.probe_of(method.name)
    return ps.prune(model or net(), method, loader(), recipe, probe=probe, **options)


def guarded(hook):
    def hooked(at):
        with TensorsOnly():
            return hook(at)

    return hooked


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_of_a_step_use_tensors_only(variant):
    method = made(variant)
    method.after_backward = guarded(method.after_backward)
    method.after_step = guarded(method.after_step)
    assert pruned(method, period=3).status == "done"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.to("meta"),
    ],
)
def test_the_mode_refuses_what_a_graph_cannot_capture(wrong):
    x = torch.randn(3)
    with pytest.raises(AssertionError), TensorsOnly():
        wrong(x)
    with TensorsOnly():
        x.mul_(2).clamp(0, 1).index_select(0, torch.tensor([1]))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("step", [3, 7, 11])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_training_ends_as_an_undisturbed_one(variant, step, tmp_path):
    """12 steps; what a method knows of them is its state_dict, the model's and the probe's."""
    straight = pruned(made(variant), period=2)
    options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, "run": "r", "period": 2}
    method, made_steps = made(variant), iter(range(1, 100))

    def stopping(at, hook=method.after_step):
        if next(made_steps) == step:
            raise StoppedError
        return hook(at)

    method.after_step = stopping
    with pytest.raises(StoppedError):
        pruned(method, **options)
    torch.manual_seed(step)
    again = pruned(made(variant), **options)
    assert again.history == straight.history
    state = again.model.state_dict()
    assert list(state) == list(straight.model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in straight.model.state_dict().items())
    assert again.method.report().keys() == straight.method.report().keys()
    for name, array in straight.probe.arrays().items():
        assert array.tobytes() == again.probe.arrays()[name].tobytes(), name


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("dense", "scratch")])
def test_without_a_step_the_target_is_reached(variant):
    small = pruned(made(variant), epochs=0).model
    x = torch.zeros(1, 1, 8, 8)
    kind = made(variant).of
    if kind == "sparsity":
        weights = [w for _, w in measure.prunable_weights(small)]
        total, kept = sum(w.numel() for w in weights), sum(int(w.count_nonzero()) for w in weights)
        scope = getattr(made(variant), "scope", "all")
        if scope == "all":
            assert kept == round(0.6 * total)
        assert kept < total
    elif kind == "macs":
        assert measure.macs(small, x) <= 0.6 * measure.macs(net(), x)
    elif kind == "parameters":
        assert measure.parameters(small) <= 0.61 * measure.parameters(net())
    else:
        assert any(isinstance(m, nn.Sequential) for m in small.modules())


@pytest.mark.parametrize("variant", ["gdp", "hard_concrete"])
def test_gates_that_layers_share_train_as_gates_of_each(variant, monkeypatch, tmp_path):
    """As on CUDA, through a stop, frozen gates and a look at a weight between two steps."""
    alone, forgotten = pruned(made(variant), epochs=5, period=3), []

    def forget(once, _):
        forgotten.append(once)
        once.found = None

    monkeypatch.setattr(scaled, "_SHARED_ON", ("cpu",))
    monkeypatch.setattr(scaled._Once, "_forget", forget)

    def shared(stop):
        method, inside = made(variant), []

        def attach(model, context):
            type(method).attach(method, model, context)
            inside.extend(m for m in model.modules() if parametrize.is_parametrized(m))

        def update(at):
            if at.total_step >= stop:
                raise StoppedError
            type(method).update(method, at)
            assert all(layer.weight.isfinite().all() for layer in inside)

        method.attach, method.update = attach, update
        options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, "run": "r"}
        return pruned(method, epochs=5, period=3, **options)

    with pytest.raises(StoppedError):
        shared(18)
    for one, other in zip(alone.history, shared(10**9).history, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert other["kept"] == pytest.approx(one["kept"])
    assert forgotten
