"""The figures of the notebooks, in one style. A figure is closed when it is returned: show it by ending a cell with it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .data import Images
from .files import written_whole
from .training import Recipe

# Okabe and Ito's colours, which differ for colour-blind readers too; lines also differ in dash or marker.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"
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
