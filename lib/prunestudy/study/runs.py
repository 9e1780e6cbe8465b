"""One run, from its settings to its record."""

import copy
import functools
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunestudy import datasets, measure, methods, models, shrink
from prunestudy.errors import InputError, require, require_one_of
from prunestudy.study.lines import FORMAT, bits_of
from prunestudy.study.provenance import environment
from prunestudy.study.records import Store
from prunestudy.study.settings import RunSettings, dense_macs, dense_net, method_of
from prunestudy.train import Result, Steps, deterministic, gang, pruning


def device_of(name: str = "auto") -> torch.device:
    """Return the device called `name`: "cpu", "cuda", or "auto" (CUDA when there)."""
    require_one_of("device", name, ("auto", "cpu", "cuda"))
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("device = 'cuda': no CUDA device here; allowed are auto, cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def stored_net(path: Path) -> tuple[nn.Module, tuple[int, int, int]]:
    """The net that a run left in `path`, and (channels, height, width) of its images.

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
        self.data, self.show = str(data), show
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
        shape, num_classes = job.info.shape, job.info.num_classes
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with deterministic(settings.threads):
            if settings.parent:
                model = stored_net(self.store.weights(settings.parent.run))[0]
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(settings.seed)
                    model = models.build(settings.model, shape, num_classes, settings.pretrained)
            work.mkdir(parents=True, exist_ok=True)
            try:
                made = yield from job.training(model, work / "checkpoint.pt", self.show)
            except InputError:
                with suppress(OSError):  # it has a checkpoint
                    work.rmdir()
                raise
            metrics, arrays = job.metrics(made), made.probe.arrays()
            if made.status == "done" and settings.parent:
                scale, sample = measure.kept_weights(made.model, model)
                metrics, arrays = metrics | scale, arrays | sample
        weights = work / "weights.safetensors"
        about = {"factory": settings.model, "sizes": " ".join(map(str, (*shape, num_classes)))}
        shrink.save(made.model, weights, like=job.dense, about=about)
        if made.status == "done":
            metrics["bytes"] = weights.stat().st_size
        record = job.record(made, metrics, time.perf_counter() - started)
        self.store.write(record, weights, arrays)
        shutil.rmtree(work, ignore_errors=True)


@functools.lru_cache(maxsize=2)
def _data(name: str, root: str, _: str) -> datasets.Dataset:
    return datasets.load(name, root)


_split = functools.lru_cache(maxsize=2)(datasets.split)  # it copies all images


class _Job:
    """A run that is being trained: its settings, its data and where."""

    def __init__(self, settings: RunSettings, data: datasets.Dataset, device: torch.device) -> None:
        self.settings, self.data, self.info, self.device = settings, data, data.info, device
        self.dense = dense_net(settings.model, self.info)
        task = models.task_of(settings.model)
        self.task = measure.task(task, self.info.mean, self.info.std)
        self.held_in, self.held_out = _split(data.train, settings.validation)

    def training(self, model: nn.Module, checkpoint: Path, show: bool) -> Steps[Result]:
        settings, info, recipe = self.settings, self.info, self.settings.recipe
        ways = {"shift": recipe.shift, "flip": recipe.flip, "seed": settings.seed}
        return pruning(
            model,
            method_of(settings),
            datasets.batches_of(self.held_in, info, recipe.batch_size, device=self.device, **ways),
            recipe,
            validation=self.batches(self.held_out),
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

    def batches(self, images: datasets.ImageSet) -> datasets.Batches:
        return datasets.batches_of(images, self.info, len(images), device=self.device)

    def scores(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """The task's metric first, then the loss."""
        scores = self.task.evaluate(model, batches, self.info.num_classes)
        return {self.task.metric_name: scores.metric, "loss": scores.loss}

    def judged(self, model: nn.Module) -> tuple[measure.Scores, torch.Tensor | None]:
        """Scores on the images that the run is judged by; which of the test images are right."""
        tested = self.settings.evaluate == "test"
        images, guesses = self.data.test if tested else self.held_out, []
        # The layout that it was trained in.
        net = copy.deepcopy(model).to(self.device, memory_format=torch.channels_last)
        if tested and self.task.name == "classify":
            net.register_forward_hook(lambda *seen: guesses.append(seen[-1].argmax(1).cpu()))
        scores = self.task.evaluate(net, self.batches(images).ordered(512), self.info.num_classes)
        labels = torch.as_tensor(images.labels) if guesses else None
        return scores, torch.cat(guesses) == labels if guesses else None

    def metrics(self, made: Result) -> dict[str, Any]:
        """Quality and cost of the finished net, of a diverged one the dense net's cost alone."""
        macs = dense_macs(self.settings.model, self.info)
        costs = {"dense_parameters": measure.parameters(self.dense), "dense_macs": macs}
        if made.status == "diverged":
            return costs
        (scores, right), model = self.judged(made.model), made.model.cpu()
        nonzeros, example = measure.nonzeros(model), torch.zeros(128, *self.info.shape)
        metrics = {
            "metric_name": self.task.metric_name,
            "metric": scores.metric,
            **scores.more,
            "loss": scores.loss,
            "images": scores.count,
            "sparsity": measure.removed_share(model, self.dense),
            "layers": measure.layer_sparsity(model),
            "parameters": measure.parameters(model),
            "nonzeros": nonzeros,
            "macs": measure.macs(model, example),
            "nonzero_macs": measure.nonzero_macs(model, example),
            "peak_memory_mb": measure.peak_memory_mb(model, example),
            "stored_values": nonzeros,
            "stored_with_indices": 2 * nonzeros,  # as the papers count: an index for each value
        }
        if right is not None:
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
