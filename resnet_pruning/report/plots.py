"""The figures of the notebooks, in one style. A figure is closed when it is returned: show it by ending a cell with it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..clustering import Clusters
from ..data import Images
from ..files import written_whole
from ..training import Recipe

# Okabe and Ito's colours, which differ for colour-blind readers too; lines also differ in dash or marker.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
STYLE = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


@contextmanager
def _subplots(*shape: int, **settings) -> Iterator[tuple[Figure, plt.Axes]]:
    """plt.subplots in this module's style; the figure is closed at the end, so that nothing shows it a second time."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(*shape, layout="constrained", **settings)
        yield figure, axes
        plt.close(figure)


def save_figure(figure: Figure, table: pd.DataFrame, path: str | Path) -> None:
    """Write `figure` to `path` (NAME.png) and the numbers it shows beside it (NAME.csv)."""
    path = Path(path)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=160, bbox_inches="tight")
    with written_whole(path.with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False)


def learning_curves(history: pd.DataFrame, recipe: Recipe, test_accuracy: float) -> tuple[Figure, pd.DataFrame]:
    """Loss and accuracy per epoch of one training (see `training.train`), with the test accuracy that it ended at, in %."""
    digits = {"learning_rate": 5, "loss": 4, "train_accuracy": 2, "held_out_accuracy": 2, "seconds": 1, "images_per_second": 0}
    table = history.round(digits)
    table.loc[table.index[-1], "test_accuracy"] = round(test_accuracy, 2)
    with _subplots(1, 2, figsize=(10, 3.6)) as (figure, (left, right)):
        left.plot(table.epoch, table.loss, color=BLUE)
        left.set(title="Training loss and learning rate", xlabel="epoch", ylabel="loss on augmented images", ylim=(0, None))
        rate = left.twinx()
        rate.plot(table.epoch, table.learning_rate, color=GREY, linestyle=":")
        rate.set(ylabel="learning rate (dotted)", ylim=(0, None))
        rate.grid(visible=False)
        right.plot(table.epoch, table.train_accuracy, color=BLUE, label="training images, augmented")
        if table.held_out_accuracy.notna().any():
            right.plot(table.epoch, table.held_out_accuracy, color=ORANGE, linestyle="--", label="held-out images, averaged weights")
        right.axhline(test_accuracy, color=GREY, linewidth=1, linestyle="-.", label="test images, at the end")
        right.set(
            title=f"The training ends at {test_accuracy:.2f} % on the test images", xlabel="epoch", ylabel="accuracy (%)", ylim=(None, 100)
        )
        right.legend(loc="lower right")
        for axes in (left, right):
            if recipe.small_epochs:
                axes.axvline(recipe.small_epochs + 0.5, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
                note = f" {recipe.small_size}×{recipe.small_size} crops until here"
                axes.annotate(
                    note, (recipe.small_epochs, 0.97), xycoords=("data", "axes fraction"), ha="right", va="top", color=GREY, fontsize=8
                )
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, table


def dots(table: pd.DataFrame, label: str, value: str, title: str, unit: str, reference: float | None = None, fmt: str = "{:.2f}") -> Figure:
    """One dot per row of `table`, the first row on top, with its value; a dashed line at `reference`."""
    with _subplots(figsize=(8, 0.9 + 0.3 * len(table))) as (figure, axes):
        if reference is not None:
            axes.axvline(reference, color=GREY, linestyle="--", linewidth=1)
        axes.plot(table[value], table[label], "o", color=BLUE)
        for number, name in zip(table[value], table[label], strict=True):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.annotate(fmt.format(number), (number, name), (7, 0), textcoords="offset points", va="center", fontsize=9, bbox=box)
        axes.set(title=title, xlabel=unit, ylim=(len(table) - 0.5, -0.5))
        axes.margins(x=0.12)
    return figure


def class_accuracies(accuracies: Tensor, classes: Sequence[str], mean: float) -> tuple[Figure, pd.DataFrame]:
    """Accuracy per class in %, best first, with the accuracy over all classes as the reference line."""
    table = pd.DataFrame({"class": classes, "accuracy": accuracies.double().numpy().round(2)})
    table = table.sort_values("accuracy", ascending=False, ignore_index=True)
    title = f"“{table['class'].iloc[-1]}” is the hardest class (all classes, dashed: {mean:.2f} %)"
    return dots(table, "class", "accuracy", title, "test accuracy (%)", reference=mean, fmt="{:.1f}"), table


def confusion(counts: Tensor, classes: Sequence[str]) -> tuple[Figure, pd.DataFrame]:
    """Confusion matrix (row: true class, column: predicted) in % of the true class; only mistakes are shaded."""
    shares = 100 * counts / counts.sum(1, keepdim=True)
    table = pd.DataFrame(counts.numpy(), columns=list(classes))
    table.insert(0, "true class", list(classes))
    mistakes = shares.clone().fill_diagonal_(0)
    true, predicted = divmod(int(mistakes.argmax()), len(classes))
    with _subplots(figsize=(6.8, 5.6)) as (figure, axes):
        image = axes.imshow(mistakes, cmap="Blues")
        for row in range(len(classes)):
            for column in range(len(classes)):
                color = "white" if mistakes[row, column] > 0.6 * mistakes.max() else "black"
                weight = "bold" if row == column else "normal"
                axes.text(column, row, f"{shares[row, column]:.1f}", ha="center", va="center", fontsize=8, color=color, weight=weight)
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        title = f"The most frequent mistake is {classes[true]} taken for {classes[predicted]}"
        axes.set(title=title, xlabel="predicted class", ylabel="true class")
        axes.grid(visible=False)
        figure.colorbar(image, label="mistakes (% of the true class)", shrink=0.8)
    return figure, table


def sample_grid(images: Images, per_class: int = 8) -> Figure:
    """The first images of each class, a class per row."""
    n_classes = len(images.classes)
    with _subplots(n_classes, per_class, figsize=(per_class * 0.75, n_classes * 0.7)) as (figure, grid):
        for label, row in enumerate(grid):
            for axes, pixels in zip(row, images.pixels[images.labels == label][:per_class].cpu(), strict=False):
                axes.imshow(pixels.permute(1, 2, 0), interpolation="nearest")
            for axes in row:
                axes.set_axis_off()
            row[0].text(-0.15, 0.5, images.classes[label], transform=row[0].transAxes, ha="right", va="center")
    return figure


def mistakes(images: Images, logits: Tensor, n: int = 8) -> Figure:
    """The `n` wrong answers that the network was surest of, each with its three highest probabilities."""
    probabilities = logits.softmax(1)
    surest, predicted = probabilities.max(1)
    labels = images.labels.cpu()
    wrong = torch.nonzero(predicted != labels).flatten()
    wrong = wrong[surest[wrong].argsort(descending=True)][:n]
    columns = -(-n // 2)
    with _subplots(2, columns, figsize=(2.2 * columns, 5)) as (figure, grid):
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, index in zip(grid.flat, wrong, strict=False):
            axes.imshow(images.pixels[index].cpu().permute(1, 2, 0), interpolation="nearest")
            top = probabilities[index].topk(3)
            guesses = [f"{images.classes[c]} {100 * p:.2f} %" for p, c in zip(top.values, top.indices, strict=True)]
            axes.set_title("\n".join([f"is {images.classes[labels[index]]}", *guesses]), fontsize=9, weight="normal", loc="center")
    return figure


def curves(
    panels: Mapping[str, pd.DataFrame],
    x: str,
    by: str,
    xlabel: str | Sequence[str],
    y: str = "accuracy",
    ylabel: str = "test accuracy (%)",
    reference: tuple[float, str] | None = None,
    ticks: Sequence[Sequence[float] | None] | None = None,
    title: str = "",
    sharey: bool = True,
) -> tuple[Figure, pd.DataFrame]:
    """`y` against `x`, a panel for each table and a line for each value of its column `by`: the median over rows with the same
    `x` (seeds), in a band from the lowest to the highest.

    Parameters
    ----------
    panels : tables by title, in one row of panels
    xlabel : for all panels, or one each
    reference : a value of `y` to mark with a line, and its label
    ticks : per panel, values of `x` to place at equal distances (for 1, 2, 4, 8, …); None for a linear axis
    title : of the whole figure
    sharey : whether the panels share the y axis
    """
    labels = list(dict.fromkeys(label for table in panels.values() for label in table[by]))
    colors = dict(zip(labels, itertools.cycle(COLORS), strict=False))
    xlabels = [xlabel] * len(panels) if isinstance(xlabel, str) else xlabel
    summary = []
    with _subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), sharey=sharey, squeeze=False) as (figure, (row,)):
        for axes, (name, table), label, values in zip(row, panels.items(), xlabels, ticks or [None] * len(panels), strict=True):
            if reference is not None:
                axes.axhline(reference[0], color=GREY, linestyle="-.", linewidth=1, label=reference[1])
            for line in dict.fromkeys(table[by]):
                i = labels.index(line)
                band = table[table[by] == line].groupby(x)[y].agg(["median", "min", "max", "count"]).reset_index()
                position = band[x] if values is None else band[x].map(list(values).index)
                axes.fill_between(position, band["min"], band["max"], color=colors[line], alpha=0.2, linewidth=0)
                style = {"marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)], "markersize": 5}
                axes.plot(position, band["median"], color=colors[line], label=line, **style)
                summary.append(band.assign(**{"panel": name, by: line}))
            if values is not None:
                axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
            axes.set(title=name, xlabel=label)
        row[0].set_ylabel(ylabel)
        figure.legend(*_legend(row), loc="outside lower center", ncols=min(len(labels) + 1, 4))
        if title:
            figure.suptitle(title, x=0.01, ha="left", weight="bold")
    summary = pd.concat(summary, ignore_index=True)[["panel", by, x, "median", "min", "max", "count"]]
    return figure, summary.round({"median": 2, "min": 2, "max": 2})


def _legend(row: Sequence[plt.Axes]) -> tuple[list, list[str]]:
    """Handles and labels of all panels, each label once, the reference last."""
    found = {label: handle for axes in row for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    lines = sorted(found, key=lambda label: found[label].get_marker() in ("None", None))
    return [found[label] for label in lines], lines


def histograms(
    panels: Mapping[str, tuple[Tensor, tuple[float, float]]], xlabel: str, title: str, columns: int = 4, n_bins: int = 60
) -> tuple[Figure, pd.DataFrame]:
    """The distribution of each tensor, with the two ends of a range as lines; counts are on a logarithmic scale."""
    rows = -(-len(panels) // columns)
    table = []
    with _subplots(rows, columns, figsize=(2.7 * columns, 2.2 * rows + 0.4), squeeze=False) as (figure, grid):
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (name, (values, ends)) in zip(grid.flat, panels.items(), strict=False):
            values = values.detach().flatten().double().cpu()
            counts, edges = torch.histogram(values, n_bins)
            axes.stairs(counts.numpy(), edges.numpy(), fill=True, color=BLUE, alpha=0.7)
            for end in ends:
                axes.axvline(end, color=ORANGE, linestyle="--", linewidth=1.2)
            axes.set(yscale="log", ylim=(0.5, None))
            axes.set_title(name, fontsize=9)
            centres = (edges[1:] + edges[:-1]) / 2
            table += [
                {"panel": name, "low": ends[0], "high": ends[1], "value": round(float(centre), 5), "count": int(count)}
                for centre, count in zip(centres, counts, strict=True)
            ]
        figure.supxlabel(xlabel, fontsize=10)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure, pd.DataFrame(table)


def scatter(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    label: str,
    xlabel: str,
    ylabel: str,
    title: str,
    reference: tuple[float, str] | None = None,
    logarithmic: bool = False,
) -> tuple[Figure, pd.DataFrame]:
    """A dot for each row at columns `x` and `y`, with the text of column `label`; a colour and a marker for each value of `by`.

    `reference` is a value of `y` to mark with a line, and its label; with `logarithmic`, x has a logarithmic axis.
    """
    with _subplots(figsize=(9, 5.4)) as (figure, axes):
        if reference is not None:
            axes.axhline(reference[0], color=GREY, linestyle="-.", linewidth=1, label=reference[1])
        for i, (name, rows) in enumerate(table.groupby(by, sort=False)):
            axes.plot(rows[x], rows[y], linestyle="", marker=MARKERS[i], color=COLORS[i], label=name)
        ordered = table.sort_values(y, ascending=False)
        along = np.log10(ordered[x]) if logarithmic else ordered[x]
        width, height = (values.max() - values.min() or 1 for values in (along, table[y]))
        taken: list[tuple[float, float, float]] = []  # left, right and height of the labels so far
        for (_, row), start in zip(ordered.iterrows(), along, strict=True):
            left, place = start + 0.012 * width, row[y]
            right = left + 0.0105 * width * len(row[label])
            while any(left < b and a < right and abs(place - c) < 0.032 * height for a, b, c in taken):
                place -= 0.004 * height
            taken.append((left, right, place))
            axes.annotate(row[label], (10**left if logarithmic else left, place), fontsize=8, va="center")
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.margins(x=0.12)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, table


def kinds_of_pruning() -> tuple[Figure, pd.DataFrame]:
    """A drawing of what weight, unit and filter pruning and filter clustering take away from two layers' weights."""
    rows, columns, following = 6, 4, 5
    weights = torch.rand(rows, columns, generator=torch.Generator().manual_seed(12))
    labels = [0, 1, 0, 2, 1, 2]
    gone, whole = [1, 4], "#dce9f5"
    kinds = {
        "Weight pruning": "zeros anywhere; both tables keep their shape",
        "Unit pruning": "rows, and the columns that read them",
        "Filter pruning": "rows become zero where the channel must stay",
        "Filter clustering": "equal rows are computed once",
    }
    cells = []
    with _subplots(2, 4, figsize=(11, 5.6), height_ratios=(rows, following)) as (figure, grid):
        for kind, (first, second) in zip(kinds, grid.T, strict=True):
            for axes, (height, width) in ((first, (rows, columns)), (second, (following, rows))):
                is_first = axes is first
                for i in range(height):
                    for j in range(width):
                        channel = i if is_first else j
                        colour, state = whole, "kept"
                        if kind == "Weight pruning" and (weights[i, j] if is_first else weights[j, i % columns]) < 0.5:
                            colour, state = "white", "zero"
                        if kind == "Unit pruning" and channel in gone:
                            colour, state = None, "gone"
                        if kind == "Filter pruning" and is_first and channel in gone:
                            colour, state = "white", "zero"
                        if kind == "Filter clustering":
                            colour, state = COLORS[labels[channel]], f"cluster {labels[channel]}"
                        cells.append({"kind": kind, "table": "layer" if is_first else "next layer", "row": i, "column": j, "state": state})
                        style = (
                            {"edgecolor": GREY, "linewidth": 0.8}
                            if colour
                            else {"edgecolor": "#cccccc", "linestyle": ":", "linewidth": 0.8}
                        )
                        alpha = 0.55 if kind == "Filter clustering" else 1
                        axes.add_patch(plt.Rectangle((j, i), 0.88, 0.88, facecolor=colour or "none", alpha=alpha, **style))
                        if state == "zero":
                            axes.text(j + 0.44, i + 0.46, "0", ha="center", va="center", fontsize=7, color=GREY)
                        elif kind == "Filter clustering":
                            axes.text(j + 0.44, i + 0.46, "ABC"[labels[channel]], ha="center", va="center", fontsize=8)
                axes.set(xlim=(-0.2, rows + 0.1), ylim=(height, -0.1), aspect="equal")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(visible=False)
                axes.spines[:].set_visible(False)
            first.set_title(f"{kind}\n", fontsize=11)
            first.text(0, -0.35, kinds[kind], fontsize=8, va="bottom")
        grid[0, 0].set_ylabel("a layer: a row for each filter,\na column for each input channel")
        grid[1, 0].set_ylabel("the next layer: a column\nfor each of those rows")
        figure.suptitle("What each way of pruning takes away from the weights of two layers", x=0.01, ha="left", weight="bold")
    return figure, pd.DataFrame(cells)


def heat_map(
    values: pd.DataFrame, title: str, unit: str, fmt: str = "{:.1f}", xlabel: str = "", ylabel: str = "", worst: float | None = None
) -> tuple[Figure, pd.DataFrame]:
    """A cell per row and column of `values` with its number, darker for what is further from zero; empty where it is NaN.

    All values have one sign. `worst` is where the shade ends, so that one bad cell does not make the others look the same.
    """
    rows, columns = values.shape
    above, left = (max(len(line) for label in labels for line in str(label).split("\n")) for labels in (values.columns, values.index))
    with _subplots(figsize=(1.9 + 0.07 * left + max(0.62, 0.09 * above) * columns, 1.4 + 0.32 * rows)) as (figure, axes):
        sign = -1 if values.min(axis=None) < 0 else 1
        furthest = values.abs().max(axis=None) if worst is None else abs(worst)
        image = axes.imshow(values.abs(), cmap="Oranges", vmin=0, vmax=max(furthest, 1e-9), aspect="auto")
        for i, j in itertools.product(range(rows), range(columns)):
            value = values.iloc[i, j]
            if pd.notna(value):
                dark = abs(value) > 0.65 * furthest
                axes.text(j, i, fmt.format(value), ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.set_xticks(range(columns), values.columns)
        axes.set_yticks(range(rows), values.index)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.grid(visible=False)
        bar = figure.colorbar(image, label=unit, shrink=0.8, extend="neither" if worst is None else "max")
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{sign * value:g}")
    return figure, values.reset_index()


def filters_by_cluster(weight: Tensor, clusters: Clusters, title: str) -> tuple[Figure, pd.DataFrame]:
    """The filters (N, C_in, k_h, k_w) of a layer by cluster, largest cluster first: the centroid framed, its members beside it.

    Filters with three input channels are drawn in colour, grey being zero; others as the mean over their input channels.
    """
    order = clusters.sizes.argsort(descending=True, stable=True)
    weight = weight.detach().double().cpu()
    scale = weight.abs().max() if weight.shape[1] == 3 else weight.mean(1).abs().max()

    def draw(axes: plt.Axes, kernel: Tensor) -> None:
        if len(kernel) == 3:
            axes.imshow((kernel / (2 * scale) + 0.5).clamp(0, 1).permute(1, 2, 0))
        else:
            axes.imshow(kernel.mean(0), cmap="RdBu_r", vmin=-scale, vmax=scale)

    columns = int(clusters.sizes.max()) + 1
    rows = []
    with _subplots(len(clusters), columns, figsize=(max(0.75 * columns, 5), 0.78 * len(clusters) + 0.5), squeeze=False) as (figure, grid):
        for axes in grid.flat:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        for line, cluster in zip(grid, order.tolist(), strict=True):
            members = (clusters.labels == cluster).nonzero().flatten().tolist()
            draw(line[0], clusters.centroids[cluster])
            line[0].spines[:].set(visible=True, color="black", linewidth=2)
            for axes, member in zip(line[1:], members, strict=False):
                draw(axes, weight[member])
                is_medoid = member == int(clusters.medoids[cluster])
                axes.set_title(
                    f"{member}{' *' if is_medoid and len(members) > 1 else ''}", fontsize=8, weight="normal", loc="center", pad=2
                )
                rows.append({"cluster": cluster, "filter": member, "medoid": is_medoid})
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure, pd.DataFrame(rows)


def stacked_shares(shares: pd.DataFrame, title: str, unit: str) -> tuple[Figure, pd.DataFrame]:
    """A bar per row of `shares`, made of its columns, in %; each part with its number."""
    with _subplots(figsize=(8, 1.2 + 0.28 * len(shares))) as (figure, axes):
        left = pd.Series(0.0, index=shares.index)
        blues = plt.get_cmap("Blues")
        for i, column in enumerate(shares):
            tone = 0.15 + 0.75 * i / max(len(shares.columns) - 1, 1)
            axes.barh(shares.index.astype(str), shares[column], left=left, color=blues(tone), edgecolor="white", label=column)
            for name, value, start in zip(shares.index, shares[column], left, strict=True):
                if value >= 4:
                    color = "white" if tone > 0.55 else "black"
                    axes.text(start + value / 2, str(name), f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
            left = left + shares[column]
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set(title=title, xlabel=unit, xlim=(0, 100))
        figure.legend(loc="outside lower center", ncols=len(shares.columns))
    return figure, shares.reset_index()
