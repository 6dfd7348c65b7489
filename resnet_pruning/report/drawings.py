"""Drawings of images, filters and kinds of pruning. Notebooks import them from `plots`."""

from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from ..arguments import Integer
from .style import COLORS, as_array, subplots


def sample_grid(images: Any, per_class: Integer = 8) -> Figure:
    """The first images (`data.Images`) of each class, one class per row."""
    labels, n_classes = as_array(images.labels), len(images.classes)
    with subplots("", n_classes, per_class, figsize=(0.75 * per_class, 0.7 * n_classes), squeeze=False) as (figure, grid):
        for label, row in enumerate(grid):
            _show_images(row, images, np.flatnonzero(labels == label))
            row[0].text(-0.15, 0.5, images.classes[label], transform=row[0].transAxes, ha="right", va="center")
    return figure


def mistakes(images: Any, logits: ArrayLike, n: Integer = 8) -> Figure:
    """The `n` most confident wrong answers of the network, each with its three highest probabilities.

    `logits` (N, n_classes) are its answers for the N `images` (`data.Images`).
    """
    logits, labels = as_array(logits).astype(float), as_array(images.labels)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    surest = np.argsort(-probabilities.max(axis=1), kind="stable")
    wrong = surest[(probabilities.argmax(axis=1) != labels)[surest]][:n]
    columns = -(-n // 2)
    with subplots("", 2, columns, figsize=(2.2 * columns, 5), squeeze=False) as (figure, grid):
        _show_images(grid.ravel(), images, wrong)
        for axes, index in zip(grid.flat, wrong, strict=False):
            guesses = [f"{images.classes[c]} {100 * probabilities[index, c]:.2f} %" for c in np.argsort(-probabilities[index])[:3]]
            axes.set_title("\n".join([f"is {images.classes[labels[index]]}", *guesses]), fontsize=9, weight="normal", loc="center")
    return figure


def _show_images(row, images, indices: np.ndarray) -> None:
    """Show one image in each of the axes in `row`, until there are no more `indices`."""
    for axes in row:
        axes.set_axis_off()
    for axes, index in zip(row, indices, strict=False):
        axes.imshow(as_array(images.pixels[index]).transpose(1, 2, 0), interpolation="nearest")


def filters_by_cluster(weight: ArrayLike, clusters: Any, title: str) -> tuple[Figure, pd.DataFrame]:
    """The filters (N, C_in, k_h, k_w) of a layer by cluster, largest cluster first: the centroid framed, its members beside it.

    Filters with three input channels are drawn in colour, with grey for zero; others as the mean over their input channels.
    `clusters` are `clustering.Clusters`; their medoids are marked with a star.

    Returns
    -------
    figure, table with a row for each filter and the columns cluster, filter and medoid (whether it is its cluster's)
    """
    weight, centroids, medoids, labels = map(as_array, (weight, clusters.centroids, clusters.medoids, clusters.labels))
    sizes = np.bincount(labels)
    largest_first = np.argsort(-sizes, kind="stable")
    table = pd.DataFrame({"cluster": labels, "filter": range(len(labels)), "medoid": medoids[labels] == range(len(labels))})
    if weight.shape[1] == 3:
        scale = 2 * np.abs(weight).max()
        weight, centroids = ((values / scale + 0.5).clip(0, 1).transpose(0, 2, 3, 1) for values in (weight, centroids))
        shades = {}
    else:
        weight, centroids = weight.mean(axis=1), centroids.mean(axis=1)
        shades = {"cmap": "RdBu_r", "vmin": -np.abs(weight).max(), "vmax": np.abs(weight).max()}
    shape = (len(sizes), 1 + sizes.max())
    with subplots(title, *shape, figsize=(max(0.75 * shape[1], 5), 0.78 * shape[0] + 0.5), squeeze=False) as (figure, grid):
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[], frame_on=False)
        for row, cluster in zip(grid, largest_first, strict=True):
            row[0].imshow(centroids[cluster], **shades)
            row[0].set_frame_on(True)
            row[0].spines[:].set(visible=True, linewidth=2)
            for axes, member in zip(row[1:], np.flatnonzero(labels == cluster), strict=False):
                axes.imshow(weight[member], **shades)
                star = " *" if table.medoid[member] and sizes[cluster] > 1 else ""
                axes.set_title(f"{member}{star}", fontsize=8, weight="normal", loc="center", pad=2)
    return figure, table.set_index("cluster", drop=False).loc[largest_first].reset_index(drop=True)


def kinds_of_pruning() -> tuple[Figure, pd.DataFrame]:
    """What weight, unit and filter pruning and filter clustering remove from the weights of two layers.

    Returns
    -------
    figure, table with a row for each weight and the columns kind, table (layer or next layer), row, column and state
    """
    random = np.random.default_rng(12)
    layer, following = (6, 4), (5, 6)  # filters and input channels of each; the filters of one are the channels of the next
    some = np.isin(np.arange(6), [1, 4])
    cluster = np.array(["cluster 0", "cluster 1", "gone", "cluster 2", "gone", "gone"])
    kinds = {  # the states of the weights of both, or of their rows and columns
        ("Weight pruning", "zeros anywhere; both tables\nkeep their shape"): [
            np.where(random.random(shape) < 0.5, "zero", "kept") for shape in (layer, following)
        ],
        ("Unit pruning", "rows, and the columns\nthat read them"): [
            np.where(some, "gone", "kept")[:, None],
            np.where(some, "gone", "kept"),
        ],
        ("Filter pruning", "rows become zero where\nthe channel must stay"): [np.where(some, "zero", "kept")[:, None], "kept"],
        ("Filter clustering", "equal rows become one,\ntheir columns are summed"): [cluster[:, None], cluster],
    }
    fills = {"kept": "#dce9f5", "zero": "#f2f2f2", "gone": "white", "cluster 0": "#7fb8d8", "cluster 1": "#eaae7f", "cluster 2": "#7fceb9"}
    signs = {"kept": "", "zero": "0", "gone": "", "cluster 0": "A", "cluster 1": "B", "cluster 2": "C"}
    look = {"cmap": ListedColormap(list(fills.values())), "vmin": 0, "vmax": len(fills) - 1, "linewidths": 3, "cbar": False, "square": True}
    cells = []
    title = "What each way of pruning takes away from the weights of two layers"
    with subplots(title, 2, 4, figsize=(9.2, 4.9), height_ratios=(layer[0], following[0])) as (figure, grid):
        for ((kind, effect), states), axes_of_kind in zip(kinds.items(), grid.T, strict=True):
            for axes, name, shape, state in zip(axes_of_kind, ("layer", "next layer"), (layer, following), states, strict=True):
                table = pd.DataFrame(np.broadcast_to(state, shape))
                seaborn.heatmap(table.map(list(fills).index), annot=table.map(signs.get), fmt="", ax=axes, **look)
                axes.set(xticks=[], yticks=[], anchor="NW", xlim=(0, 6.8))
                rows = [{"row": i, "column": j, "state": state} for (i, j), state in np.ndenumerate(table)]
                cells.append(pd.DataFrame(rows).assign(kind=kind, table=name))
            axes_of_kind[0].set_title(f"{kind}\n\n")
            axes_of_kind[0].text(0, -0.15, effect, fontsize=8, va="bottom")
        grid[0, 0].set_ylabel("a layer: a row\nfor each filter")
        grid[1, 0].set_ylabel("the next layer: a column\nfor each of those rows")
    return figure, pd.concat(cells, ignore_index=True)[["kind", "table", "row", "column", "state"]]


def idea() -> tuple[Figure, pd.DataFrame]:
    """How clustering filters makes a network smaller, in five steps, on a small example: the weights of two layers, a value each.

    The refit changes weights too little for the eye, so an arrow in each shows its change.

    Returns
    -------
    figure, table with a row for each weight and the columns step, table (layer or next layer), row, column, value and cluster
    """
    random = np.random.default_rng(3)
    labels = np.array([0, 1, 0, 2, 1, 2])
    filters, readers = random.uniform(-1, 1, (3, 4))[labels] + random.normal(0, 0.25, (6, 4)), random.normal(0, 0.5, (4, 6))
    inputs = random.normal(size=(4, 200))
    centroids = np.stack([filters[labels == cluster].mean(axis=0) for cluster in range(3)])
    added = np.stack([readers[:, labels == cluster].sum(axis=1) for cluster in range(3)], axis=1)
    before, after = (np.maximum(weights @ inputs, 0) for weights in (filters, centroids))
    solved = np.linalg.lstsq(after.T, (readers @ before).T, rcond=None)[0].T
    order = np.argsort(labels, kind="stable")
    grouped = labels[order]
    steps = {
        ("1 · Trained", "6 filters, a row each,\nread by the next layer"): (filters, readers, np.full(6, -1)),
        ("2 · Clustered", "k-means finds filters\nthat are alike (sorted here)"): (filters[order], readers[:, order], grouped),
        ("3 · Replaced", "each filter becomes its\ncluster's representative"): (centroids[grouped], readers[:, order], grouped),
        ("4 · Merged", "equal filters merge; weights\nthat read them are summed"): (centroids, added, np.arange(3)),
        ("5 · Repaired", "the next layer is refitted,\nthen all is fine-tuned"): (centroids, solved, np.arange(3)),
    }
    look = {"cmap": "Greys", "vmin": -2.0, "vmax": 2.6, "linewidths": 2, "cbar": False, "square": True}
    cells = []
    with subplots("", 2, 5, figsize=(9.2, 3.6), height_ratios=(6, 4)) as (figure, grid):
        for ((step, words), (layer, following, clusters)), axes_of_step in zip(steps.items(), grid.T, strict=True):
            owners = {"layer": np.repeat(clusters[:, None], 4, axis=1), "next layer": np.repeat(clusters[None], 4, axis=0)}
            for axes, (name, owner), values in zip(axes_of_step, owners.items(), (layer, following), strict=True):
                seaborn.heatmap(values, ax=axes, **look)
                # A weight is as large in every step.
                axes.set(xticks=[], yticks=[], anchor="NW", xlim=(0, 6.8), ylim=(6 if name == "layer" else 4, 0))
                for (row, column), cluster in np.ndenumerate(owner):
                    if cluster >= 0:
                        axes.add_patch(Rectangle((column, row), 1, 1, color=COLORS[cluster], alpha=0.45, linewidth=0))
                rows = [
                    {"row": i, "column": j, "value": round(value, 4), "cluster": owner[i, j]} for (i, j), value in np.ndenumerate(values)
                ]
                cells.append(pd.DataFrame(rows).assign(step=step, table=name))
            axes_of_step[0].set_title(f"{step}\n\n")
            axes_of_step[0].text(0, -0.15, words, fontsize=8, va="bottom")
        changes = solved - added
        arrow = {"arrowstyle": "-|>,head_length=0.25,head_width=0.15", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}
        for (row, column), half in np.ndenumerate(0.45 * changes / np.abs(changes).max()):  # up is more; the axis points down
            grid[1, -1].annotate("", (column + 0.5, row + 0.5 - half), (column + 0.5, row + 0.5 + half), arrowprops=arrow)
        grid[1, -1].text(3.4, 2, "arrows: the\nchange by\nthe refit", fontsize=8, va="center")
        grid[0, 0].set_ylabel("a layer")
        grid[1, 0].set_ylabel("the next layer")
    return figure, pd.concat(cells, ignore_index=True)[["step", "table", "row", "column", "value", "cluster"]]
