"""One training loop for every method: recipe in, plain trained module out."""

from prunestudy.train.checkpoint import read_checkpoint, write_checkpoint
from prunestudy.train.loop import TrainResult, train
from prunestudy.train.recipe import Recipe

__all__ = ["Recipe", "TrainResult", "read_checkpoint", "train", "write_checkpoint"]
