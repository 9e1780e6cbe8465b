"""What a net is worth and what it costs: quality, parameters, MACs, memory, latency."""

# ruff: noqa: F401  (public names of the package)

from prunestudy.measure.cost import (
    kept_weights,
    layer_macs,
    layer_sparsity,
    macs,
    nonzero_macs,
    nonzeros,
    parameters,
    prunable_weights,
    removed_share,
)
from prunestudy.measure.forward import interleave, latency, onnx_latency, peak_memory_mb
from prunestudy.measure.metrics import Metrics, constant_psnr, limits, task_metrics
from prunestudy.measure.tasks import Scores, Task, task
