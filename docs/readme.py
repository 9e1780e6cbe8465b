"""Write README's table of results from the records of profile cpu: `python docs/readme.py`."""

import sys

import pandas as pd

from prunestudy.errors import InputError
from prunestudy.places import home
from prunestudy.study import tables
from prunestudy.study.plan import plan
from prunestudy.study.records import Store

BEGIN = "<!-- results: made by `python docs/readme.py` -->\n"
END = "<!-- end of results -->"


def filled(page: str, summary: pd.DataFrame) -> str:
    """`page` with what each paper's own method reached between the two comments.

    Raises `InputError` if the page has no such pair.
    """
    own = summary[(summary["variant"] == "") & (summary["method"] == summary["paper"])]
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise InputError("readme: has no pair of results comments")
    return f"{before}{BEGIN}\n{tables.markdown(tables.readable(own))}\n{END}{after}"


if __name__ == "__main__":
    path = home() / "README.md"
    _, summary = tables.build(Store("cpu"), plan("cpu"))
    try:
        path.write_text(filled(path.read_text("utf-8"), summary), "utf-8")
    except InputError as error:
        sys.exit(str(error))
