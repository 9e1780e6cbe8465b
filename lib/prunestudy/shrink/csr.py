"""Linear layers that compute with the nonzero weights only, in compressed sparse rows (CSR)."""

import functools
import warnings

import torch
from torch import Tensor, nn

from prunestudy.errors import require
from prunestudy.shrink.factors import replace, replaceable
from prunestudy.shrink.fold import fold


class CsrLinear(nn.Module):
    """A linear layer whose weight (out, in) is kept as CSR: y = W x + b, for inference.

    Maps (..., in_features) to (..., out_features). The arrays `rows`, `columns`, `values` and
    `bias` are buffers; it has no parameters.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        bias = weight.new_zeros(self.out_features) if linear.bias is None else linear.bias.detach()
        for name, array in zip(("rows", "columns", "values"), csr_arrays(weight), strict=True):
            self.register_buffer(name, array)
        self.register_buffer("bias", bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., out_features) of inputs (..., in_features)."""
        flat = x.reshape(-1, self.in_features)
        _spend_warnings()
        # Built at each forward (1 microsecond): torch can neither copy nor save modules with it.
        arrays = self.rows, self.columns, self.values
        shape = self.out_features, self.in_features
        weight = torch.sparse_csr_tensor(*arrays, shape, check_invariants=False)
        if len(flat) == 1:  # matrix times vector is up to 2.5 times faster than one column
            y = torch.addmv(self.bias, weight, flat[0])
        else:
            y = torch.addmm(self.bias[:, None], weight, flat.T).T
        return y.reshape(*x.shape[:-1], self.out_features)


def to_csr(model: nn.Module, min_sparsity: float = 0.0) -> nn.Module:
    """A folded copy of `model` whose linear layers of at least `min_sparsity` are `CsrLinear`.

    `min_sparsity` is a share of zero weights, in 0-1. Outputs differ by rounding only. Raises
    `InputError` outside 0-1.
    """
    require(0 <= min_sparsity <= 1, "min_sparsity", min_sparsity, "a share in 0-1")
    holder = nn.Sequential(fold(model))
    for layer, (name, *_) in replaceable(holder).items():
        zeros = 1 - int(layer.weight.count_nonzero()) / layer.weight.numel()
        if isinstance(layer, nn.Linear) and zeros >= min_sparsity:
            replace(holder, name, CsrLinear(layer))
    return holder[0]


def csr_arrays(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The CSR arrays of `matrix` (out, in): row pointers (out + 1), column indices, values.

    Both index arrays are int32, which MKL multiplies faster than torch's default int64.
    """
    rows, columns = matrix.nonzero(as_tuple=True)
    pointers = torch.zeros(len(matrix) + 1, dtype=torch.int32, device=matrix.device)
    pointers[1:] = torch.bincount(rows, minlength=len(matrix)).cumsum(0)
    return pointers, columns.to(torch.int32), matrix[rows, columns]


@functools.cache
def _spend_warnings() -> None:
    """Trigger torch's once-per-process warnings about CSR tensors, and suppress them."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        none, pointers = torch.zeros(0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        torch.sparse_csr_tensor(pointers, none, none.float(), (1, 1), check_invariants=False)
