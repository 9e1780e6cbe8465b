"""What a training asks of its process: the same bits whenever it is repeated, and its memory."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Use deterministic algorithms and `threads` threads inside; after it what was set before."""
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


@contextmanager
def full_precision(on: bool) -> Iterator[None]:
    """Compute in fp32 inside where `on`, not in TF32; after it what was set before."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = not on
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def seed_default(seed: int, device: torch.device) -> None:
    """Seed what draws without a generator of its own; `torch.manual_seed` takes 0.4 ms for it."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensors; return whether the C library can.

    By default glibc gives the activations of each step back to the system, which then clears every
    page again at the next one. It concerns the whole process. Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; on Windows no such call
        return False
    return all([mallopt(_TRIM_THRESHOLD, -1), mallopt(_MMAP_MAX, 0)])
