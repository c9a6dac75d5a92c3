"""Figures in the paper's style: inline SVG that takes the page's colours, and SVG and PDF files.

Colours are Okabe and Ito's, which people with colour-blindness can tell apart; markers and line
styles repeat the distinction. A method has the same look in every figure.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_MARKERS = "osD^vPX"
_LINES = ("-", "--", "-.", ":")
_INK = "#010203"  # replaced by the page's own text colour
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color",
         "grid.color", "axes.titlecolor"),
        _INK,
    ),
}  # fmt: skip

FAILURE_COLOURS = {
    "success": "#009E73",
    "lost": "#56B4E9",
    "wrong_receptacle": "#CC79A7",
    "drift": "#D55E00",
    "held": "#E69F00",
    "drop": "#F0E442",
    "wrong_object": "#0072B2",
    "no_grasp": "#999999",
}


class Look:
    """Gives every method its colour, marker and line, in the order of first use."""

    def __init__(self, methods: Sequence[str]) -> None:
        self._place = {method: place for place, method in enumerate(dict.fromkeys(methods))}

    def __call__(self, method: str) -> dict[str, Any]:
        """Style of a method's line."""
        place = self._place.setdefault(method, len(self._place))
        return {
            "color": _COLOURS[place % len(_COLOURS)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": _LINES[place % len(_LINES)],
        }

    def colour(self, method: str) -> str:
        """Colour of a method."""
        return str(self(method)["color"])


def draw(
    name: str,
    size: tuple[int, int],
    inches: tuple[float, float],
    paint: Callable[[np.ndarray], None],
    folder: Path,
    *,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[str, tuple[str, str]]:
    """Draw a figure, write it as SVG and PDF, and return it for the page.

    Args:
        name: Of the files.
        size: Rows and columns of axes.
        inches: Width and height.
        paint: Draws into the axes [rows, columns].
        folder: The page's; files go to its ``figures``.
        sharex: Whether the axes share x.
        sharey: Whether they share y.

    Returns:
        SVG for the page, and the files relative to it.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure.subplots(*size, squeeze=False, sharex=sharex, sharey=sharey))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        files = folder / "figures"
        files.mkdir(parents=True, exist_ok=True)
        plain = stream.getvalue().replace(_INK, "#000000")
        (files / f"{name}.svg").write_text(plain, encoding="utf-8")
        with mpl.rc_context(dict.fromkeys(("text.color",), "#000000")):
            figure.savefig(files / f"{name}.pdf", metadata={"CreationDate": None})
    return _inline(stream.getvalue(), name), (f"figures/{name}.svg", f"figures/{name}.pdf")


def _inline(svg: str, name: str) -> str:
    """Take the SVG element alone, with ids of its own and the page's text colour."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    key = hashlib.sha256(name.encode()).hexdigest()[:6]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{key}-\1"', body)
    body = body.replace(_INK, "currentColor")
    return body.replace("<svg ", '<svg role="img" aria-hidden="true" ', 1)


def percent_axis(axis: Axes, label: str = "success, %") -> None:
    """Label the vertical axis in percent."""
    axis.set_ylabel(label)
    axis.set_ylim(0, 100)


def band(
    axis: Axes,
    x: np.ndarray,
    values: np.ndarray,
    label: str,
    style: Mapping[str, Any],
) -> None:
    """Draw the mean over seeds [S, P] and its deviation."""
    mean = values.mean(axis=0)
    axis.plot(x, mean, label=label, markersize=4, linewidth=1.6, **style)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axis.fill_between(x, mean - spread, mean + spread, alpha=0.18, color=style["color"], lw=0)


def thousands(axis: Axes, label: str = "environment steps, thousands") -> None:
    """Label the horizontal axis."""
    axis.set_xlabel(label)
