import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import put_record, small_run, tree

import prunestudy
from prunestudy import shrink
from prunestudy.study import batch, cli, commands, kernel, runs
from prunestudy.study.lines import line_of
from prunestudy.study.plan import plan
from prunestudy.study.records import Store
from prunestudy.study.runs import stored_net


@pytest.fixture
def results(tmp_path, toy_card, monkeypatch):
    """A results folder, with the toy card in place of the study's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


@pytest.fixture
def call(results, capsys):
    """Run a command on that folder; returns exit code, stdout and stderr."""

    def run(*words, where=results):
        code = cli.main([*words, "--results", str(where)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def refused(call, tmp_path, monkeypatch):
    """Run a command that must be refused without a trace; returns what it said."""

    def no(*args, **kwargs):
        raise AssertionError("nothing may start")

    def run(*words, **options):
        jobs = (batch.subprocess, "Popen"), (kernel, "run_cells")
        for place, name in ((runs, "pruning"), *jobs):
            monkeypatch.setattr(place, name, no)
        before = tree(tmp_path)
        code, out, err = call(*words, **options)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert err.startswith("prunestudy: ")
        assert tree(tmp_path) == before
        return err.removeprefix("prunestudy: ").removesuffix("\n")

    return run


def names_of(*labels):
    """Names of the toy plan's runs: start, dense, magnitude, random."""
    planned = [p.settings.run for p in plan("quick")]
    order = dict(zip(("start", "dense", "magnitude", "random"), planned, strict=True))
    return [order[label] for label in labels]


# --- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "argument COMMAND: invalid choice: 'nope'"),
        (["list", "--nope"], "unrecognized arguments: --nope"),
        (["status", "--prof", "quick"], "unrecognized arguments: --prof quick"),
        (["list", "--profile", "fast"], "profile = 'fast': allowed are cpu, cpu-long, gpu, pa"),
        (["latency", "--profile", "cpu"], "profile = 'cpu': the chosen papers have quick"),
        (["latency", "--paper", "nope"], "paper = 'nope': allowed are toy"),
        (["list", "--paper", "toy", "--paper", "nope"], "paper = 'nope': allowed are toy"),
        (["run"], "the following arguments are required: RUN"),
        (["run", "nope"], "run = 'nope': no such run; `prunestudy list` names them"),
        (["run", "dense"], "run = 'dense': 2 runs match, dense-lenet300-digits-"),
        (["run", "magnitude", "nope"], "run = 'nope': no such run"),
        (["run", "magnitude", "--device", "tpu"], "device = 'tpu': allowed are auto, cpu, cuda"),
        (["run", "magnitude", "--device", "cuda"], "device = 'cuda': no CUDA device here"),
        (["plan", "--data", "a\udcff"], "unrecognized arguments: --data"),
        (["export", "x", "a\udcff.onnx"], "file = 'a\\udcff.onnx': a path in UTF-8"),
        (["list", "models", "nope"], "list = 'nope': models, datasets, methods, papers, profiles"),
        (["list", "models", "--profile", "x"], "profile = 'x': not with list models"),
        (["study", "--gang", "99"], "gang = 99: for profile gpu only"),
        (["study", "--profile", "gpu", "--jobs", "-5"], "jobs = -5: not for profile gpu"),
        (["train", "--data", "a\udcff"], "data = 'a\\udcff': a path in UTF-8"),
        (["export", "x"], "the following arguments are required: FILE"),
        (["show", "nope"], "run = 'nope': no such run"),
        (["study", "--jobs", "0"], "jobs = 0: 1 to "),
        (["study", "--jobs", "9" * 30], f"jobs = {'9' * 30}: 1 to "),
        (["list", "nets"], "argument what: invalid choice: 'nets'"),
        (["list", "method"], "list = 'method': models, datasets, methods, papers, profiles or me"),
        (["list", "method", "nope"], "method = 'nope': allowed are component_aware, dense"),
        (["list", "--profile", "custom", "--paper", "toy"], "paper = 'toy': none with --profile"),
        (["latency", "--profile", "custom"], "profile = 'custom': allowed are cpu, cpu-long"),
        (["show", "dense", "--profile", "fast"], "profile = 'fast': allowed are"),
        *(
            (["study", "--executor", name], f"executor = {name!r}: local, or one whose package")
            for name in ("nope", "x; touch OWNED", "", "a.b", "sl\u00fcrm", "slurm\n", "'")
        ),
    ],
)
def test_bad_commands(refused, words, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(*words).startswith(message)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (True, "executor = 'slurm': only where Slurm is installed (sbatch)"),
        (None, "executor = 'slurm': local, or one whose package snakemake-executor-plugin-NAME"),
    ],
)
def test_slurm_is_asked_for_where_it_is_not(refused, monkeypatch, plugin, message):
    monkeypatch.setattr(batch, "find_spec", lambda name: plugin)
    monkeypatch.setattr(batch.shutil, "which", lambda name: None)
    assert refused("study", "--executor", "slurm").startswith(message)


# What the words of --set come to; all that settings refuse is in test_outside.
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["lr"], "--set = 'lr': must be KEY=VALUE"),
        (["dataset=7"], "dataset = 7: allowed are digits"),
        (["lr=Infinity"], "lr = inf: input should be a finite number"),
        (["epochs="], "epochs = '': input should be a valid integer"),
        (["method=magnitude", "target=[0.5]"], "target = [0.5]: the share of weights"),
        (["method=magnitude", "target=1e-20"], "target.value = 1e-20: a number from 1e-18"),
        (["method=l1", "target=0.5", "params.ramp=x"], "params.ramp = 'x': "),
    ],
)
def test_bad_settings(refused, pairs, message):
    words = [word for pair in pairs for word in ("--set", pair)]
    assert refused("train", *words).startswith(message)


@pytest.mark.parametrize("place", ["--data", "environment", "nowhere"])
def test_missing_data(refused, no_data, place, results):
    root = {"--data": ["--data", str(no_data)], "nowhere": ["--data", str(no_data / "x")]}
    said = refused("train", "--set", "dataset=mnist", "--set", "epochs=1", *root.get(place, []))
    assert said.startswith("data = ")
    assert "mnist" in said
    assert not results.exists()


def test_edited_records_stop_every_command(call, refused, results):
    assert call("run", *names_of("start"))[0] == 0
    path = results / "quick" / "runs" / names_of("start")[0] / "record.json"
    path.write_text(path.read_text().replace('"seed":0', '"seed":1'))
    words = [["status"], ["run", "magnitude"], ["study"]]
    for each in [*words, ["show", names_of("start")[0]]]:
        said = refused(*each)
        assert said.startswith(f"record = {names_of('start')[0]}: was edited or cut off (checksum)")


@pytest.mark.parametrize("words", [["status"], ["latency"], ["run", "magnitude"]])
def test_a_file_in_the_place_of_the_results(refused, tmp_path, words):
    place = tmp_path / "file"
    place.write_text("mine")
    said = refused(*words, where=place)
    assert said.startswith("file = ")
    assert str(place) in said


def test_records_of_another_version_are_named(call, refused, results):
    path = results / "custom/runs" / own(call) / "record.json"
    record = json.loads(path.read_text())
    record["settings"]["recipe"]["colour"] = "red"
    path.write_text(line_of(record) + "\n")
    for words in (["list"], ["status"], ["run", "dense"]):
        said = refused(*words, "--profile", "custom")
        assert said.startswith(f"record = {path.parent.name}: is of another version in ")


def test_a_place_for_the_last_runs_name_that_is_none(call, refused, results):
    own(call)
    (results / "custom/latest").unlink()
    (results / "custom/latest").symlink_to("nothing")
    assert "a regular file, or a name" in refused("train", "--set", "epochs=1", "--set", "seed=3")


def test_runs_that_cannot_be_read_are_not_taken_for_none(refused, results):
    (results / "custom").mkdir(parents=True)
    (results / "custom/runs").write_text("mine")
    for words in (["status"], ["show", "dense"], ["collect"]):
        said = refused(*words, "--profile", "custom")
        assert said == f"file = {results}/custom/runs: Not a directory"


def test_a_disk_without_space(call, results, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "the/file")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, out, err = call("run", "magnitude")
    assert (code, out) == (2, "")
    assert err.startswith("prunestudy: file = ")
    assert err.endswith(": No space left on device\n")
    assert not (results / "quick" / "runs").exists()


def test_exit_code_and_line_of_the_real_command(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "prunestudy.study.cli"]
    words = ["train", "--set", "epochs=0", "--results", str(tmp_path / "r")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    why = "at least 1 for a run without a parent or pretrained weights"
    assert done.stderr == f"prunestudy: epochs = 0: {why}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_that_cannot_show_it_and_none_at_all():
    code = "from prunestudy.study import cli, commands; commands.do_plan = lambda _: print('±')"
    words = [sys.executable, "-c", f"import sys; {code}; sys.exit(cli.main())", "plan"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = ["sh", "-c", '"$@" 2>&-', "sh", *words]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout) == (0, "\\xb1\n")


# --- what works


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    names = "study plan list status latency run collect show compare export"
    for name in [*names.split(), "train"]:
        assert f"\n    {name} " in out


def test_list(call, results):
    code, out, err = call("list")
    assert (code, err) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == names_of("start", "dense", "magnitude", "random")
    assert rows[0][1:] == ["toy", "digits", "seed 0", "target -", "start"]
    assert rows[2][1:] == ["toy", "digits", "seed 0", "target 0.900", ""]
    assert not results.exists()


def test_run_status_show(call, results):
    start, dense, magnitude, random = names_of("start", "dense", "magnitude", "random")
    code, out, _ = call("status")
    assert code == 0
    assert out.splitlines() == [
        "missing   4",
        *(f"  {name}" for name in (start, dense, magnitude, random)),
    ]
    assert not results.exists()
    code, out, _ = call("run", magnitude[:-3], "--device", "cpu")
    store = Store("quick", results)
    metric = store.require(magnitude)["metrics"]["metric"]
    assert (code, out) == (0, f"{magnitude} done {metric:.4f}\n")
    # its parent was trained on the way
    store.work(random).mkdir()
    assert call("status")[1].splitlines() == [
        "done      2",
        "missing   2",
        f"  {dense}",
        f"  {random}  (begun)",
    ]
    code, out, _ = call("show", "magnitude")
    text, _, history = out.partition("\n}\n")
    assert json.loads(text + "}") == store.require(magnitude) | {"history": None}
    columns = store.require(magnitude)["history"]
    assert history.strip() == " ".join(f"{name}={value}" for name, (value,) in columns.items())


def all_runs():
    return [item.settings.run for item in plan("quick")]


def timed(results):
    """Milliseconds of the planned runs that were timed, by run."""
    found = {name: Store("quick", results).require(name)["latency"] for name in all_runs()}
    return {name: latency["ms"] for name, latency in found.items() if latency}


def test_latency(call, results):
    code, out, _ = call("run", *all_runs())
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == all_runs()
    assert timed(results) == {}
    assert call("latency")[0] == 0
    assert list(timed(results)) == names_of("dense", "magnitude", "random")
    for ms in timed(results).values():
        expected = "dense_latency_b128_ms dense_latency_b1_ms latency_b128_ms latency_b1_ms"
        assert sorted(ms) == expected.split()
        assert min(ms.values()) > 0
    before = tree(results)
    assert call("latency")[0] == 0
    assert tree(results) == before


def test_collect_says_what_it_left_out(call, results, tmp_path):
    call("run", "magnitude")
    assert call("collect") == (0, "", "")
    assert len((results / "quick/records.jsonl").read_text().splitlines()) == 2
    other = Store("quick", tmp_path / "elsewhere")
    settings = next(p.settings for p in plan("quick") if p.settings.method == "magnitude")
    put_record(other, settings, 0.1)
    code, out, err = call("collect", str(other.folder))
    assert (code, err) == (0, "")
    why = "is stored already with other numbers; that record is kept"
    assert out.splitlines()[0] == f"{settings.run}: {why}"


def test_export(call, refused, results, tmp_path):
    call("run", "magnitude")
    (name,) = names_of("magnitude")
    file, weights = tmp_path / "net.onnx", Store("quick", results).weights(name)
    assert call("export", name, str(file)) == (0, f"{file}\n", "")
    net, shape = stored_net(weights)
    x = torch.rand(5, *shape)
    expected = net(x)
    assert torch.allclose(shrink.OnnxNet(file)(x), expected, atol=1e-5)
    weights.unlink()
    call("run", name)
    assert not weights.exists()
    call("run", name, "--weights")
    assert torch.equal(stored_net(weights)[0](x), expected)
    assert refused("export", name, f"{tmp_path}/no/net").startswith(f"file = '{tmp_path}/no/net': ")


def test_export_of_a_run_without_its_own_net(call, refused, results, tmp_path):
    call("run", "magnitude", "random")
    store, (ours, other) = Store("quick", results), names_of("magnitude", "random")
    store.weights(ours).write_bytes(store.weights(other).read_bytes())
    store.weights(other).unlink()
    for name in (ours, other):
        said = refused("export", name, str(tmp_path / "net.onnx"))
        assert said.startswith(f"weights = {name}: missing, or not as its record says")
    assert refused("export", "nope", "net.onnx").startswith("run = 'nope': no such run")


def test_compare(call, refused, results):
    call("run", "magnitude", "random")
    magnitude, random = names_of("magnitude", "random")
    code, out, err = call("compare", magnitude, random)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == [magnitude, random]
    assert ["settings.method", "magnitude", "random"] in rows
    assert "validation.loss" in [row[0] for row in rows]
    assert rows[-1] == "history from epoch 1 1 epochs 1 epochs".split()
    assert not [row for row in rows if row[0] in ("settings.seed", "data.fingerprint")]
    assert call("compare", magnitude, magnitude) == (0, "no difference\n", "")
    assert refused("compare", magnitude, "nope").startswith("run = 'nope': no such run")


def test_train_a_run_of_ones_own(call, results):
    words = "epochs=1 method=sparse_gates target=0.9 params.harden=0.5 batch_size=64 seed=4"
    pairs = [word for pair in words.split() for word in ("--set", pair)]
    code, out, err = call("train", *pairs)
    settings = small_run("sparse_gates", 0.9, p_harden=0.5, seed=4)
    record = Store("custom", results).read(settings)
    assert (code, err) == (0, "")
    assert out == f"{settings.run} done {record['metrics']['metric']:.4f}\n"
    assert record["metrics"]["sparsity"] == 0.9
    assert call("show", "sparse", "--profile", "custom")[0] == 0


def test_train_says_when_a_run_diverged(call, refused):
    code, out, err = call("train", "--set", "epochs=2", "--set", "lr=1e20")
    name, status = out.split()
    assert (code, status) == (1, "diverged")
    assert err == f"prunestudy: run = {name}: diverged; a smaller lr may help\n"
    said = refused("export", name, "net.onnx", "--profile", "custom")
    assert said == f"run = {name!r}: is diverged; only finished nets are exported"


def own(call, *pairs):
    """Train a run of one's own; returns its name."""
    words = [word for pair in ("epochs=1", *pairs) for word in ("--set", pair)]
    return call("train", *words)[1].split()[0]


def test_ones_own_runs_are_listed_and_compared(call, results):
    first, second = own(call), own(call, "method=magnitude", "target=0.5", "seed=3")
    custom = ("--profile", "custom")
    rows = [line.split("\t") for line in call("list", *custom)[1].splitlines()]
    assert sorted(rows) == [
        [first, "custom", "train", "seed 0", "target -", ""],
        [second, "custom", "train", "seed 3", "target 0.500", ""],
    ]
    assert call("status", *custom)[1].splitlines() == ["done      2", "missing   0"]
    header = call("compare", first, second, *custom)[1].splitlines()[0]
    assert header.split() == [first, second]
    weights = Store("custom", results).weights(second)
    content = stored_net(weights)[0].state_dict()
    weights.unlink()
    assert call("run", second, "--weights", *custom)[0] == 0
    again = stored_net(weights)[0].state_dict()
    assert all(torch.equal(again[key], value) for key, value in content.items())


def test_of_several_runs_the_last_that_train_was_called_for_is_taken(call, refused):
    first, second = own(call), own(call, "seed=1")
    custom = ("--profile", "custom")
    code, out, err = call("show", "dense", *custom)
    assert (code, json.loads(out.partition("\n}\n")[0] + "}")["run"]) == (0, second)
    assert err == f"2 runs match; taking the last trained: {second}\n"
    assert own(call) == first  # it is there, and taken from now on
    assert first in call("show", "dense", *custom)[2]
    own(call, "method=magnitude", "target=0.5")
    names = ", ".join(sorted((first, second)))
    assert refused("show", "dense", *custom) == (
        f"run = 'dense': 2 runs match, {names}; give more of the name; `prunestudy list` names them"
    )


def test_names_of_what_settings_take(call, capsys):
    assert call("list", "papers")[1] == "toy                    A toy\n"
    assert call("list", "profiles")[1].splitlines()[0] == "quick                  toy"
    assert "\nlenet5 " in call("list", "models")[1]
    assert "\nfolder:NAME " in call("list", "datasets")[1]
    assert "\ngdp                    GDP (ours)\n" in call("list", "methods")[1]
    assert call("list", "method", "l1")[1].splitlines()[:4] == [
        "method                 l1 (L1 (LASSO))",
        "target_kind            sparsity (of weights)",
        'params.scope           "all"',
        "params.ramp            0.8",
    ]
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"{prunestudy.__version__}\n"


def test_numbers_and_text_of_settings():
    values = ["0.5", "3", "true", "null", "relu", "[1, 2]", '"3"', "1e-3", ""]
    assert [commands.value_of(text) for text in values] == [
        *(0.5, 3, True, None, "relu", [1, 2], "3", 1e-3, "")
    ]
    for text in ("9" * 5000, "[" * 100_000):
        assert commands.value_of(text) == text
