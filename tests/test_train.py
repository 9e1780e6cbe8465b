import hashlib
import math
import platform
from functools import cache
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from conftest import BatchNormNet, one_line, randomise, toy_batches
from torch import nn

from prunestudy import methods
from prunestudy.datasets import Batches, DatasetInfo, ImageSet
from prunestudy.errors import InputError
from prunestudy.methods import Context, Method, Phase
from prunestudy.train import (
    Loop,
    Recipe,
    keep_freed_memory,
    loop,
    memory,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from prunestudy.values import checked

EPOCHS = 4  # of 4 steps


def dense():
    return methods.build("dense", {})


def fit(method=None, recipe=None, batches=None, net=None, seed=3, **options):
    """A small training on noise, always the same; the host looks at each step."""
    batches = batches or toy_batches()
    net = net or randomise(BatchNormNet())
    recipe = recipe or Recipe(epochs=EPOCHS, lr=0.01, weight_decay=1e-3, period=1)
    options = {"validation": toy_batches(seed=9), "seed": seed} | options
    return prune(net, method or dense(), batches, recipe, **options)


class Recorder(Method):
    """Writes down what the loop asks of it."""

    parts: ClassVar[tuple] = (Phase("train"),)

    def __init__(self, parts=None):
        super().__init__()
        self.said, self.own = [], parts or self.parts

    def phases(self):
        return self.own

    def attach(self, model, context):
        self.model = [model]  # in a list: not a part of the method's state
        self.said.append(("attach",))

    def after_step(self, at):
        self.said.append(at)

    def update(self, at):
        self.said.append(("update", at.phase, at.step))

    def finish(self, model, context):
        self.said.append(("finish",))
        return super().finish(model, context)

    @property
    def steps(self):
        return [at for at in self.said if not isinstance(at, tuple)]

    @property
    def rates(self):
        return [at.lr.item() for at in self.steps]


# --- the recipe


@pytest.mark.parametrize(
    ("values", "steps", "expected"),
    [
        ({"schedule": "constant"}, 4, [0.4] * 4),
        ({"schedule": "cosine"}, 4, [0.4, 0.2 + 0.1 * math.sqrt(2), 0.2, 0.2 - 0.1 * math.sqrt(2)]),
        ({"schedule": "step"}, 8, [0.4] * 4 + [0.04] * 2 + [0.004] * 2),
        ({"schedule": "step", "milestones": (0.25,), "gamma": 0.5}, 4, [0.4] + [0.2] * 3),
        ({"schedule": "poly"}, 4, [0.4, 0.3, 0.2, 0.1]),
        ({"schedule": "poly", "power": 2.0}, 4, [0.4, 0.225, 0.1, 0.025]),
        ({"schedule": "poly", "warmup_steps": 2}, 4, [0.2, 0.4, 0.2, 0.1]),
        ({"schedule": "constant", "warmup_steps": 4}, 6, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]),
        ({"schedule": "constant", "warmup_steps": 2, "warmup_from": 0.5}, 3, [0.3, 0.4, 0.4]),
    ],
)
def test_schedules(values, steps, expected):
    recipe = Recipe(epochs=1, lr=0.4, **values)
    assert [recipe.lr_at(s, steps) for s in range(steps)] == pytest.approx(expected, abs=1e-15)


def test_a_phase_may_have_a_schedule_of_its_own():
    recipe = Recipe(epochs=1, lr=0.4, schedule="cosine")
    assert recipe.lr_at(2, 4, "constant") == 0.4
    assert recipe.lr_at(3, 4, "poly") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", -1),
        ("epochs", 1.0),
        ("epochs", "3"),
        ("epochs", True),
        ("lr", 0.0),
        ("lr", -0.1),
        ("lr", math.inf),
        ("lr", "fast"),
        ("batch_size", 0),
        ("pieces", 0),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("nesterov", 1),
        ("weight_decay", -1e-4),
        ("schedule", "linear"),
        ("warmup_steps", -1),
        ("warmup_from", -0.1),
        ("warmup_from", 1.1),
        ("steps", -1),
        ("gamma", 0.0),
        ("gamma", 1.1),
        ("power", 0.0),
        ("shift", -1),
        ("flip", "yes"),
        ("learning_rate", 0.1),
    ],
)
def test_bad_recipes_are_refused_in_one_line(key, value):
    with pytest.raises(InputError) as caught:
        checked(Recipe, {"epochs": 1, "lr": 0.1} | {key: value})
    assert one_line(caught).startswith(f"{key} = {value!r}: ")


@pytest.mark.parametrize("milestones", [(0.0,), (0.5, 1.0), (-0.5,)])
def test_bad_milestones_are_refused_in_one_line(milestones):
    with pytest.raises(InputError) as caught:
        checked(Recipe, {"epochs": 1, "lr": 0.1, "milestones": milestones})
    assert one_line(caught).startswith("milestones.")


# --- one step


def one_pixel():
    """One image of one pixel, of value 255 or, normalised, 2; class 1 of 2."""
    info = DatasetInfo("one", "One", "1", 1, 1, 1, 2, 1, 1, (0.0,), (0.5,))
    image = ImageSet(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), torch.tensor([1]))
    return Batches(image, info, 1)


def test_steps_of_sgd_by_hand():
    """Weight decay, momentum and the schedule as in torch.optim.SGD's own formula."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    net[1].weight.data.copy_(torch.tensor([[0.5], [-0.25]]))
    recipe = Recipe(epochs=3, lr=0.1, momentum=0.9, weight_decay=0.01, schedule="poly")
    batches = one_pixel()
    made = prune(net, dense(), batches, recipe, validation=batches)
    w, velocity, losses, right = [0.5, -0.25], [0.0, 0.0], [], []
    for lr in (0.1, 0.1 * 2 / 3, 0.1 / 3):
        p = 1 / (1 + math.exp(2 * (w[0] - w[1])))  # softmax of class 1 on the logits 2 w
        losses.append(-math.log(p))
        gradient = [2 * (1 - p) + 0.01 * w[0], -2 * (1 - p) + 0.01 * w[1]]
        velocity = [0.9 * v + g for v, g in zip(velocity, gradient, strict=True)]
        w = [each - lr * v for each, v in zip(w, velocity, strict=True)]
        right.append(float(w[1] > w[0]))
    assert made.model[1].weight.flatten().tolist() == pytest.approx(w, abs=1e-6)
    assert [row["train_loss"] for row in made.history] == pytest.approx(losses, abs=1e-6)
    assert [row["validation_loss"] for row in made.history][:2] == pytest.approx(losses[1:])
    assert [row["epoch"] for row in made.history] == [1, 2, 3]
    assert made.status == "done"
    assert [row["validation_top1"] for row in made.history] == right
    assert right == [0, 0, 1]


def test_steps_of_adam_by_hand():
    """Adam's own formula; momentum is its first decay rate."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    net[1].weight.data.copy_(torch.tensor([[0.5], [-0.25]]))
    recipe = Recipe(epochs=2, lr=0.1, momentum=0.8, optimizer="adam", schedule="constant")
    batches = one_pixel()
    made = prune(net, dense(), batches, recipe, validation=batches)
    w, m, v = [0.5, -0.25], [0.0, 0.0], [0.0, 0.0]
    for step in (1, 2):
        p = 1 / (1 + math.exp(2 * (w[0] - w[1])))
        gradient = [2 * (1 - p), -2 * (1 - p)]
        for i, g in enumerate(gradient):
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.999 * v[i] + 0.001 * g**2
            ahead, size = m[i] / (1 - 0.8**step), v[i] / (1 - 0.999**step)
            w[i] -= 0.1 * ahead / (math.sqrt(size) + 1e-8)
    assert made.model[1].weight.flatten().tolist() == pytest.approx(w, abs=1e-6)


def test_no_epoch_leaves_the_net_and_one_row_of_validation():
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    before = net[1].weight.detach().clone()
    made = prune(net, dense(), one_pixel(), Recipe(epochs=0, lr=0.1), validation=one_pixel())
    assert torch.equal(made.model[1].weight, before)
    assert (made.status, [row["epoch"] for row in made.history]) == ("done", [0])


@pytest.mark.parametrize("pieces", [2, 5, 16])
def test_a_batch_in_pieces_is_the_same_step(pieces):
    made = []
    for number in (1, pieces):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        recipe = Recipe(epochs=2, lr=0.1, pieces=number)
        made.append(fit(recipe=recipe, net=net))
    for whole, part in zip(*(one.model.parameters() for one in made), strict=True):
        assert torch.allclose(whole, part, atol=1e-6)
    whole, part = ([row["train_loss"] for row in one.history] for one in made)
    assert part == pytest.approx(whole, rel=1e-5)


def test_a_piece_with_a_loss_that_is_not_finite_ends_the_run():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net[1].weight.data[0, 0] = math.nan
    assert fit(net=net, recipe=Recipe(epochs=1, lr=0.1, pieces=4)).status == "diverged"


# --- phases


@pytest.mark.parametrize("period", [1, 2, 4])
def test_order_of_the_hooks_and_where_they_are(period):
    method = Recorder((Phase("a", 0.375), Phase("b", 0.625, restart=True)))
    fit(method, Recipe(epochs=2, lr=0.01, period=period))
    updates = {("a", n) for n in range(period, 4, period)} | {("a", 3)}
    updates |= {("b", n) for n in range(period, 6, period)} | {("b", 5)}
    expected = [("attach",)]
    for phase, steps in (("a", 3), ("b", 5)):
        for step in range(1, steps + 1):
            expected.append((phase, step))
            if (phase, step) in updates:
                expected.append(("update", phase, step))
    said = [w if isinstance(w, tuple) else (w.phase, w.step) for w in method.said]
    assert said == [*expected, ("finish",)]
    assert [(at.total_step, at.total_steps) for at in method.steps] == [(n, 8) for n in range(1, 9)]
    shares = [*(n / 3 for n in range(3)), *(n / 5 for n in range(5))]
    assert [at.share.item() for at in method.steps] == shares
    assert [at.first for at in method.steps] == [True, False, False, True, *[False] * 4]
    assert [at.last for at in method.steps] == [*[False] * 2, True, *[False] * 4, True]


@pytest.mark.parametrize(("epochs", "period"), [(1, 1), (99, 1), (100, 2), (2000, 16)])
def test_the_host_looks_every_sixteen_steps_and_in_short_runs_more_often(epochs, period):
    context = Context(tuple(torch.zeros(1, 2, 1, 8, 8)), scored, score=None)
    net, recipe = randomise(BatchNormNet()), Recipe(epochs=epochs, lr=0.1)
    Loop(net, dense(), recipe, toy_batches(), context, dict)
    assert context.period == period


def scored(output, x, y):
    return torch.nn.functional.cross_entropy(output, y)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((Phase("a"),), [8, 7, 6, 5, 4, 3, 2, 1]),
        # one schedule over both, a scale in the second
        ((Phase("a", 0.5), Phase("b", 0.5, lr_scale=0.5)), [8, 7, 6, 5, 2, 1.5, 1, 0.5]),
        # each phase anew
        ((Phase("a", 0.5), Phase("b", 0.5, restart=True)), [8, 6, 4, 2] * 2),
        # a constant phase, then one that begins anew
        (
            (Phase("a", 0.25, 0.5, schedule="constant"), Phase("b", 0.75, restart=True)),
            [4, 4, *(8 * (1 - s / 6) for s in range(6))],
        ),
        # b runs on from a, c restarts
        (
            (Phase("a", 0.25), Phase("b", 0.25), Phase("c", 0.5, restart=True)),
            [8, 6, 4, 2, 8, 6, 4, 2],
        ),
    ],
)
def test_learning_rates_of_phases(parts, expected):
    method = Recorder(parts)
    fit(method, Recipe(epochs=2, lr=0.008, schedule="poly"))
    assert [1000 * lr for lr in method.rates] == pytest.approx(expected)


def test_a_phase_begins_without_the_momentum_of_the_one_before():
    class Two(Recorder):
        def after_backward(self, at):
            seen.append(self.model[0][1].weight.grad.clone())

        def after_step(self, at):
            weights.append(self.model[0][1].weight.detach().clone())

    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    net[1].weight.data.zero_()
    seen, weights = [], [net[1].weight.detach().clone()]
    recipe = Recipe(epochs=4, lr=0.1, schedule="constant")
    prune(net, Two((Phase("a", 0.5), Phase("b", 0.5))), one_pixel(), recipe)
    steps = [(a - b) / 0.1 for a, b in pairwise(weights)]
    torch.testing.assert_close(steps[1], 0.9 * seen[0] + seen[1])
    torch.testing.assert_close(steps[2], seen[2])


# --- the same again


def same(a, b):
    assert a.status == b.status
    assert a.history == b.history
    one, two = a.model.state_dict(), b.model.state_dict()
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def differ(a, b):
    return a.history != b.history


class KilledError(Exception):
    pass


class Fragile:
    """Batches that break off in the middle of an epoch, before the step of that number."""

    def __init__(self, step, **values):
        self.inner, self.left = toy_batches(**values), step

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def epoch(self, epoch, start=0):
        for batch in self.inner.epoch(epoch, start):
            if self.left == 0:
                raise KilledError
            self.left -= 1
            yield batch


ALL = {
    "dense": {},
    "magnitude": {},
    "random": {},
    "gradual_magnitude": {"harden": 0.6, "period": 3},
    "l1": {"harden": 0.6},
    "magnitude_attention": {"period": 3, "ramp": 0.6},
    "dpf": {"period": 3},
    "sparse_gates": {"harden": 0.6, "draw": "bernoulli_then_deterministic"},
    "sparse_gates sgd": {"harden": 0.6, "gate_optimizer": "sgd", "gate_lr": 1.0},
}
VARIANTS = {"dense": {}}


def made_of(variant):
    name = variant.split()[0]
    target = 0.8 if methods.method_class(name).counts else None
    return methods.build(name, VARIANTS[variant], target)


MOVED = {"shift": 1, "flip": True}


@cache
def undisturbed(variant, moved=False):
    return fit(made_of(variant), batches=toy_batches(**MOVED if moved else {}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seed_is_the_same_run_and_another_is_not(variant):
    batches, first = MOVED, undisturbed(variant, moved=True)
    same(first, fit(made_of(variant), batches=toy_batches(**batches)))
    assert differ(first, fit(made_of(variant), batches=toy_batches(seed=1, **batches)))
    if variant in ("random", "sparse_gates"):
        assert differ(first, fit(made_of(variant), batches=toy_batches(**batches), seed=4))


@pytest.mark.parametrize("step", [1, 4, 10, 11, 15])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_ends_like_an_undisturbed_one(variant, step, tmp_path):
    """16 steps; where there are phases the first ends after 10."""
    straight = undisturbed(variant, moved=True)
    path = tmp_path / "checkpoint.pt"
    options = {"checkpoint": path, "checkpoint_seconds": 0.0, "run": "r"}
    looked_at = 1 if variant == "snip" else 0  # batches, before the first step
    with pytest.raises(KilledError):
        fit(made_of(variant), batches=Fragile(step + looked_at, **MOVED), **options)
    assert read_checkpoint(path, "r")["state"]["step"] == step
    # what the new process starts with does not matter: other weights, other random states
    torch.manual_seed(step)
    net = randomise(BatchNormNet(), seed=99)
    resumed = Fragile(10**9, **MOVED)
    same(straight, fit(made_of(variant), batches=resumed, net=net, **options))
    assert resumed.left == 10**9 - (16 - step) - looked_at


def dropping():
    """The same weights each time; the draws of its dropout come from torch's own generator."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
    return randomise(head).train()


@pytest.mark.parametrize("step", [1, 6])
def test_a_net_with_dropout_is_resumed_as_exactly(step, tmp_path):
    straight = fit(net=dropping())
    same(straight, fit(net=dropping()))
    assert differ(straight, fit(net=dropping(), seed=4))
    options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, "run": "r"}
    with pytest.raises(KilledError):
        fit(net=dropping(), batches=Fragile(step), **options)
    torch.manual_seed(step)
    same(straight, fit(net=dropping(), **options))


def test_a_run_interrupted_at_every_step(tmp_path):
    options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, "run": "r"}
    for _ in range(15):
        with pytest.raises(KilledError):
            fit(made_of("sparse_gates"), batches=Fragile(1), **options)
    made = fit(made_of("sparse_gates"), batches=Fragile(1), **options)
    same(made, undisturbed("sparse_gates"))


def test_a_finished_run_is_not_trained_again(tmp_path):
    options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, "run": "r"}
    first = fit(made_of("l1"), **options)
    again = fit(made_of("l1"), batches=Fragile(0), **options)
    same(first, again)
    assert again.seconds == first.seconds


def test_checkpoints_take_two_percent_of_the_time_at_most(tmp_path, monkeypatch):
    """A step of one second, a checkpoint of one: after the first, one in fifty steps."""
    now, saved = [0.0], []

    class Slow(Recorder):
        def after_backward(self, at):
            now[0] += 1.0

    def write(path, run, state):
        saved.append(state["state"]["step"])
        now[0] += 1.0

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "write_checkpoint", write)
    recipe = Recipe(epochs=40, lr=0.01)
    fit(Slow(), recipe, checkpoint=tmp_path / "c", checkpoint_seconds=20.0, run="r")
    assert saved == [20, 70, 120]


@pytest.mark.parametrize(
    ("steps", "made", "epochs"), [(6, 6, 2), (8, 8, 2), (1, 1, 1), (99, 16, 4)]
)
def test_steps_end_a_training_within_an_epoch(steps, made, epochs):
    method = Recorder()
    recipe = Recipe(epochs=EPOCHS, steps=steps, lr=0.1, schedule="step", milestones=(0.5,))
    result = fit(method, recipe)
    assert method.rates == [0.1 if step < made / 2 else 0.1 * 0.1 for step in range(made)]
    assert [row["epoch"] for row in result.history] == list(range(1, epochs + 1))
    assert result.status == "done"


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_run_counted_in_steps_resumes(step, tmp_path):
    recipe = Recipe(epochs=EPOCHS, steps=6, lr=0.01, weight_decay=1e-3, period=1)
    options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, "run": "r"}
    with pytest.raises(KilledError):
        fit(recipe=recipe, batches=Fragile(step), **options)
    same(fit(recipe=recipe), fit(recipe=recipe, **options))


def test_no_checkpoint_stands_between_an_epoch_and_its_row(tmp_path, monkeypatch):
    """Killed there, a run would never write the row."""
    seen = []
    monkeypatch.setattr(
        loop, "write_checkpoint", lambda path, run, state: seen.append(_rows(state))
    )
    fit(checkpoint=tmp_path / "c", checkpoint_seconds=0.0, run="r")
    assert seen == [(step, step // 4) for step in range(1, 17)]


def _rows(state):
    return state["state"]["step"], len(state["state"]["history"])


def test_global_random_states_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(made_of("sparse_gates"), net=randomise_alone())
    assert torch.equal(before, torch.get_rng_state())


def randomise_alone():
    with torch.random.fork_rng(devices=[]):
        return randomise(BatchNormNet())


# --- checkpoints


STATE = {"at": {"step": 3}, "model": {"w": torch.arange(3.0)}, "text": "a"}


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "c"
    assert read_checkpoint(path, "r") is None
    write_checkpoint(path, "r", {"at": {"step": 1}})
    write_checkpoint(path, "r", STATE)
    found = read_checkpoint(path, "r")
    assert torch.equal(found["model"].pop("w"), torch.arange(3.0))
    assert found == {"at": {"step": 3}, "model": {}, "text": "a"}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def other_version(data):
    return data.replace(b"checkpoint 1\n", b"checkpoint 0\n", 1)


@pytest.mark.parametrize(
    ("damage", "run", "why"),
    [
        (flipped, "r", "corrupt (checksum)"),
        (lambda data: data[:-1], "r", "corrupt (checksum)"),
        (lambda data: data[: len(data) // 3], "r", "corrupt (checksum)"),
        (lambda data: data[:30], "r", "corrupt (checksum)"),
        (lambda data: data + b"\0", "r", "corrupt (checksum)"),
        (lambda data: data[:5], "r", "not of this version"),
        (lambda data: b"", "r", "not of this version"),
        (other_version, "r", "not of this version"),
        (lambda data: data, "s", "of another run"),
    ],
)
def test_bad_checkpoints_are_refused_in_one_line(damage, run, why, tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, "r", STATE)
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        fit(checkpoint=path, run=run, batches=Fragile(0))
    way_out = "delete it to start this run again"
    assert one_line(caught) == f"checkpoint = 'checkpoint.pt' of {run}: {why}; {way_out}"
    assert path.read_bytes() == before


def test_a_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    import io

    buffer = io.BytesIO()
    torch.save({"run": "r", "x": Evil()}, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest().encode()
    (tmp_path / "c").write_bytes(b"prunestudy checkpoint 1\n" + digest + b"\n" + payload)
    with pytest.raises(Exception, match="Weights only load failed"):
        read_checkpoint(tmp_path / "c", "r")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "c"
    write_checkpoint(path, "r", STATE)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            write_checkpoint(path, "r", {"at": {}})
    assert path.read_bytes() == before


# --- what may go wrong, and precision


def test_a_loss_that_is_not_finite_ends_the_run():
    made = fit(recipe=Recipe(epochs=3, lr=1e18))
    assert (made.status, made.history) == ("diverged", [])


@pytest.mark.parametrize(("period", "updates"), [(1, 5), (2, 2), (4, 1)])
def test_a_loss_that_is_not_finite_is_seen_at_the_next_look(period, updates):
    def spoilt(output, x, y):
        loss = torch.nn.functional.cross_entropy(output, y)
        calls.append(output.requires_grad)
        return loss * (math.nan if sum(calls) == 6 else 1.0)

    calls, method = [], Recorder()
    made = fit(method, Recipe(epochs=4, lr=0.01, period=period), loss=spoilt)
    assert made.status == "diverged"
    assert sum(w[0] == "update" for w in method.said if isinstance(w, tuple)) == updates
    assert len(made.history) == 1


def test_a_net_that_breaks_in_the_last_step_is_diverged():
    batches = toy_batches(batch_size=64)
    made = fit(recipe=Recipe(epochs=1, lr=1e18, weight_decay=1e18), batches=batches)
    assert not math.isfinite(made.history[-1]["validation_loss"])
    assert made.status == "diverged"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_diverged_run_still_gives_a_plain_net(variant):
    made = fit(made_of(variant), recipe=Recipe(epochs=3, lr=1e18))
    assert made.status == "diverged"
    assert made.model.state_dict().keys() == BatchNormNet().state_dict().keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16(variant):
    here = undisturbed(variant)
    there = fit(made_of(variant), precision="bf16")
    assert there.status == "done"
    assert differ(here, there)
    assert all(v.dtype != torch.bfloat16 for v in there.model.state_dict().values())
    assert there.history[-1]["kept"] == pytest.approx(here.history[-1]["kept"])
    assert there.history[0]["train_loss"] == pytest.approx(here.history[0]["train_loss"], rel=0.1)


def test_the_seconds_of_a_resumed_run_add_up(tmp_path, monkeypatch):
    """A clock that ticks once a reading: what counts is what the loop adds, not how long it is."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(ticks))
    options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, "run": "r"}
    with pytest.raises(KilledError):
        fit(batches=Fragile(6), **options)
    saved = read_checkpoint(tmp_path / "c", "r")["state"]["seconds"]
    assert saved >= 6
    made = fit(**options)
    assert made.seconds >= saved + 10


def test_time_between_two_steps_counts_for_nothing(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    class Slow(Recorder):
        def after_backward(self, at):
            now[0] += 1.0

    alone = looped(Slow(), 3, Recipe(epochs=2, lr=0.01))
    for _ in alone.steps():
        now[0] += 100.0
    assert alone.state.seconds == 2 * 4


def looped(method, seed, recipe):
    """A loop to be advanced by hand, as `fit` runs one."""
    train = toy_batches()
    example = torch.cat([x for x, _ in train.ordered(2)][:1])
    generator = torch.Generator().manual_seed(seed)
    context = Context((example,), scored, generator=generator, weight_decay=recipe.weight_decay)
    net = randomise(BatchNormNet()).to(memory_format=torch.channels_last)
    return Loop(net, method, recipe, train, context, score, seed=seed)


def score(net):
    """As `prune` scores by default."""
    right = total = loss = 0
    net.eval()
    with torch.no_grad():
        for x, y in toy_batches(seed=9).ordered(512):
            output = net(x)
            right += int((output.argmax(1) == y).sum())
            loss += scored(output, x, y).item() * len(x)
            total += len(x)
    net.train()
    return {"top1": right / total, "loss": loss / total}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_trainings_in_turns_are_each_as_if_alone(variant):
    recipe = Recipe(epochs=EPOCHS, lr=0.01, weight_decay=1e-3, period=1)
    loops = [looped(made_of(variant), seed, recipe) for seed in (3, 4)]
    rows = list(zip(*(each.steps() for each in loops), strict=True))
    assert [row is not None for row, _ in rows] == [False, False, False, True] * EPOCHS
    for each, seed in zip(loops, (3, 4), strict=True):
        alone = fit(made_of(variant), seed=seed)
        assert each.state.history == alone.history
        state = each.finish().state_dict()
        for name, value in alone.model.state_dict().items():
            assert torch.equal(value, state[name])


# --- memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_a_training_keeps_the_memory_of_a_step_for_the_next():
    import resource

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    fit()
    pages = []
    for _ in range(3):
        before = faults()
        torch.empty(2**24).fill_(1.0)
        pages.append(faults() - before)
    assert pages[-1] < 2**26 // resource.getpagesize() / 100


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_other_c_libraries_are_left_alone(monkeypatch, error):
    def none(name):
        raise error(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", none)
    assert keep_freed_memory() is False
