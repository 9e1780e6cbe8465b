"""Finished nets as ONNX files, and such files as nets again: what a deployment would run."""

import inspect
import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunestudy.errors import InputError, first_line, require, written_whole
from prunestudy.shrink.fold import fold, real_parameters, require_net
from prunestudy.shrink.runs import tensors_of
from prunestudy.values import inputs

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def export(net: nn.Module, path: str | Path, example: Tensor | tuple[Tensor, ...]) -> None:
    """Write `net`, folded, to `path` as ONNX, for batches of any size.

    `example` is an input batch, or a tuple of them; they are called `input`, `input_1`, ..., the
    outputs `output`, `output_1`, ... Raises `InputError` if ONNX Runtime's outputs for the example
    are not the net's up to rounding, and for a path that no file can be written to.
    """
    require_net(net)
    plain, given = fold(net).cpu(), tuple(x.detach().cpu() for x in inputs(example))
    # With a batch of one, the exporter would take its size for constant.
    traced = tuple(torch.cat([x, x])[: max(2, len(x))] for x in given)
    with written_whole(path) as part:
        try:
            with torch.no_grad():
                expected = tensors_of(plain(*given))
            _onnx(plain, traced).save(part)
            got = tensors_of(OnnxNet(part)(*given))
        except OSError:
            raise
        except Exception as error:  # of the net, the exporter or the runtime
            line = first_line(error.__cause__ or error)
            raise InputError(f"net = {type(net).__name__!r}: no ONNX of it: {line}") from None
        coarse = max((torch.finfo(p.dtype).eps for p in real_parameters(plain)), default=0.0)
        near = (_is_close(*pair, coarse) for pair in zip(got, expected, strict=True))
        equal = len(got) == len(expected) and all(near)
        allowed = "no ONNX of it: ONNX Runtime computes other outputs for the example"
        require(equal, "net", type(net).__name__, allowed)


def _onnx(plain: nn.Module, given: tuple[Tensor, ...]) -> Any:
    shapes = tuple({0: torch.export.Dim("batch")} for _ in given)
    parameters = enumerate(inspect.signature(plain.forward).parameters.values())
    first = next((i for i, p in parameters if p.kind is p.VAR_POSITIONAL), len(given))
    if first < len(given):  # forward(x, *more): for torch these are one
        shapes = (*shapes[:first], shapes[first:])
    said = io.StringIO()  # the exporter prints to both streams, and warns
    with warnings.catch_warnings(action="ignore"), redirect_stdout(said), redirect_stderr(said):
        program = torch.onnx.export(
            plain,
            given,
            dynamo=True,
            verbose=False,
            input_names=_names("input", len(given)),
            dynamic_shapes=shapes,
        )
    graph = program.model.graph
    if any(isinstance(value.shape[0], int) for value in graph.inputs):
        raise ValueError(f"takes batches of {len(given[0])} only")
    for value, name in zip(graph.outputs, _names("output", len(graph.outputs)), strict=True):
        value.name = name
    return program


class OnnxNet(nn.Module):
    """The net in an ONNX file, computed by ONNX Runtime: only to be called.

    Takes and returns what the exported net does, on the CPU. `threads`: of the runtime's;
    `device`: where it computes, "cpu" or "cuda". Raises `InputError` if the file is missing or not
    one that `export` wrote, and for a device that the runtime was not built for.
    """

    def __init__(self, path: str | Path, threads: int = 1, device: str = "cpu") -> None:
        super().__init__()
        import onnxruntime  # late: it takes a while

        provider = _PROVIDERS.get(device)
        built = provider in onnxruntime.get_available_providers()
        require(built, "device", device, "one that ONNX Runtime was built for")
        right = type(threads) is int and threads > 0
        require(right, "threads", threads, "a positive integer")
        require(Path(path).is_file(), "path", str(path), "a file that export wrote")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # its errors share no base of their own
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise InputError(f"path = {str(path)!r}: not a file that export wrote") from error

    def forward(self, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The output for input batches (n, ...): a tensor, or a tuple of several."""
        names = [each.name for each in self.session.get_inputs()]
        feed = {n: x.detach().cpu().numpy() for n, x in zip(names, given, strict=True)}
        outputs = tuple(torch.from_numpy(each) for each in self.session.run(None, feed))
        return outputs if len(outputs) > 1 else outputs[0]


def _names(first: str, count: int) -> list[str]:
    return [first, *(f"{first}_{number}" for number in range(1, count))]


def _is_close(got: Tensor, expected: Tensor, coarse: float = 0.0) -> bool:
    """Whether they are equal up to rounding in their type, or to `coarse`, the weights' epsilon."""
    if not expected.is_floating_point() or got.shape != expected.shape:
        return torch.equal(got, expected)
    near = max(torch.finfo(expected.dtype).eps, coarse) ** 0.5
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(got, expected, rtol=near, atol=near * largest, equal_nan=True)
