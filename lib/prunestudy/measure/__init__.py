"""What a net is worth and what it costs: quality, parameters, MACs, memory, latency."""

from prunestudy.measure.application import (
    Application,
    Constraint,
    Judgement,
    Metric,
    RefusedError,
    task_metrics,
)
from prunestudy.measure.boundary import boundary_f1
from prunestudy.measure.cost import (
    layer_macs,
    layer_sparsity,
    macs,
    nonzero_macs,
    nonzeros,
    parameters,
    prunable_weights,
)
from prunestudy.measure.kept import kept_sample, kept_scale, removed_share, same_shapes
from prunestudy.measure.latency import Ratio, interleave, latency, onnx_latency, ratio
from prunestudy.measure.memory import peak_memory_mb
from prunestudy.measure.tasks import TASKS, Scores, Task, task

__all__ = [
    "TASKS",
    "Application",
    "Constraint",
    "Judgement",
    "Metric",
    "Ratio",
    "RefusedError",
    "Scores",
    "Task",
    "boundary_f1",
    "interleave",
    "kept_sample",
    "kept_scale",
    "latency",
    "layer_macs",
    "layer_sparsity",
    "macs",
    "nonzero_macs",
    "nonzeros",
    "onnx_latency",
    "parameters",
    "peak_memory_mb",
    "prunable_weights",
    "ratio",
    "removed_share",
    "same_shapes",
    "task",
    "task_metrics",
]
