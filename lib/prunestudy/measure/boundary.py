"""Boundary F1: how well the contours of a segmentation lie where they should.

Csurka, Larlus, Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC
2013: of one class, precision is the share of the predicted contour that lies within `tolerance`
of the true one, recall that of the true contour within it of the predicted, F1 their harmonic
mean; the tolerance is 0.75% of the image's diagonal.

Ours: a contour is the pixels of a class with one of another among their four neighbours, the
image's edge is none; a class that has a contour in one of the masks only scores 0, one without
any is left out; an image's score is the mean over its classes, that of a set the mean over the
images that have contours.
"""

import math

import numpy as np
from torch import Tensor

IGNORED = 255  # the label of pixels that nobody labelled
TOLERANCE = 0.0075


def boundary_f1(predicted: Tensor, true: Tensor, tolerance: float = TOLERANCE) -> float:
    """F1 (0-1) of the contours in two masks of class numbers (H, W); NaN if neither has any.

    `tolerance` is a share of the diagonal. Where `true` is 255 the prediction counts as right.
    """
    truth = true.cpu().numpy()
    guess = np.where(truth == IGNORED, IGNORED, predicted.cpu().numpy())
    reach = tolerance * math.hypot(*truth.shape)
    classes = np.union1d(truth, guess)
    scores = [_f1(guess == c, truth == c, reach) for c in classes[classes != IGNORED]]
    scores = [score for score in scores if not math.isnan(score)]
    return float(np.mean(scores)) if scores else math.nan


def _f1(guess: np.ndarray, truth: np.ndarray, reach: float) -> float:
    ours, theirs = _contour(guess), _contour(truth)
    if not ours.any() or not theirs.any():
        return 0.0 if ours.any() or theirs.any() else math.nan
    precision, recall = _share_near(ours, theirs, reach), _share_near(theirs, ours, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _contour(inside: np.ndarray) -> np.ndarray:
    from scipy import ndimage  # late: it takes a while

    return inside & ~ndimage.binary_erosion(inside, border_value=1)


def _share_near(points: np.ndarray, others: np.ndarray, reach: float) -> float:
    """Share of `points` that are at most `reach` pixels from one of `others`."""
    # Contours are thin: a tree of their pixels is much quicker than a distance for every pixel.
    from scipy.spatial import cKDTree  # late, as above

    distances, _ = cKDTree(np.argwhere(others)).query(np.argwhere(points))
    return float((distances <= reach).mean())
