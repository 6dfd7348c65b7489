"""The short runs that the training recipe was chosen by: ``python -m resnet_pruning.studies.trials``.

Each trial changes one thing in `BASE`, trains on 45,000 images and is judged on the 5,000 held out, never on the test
set. A trial that has its row in the CSV is skipped, one that was interrupted goes on.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from ..data import Images, hold_out, load_images
from ..evaluation import accuracy
from ..files import results_folder
from ..hardware import default_device, machine
from ..model import ResNet
from ..training import Recipe, train
from .sweeps import run_sweep

BASE = Recipe(epochs=6, warmup_epochs=1, ema=0.995, small_epochs=3)
TRIALS: dict[str, Recipe] = {
    "base": BASE,
    "full-size images throughout": dataclasses.replace(BASE, epochs=5, small_epochs=0),
    "base, second seed": BASE,
    "learning rate 0.1": dataclasses.replace(BASE, learning_rate=0.1),
    # These two were run after the committed training, for the one that comes after it.
    "label smoothing 0.1": dataclasses.replace(BASE, label_smoothing=0.1),
    "batch size 256, learning rate 0.4": dataclasses.replace(BASE, batch_size=256, learning_rate=0.4, ema=0.99),
}


def run_trials(
    train_images: Images,
    csv: str | Path,
    folder: str | Path,
    trials: Mapping[str, Recipe] = TRIALS,
    *,
    test_images: Images | None = None,
    n_images: int = 0,
) -> pd.DataFrame:
    """Run the trials that have no row in `csv` yet, and return their rows, best first.

    Parameters
    ----------
    train_images : training images; a tenth of them is held out
    csv : one row per trial: name, recipe, held-out accuracy (%), seconds, machine; see `sweeps.run_sweep`
    folder : where unfinished trials keep their state
    trials : recipes by name; a name that ends with "second seed" has seed 1
    test_images : if given, rows have the test accuracy too, and each epoch's held-out accuracy and loss, separated by spaces
    n_images : trained on, 0 for all that are not held out
    """
    training, held_out = hold_out(train_images, len(train_images) // 10)
    training = training[: n_images or len(training)]

    def run(trial: str, seed: int, n_images: int, **recipe) -> dict[str, str | float]:
        torch.manual_seed(seed)
        network = ResNet(n_classes=len(train_images.classes))
        state = Path(folder) / re.sub(r"\W+", "_", trial)
        torch.compiler.reset()  # compiled networks of trials before count towards a limit, from which on nothing is compiled
        history = train(network, training, Recipe(**recipe), seed=seed, held_out=held_out, folder=state)
        row = {name: round(history[name].iloc[-1], 2) for name in ("held_out_accuracy", "train_accuracy")}
        if test_images is not None:
            row["test_accuracy"] = round(accuracy(network, test_images), 2)
            row["curve"] = " ".join(f"{value:.2f}" for value in history.held_out_accuracy)
            row["losses"] = " ".join(f"{value:.4f}" for value in history.loss)
        return row | {"seconds": round(history.seconds.sum(), 1), "machine": machine()}

    points = [
        {"trial": name, "seed": int(name.endswith("second seed")), "n_images": n_images, **dataclasses.asdict(recipe)}
        for name, recipe in trials.items()
    ]
    table = run_sweep(run, points, csv, progress=False)  # each training has its own bar
    return table.sort_values("held_out_accuracy", ascending=False, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="TRIAL", help="some of: " + "; ".join(TRIALS))
    chosen = parser.parse_args().only
    folder = results_folder("cifar10", "full")
    images, _ = load_images("cifar10", device=default_device())
    table = run_trials(images, folder / "figures/training_trials.csv", folder / "build/trials", {name: TRIALS[name] for name in chosen})
    print(table[["trial", "held_out_accuracy", "train_accuracy", "seconds"]].to_string(index=False))


if __name__ == "__main__":
    main()
