"""A picture of the page: what it is called and says, and matplotlib drawing it once for light and once for dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..findings import check_extra

SCHEMES = {  # text and lines; colours that tell apart for the colour-blind too (Okabe and Ito), lighter on dark
    "light": ("#24292f", "#d0d7de", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195")),
    "dark": ("#d7dde3", "#3d444d", ("#56b4e9", "#ff8c42", "#2ec4a0", "#e88fc0", "#f2b134", "#6f9bff", "#b79be8")),
}
DRAWN_WITH = ("jinja2", "matplotlib", "scipy")
DPI = 160
WIDTH, HEIGHT = 5.4, 3.5


@dataclass(frozen=True)
class Look:
    """The colours of a scheme. `text`, `line`: of words and of the grid."""

    text: str
    line: str
    colours: tuple[str, ...]

    def colour(self, place: int) -> str:
        """Returns the colour of the group at this place."""
        return self.colours[place % len(self.colours)]

    def line_of(self, place: int) -> dict[str, Any]:
        """Returns colour and width of its lines: later ones are thinner, so that one under another is seen."""
        return {"color": self.colour(place), "lw": max(1.0, 2.8 - 0.7 * place)}


Draw = Callable[[Any, Look], None]


@dataclass(frozen=True)
class Picture:
    """One picture. `name`: of its file; `caption`: what is to be seen; `draw(figure, look)` draws it."""

    name: str
    title: str
    caption: str
    draw: Draw
    height: float = HEIGHT


def check_drawing() -> None:
    """Raises an ImportError with the command to install what the page needs, where it is missing."""
    check_extra("report", DRAWN_WITH, "the report")


def png(picture: Picture, scheme: str, transparent: bool = True) -> bytes:
    """Returns a picture as PNG in the colours of `scheme`, transparent unless it is to stand alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    look = Look(*SCHEMES[scheme])
    with _colours(look):
        figure = Figure(figsize=(WIDTH, picture.height), layout="constrained")
        FigureCanvasAgg(figure)
        picture.draw(figure, look)
        found = io.BytesIO()
        figure.savefig(found, format="png", dpi=DPI, transparent=transparent, metadata={"Software": None})
    return found.getvalue()


@contextmanager
def _colours(look: Look) -> Iterator[None]:
    import matplotlib as mpl

    values: Any = {
        "text.color": look.text,
        "axes.labelcolor": look.text,
        "axes.edgecolor": look.line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": look.line,
        "grid.linewidth": 0.5,
        "xtick.color": look.text,
        "ytick.color": look.text,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "font.size": 10.5,
        "lines.linewidth": 1.5,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-3, 4),
    }
    with mpl.rc_context(values):
        yield
