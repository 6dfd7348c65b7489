"""The figures of the notebooks, from tables and arrays. A function that takes an array also takes a torch tensor on any device.

Most functions return a figure and the table of the numbers that it shows, for `save_figure`. A figure is closed when it is
returned. To show it, end a cell with it.
"""

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike

from ..arguments import Integer, Real
from ..files import write_table, written_whole
from .drawings import filters_by_cluster, idea, kinds_of_pruning, mistakes, sample_grid  # noqa: F401 notebooks find all figures here
from .style import BLUE, COLORS, GREY, LETTERS_PER_INCH, MARKERS, ORANGE, SHADES, as_array, legend_below, subplots, wrapped

UNDERLAY = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5}  # of text over lines
DISTANCE_COLORS = dict(zip(("raw", "folded", "unit", "output", "correlation"), COLORS, strict=False))  # `clustering.DISTANCES`, everywhere


def save_figure(figure: Figure, table: pd.DataFrame, path: str | Path) -> None:
    """Write `figure` to `path` (NAME.png) and the numbers it shows beside it (NAME.csv)."""
    path = Path(path)
    with written_whole(path) as partial:  # both, or neither
        figure.savefig(partial, format="png", dpi=160, bbox_inches="tight")
        write_table(table, path.with_suffix(".csv"))


def learning_curves(
    history: pd.DataFrame, recipe: Any, test_accuracy: Real, held_out: str = "held-out images, averaged weights"
) -> tuple[Figure, pd.DataFrame]:
    """Loss and accuracy per epoch of one training, with its final test accuracy in %.

    `history` and `recipe` are those of `training.train`; the end of the recipe's small crops is marked. `held_out` names the curve of
    held-out images. The table is the history, rounded, with the test accuracy in its last row.
    """
    digits = {"learning_rate": 5, "loss": 4, "train_accuracy": 2, "held_out_accuracy": 2, "seconds": 1, "images_per_second": 0}
    table = history.round(digits)
    table.loc[table.index[-1], "test_accuracy"] = round(test_accuracy, 2)
    with subplots(f"The training ends at {test_accuracy:.2f} % on the test images", 1, 2, figsize=(10, 3.8)) as (figure, (left, right)):
        left.plot(table.epoch, table.loss, color=BLUE)
        left.set(title="Training loss and learning rate", ylabel="loss on augmented images", ylim=(0, None))
        rate = left.twinx()
        rate.plot(table.epoch, table.learning_rate, color=GREY, linestyle=":")
        rate.set(ylabel="learning rate (dotted)", ylim=(0, None))
        rate.grid(visible=False)
        right.plot(table.epoch, table.train_accuracy, color=BLUE, label="training images, augmented")
        if table.held_out_accuracy.notna().any():
            right.plot(table.epoch, table.held_out_accuracy, color=ORANGE, linestyle="--", label=held_out)
        right.axhline(test_accuracy, color=GREY, linewidth=1, linestyle="-.", label="test images, at the end")
        right.set(title="Accuracy", ylabel="accuracy (%)", ylim=(None, 100))
        right.legend(loc="lower right")
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
            if recipe.small_epochs:
                axes.axvline(recipe.small_epochs + 0.5, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
                note = {"s": f"{recipe.small_size}×{recipe.small_size} crops until here", "color": GREY, "fontsize": 8}
                axes.text(recipe.small_epochs, 0.97, transform=axes.get_xaxis_transform(), ha="right", va="top", **note)
    return figure, table


def dots(
    table: pd.DataFrame,
    label: str,
    value: str,
    title: str,
    unit: str,
    reference: tuple[Real, str] | None = None,
    fmt: str = "{:.2f}",
    ends: tuple[str, str] | None = None,
) -> Figure:
    """One dot per row of `table`, the first row on top, its value at the right margin.

    Parameters
    ----------
    reference : a value to mark with a dashed line, and its label
    ends : columns of the lowest and the highest value, between which a line is drawn
    """
    with subplots(title, figsize=(8, 1 + 0.28 * len(table))) as (figure, axes):
        if reference is not None:
            axes.axvline(reference[0], color=GREY, linestyle="--", linewidth=1)
            place = {"xy": (reference[0], 1), "xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(reference[1], xytext=(0, 2), ha="right", color=GREY, fontsize=8, **place)
        if ends is not None:
            axes.hlines(range(len(table)), table[ends[0]], table[ends[1]], color=BLUE, linewidth=5, alpha=0.35)
        axes.plot(table[value], range(len(table)), "o", color=BLUE)
        axes.set_yticks(range(len(table)), table[label])
        for row, number in enumerate(table[value]):
            axes.text(1.01, row, fmt.format(number), transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        axes.set(xlabel=unit, ylim=(len(table) - 0.5, -0.5))
    return figure


def before_and_after(
    panels: Mapping[str, pd.DataFrame],
    label: str,
    value: str,
    stage: str,
    stages: Mapping[str, str],
    xlabel: str,
    title: str,
    reference: tuple[Real, str] | None = None,
    fmt: str = "{:.1f}",
) -> tuple[Figure, pd.DataFrame]:
    """For each value of column `label`, the mean of `value` at the first of two stages (an open dot) and at the second (a filled one), with
    a line between them, and a thick one from the lowest to the highest value of each: a panel for each table, one row for each label, in
    the order of the first table. The first value stands beside its dot, the second at the right margin.

    Parameters
    ----------
    stages : what the two are called in the legend, by their value in column `stage`
    reference : a value to mark with a line, and its label

    Returns
    -------
    figure, table with the columns panel, `label`, `stage`, mean, min, max and count
    """
    labels = list(dict.fromkeys(next(iter(panels.values()))[label]))
    sides: set[bool] = set()
    summary, size = [], (3.2 + 3.2 * len(panels), 1.6 + 0.3 * len(labels))
    with subplots(title, 1, len(panels), figsize=size, sharex=True, sharey=True, squeeze=False) as (figure, (row,)):
        for axes, (name, table) in zip(row, panels.items(), strict=True):
            points = table.groupby([label, stage])[value].agg(["mean", "min", "max", "count"]).reset_index()
            summary.append(points.assign(panel=name))
            both = points.pivot_table(index=label, columns=stage, values="mean").reindex(index=labels, columns=list(stages))
            axes.hlines(range(len(labels)), both.min(axis=1), both.max(axis=1), color=GREY, linewidth=1)
            for (column, text), face in zip(stages.items(), ("white", BLUE), strict=True):
                ends = points[points[stage] == column].set_index(label).reindex(labels)
                axes.hlines(range(len(labels)), ends["min"], ends["max"], color=BLUE, linewidth=5, alpha=0.35)
                axes.plot(both[column], range(len(labels)), "o", color=BLUE, markerfacecolor=face, label=text)
            before = points[points[stage] == next(iter(stages))].set_index(label).reindex(labels)
            for i, numbers in enumerate(both.itertuples(index=False)):
                if np.isfinite(numbers[0]):
                    left = not numbers[0] > numbers[1]  # the line to the second dot is on the other side
                    sides.add(left)
                    end = before["min" if left else "max"].iloc[i]
                    place = {"xytext": (-7 if left else 7, 0), "textcoords": "offset points", "ha": "right" if left else "left"}
                    axes.annotate(fmt.format(numbers[0]), (end, i), va="center", fontsize=8, **place)
                if np.isfinite(numbers[1]):
                    axes.text(1.01, i, fmt.format(numbers[1]), transform=axes.get_yaxis_transform(), va="center", fontsize=8)
            if reference is not None:
                axes.axvline(reference[0], color=GREY, linestyle="-.", linewidth=1, label=reference[1])
            axes.hlines([], [], [], color=BLUE, linewidth=5, alpha=0.35, label="lowest to highest")
            axes.set(title=name, xlabel=xlabel, ylim=(len(labels) - 0.5, -0.5))
            axes.set_yticks(range(len(labels)), labels)
        low, high = row[0].get_xlim()  # of both panels: they share it
        room = 0.14 * (high - low)  # for the first values
        row[0].set_xlim(low - room * (True in sides), high + room * (False in sides))
        legend_below(figure, row[0], size[0], loc="outside lower center")
    summary = pd.concat(summary, ignore_index=True)[["panel", label, stage, "mean", "min", "max", "count"]]
    return figure, summary.round({"mean": 2, "min": 2, "max": 2})


def confusion(counts: ArrayLike, classes: Collection[str]) -> tuple[Figure, pd.DataFrame]:
    """Confusion matrix (row: true class, column: predicted) in % of the true class; only mistakes are shaded.

    The table has the counts, and the true class in its first column.
    """
    table = pd.DataFrame(as_array(counts), columns=list(classes), index=pd.Index(classes, name="true class"))
    shares = 100 * table.div(table.sum(axis=1).clip(lower=1), axis=0)
    wrong = shares.mask(np.eye(len(classes), dtype=bool), 0)
    true, predicted = divmod(int(wrong.to_numpy().argmax()), len(classes))
    numbers = {"annot": shares, "fmt": ".1f", "annot_kws": {"fontsize": 8}}
    bar = {"label": "mistakes (% of the true class)", "shrink": 0.8}
    with subplots(f"The most frequent mistake is {classes[true]} taken for {classes[predicted]}", figsize=(6.8, 5.6)) as (figure, axes):
        seaborn.heatmap(wrong, cmap=SHADES["bad"], square=True, cbar_kws=bar, ax=axes, **numbers)
        for text in axes.texts[:: len(classes) + 1]:  # the diagonal
            text.set_weight("bold")
        axes.set_xticks(axes.get_xticks(), classes, rotation=45, ha="right")
        axes.set(xlabel="predicted class", yticklabels=classes)
        axes.tick_params(axis="y", rotation=0)
    return figure, table.reset_index()


def curves(
    panels: Mapping[str, pd.DataFrame],
    x: str,
    by: str,
    xlabel: str | Collection[str],
    y: str = "accuracy",
    ylabel: str = "test accuracy (%)",
    reference: tuple[Real, str] | None = None,
    ticks: Collection[Collection[Real] | None] | None = None,
    title: str = "",
    sharey: bool = True,
    colors: Mapping[str, str] | None = None,
    lowest: Real | None = None,
) -> tuple[Figure, pd.DataFrame]:
    """`y` against `x`, a panel for each table and a line for each value of its column `by`: the median over rows with the same
    `x` (seeds), in a band from the lowest to the highest.

    The panels share a legend. If there are more lines in all than colours, each panel has its own.

    Parameters
    ----------
    panels : tables by title, in one row of panels
    xlabel : for all panels, or one each
    reference : a value of `y` to mark with a line, and its label
    ticks : per panel, values of `x` to mark on a logarithmic axis (such as 1, 2, 4, 8); None for a linear axis
    title : of the whole figure
    sharey : whether the panels share the y axis
    colors : by value of `by`, where it is not to be the next one; lines of one colour differ in markers and dashes
    lowest : where the y axis ends; a median below is a number at the edge, so that one bad point does not make the others look the same

    Returns
    -------
    figure, table with a row for each point and the columns panel, `by`, `x`, median, min, max and count
    """
    every = list(dict.fromkeys(label for table in panels.values() for label in table[by]))
    shared = len(every) <= len(COLORS)
    xlabels = [xlabel] * len(panels) if isinstance(xlabel, str) else xlabel
    width = 6.4 if len(panels) == 1 else 5.2  # of a panel, inches
    size = (width * len(panels), 4.4 if shared else 5.6)
    banded = any(table.groupby([by, x])[y].nunique().max() > 1 for table in panels.values())
    summary = []
    with subplots(title, 1, len(panels), figsize=size, sharey=sharey, squeeze=False) as (figure, (row,)):
        for axes, (name, table), label, values in zip(row, panels.items(), xlabels, ticks or [None] * len(panels), strict=True):
            lines = list(dict.fromkeys(table[by]))
            points = table.groupby([by, x])[y].agg(["median", "min", "max", "count"]).loc[lines].reset_index()
            summary.append(points.assign(panel=name))
            # seaborn draws no band at a point that has a single row, and no legend without a row
            drawn = points.melt([by, x], ["median", "min", "max"], value_name=y)
            if drawn.empty:
                lines, drawn = every[:1], pd.DataFrame({x: [np.nan], y: [np.nan], by: every[:1]})
            looks = _looks(every if shared else lines)
            looks["palette"] |= colors or {}
            seaborn.lineplot(drawn, x=x, y=y, hue=by, style=by, dashes=True, estimator="median", errorbar=("pi", 100), ax=axes, **looks)
            axes.get_legend().remove()
            if values is not None:
                axes.set_xscale("log")
                axes.set_xticks(values, [f"{value:g}" for value in values])
                axes.xaxis.set_minor_locator(NullLocator())
            elif (drawn[x] % 1 == 0).all():
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
            if reference is not None:
                axes.axhline(reference[0], color=GREY, linestyle="-.", linewidth=1, label=reference[1])
            if lowest is not None and (points["min"] < lowest).any():
                axes.set_ylim(bottom=lowest)
                for at, line, median in points.loc[points["median"] < lowest, [x, by, "median"]].itertuples(index=False):
                    place = {"xytext": (4, 4), "textcoords": "offset points", "color": looks["palette"][line]}
                    axes.annotate(f"↓ {median:.0f}", (at, lowest), fontsize=9, bbox=UNDERLAY, **place)
            if banded:
                axes.fill_between([], [], color=GREY, alpha=0.2, linewidth=0, label="band: lowest to highest")
            axes.set(title=wrapped(name, int(LETTERS_PER_INCH * width)), xlabel=label, ylabel=ylabel if axes is row[0] else "")
            if not shared:
                legend_below(axes, axes, width, loc="upper left", bbox_to_anchor=(0, -0.16))
        if shared:
            legend_below(figure, row[0], size[0], loc="outside lower center")
    summary = pd.concat(summary, ignore_index=True)[["panel", by, x, "median", "min", "max", "count"]]
    return figure, summary.round({"median": 2, "min": 2, "max": 2})


def histograms(
    panels: Mapping[str, tuple[ArrayLike, tuple[Real, Real]]], xlabel: str, title: str, n_bins: Integer = 60
) -> tuple[Figure, pd.DataFrame]:
    """The distribution of each array, with the two ends of a range as lines; counts are on a logarithmic scale.

    The table has a row for each bin, with the columns panel, low and high (the range), value (the bin's centre) and count.
    """
    columns, table = 4, []
    rows = -(-len(panels) // columns)
    with subplots(title, rows, columns, figsize=(2.7 * columns, 2.2 * rows + 0.4), squeeze=False) as (figure, grid):
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (name, (values, (low, high))) in zip(grid.flat, panels.items(), strict=False):
            counts, edges = np.histogram(as_array(values).astype(float), n_bins)
            axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.7)
            for end in (low, high):
                axes.axvline(end, color=ORANGE, linestyle="--", linewidth=1.2)
            axes.set(yscale="log", ylim=(0.5, None))
            axes.set_title(name, fontsize=9)
            centres = ((edges[1:] + edges[:-1]) / 2).round(5)
            table.append(pd.DataFrame({"panel": name, "low": low, "high": high, "value": centres, "count": counts}))
        figure.supxlabel(xlabel, fontsize=10)
        figure.supylabel("count (logarithmic scale)", fontsize=10)
    return figure, pd.concat(table, ignore_index=True)


def scatter(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    label: str,
    xlabel: str,
    ylabel: str,
    title: str,
    reference: tuple[Real, str] | None = None,
    logarithmic: bool = False,
    front: Collection | None = None,
    order: Collection[str] | None = None,
) -> tuple[Figure, pd.DataFrame]:
    """A dot for each row at columns `x` and `y`, with the text of column `label`; a colour and a marker for each value of `by`.

    Parameters
    ----------
    reference : a value of `y` to mark with a line, and its label
    logarithmic : whether x has a logarithmic axis
    front : the index of the rows to label and to join with a line, in this order; the others are small and pale. None labels all rows
    order : the values of `by` in the order of their looks, those that the table lacks included, so that figures agree in their looks
    """
    looks = _looks(list(dict.fromkeys([*(order or ()), *table[by]])))
    strong = table if front is None else table.loc[list(front)]
    with subplots(title, figsize=(9, 5.8)) as (figure, axes):
        if front is not None:
            axes.plot(strong[x], strong[y], color=GREY, linewidth=1, zorder=1)
            weak = table.drop(strong.index)
            seaborn.scatterplot(weak, x=x, y=y, hue=by, style=by, s=30, alpha=0.4, ax=axes, legend=False, **looks)
        seaborn.scatterplot(strong, x=x, y=y, hue=by, style=by, s=50, ax=axes, legend=False, **looks)
        for value in (value for value in looks["hue_order"] if (table[by] == value).any()):
            look = {"marker": looks["markers"][value], "color": looks["palette"][value], "markersize": 7, "markeredgecolor": "white"}
            axes.plot([], [], linestyle="", label=value, **look)
        if reference is not None:
            axes.axhline(reference[0], color=GREY, linestyle="-.", linewidth=1, label=reference[1])
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.margins(x=0.12)
        legend_below(figure, axes, 9, loc="outside lower center")
        figure.draw_without_rendering()  # the layout fixes all positions
        _label_points(axes, strong[[x, y]].to_numpy(), strong[label], table[[x, y]].to_numpy(), joined=front is not None)
    return figure, table


def _looks(labels: Collection[str]) -> dict:
    """The arguments for seaborn that give each label a colour and a marker, in this order."""
    colors, markers = (dict(zip(labels, itertools.cycle(looks), strict=False)) for looks in (COLORS, MARKERS))
    return {"hue_order": labels, "style_order": labels, "palette": colors, "markers": markers}


def _label_points(axes: plt.Axes, points: np.ndarray, texts: Collection[str], every: np.ndarray, joined: bool = False) -> None:
    """Write each text beside its point (N, 2), where it covers none of the points `every` (M, 2), no earlier text, and no line between
    points that are `joined`: at the same height if there is room, otherwise further above or below, with a thin line to its point."""
    taken = [Bbox.from_extents(*(centre - 5), *(centre + 5)) for centre in axes.transData.transform(every)]
    if joined:
        corners = axes.transData.transform(points)
        along = np.linspace(corners[:-1], corners[1:], 60).reshape(-1, 2)
        taken += [Bbox.from_extents(*(centre - 1), *(centre + 1)) for centre in along]
    places = [(side * (7 + abs(up) / 4), up) for up in sorted(range(-90, 91, 6), key=abs) for side in (1, -1)]  # in points
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 5}
    for point, text in zip(points, texts, strict=True):
        note = axes.annotate(text, point, places[0], textcoords="offset points", va="center", fontsize=8, bbox=UNDERLAY)
        for place in places:
            note.set(position=place, horizontalalignment="left" if place[0] > 0 else "right")
            box = note.get_window_extent()
            if axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        if place[1]:
            axes.annotate("", point, place, textcoords="offset points", arrowprops=line)


def heat_map(
    values: pd.DataFrame,
    title: str,
    unit: str,
    fmt: str = "{:.1f}",
    xlabel: str = "",
    ylabel: str = "",
    worst: Real | None = None,
    dark: Literal["good", "bad"] | None = None,
) -> tuple[Figure, pd.DataFrame]:
    """A cell per row and column of `values` with its number, darker the further it is from zero; empty for NaN.

    The values should have one sign: if any is negative, positive ones are as light as zero. The table is `values`, its index first.

    Parameters
    ----------
    worst : value at which the shade ends, so that one bad cell does not make the others look the same
    dark : whether dark cells are "good" (drawn in blue) or "bad" (orange), as the colour bar states; None (purple) for neither
    """
    columns = [wrapped(name, 14) for name in values.columns]
    widest = max(len(line) for name in columns for line in name.split("\n"))
    size = (2.2 + 0.07 * values.index.astype(str).str.len().max() + max(0.62, 0.085 * widest) * len(columns), 1.7 + 0.3 * len(values))
    limit = (values.abs().max(axis=None) or 1) if worst is None else abs(worst)
    if values.min(axis=None) < 0:
        shades, beyond = {"cmap": SHADES[dark] + "_r", "vmin": -limit, "vmax": 0}, "min"
    else:
        shades, beyond = {"cmap": SHADES[dark], "vmin": 0, "vmax": limit}, "max"
    bar = {"label": f"{unit}\n(dark is {dark})" if dark else unit, "shrink": 0.8, "extend": "neither" if worst is None else beyond}
    numbers = {"annot": values.map(fmt.format), "fmt": "", "annot_kws": {"fontsize": 8}}
    with subplots(title, figsize=size) as (figure, axes):
        # Seaborn would first draw the rows' labels upright, for which a figure of few rows has no room.
        seaborn.heatmap(values, linewidths=0.5, xticklabels=columns, yticklabels=False, cbar_kws=bar, ax=axes, **numbers, **shades)
        axes.set_yticks([row + 0.5 for row in range(len(values))], values.index)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(visible=False)
        axes.tick_params(length=0, rotation=0)
    return figure, values.reset_index()
