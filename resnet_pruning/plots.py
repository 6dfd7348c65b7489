"""The figures of the notebooks, in one style. Each function returns the figure and the table of what it shows."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .data import Images
from .files import written_whole

# Okabe and Ito's colours, which differ for colour-blind readers too; lines also differ in dash or marker.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
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


def save_figure(figure: Figure, table: pd.DataFrame, path: str | Path) -> None:
    """Write `figure` to `path` (NAME.png) and the numbers it shows beside it (NAME.csv)."""
    path = Path(path)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png")
    with written_whole(path.with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False)


def learning_curves(history: pd.DataFrame, test_accuracy: float) -> tuple[Figure, pd.DataFrame]:
    """Loss and accuracy per epoch of one training (see `training.train`), with the test accuracy that it ended at, in %."""
    table = history.round(
        {"learning_rate": 5, "loss": 4, "train_accuracy": 2, "held_out_accuracy": 2, "seconds": 1, "images_per_second": 0}
    )
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        left.plot(table.epoch, table.loss, color=BLUE)
        left.set(title="The loss falls to the end", xlabel="epoch", ylabel="training loss (augmented images)", ylim=(0, None))
        rate = left.twinx()
        rate.plot(table.epoch, table.learning_rate, color=GREY, linestyle=":")
        rate.set(ylabel="learning rate (dotted)", ylim=(0, None))
        rate.grid(visible=False)
        right.plot(table.epoch, table.train_accuracy, color=BLUE, label="training images, augmented")
        if table.held_out_accuracy.notna().any():
            right.plot(table.epoch, table.held_out_accuracy, color=ORANGE, linestyle="--", label="held-out images, averaged weights")
        right.axhline(test_accuracy, color=GREY, linewidth=1, label=f"test images, at the end: {test_accuracy:.2f} %")
        right.set(title="Accuracy", xlabel="epoch", ylabel="accuracy (%)", ylim=(None, 100))
        right.legend(loc="lower right")
    return figure, table


def class_accuracies(accuracies: Tensor, classes: Sequence[str], mean: float) -> tuple[Figure, pd.DataFrame]:
    """Accuracy per class in %, worst first, with the accuracy over all classes as the reference line."""
    table = pd.DataFrame({"class": classes, "accuracy": accuracies.numpy().round(2)}).sort_values("accuracy", ignore_index=True)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
        bars = axes.barh(table["class"], table.accuracy, color=BLUE)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.axvline(mean, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(f"all: {mean:.2f}", (mean, len(table) - 0.4), ha="center", va="bottom", color=GREY, annotation_clip=False)
        worst = table["class"].iloc[0]
        axes.set(xlabel="test accuracy (%)", xlim=(max(0, table.accuracy.min() - 10), 102))
        axes.set_title(f"“{worst}” is the hardest class", pad=16)
        axes.grid(axis="y", visible=False)
    return figure, table


def confusion(counts: Tensor, classes: Sequence[str]) -> tuple[Figure, pd.DataFrame]:
    """Confusion matrix (row: true class, column: predicted) in % of the true class; the diagonal is left out of the shading."""
    shares = 100 * counts / counts.sum(1, keepdim=True)
    table = pd.DataFrame(counts.numpy(), columns=list(classes))
    table.insert(0, "true class", list(classes))
    mistakes = shares.clone().fill_diagonal_(0)
    true, predicted = divmod(int(mistakes.argmax()), len(classes))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 5.4), layout="constrained")
        image = axes.imshow(mistakes, cmap="Blues")
        for row in range(len(classes)):
            for column in range(len(classes)):
                dark = mistakes[row, column] > 0.6 * mistakes.max()
                weight = "bold" if row == column else "normal"
                axes.text(
                    column,
                    row,
                    f"{shares[row, column]:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                    weight=weight,
                )
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        axes.set(
            title=f"Most frequent mistake: {classes[true]} taken for {classes[predicted]}", xlabel="predicted class", ylabel="true class"
        )
        axes.grid(visible=False)
        figure.colorbar(image, label="mistakes (% of the true class)", shrink=0.8)
    return figure, table


def bars(table: pd.DataFrame, label: str, value: str, title: str, unit: str, reference: str | None = None, fmt: str = "%.2f") -> Figure:
    """Horizontal bars of a column of `table`, in its order from the top; `reference` names the row of the dashed line."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.6 + 0.32 * len(table)), layout="constrained")
        drawn = axes.barh(table[label], table[value], color=[ORANGE if name == reference else BLUE for name in table[label]])
        axes.bar_label(drawn, fmt=fmt, padding=3)
        if reference is not None:
            axes.axvline(table.loc[table[label] == reference, value].iloc[0], color=GREY, linestyle="--", linewidth=1)
        low, high = table[value].min(), table[value].max()
        axes.set(title=title, xlabel=unit, xlim=(max(0, low - (high - low)) if low > high / 2 else 0, high + 0.12 * (high - low)))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return figure


def sample_grid(images: Images, per_class: int = 8) -> Figure:
    """The first images of each class, a class per row."""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(len(images.classes), per_class, figsize=(per_class * 0.8, len(images.classes) * 0.8))
        for label, row in enumerate(grid):
            for axes, pixels in zip(row, images.pixels[images.labels == label][:per_class].cpu(), strict=False):
                axes.imshow(pixels.permute(1, 2, 0))
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
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, -(-n // 2), figsize=(1.7 * -(-n // 2), 4.6), layout="constrained")
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, index in zip(grid.flat, wrong, strict=False):
            axes.imshow(images.pixels[index].cpu().permute(1, 2, 0))
            top = probabilities[index].topk(3)
            guesses = [f"{images.classes[c]} {100 * p:.0f} %" for p, c in zip(top.values, top.indices, strict=True)]
            axes.set_title("\n".join([f"is: {images.classes[labels[index]]}", *guesses]), fontsize=8, weight="normal")
    return figure
