import math
import platform
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import BatchNormNet, one_line, randomise, toy_batches
from torch import nn
from torch.utils.data import DataLoader

from prunestudy import methods
from prunestudy.datasets import Batches, DatasetInfo, ImageSet
from prunestudy.errors import InputError
from prunestudy.methods import Context, Method, Phase
from prunestudy.train import Loop, Recipe, loop, process, prune, read_checkpoint, write_checkpoint
from prunestudy.values import checked

EPOCHS = 4  # of 4 steps
MOVED = {"shift": 1, "flip": True}


def fit(method=None, recipe=None, batches=None, net=None, seed=3, **options):
    """A small training on noise, always the same; the host looks at each step."""
    batches = batches or toy_batches()
    net = net or randomise(BatchNormNet())
    recipe = recipe or Recipe(epochs=EPOCHS, lr=0.01, weight_decay=1e-3, period=1)
    options = {"validation": toy_batches(seed=9), "seed": seed} | options
    return prune(net, method or Method(), batches, recipe, **options)


class Recorder(Method):
    """Writes down what the loop asks of it."""

    def __init__(self, parts=None):
        super().__init__()
        self.said, self.steps, self.own = [], [], parts or [Phase("train")]

    def phases(self):
        return self.own

    def attach(self, model, context):
        self.model = [model]  # in a list: not a part of the method's state
        self.said.append(("attach",))

    def after_step(self, at):
        self.steps.append(replace(at, share=at.share.clone(), lr=at.lr.clone()))
        self.said.append((at.phase, at.step))

    def update(self, at):
        self.said.append(("update", at.phase, at.step))

    def finish(self, model, context):
        self.said.append(("finish",))
        return super().finish(model, context)

    @property
    def rates(self):
        return [at.lr.item() for at in self.steps]


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": -1, "lr": 0.0, "batch_size": 0, "pieces": 0, "momentum": 1.0, "nesterov": 1},
        {"epochs": 1.0, "lr": -0.1, "weight_decay": -1e-4, "momentum": -0.1, "flip": "yes"},
        {"epochs": "3", "lr": math.inf, "schedule": "linear", "warmup_steps": -1, "shift": -1},
        {"epochs": True, "lr": "fast", "warmup_from": -0.1, "steps": -1, "gamma": 0.0},
        {"warmup_from": 1.1, "gamma": 1.1, "power": 0.0, "learning_rate": 0.1},
        *({"milestones": wrong} for wrong in ((0.0,), (0.5, 1.0), (-0.5,))),
    ],
)
def test_bad_recipes_are_refused_in_one_line(wrong):
    for key, value in wrong.items():
        with pytest.raises(InputError) as caught:
            checked(Recipe, {"epochs": 1, "lr": 0.1} | {key: value})
        assert one_line(caught).startswith((f"{key} = {value!r}: ", "milestones."))


def one_pixel():
    """One image of one pixel, of value 255 or, normalised, 2; class 1 of 2."""
    info = DatasetInfo("one", "One", "1", 1, 1, 1, 2, 1, 1, (0.0,), (0.5,))
    image = ImageSet(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), torch.tensor([1]))
    return Batches(image, info, 1)


def two_weights():
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    net[1].weight.data.copy_(torch.tensor([[0.5], [-0.25]]))
    return net


def test_steps_of_sgd_by_hand():
    """Weight decay, momentum and the schedule as in torch.optim.SGD's own formula."""
    recipe = Recipe(epochs=3, lr=0.1, momentum=0.9, weight_decay=0.01, schedule="poly")
    batches = one_pixel()
    made = prune(two_weights(), Method(), batches, recipe, validation=batches)
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


def test_steps_of_adam():
    """Momentum is its first decay rate."""
    net, own = two_weights(), two_weights()
    recipe = Recipe(epochs=2, lr=0.1, momentum=0.8, optimizer="adam", schedule="constant")
    made = prune(net, Method(), one_pixel(), recipe)
    adam = torch.optim.Adam(own.parameters(), lr=0.1, betas=(0.8, 0.999))
    for _ in range(2):
        adam.zero_grad()
        scored(own(torch.full((1, 1, 1, 1), 2.0)), None, torch.tensor([1])).backward()
        adam.step()
    torch.testing.assert_close(made.model[1].weight, own[1].weight)


def test_no_epoch_leaves_the_net_and_one_row_of_validation():
    net = two_weights()
    made = prune(net, Method(), one_pixel(), Recipe(epochs=0, lr=0.1), validation=one_pixel())
    assert torch.equal(made.model[1].weight, net[1].weight)
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
    assert method.said == [*expected, ("finish",)]
    assert [(at.total_step, at.total_steps) for at in method.steps] == [(n, 8) for n in range(1, 9)]
    shares = [*(n / 3 for n in range(3)), *(n / 5 for n in range(5))]
    assert [at.share.item() for at in method.steps] == shares
    assert [at.first for at in method.steps] == [True, False, False, True, *[False] * 4]
    assert [at.last for at in method.steps] == [*[False] * 2, True, *[False] * 4, True]


@pytest.mark.parametrize(("epochs", "period"), [(1, 1), (99, 1), (100, 2), (2000, 16)])
def test_the_host_looks_every_sixteen_steps_and_in_short_runs_more_often(epochs, period):
    context = Context(tuple(torch.zeros(1, 2, 1, 8, 8)), scored, score=None)
    net, recipe = randomise(BatchNormNet()), Recipe(epochs=epochs, lr=0.1)
    Loop(net, Method(), recipe, toy_batches(), context, dict)
    assert context.period == period


AGAIN = Phase("c", 0.5, restart=True)


def scored(output, x, y):
    return torch.nn.functional.cross_entropy(output, y)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([Phase("a")], [8, 7, 6, 5, 4, 3, 2, 1]),
        # one schedule over both, a scale in the second; each anew
        ([Phase("a", 0.5), Phase("b", 0.5, lr_scale=0.5)], [8, 7, 6, 5, 2, 1.5, 1, 0.5]),
        ([Phase("a", 0.5), Phase("b", 0.5, restart=True)], [8, 6, 4, 2] * 2),
        # a constant one first
        ([Phase("a", 0.5, 0.5, schedule="constant"), AGAIN], [4] * 4 + [8, 6, 4, 2]),
        # b runs on from a, c restarts
        ([Phase("a", 0.25), Phase("b", 0.25), AGAIN], [8, 6, 4, 2] * 2),
    ],
)
def test_learning_rates_of_phases(parts, expected):
    method = Recorder(parts)
    fit(method, Recipe(epochs=2, lr=0.008, schedule="poly"))
    assert [1000 * lr for lr in method.rates] == pytest.approx(expected)


def test_one_schedule_runs_over_all_phases():
    method = Recorder((Phase("a", 0.25, 0.5, schedule="constant"), Phase("b", 0.75, restart=True)))
    fit(method, Recipe(epochs=2, lr=0.008, schedule="poly", one_schedule=True))
    assert [1000 * lr for lr in method.rates] == pytest.approx([8, 7, 6, 5, 4, 3, 2, 1])


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


def options_in(folder):
    return {"checkpoint": folder / "c", "checkpoint_seconds": 0.0, "run": "r"}


def dropping(seed=0):
    """A net whose dropout draws from torch's own generator."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
    return randomise(head, seed).train()


@pytest.mark.parametrize("steps", [0, 6])
@pytest.mark.parametrize("make", [lambda seed=0: randomise(BatchNormNet(), seed), dropping])
def test_an_interrupted_run_ends_like_an_undisturbed_one(make, steps, tmp_path):
    """Of 16 steps, or 6; what the new process starts with does not matter."""
    recipe = Recipe(epochs=EPOCHS, steps=steps, lr=0.01, weight_decay=1e-3, period=1)
    straight = fit(recipe=recipe, net=make(), batches=toy_batches(**MOVED))
    assert differ(straight, fit(recipe=recipe, net=make(), batches=toy_batches(seed=1, **MOVED)))
    for step in (1, 4, 5) if steps else (1, 4, 10, 15):
        options = options_in(tmp_path) | {"run": f"{step}", "recipe": recipe}
        with pytest.raises(KilledError):
            fit(batches=Fragile(step, **MOVED), net=make(), **options)
        assert read_checkpoint(tmp_path / "c", f"{step}")["state"]["step"] == step
        torch.manual_seed(step)
        resumed = Fragile(10**9, **MOVED)
        same(straight, fit(batches=resumed, net=make(), **options))
        assert resumed.left == 10**9 - ((steps or 16) - step)
        (tmp_path / "c").unlink()


def gated():
    return methods.build("sparse_gates", {"harden": 0.6}, 0.8)


def test_a_run_interrupted_at_every_step(tmp_path):
    for _ in range(15):
        with pytest.raises(KilledError):
            fit(gated(), batches=Fragile(1), **options_in(tmp_path))
    same(fit(gated(), batches=Fragile(1), **options_in(tmp_path)), fit(gated()))


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = fit(gated(), **options_in(tmp_path))
    again = fit(gated(), batches=Fragile(0), **options_in(tmp_path))
    same(first, again)
    assert again.seconds == first.seconds


NOISE = torch.Generator().manual_seed(5)


class Drawn(torch.utils.data.Dataset):
    """Samples with noise of a generator of its own, other in each reading."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.randn(64, generator=NOISE), i


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({}, ""),
        ({"net": randomise(dropping(), 1)}, "model"),
        ({"y": 1 - torch.arange(16) % 2}, "first batch on cpu"),
        ({"count": 8}, "number of batches"),
        ({"loss": lambda output, y: 3 * output.square().mean()}, "loss on cpu"),
    ],
)
@pytest.mark.parametrize("form", ["list", "shuffled", "drawn"])
def test_a_checkpoint_is_of_one_model_data_and_loss(change, other, form, tmp_path):
    def go(net=None, y=None, count=4, **options):
        y = torch.arange(16) % 2 if y is None else y
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
        data = [(x, y)] * count
        if form != "list":
            pairs = list(zip(x, y, strict=True)) * (count // 4)
            data = DataLoader(Drawn() if form == "drawn" else pairs, batch_size=4, shuffle=True)
        recipe = Recipe(epochs=3, lr=0.01)
        return prune(net or dropping(), Method(), data, recipe, **options)

    options = options_in(tmp_path)
    first = go(**options)
    torch.manual_seed(1)
    if form == "drawn":  # of the first batch nothing can be told, and of the loss
        other = "model" if "net" in change else ""
    if other:
        with pytest.raises(InputError) as caught:
            go(**change, **options)
        line = f"checkpoint = 'c': of another {other}; delete it to start this run again"
        assert one_line(caught) == line
    else:
        same(first, go(**change, **options))


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    return now


class Slow(Recorder):
    """A step takes a second."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def after_backward(self, at):
        self.clock[0] += 1.0


def test_checkpoints_take_two_percent_of_the_time_at_most(tmp_path, monkeypatch, clock):
    """A checkpoint takes a second, too: after the first, one in fifty steps."""
    saved = []

    def write(path, run, state):
        saved.append(state["state"]["step"])
        clock[0] += 1.0

    monkeypatch.setattr(loop, "write_checkpoint", write)
    fit(Slow(clock), Recipe(epochs=40, lr=0.01), checkpoint=tmp_path / "c", run="r")
    assert saved == [4, 54, 104, 154]


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


def test_no_checkpoint_stands_between_an_epoch_and_its_row(tmp_path, monkeypatch):
    """Killed there, a run would never write the row."""
    seen = []

    def write(path, run, state):
        seen.append((state["state"]["step"], len(state["state"]["history"])))

    monkeypatch.setattr(loop, "write_checkpoint", write)
    fit(**options_in(tmp_path))
    assert seen == [(step, step // 4) for step in range(1, 17)]


def test_global_random_states_are_left_alone():
    net = randomise(BatchNormNet())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(gated(), net=net)
    assert torch.equal(before, torch.get_rng_state())


STATE = {"at": {"step": 3}, "model": {"w": torch.arange(3.0)}, "text": "a"}


def test_checkpoint_round_trip_and_one_that_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "c"
    assert read_checkpoint(path, "r") is None
    write_checkpoint(path, "r", {"at": {"step": 1}})
    write_checkpoint(path, "r", STATE)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("pathlib.Path.write_bytes", full)
        write_checkpoint(path, "r", {"at": {}})
    found = read_checkpoint(path, "r")
    assert torch.equal(found["model"].pop("w"), torch.arange(3.0))
    assert found == {"at": {"step": 3}, "model": {}, "text": "a"}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "run", "why"),
    [
        (flipped, "r", "corrupt (checksum)"),
        (lambda data: data[: len(data) // 3], "r", "corrupt (checksum)"),
        (lambda data: data + b"\0", "r", "corrupt (checksum)"),
        (lambda data: data[:5], "r", "not of this version"),
        (lambda data: b"", "r", "not of this version"),
        (lambda data: data.replace(b"point 1\n", b"point 0\n", 1), "r", "not of this version"),
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
    assert one_line(caught) == f"checkpoint = {str(path)!r} of {run}: {why}; {way_out}"
    assert path.read_bytes() == before


def test_a_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    write_checkpoint(tmp_path / "c", "r", {"x": Evil()})
    with pytest.raises(Exception, match="Weights only load failed"):
        read_checkpoint(tmp_path / "c", "r")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("period", "updates"), [(1, 5), (2, 2), (4, 1)])
def test_a_loss_that_is_not_finite_is_seen_at_the_next_look(period, updates):
    def spoilt(output, x, y):
        loss = torch.nn.functional.cross_entropy(output, y)
        calls.append(output.requires_grad)
        return loss * (math.nan if sum(calls) == 6 else 1.0)

    calls, method = [], Recorder()
    made = fit(method, Recipe(epochs=4, lr=0.01, period=period), loss=spoilt)
    assert made.status == "diverged"
    assert sum(word[0] == "update" for word in method.said) == updates
    assert len(made.history) == 1


def test_a_net_that_breaks_in_the_last_step_is_diverged():
    batches = toy_batches(batch_size=64)
    made = fit(recipe=Recipe(epochs=1, lr=1e18, weight_decay=1e18), batches=batches)
    assert not math.isfinite(made.history[-1]["validation_loss"])
    assert made.status == "diverged"


def test_a_diverged_run_still_gives_a_plain_net():
    made = fit(gated(), recipe=Recipe(epochs=3, lr=1e18))
    assert (made.status, made.history) == ("diverged", [])
    assert made.model.state_dict().keys() == BatchNormNet().state_dict().keys()


def test_bf16():
    here, there = fit(), fit(precision="bf16")
    assert there.status == "done"
    assert differ(here, there)
    assert all(v.dtype != torch.bfloat16 for v in there.model.state_dict().values())
    assert there.history[0]["train_loss"] == pytest.approx(here.history[0]["train_loss"], rel=0.1)


def test_time_between_two_steps_counts_for_nothing(clock):
    alone = looped(Slow(clock), 3, Recipe(epochs=2, lr=0.01))
    for _ in alone.steps():
        clock[0] += 100.0
    assert alone.state.seconds == 2 * 4


def looped(method, seed, recipe):
    """A loop to be advanced by hand, as `fit` runs one."""
    train = toy_batches()
    example = torch.cat([x for x, _ in train.ordered(2)][:1])
    generator = torch.Generator().manual_seed(seed)
    context = Context((example,), scored, generator=generator, weight_decay=recipe.weight_decay)
    net = randomise(BatchNormNet()).to(memory_format=torch.channels_last)
    return Loop(net, method, recipe, train, context, lambda _: {}, seed=seed)


def test_two_trainings_in_turns_are_each_as_if_alone():
    recipe = Recipe(epochs=2, lr=0.01, weight_decay=1e-3, period=1)
    loops = [looped(gated(), seed, recipe) for seed in (3, 4)]
    rows = list(zip(*(each.steps() for each in loops), strict=True))
    assert [row is not None for row, _ in rows] == [False, False, False, True] * 2
    for each, seed in zip(loops, (3, 4), strict=True):
        alone = looped(gated(), seed, recipe)
        list(alone.steps())
        assert each.state.history == alone.state.history
        state = each.finish().state_dict()
        for name, value in alone.finish().state_dict().items():
            assert torch.equal(value, state[name])


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


def test_other_c_libraries_are_left_alone(monkeypatch):
    for error in (AttributeError, OSError, TypeError):
        monkeypatch.setattr(process.ctypes, "CDLL", lambda name, e=error: (_ for _ in ()).throw(e))
        assert process.keep_freed_memory() is None


@pytest.mark.parametrize("name", ["batches", "validation"])
def test_batches_on_another_device_than_the_net_are_refused(name):
    batches = toy_batches()
    batches.device = torch.device("cuda")
    with pytest.raises(InputError) as caught:
        fit(**{name: batches})
    parameter = {"batches": "train"}.get(name, name)
    assert one_line(caught) == f"{parameter} = 'batches on cuda': on cpu, as the net"
