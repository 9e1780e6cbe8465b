"""Figures that one paper's notebook alone draws; papers in the order of their years."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from prunestudy import models
from prunestudy.papers import Card
from prunestudy.study import figures as look
from prunestudy.study import tables
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store

_LOW_RANK = ("plain_low_rank", "force")
# Method and reading to a label, and to the method whose colour and marker stand for it.
_READINGS = {
    "component_aware,": ("soft coefficients", "component_aware"),
    "component_aware,grid": ("soft coefficients, grid", "l1"),
    "uniform,": ("uniform share", "uniform"),
    "uniform,one ranking": ("one ranking, group L2", "group_l2"),
    "uniform,one ranking, Taylor": ("one ranking, Taylor", "l1_filter"),
    "uniform,random": ("random", "random"),
}


def gate_histograms(store: Store, run: str) -> Figure:
    """Gate variables at the first, a middle and the last epoch in which they train."""
    counts, colour = store.arrays(run)["gate_histograms"], look.COLOURS["sparse_gates"]
    training = [i for i, row in enumerate(store.history(run)) if row["phase"] == "gates"] or [0]
    chosen = sorted({training[0], training[len(training) // 2], training[-1]})
    panels = {f"after epoch {i + 1}": {"gates": (counts[i], colour)} for i in chosen}
    return look.histograms(panels, 1, "gate g", "share of the weights", yscale="log")


def kept_against_start(store: Store, runs: dict[str, str]) -> Figure:
    """|w| of kept weights at the end against the start, one panel per method (name -> run)."""
    figure, axes = look.canvas(len(runs), (3.6 * len(runs), 3.6), sharex=True, sharey=True)
    for panel, (method, run) in zip(axes, runs.items(), strict=True):
        arrays, scale = store.arrays(run), store.require(run)["metrics"]["kept_scale"]
        start, end = np.abs(arrays["kept_start"]), np.abs(arrays["kept_end"])
        panel.plot(start, end, ".", ms=3, alpha=0.5, color=look.COLOURS[method])
        panel.axline((0, 0), slope=1, color="black", ls="--", lw=1)
        panel.set(title=f"{look.title_of(method)}: x{scale:.2f}", xlabel="|w| of the dense start")
    axes[0].set_ylabel("|w| in the sparse net")
    return figure


def sparse_layers(layers: pd.DataFrame) -> Figure:
    """Speed-up of single linear layers from compressed rows, as the bench measured it."""
    batches = sorted(layers.batch.unique())
    figure, axes = look.canvas(len(batches), (9, 3.4), sharey=True)
    for panel, batch in zip(axes, batches, strict=True):
        for width, line in layers[layers.batch == batch].groupby("width"):
            error = [line.speed_up - line.low, line.high - line.speed_up]
            panel.errorbar(line.sparsity, line.speed_up, error, marker="o", label=f"{width} wide")
        panel.axhline(1, color="black", ls="--", lw=1)
        panel.set(title=f"linear layers, batch {batch}", xlabel="share of zero weights")
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("times faster than dense (1: as fast)")
    axes[0].legend()
    return figure


def ranks_table(store: Store, planned: Sequence[Planned]) -> pd.DataFrame:
    """Layers of nets factorised at 5% error: `rank`, the `full` one, `speed_up` by MACs."""
    rows = []
    for item in planned:
        s, record = item.settings, store.read(item.settings)
        ours = s.method in _LOW_RANK and s.target.kind == "energy" and item.purpose != "search"
        if ours and record and record["status"] == "done":
            metrics, energy = record["metrics"], store.arrays(s.run)
            place = s.model, s.dataset, s.method, item.variant, s.seed
            for layer in (name[5:] for name in metrics if name.startswith("rank.")):
                full, rank = len(energy[f"energy_before.{layer}"]), metrics[f"rank.{layer}"]
                found = layer, rank, full, metrics[f"speed_up.{layer}"]
                rows.append((*place, *found, record["environment"]["device"]))
    columns = "model dataset method variant seed layer rank full speed_up device".split()
    return pd.DataFrame(rows, columns=columns).drop_duplicates(ignore_index=True)


def rank_per_layer(ranks: pd.DataFrame, paper: Card, model: str, dataset: str) -> Figure:
    """Ranks at 5% error in % of the full rank, mean and sd over seeds; published ones as marks."""
    where = {"model": model, "dataset": dataset, "variant": ""}
    rows = look.select(ranks, f"ranks of {model} on {dataset}", **where)
    rows = rows.assign(share=100 * rows["rank"] / rows.full, method=rows.method.map(look.title_of))
    figure, (axes,) = look.canvas(size=(5 + 0.45 * rows.layer.nunique(), 3.6))
    style = {"saturation": 1, "errorbar": "sd", "err_kws": {"lw": 1}, "ax": axes}
    style["palette"] = {look.title_of(method): look.COLOURS[method] for method in _LOW_RANK}
    sns.barplot(rows, x="layer", y="share", hue="method", legend=True, **style)
    axes.get_legend().remove()
    for table in (t for t in paper.ranks if t.model == model and t.mark == "P"):
        shares = 100 * np.array(table.ranks) / np.array(table.full)
        mark = "kP" if table.method == "plain_low_rank" else "ko"
        label = f"published: {look.title_of(table.method)} [{table.mark}]"
        axes.plot(table.layers, shares, mark, ms=6, label=label)
    axes.set(xlabel="", ylabel="rank that holds 95% of the energy, % of full")
    axes.set_title(f"{look.place_of(rows)} (n = {rows.seed.nunique()})")
    axes.tick_params(axis="x", rotation=90 if rows.layer.nunique() > 6 else 0)
    look.legend(figure)
    return figure


def angles(store: Store, runs: dict[str, str], layers: list[str]) -> Figure:
    """Angles between filters of at most four `layers`: at the common start, and by method."""
    places = np.linspace(0, len(layers) - 1, min(len(layers), 4)).round().astype(int)
    panels = {layers[place]: {} for place in places}
    for method, run in runs.items():
        arrays, colour = store.arrays(run), look.COLOURS[method]
        for layer, panel in panels.items():
            panel["at the start"] = arrays[f"angles_before.{layer}"], "0.8"
            panel[look.title_of(method)] = arrays[f"angles_after.{layer}"], colour
    across = "angle between two filters, degrees"
    return look.histograms(panels, 180, across, "share of the pairs", xticks=(0, 45, 90, 135))


def speed_up(runs: pd.DataFrame) -> Figure:
    """Speed-up of nets factorised at 5% error, by MACs and (once timed) measured: means."""
    ours = runs[runs.method.isin(_LOW_RANK)]
    rows = look.select(ours, "speed-up", target_kind="energy", variant="", status="done")
    net = rows.model.map(models.title) + " on " + rows.dataset.map(tables.datasets_title)
    kinds = {
        "MACs": rows.dense_macs / rows.macs,
        "measured, batch 1": rows.dense_latency_b1_ms / rows.latency_b1_ms,
        "measured, batch 128": rows.dense_latency_b128_ms / rows.latency_b128_ms,
    }
    bars = net + ": " + rows.method.map(look.title_of)
    means = pd.DataFrame(kinds).groupby(bars, sort=False).mean()
    figure, (axes,) = look.canvas(size=(7.5, 1.6 + 0.6 * len(means)))
    means.plot.barh(color=["0.25", "0.5", "0.75"], width=0.8, ax=axes, legend=False)
    for bars in axes.containers:
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axes.bar_label(bars, fmt="{:.2f}x", fontsize=7, padding=3, bbox=white)
    axes.axvline(1, color="black", ls="--", lw=1)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set(ylabel="", xlabel="speed-up over the dense net (1: as fast)")
    look.legend(figure)
    return figure


def strengths(store: Store, planned: Sequence[Planned]) -> Figure:
    """Total rank, and error on validation images, of the nets of the search for lambda."""
    figure, (ranks, errors) = look.canvas(2, (9, 3.4))
    of_search = [item.settings for item in planned if item.experiment == "search"]
    for kind, colour in (("l2", look.COLOURS["force"]), ("l1", "0.4")):
        found = [s for s in of_search if s.params.get("kind") == kind]
        found = sorted(found, key=lambda s: s.params["strength"])
        metrics = [store.require(s.run)["metrics"] for s in found]
        table = pd.DataFrame(metrics, [s.params["strength"] for s in found])
        style, name = {"color": colour, "marker": "o"}, kind.upper()
        ranks.plot(table.rank_total, label=name, **style)
        errors.plot(100 * (1 - table.metric), label=f"{name}, factorised", **style)
        errors.plot(100 * (1 - table.metric_whole), label=f"{name}, whole net", ls="--", **style)
    for panel, what in ((ranks, "sum of the layers' ranks"), (errors, "validation error, %")):
        panel.set(xscale="log", xlabel=r"$\lambda$", ylabel=what)
        panel.legend()
    errors.set_yscale("log")
    errors.yaxis.set_major_formatter("{x:g}")
    return figure


def gate_paths(store: Store, run: str) -> Figure:
    """At most 60 gates of each of GDP's four largest groups, and the cost left, step by step."""
    arrays, metrics = store.arrays(run), store.require(run)["metrics"]
    steps, paths, group_of = (arrays[f"gate_{name}"] for name in ("steps", "paths", "groups"))
    names, sizes = list(metrics["channels"]), np.bincount(group_of)
    shown = sorted(np.argsort(-sizes, kind="stable")[:4])
    figure, axes = look.canvas(len(shown) + 1, (2.7 * len(shown) + 2.7, 3.1), sharey=True)
    for panel, group in zip(axes, shown, strict=False):
        gates = paths[:, group_of == group]
        gates = gates[:, :: -(-gates.shape[1] // 60)]
        for kept, colour in ((False, "0.6"), (True, look.COLOURS["gdp"])):
            panel.plot(steps, gates[:, (gates[-1] > 0) == kept], color=colour, lw=0.7, alpha=0.7)
        panel.set_title(f"{names[group]}: {metrics['channels'][names[group]]} of {sizes[group]}")
    soft, hard = arrays["cost_path"]
    axes[-1].plot(steps, hard, color="black", label="open channels")
    axes[-1].plot(steps, soft, color=look.COLOURS["gdp"], label="soft gates")
    axes[-1].set_title("cost, share of dense")
    axes[-1].legend()
    for panel in axes:
        panel.axvline(metrics["met_at"] * (steps[-1] + 1), color="black", ls=":", lw=1)
        panel.set_xlabel("step")
    axes[0].set_ylabel("gate g")
    return figure


def gates_on_the_ramp(store: Store, run: str, ramp: float) -> Figure:
    """GDP's gates at 25, 50 and 75% of the first `ramp` (0-1) of the steps, and at the end."""
    arrays, panels = store.arrays(run), {}
    steps = arrays["gate_steps"]
    for share in (0.25, 0.5, 0.75, None):
        step = steps[-1] if share is None else share * ramp * (steps[-1] + 1)
        gates = arrays["gate_paths"][np.searchsorted(steps, step, side="right") - 1]
        counts, _ = np.histogram(gates.astype(float), 40, (0, 1))
        title = "at the end" if share is None else f"at {share:.0%} of the ramp"
        panels[title] = {"gates": (counts, look.COLOURS["gdp"])}
    return look.histograms(panels, 1, "gate", "share of the channels", yscale="log")


def final_gates(store: Store, runs: dict[str, str]) -> Figure:
    """Gates of channels before they are cut, one panel per method (name -> run)."""
    panels = {}
    for method, run in runs.items():
        gates = store.arrays(run)["final_gates"].astype(float)
        between = ((gates > 0) & (gates <= 0.5)).mean()
        counts, _ = np.histogram(gates, 40, (0, 1))
        title = f"{look.title_of(method)}: {between:.0%} in (0, 0.5]"
        panels[title] = {"gates": (counts, look.COLOURS[method])}
    return look.histograms(panels, 1, "gate", "share of the channels", yscale="log")


def flow(store: Store, runs: dict[str, str]) -> Figure:
    """Weights that are cut and that come back at each mask update, by method (name -> run)."""
    figure, axes = look.canvas(1, (7.2, 1 + 2 * len(runs)), len(runs), sharex=True, sharey=True)
    for panel, (method, run) in zip(axes, runs.items(), strict=True):
        trail = store.arrays(run)
        edges, total = [0, *trail["trail_step"]], trail["trail_size"].sum()
        cut, back = (100 * trail[f"trail_{kind}"].sum(1) / total for kind in ("cut", "returned"))
        panel.stairs(back, edges, fill=True, color="0.6", label="come back")
        panel.stairs(-cut, edges, fill=True, color=look.COLOURS[method], label="leave")
        # A linear middle, so that the few that return can be seen beside the many that leave.
        panel.set_yscale("symlog", linthresh=0.1)
        panel.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        panel.set(ylabel="% of the weights", title=look.title_of(method))
        panel.legend(loc="lower right", ncols=2)
    axes[-1].set_xlabel("training step")
    return figure


def attention_histograms(store: Store, run: str) -> Figure:
    """MAP's attention at the start, in the middle and at the end; kept weights stand out."""
    counts = store.arrays(run)["attention"]
    panels = {}
    for epoch in sorted({0, (len(counts) - 1) // 2, len(counts) - 1}):
        of_all, of_kept = counts[epoch]
        ours = (of_kept, look.COLOURS["magnitude_attention"])
        title = f"after epoch {epoch}" if epoch else "at the start"
        panels[title] = {"all weights": (of_all, "0.8"), "kept weights": ours}
    across = "attention A (4: and above)"
    return look.histograms(panels, 4, across, "share of the weights", yscale="log")


def psnr_against_removed(
    summary: pd.DataFrame, floors: Mapping[str, Mapping[str, float]], model: str, dataset: str
) -> Figure:
    """Mean PSNR and sd over seeds against the share removed; dashed: component by component.

    `floors` has what constant images reach (`measure.constant_psnr`) by data set.
    """
    where = {"model": model, "dataset": dataset, "target_kind": "parameters"}
    rows = look.select(summary, f"{model} on {dataset}", **where)
    parted = rows.reading.str.endswith("by component") & (rows.method == "uniform")
    plain = rows.reading.str.replace("(, )?by component$", "", regex=True)
    keys = rows.method + "," + plain.where(parted, rows.reading)
    labels, stands_for = (keys.map(_READINGS).str[i] for i in (0, 1))
    rows = rows.assign(
        removed=100 * rows.target,
        sd=rows.metric_sd.fillna(0),
        ls=np.where(parted, "--", "-"),
        label=labels + np.where(parted, ", by component", ""),
        method=stands_for,
    )
    stages = [*rows[rows.label.notna() & rows.stage.isin(["", "fine-tuned"])].groupby("stage")]
    figure, axes = look.canvas(len(stages), (3 + 4 * len(stages), 4), sharey=True)
    for panel, (stage, part) in zip(axes, stages, strict=True):
        look.points(panel, part, "removed", "metric", "sd")
        dense = part.dense_metric[part.n.idxmax()]
        panel.axhline(dense, color=look.COLOURS["dense"], ls=":", label="dense")
        panel.axhline(floors[dataset]["mean image"], color="black", lw=1, label="mean image")
        panel.set(title=f"{look.place_of(rows)}, {stage or 'after pruning'}")
        panel.set(xlabel="parameters removed, %", xticks=100 * part.target.unique())
    axes[0].set_ylabel("test PSNR, dB (mean and sd)")
    look.legend(figure)
    return figure


def reconstructions(store: Store, runs: Mapping[str, str]) -> Figure:
    """Images, the dense net's outputs, and below them those of the pruned nets (label -> run)."""
    arrays = {label: store.arrays(run) for label, run in runs.items()}
    first = next(iter(arrays.values()))
    rows = {"image": first["shown"], "dense": first["output_dense"]}
    rows |= {label: held["output_pruned"] for label, held in arrays.items()}
    picture = np.vstack([np.hstack(images[:, 0]) for images in rows.values()])
    figure, (axes,) = look.canvas(size=(1.8 + 0.7 * len(first["shown"]), 0.7 * len(rows)))
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
    axes.set_yticks((np.arange(len(rows)) + 0.5) * len(picture) / len(rows), rows)
    axes.set(xticks=[], title="images, and what is left of them")
    axes.grid(visible=False)
    return figure
