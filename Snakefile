# The study as a batch. `make study` calls this; by hand:
#   snakemake --cores 2 --config profile=quick
# What is done is decided by records (see prunestudy.study.batch); the outputs here are markers.
from pathlib import Path

PROFILE = config.get("profile", "quick")
PAPERS = tuple(config.get("papers", "").split())
RESULTS, DATA = config.get("results", ""), config.get("data", "")
STAGE = Path(config.get("stage", "results/stage"))
# What a cluster is asked for (minutes, MB); the papers' own nets are trained on a GPU each.
GPU = PROFILE == "paper"

study = None
# On a cluster Snakemake reads this file in each job too, where there is nothing to plan.
if not workflow.remote_exec:
    from prunestudy.study.batch import Batch

    study = Batch(PROFILE, PAPERS, RESULTS)

options = f"--profile {PROFILE}" + "".join(
    f" --{name} '{value}'" for name, value in (("results", RESULTS), ("data", DATA)) if value
)
papers = "".join(f" --paper {name}" for name in PAPERS)


def marker(name):
    return str(STAGE / f"{name}.done")


def markers(kind, names):
    return [marker(f"{kind}.{name}") for name in names]


wildcard_constraints:
    job="[^/]+",
    paper="[a-z_]+",


rule all:
    input:
        markers("notebook", study.open_notebooks() if study else ()),
        marker("tables"),
    localrule: True


rule train:
    input:
        lambda wildcards: markers("train", study.needs(wildcards.job) if study else ()),
    output:
        temp(touch(marker("train.{job}"))),
    # the worker processes of a stream; on one machine, one such run at a time
    threads: 8 if GPU else 1
    resources:
        gpu=int(GPU),
        mem_mb=32000 if GPU else 4000,
        runtime=24 * 60 if GPU else 4 * 60,
    shell:
        "prunestudy job {wildcards.job} {options}"


# Alone on the machine: it takes every core there is, on a cluster a whole node.
rule latency:
    input:
        markers("train", sorted(study.open) if study else ()),
    output:
        touch(marker("latency")),
    threads: 1 if workflow.remote_exec else workflow.resource_settings.cores or 1
    resources:
        mem_mb=8000,
        runtime=4 * 60,
        slurm_extra="--exclusive",
    shell:
        "prunestudy latency {options}{papers}"


rule tables:
    input:
        [marker("latency")] if study and study.latency_is_open() else [],
    output:
        touch(marker("tables")),
    localrule: True
    shell:
        "prunestudy table {options}"


rule notebook:
    input:
        marker("tables"),
    output:
        touch(marker("notebook.{paper}")),
    resources:
        mem_mb=8000,
        runtime=60,
    shell:
        "prunestudy notebook {wildcards.paper} {options}"
