"""The style of all figures, and the helpers that `plots` and `drawings` share."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ..arguments import Integer, Real

# Okabe and Ito's colours, which colour-blind readers can tell apart too. There is one more marker than colours, so that both
# form new pairs when they repeat. All markers are filled, as seaborn requires of a set.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHADES = {"good": "Blues", "bad": "Oranges", None: "Purples"}  # of heat maps, by the meaning of a dark cell
STYLE = {
    "figure.dpi": 110,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}
LETTERS_PER_INCH = 11  # of a bold title


@contextmanager
def subplots(title: str, *shape: Integer, figsize: tuple[Real, Real], **settings: Any) -> Iterator[tuple[Figure, plt.Axes]]:
    """plt.subplots in this style, with a title that is no wider than the figure.

    The figure is closed at the end, so that a notebook does not show it a second time.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(*shape, figsize=figsize, layout="constrained", **settings)
        if title:
            figure.suptitle(wrapped(title, int(LETTERS_PER_INCH * figsize[0])), x=0.01, ha="left")
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def wrapped(text: object, width: Integer) -> str:
    """`text` in lines of at most `width` characters; its own line breaks are kept."""
    return "\n".join(textwrap.fill(line, width) for line in str(text).split("\n"))


def legend_below(place: Figure | plt.Axes, axes: plt.Axes, width: Real, **settings: Any) -> None:
    """Draw the legend of `axes` at `place`, in as many columns, up to five, as fit into `width` inches."""
    handles, labels = axes.get_legend_handles_labels()
    fitting = min(5, max(1, int(width / (0.55 + 0.075 * max(map(len, labels))))))
    n_rows = -(-len(labels) // fitting)
    place.legend(handles, labels, ncols=-(-len(labels) // n_rows), **settings)


def as_array(values: ArrayLike) -> np.ndarray:
    """A NumPy array from an array or a tensor. Tensors are recognised by a method, because this folder does not import torch."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
