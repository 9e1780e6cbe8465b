"""The console command `prunestudy`; Snakemake and people use the same."""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from typing import Any

import prunestudy
from prunestudy.errors import InputError, require, require_one_of

_LISTS = ("models", "datasets", "methods", "papers", "profiles")
_SURROGATES = re.compile("[\ud800-\udfff]")  # how Python writes bytes that are not UTF-8
_STOPPED = "stopped; what is finished is kept, and the same command goes on from there"


def main(words: list[str] | None = None) -> int:
    """Run one command; bad input is one line on stderr and exit code 2, Ctrl-C 130."""
    if words is None:
        # Ended from outside is as Ctrl-C; and a log file gets a line of progress now and then.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if not sys.stderr.isatty():
            os.environ |= {"TQDM_DELAY": "15", "TQDM_MININTERVAL": "15"}
    try:
        arguments = _parser().parse_args(words)
        for name in ("results", "data"):
            text = getattr(arguments, name, "")
            # safetensors opens no others.
            require(not _SURROGATES.search(text), name, text, "a path in UTF-8")
        return arguments.run(arguments) or 0
    except InputError as error:
        return _refuse(" ".join(str(error).split()))
    except KeyboardInterrupt:
        _end_children()
        return _refuse(_STOPPED, 130)
    except BrokenPipeError:
        # The reader (head, less) has gone; Python would complain when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _refuse(f"file = {error.filename or '?'}: {error.strerror or error}")
    return 0


def _refuse(line: str, code: int = 2) -> int:
    print(f"prunestudy: {line}", file=sys.stderr)
    return code


def _end_children() -> None:
    import psutil

    children = psutil.Process().children(recursive=True)
    for end in ("terminate", "kill"):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(child, end)()
        _, children = psutil.wait_procs(children, timeout=10)


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine(prog="prunestudy", description="A study of neural network pruning.")
    parser.add_argument("--version", action="version", version=prunestudy.__version__)
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_OneLine)

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("--results", default="", help="results folder (default: results/)")
        return command

    def add_planned(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = add(name, run, text)
        command.add_argument("--profile", default="quick", help=_PROFILE_HELP)
        command.add_argument(
            "--paper", action="append", default=[], help="a paper; repeat for several; default all"
        )
        return command

    def with_data(command: argparse.ArgumentParser, device: bool = True) -> argparse.ArgumentParser:
        command.add_argument("--data", default="", help="data root (PRUNESTUDY_DATA, data/)")
        if device:
            command.add_argument("--device", default="auto", help="auto, cpu or cuda")
        return command

    study = with_data(add_planned("study", _study, "run all that is missing, as a batch"), False)
    study.add_argument("--jobs", type=int, default=2, help="jobs side by side (default 2)")
    study.add_argument("--executor", default="local", help="a Snakemake executor (default local)")
    costs = add_planned("plan", _plan, "say what the planned runs would cost")
    costs.add_argument("--gpu-hours", type=float, help="pick the runs that tell most within these")
    costs.add_argument("--rate", type=float, help="10^12 MACs of training a second, as measured")
    names = add_planned("list", _list, "list the planned runs, or the names that settings take")
    names.add_argument("what", nargs="?", choices=(*_LISTS, "method"), help="names of what")
    names.add_argument("name", nargs="?", metavar="NAME", help="of a method, for its parameters")
    add_planned("status", _status, "say what is done and what is missing")
    add_planned("table", _table, "write the tables from the records")
    add_planned("latency", _latency, "time the finished nets, alone on the machine")
    run = with_data(add_planned("run", _run, "train runs by name, if they are not there"))
    run.add_argument("runs", nargs="+", metavar="RUN", help="a run's name or its beginning")
    run.add_argument("--weights", action="store_true", help="also where only the net is missing")
    job = with_data(add_planned("job", _job, "train the runs of one job of the batch"))
    job.add_argument("job")
    note = with_data(add("notebook", _notebook, "execute a paper's notebook"), False)
    note.add_argument("paper")
    readme = add("readme", _readme, "write README's table of results")
    readme.add_argument("--profile", default="cpu", help=_PROFILE_HELP)
    merge = add("collect", _collect, "merge finished runs, and records of elsewhere, into one file")
    merge.add_argument("folders", nargs="*", metavar="FOLDER", help="brought back from elsewhere")
    merge.add_argument("--replace", action="store_true", help="the newcomer takes a run's place")
    show = add("show", _show, "print a run's settings, metrics, environment and history")
    show.add_argument("run_name", metavar="RUN", help="a run's name or its beginning")
    show.add_argument("--weight", nargs=2, metavar=("LAYER", "INDEX"), help=_WEIGHT_HELP)
    compare = add("compare", _compare, "say what differs between two runs")
    for name in ("first", "second"):
        compare.add_argument(name, metavar="RUN", help="a run's name or its beginning")
    export = add("export", _export, "write a finished net as an ONNX file")
    export.add_argument("run_name", metavar="RUN", help="a run's name or its beginning")
    export.add_argument("file", metavar="FILE", help="the ONNX file")
    for command in (note, merge, show, compare, export):
        command.add_argument("--profile", default="quick", help=_PROFILE_HELP)
    own = with_data(add("train", _train, "train one run of your own, with settings of your own"))
    own.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=_SET_HELP)
    return parser


_WEIGHT_HELP = "say when this weight was cut, and at what magnitude"
_SET_HELP = (
    "dataset (a name, or folder:NAME for images in NAME/{train,test}/<class>/ below the data"
    " root), model, method, target, seed, validation, epochs, lr, batch_size, ... or a parameter"
    " of the method as params.NAME; `prunestudy list` models, datasets, methods"
)
_PROFILE_HELP = "see `prunestudy list profiles`; custom: runs of your own"


def _planned(a: argparse.Namespace) -> list[Any]:
    from prunestudy.study import names
    from prunestudy.study.plan import plan

    if a.profile == "custom" and a.run in (_list, _status, _run):
        require(not a.paper, "paper", "".join(a.paper[:1]), "none with --profile custom")
        return names.own(_store(a))
    return plan(a.profile, tuple(a.paper))


def _store(a: argparse.Namespace) -> Any:
    from prunestudy.study.records import Store

    return Store(a.profile, a.results or None)


def _study(a: argparse.Namespace) -> None:
    from prunestudy.study import batch, tables
    from prunestudy.study.collect import collect
    from prunestudy.study.plan import plan

    started, store, planned = time.monotonic(), _store(a), _planned(a)
    seconds = batch.run(store, a.profile, planned, a.jobs, a.data, a.executor)
    since = time.monotonic()
    collect(a.profile, [], a.results, False)
    tables.write(store, plan(a.profile))
    summary = tables.read_table(store.folder / "tables" / "summary.csv")
    _print_summary(summary[summary.paper.isin({item.paper for item in planned})])
    folder = store.folder if a.results else os.path.relpath(store.folder)
    for name in ("tables", "figures", "notebooks", "records"):
        print(f"{name:10} {folder}/{name}")
    now = time.monotonic()
    seconds |= {"tables": now - since, "total": now - started}
    print("seconds:  ", ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def _collect(a: argparse.Namespace) -> None:
    from prunestudy.study.collect import collect

    for line in collect(a.profile, a.folders, a.results, a.replace):
        print(line)


def _print_summary(summary: Any) -> None:
    import pandas as pd

    columns = ["paper", "method", "model", "dataset", "target", "n", "metric", "difference"]
    columns += ["difference_low", "difference_high", "verdict"]
    with pd.option_context("display.width", 200, "display.max_rows", 500):
        plain = summary[summary.variant == ""][columns]
        print(plain.to_string(index=False, float_format=lambda v: f"{v:.4f}", na_rep=""))


def _plan(a: argparse.Namespace) -> None:
    from prunestudy.study import forecast

    rate = forecast.RATE if a.rate is None else a.rate
    planned, said = _planned(a), sys.stdout
    if a.gpu_hours is not None:
        planned, said = forecast.choose(planned, a.gpu_hours, rate), sys.stderr
        print(*(item.settings.run for item in planned), sep="\n")  # names alone, for a pipe
    table = forecast.forecast(planned, rate)
    print(table.to_string(index=False, float_format="{:.2f}".format), file=said)
    source = "assumed" if a.rate is None else "as given"
    print(
        f"hours: an estimate, at {rate:g} x 10^12 MACs of training a second ({source}); "
        "MACs: of the dense nets, three passes a step",
        file=said,
    )


def _list(a: argparse.Namespace) -> None:
    if a.what:
        from prunestudy.study import names

        require(a.what in _LISTS or a.name, "list", a.what, f"{', '.join(_LISTS)} or method NAME")
        named = names.LISTS[a.what]() if a.what in _LISTS else names.of_method(a.name)
        for name, text in named.items():
            print(f"{name:22} {text}")
        return
    for item in _planned(a):
        target = f"{item.settings.target.value:.3f}" if item.settings.target else "-"
        words = (item.settings.run, item.paper, item.experiment, f"seed {item.settings.seed}")
        print(*words, f"target {target}", item.variant, sep="\t")


def _status(a: argparse.Namespace) -> None:
    store = _store(a)
    unique = {item.settings.run: item.settings for item in _planned(a)}
    found = {name: store.read(settings) for name, settings in unique.items()}
    missing = [name for name, record in found.items() if record is None]
    states = [record["status"] for record in found.values() if record]
    for state in sorted(set(states)):
        print(f"{state:9} {states.count(state)}")
    print(f"{'missing':9} {len(missing)}")
    for name in missing:
        print(f"  {name}" + ("  (begun)" if store.work(name).exists() else ""))


def _table(a: argparse.Namespace) -> None:
    from prunestudy.study import tables

    tables.write(_store(a), _planned(a))


def _readme(a: argparse.Namespace) -> None:
    from prunestudy import places
    from prunestudy.study import tables

    summary = tables.read_table(_store(a).folder / "tables" / "summary.csv")
    tables.fill_readme(places.home() / "README.md", summary)


def _latency(a: argparse.Namespace) -> None:
    from prunestudy.study.session import measure_latency

    measure_latency(_store(a), _planned(a))


def _run(a: argparse.Namespace) -> None:
    from prunestudy.study import names

    by_name = {item.settings.run: item.settings for item in _planned(a)}
    wanted = [names.choose(name, by_name, _store(a)) for name in a.runs]
    _ensure(a, [by_name[name] for name in wanted], a.weights)


def _job(a: argparse.Namespace) -> None:
    from prunestudy.study.plan import jobs

    found = jobs(a.profile, _planned(a))
    require_one_of("job", a.job, found)
    _ensure(a, [item.settings for item in found[a.job]])


def _ensure(a: argparse.Namespace, wanted: list[Any], weights: bool = False) -> list[str]:
    """Train what is missing of the `wanted`, print a line for each; return their status."""
    from prunestudy.study.runs import Runner

    show = sys.stderr.isatty() or "TQDM_DELAY" in os.environ
    runner, states = Runner(_store(a), a.data or None, a.device, show=show), []
    for settings in wanted:
        record = runner.ensure(settings, weights)
        score = record["metrics"].get("metric")
        print(settings.run, record["status"], "" if score is None else f"{score:.4f}", flush=True)
        states.append(record["status"])
    return states


def _notebook(a: argparse.Namespace) -> None:
    from prunestudy.study import notebooks

    target = notebooks.execute(a.paper, a.profile, a.results, a.data)
    print(target if a.results else os.path.relpath(target))


def _done(a: argparse.Namespace, run: str) -> tuple[Any, str]:
    """The store, and the name of the finished run that begins so."""
    from prunestudy.study import names

    require_one_of("profile", a.profile, names.LISTS["profiles"]())
    store = _store(a)
    return store, names.choose(run, store.names(), store)


def _compare(a: argparse.Namespace) -> None:
    from prunestudy.study.inspect import differences

    (store, first), (_, second) = (_done(a, run) for run in (a.first, a.second))
    rows = [("", first, second), *differences(store, first, second)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for key, one, other in rows:
        print(f"{key:{widths[0]}}  {one:{widths[1]}}  {other}")


def _export(a: argparse.Namespace) -> None:
    from prunestudy import shrink

    store, name = _done(a, a.run_name)
    weights = store.weights(name)
    hint = "a run whose net is on disk (`prunestudy run RUN --weights` brings it back)"
    require(weights.exists(), "weights", name, hint)
    net = shrink.load_net(weights)
    store.kept(name, "weights")
    shrink.export_onnx(net, a.file, shrink.input_shape(weights))
    print(a.file)


def _show(a: argparse.Namespace) -> None:
    store, name = _done(a, a.run_name)
    if a.weight:
        from prunestudy.study.inspect import weight_line

        print(weight_line(store, name, *a.weight))
        return
    print(store.shown(name), end="")


def _train(a: argparse.Namespace) -> int:
    from prunestudy.study import names
    from prunestudy.study.settings import own_settings

    a.profile = "custom"
    values = {}
    for pair in a.set:
        key, sign, text = pair.partition("=")
        if not sign:
            raise InputError(f"--set = {pair!r}: must be KEY=VALUE")
        values[key] = _value(text)
    settings = own_settings(values, a.data)
    (status,) = _ensure(a, [settings])
    names.note_latest(_store(a), settings.run)
    if status == "done":
        return 0
    return _refuse(f"run = {settings.run}: {status}; a smaller lr may help", 1)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    sys.exit(main())
