"""Process-wide state of a training: determinism, several trainings in turns, memory."""

import ctypes
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

# By its bits: as a number it would be 0 where such numbers count as 0.
_DENORMAL = torch.tensor(713624, dtype=torch.int32, device="cpu").view(torch.float32)
_T = TypeVar("_T")
Steps = Generator[Any, None, _T]  # a training by steps, and what it returns at its end


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


def set_arithmetic(tf32: bool) -> None:
    """Multiply fp32 numbers on CUDA in TF32 where `tf32`, and count denormal numbers as 0.

    Weight decay lets weights of inputs that are always 0 (the border of MNIST) fade into denormal
    numbers, with which an epoch of Adam took seven times as long.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.set_flush_denormal(True)


def use_own_stream(device: torch.device) -> None:
    """From now on queue work of a CUDA `device` on a new stream, behind what is queued."""
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(stream)


class Turn:
    """Context manager that gives a training its own copy of torch's process-wide state."""

    def __init__(self) -> None:
        self._other = _read()

    def __enter__(self) -> None:
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        generator, arithmetic, algorithms, cuda = self._other
        self._other = _read()
        torch.default_generator.set_state(generator)
        matmul, torch.backends.cudnn.allow_tf32, flushes, threads = arithmetic
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.set_flush_denormal(flushes)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        on, warn_only, torch.utils.deterministic.fill_uninitialized_memory = algorithms
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
        if cuda:
            torch.cuda.set_rng_state(cuda[0])
        if torch.cuda.is_initialized():
            torch.cuda.set_stream(cuda[1] if cuda else torch.cuda.default_stream())


def _read() -> tuple[Any, ...]:
    """The default generators, arithmetic, threads, kinds of algorithms and CUDA's stream."""
    there, tf32 = torch.cuda.is_initialized(), torch.backends.cudnn.allow_tf32
    flushes = not (_DENORMAL * 1).item()  # torch does not say
    return (
        torch.default_generator.get_state(),
        (torch.backends.cuda.matmul.allow_tf32, tf32, flushes, torch.get_num_threads()),
        (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        (torch.cuda.get_rng_state(), torch.cuda.current_stream()) if there else None,
    )


def gang(trainings: Iterable[Steps[_T] | None], size: int = 1) -> Iterator[_T]:
    """Advance `size` of `trainings` by a step each in turns; give what each returns at its end.

    Each is what `pruning` gives, and ends as it would alone. A new one starts when another
    ends; None means that none can start yet. Closed early, it closes those under way.
    """
    waiting, going = iter(trainings), deque()
    try:
        while True:
            while len(going) < size and (new := next(waiting, None)):
                going.append((new, Turn()))
            if not going:
                return
            training, turn = going.popleft()
            try:
                with turn, torch.inference_mode(False):  # gradients, wherever it is called
                    next(training)
            except StopIteration as end:
                yield end.value
            else:
                going.append((training, turn))
    finally:
        for training, turn in going:
            with turn:
                training.close()


def seed_default(seed: int, device: torch.device) -> None:
    """Seed what draws without a generator of its own; `torch.manual_seed` takes 0.4 ms for it."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def keep_freed_memory() -> None:
    """Keep freed memory of the process for the next tensors, where glibc can be told to.

    By default it gives the activations of each step back to the system, which then clears every
    page again at the next one.
    """
    trim_threshold, mmap_max = -1, -4  # of glibc's malloc.h
    with suppress(AttributeError, OSError, TypeError):  # no such function; on Windows no such call
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
