"""One run, from its settings to its record."""

import copy
import functools
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunestudy import datasets, measure, methods, models, shrink
from prunestudy.errors import InputError, require, require_one_of
from prunestudy.study.lines import FORMAT, bits_of
from prunestudy.study.provenance import environment
from prunestudy.study.records import Store
from prunestudy.study.settings import RunSettings, dense_macs, dense_net
from prunestudy.train import Result, Steps, deterministic, gang, pruning


def device_of(name: str = "auto") -> torch.device:
    """Return the device called `name`: "cpu", "cuda", or "auto" (CUDA when there)."""
    require_one_of("device", name, ("auto", "cpu", "cuda"))
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("device = 'cuda': no CUDA device here; allowed are auto, cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def stored_net(path: Path) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return the net that a run left in `path`, and the (channels, height, width) of its images.

    Raises `InputError` for a file that `shrink.load` refuses, or that no run wrote.
    """
    about = shrink.about(path)
    sizes = re.fullmatch(r"(\d{1,9}) (\d{1,9}) (\d{1,9}) (\d{1,9})", about.get("sizes", ""))
    require(bool(sizes) and "factory" in about, "path", str(path), "the net of a run")
    *shape, num_classes = map(int, sizes.groups())
    with torch.random.fork_rng(devices=[]):  # reading a file changes no draw
        fresh = models.build(about["factory"], tuple(shape), num_classes)
    return shrink.load(path, fresh), tuple(shape)


class Runner:
    """Makes sure that runs are done: reads their records, or trains what is missing.

    On `device` "auto" a profile goes on where its records were made: runs of different devices
    are not compared. Records of CUDA can be read without it; training then raises `InputError`.
    """

    def __init__(
        self, store: Store, data: Path | str = "", device: str = "auto", show: bool = False
    ) -> None:
        self.data, self.show = str(data) if data else None, show
        began = store.devices() if device == "auto" else set()
        self.device = torch.device(*began) if len(began) == 1 else device_of(device)
        self.store = Store(store.folder.name, store.folder.parent, self.device.type)

    def ensure(self, settings: RunSettings, weights: bool = False) -> dict[str, Any]:
        """Return the record of `settings`, training it (and its parents) if it is not there.

        With `weights` all that training leaves must be on disk too, unharmed. Raises `InputError`
        for records, checkpoints or data that cannot be used; nothing is trained then.
        """
        record = self.done(settings, weights)
        if record:
            return record
        # A missing device, and missing or damaged data, is refused before anything is written.
        device_of(self.device.type)
        self.load(settings.dataset)
        if settings.parent:
            self.ensure(settings.parent, weights=True)
        return next(gang([self.training(settings, weights)]))

    def training(self, settings: RunSettings, weights: bool = False) -> Steps[dict[str, Any]]:
        """The same by steps, for `gang`; the parent's net must be there."""
        with self.store.lock(settings.run):
            if not self.done(settings, weights):
                yield from self._train(settings)
        return self.store.require(settings.run)

    def done(self, settings: RunSettings, weights: bool = False) -> dict[str, Any] | None:
        """The record of `settings`; None if there is none, or `weights` are to be and are not."""
        record = self.store.read(settings, datasets.fingerprint(settings.dataset, self.data))
        return record if not weights or self.store.has(settings.run, "arrays", "weights") else None

    def net(self, settings: RunSettings) -> nn.Module:
        """Return the finished net of a run that is done, as an ordinary module."""
        self.ensure(settings, weights=True)
        return stored_net(self.store.weights(settings.run))[0]

    def load(self, dataset: str) -> datasets.Dataset:
        """The data set, read once; `InputError` if it is missing or damaged."""
        return _data(dataset, self.data, datasets.fingerprint(dataset, self.data))

    def _train(self, settings: RunSettings) -> Steps[None]:
        started, work = time.perf_counter(), self.store.work(settings.run)
        job = _Job(settings, self.load(settings.dataset), self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with deterministic(settings.threads):
            model = self._start(job)
            work.mkdir(parents=True, exist_ok=True)
            made = yield from job.training(model, work / "checkpoint.pt", self.show)
            metrics, arrays = job.metrics(made), made.probe.arrays()
            if made.status == "done" and settings.parent:
                scale, sample = measure.kept_weights(made.model, model)
                metrics, arrays = metrics | scale, arrays | sample
        weights = work / "weights.safetensors"
        name, shape, num_classes = job.like
        sizes = " ".join(map(str, (*shape, num_classes)))
        like, about = dense_net(name, job.data.info), {"factory": name, "sizes": sizes}
        shrink.save(made.model, weights, like=like, about=about)
        if made.status == "done":
            metrics["bytes"] = weights.stat().st_size
        record = job.record(made, metrics, time.perf_counter() - started)
        self.store.write(record, weights, arrays)
        shutil.rmtree(work, ignore_errors=True)

    def _start(self, job: "_Job") -> nn.Module:
        """The parent's net, or the dense one, initialised by the run's seed or pretrained."""
        settings = job.settings
        if settings.parent:
            return stored_net(self.store.weights(settings.parent.run))[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return models.build(*job.like, settings.pretrained)


@functools.lru_cache(maxsize=2)
def _data(name: str, root: str | None, _: str) -> datasets.Dataset:
    return datasets.load(name, root)


_split_once = functools.lru_cache(maxsize=2)(datasets.split)


def _split(images: datasets.ImageSet, validation: int) -> tuple[datasets.ImageSet, ...]:
    """`datasets.split`, which copies all images: once, where they are in memory."""
    split = _split_once if isinstance(images.images, torch.Tensor) else datasets.split
    return split(images, validation)


@dataclass
class _Job:
    """A run that is being trained: its settings, its data and where."""

    settings: RunSettings
    data: datasets.Dataset
    device: torch.device

    @property
    def like(self) -> tuple[str, tuple[int, int, int], int]:
        """The net's name, the shape of its images and the number of classes."""
        info = self.data.info
        return self.settings.model, (info.channels, info.height, info.width), info.num_classes

    @property
    def task(self) -> measure.Task:
        info = self.data.info
        return measure.task(models.task_of(self.settings.model), info.mean, info.std)

    def training(self, model: nn.Module, checkpoint: Path, show: bool) -> Steps[Result]:
        settings, info, recipe = self.settings, self.data.info, self.settings.recipe
        held_in, held_out = _split(self.data.train, settings.validation)
        ways = {"shift": recipe.shift, "flip": recipe.flip, "seed": settings.seed}
        target = (settings.target.value, settings.target.kind) if settings.target else ()
        return pruning(
            model,
            methods.build(settings.method, settings.params, *target),
            datasets.batches_of(held_in, info, recipe.batch_size, device=self.device, **ways),
            recipe,
            validation=datasets.batches_of(held_out, info, len(held_out), device=self.device),
            loss=self.task.loss,
            metric=self.scores,
            metrics=measure.task_metrics(self.task, info.num_classes),
            seed=settings.seed,
            device=self.device,
            precision=settings.precision,
            checkpoint=checkpoint,
            run=settings.run,
            show=show,
            probe=methods.probe_of(settings.method, self.task.pixels),
        )

    def scores(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """The task's metric first, then the loss."""
        scores = self.task.evaluate(model, batches, self.data.info.num_classes)
        return {self.task.metric_name: scores.metric, "loss": scores.loss}

    def judged(self, model: nn.Module) -> tuple[measure.Scores, torch.Tensor]:
        """Scores of `model` on the images that the run is judged by; which it classifies right."""
        info, images = self.data.info, self.data.test
        if self.settings.evaluate == "validation":
            _, images = _split(self.data.train, self.settings.validation)
        batches = datasets.batches_of(images, info, len(images), device=self.device)
        # The layout that it was trained in.
        net = copy.deepcopy(model).to(self.device, memory_format=torch.channels_last)
        guesses, labels = [], []

        def noted() -> Iterable[Any]:
            for x, y in batches.ordered(512):
                labels.append(y.cpu())
                yield x, y

        if self.task.name == "classify":
            net.register_forward_hook(lambda *seen: guesses.append(seen[-1].argmax(1).cpu()))
        scores = self.task.evaluate(net, noted(), info.num_classes)
        return scores, torch.cat(guesses) == torch.cat(labels) if guesses else torch.empty(0)

    def metrics(self, made: Result) -> dict[str, Any]:
        """Quality and cost of the finished net, of a diverged one the dense net's cost alone."""
        name, shape, _ = self.like
        dense, macs = dense_net(name, self.data.info), dense_macs(name, self.data.info)
        costs = {"dense_parameters": measure.parameters(dense), "dense_macs": macs}
        if made.status == "diverged":
            return costs
        (scores, right), model = self.judged(made.model), made.model.cpu()
        nonzeros, example = measure.nonzeros(model), torch.zeros(128, *shape)
        metrics = {
            "metric_name": self.task.metric_name,
            "metric": scores.metric,
            **scores.more,
            "loss": scores.loss,
            "images": scores.count,
            "sparsity": measure.removed_share(model, dense),
            "layers": measure.layer_sparsity(model),
            "parameters": measure.parameters(model),
            "nonzeros": nonzeros,
            "macs": measure.macs(model, example),
            "nonzero_macs": measure.nonzero_macs(model, example),
            "peak_memory_mb": measure.peak_memory_mb(model, example),
            "stored_values": nonzeros,
            "stored_with_indices": 2 * nonzeros,  # as the papers count: an index for each value
        }
        if len(right) and self.settings.evaluate == "test":
            metrics["right"] = bits_of(right.numpy())
        metrics |= made.method.report() | made.probe.measures()
        others = {f"metric_{name}": other for name, other in made.probe.others().items()}
        return metrics | costs | {name: self.judged(net)[0].metric for name, net in others.items()}

    def record(self, made: Result, metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
        settings, data, history = self.settings, self.data, made.history
        last = history[-1] if history else {}
        columns = dict.fromkeys(name for row in history for name in row)
        cost = {"train_seconds": round(made.seconds, 3), "seconds": round(seconds, 3)}
        if self.device.type == "cuda":
            cost["device_peak_mb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e6, 1)
        right = {"right": metrics.pop("right")} if "right" in metrics else {}
        return right | {
            "format": FORMAT,
            "run": settings.run,
            "parent": settings.parent.run if settings.parent else None,
            "status": made.status,
            "settings": settings.kept(),
            "data": {
                "name": data.info.name,
                "title": data.info.title,
                "version": settings.dataset_version,
                "fingerprint": data.fingerprint,
                "train": len(data.train) - settings.validation,
                "validation": settings.validation,
                "test": len(data.test),
            },
            "metrics": metrics,
            "validation": {n: last.get(f"validation_{n}") for n in (self.task.metric_name, "loss")},
            "history": {name: [row.get(name) for row in history] for name in columns},
            "latency": None,
            "environment": environment(self.device),
            "cost": cost,
        }
