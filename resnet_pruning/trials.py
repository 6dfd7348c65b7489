"""The short runs that the training recipe was chosen by: ``python -m resnet_pruning.trials``.

Each trial changes one thing in `BASE`, trains on 45,000 images and is judged on the 5,000 held out, never on the test
set. Rows are appended to a CSV one by one; a trial that has its row is skipped, one that was interrupted goes on.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from .data import Images, hold_out, load
from .files import results_folder, written_whole
from .hardware import default_device, machine
from .model import ResNet
from .training import Recipe, train

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


def run_trials(train_images: Images, csv: str | Path, folder: str | Path, trials: Mapping[str, Recipe] = TRIALS) -> pd.DataFrame:
    """Run the trials that have no row in `csv` yet, and return all rows, best first.

    Parameters
    ----------
    train_images : training images; a tenth of them is held out
    csv : one row per trial: name, held-out accuracy (%), seconds, machine, and the recipe
    folder : where unfinished trials keep their state
    """
    csv = Path(csv)
    training, held_out = hold_out(train_images, len(train_images) // 10)
    for name, recipe in trials.items():
        table = pd.read_csv(csv) if csv.exists() else pd.DataFrame()
        if len(table) and name in set(table.trial):
            continue
        seed = 1 if name.endswith("second seed") else 0
        torch.manual_seed(seed)
        history = train(
            ResNet(n_classes=len(train_images.classes)),
            training,
            recipe,
            seed=seed,
            held_out=held_out,
            folder=Path(folder) / name.replace(" ", "_").replace(",", ""),
        )
        row = {
            "trial": name,
            "held_out_accuracy": round(history.held_out_accuracy.iloc[-1], 2),
            "train_accuracy": round(history.train_accuracy.iloc[-1], 2),
            "seconds": round(history.seconds.sum(), 1),
            "machine": machine(),
            "seed": seed,
            **dataclasses.asdict(recipe),
        }
        with written_whole(csv) as partial:
            pd.concat([table, pd.DataFrame([row])]).to_csv(partial, index=False)
    return pd.read_csv(csv).sort_values("held_out_accuracy", ascending=False, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="TRIAL", help="some of: " + "; ".join(TRIALS))
    chosen = parser.parse_args().only
    folder = results_folder("cifar10", "full")
    images, _ = load("cifar10", device=default_device())
    table = run_trials(images, folder / "figures/training_trials.csv", folder / "build/trials", {name: TRIALS[name] for name in chosen})
    print(table[["trial", "held_out_accuracy", "train_accuracy", "seconds"]].to_string(index=False))


if __name__ == "__main__":
    main()
