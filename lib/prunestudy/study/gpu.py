"""What a GPU makes of dense, gated, smaller and factorised nets, and a short CIFAR study on it.

Written for CUDA and free of it: on the CPU the same functions compare the CPU with itself.
"""

import copy
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn

from prunestudy import datasets, measure, methods, models, shrink
from prunestudy.datasets.catalogue import IMAGE_FOLDERS
from prunestudy.measure.forward import evaluating
from prunestudy.methods.channels import Channels, scale_consumers
from prunestudy.shrink.ranks import full_ranks
from prunestudy.study import tables
from prunestudy.study.bench import ratio_text, training_step
from prunestudy.study.plan import Planned
from prunestudy.study.records import Store, write_text
from prunestudy.study.runs import Runner, device_of
from prunestudy.study.settings import RunSettings, own_settings

# Shape of the images, classes, images a batch.
NETS = {"resnet20": ((3, 32, 32), 10, 128), "resnet50": ((3, 224, 224), 1000, 64)}
EPOCHS = 5
# Beside dense training; each starts from the same dense net.
METHODS = {
    "dense": None,
    "gdp": 0.5,
    "magnitude_attention": 0.9,
    "sparse_gates": 0.9,
    "force": 0.05,
}
_RECIPE = {"lr": 0.05, "weight_decay": 1e-4, "shift": 4, "flip": True, "batch_size": 128}


def run(results: str = "", data: str = "", device: str = "cuda", quick: bool = False) -> None:
    """Measure the nets, run the study, print both and write gpu.md below `results`/gpu.

    Raises `InputError` where the device or the data are missing, before anything is written.
    """
    place, store = device_of(device), Store("gpu", results or None)
    runner = Runner(store, data or None, device, show=not quick)
    planned = short_study(cifar_of(data))
    trained = study_table(runner, planned)
    rounds = 2 if quick else 100
    forms = pd.concat([compare(name, *size, place, rounds) for name, size in NETS.items()])
    text = _page(place, forms, trained)
    print(text)
    write_text(store.folder / "gpu.md", text)


# --- nets side by side


def forms_of(name: str, shape: tuple[int, int, int], classes: int) -> dict[str, nn.Module]:
    """The net `name` dense, with every other channel gated, without them, and in half its rank.

    The gated net and the smaller one are the same function.
    """
    dense = models.build(name, shape, classes).eval()
    channels = Channels(dense, shape, "macs")
    open_ = torch.cat([torch.arange(group.channels) % 2 == 0 for group in channels.groups])
    gated = copy.deepcopy(dense)
    scale_consumers(gated, channels, _Fixed(open_))
    ranks = {layer: max(1, full // 2) for layer, full in full_ranks(dense).items()}
    return {
        "dense": dense,
        "gated": gated,
        "smaller": channels.smaller(dense, open_),
        "factors": shrink.factorise(dense, ranks),
    }


class _Fixed(nn.Module):
    """Gates that stay as they are."""

    def __init__(self, open_: Tensor) -> None:
        super().__init__()
        self.register_buffer("open", open_.float())

    def forward(self) -> Tensor:
        return self.open


def compare(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    batch: int,
    device: torch.device,
    rounds: int,
) -> pd.DataFrame:
    """One row per form of the net `name`: what it costs and gains on `device`.

    `difference` is the largest between the outputs here and on the CPU, over the largest output,
    in float64. Times are ratios to the dense net, interleaved, above 1 where the form is faster.
    """
    forms = forms_of(name, shape, classes)
    apart = {form: difference(net, shape, device) for form, net in forms.items()}
    runtime = onnx_ratios(forms, shape, batch, device, rounds)
    macs = {form: measure.macs(net, shape) for form, net in forms.items()}
    here = {form: net.to(device, memory_format=torch.channels_last) for form, net in forms.items()}
    seconds = measure.timings(here, shape, batch, rounds)
    steps = {form: _step(net, shape, classes, batch, device) for form, net in here.items()}
    trained = measure.interleave(steps, rounds, warmup=2)
    rows = [
        {
            "net": name,
            "batch": str(batch),
            "form": form,
            "MMACs": f"{macs[form] / 1e6:.1f}",
            "difference": f"{apart[form]:.1e}",
            "peak MB": f"{measure.peak_memory_mb(net, shape, batch):.0f}",
            "inference": _ratio(seconds, form),
            "training step": _ratio(trained, form),
            "ONNX Runtime": runtime[form],
        }
        for form, net in here.items()
    ]
    return pd.DataFrame(rows)


def difference(net: nn.Module, shape: tuple[int, int, int], device: torch.device) -> float:
    """Largest difference of an output on `device` and on the CPU, over the largest, in float64."""
    here = copy.deepcopy(net).double()
    there = copy.deepcopy(here).to(device)
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with evaluating(here), evaluating(there), torch.inference_mode():
        a, b = here(x), there(x.to(device)).cpu()
    return float((a - b).abs().max() / a.abs().max())


def onnx_ratios(
    forms: dict[str, nn.Module],
    shape: tuple[int, int, int],
    batch: int,
    device: torch.device,
    rounds: int,
) -> dict[str, str]:
    """Time of the dense net over that of each form in ONNX Runtime on `device`, of medians."""
    if not shrink.onnx_runs_on(device.type):
        return dict.fromkeys(forms, "not for this device")
    ms = measure.onnx_latency(forms, shape, batch, rounds, device=device.type)
    return {form: f"{ms['dense'] / ms[form]:.2f}" for form in forms}


def _step(
    net: nn.Module, shape: tuple[int, int, int], classes: int, batch: int, device: torch.device
) -> Callable[[], None]:
    x = torch.randn(batch, *shape, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(classes, (batch,), device=device)
    trained = copy.deepcopy(net).requires_grad_(True).train()
    step = training_step(trained, methods.build("dense", {}), x, y)

    def whole() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return whole


def _ratio(seconds: dict[str, list[float]], form: str) -> str:
    return ratio_text(measure.ratio(seconds["dense"], seconds[form]))


# --- the short study


def cifar_of(root: str) -> str:
    """The JPEG copy where it is below the data root, else CIFAR-10, found there or fetched."""
    folder = datasets.data_root(root or None) / IMAGE_FOLDERS["cifar10_jpeg"]
    return "cifar10_jpeg" if folder.is_dir() else "cifar10"


def short_study(dataset: str) -> list[Planned]:
    """ResNet-20 on `dataset`: a dense start, and from it each of `METHODS`, `EPOCHS` each."""
    common = {"dataset": dataset, "model": "resnet20", "precision": "bf16", "epochs": EPOCHS}
    common |= _RECIPE | {"validation": 5000 if dataset != "digits" else 200}
    start = own_settings(common)
    made = [Planned("gpu", "cifar", "results", "start", start)]
    for method, target in METHODS.items():
        aim = {} if target is None else {"target": target}
        after = own_settings(common | {"method": method} | aim)
        settings = after.model_copy(update={"parent": start})
        made.append(Planned("gpu", "cifar", "results", "", settings))
    return made


def study_table(runner: Runner, planned: list[Planned]) -> pd.DataFrame:
    """Train what is missing of `planned`; one row per run."""
    records = {item.settings.run: runner.ensure(item.settings) for item in planned}
    found = tables.runs_table(runner.store, planned).set_index("run")
    rows = [_run_row(item.settings, records[item.settings.run], found) for item in planned]
    return pd.DataFrame(rows)


def _run_row(settings: RunSettings, record: dict, found: pd.DataFrame) -> dict[str, str]:
    row, cost = found.loc[settings.run], record["cost"]
    images = record["data"]["train"] * settings.recipe.epochs / cost["train_seconds"]
    return {
        "run": settings.run,
        "epochs": str(row["epochs"]),
        "status": record["status"],
        "top-1": f"{100 * row['metric']:.2f}",
        "minus dense": f"{100 * (row['metric'] - row['dense_metric']):+.2f}",
        "zero or gone": f"{100 * row['sparsity']:.1f}%",
        "MACs of dense": f"{row['macs'] / row['dense_macs']:.2f}",
        "images/s": f"{images:.0f}",
        "peak MB": f"{cost.get('device_peak_mb', cost['process_peak_mb']):.0f}",
    }


def _page(device: torch.device, forms: pd.DataFrame, trained: pd.DataFrame) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (
        f"# On a GPU\n\nWritten by `make gpu` on: {name}, torch {torch.__version__}.\n\n"
        "## Nets side by side\n\nRatios to the dense net of the same size, interleaved pairs,"
        " medians with 95% bootstrap intervals: above 1 the form is faster. In ONNX Runtime the"
        " ratio of medians. *difference*: of the outputs on the CPU, in float64. Gated: every"
        " other channel times zero; smaller: without those channels; factors: every layer at half"
        f" its rank.\n\n{tables.markdown(forms)}\n"
        "## A short study\n\nResNet-20, one seed: a look at the way of work, no result.\n\n"
        f"{tables.markdown(trained)}"
    )
