"""One training loop for every method: any net and any batches in, a plain smaller net out."""

from prunestudy.train.checkpoint import read_checkpoint, write_checkpoint
from prunestudy.train.deterministic import deterministic
from prunestudy.train.loop import Loop
from prunestudy.train.memory import keep_freed_memory
from prunestudy.train.prune import Result, prune, shrink_to
from prunestudy.train.recipe import Recipe

__all__ = [
    "Loop",
    "Recipe",
    "Result",
    "deterministic",
    "keep_freed_memory",
    "prune",
    "read_checkpoint",
    "shrink_to",
    "write_checkpoint",
]
