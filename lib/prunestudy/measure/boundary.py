"""Boundary F1: how well the contours of a segmentation lie where they should.

Csurka, Larlus, Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC
2013: for one class, precision is the share of the predicted contour that lies within `tolerance`
of the true one, recall that of the true contour within it of the predicted, F1 their harmonic
mean; the tolerance is 0.75% of the image's diagonal.

Ours: a contour is the pixels of a class with one of another class among their four neighbours;
neither the image's edge nor the border of unlabelled pixels is one. A class that has a contour in
one of the masks only scores 0, one without any is left out; an image's score is the mean over its
classes, that of a set the mean over the images that have contours.
"""

import math

import numpy as np
from torch import Tensor

IGNORED = 255  # the label of unlabelled pixels


def boundary_f1(predicted: Tensor, true: Tensor, tolerance: float = 0.0075) -> float:
    """F1 (0-1) of the contours in two masks of class numbers (H, W); NaN if neither has any.

    `tolerance` is a share of the diagonal. Pixels that are 255 in `true` are left out of both.
    """
    truth = true.cpu().numpy()
    void = truth == IGNORED
    guess = np.where(void, IGNORED, predicted.cpu().numpy())
    reach = tolerance * math.hypot(*truth.shape)
    classes = np.union1d(truth, guess)
    scores = [_f1(guess == c, truth == c, void, reach) for c in classes[classes != IGNORED]]
    scores = [score for score in scores if not math.isnan(score)]
    return float(np.mean(scores)) if scores else math.nan


def _f1(guess: np.ndarray, truth: np.ndarray, void: np.ndarray, reach: float) -> float:
    ours, theirs = _contour(guess, void), _contour(truth, void)
    if not ours.any() or not theirs.any():
        return 0.0 if ours.any() or theirs.any() else math.nan
    precision, recall = _share_near(ours, theirs, reach), _share_near(theirs, ours, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _contour(inside: np.ndarray, void: np.ndarray) -> np.ndarray:
    from scipy import ndimage  # late: it takes a while

    return inside & ~ndimage.binary_erosion(inside | void, border_value=1)


def _share_near(points: np.ndarray, others: np.ndarray, reach: float) -> float:
    """Share of `points` that are at most `reach` pixels from one of `others`."""
    # Contours are thin: a tree of their pixels is much quicker than a distance for every pixel.
    from scipy.spatial import cKDTree  # late, as above

    distances, _ = cKDTree(np.argwhere(others)).query(np.argwhere(points))
    return float((distances <= reach).mean())
