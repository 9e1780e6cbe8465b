import math
from dataclasses import replace

import pandas as pd
import pytest
from conftest import CARD, compared, one_line
from conftest import put_record as put

from prunestudy import papers
from prunestudy.errors import InputError
from prunestudy.study import tables
from prunestudy.study.plan import Planned, plan
from prunestudy.study.statistics import interval

T2, T4 = 4.302652729911275, 2.7764451051977987  # the 97.5% points of t with 2 and 4 degrees

# dense, magnitude and random of three seeds
METRICS = {
    ("start", "dense"): (0.80, 0.81, 0.82),
    ("", "dense"): (0.90, 0.91, 0.92),
    ("", "magnitude"): (0.88, 0.90, 0.92),
    ("", "random"): (0.50, 0.60, 0.50),
}


@pytest.fixture
def planned(card_file):
    card_file(CARD.replace("seeds = 1", "seeds = 3"))
    return plan("quick")


def fill(store, planned):
    """Write a record of each run; return the plan."""
    for item in planned:
        settings = item.settings
        put(store, settings, METRICS[item.variant, settings.method][settings.seed])
    return planned


@pytest.fixture
def filled(store, planned):
    return fill(store, planned)


# --- runs


def test_one_row_per_paper_and_run(store, filled):
    runs = tables.runs_table(store, filled)
    assert len(runs) == 12
    assert not runs.duplicated(["paper", "run"]).any()
    item = next(p for p in filled if p.settings.method == "magnitude" and p.settings.seed == 2)
    (row,) = runs[runs.run == item.settings.run].to_dict("records")
    expected = {"run": item.settings.run, "parent": item.settings.parent.run, "paper": "toy"}
    expected |= {"method": "magnitude", "variant": "", "model": "lenet300", "dataset": "digits"}
    expected |= {"seed": 2, "epochs": 2, "precision": "fp32", "threads": 1}
    expected |= {"target_kind": "sparsity", "target": 0.9, "sparsity": 0.9}
    expected |= {"parameters": 50_610, "nonzeros": 5430, "macs": 50_200, "nonzero_macs": 5020}
    expected |= {"dense_parameters": 50_610, "dense_macs": 50_200, "metric_name": "top1"}
    expected |= {"metric": 0.92, "dense_metric": 0.92, "macro_f1": 0.92 - 0.01}
    expected |= {"peak_memory_mb": 0.5, "bytes": 1000, "train_seconds": 1.5, "status": "done"}
    expected |= {"device": "cpu", "reading": "", "stage": "", "after": ""}
    assert {k: row[k] for k in tables.RUN_COLUMNS if "latency" not in k} == expected
    assert runs.filter(like="latency").isna().all().all()
    start = runs[runs.variant == "start"].iloc[0]
    assert (start.parent, start.target_kind, start.epochs) == ("", "", 1)
    assert (start.reading, start.stage, start.after) == ("", "start", "")
    assert math.isnan(start.target)


def test_dense_metric_is_of_the_same_seed_and_total_epochs(store, filled):
    runs = tables.runs_table(store, filled)
    for row in runs.itertuples():
        label = ("start", "dense") if row.variant == "start" else ("", "dense")
        assert row.dense_metric == METRICS[label][row.seed]


def test_without_a_dense_run_there_is_no_dense_metric(store, filled):
    found = [p for p in filled if p.settings.method != "dense"]
    assert tables.runs_table(store, found).dense_metric.isna().all()
    # nor for a seed whose dense run is missing or diverged
    lost = next(p for p in filled if (p.variant, p.settings.seed) == ("", 1))
    put(store, lost.settings, None)
    runs = tables.runs_table(store, filled).set_index(["method", "variant", "seed"])
    assert math.isnan(runs.loc[("magnitude", "", 1), "dense_metric"])
    assert runs.loc[("magnitude", "", 2), "dense_metric"] == 0.92


def test_a_dense_variant_is_not_what_is_compared_with(store, card_file):
    """A fresh dense net has the same total epochs, but is not the paper's dense net."""
    text = CARD.replace("seeds = 1", "seeds = 4")
    entry = '{ method = "dense", variant = "fresh", fresh = true }, { method = "dense" }'
    card_file(text.replace('{ method = "dense" }', entry))
    planned = plan("quick")
    for item in planned:
        put(store, item.settings, {"fresh": 0.1, "start": 0.2, "": 0.9}[item.variant])
    runs = tables.runs_table(store, planned)
    assert set(runs[runs.method == "magnitude"].dense_metric) == {0.9}


def test_latencies_come_from_the_records(store, filled):
    item = filled[-1]
    names = ["latency_b1_ms", "latency_b128_ms", "dense_latency_b1_ms", "dense_latency_b128_ms"]
    ms = dict(zip(names, (0.1, 0.2, 0.3, 0.4), strict=True))
    put(store, item.settings, 0.9, latency=ms)
    runs = tables.runs_table(store, filled).set_index("run")
    assert runs.loc[item.settings.run, names].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert runs[names].notna().all(axis=1).sum() == 1


def test_runs_of_a_search_are_left_out(store, filled):
    other = [replace(item, purpose="search") for item in filled]
    assert len(tables.runs_table(store, other)) == 0
    assert compared(papers.card("toy"), other) == []


def test_a_run_under_two_labels_is_one_row_under_the_plainer(store, filled):
    again = [Planned(p.paper, "again", p.purpose, p.settings, "other") for p in filled]
    first = tables.runs_table(store, filled)
    second = tables.runs_table(store, again + filled)
    pd.testing.assert_frame_equal(first[first.variant == ""], second[second.variant == ""])
    assert len(second) == len(first)


def test_tables_without_a_record(store, planned):
    runs, summary = tables.build(store, planned)
    assert (len(runs), len(summary)) == (0, 0)
    assert list(runs.columns) == tables.RUN_COLUMNS
    tables.write(store, planned)
    assert (store.folder / "tables/runs.csv").read_text() == ",".join(tables.RUN_COLUMNS) + "\n"


def test_an_edited_record_stops_the_tables(store, filled):
    path = store.path(filled[-1].settings.run) / "record.json"
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(InputError, match="was edited or cut off") as caught:
        tables.write(store, filled)
    assert one_line(caught)
    assert not (store.folder / "tables").exists()


@pytest.fixture
def two_devices(store, filled, monkeypatch):
    """Each run was made on a CPU and, a tenth better, on a GPU; the GPU has no dense run."""
    read = store.read

    def read_all(settings):
        record = read(settings)
        better = record["metrics"] | {"metric": record["metrics"]["metric"] + 0.1}
        gpu = record | {"environment": {"device": "GPU"}, "metrics": better}
        return [record] if settings.method == "dense" else [record, gpu]

    monkeypatch.setattr(store, "read_all", read_all)
    return filled


def test_runs_of_two_devices_are_neither_averaged_nor_compared(store, filled, two_devices):
    runs, summary = tables.build(store, two_devices)
    assert len(runs) == 12 + 6
    rows = summary[summary.method == "random"].set_index("device")
    assert rows.n.to_dict() == {"GPU": 3, "cpu": 3}
    assert rows.metric.to_dict() == pytest.approx({"GPU": 1.6 / 3 + 0.1, "cpu": 1.6 / 3})
    assert rows.difference_n.to_dict() == {"GPU": 0, "cpu": 3}
    assert runs[runs.device == "GPU"].dense_metric.isna().all()
    assert set(tables.readable(summary)["device"]) == {"GPU", "cpu"}


# --- summary


def test_summary_by_hand(store, filled):
    summary = tables.build(store, filled)[1]
    assert len(summary) == 4
    assert len(summary[summary.variant == "start"]) == 1
    plain = summary[summary.variant == ""].set_index("method")
    random = plain.loc["random"]
    # differences to dense: -0.40, -0.31, -0.42
    mean = -1.13 / 3
    sd = math.sqrt(((-0.4 - mean) ** 2 + (-0.31 - mean) ** 2 + (-0.42 - mean) ** 2) / 2)
    assert random.n == random.difference_n == 3
    assert random.metric == pytest.approx(1.6 / 3)
    assert random.metric_sd == pytest.approx(0.1 / math.sqrt(3))
    assert random.dense_metric == pytest.approx(0.91)
    assert random.difference == pytest.approx(mean)
    assert random.difference_sd == pytest.approx(sd)
    assert random.difference_low == pytest.approx(mean - T2 * sd / math.sqrt(3))
    assert random.difference_high == pytest.approx(mean + T2 * sd / math.sqrt(3))
    assert (random.sparsity, random.nonzeros) == (pytest.approx(0.9), 5430)
    magnitude = plain.loc["magnitude"]
    # -0.02, -0.01, 0.00
    assert magnitude.difference == pytest.approx(-0.01)
    half = T2 * 0.01 / math.sqrt(3)
    assert magnitude.difference_low == pytest.approx(-0.01 - half)
    assert magnitude.difference_high == pytest.approx(-0.01 + half)
    assert plain.loc["dense"].difference == 0


def test_the_difference_is_paired_by_seed_and_counts_pairs_only(store, filled):
    lost = next(
        p for p in filled if (p.variant, p.settings.method, p.settings.seed) == ("", "dense", 1)
    )
    summary = tables.build(store, [p for p in filled if p is not lost])[1]
    row = summary[summary.method == "random"].iloc[0]
    assert (row.n, row.difference_n) == (3, 2)
    assert row.difference == pytest.approx((-0.40 - 0.42) / 2)


def test_a_diverged_seed_is_counted_beside_n(store, filled):
    item = next(p for p in filled if p.settings.method == "random" and p.settings.seed == 0)
    put(store, item.settings, None)
    runs, summary = tables.build(store, filled)
    lost = runs.set_index("run").loc[item.settings.run]
    assert (lost.status, math.isnan(lost.metric)) == ("diverged", True)
    row = summary[summary.method == "random"].iloc[0]
    assert (row.n, row.diverged, row.metric) == (2, 1, pytest.approx(0.55))
    assert (summary[summary.method != "random"].diverged == 0).all()
    assert "2 (1 diverged)" in set(tables.readable(summary).n)


def test_published_numbers_stand_beside_our_setting_only(store, card_file):
    number = """
    [[published]]
    text = "x"
    method = "magnitude"
    model = "lenet300"
    dataset = "digits"
    metric = "top1"
    mark = "S"
    source = "somewhere"
    value = 0.95
    target = 0.9

    [profiles.quick]
    """
    text = CARD.replace("    published = []\n", "").replace("    [profiles.quick]\n", number)
    variant = '{ method = "magnitude", variant = "lr", lr = 0.1 }, { method = "magnitude" }'
    text = text.replace('{ method = "magnitude" }', variant).replace("[0.9]", "[0.9, 0.8]")
    card_file(text)
    planned = plan("quick")
    for item in planned:
        put(store, item.settings, 0.5)
    summary = tables.build(store, planned)[1]
    beside = summary[summary.published.notna()]
    assert beside[
        ["method", "variant", "target", "published", "mark", "source"]
    ].values.tolist() == [["magnitude", "", 0.9, 0.95, "S", "somewhere"]]
    assert set(summary[summary.published.isna()].mark) == {""}


# --- intervals


def test_intervals_by_hand():
    half = T4 * math.sqrt(0.1 / 4) / math.sqrt(5)
    five = (5, 0.3, math.sqrt(0.025), 0.3 - half, 0.3 + half)
    assert interval([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(five)
    # t(1) is 12.7, and sd / sqrt 2 is 1
    assert interval([1.0, 3.0])[-1] == pytest.approx(2 + 12.706204736174694)
    assert interval([0.25] * 3) == (3, 0.25, 0, 0.25, 0.25)
    for few in ([], [0.5]):
        n, mean, *rest = interval(few)
        assert (n, all(map(math.isnan, rest))) == (len(few), True)
        assert mean == 0.5 if few else math.isnan(mean)


# --- files


def test_files_are_the_same_byte_for_byte(store, filled):
    tables.write(store, filled)
    names = ("runs.csv", "summary.csv", "verdicts.csv")
    files = [store.folder / "tables" / name for name in names]
    first = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    tables.write(store, list(reversed(filled)))
    assert [path.read_bytes() for path in files] == first
    assert all(b"\r" not in data and data.endswith(b"\n") for data in first)
    assert len(list((store.folder / "tables").iterdir())) == 3


# --- for people


def test_markdown_by_hand():
    table = pd.DataFrame({"a": ["x", "<b>|*_`[]~\\"], "n_1": [1, 2.5]})
    assert tables.markdown(table) == (
        "| a | n\\_1 |\n| --- | --- |\n| x | 1.0 |\n| &lt;b&gt;\\|\\*\\_\\`\\[\\]\\~\\\\ | 2.5 |\n"
    )
    assert tables.markdown(pd.DataFrame(columns=["a", "b"])) == "| a | b |\n| --- | --- |\n"


def test_readable_by_hand(store, filled):
    table = tables.readable(tables.build(store, filled)[1])
    row = table[table.method == "random"].iloc[0]
    assert row["net"] == "LeNet-300-100"
    assert row["data"] == "Digits"
    assert row["removed"] == "90% of weights"
    assert row["n"] == 3
    assert row["result"] == "53.33 ± 5.77%"
    mean, sd = -1.13 / 3, math.sqrt(0.0034333333333333334)
    half = T2 * sd / math.sqrt(3)
    low, high = (100 * (mean - half), 100 * (mean + half))
    assert row["minus dense"] == f"{100 * mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    assert row["published"] == ""
    dense = table[table.method == "dense"].iloc[0]
    assert (dense["removed"], dense["result"]) == ("", "91.00 ± 1.00%")


def test_by_share_by_hand(store, filled):
    summary = tables.build(store, filled)[1]
    more = summary[summary.method == "random"].assign(target=0.5, published=0.4, mark="P", n=2)
    more = more.assign(difference_low=-0.3, difference_high=-0.1)
    table = tables.by_share(pd.concat([summary, more]))
    shares = ["none removed", "50% of weights", "90% of weights"]
    assert list(table) == ["net", "data", "method", "n", *shares, "published"]
    row = table[table.method == "random"].iloc[0]
    assert (row["n"], row["published"]) == ("3; 2", "40.00% [P], 50% of weights")
    assert list(row[shares]) == ["", "53.33 ± 5.77% (-37.67*)", "53.33 ± 5.77% (-37.67*)"]
    dense = table[table.method == "dense"].iloc[0]
    assert list(dense[shares]) == ["91.00 ± 1.00%", "", ""]
    assert tables.by_share(summary[summary.variant == "no such"]).empty


def test_readable_in_decibel(store, filled):
    summary = tables.build(store, filled)[1].assign(metric_name="psnr", published=20.5, mark="P")
    row = tables.readable(summary[summary.method == "random"]).iloc[0]
    assert (row["result"], row["published"]) == ("0.53 ± 0.06 dB", "20.50 dB [P]")
    assert tables.readable(summary[summary.variant == "no such"]).empty
    assert row["minus dense"].startswith("-0.38 [")


def test_readable_names_the_paper_where_there_are_several(store, filled, card_file):
    card_file(CARD.replace('"toy"', '"other"').replace('"A toy"', '"Another"'), "other")
    summary = tables.build(store, filled)[1]
    table = tables.readable(pd.concat([summary, summary.assign(paper="other")]))
    assert list(table["paper"]) == ["A toy"] * len(summary) + ["Another"] * len(summary)
    assert "paper" not in tables.readable(summary)
