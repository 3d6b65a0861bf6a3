"""The confusion matrix as a picture: which class of the truth is taken for which.

A row is a class of the truth and adds up to one; so colours tell of frequent and rare classes alike. Shares are drawn
by their square root, as what matters beside the diagonal is mostly a few hundredths.
"""

import io
import warnings

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure

NUMBERED = 20  # classes up to which cells have their numbers
NAMED = 400  # up to which each row and column has its name; of more every so many
LONGEST = 26  # characters of a name
LOOKS = {  # up to so many classes: inches of a cell's side, points of letters
    4: (1.3, 11),
    10: (0.8, 11),
    NUMBERED: (0.6, 10),
    60: (0.3, 9),
    NAMED: (0.16, 8),
}
SMALLEST = 0.01, 8  # of more: a dot
DOTS = 100  # an inch
TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
COLOURS, NOTHING, GRID = "YlGnBu", "#dddddd", "#e8e8e8"  # of shares; of rows whose class the truth never has


def draw_confusion(confusion: np.ndarray, names: tuple[str, ...]) -> bytes:
    """PNG of pixels by truth and mask, int64 (K, K + 1), the last column of which is no class, for K classes."""
    columns = [printable(name) for name in names]
    rows = list(columns)
    if confusion[:, -1].any():
        columns.append("(no class)")
    counts = confusion[:, : len(columns)]
    totals = confusion.sum(1, keepdims=True)
    shares = np.ma.masked_invalid(np.where(totals > 0, counts / np.maximum(totals, 1), np.nan))
    cell, size = next((look for most, look in LOOKS.items() if len(rows) <= most), SMALLEST)
    figure = Figure(figsize=(cell * len(columns) * 1.15, cell * len(rows)), dpi=DOTS)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1 / 1.15, 1))  # names lie outside, and the picture is cut around all
    axes.set_facecolor(NOTHING)
    colours = colormaps[COLOURS](np.linspace(0, 1, 256))
    colours[0] = 1  # white
    norm = PowerNorm(0.5, 0, 1)
    picture = axes.imshow(shares, cmap=ListedColormap(colours), norm=norm, interpolation="nearest", aspect="auto")
    step = -(-len(rows) // NAMED)
    axes.set_xticks(range(0, len(columns), step), columns[::step], rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(0, len(rows), step), rows[::step], fontsize=size, parse_math=False)
    axes.tick_params(length=2)
    axes.set_xlabel("mask", fontsize=size + 3)
    axes.set_ylabel("ground truth", fontsize=size + 3)
    if len(rows) <= NAMED:
        axes.vlines(np.arange(0.5, len(columns) - 1), -0.5, len(rows) - 0.5, color=GRID, linewidth=0.5)
        axes.hlines(np.arange(0.5, len(rows) - 1), -0.5, len(columns) - 0.5, color=GRID, linewidth=0.5)
    if len(rows) <= NUMBERED:
        for row, column in np.argwhere(shares.filled(0) > 0).tolist():
            share = shares[row, column]
            text = "<.01" if share < 0.005 else f"{share:.2f}"
            colour = "white" if share > 0.3 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=size - 1, color=colour)
    bar = figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.015, aspect=30, ticks=TICKS, format="{x:g}")
    bar.set_label("share of the class in the truth", fontsize=size + 1)
    bar.ax.tick_params(labelsize=size)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a script that its font does not have
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.2, metadata={"Software": None})
    return file.getvalue()


def printable(name: str) -> str:
    """A name on one line, not too long."""
    text = "".join(letter if letter.isprintable() else "�" for letter in name)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
