"""What a net is worth and what it costs: quality, parameters, MACs, memory, latency."""

from prunestudy.measure.boundary import boundary_f1
from prunestudy.measure.cost import (
    kept_sample,
    kept_scale,
    layer_macs,
    layer_sparsity,
    macs,
    nonzero_macs,
    nonzeros,
    parameters,
    prunable_weights,
    removed_share,
    same_shapes,
)
from prunestudy.measure.forward import interleave, latency, onnx_latency, peak_memory_mb
from prunestudy.measure.metrics import Metrics, limits, task_metrics
from prunestudy.measure.tasks import TASKS, Scores, Task, default_loss, own_task, task, top1

__all__ = [
    "TASKS",
    "Metrics",
    "Scores",
    "Task",
    "boundary_f1",
    "default_loss",
    "interleave",
    "kept_sample",
    "kept_scale",
    "latency",
    "layer_macs",
    "layer_sparsity",
    "limits",
    "macs",
    "nonzero_macs",
    "nonzeros",
    "onnx_latency",
    "own_task",
    "parameters",
    "peak_memory_mb",
    "prunable_weights",
    "removed_share",
    "same_shapes",
    "task",
    "task_metrics",
    "top1",
]
