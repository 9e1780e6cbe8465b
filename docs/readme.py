"""Write README's table of the papers from the records of profile cpu: `python docs/readme.py`."""

import sys
from collections.abc import Iterator

import pandas as pd

from prunestudy import models
from prunestudy.errors import InputError
from prunestudy.methods import method_class
from prunestudy.papers import Card, card, cards
from prunestudy.places import home
from prunestudy.study import tables
from prunestudy.study.plan import plan
from prunestudy.study.records import Store
from prunestudy.study.statistics import OUTCOMES
from prunestudy.study.verdicts import called, claims_table, verdicts_table

BEGIN = "<!-- results: made by `python docs/readme.py` -->\n"
END = "<!-- end of results -->"
_WAITS, _SO_FAR = "Not yet judged.", "So far "


def judged(store: Store, profile: str) -> dict[str, pd.DataFrame]:
    """Paper -> its table of verdicts, of all papers that the profile has runs of."""
    planned = plan(profile)
    papers = dict.fromkeys(item.paper for item in planned if card(item.paper).is_paper)
    return {paper: verdicts_table(store, planned, card(paper)) for paper in papers}


def headline(paper: Card) -> tuple[str, ...]:
    """The claims that a paper is read for: better than others, or else the first with a test.

    A claim whose text goes on ("...") takes its neighbour along.
    """
    primary = [c for c in paper.claims if any(rule.primary for rule in c.tests)]
    ahead = [c for c in primary if any(rule.against == "strongest" for rule in c.tests)]
    place = paper.claims.index((ahead or primary)[0])
    first = place - paper.claims[place].text.startswith("...")
    last = place + paper.claims[place].text.endswith("...")
    return tuple(claim.id for claim in paper.claims[first : last + 1])


def came_out(rows: pd.DataFrame) -> str:
    """What came out of one claim, from its rows of `verdicts_table`, in one phrase.

    Its verdicts, with the differences of scores; of nets without any, on how many the intervals
    over seeds tell a difference. Of several controls it is the hardest to beat on that net.
    """
    seen = rows[rows.verdict.str.startswith("not tested") & (rows.n > 1)]
    tested = rows[rows.verdict.isin(OUTCOMES)]
    if len(tested) or seen.empty:
        text = claims_table(rows).verdict[0] + sizes(tested)
        found = text + against(tested)
        judged_on = {*zip(tested.model, tested.dataset, strict=True)}
        pairs = zip(seen.model, seen.dataset, strict=True)
        others = seen[[pair not in judged_on for pair in pairs]]
        more = f" {came_out(others)}" if len(tested) and len(others) else ""
        return f"{found[0].upper()}{found[1:]}.{_failed(rows)}{more}"
    names = [method_class(name.partition(",")[0]).title for name in seen.control.unique() if name]
    other = names[0].replace("dense", "the dense net") if names else "the limit"
    other = f"the strongest of {len(names)} controls" if len(names) > 1 else other
    other = "the strongest control" if (seen.chosen_by == "search").all() else other
    hardest = seen.sort_values("mean").drop_duplicates(["model", "dataset"])
    ways = ["ahead"] * int((hardest.low > 0).sum()) + ["behind"] * int((hardest.high < 0).sum())
    ways += ["not told apart"] * (len(hardest) - len(ways))
    counts = ", ".join(f"{way} on {ways.count(way)}" for way in dict.fromkeys(ways))
    if len(ways) == 1:
        return f"{_SO_FAR}{ways[0]} on {nets(hardest)[3:]}, against {other}."
    return f"{_SO_FAR}{counts} of {len(hardest)} nets, against {other}."


def against(tested: pd.DataFrame) -> str:
    """What the claim was tested against, if that is one thing: ", against the dense net"."""
    if len(tested) and (tested.chosen_by == "search").all():
        return ", against the strongest control"
    names = {called(name).replace("dense", "the dense net") for name in tested.control if name}
    return f", against {names.pop()}" if len(names) == 1 else ""


def _failed(rows: pd.DataFrame) -> str:
    """What the claim's rows say of controls that fail on some seeds: how the others compare."""
    told = ""
    for row in rows[rows.failures.str.contains(" fails ") & (rows.n > 0)].itertuples():
        place = net(row.model, row.dataset)
        told += f" On {place}, {row.failures}; on the others the difference is"
        told += f"{sizes(rows.loc[[row.Index]]).replace('(', '').replace(')', '')}."
    return told


def sizes(rows: pd.DataFrame) -> str:
    """The mean differences of scores in `rows` for people; empty for other metrics."""
    if rows.empty or not rows.scored.iloc[0]:
        return ""
    factor, unit = tables.UNITS[rows.scored.iloc[0]]
    means = ", ".join(f"{factor * mean:+.2f}" for mean in rows["mean"])
    return f" ({means}{unit.replace('%', ' points')})"


def net(model: str, dataset: str) -> str:
    """A net and its data for people: "LeNet-5 on MNIST"."""
    return f"{models.title(model)} on {tables.datasets_title(dataset)}"


def nets(rows: pd.DataFrame) -> str:
    """How many nets the rows of tests are of, and which."""
    planned = rows[(rows.verdict != "") & (rows.n > 0)]
    found = planned[["model", "dataset"]].drop_duplicates()
    names = [net(*pair) for pair in found.to_numpy()]
    return f"{len(names)}: {', '.join(names)}" if names else "none"


def lines(found: dict[str, pd.DataFrame]) -> Iterator[dict[str, str]]:
    """One row per paper: what it claims, what came out, on how many nets, its notebook."""
    for paper in (each for each in cards() if each.is_paper and each.id in found):
        wanted = headline(paper)
        rows = found[paper.id][found[paper.id].claim.isin(wanted)]
        texts = [claim.text for claim in paper.claims if claim.id in wanted]
        phrases = {name: came_out(rows[rows.claim == name]) for name in wanted}
        waits = any(phrase.startswith(_SO_FAR) for phrase in phrases.values())
        told = [f"*{n.replace('_', ' ')}*: " * (len(wanted) > 1) + p for n, p in phrases.items()]
        number = paper.notebook[:2]
        yield {
            "paper": f"{paper.short or paper.title} ({paper.year})",
            "claims": " ".join(texts).replace("... ...", "..."),
            "came out": " ".join([_WAITS] * waits + told),
            "nets": nets(rows),
            "notebook": f"[{number}](notebooks/{paper.notebook}.ipynb), "
            f"[with results](results/cpu/notebooks/{paper.notebook}.ipynb)",
        }


def in_all(found: dict[str, pd.DataFrame]) -> str:
    """What came out of all claims of all papers together, and which are contradicted."""
    rows = pd.concat(found.values(), ignore_index=True)
    worst = {word: [] for word in ("contradicted", "undecided", "confirmed")}
    for (paper, claim_id), claim in rows.groupby(["paper", "claim"], sort=False):
        verdicts, name = {*claim.verdict}, card(paper).short or card(paper).title
        if word := next((word for word in worst if word in verdicts), ""):
            of = claim[claim.verdict == word]
            where = ", ".join(net(*pair) for pair in zip(of.model, of.dataset, strict=True))
            worst[word].append(f"{name}, *{claim_id.replace('_', ' ')}*, on {where}{sizes(of)}")
    several = rows.groupby(["paper", "claim"]).ngroups
    which = f" ({'; '.join(worst['contradicted'])})" if worst["contradicted"] else ""
    return (
        f"Each row has the claim that its paper is best known for. Of the papers' {several} "
        f"claims, {sum(map(len, worst.values()))} have a verdict. Confirmed on every net that they "
        f"were tested on: {len(worst['confirmed'])}. Contradicted on at least one: "
        f"{len(worst['contradicted'])}{which}. Undecided on at least one, contradicted on none: "
        f"{len(worst['undecided'])}."
    )


def filled(page: str, found: dict[str, pd.DataFrame]) -> str:
    """`page` with the table of the papers between the two comments.

    Raises `InputError` if the page has no such pair.
    """
    before, begun, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (begun and closed):
        raise InputError("readme: has no pair of results comments")
    rows = [*lines(found)]
    table = [[*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    text = "".join(f"| {' | '.join(row)} |\n" for row in table)
    return f"{before}{BEGIN}\n{text}\n{in_all(found)}\n\n{END}{after}"


if __name__ == "__main__":
    path = home() / "README.md"
    try:
        text = filled(path.read_text("utf-8"), judged(Store("cpu"), "cpu"))
    except InputError as error:
        sys.exit(str(error))
    path.write_text(text, "utf-8")
