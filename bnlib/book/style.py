"""One look for every figure of the book.

Figures are SVG on a transparent ground, with text that is text and large enough for a telephone.
The colors below are for a white page; in the book :mod:`bnlib.book.pages` puts the style sheet's in
their place, with a contrast of at least 4.5:1 on the light page and on the dark one. They differ in
lightness as well as in hue and stay apart for the common color deficiencies.
"""

from __future__ import annotations

import warnings

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib_inline.backend_inline import set_matplotlib_formats

INK = "#5c5c5c"
BLUE, ORANGE, GREEN = "#1769aa", "#b84f00", "#087a55"
PURPLE, PINK, OCHRE = "#6b4fb8", "#a84386", "#7d6213"

#: The same network has the same color in every chapter.
COLORS = {
    "bn": BLUE,
    "plain": ORANGE,
    "reference": INK,
    "third": GREEN,
    "fourth": PURPLE,
    "fifth": PINK,
    "sixth": OCHRE,
}

#: A diverging map (negative orange, zero transparent grey, positive blue) and a sequential one.
DIVERGING = mpl.colors.LinearSegmentedColormap.from_list(
    "bn_diverging", [ORANGE, "#e9c9ae", "#c9c9c9", "#b5d2ea", BLUE]
)
SEQUENTIAL = mpl.colormaps["viridis"]

_RC = {
    "figure.figsize": (4.8, 3.2),
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "savefig.transparent": True,
    "svg.hashsalt": "bnlib",
    "svg.fonttype": "none",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def use() -> None:
    """Set seaborn's theme, and with it matplotlib, to the style of the book for this session."""
    set_matplotlib_formats("svg")
    # seaborn's grids of panels choose this layout themselves
    warnings.filterwarnings("ignore", "The figure layout has changed to tight")
    # Where the book asks for nothing, matplotlib's own sizes and fonts and not seaborn's.
    themed = (*sns.axes_style(), *sns.plotting_context())
    defaults = {name: mpl.rcParamsDefault[name] for name in themed}
    palette = [color for color in COLORS.values() if color != INK]
    sns.set_theme(palette=palette, color_codes=False, rc={**defaults, **_RC})


def label_line(
    line: Line2D, text: str, *, where: float = 1.0, dx: float = 4, dy: float = 0
) -> None:
    """Write ``text`` beside a line, in the line's color, instead of in a legend.

    It stands beside the point at the fraction ``where`` of the line's points (0 is the first, 1 the
    last), ``dx`` and ``dy`` points (of print) away.
    """
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    index = round(where * (len(x) - 1))
    assert isinstance(line.axes, Axes)
    line.axes.annotate(
        text,
        (x[index], y[index]),
        xytext=(dx, dy),
        textcoords="offset points",
        color=line.get_color(),
        va="center",
        ha="left" if dx >= 0 else "right",
        annotation_clip=False,
    )
