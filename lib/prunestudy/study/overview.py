"""The five papers side by side: what each setting costs and gains, said in words, claim by claim.

Everything is made from the rows of runs.csv and from records. A sentence is made from the row that
it rests on, so that the two cannot disagree.
"""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from prunestudy.errors import InputError, require_one_of
from prunestudy.methods import method_class
from prunestudy.papers import cards
from prunestudy.study import tables
from prunestudy.study.plan import Planned, Tiny, plan
from prunestudy.study.records import Store
from prunestudy.study.tables import KEYS
from prunestudy.study.verdicts import Interval, judged

# Each paper's method with its strongest control: what chooses by rule where the paper learns.
DUELS = {
    "sparse_gates": "gradual_magnitude",
    "force": "plain_low_rank",
    "gdp": "group_l2",
    "magnitude_attention": "gradual_magnitude",
    "component_aware": "uniform",
}
# What may matter about a net, as a share of the dense one, and how a sentence calls it.
COSTS = {
    "weights": "weights",
    "macs": "MACs",
    "nonzero_macs": "MACs with non-zero weights",
    "time_b1": "time for one image",
    "time_b128": "time for 128 images",
    "memory": "peak memory",
    "bytes": "bytes on disk",
    "training": "training time",
}
# A setting counts as equally small up to this share, since targets are met to a channel only.
SLACK = 0.1
# Settings are compared where these are equal.
_SAME = ["model", "dataset", "epochs", "device"]


def settings_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per setting that is done: its summary, difference to dense, and `COSTS`.

    `label` names it for people; `combined` marks two methods, one after the other. Costs are
    shares of the dense net of the same model, data, total epochs and device: means over seeds,
    times of seed 0, training (parents included) a median over seeds with its range `training_low`
    to `training_high`. Raises `InputError` if no run is done.
    """
    done = runs[(runs["status"] == "done") & ~runs["stage"].isin(["start", "half"])]
    if done.empty:
        raise InputError("overview: no run is done yet")
    done = done.assign(**_shares(done, runs))
    groups = done.groupby(KEYS, dropna=False)
    costs = groups[[*COSTS]].mean()
    training = groups["training"].agg(["median", "min", "max"])
    costs[["training", "training_low", "training_high"]] = training
    costs["scores"] = groups.apply(lambda group: group.set_index("seed")["metric"].to_dict())
    rows = tables.summary_table(done).merge(costs.reset_index(), on=KEYS)
    order = list(dict.fromkeys(["dense", *DUELS, *rows["method"]]))
    rows = rows.assign(
        combined=rows["stage"] == "combined",
        order=rows["method"].map(order.index),
        low=rows["difference_low"],
        high=rows["difference_high"],
    )
    rows["label"] = [_label(row) for row in rows.itertuples()]
    by = ["dataset", "combined", "order", "target_kind", "target"]
    return rows.sort_values(by, ignore_index=True, kind="stable")


def _label(row: Any) -> str:
    removed = f", {tables.removed(row.target, row.target_kind)} removed" if row.target_kind else ""
    return name_of(row) + removed


def name_of(row: Any) -> str:
    """A row's method for people; of a combination also what came first."""
    if row.stage == "combined":
        return f"{row.variant.removeprefix('after ')} + {method_class(row.method).title}"
    return tables.setting_title(row)


def _shares(done: pd.DataFrame, runs: pd.DataFrame) -> dict[str, pd.Series]:
    """`COSTS` of each run that is done; training counts all runs that it continues."""
    seconds = runs.set_index(["run", "device"])["train_seconds"].to_dict()
    parents = dict(zip(runs["run"], runs["parent"], strict=True))

    def training(run: str, device: str) -> float:
        before = training(parents[run], device) if parents.get(run) else 0.0
        return seconds.get((run, device), math.nan) + before

    pairs = zip(done["run"], done["device"], strict=True)
    done = done.assign(training=[training(*pair) for pair in pairs])
    dense = done[(done["method"] == "dense") & (done["variant"] == "")]

    def of_dense(name: str, *more: str) -> pd.Series:
        keys = [*_SAME, *more]
        mean = dense.groupby(keys)[name].mean()
        return mean.reindex(pd.MultiIndex.from_frame(done[keys])).set_axis(done.index)

    return {
        "weights": done["nonzeros"] / done["dense_parameters"],
        "macs": done["macs"] / done["dense_macs"],
        "nonzero_macs": done["nonzero_macs"] / done["dense_macs"],
        "time_b1": done["latency_b1_ms"] / done["dense_latency_b1_ms"],
        "time_b128": done["latency_b128_ms"] / done["dense_latency_b128_ms"],
        "memory": done["peak_memory_mb"] / of_dense("peak_memory_mb"),
        "bytes": done["bytes"] / of_dense("bytes"),
        "training": done["training"] / of_dense("training", "seed"),
    }


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `settings_table` for people; costs in percent of dense, empty if not measured."""
    told = {
        "setting": rows["label"],
        "n": rows["n"],
        "result": [tables.result(row) for row in rows.itertuples()],
        "minus dense": [tables.difference(row) for row in rows.itertuples()],
    }
    for cost, words in COSTS.items():
        told[f"{words}, %"] = ["" if pd.isna(x) else f"{100 * x:.3g}" for x in rows[cost]]
    return pd.DataFrame(told)


def shared(planned: list[Planned], tiny: Tiny, profile: str) -> pd.DataFrame:
    """How many runs of each of the overview's experiments are a paper's own, how many are added."""
    ids = tuple(card.id for card in cards() if card.is_paper and profile in card.profiles)
    theirs = {item.settings.run for item in plan(profile, ids, tiny)}
    runs = {item.settings.run: item.experiment for item in reversed(planned)}
    table = pd.DataFrame({"experiment": runs.values(), "theirs": [run in theirs for run in runs]})
    count = table.groupby("experiment")["theirs"].agg(runs="count", shared="sum")
    return count.assign(added=count["runs"] - count["shared"]).reset_index()


def smallest(rows: pd.DataFrame, cost: str, at_least: float) -> pd.Series | None:
    """The setting to take for a small `cost` if the mean may differ from dense by `at_least`.

    Of those that stay above the limit the one of smallest cost; of all within `SLACK` of it the
    most accurate. None if there is none, or none that has been measured. Raises `InputError` for a
    cost that is not one of `COSTS`.
    """
    require_one_of("cost", cost, COSTS)
    able = rows[(rows["method"] != "dense") & (rows["difference"] >= at_least)]
    near = able[able[cost] <= (1 + SLACK) * able[cost].min()]
    return near.loc[near["difference"].idxmax()] if len(near) else None


def which_when(rows: pd.DataFrame, at_least: float) -> list[str]:
    """One sentence for each of `COSTS`, made of the numbers of the row that it rests on.

    `rows` are of one net and data set; see `smallest`. Each says whether the 95% interval lies
    above the limit as well.
    """
    sentences = []
    for cost, words in COSTS.items():
        row = smallest(rows, cost, at_least)
        if row is None:
            continue
        reach = "stays above" if row["low"] >= at_least else "reaches below"
        certainty = f"the interval {reach} the limit" if row["n"] > 1 else "one seed, no interval"
        sentences.append(
            f"If it is about {words}: {row['label']}. That is {_percent(row[cost])} of dense, at "
            f"{tables.difference(row)} points against dense (n = {row['n']}); {certainty}."
        )
    return sentences


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _compared(ours: pd.Series, theirs: pd.Series) -> dict[str, Any]:
    """The paired per-seed difference of the metric between two rows of `settings_table`.

    "better" or "worse" if its 95% interval lies on one side of zero, else "not told apart".
    """
    score = theirs["scores"]
    pairs = [value - score[seed] for seed, value in ours["scores"].items() if seed in score]
    difference = Interval.of(pairs)
    verdict = "not told apart"
    if difference.low > 0:
        verdict = "better"
    elif difference.high < 0:
        verdict = "worse"
    names = ("n", "mean", "low", "high")
    return {name: getattr(difference, name) for name in names} | {"verdict": verdict}


def duels(rows: pd.DataFrame) -> pd.DataFrame:
    """Each paper's method against all others at the same target, seed by seed; a pair once."""
    plain = rows[~rows["combined"] & (rows["method"] != "dense")]
    keys = [*_SAME, "target_kind", "target"]
    found = []
    for place, ours in plain[plain["method"].isin(DUELS)].iterrows():
        like = plain[(plain[keys] == ours[keys]).all(axis=1)]
        for _, theirs in like[~like["method"].isin(DUELS) | (like.index > place)].iterrows():
            row = {name: ours[name] for name in ("dataset", "label", "method")}
            strongest = DUELS[ours["method"]] == theirs["method"]
            row |= {"other": theirs["method"], "strongest": strongest}
            found.append(row | _compared(ours, theirs))
    columns = "dataset label method other strongest n mean low high verdict".split()
    return pd.DataFrame(found, columns=columns)


def readable_duels(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `duels` for people; differences in points."""
    numbers = 100 * table[["mean", "low", "high"]]
    return pd.DataFrame(
        {
            "data": table["dataset"].map(tables.datasets_title),
            "setting": table["label"],
            "against": [method_class(name).title for name in table["other"]],
            "its control": table["strongest"].map({True: "strongest", False: ""}),
            "n": table["n"],
            "points": [tables.bracket(*row) for row in numbers.itertuples(index=False)],
            "verdict": table["verdict"],
        }
    )


def what_learning_gains(table: pd.DataFrame) -> list[str]:
    """One sentence per paper: its method against its strongest control, counted in `duels`."""
    sentences = []
    for (method, other), part in table[table["strongest"]].groupby(["method", "other"], sort=False):
        better, worse, neither = (
            (part["verdict"] == verdict).sum() for verdict in ("better", "worse", "not told apart")
        )
        sentences.append(
            f"{method_class(method).title} against {method_class(other).title}: better in "
            f"{better}, worse in {worse}, not told apart in {neither} of {len(part)} settings."
        )
    return sentences


def rival(rows: pd.DataFrame, combination: pd.Series) -> pd.Series | None:
    """The best single setting that is as small as `combination`: in weights, or in MACs.

    The combination's last target says in which; the rival may be larger by `SLACK`.
    """
    cost = "weights" if combination["target_kind"] == "sparsity" else "macs"
    like = rows[~rows["combined"] & (rows["method"] != "dense")]
    like = like[(like[_SAME] == combination[_SAME]).all(axis=1)]
    like = like[like[cost] <= (1 + SLACK) * combination[cost]]
    return like.loc[like["metric"].idxmax()] if len(like) else None


def combinations(rows: pd.DataFrame) -> pd.DataFrame:
    """Two methods, one after the other, against the best single one of that size, for people."""
    found = []
    for _, ours in rows[rows["combined"]].iterrows():
        single = rival(rows, ours)
        if single is None:
            continue
        compared = _compared(ours, single)
        sizes = " and ".join(
            f"{_percent(ours[cost])} of the {COSTS[cost]} instead of {_percent(single[cost])}"
            for cost in ("weights", "macs")
        )
        difference = tables.bracket(*(100 * compared[name] for name in ("mean", "low", "high")))
        row = (ours["label"], tables.difference(ours), single["label"], compared["n"], difference)
        found.append((*row, f"the pair is {compared['verdict']}, with {sizes}"))
    columns = ["pair", "minus dense", "best single of that size", "n", "minus single", "so"]
    return pd.DataFrame(found, columns=columns)


def claims(profile: str, store: Store, tiny: Tiny) -> pd.DataFrame:
    """Every claim of every paper: its rule, the verdict in `profile`, and the record to look at.

    `record` names the compared runs of the first seed.
    """
    found = []
    for paper in (card for card in cards() if card.is_paper):
        planned = plan(profile, (paper.id,), tiny) if profile in paper.profiles else []
        found.append(judged(store, planned, paper).assign(paper=paper.short or paper.title))
    return pd.concat(found, ignore_index=True)


def readable_claims(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Paper by paper, the claims for people, in the metric's own unit; a claim's text once."""
    for paper, part in table.groupby("paper", sort=False):
        text = part["says"] + " [" + part["mark"] + "]"
        numbers = part[["difference", "low", "high"]].astype(float)
        shown = {
            "claim": text.mask(text.duplicated(), ""),
            "verdict": part["verdict"],
            "rule": part["rule"].fillna(part.get("why", "")),
            "where": part["where"].fillna(""),
            "difference": [tables.bracket(*row, 4) for row in numbers.itertuples(index=False)],
            "n": ["" if pd.isna(n) else int(n) for n in part["n"]],
            "record": part["record"],
        }
        yield str(paper), pd.DataFrame(shown)
