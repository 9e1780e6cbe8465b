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
    from scipy.ndimage import binary_erosion  # late: it takes a while
    from scipy.spatial import cKDTree

    truth = true.cpu().numpy()
    void = truth == IGNORED
    guess = np.where(void, IGNORED, predicted.cpu().numpy())
    reach, scores = tolerance * math.hypot(*truth.shape), []
    for number in np.setdiff1d([truth, guess], IGNORED):
        insides = guess == number, truth == number
        cores = [binary_erosion(inside | void, border_value=1) for inside in insides]
        ours, theirs = (np.argwhere(i & ~core) for i, core in zip(insides, cores, strict=True))
        # Contours are thin: a tree of their pixels is much quicker than a distance for every pixel.
        if len(ours) and len(theirs):
            precision = np.mean(cKDTree(theirs).query(ours)[0] <= reach)
            recall = np.mean(cKDTree(ours).query(theirs)[0] <= reach)
            some = precision + recall
            scores.append(2 * precision * recall / some if some else 0.0)
        elif len(ours) or len(theirs):
            scores.append(0.0)
    return float(np.mean(scores)) if scores else math.nan
