"""Figures as notebooks show them: their alternative text, and pictures with a palette."""

import io

import matplotlib.pyplot as plt
import numpy as np
from IPython.core.pylabtools import retina_figure
from PIL import Image

from prunestudy.study.figures import inline


def test_alternative_text_is_made_of_titles_axes_and_legends():
    figure, (left, right) = plt.subplots(1, 2)
    assert inline.alt_text(figure) == ""
    left.set(title="gates\nof fc1", xlabel="step", ylabel="gate g")
    left.plot([1, 2], label="kept")
    left.legend()
    right.set(xlabel="layer")
    assert inline.alt_text(figure) == "gates of fc1: gate g against step. layer. kept"
    figure.suptitle("LeNet")
    right.set(xlabel="")
    right.plot([1, 2], label="of all")
    figure.legend(handles=right.lines)
    assert inline.alt_text(figure) == "LeNet. gates of fc1: gate g against step. of all. kept"
    plt.close(figure)


def test_figures_in_notebooks_have_a_palette_and_show_the_same():
    figure, axes = plt.subplots()
    axes.imshow(np.linspace(0, 1, 400).reshape(20, 20))
    plain, _ = retina_figure(figure)
    png, shown = inline._display(figure)
    assert (shown["alt"], len(png) < 0.6 * len(plain)) == ("", True)
    small, large = (Image.open(io.BytesIO(data)) for data in (png, plain))
    assert (small.mode, small.size) == ("P", large.size)
    pixels = [np.asarray(picture.convert("RGB"), int) for picture in (small, large)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 0.5
    assert (pixels[0][0, 0] == 255).all()
    plt.close(figure)
