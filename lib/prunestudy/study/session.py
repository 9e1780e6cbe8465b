"""A paper at one size, as a notebook or a command sees it: plan, runs, tables, figures."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from prunestudy import datasets, measure, models, shrink
from prunestudy.errors import InputError, require, require_one_of, written_whole
from prunestudy.papers import card
from prunestudy.study import sentences, tables, verdicts
from prunestudy.study.plan import Planned, plan
from prunestudy.study.records import Store
from prunestudy.study.runs import Runner, stored_net
from prunestudy.study.settings import RunSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From this sparsity on, compressed rows are faster than a dense layer (see the bench).
_CSR_FROM = 0.8
# The parameters of every notebook; names of other values of plain types are refused.
_PARAMETERS = dict.fromkeys(("profile", "results", "data", "device"), str)
_PARAMETERS |= {"seeds": int, "epochs": int}
_PLAIN = (str, int, float, bool, list, dict, type(None))


class Session:
    """One paper in one profile.

    `seeds` and `epochs` other than 0 replace what the card says; such runs go to the folder
    "custom", so that they never mix with the study's own.
    """

    def __init__(
        self,
        paper: str,
        profile: str = "quick",
        seeds: int = 0,
        epochs: int = 0,
        results: str | Path = "",
        data: str | Path = "",
        device: str = "auto",
    ) -> None:
        self.paper, self.profile, self.seeds, self.epochs = paper, profile, seeds, epochs
        self.card, planned = card(paper), plan(profile, (paper,), seeds, epochs)
        store = Store("custom" if seeds or epochs else profile, results)
        self.runner = Runner(store, data, device)
        self.store = store = self.runner.store  # of the device that the runs are on
        # Of a search only what is there: it is trained when asked for.
        self.planned = [p for p in planned if p.purpose != "search" or store.read(p.settings)]

    @classmethod
    def of(cls, paper: str, space: Mapping[str, Any]) -> "Session":
        """The session that a notebook's parameters in `space` ask for, in the study's look.

        Parameters are the plain values among the notebook's names. Raises `InputError` with one
        line for one that there is not, and for a value of another type.
        """
        shell = space.get("get_ipython", dict)()  # it knows what the user's startup files left
        hidden = {"In", "Out", *getattr(shell, "user_ns_hidden", ())}
        plain = {name for name, value in space.items() if type(value) in _PLAIN} - hidden
        for name in sorted(name for name in plain if not name.startswith("_")):
            require_one_of("parameter", name, _PARAMETERS)
        for name, kind in _PARAMETERS.items():
            value = space.get(name)
            require(type(value) is kind, f"parameter {name}", value, f"of type {kind.__name__}")
        from prunestudy.study import figures  # late: it imports all that draws

        figures.style()
        return cls(paper, **{name: space[name] for name in _PARAMETERS})

    def run(self) -> None:
        """Train what is missing, and say how much that was."""
        missing = [p for p in self.planned if self.store.read(p.settings) is None]
        bar = tqdm(missing, disable=not missing, desc="runs", unit="run")
        for item in bar:
            bar.set_postfix_str(item.settings.run)
            self.runner.ensure(item.settings)
        print(f"{len(self.planned) - len(missing)} runs were there, {len(missing)} trained now.")

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run that is done."""
        return tables.runs_table(self.store, self.planned)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per setting."""
        return tables.summary_table(self.runs)

    def verdicts(self) -> pd.DataFrame:
        """One row per claim, net and data set, for people; by the tests that the card has."""
        table = verdicts.verdicts_table(self.store, self.planned, self.card, images=True)
        return tables.readable_verdicts(table)

    def says(self, method: str, against: str = "", **what: Any) -> sentences.Sentence:
        """A sentence about `method`'s results that the records make; see `sentences.says`."""
        return sentences.says(self.store, self.planned, self.card, method, against, **what)

    def measured(
        self, methods: Iterable[str], quantities: Sequence[sentences.Quantity]
    ) -> pd.DataFrame:
        """Means of `quantities` by setting; `methods` are labels of the card, as for `says`."""
        return sentences.measured(self.store, self.planned, methods, quantities)

    def figure(self, name: str, drawn: "Figure") -> "Figure":
        """Save `drawn` under the paper's name and return it."""
        from prunestudy.study import figures  # late: it imports all that draws

        path = self.store.folder / "figures" / f"{self.paper}_{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            part.write_bytes(figures.as_png(drawn))
        return drawn

    def find(self, method: str, target: float | None, **where: Any) -> RunSettings:
        """The first planned run of `method` at `target` with settings `where`, or `InputError`."""
        wanted = {"method": method} | where
        for item in self.planned:
            s, value = item.settings, item.settings.target and item.settings.target.value
            same = all(getattr(s, key) == each for key, each in wanted.items())
            if same and value == target and not item.variant:
                return s
        raise InputError(f"run = {method} at {target}: not planned in {self.profile}")

    def found(self, methods: Iterable[str], target: float, **where: Any) -> dict[str, str]:
        """Method -> first run at `target` of those `methods` that the profile has there."""
        runs = {}
        for method in methods:
            with contextlib.suppress(InputError):
                runs[method] = self.find(method, target, **where).run
        return runs


def measure_latency(store: Store, planned: list[Planned], rounds: int = 30) -> int:
    """Time the nets of the first seed against the dense net, interleaved; return how many.

    Weight-sparse linear layers compute from compressed rows. One thread. The dense net is a fresh
    one, since time does not depend on weights. Nets that are not on disk are left out.
    """
    waiting = {item.settings.run: item.settings for item in planned if is_untimed(store, item)}
    form = f"linear layers of at least {_CSR_FROM:.0%} zeros from compressed rows (CSR)"
    for run, settings in tqdm(waiting.items(), desc="latency", unit="net", disable=not waiting):
        ms = _milliseconds(store, settings, rounds)
        store.write_latency(run, {"ms": ms, "threads": 1, "rounds": rounds, "form": form})
    return len(waiting)


def is_untimed(store: Store, item: Planned) -> bool:
    """Whether the net of `item` is there and still to be timed (the first seed of results only)."""
    settings = item.settings
    pruned = settings.parent is not None or settings.method != "dense"
    if not item.first or item.purpose != "results" or not pruned:
        return False
    # The stored record may be that of another training than the net that is here.
    both = store.read(settings), store.trained(store.place(settings.run))
    waiting = all(r and r["status"] == "done" and r["latency"] is None for r in both)
    return waiting and store.weights(settings.run).exists()


def _milliseconds(store: Store, settings: RunSettings, rounds: int) -> dict[str, float]:
    info = datasets.info(settings.dataset)
    small, _ = stored_net(store.require_weights(settings.run))
    dense = models.build(settings.model, info.shape, info.num_classes)
    nets, times = {"latency": shrink.to_csr(small, _CSR_FROM), "dense_latency": dense}, {}
    for batch in (1, 128):
        median = measure.latency(nets, torch.zeros(batch, *info.shape), rounds, threads=1)
        times |= {f"{name}_b{batch}_ms": round(ms, 5) for name, ms in median.items()}
    return times
