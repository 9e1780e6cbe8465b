"""One training loop for every method: any net and any batches in, a plain smaller net out."""

# ruff: noqa: F401  (public names of the package)

from prunestudy.train.checkpoint import read_checkpoint, write_checkpoint
from prunestudy.train.loop import Loop
from prunestudy.train.process import Steps, deterministic, gang, keep_freed_memory
from prunestudy.train.prune import prune, pruning, shrink_to
from prunestudy.train.recipe import Recipe
from prunestudy.train.result import Result
