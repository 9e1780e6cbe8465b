"""Several trainings in turns, in one process: each ends as it would alone."""

import pytest
import torch
from conftest import BatchNormNet, randomise, toy_batches
from test_train import dropping, gated, same
from torch import nn

from prunestudy import methods
from prunestudy.errors import InputError
from prunestudy.methods import Method
from prunestudy.train import (
    Recipe,
    capture,
    deterministic,
    gang,
    loop,
    prune,
    pruning,
    read_checkpoint,
)
from prunestudy.train.capture import cuda_graph


def three(folder=None, device="cpu"):
    """Functions that begin three trainings: gates that are drawn, GDP, dropout; and a fourth."""
    makers = [
        (lambda: randomise(BatchNormNet()), gated, "fp32"),
        (lambda: randomise(BatchNormNet()), lambda: methods.build("gdp", {}, 0.4), "tf32"),
        (dropping, Method, "fp32"),
        (dropping, lambda: methods.build("random", {}, 0.5), "fp32"),
    ]
    for number, (net, method, precision) in enumerate(makers):
        recipe = Recipe(epochs=2 + number % 2, lr=0.01, period=1)
        validation = toy_batches(seed=9, device=device)
        options = {"validation": validation, "seed": number, "precision": precision}
        options["device"] = device
        if folder:
            options |= {"checkpoint": folder / f"{number}", "checkpoint_seconds": 1e9, "run": "r"}
        yield lambda way, a=(net, method, recipe), o=options: way(
            a[0](), a[1](), toy_batches(shift=1, device=device), a[2], **o
        )


def ended(size):
    """The four results in order, from a gang."""
    found = list(gang((begin(pruning) for begin in three()), size))
    return sorted(found, key=lambda made: (made.method.name, made.method.target or 0))


@pytest.mark.parametrize("size", [2, 4])
def test_each_training_of_a_gang_ends_as_it_would_alone(size):
    alone = sorted((begin(prune) for begin in three()), key=lambda made: made.method.name)
    torch.manual_seed(7)
    for one, other in zip(alone, ended(size), strict=True):
        same(one, other)


def test_what_the_process_has_is_as_before_a_gang():
    begun = [begin(pruning) for begin in three()]
    torch.manual_seed(5)
    before, tf32 = torch.get_rng_state(), torch.backends.cudnn.allow_tf32
    going = gang(begun, 4)
    next(going)  # the others are under way
    assert torch.equal(before, torch.get_rng_state())
    assert torch.backends.cudnn.allow_tf32 == tf32
    going.close()
    assert torch.equal(before, torch.get_rng_state())


def test_denormal_numbers_count_as_0_in_a_training_only():
    seen, tiny = [], torch.tensor(1e-39)

    def loss(output, y):
        seen.append((tiny * 1).item())
        return nn.functional.cross_entropy(output, y)

    batches = [(torch.randn(4, 3), torch.arange(4) % 2)]
    prune(nn.Linear(3, 2), methods.build("dense", {}), batches, Recipe(epochs=2, lr=0.1), loss=loss)
    assert set(seen) == {0.0}
    assert (tiny * 1).item() > 0


def test_settings_of_one_training_are_not_those_of_another():
    seen = []

    def training(threads):
        with deterministic(threads):
            for _ in range(threads):
                yield
                seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
        yield
        seen.append(torch.are_deterministic_algorithms_enabled())
        return threads

    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    assert list(gang(map(training, (1, 2)), 2)) == [1, 2]
    assert seen == [(1, True), (2, True), False, (2, True), False]
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_a_gang_that_is_closed_goes_on_where_it_was(tmp_path):
    begun = list(three(tmp_path))

    def counted(training):
        for _ in range(3):
            yield next(training)
        training.close()

    for stop in (3, 6):  # of 8 and 12 steps
        assert list(gang([counted(begin(pruning)) for begin in begun], 4)) == [None] * 4
        assert read_checkpoint(tmp_path / "0", "r")["state"]["step"] == stop
    alone = [begin(prune) for begin in three()]
    for one, other in zip(alone, [begin(prune) for begin in three(tmp_path)], strict=True):
        same(one, other)


def test_a_turn_ends_before_it_would_wait_for_the_device(monkeypatch):
    """With graphs the host looks at a due step in the training's next turn, not in this one."""
    said = []

    class Told(Method):
        def __init__(self, of):
            super().__init__()
            self.of_run = of

        def after_step(self, at):
            said.append((self.of_run, at.total_step))

        def update(self, at):
            said.append((self.of_run, f"look {at.total_step}"))

    def trainings():
        for run in "ab":
            recipe = Recipe(epochs=1, lr=0.01, period=2)
            yield pruning(randomise(BatchNormNet()), Told(run), toy_batches(), recipe)

    monkeypatch.setattr(capture, "WARM", 10**9)
    monkeypatch.setattr(loop, "graphs_on", lambda device: cuda_graph)
    list(gang(trainings(), 2))
    turns = [1], [2], ["look 2", 3], [4, "look 4"]
    assert said == [(run, what) for turn in turns for run in "ab" for what in turn]


def test_what_must_wait_begins_later_and_an_error_ends_the_others(tmp_path):
    said = []

    def training(name, steps, fails=False):
        try:
            for _ in range(steps):
                said.append(name)
                yield
            if fails:
                raise InputError(f"run = {name}")
        finally:
            said.append(f"end {name}")
        return name

    def later():
        yield training("a", 2)
        while "end a" not in said:
            yield None
        yield training("b", 1)

    assert list(gang(later(), 2)) == ["a", "b"]
    assert said == ["a", "a", "end a", "b", "end b"]
    said.clear()
    with pytest.raises(InputError, match="run = c"):
        list(gang([training("c", 1, fails=True), training("d", 9)], 2))
    assert said == ["c", "d", "end c", "end d"]
