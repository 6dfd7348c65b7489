"""Train the networks that everything else starts from: ``python -m resnet_pruning.studies.base NAME``.

A network of doubled widths is trained first and is the teacher of the others. Neither it nor ``resnet20_choosing`` is trained on the
held-out tenth of the training images, on which recipes and settings are chosen.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .. import cost
from ..arguments import Seed
from ..checkpoints import load_checkpoint, save_checkpoint
from ..data import hold_out, load_images
from ..evaluation import accuracy
from ..files import ROOT, locked, results_folder, write_table
from ..hardware import default_device, machine
from ..model import ResNet
from ..training import Recipe, train
from .trials import LONG


@dataclasses.dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes
    ----------
    recipe : hyper-parameters
    stage_widths, depth : of the network, see `model.ResNet`
    teacher : name of the teacher network, or ""
    holds_out : whether a tenth of the training images (always the same) is held out for evaluation
    dtype : of the weights in the file
    """

    recipe: Recipe
    stage_widths: tuple[int, int, int] = (16, 32, 64)
    depth: int = 20
    teacher: str = ""
    holds_out: bool = False
    dtype: torch.dtype = torch.float32


TAUGHT = Training(dataclasses.replace(LONG, epochs=120, views=10), teacher="resnet20_wide")
SMALLER = dataclasses.replace(TAUGHT, recipe=dataclasses.replace(TAUGHT.recipe, epochs=130))
TRAININGS = {
    "resnet20_wide": Training(LONG, stage_widths=(32, 64, 128), holds_out=True, dtype=torch.float16),
    "resnet20": TAUGHT,
    "resnet20_choosing": dataclasses.replace(TAUGHT, holds_out=True),
    # Controls for pruning: half of the MACs from the start, for as many epochs as the base and its fine-tuning together.
    "resnet20_half": dataclasses.replace(SMALLER, stage_widths=(11, 23, 45)),
    "resnet14_half": dataclasses.replace(SMALLER, stage_widths=(14, 28, 56), depth=14),
    # A control for pruning the network of doubled widths: as many epochs as that one and its fine-tuning together.
    "resnet20_35epochs": dataclasses.replace(TAUGHT, recipe=dataclasses.replace(TAUGHT.recipe, epochs=35), dtype=torch.float16),
}
# For digits, on which a training takes seconds.
QUICK = Recipe(epochs=4, warmup_epochs=1, small_share=0.25, ema=0.9, batch_size=64)


def training_of(name: str, dataset: str) -> Training:
    """The entry of `TRAININGS`; for digits, with the recipe `QUICK` and without a teacher."""
    if name not in TRAININGS:
        raise ValueError(f"network is {name!r}, expected one of {', '.join(TRAININGS)}")
    chosen = TRAININGS[name]
    return chosen if dataset == "cifar10" else dataclasses.replace(chosen, recipe=QUICK, teacher="")


def train_network(name: str, dataset: str, folder: Path, seed: Seed = 0, progress: bool = True) -> Path:
    """Train one of `TRAININGS`, after its teacher if that is missing. Return the path of its checkpoint in `folder`.

    An interrupted training resumes where it stopped. Seeds other than 0 are part of the name: ``resnet20_seed1``. Its rows are in the
    folder's ``figures``, see `record`.
    """
    training = training_of(name, dataset)
    images, test_images = load_images(dataset, device=default_device())
    images, held_out = hold_out(images, len(images) // 10) if training.holds_out else (images, None)
    teacher = None
    if training.teacher:
        path = folder / "checkpoints" / f"{training.teacher}.pt"
        if not path.exists():
            train_network(training.teacher, dataset, folder, progress=progress)
        teacher, _ = load_checkpoint(path)
    torch.manual_seed(int(seed))
    network = ResNet(training.depth, training.stage_widths, n_classes=len(images.classes))
    path = folder / "checkpoints" / f"{name}{f'_seed{seed}' if seed else ''}.pt"
    state = folder / "build" / "training" / path.stem
    history = train(
        network,
        images,
        training.recipe,
        seed=seed,
        held_out=held_out,
        teacher=teacher,
        folder=state,
        progress=progress,
    )
    network = network.to(training.dtype).float()  # so that the accuracy is that of the rounded weights in the file
    facts = {
        "test_accuracy": round(accuracy(network, test_images), 2),
        "held_out_accuracy": round(accuracy(network, held_out), 2) if held_out is not None else None,
        "dataset": images.dataset,
        "n_train_images": len(images),
        "seed": int(seed),
        "epochs": training.recipe.epochs,
        "recipe": dataclasses.asdict(training.recipe),
        "teacher": training.teacher,
        "seconds": round(float(history.seconds.sum())),
        "machine": machine(images.device),
        "torch": str(torch.__version__),
    }
    save_checkpoint(path, network, facts, dtype=training.dtype)
    record(path, history, folder / "figures")
    shutil.rmtree(state)  # otherwise, the next training would return the result of this one
    return path


def checkpoint(name: str, dataset: str, profile: str, anew: bool = False) -> Path:
    """Path of a network's checkpoint; for CIFAR-10, the committed one. If it is missing, it is trained first, for digits within seconds.

    Parameters
    ----------
    anew : always train it, into `files.results_folder`. For CIFAR-10 at "full", this replaces the committed checkpoint and its rows in
        ``figures/``. Everything that was measured on the old network must then be measured again.
    """
    folder = ROOT if dataset == "cifar10" and not anew else results_folder(dataset, profile)
    path = folder / "checkpoints" / f"{name}.pt"
    unrecorded = folder / "build" / "training" / name  # is removed last
    if anew or not path.exists() or (folder != ROOT and unrecorded.exists()):
        train_network(name, dataset, folder)
    return path


def base_checkpoint(dataset: str, profile: str) -> Path:
    """Path of the checkpoint of the network that is pruned, see `checkpoint`."""
    return checkpoint("resnet20", dataset, profile)


def choosing_checkpoint(dataset: str, profile: str) -> Path:
    """Path of the checkpoint with which fine-tuning settings are chosen. It was not trained on the held-out tenth of the training images.

    A network remembers the images that it was trained on. On these, the gentlest fine-tuning would look best.
    """
    return checkpoint("resnet20_choosing", dataset, profile)


def figures_of_networks(dataset: str, profile: str) -> Path:
    """The folder of the CSVs in which `record` keeps what `checkpoint` returns; for CIFAR-10, the committed one at any profile."""
    return (ROOT if dataset == "cifar10" else results_folder(dataset, profile)) / "figures"


def histories(dataset: str, profile: str) -> pd.DataFrame:
    """All networks' training runs, epoch by epoch, from ``figures/trainings.csv``: the network, and the columns of `training.train`."""
    return pd.read_csv(figures_of_networks(dataset, profile) / "trainings.csv")


def record(path: Path, history: pd.DataFrame, figures: Path) -> None:
    """Write a trained network's row to ``base_seeds.csv`` or ``other_networks.csv``, and its epochs to ``trainings.csv``. They replace
    older rows of the same name, and take their place in the order; seeds are in order, too, since readers take the first as seed 0."""
    network, facts = load_checkpoint(path)
    row = {
        "seed": facts["seed"],
        "accuracy": facts["test_accuracy"],
        "held_out_accuracy": facts["held_out_accuracy"],
        "parameters": cost.parameters(network),
        "macs": cost.macs(network),
        "bytes": cost.size_in_bytes(network),
        **{name: facts[name] for name in ("teacher", "n_train_images", "epochs")},
        "minutes": round(facts["seconds"] / 60, 1),
        "images_per_second": round(history.images_per_second.median()),
        "machine": facts["machine"],
    }
    rows = "base_seeds.csv" if path.stem.split("_seed")[0] == "resnet20" else "other_networks.csv"
    digits = {"learning_rate": 5, "loss": 4, "train_accuracy": 2, "held_out_accuracy": 2, "seconds": 1, "images_per_second": 0}
    for csv, table in {rows: pd.DataFrame([row]), "trainings.csv": history.round(digits)}.items():
        table = table.assign(network=path.stem)[["network", *table]]
        with locked(figures / csv):  # two training runs may end at once
            if (figures / csv).exists():
                old = pd.read_csv(figures / csv)
                places = {name: place for place, name in enumerate(dict.fromkeys([*old.network, path.stem]))}
                table = pd.concat([old[old.network != path.stem], table])
                table = table.sort_values("network", key=lambda names, places=places: names.map(places), kind="stable")
            write_table(table.sort_values("seed", kind="stable") if "seed" in table else table, figures / csv)


def recipe_of(facts: Mapping[str, Any]) -> Recipe:
    """The recipe in a checkpoint's facts. The oldest have the number of epochs with small crops, not their share, and an unused cutout."""
    recipe = {name: value for name, value in facts["recipe"].items() if name != "cutout"}
    if "small_epochs" in recipe:
        recipe["small_share"] = recipe.pop("small_epochs") / recipe["epochs"]
    return Recipe(**recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=list(TRAININGS), help="which network to train")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches")
    arguments = parser.parse_args()
    path = train_network(arguments.name, "cifar10", ROOT, arguments.seed)
    print(f"{path}: {load_checkpoint(path)[1]}")


if __name__ == "__main__":
    main()
