"""Captured steps give what plain ones do: a tape of torch's calls stands in for CUDA's graphs."""

import pytest
import torch
from conftest import randomise, toy_batches
from dispatch import Tape
from test_face import loader
from test_hooks import VARIANTS, made, pruned
from test_train import dropping, fit, same
from torch import nn

from prunestudy import methods
from prunestudy.methods import Method
from prunestudy.train import Recipe, capture, loop


@pytest.fixture
def tapes(monkeypatch):
    """The tapes made so far; `tapes.plain()` makes no more, but keeps all else as it is."""

    class Tapes(list):
        def plain(self):
            monkeypatch.setattr(capture, "WARM", 10**9)

    found = Tapes()

    def recorded(function, generator):
        found.append(Tape(function))
        return found[-1].replay, found[-1].result

    monkeypatch.setattr(loop, "graphs_on", lambda device: recorded)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_steps_of_every_method_are_plain_ones(variant, tapes, capsys):
    ours = pruned(made(variant), epochs=5, period=3)
    replayed = len(tapes)
    assert 1 <= replayed <= 5
    assert capsys.readouterr().err == ""
    tapes.plain()
    same(ours, pruned(made(variant), epochs=5, period=3))
    assert len(tapes) == replayed


@pytest.mark.parametrize(
    "options",
    [
        {"net": dropping},
        {"recipe": Recipe(epochs=4, lr=0.01, optimizer="adam", warmup_steps=3)},
        {"recipe": Recipe(epochs=4, lr=0.01, nesterov=True, weight_decay=1e-3, pieces=2)},
        {"precision": "bf16"},
        {"batches": lambda: toy_batches(shift=1, flip=True)},  # gathered within the graph
        {"batches": lambda: loader(count=70, shape=(1, 8, 8))},  # the last has 6
    ],
)
def test_captured_steps_are_plain_ones(options, tapes, capsys):
    def once():
        return fit(**{k: v() if callable(v) else v for k, v in options.items()})

    ours = once()
    assert len(tapes) == 1
    assert capsys.readouterr().err == ""
    tapes.plain()
    same(ours, once())


def test_they_are_nearly_those_of_the_cpu(tapes, monkeypatch):
    """Fused optimisers round differently."""
    ours = fit()
    monkeypatch.undo()
    for name, value in fit().model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_stopped_training_with_captured_steps_goes_on(tapes, tmp_path):
    straight = fit(methods.build("gdp", {}, 0.4))
    options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, "run": "r"}
    for stop in (5, 11):
        method = methods.build("gdp", {}, 0.4)

        def update(at, stop=stop, inner=method.update):
            if at.total_step == stop:
                raise KeyboardInterrupt
            inner(at)

        method.update = update
        with pytest.raises(KeyboardInterrupt):
            fit(method, **options)
    same(straight, fit(methods.build("gdp", {}, 0.4), **options))


class Reads(nn.Module):
    """A layer that looks at its input on the host."""

    def forward(self, x):
        return x * 2 if x.sum().item() > 1e9 else x


def test_what_cannot_be_captured_stays_plain_and_is_named(tapes, capsys):
    def net():
        return randomise(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Reads()))

    ours = fit(net=net())
    assert not tapes
    said = capsys.readouterr().err
    assert said == (
        "prunestudy: Sequential: steps are not captured: in or after 2 (Reads),"
        " aten._local_scalar_dense.default: reads a value on the host\n"
    )
    tapes.plain()
    same(ours, fit(net=net()))


def test_a_capture_that_fails_is_a_plain_step(monkeypatch, capsys):
    def broken(function, generator):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(loop, "graphs_on", lambda device: broken)
    ours = fit()
    assert capsys.readouterr().err.endswith("captured: operation not permitted\n")
    monkeypatch.setattr(capture, "WARM", 10**9)
    same(ours, fit())


class Switches(Method):
    """Doubles the gradients once a flag of its state is set, as gates that are decided do."""

    doubled = False

    def attach(self, model, context):
        self.model = [model]

    def after_backward(self, at):
        for p in self.model[0].parameters():
            if self.doubled:
                p.grad.mul_(2)

    def update(self, at):
        self.doubled = at.total_step >= 8

    def get_extra_state(self):
        return self.doubled

    def set_extra_state(self, state):
        self.doubled = state


def test_steps_are_captured_anew_where_a_flag_or_a_phase_changes(tapes):
    ours = fit(Switches())
    assert len(tapes) == 2
    tapes.plain()
    same(ours, fit(Switches()))
