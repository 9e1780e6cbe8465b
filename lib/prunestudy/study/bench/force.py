"""Force Regularization: what the force costs in a training step, what its closed form saves."""

import torch

from prunestudy import measure, methods, models
from prunestudy.methods.force import force, force_by_pairs
from prunestudy.study.bench import Row, ratio_text, training_step


def force_step(quick: bool = False) -> Row:
    """A ResNet-20 training step, batch 128 of 3x32x32, with L2 force over a dense one."""
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    x = x.contiguous(memory_format=torch.channels_last)
    targets = {"dense": None, "force": 0.05}
    both = {
        name: training_step(
            models.build("resnet20", (3, 32, 32), 10), methods.build(name, {}, target), x, y
        )
        for name, target in targets.items()
    }
    seconds = measure.interleave(both, rounds=3 if quick else 100, warmup=2)
    ratio = measure.ratio(seconds["force"], seconds["dense"])
    return "ResNet-20 training step: with L2 force / dense", ratio_text(ratio)


def closed_form(quick: bool = False) -> Row:
    """The L2 force of 512 filters of 64x3x3: the sum over pairs over the closed form."""
    weight = torch.randn(512, 64, 3, 3)
    both = {"pairs": lambda: force_by_pairs(weight), "closed": lambda: force(weight)}
    seconds = measure.interleave(both, rounds=3 if quick else 50, warmup=1)
    ratio = measure.ratio(seconds["pairs"], seconds["closed"])
    return "L2 force of 512 filters: sum over pairs / closed form", ratio_text(ratio)


ROWS = (force_step, closed_form)
