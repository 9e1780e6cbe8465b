"""Finished nets as ONNX files, and such files as nets again: what a deployment would run."""

import contextlib
import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from prunestudy.errors import InputError, require, writable_file, written_whole
from prunestudy.shrink.fold import fold


def export_onnx(model: nn.Module, path: str | Path, shape: tuple[int, ...]) -> None:
    """Write `model`, folded, to `path` as ONNX: input `images` (batch, *shape), output `output`.

    More outputs are `output_1`, `output_2`, ... The batch may be of any size. The file appears
    whole or not at all. Raises `InputError` for a path that no file can be written to (see
    `writable_file`), or if the net cannot be exported (the reason in one line).
    """
    writable_file(path)
    plain = fold(model).cpu()
    like = next((p.dtype for p in plain.parameters()), torch.float32)
    images = torch.zeros(2, *shape, dtype=like)  # with one, the batch would be taken for constant
    try:
        with _quiet():
            program = torch.onnx.export(
                plain,
                (images,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except torch.onnx.OnnxExporterError as error:
        line = next(iter(str(error.__cause__ or error).splitlines()), "")
        raise InputError(f"model = {type(model).__name__!r}: no ONNX of it: {line}") from None
    rows = program.model.graph.inputs[0].shape[0]
    allowed = f"no ONNX of it: takes batches of {rows} only"
    require(not isinstance(rows, int), "model", type(model).__name__, allowed)
    for number, value in enumerate(program.model.graph.outputs):
        value.name = f"output_{number}" if number else "output"
    with written_whole(path) as part:
        program.save(part)


_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def onnx_runs_on(device: str) -> bool:
    """Whether ONNX Runtime, as it is installed, computes on `device`, "cpu" or "cuda"."""
    import onnxruntime  # late: it takes a while

    return _PROVIDERS.get(device) in onnxruntime.get_available_providers()


class OnnxNet(nn.Module):
    """The net in an ONNX file, computed by ONNX Runtime: only to be called.

    Maps (batch, *shape) to its output, as the exported net does, both on the CPU. `threads`: of
    the runtime's; `device`: where it computes, "cpu" or "cuda". Raises `InputError` if the file
    is missing or not one that `export_onnx` wrote, and for a device that the runtime has not.
    """

    def __init__(self, path: str | Path, threads: int = 1, device: str = "cpu") -> None:
        super().__init__()
        import onnxruntime  # late: it takes a while

        require(onnx_runs_on(device), "device", device, "one that ONNX Runtime was built for")
        right = type(threads) is int and threads > 0
        require(right, "threads", threads, "a positive integer")
        require(Path(path).is_file(), "path", str(path), "a file that export_onnx wrote")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=[_PROVIDERS[device]]
            )
        except Exception as error:  # its errors share no base of their own
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise InputError(f"path = {str(path)!r}: not a file that export_onnx wrote") from None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The output for images (batch, *shape): a tensor, or a tuple of several."""
        found = self.session.run(None, {"images": x.detach().cpu().numpy()})
        outputs = tuple(torch.from_numpy(output) for output in found)
        return outputs if len(outputs) > 1 else outputs[0]


@contextlib.contextmanager
def _quiet():
    """The exporter talks of its own inner life, on both streams and in warnings."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
