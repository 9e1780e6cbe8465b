"""The five papers side by side: what each setting costs and gains, said in words, claim by claim.

Everything is made from the rows of runs.csv and from records. A sentence is made from the row that
it rests on, so that the two cannot disagree.
"""

import math
from collections.abc import Iterator

import pandas as pd

from prunestudy.errors import InputError, require_one_of
from prunestudy.methods import method_class
from prunestudy.papers import Card, cards
from prunestudy.study import tables, verdicts
from prunestudy.study.plan import Planned, Tiny, plan
from prunestudy.study.records import Store
from prunestudy.study.tables import KEYS, Interval

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
# A combination's rival may be so much larger, since targets are met to a channel only.
SLACK = 0.1
_AFTER = "after "
# Runs that others begin with; they have seen fewer epochs than what is compared.
_BEGINNINGS = ["start", "half"]


def settings_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per setting that is done: metric, difference to dense, and `COSTS`.

    `label` names it for people; `combined` marks two methods, one after the other. Costs are
    shares of the dense net of the same model, data and total epochs: means over seeds, times of
    seed 0, training (parents included) a median over seeds with its range `training_low` to
    `training_high`. Raises `InputError` if no run is done.
    """
    done = runs[(runs["status"] == "done") & ~runs["variant"].isin(_BEGINNINGS)]
    if done.empty:
        raise InputError("overview: no run is done yet")
    shares = done.assign(**_shares(done, _total_seconds(runs)))
    rows = [_setting(group) for _, group in shares.groupby(KEYS, dropna=False, sort=False)]
    table = pd.DataFrame(rows)
    order = table["method"].map(list(dict.fromkeys(["dense", *DUELS, *table["method"]])).index)
    by = ["dataset", "combined", "order", "target_kind", "target"]
    table = table.assign(order=order).sort_values(by, ignore_index=True)
    return table.drop(columns="order")


def _setting(group: pd.DataFrame) -> dict:
    first = group.iloc[0]
    difference = Interval.of(list((group["metric"] - group["dense_metric"]).dropna()))
    return {
        "label": _label(first),
        **{key: first[key] for key in KEYS},
        "combined": first["variant"].startswith(_AFTER),
        "n": len(group),
        "metric": group["metric"].mean(),
        "metric_sd": group["metric"].std(),
        "difference": difference.mean,
        "difference_sd": difference.sd,
        "low": difference.low,
        "high": difference.high,
        **{name: group[name].mean() for name in COSTS if name != "training"},
        "training": group["training"].median(),
        "training_low": group["training"].min(),
        "training_high": group["training"].max(),
    }


def _label(row: pd.Series) -> str:
    name = name_of(row["method"], row["variant"])
    if pd.isna(row["target"]):
        return name
    return f"{name}, {tables.removed(row['target'], row['target_kind'])} removed"


def name_of(method: str, variant: str) -> str:
    """A method for people; of a combination ("after GDP") also what came first."""
    first, title = variant.removeprefix(_AFTER), method_class(method).title
    if variant.startswith(_AFTER):
        return f"{first} + {title}"
    return f"{title}, {variant}" if variant else title


def _shares(done: pd.DataFrame, seconds: pd.Series) -> dict[str, pd.Series]:
    dense = done[(done["method"] == "dense") & (done["variant"] == "")]
    where = ["model", "dataset", "epochs"]
    size = dense.groupby(where)[["peak_memory_mb", "bytes"]].mean()
    like = size.reindex(pd.MultiIndex.from_frame(done[where])).set_index(done.index)
    own = seconds[dense["run"]].set_axis(pd.MultiIndex.from_frame(dense[[*where, "seed"]]))
    same = own.reindex(pd.MultiIndex.from_frame(done[[*where, "seed"]])).to_numpy()
    return {
        "weights": done["nonzeros"] / done["dense_parameters"],
        "macs": done["macs"] / done["dense_macs"],
        "nonzero_macs": done["nonzero_macs"] / done["dense_macs"],
        "time_b1": done["latency_b1_ms"] / done["dense_latency_b1_ms"],
        "time_b128": done["latency_b128_ms"] / done["dense_latency_b128_ms"],
        "memory": done["peak_memory_mb"] / like["peak_memory_mb"],
        "bytes": done["bytes"] / like["bytes"],
        "training": pd.Series(seconds[done["run"]].to_numpy() / same, done.index),
    }


def _total_seconds(runs: pd.DataFrame) -> pd.Series:
    """Training seconds of each run (by name) and of all that had to be trained before it."""
    parent = dict(zip(runs["run"], runs["parent"], strict=True))
    own = dict(zip(runs["run"], runs["train_seconds"], strict=True))

    def total(run: str) -> float:
        return own.get(run, math.nan) + (total(parent[run]) if parent.get(run) else 0.0)

    return pd.Series({run: total(run) for run in own}, dtype=float)


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `settings_table` for people; costs in percent of dense, empty if not measured."""
    told = {
        "setting": rows["label"],
        "n": rows["n"],
        "result": [tables.result(row) for row in rows.itertuples()],
        "minus dense": [_points(row) for _, row in rows.iterrows()],
        **{f"{words}, %": [_cell(x) for x in rows[cost]] for cost, words in COSTS.items()},
    }
    return pd.DataFrame(told)


def _cell(share: float) -> str:
    return "" if pd.isna(share) else f"{100 * share:.3g}"


def shared(planned: list[Planned], tiny: Tiny, profile: str) -> pd.DataFrame:
    """How many runs of each of the overview's experiments are a paper's own, how many are added."""
    papers = tuple(each.id for each in cards() if each.is_paper and profile in each.profiles)
    theirs = {item.settings.run for item in plan(profile, papers, tiny)}
    runs = {item.settings.run: item.experiment for item in reversed(planned)}
    table = pd.DataFrame({"experiment": runs.values(), "theirs": [run in theirs for run in runs]})
    count = table.groupby("experiment")["theirs"].agg(runs="count", shared="sum")
    return count.assign(added=count["runs"] - count["shared"]).reset_index()


def smallest(rows: pd.DataFrame, cost: str, at_least: float) -> pd.Series | None:
    """The setting to take if it is about `cost` and the mean may differ from dense by `at_least`.

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
    chosen = {words: (cost, smallest(rows, cost, at_least)) for cost, words in COSTS.items()}
    return [
        f"If it is about {words}: {row['label']}. That is {_percent(row[cost])} of dense, at "
        f"{_points(row)} points against dense (n = {row['n']}); {_certainty(row, at_least)}."
        for words, (cost, row) in chosen.items()
        if row is not None
    ]


def _certainty(row: pd.Series, at_least: float) -> str:
    if row["n"] < 2:
        return "one seed, no interval"
    above = row["low"] >= at_least
    return "the interval stays above the limit" if above else "the interval reaches below the limit"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _points(row: pd.Series) -> str:
    return tables.bracket(100 * row["difference"], 100 * row["low"], 100 * row["high"])


def against(runs: pd.DataFrame, ours: pd.Series, theirs: pd.Series) -> Interval:
    """Paired per-seed difference of the metric between two rows of `settings_table`."""
    values = [_by_seed(runs, row) for row in (ours, theirs)]
    return Interval.of(list((values[0] - values[1]).dropna()))


def _by_seed(runs: pd.DataFrame, row: pd.Series) -> pd.Series:
    same = runs["status"] == "done"
    for key in KEYS:
        same &= runs[key].isna() if pd.isna(row[key]) else runs[key] == row[key]
    return runs[same].set_index("seed")["metric"]


def verdict(difference: Interval) -> str:
    """ "better" or "worse" if the 95% interval lies on one side of zero, else "not told apart"."""
    if difference.n >= 2 and difference.low > 0:
        return "better"
    return "worse" if difference.n >= 2 and difference.high < 0 else "not told apart"


def duels(runs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Each paper's method against all others at the same target, seed by seed; a pair once."""
    plain = rows[~rows["combined"] & (rows["method"] != "dense")]
    made = []
    for place, ours in plain[plain["method"].isin(DUELS)].iterrows():
        earlier = plain["method"].isin(DUELS) & (plain.index <= place)
        like = plain[~earlier]
        for key in ("model", "dataset", "epochs", "target_kind", "target"):
            like = like[like[key] == ours[key]]
        made += [_duel(runs, ours, theirs) for _, theirs in like.iterrows()]
    columns = "dataset label method other strongest n mean low high verdict".split()
    return pd.DataFrame(made, columns=columns)


def _duel(runs: pd.DataFrame, ours: pd.Series, theirs: pd.Series) -> dict:
    found = against(runs, ours, theirs)
    return {
        "dataset": ours["dataset"],
        "label": ours["label"],
        "method": ours["method"],
        "other": theirs["method"],
        "strongest": DUELS[ours["method"]] == theirs["method"],
        **{"n": found.n, "mean": found.mean, "low": found.low, "high": found.high},
        "verdict": verdict(found),
    }


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
        count = part["verdict"].value_counts()
        sentences.append(
            f"{method_class(method).title} against {method_class(other).title}: better in "
            f"{count.get('better', 0)}, worse in {count.get('worse', 0)}, "
            f"not told apart in {count.get('not told apart', 0)} of {len(part)} settings."
        )
    return sentences


def rival(rows: pd.DataFrame, combination: pd.Series) -> pd.Series | None:
    """The best single setting that is as small as `combination`: in weights, or in MACs.

    The combination's last target says in which; the rival may be larger by `SLACK`.
    """
    cost = "weights" if combination["target_kind"] == "sparsity" else "macs"
    like = rows[~rows["combined"] & (rows["method"] != "dense")]
    for key in ("model", "dataset", "epochs"):
        like = like[like[key] == combination[key]]
    like = like[like[cost] <= (1 + SLACK) * combination[cost]]
    return like.loc[like["metric"].idxmax()] if len(like) else None


def combinations(runs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Two methods, one after the other, against the best single one of that size, for people."""
    found = [(ours, rival(rows, ours)) for _, ours in rows[rows["combined"]].iterrows()]
    made = [_pair(runs, ours, single) for ours, single in found if single is not None]
    columns = ["pair", "minus dense", "best single of that size", "n", "minus single", "so"]
    return pd.DataFrame(made, columns=columns)


def _pair(runs: pd.DataFrame, ours: pd.Series, single: pd.Series) -> dict:
    found = against(runs, ours, single)
    sizes = " and ".join(
        f"{_percent(ours[cost])} of the {COSTS[cost]} instead of {_percent(single[cost])}"
        for cost in ("weights", "macs")
    )
    return {
        "pair": ours["label"],
        "minus dense": _points(ours),
        "best single of that size": single["label"],
        "n": found.n,
        "minus single": tables.bracket(*(100 * x for x in (found.mean, found.low, found.high))),
        "so": f"the pair is {verdict(found)}, with {sizes}",
    }


def claims(profile: str, store: Store, tiny: Tiny) -> pd.DataFrame:
    """Every claim of every paper: its rule, the verdict in `profile`, and the record to look at.

    `record` names the compared runs of the first seed.
    """
    found = [_claims_of(paper, profile, store, tiny) for paper in cards() if paper.is_paper]
    return pd.concat(found, ignore_index=True)


def _claims_of(paper: Card, profile: str, store: Store, tiny: Tiny) -> pd.DataFrame:
    planned = plan(profile, (paper.id,), tiny) if profile in paper.profiles else []
    table = verdicts.judged(store, planned, paper)
    table.insert(0, "paper", paper.short or paper.title)
    return table


def readable_claims(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Paper by paper, the claims for people, in the metric's own unit; a claim's text once."""
    for paper, part in table.groupby("paper", sort=False):
        rows = [_claim(row) for row in part.to_dict("records")]
        shown = pd.DataFrame(rows)
        yield str(paper), shown.assign(claim=shown["claim"].mask(shown["claim"].duplicated(), ""))


def _claim(row: dict) -> dict:
    told = {"claim": f"{row['says']} [{row['mark']}]", "verdict": row["verdict"]}
    if not isinstance(row.get("rule"), str):
        return told | {"rule": row["why"], **dict.fromkeys(_TESTED, ""), "record": ""}
    numbers = (row[key] for key in ("difference", "low", "high"))
    difference = tables.bracket(*numbers, digits=4)
    values = (row["where"], difference, int(row["n"]))
    return (
        told
        | {"rule": row["rule"], **dict(zip(_TESTED, values, strict=True))}
        | {"record": row["record"]}
    )


_TESTED = ("where", "difference", "n")
