"""One training loop for every method: recipe in, plain trained module out."""

from prunestudy.train.checkpoint import read_checkpoint, write_checkpoint
from prunestudy.train.deterministic import deterministic
from prunestudy.train.loop import Loop, TrainResult, train
from prunestudy.train.memory import keep_freed_memory
from prunestudy.train.recipe import Recipe

__all__ = [
    "Loop",
    "Recipe",
    "TrainResult",
    "deterministic",
    "keep_freed_memory",
    "read_checkpoint",
    "train",
    "write_checkpoint",
]
