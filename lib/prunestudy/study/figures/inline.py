"""Figures in notebooks: at twice the pixels, with alternative text made from the figure itself."""

import io

from matplotlib.figure import Figure
from PIL import Image


def show_well() -> None:
    """In a notebook, let every figure come with its size and `alt_text`; elsewhere do nothing."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell and "image/png" in shell.display_formatter.formatters:
        # It sets formatters of its own the first time it is imported: let it, then replace them.
        import matplotlib_inline.backend_inline  # noqa: F401

        shell.display_formatter.formatters["image/png"].for_type(Figure, _display)


def _display(figure: Figure) -> tuple[bytes, dict[str, object]] | None:
    from IPython.core.pylabtools import retina_figure

    drawn = retina_figure(figure)
    if drawn is None:
        return None
    png, size = drawn
    # Executed notebooks are tracked: with a palette of 256 colours less than half the bytes.
    picture, out = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue(), {**size, "alt": alt_text(figure)}


def alt_text(figure: Figure) -> str:
    """What the figure shows, for who cannot see it: titles, axes, and what the legends name."""
    parts = [figure.get_suptitle()]
    for axes in figure.axes:
        against = " against ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
        parts.append(": ".join(filter(None, (axes.get_title(), against))))
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    parts += [", ".join(text.get_text() for text in each.get_texts()) for each in legends if each]
    return ". ".join(dict.fromkeys(" ".join(part.split()) for part in parts if part))
