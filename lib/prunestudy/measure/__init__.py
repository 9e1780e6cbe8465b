"""What a net is worth and what it costs: quality, parameters, MACs, memory, latency."""

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
from prunestudy.measure.metrics import Metrics, constant_psnr, limits, task_metrics
from prunestudy.measure.tasks import Scores, Task, task

__all__ = [
    "Metrics",
    "Scores",
    "Task",
    "constant_psnr",
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
    "parameters",
    "peak_memory_mb",
    "prunable_weights",
    "removed_share",
    "same_shapes",
    "task",
    "task_metrics",
]
