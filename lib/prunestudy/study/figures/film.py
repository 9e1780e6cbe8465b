"""Animations of a training: a player with a slider, in JupyterLab and in pages without a network.

Unlike matplotlib's it takes no icons from there, and the same frames give the same page.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure

from prunestudy.study.figures import with_palette

_SIGNS = {
    "minus": "-",
    "plus": "+",
    "fast-backward": "|&lt;",
    "fast-forward": "&gt;|",
    "step-backward": "&lt;",
    "step-forward": "&gt;",
    "play fa-flip-horizontal": "&#9664;",
    "play": "&#9654;",
    "pause": "||",
}


def slide(
    figure: Figure, draw: Callable[[Any], None], values: Sequence[Any], name: str
) -> HTML | None:
    """A slider over `values` of `name`; an animation in notebooks executed non-interactively."""
    # A person's notebook can be asked for input; papermill and nbconvert say that theirs cannot.
    if not getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False):
        return film(figure, draw, values)
    from ipywidgets import SelectionSlider, interact  # late: a quarter of a second

    plt.close(figure)

    def show(value: Any) -> None:
        draw(value)
        display(figure)

    interact(show, value=SelectionSlider(options=values, description=name))
    return None


def film(figure: Figure, draw: Callable[[Any], None], frames: Sequence[Any]) -> HTML:
    """A player of what `draw(frame)` fills into the cleared axes; its `alt` is the last title."""
    figure.set_layout_engine("constrained")
    draw(frames[-1])
    figure.canvas.draw()
    figure.set_layout_engine("none")  # one layout for all frames
    moving = FuncAnimation(figure, draw, frames, init_func=lambda: None)
    with mpl.rc_context({"savefig.dpi": 90}):
        page = moving.to_jshtml(5, default_mode="once")
    titles = ". ".join(filter(None, (axes.get_title() for axes in figure.axes)))
    plt.close(figure)
    page = re.sub(r"<link[^>]*>", "", page)
    page = re.sub(r'<i class="fa fa-([\w -]+)"></i>', lambda found: _SIGNS[found[1]], page)
    page = re.sub(r'base64,([^"]+)"', _smaller, page)
    name = re.search(r"_anim_img(\w+)", page)[1]
    page = page.replace(f'<img id="_anim_img{name}"', f'<img id="_anim_img{name}" alt="{titles}"')
    digest = hashlib.sha256(page.replace(name, "").encode()).hexdigest()
    return HTML(page.replace(name, digest[:16]))


def _smaller(found: re.Match) -> str:
    """A frame in a palette of 64 colours: a third of the bytes."""
    png = with_palette(base64.b64decode(found[1].replace("\\\n", "")), 64)
    return f'base64,{base64.b64encode(png).decode()}"'
