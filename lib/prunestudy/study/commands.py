"""The commands of `prunestudy`: one function each, called with the parsed words of cli.py.

Each prints its output and returns the exit code or None. They raise `InputError`.
"""
# ruff: noqa: D103

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterable

import pandas as pd
import torch

from prunestudy import datasets, methods, models, shrink
from prunestudy.errors import InputError, require, require_one_of, writable_file
from prunestudy.papers import PROFILES, cards
from prunestudy.study import batch, minutes, search, session, tables, verdicts
from prunestudy.study.cli import ARGUMENTS, LISTS
from prunestudy.study.collect import collect
from prunestudy.study.lines import write_text
from prunestudy.study.plan import RATE, Planned, forecast, plan
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner, stored_net
from prunestudy.study.settings import RunSettings, own_settings


def _store(a: Namespace) -> Store:
    return Store(a.profile, a.results)


def _planned(a: Namespace) -> list[Planned]:
    """The planned runs; with profile custom, where a command takes it, one's own finished runs."""
    if a.profile != "custom" or a.command not in ("list", "status", "run"):
        return plan(a.profile, tuple(a.paper))
    require(not a.paper, "paper", "".join(a.paper[:1]), "none with --profile custom")
    store = _store(a)
    own = map(store.settings, store.names())
    return [Planned("custom", "train", "results", settings) for settings in own]


def _require_unused(a: Namespace, why: str, *names: str) -> None:
    for name in names:
        value = getattr(a, name)
        require(value == ARGUMENTS[f"--{name}"].get("default", False), name, value, why)


def _choose(begins: str, names: Iterable[str], store: Store) -> str:
    """The one of `names` that begins so; of several, the one last trained by `train`."""
    found = [name for name in names if name.startswith(begins)]
    if begins in found or len(found) == 1:
        return begins if begins in found else found[0]
    path = store.folder / "latest"
    latest = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if latest in found:
        print(f"{len(found)} runs match; taking the last trained: {latest}", file=sys.stderr)
        return latest
    some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    why = f"{len(found)} runs match, {some}; give more of the name" if found else "no such run"
    raise InputError(f"run = {begins!r}: {why}; `prunestudy list` names them")


def do_study(a: Namespace) -> None:
    if a.profile == "gpu":
        _require_unused(a, "not for profile gpu", "jobs", "executor", "searches")
        for line in minutes.study(_store(a), _planned(a), a.data, a.minutes, a.gang):
            print(line)
        return
    _require_unused(a, "for profile gpu only", "minutes", "gang")
    started, store, planned = time.monotonic(), _store(a), _planned(a)
    if not a.searches:
        planned = [item for item in planned if item.purpose != "search"]
    seconds = batch.run(store, a.profile, planned, a.jobs, a.data, a.executor)
    since = time.monotonic()
    for line in collect(a.profile, results=a.results):
        print(line)
    summary = tables.write(store, plan(a.profile))
    if verdicts.NO_AGE in (store.folder / "tables/verdicts.csv").read_text("utf-8"):
        print(f"verdicts: {verdicts.NO_AGE}", file=sys.stderr)
    ours = summary.paper.isin({item.paper for item in planned}) & (summary.variant == "")
    print(tables.readable(summary[ours]).to_string(index=False))
    folder = store.folder if a.results else os.path.relpath(store.folder)
    for name in ("tables", "figures", "notebooks", "records.jsonl"):
        print(f"{name:13} {folder}/{name}")
    now = time.monotonic()
    seconds |= {"tables": now - since, "total": now - started}
    print("seconds:", ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def do_collect(a: Namespace) -> None:
    for line in collect(a.profile, a.folders, a.results, a.replace):
        print(line)
    if a.profile == "gpu":
        for line in minutes.page(Store("gpu", a.results, "cuda"), plan("gpu")):
            print(line)


def do_plan(a: Namespace) -> None:
    print(forecast(_planned(a)).to_string(index=False, float_format="{:.2f}".format))
    print(f"hours: an estimate, at {RATE:g} x 10^12 MACs of training a second (assumed);", end=" ")
    print("MACs: of the dense nets, three passes a step")


def do_list(a: Namespace) -> None:
    if a.what:
        right = (a.what == "method") == bool(a.name)
        require(right, "list", a.name or a.what, f"{', '.join(LISTS)} or method NAME")
        _require_unused(a, f"not with list {a.what}", "profile", "paper")
        print(*(f"{k:22} {text}" for k, text in _named(a.what, a.name).items()), sep="\n")
        return
    for item in _planned(a):
        target = f"{item.settings.target.value:.3f}" if item.settings.target else "-"
        words = (item.settings.run, item.paper, item.experiment, f"seed {item.settings.seed}")
        print(*words, f"target {target}", item.variant, sep="\t")


def _named(what: str, method: str) -> dict[str, str]:
    """What `prunestudy list WHAT` names, each with a word on it."""
    if what == "models":
        return models.describe()
    if what == "datasets":
        yours = {"folder:NAME": "your images, NAME/{train,test}/<class>/ below the data root"}
        return {name: datasets.info(name).title for name in datasets.names()} | yours
    if what == "methods":
        return {name: methods.method_class(name).title for name in methods.names()}
    if what == "papers":
        return {card.id: card.title for card in cards()}
    if what == "profiles":
        has = {name: [card.id for card in cards() if name in card.profiles] for name in PROFILES}
        return {k: ", ".join(ids) for k, ids in has.items()} | {"custom": "your own runs"}
    kind = methods.method_class(method)
    takes = " or ".join(f"{key} (of {methods.TARGETS[key]})" for key in kind.counts)
    about = {"method": f"{method} ({kind.title})", "target_kind": takes or "none, no target"}
    fields = kind.Settings.model_fields.items()
    return about | {f"params.{f.alias or k}": json.dumps(f.get_default()) for k, f in fields}


def do_status(a: Namespace) -> None:
    store, planned = _store(a), _planned(a)
    needed = {item.settings.run: item.settings for item in planned if item.purpose != "search"}
    states = {name: _state(store, settings, a.data) for name, settings in needed.items()}
    for state in sorted({*states.values(), "missing"}):
        print(f"{state:9} {[*states.values()].count(state)}")
    for name in (name for name, state in states.items() if state == "missing"):
        print(f"  {name}" + ("  (begun)" if store.work(name).exists() else ""))
    searches = {item.settings.run: item.settings for item in planned if item.purpose == "search"}
    left = sum(store.read(each) is None for name, each in searches.items() if name not in needed)
    if left:
        print(f"searches  {left} runs missing: prunestudy study --searches trains them as well")


def _state(store: Store, settings: RunSettings, data: str) -> str:
    if not (record := store.read(settings)):
        return "missing"
    try:
        found = datasets.fingerprint(settings.dataset, data)
    except InputError:
        return "data not here"
    return record["status"] if found in ("", record["data"]["fingerprint"]) else "other data"


def do_search(a: Namespace) -> int:
    found = search.grids(_store(a), _planned(a))
    complete = [grid for grid in found if grid.complete]
    differ = [grid for grid in complete if grid.differences]
    print(*(line for grid in found for line in search.lines(grid)), sep="\n")
    print(f"{len(found)} grids, {len(complete)} complete; in {len(differ)} the card differs")
    controls = search.strongest(found, a.profile)
    for (paper, *where, method), (best, now) in controls.items():
        print(f"{paper}: {method} against {best}, {', '.join(where)}; card: {now or '-'}")
    wrong = [place for place, (best, now) in controls.items() if best != now]
    return int(a.check and bool(differ or wrong))


def do_latency(a: Namespace) -> None:
    session.measure_latency(_store(a), _planned(a))


def do_run(a: Namespace) -> None:
    settings = {item.settings.run: item.settings for item in _planned(a)}
    for name in [_choose(begins, settings, _store(a)) for begins in a.runs]:
        _ensure(a, settings[name], a.weights)


def _ensure(a: Namespace, settings: RunSettings, weights: bool = False) -> str:
    """Train the run unless it is there, print a line of it; return its status."""
    show = sys.stderr.isatty() or "TQDM_DELAY" in os.environ
    record = Runner(_store(a), a.data, a.device, show).ensure(settings, weights)
    print(batch.line_of_run(record), flush=True)
    return record["status"]


def do_train(a: Namespace) -> int:
    a.profile, values = "custom", {}
    for pair in a.set:
        key, sign, text = pair.partition("=")
        require(bool(sign), "--set", pair, "must be KEY=VALUE")
        values[key] = value_of(text)
    settings, latest = own_settings(values, a.data), _store(a).folder / "latest"
    if latest.parent.is_dir():  # before the training
        writable_file(latest)
    status = _ensure(a, settings)
    write_text(latest, settings.run)  # for `_choose`
    if status == "done":
        return 0
    print(f"prunestudy: run = {settings.run}: {status}; a smaller lr may help", file=sys.stderr)
    return 1


def value_of(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _done(a: Namespace, begins: str) -> tuple[Store, str]:
    """The store, and the name of the finished run that begins so."""
    require_one_of("profile", a.profile, (*PROFILES, "custom"))
    store = _store(a)
    return store, _choose(begins, store.names(), store)


def do_show(a: Namespace) -> None:
    store, name = _done(a, a.first)
    print(json.dumps(store.require(name) | {"history": None}, indent=1))
    for row in store.history(name):
        print(*(f"{key}={value}" for key, value in row.items() if not pd.isna(value)))


def do_compare(a: Namespace) -> None:
    (store, first), (_, second) = _done(a, a.first), _done(a, a.second)
    rows = differences(store, first, second)
    print(rows.to_string() if len(rows) else "no difference")


def differences(store: Store, a: str, b: str) -> pd.DataFrame:
    """A column each for runs `a` and `b`, a row for all that differs; "-" for what one lacks.

    The last row says at which epoch the two histories part.
    """
    # What identifies a run and its files always differs.
    parts = ("settings", "data", "environment", "status", "validation", "metrics", "cost")
    records = [store.require(run) for run in (a, b)]
    flat = [pd.json_normalize({part: record[part] for part in parts}) for record in records]
    table = pd.concat(flat).astype(object).T.fillna("-").astype(str).set_axis([a, b], axis=1)
    table = table[table.iloc[:, 0] != table.iloc[:, 1]]
    first, second = (list(zip(*record["history"].values(), strict=True)) for record in records)
    if first != second:
        same = [one == other for one, other in zip(first, second, strict=False)]
        at = f"history from epoch {[*same, False].index(False) + 1}"
        table.loc[at] = f"{len(first)} epochs", f"{len(second)} epochs"
    return table


def do_export(a: Namespace) -> None:
    store, name = _done(a, a.first)
    status = store.require(name)["status"]
    require(status == "done", "run", name, f"is {status}; only finished nets are exported")
    writable_file(a.file, "file")
    net, shape = stored_net(store.require_weights(name))
    shrink.export(net, a.file, torch.rand(2, *shape))
    print(a.file)
