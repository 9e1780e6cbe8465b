"""The scripts of bench/: they time the library's own loop, and leave what they measured."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import batches
import common
import layers
import sparse_linear
import steps
from prunestudy import datasets, train
from prunestudy.datasets.batches import mix
from prunestudy.errors import InputError
from prunestudy.methods.masks import kept_count
from prunestudy.methods.sparse_gates import SparseGates

ROOT = Path(__file__).parents[1]


def test_a_step_is_one_of_the_loop_that_train_runs(monkeypatch):
    """With its seed, its loss as a number and its rate, which a copy would leave out."""
    seen, methods = [], []
    after_step, run = SparseGates.after_step, train.Loop.steps

    def seen_after_step(self, at):
        after_step(self, at)
        seeded = torch.initial_seed() == mix(0, at.total_step - 1)
        seen.append((at.step, seeded, at.lr.item()))

    def seen_run(self):
        methods.append(type(self.method).__name__)
        return run(self)

    monkeypatch.setattr(SparseGates, "after_step", seen_after_step)
    monkeypatch.setattr(train.Loop, "steps", seen_run)
    row = steps.ROWS["LeNet-5, a training step: with gates on weights / dense"]
    assert row(0.0).median > 0
    assert methods == ["Method", "SparseGates"]
    # One to warm up, one to see how long a pair takes, a look's two; at half the recipe's rate, as
    # the method's first phase has it.
    assert seen == [(step, True, 0.0005) for step in range(1, 5)]


@pytest.mark.parametrize(
    ("seconds", "of_a_pair", "rounds"),
    [(0.0, 3.0, 2), (5.0, 3.0, 5), (5.0, 0.25, 20), (5.0, 0.01, 100)],
)
def test_as_many_pairs_as_fit_the_seconds(monkeypatch, seconds, of_a_pair, rounds):
    asked = []

    def interleave(calls, rounds, warmup):
        asked.append((list(calls), rounds, warmup))
        return {"a": [of_a_pair * 0.75] * rounds, "b": [of_a_pair * 0.25] * rounds}

    monkeypatch.setattr(common.measure, "interleave", interleave)
    calls = {"a": int, "b": int}
    assert str(common.compare(calls, "a", "b", seconds)) == "3.00 [3.00, 3.00]"
    assert asked == [(["a", "b"], 1, 1), (["a", "b"], rounds, 0)]


def test_factors_are_at_the_rank_of_the_card():
    parts = layers.factors("LeNet", "conv2", 0.0).split("; ")
    assert [part.split()[0] for part in parts] == ["at", "batch", "batch", "by"]
    assert parts[0] == "at rank 17 of 50"
    assert parts[3] == "by MACs 2.67"  # 50 * 500 / (17 * (500 + 50))


def test_masks_are_made_at_each_call():
    """torch's leave the net as it was, for the next call."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    before = copy.deepcopy(net.state_dict())
    layers.torch_masks(net)()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    layers.our_masks(net)()
    kept = sum(int(layer.weight.count_nonzero()) for layer in net)
    assert kept == kept_count(4 * 9 + 16 * 9, 0.9)


def test_stream_and_bare_decoding_do_their_work(tmp_path, monkeypatch):
    images = batches.photos(tmp_path, 3, 2)
    assert len(images) == 6
    with Image.open(images.folder / images.images[5]) as image:
        assert image.size == (500, 375)
    batches.bare(images)
    monkeypatch.setattr(batches, "PHOTOS", 2)
    batches.stream(images)
    (tmp_path / "2.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"2\.jpg cannot be read"):
        batches.stream(images)


def test_the_usual_loader_gives_normalised_batches():
    info = datasets.info("mnist")
    images = common.noise(info, 2)
    loaded = list(common.usual_loader(images, info, shift=0))
    assert [tuple(x.shape) for x, _ in loaded] == [(128, 1, 28, 28)] * 2
    here, _ = next(datasets.Batches(images, info, 128).ordered())
    least = torch.cat([x for x, _ in loaded]).min()
    assert least == pytest.approx(float(here.min()))


# --- the page


def test_each_row_is_on_the_page_as_soon_as_it_is_there(tmp_path, capsys):
    page = tmp_path / "bench.md"

    def second(seconds):
        assert seconds == common.SECONDS
        assert page.read_text().endswith("| --- | --- |\n| one | 1 |\n")
        assert capsys.readouterr().out == "one: 1\ntwo: "
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.main({"one": lambda seconds: "1", "two": second}, words=["--results", str(tmp_path)])
    rows = {"three": lambda seconds: "3 [2, 4]", "one": lambda seconds: "1.5"}
    assert common.main(rows, words=["--results", str(tmp_path)]) == tmp_path
    rows = page.read_text().split("| --- | --- |\n")[1]
    assert rows == "| one | 1.5 |\n| three | 3 \\[2, 4\\] |\n"
    common.main({"four": lambda seconds: "4"}, anew=True, words=["--results", str(tmp_path)])
    assert page.read_text().endswith("| --- | --- |\n| four | 4 |\n")
    assert [path.name for path in tmp_path.iterdir()] == ["bench.md"]


def test_rows_of_another_machine_do_not_stay(tmp_path):
    page = tmp_path / "bench.md"
    common.write_row(page, "one", "1")
    page.write_text(page.read_text().replace("Machine: ", "Machine: another "))
    common.write_row(page, "two", "2")
    assert "another" not in page.read_text()
    assert page.read_text().endswith("| --- | --- |\n| two | 2 |\n")


def test_a_look_leaves_no_page(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert common.main({"one": str}, words=["--quick"]) is None
    assert list(tmp_path.iterdir()) == []


def test_table_and_figure_of_sparse_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_linear, "WIDTHS", (8, 16))
    table = []
    rows = sparse_linear.rows(table)
    assert list(rows)[1] == "Linear layer 8 wide, batch 128: dense / sparse"
    for row in rows.values():
        assert [part.split(":")[0] for part in row(0.0).split("; ")] == [
            f"{share}% zeros" for share in (90, 95, 98, 99)
        ]
    sparse_linear.write(table, tmp_path)
    lines = (tmp_path / "sparse_linear.csv").read_text().splitlines()
    assert lines[0] == "width,sparsity,batch,speed_up,low,high"
    assert [line.split(",")[:3] for line in lines[1:3]] == [["8", "0.9", "1"], ["8", "0.9", "128"]]
    assert len(lines) == 1 + 2 * 4 * 2
    assert (tmp_path / "sparse_linear.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fast"], "unrecognized arguments: --fast"),
        (["--results"], "argument --results: expected one argument"),
        (["--results", "nowhere"], "--results = 'nowhere': must be a folder that exists"),
        (["--quick", "--results", __file__], f"--results = {__file__!r}: must be a folder"),
    ],
)
def test_wrong_arguments_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        common.main({"one": lambda seconds: 1 / 0}, words=words)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"bench: {message}")
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    "name", ["", "steps.py", "layers.py", "batches.py", "commands.py", "sparse_linear.py"]
)
def test_scripts_are_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--fast"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "bench" / name), run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "bench: unrecognized arguments: --fast\n"


def test_ratio():
    exact = common.ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (exact.median, exact.low, exact.high) == (2.0, 2.0, 2.0)
    found = common.ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, seed=3)
    assert found == common.ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, seed=3)
    assert (found.median, found.low, found.high) == (3.0, 1.0, 5.0)


def test_the_bench_of_a_gpu_says_that_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "bench" / "gpu.py"), run_name="__main__")
    assert caught.value.code == "bench/gpu.py: no CUDA device here"


def test_steps_that_the_bench_of_a_gpu_times(monkeypatch):
    """On the CPU, where nothing is captured: the plain loop, and two trainings in turns."""
    import gpu

    monkeypatch.setattr(gpu, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "SECONDS", 0.0)
    info = datasets.info("cifar10")
    batches = datasets.Batches(common.noise(info, 1), info, 2, shift=4, flip=True)
    assert gpu.rate(gpu.plain("resnet20", batches, "bf16"), warm=1) > 0
    assert gpu.rate(gpu.ours("resnet20", batches, "bf16", 2, "gdp"), warm=1) > 0
    assert gpu._count("captured, 4 at a time") == 4
