"""The short training runs by which the training recipe was chosen: ``python -m resnet_pruning.studies.trials``.

Each trial changes one thing in `BASE`, the recipe of the first base network, or in `LONG`, from which the present one was derived. It
trains on 45,000 images and is evaluated on the 5,000 held out, never on the test set. Its teacher was not trained on these 5,000 either. A
trial that has a row in the CSV is skipped; an interrupted one resumes.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..checkpoints import load_checkpoint
from ..data import Images, hold_out, load_images
from ..evaluation import accuracy
from ..files import ROOT, results_folder
from ..hardware import default_device, machine
from ..model import ResNet
from ..training import Recipe, train
from .sweeps import run_sweep

BASE = Recipe(epochs=6, warmup_epochs=1, ema=0.995, small_share=0.5)
LONG = Recipe(epochs=30, optimizer="Muon", learning_rate=0.03, weight_decay=0.05, small_share=2 / 3)


@dataclasses.dataclass(frozen=True)
class TrialPoint:
    """A short training, named after what it tries.

    Attributes
    ----------
    n_images : number of training images, 0 for all that are not held out
    teacher : name of the teacher network in ``checkpoints/``, or ""
    width : of the network, as a multiple of ResNet-20's
    """

    trial: str
    seed: int = 0
    n_images: int = 0
    teacher: str = ""
    width: int = 1
    recipe: Recipe = BASE


def _long(trial: str, teacher: str = "", width: int = 1, seed: int = 0, **changes: Any) -> TrialPoint:
    return TrialPoint(trial, seed, teacher=teacher, width=width, recipe=dataclasses.replace(LONG, **changes))


TRIALS = (
    TrialPoint("base"),
    TrialPoint("full-size images throughout", recipe=dataclasses.replace(BASE, epochs=5, small_share=0.0)),
    TrialPoint("base", seed=1),
    TrialPoint("learning rate 0.1", recipe=dataclasses.replace(BASE, learning_rate=0.1)),
    # These two were run after the training of the first base network, for the next one.
    TrialPoint("label smoothing 0.1", recipe=dataclasses.replace(BASE, label_smoothing=0.1)),
    TrialPoint("batch size 256, learning rate 0.4", recipe=dataclasses.replace(BASE, batch_size=256, learning_rate=0.4, ema=0.99)),
    # Longer trials, long enough to be conclusive: in six epochs, a network that is pulled harder always leads.
    _long("Muon, untaught"),
    _long("Muon, doubled widths, untaught", width=2),
    _long("Muon, untaught, label smoothing 0.1", label_smoothing=0.1),
    _long("Muon, untaught, flipped every other epoch", alternating=True),
    _long("Muon, untaught, weights not averaged", ema=0.0),
    _long("Muon, untaught, mixup 0.2", mixup=0.2),
    _long("SGD as in base, untaught", optimizer="SGD", learning_rate=BASE.learning_rate, weight_decay=BASE.weight_decay),
    _long("Muon, taught by an earlier copy", "resnet20_first_choosing"),
    _long("Muon, taught by doubled widths, 10 views", "resnet20_wide", views=10),
    _long("Muon, taught by doubled widths, 10 views, learning rate 0.06", "resnet20_wide", views=10, learning_rate=0.06),
    _long("Muon, taught by doubled widths, 10 views, temperature 2", "resnet20_wide", views=10, temperature=2.0),
)


def run_trials(
    train_images: Images,
    csv: str | Path,
    folder: str | Path,
    trials: Sequence[TrialPoint] = TRIALS,
    *,
    test_images: Images | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the trials that have no row in `csv` yet, and return the rows of all `trials`, best first.

    Parameters
    ----------
    train_images : training images; a tenth of them is held out
    csv : one row per trial: the point, accuracies (%), seconds, machine; and beside it NAME_epochs.csv, see `sweeps.read_details`
    folder : where unfinished trials keep their state
    trials : the trials to run
    test_images : if given, rows have the test accuracy too
    progress : whether each training shows a progress bar
    """
    training, held_out = hold_out(train_images, len(train_images) // 10)

    def run(point: TrialPoint) -> dict[str, Any]:
        torch.manual_seed(point.seed)
        network = ResNet(stage_widths=tuple(point.width * width for width in (16, 32, 64)), n_classes=len(train_images.classes))
        teacher = load_checkpoint(ROOT / "checkpoints" / f"{point.teacher}.pt")[0] if point.teacher else None
        images = training[: point.n_images or len(training)]
        state = Path(folder) / re.sub(r"\W+", "_", f"{point.trial} {point.seed}")
        torch.compiler.reset()  # compiled networks of earlier trials count towards a limit, beyond which nothing is compiled
        history = train(network, images, point.recipe, seed=point.seed, held_out=held_out, teacher=teacher, folder=state, progress=progress)
        row = {name: round(history[name].iloc[-1], 2) for name in ("held_out_accuracy", "train_accuracy")}
        if test_images is not None:
            row["test_accuracy"] = round(accuracy(network, test_images), 2)
        epochs = history[["epoch", "loss", "held_out_accuracy"]].round({"loss": 4, "held_out_accuracy": 2})
        return row | {"seconds": round(history.seconds.sum(), 1), "machine": machine(training.device), "epochs": epochs}

    return run_sweep(run, trials, csv, progress=False).sort_values("held_out_accuracy", ascending=False, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = list(dict.fromkeys(point.trial for point in TRIALS))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TRIAL", help="some of: " + "; ".join(names))
    chosen = parser.parse_args().only
    folder = results_folder("cifar10", "full")
    images, _ = load_images("cifar10", device=default_device())
    points = [point for point in TRIALS if point.trial in chosen]
    table = run_trials(images, folder / "figures/training_trials.csv", folder / "build/trials", points)
    print(table[["trial", "seed", "held_out_accuracy", "train_accuracy", "seconds"]].to_string(index=False))


if __name__ == "__main__":
    main()
