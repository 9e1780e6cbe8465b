"""One run, from its settings to its record."""

import functools
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunestudy import datasets, measure, methods, models, shrink
from prunestudy.errors import InputError, require_one_of
from prunestudy.study.lines import FORMAT
from prunestudy.study.records import Store, repository
from prunestudy.study.settings import RunSettings
from prunestudy.train import TrainResult, train

_VERSIONS = ("prunestudy", "torch", "torchvision", "numpy", "ptflops")


def device_of(name: str = "auto") -> torch.device:
    """Return the device called `name`: "cpu", "cuda", or "auto" (CUDA when there)."""
    require_one_of("device", name, ("auto", "cpu", "cuda"))
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("device = 'cuda': no CUDA device here; allowed are auto, cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


@functools.lru_cache(maxsize=2)
def _data(name: str, root: str | None) -> datasets.Dataset:
    return datasets.load(name, root)


class Runner:
    """Makes sure that runs are done: reads their records, or trains what is missing.

    On `device` "auto" a profile goes on where it began: runs of different devices are not
    compared. With nothing stored yet it is CUDA where that is there.
    """

    def __init__(
        self,
        store: Store,
        data: Path | str | None = None,
        device: str = "auto",
        show: bool = False,
    ) -> None:
        self.data, self.show = data, show
        began = store.devices() if device == "auto" else set()
        self.device = device_of("cpu" if began == {"cpu"} else device)
        self.store = Store(store.folder.name, store.folder.parent, self.device.type)

    def ensure(self, settings: RunSettings, weights: bool = False) -> dict[str, Any]:
        """Return the record of `settings`, training it (and its parents) if it is not there.

        With `weights` all that training leaves must be on disk too, unharmed. Raises `InputError`
        for records, checkpoints or data that cannot be used; nothing is trained then.
        """
        record = self._done(settings, weights)
        if record:
            return record
        # Missing or damaged data is refused before anything is written.
        self._load(settings)
        if settings.parent:
            self.ensure(settings.parent, weights=True)
        with self.store.lock(settings.run):
            return self._done(settings, weights) or self._train(settings)

    def _done(self, settings: RunSettings, weights: bool) -> dict[str, Any] | None:
        record = self.store.read(settings)
        if record and settings.dataset.startswith("folder:"):
            self.store.require_data(record, self._load(settings).fingerprint)
        return record if record and not (weights and not self.store.has_all(settings.run)) else None

    def net(self, settings: RunSettings) -> nn.Module:
        """Return the finished net of a run that is done, as an ordinary module."""
        self.ensure(settings, weights=True)
        return shrink.load_net(self.store.weights(settings.run), settings.model)

    def _load(self, settings: RunSettings) -> datasets.Dataset:
        return _data(settings.dataset, str(self.data) if self.data else None)

    def _train(self, settings: RunSettings) -> dict[str, Any]:
        started = time.perf_counter()
        data = self._load(settings)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with _deterministic(settings.threads):
            model = self._start(settings, data.info)
            start = {name: w.detach().clone() for name, w in measure.prunable_weights(model)}
            dense = _fresh(settings, data.info)
            method = _method(settings)
            made = self._fit(settings, method, model, data)
            metrics = {}
            if made.status == "done":
                metrics = self._measure(settings, made.model, dense, data)
                metrics |= method.measures(made.model)
                for name, other in method.others(made.model).items():
                    metrics[f"metric_{name}"] = self._score(settings, other, data).metric
            if metrics and settings.parent and _same_shapes(made.model, start):
                metrics["kept_scale"] = kept_scale(made.model, start)
                made.arrays.update(_kept_sample(made.model, start))
        metrics |= {
            "dense_parameters": measure.parameters(dense),
            "dense_macs": measure.macs(dense, _shape(data.info)),
        }
        record = {
            "format": FORMAT,
            "run": settings.run,
            "parent": settings.parent.run if settings.parent else None,
            "status": made.status,
            "settings": settings.model_dump(mode="json"),
            "data": _describe(data, settings),
            "metrics": metrics,
            "validation": _validation(made.history, _task(settings, data.info).metric_name),
            "history": _columns(made.history),
            "latency": None,
            "environment": _environment(self.device),
            "cost": {
                "train_seconds": round(made.seconds, 3),
                "seconds": round(time.perf_counter() - started, 3),
                "process_peak_mb": _process_peak_mb(),
                **_device_peak_mb(self.device),
            },
        }
        weights = self.store.work(settings.run) / "weights.safetensors"
        _save(made.model, weights, settings, data.info)
        cuts = method.per_weight()
        record = self.store.write(record, made.arrays, weights, cuts)
        shutil.rmtree(self.store.work(settings.run), ignore_errors=True)
        return record

    def _start(self, settings: RunSettings, info: datasets.DatasetInfo) -> nn.Module:
        if settings.parent:
            parent = settings.parent.run
            model = shrink.load_net(self.store.weights(parent), settings.model)
            self.store.require_weights(parent)
            return model.requires_grad_(True)
        return _fresh(settings, info)

    def _fit(
        self,
        settings: RunSettings,
        method: methods.Method,
        model: nn.Module,
        data: datasets.Dataset,
    ) -> TrainResult:
        held_in, held_out = datasets.split(data.train, settings.validation)
        recipe = settings.recipe
        work = self.store.work(settings.run)
        work.mkdir(parents=True, exist_ok=True)
        return train(
            model,
            method,
            recipe,
            datasets.batches_of(
                held_in,
                data.info,
                recipe.batch_size,
                shift=recipe.shift,
                flip=recipe.flip,
                seed=settings.seed,
                device=self.device,
            ),
            datasets.batches_of(held_out, data.info, len(held_out), device=self.device),
            seed=settings.seed,
            task=_task(settings, data.info),
            device=self.device,
            precision=settings.precision,
            checkpoint=work / "checkpoint.pt",
            run=settings.run,
            show=self.show,
        )

    def _score(
        self, settings: RunSettings, model: nn.Module, data: datasets.Dataset
    ) -> measure.Scores:
        images = data.test
        if settings.evaluate == "validation":
            _, images = datasets.split(data.train, settings.validation)
        looked_at = datasets.batches_of(images, data.info, len(images), device=self.device)
        task = _task(settings, data.info)
        return task.evaluate(model, looked_at.ordered(512), data.info.num_classes)

    def _measure(
        self, settings: RunSettings, model: nn.Module, dense: nn.Module, data: datasets.Dataset
    ) -> dict[str, Any]:
        scores = self._score(settings, model, data)
        model, shape = model.cpu(), _shape(data.info)
        storage = shrink.storage(model, settings.model, shape, data.info.num_classes)
        return {
            "metric_name": _task(settings, data.info).metric_name,
            "metric": scores.metric,
            **scores.more,
            "loss": scores.loss,
            "images": scores.count,
            "sparsity": removed_share(model, dense),
            "layers": measure.layer_sparsity(model),
            "parameters": measure.parameters(model),
            "nonzeros": measure.nonzeros(model),
            "macs": measure.macs(model, shape),
            "nonzero_macs": measure.nonzero_macs(model, shape),
            "peak_memory_mb": measure.peak_memory_mb(model, shape),
            "stored_values": storage.nonzeros,
            "stored_with_indices": storage.numbers_with_indices,
            "bytes": storage.bytes,
        }


def _fresh(settings: RunSettings, info: datasets.DatasetInfo) -> nn.Module:
    """The dense net of a run, initialised by its seed, or pretrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        like = settings.model, _shape(info), info.num_classes
        return models.build(*like, settings.pretrained)


def _method(settings: RunSettings) -> methods.Method:
    target = (settings.target.value, settings.target.kind) if settings.target else ()
    return methods.build(settings.method, settings.params, *target)


def _task(settings: RunSettings, info: datasets.DatasetInfo) -> measure.Task:
    return measure.task(models.task_of(settings.model), info.mean, info.std)


def removed_share(model: nn.Module, dense: nn.Module) -> float:
    """Share (0-1) of the prunable weights of `dense` that are zero in `model`, or gone."""
    left = sum(int(w.count_nonzero()) for _, w in measure.prunable_weights(model))
    return 1 - left / sum(w.numel() for _, w in measure.prunable_weights(dense))


def _same_shapes(model: nn.Module, start: dict[str, torch.Tensor]) -> bool:
    shapes = {name: w.shape for name, w in measure.prunable_weights(model)}
    return shapes == {name: w.shape for name, w in start.items()}


def kept_scale(model: nn.Module, start: dict[str, torch.Tensor]) -> float:
    """Mean |w| of the weights that `model` kept, over the mean |w| of the same at the start.

    Below 1 the kept weights were shrunk, as by LASSO; near 1 they were only selected.
    """
    now = then = 0.0
    for name, weight in measure.prunable_weights(model):
        kept = weight.detach().cpu() != 0
        now += weight.detach().cpu()[kept].abs().sum().item()
        then += start[name].cpu()[kept].abs().sum().item()
    return now / then if then else float("nan")


def _kept_sample(
    model: nn.Module, start: dict[str, torch.Tensor], most: int = 2000
) -> dict[str, np.ndarray]:
    """At most `most` kept weights, evenly spaced, at the start and at the end."""
    ends = [(name, w.detach().cpu()) for name, w in measure.prunable_weights(model)]
    end = torch.cat([w[w != 0] for _, w in ends])
    begin = torch.cat([start[name].cpu()[w != 0] for name, w in ends])
    step = -(-len(end) // most) or 1
    return {"kept_start": begin[::step].numpy(), "kept_end": end[::step].numpy()}


@contextmanager
def _deterministic(threads: int) -> Iterator[None]:
    # cuBLAS needs this before its first call to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Filling what is overwritten anyway costs a twentieth of a LeNet step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def _shape(info: datasets.DatasetInfo) -> tuple[int, int, int]:
    return info.channels, info.height, info.width


def _save(model: nn.Module, path: Path, settings: RunSettings, info: datasets.DatasetInfo) -> None:
    shrink.save_net(model.cpu(), path, settings.model, _shape(info), info.num_classes)


def _describe(data: datasets.Dataset, settings: RunSettings) -> dict[str, Any]:
    return {
        "name": data.info.name,
        "title": data.info.title,
        "version": settings.dataset_version,
        "fingerprint": data.fingerprint,
        "train": len(data.train) - settings.validation,
        "validation": settings.validation,
        "test": len(data.test),
    }


def _validation(history: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    last = history[-1] if history else {}
    return {name: last.get(f"validation_{name}") for name in (metric, "loss")}


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in _VERSIONS},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "commit": commit(),
        "tree": _git("rev-parse", "HEAD:lib/prunestudy"),
    }


@functools.cache
def commit() -> str:
    """Git commit of the checkout, "-dirty" when its library differs.

    Outside git what PRUNESTUDY_COMMIT says, else "unknown".
    """
    head = _git("rev-parse", "HEAD")
    if not head:
        return os.environ.get("PRUNESTUDY_COMMIT") or "unknown"
    return head + ("-dirty" if _git("status", "--porcelain", "--", "lib", "pyproject.toml") else "")


@functools.cache
def _git(*words: str) -> str:
    command = ["git", "-C", str(repository()), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _process_peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _device_peak_mb(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"device_peak_mb": round(torch.cuda.max_memory_allocated(device) / 1e6, 1)}
