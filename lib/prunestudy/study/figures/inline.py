"""Figures in notebooks: at twice the pixels, with alternative text made from the figure itself."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

# Executed notebooks are tracked: a palette of this size takes less than half the bytes.
_COLOURS = 256


def show_well() -> None:
    """In a notebook, let every figure come with its size and `alt_text`; elsewhere do nothing."""
    from IPython import get_ipython

    shell = get_ipython()
    png = shell.display_formatter.formatters["image/png"] if shell else None
    if png is None or png.type_printers.get(Figure) is _display:
        return
    # It sets formatters of its own the first time it is imported: let it, then replace them.
    import matplotlib_inline.backend_inline  # noqa: F401

    png.for_type(Figure, _display)


def _display(figure: Figure) -> tuple[bytes, dict[str, object]] | None:
    from IPython.core.pylabtools import retina_figure

    drawn = retina_figure(figure)
    if drawn is None:
        return None
    png, size = drawn
    return _with_palette(png), {**size, "alt": alt_text(figure)}


def _with_palette(png: bytes) -> bytes:
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    if picture.getextrema()[3] != (255, 255):
        return png
    picture, out = picture.convert("RGB"), io.BytesIO()
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


def alt_text(figure: Figure) -> str:
    """What the figure shows, for who cannot see it: titles, axes, and what the legends name."""
    parts = [figure.get_suptitle(), *(_panel(axes) for axes in figure.axes)]
    parts += [_named(legend) for legend in figure.legends]
    return ". ".join(dict.fromkeys(part for part in parts if part))


def _panel(axes: Axes) -> str:
    title, across, up = (
        " ".join(text.split()) for text in (axes.get_title(), axes.get_xlabel(), axes.get_ylabel())
    )
    against = f"{up} against {across}" if up and across else up or across
    named = _named(axes.get_legend())
    drawn = ": ".join(part for part in (title, against) if part)
    return f"{drawn} ({named})" if drawn and named else drawn or named


def _named(legend: Legend | None) -> str:
    return ", ".join(text.get_text() for text in legend.get_texts()) if legend else ""
