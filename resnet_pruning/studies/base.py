"""The trained networks that the notebooks on pruning start from."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .. import cost
from ..checkpoints import load_checkpoint, save_checkpoint
from ..data import Images, hold_out, load_images
from ..evaluation import accuracy
from ..files import ROOT, results_folder, write_table
from ..hardware import default_device, machine
from ..model import ResNet
from ..training import Recipe, train

QUICK = Recipe(epochs=4, warmup_epochs=1, small_share=0.25, ema=0.9, batch_size=64)


def base_checkpoint(dataset: str, profile: str) -> Path:
    """Path of the base network's checkpoint: for CIFAR-10 the committed one; for digits it is trained, in seconds, where it is missing."""
    return base_training(dataset, profile)[0]


def base_training(dataset: str, profile: str, retrain: bool = False) -> tuple[Path, pd.DataFrame]:
    """The base network's checkpoint, and the history of its training as ``figures/learning_curves.csv`` has it, see `training.train`.

    For CIFAR-10 both are committed. For digits they are made, in seconds, in `files.results_folder` where they are missing there.

    Parameters
    ----------
    retrain : train anew, into `files.results_folder`. For CIFAR-10 at "full" this replaces the committed checkpoint and
        ``figures/resnet20.csv``, and everything that was measured on the old network has to be measured anew.
    """
    folder = ROOT if dataset == "cifar10" and not retrain else results_folder(dataset, profile)
    path, figures = folder / "checkpoints" / "resnet20.pt", folder / "figures"
    curves = figures / "learning_curves.csv"
    if retrain or (dataset != "cifar10" and not (path.exists() and curves.exists())):
        images, test_images = load_images(dataset, device=default_device())
        recipe = Recipe() if folder == ROOT else QUICK
        history = _train(path, images if folder == ROOT else images[:2000], recipe, "test_accuracy", test_images)
        for csv, table in {curves: history, figures / "resnet20.csv": _summary(path, history)}.items():
            write_table(table, csv)
    return path, pd.read_csv(curves)


def choosing_checkpoint(dataset: str, profile: str) -> Path:
    """Path of the checkpoint that settings of fine-tuning are chosen with: it has never seen the held-out tenth of the training images.

    A network remembers the images that it was trained on, so on these the gentlest fine-tuning would look best. For CIFAR-10 it is
    committed (30 epochs of the base's recipe); where it is missing, it is trained here.
    """
    folder = ROOT if dataset == "cifar10" else results_folder(dataset, profile)
    path = folder / "checkpoints" / "resnet20_choosing.pt"
    if not path.exists():
        images, _ = load_images(dataset, device=default_device())
        images, held_out = hold_out(images, len(images) // 10)
        _train(path, images, Recipe(epochs=30) if dataset == "cifar10" else QUICK, "held_out_accuracy", held_out)
    return path


def recipe_of(facts: Mapping[str, Any]) -> Recipe:
    """The recipe in a checkpoint's facts. The oldest ones, the committed base's among them, count the epochs with small crops."""
    recipe = dict(facts["recipe"])
    if "small_epochs" in recipe:
        recipe["small_share"] = recipe.pop("small_epochs") / recipe["epochs"]
    return Recipe(**recipe)


def _train(path: Path, images: Images, recipe: Recipe, fact: str, judged: Images) -> pd.DataFrame:
    """Train, save the network with its accuracy on `judged` as the fact of that name, and return the history.

    An interrupted training goes on where it stopped.
    """
    torch.manual_seed(0)
    network = ResNet(depth=20, n_classes=len(images.classes))
    state = path.parent.parent / "build" / "training" / path.stem
    history = train(network, images, recipe, folder=state)
    facts = {
        fact: round(accuracy(network, judged), 2),
        "dataset": images.dataset,
        "n_train_images": len(images),
        "seed": 0,
        "epochs": recipe.epochs,
        "recipe": dataclasses.asdict(recipe),
        "seconds": round(float(history.seconds.sum())),
        "machine": machine(images.device),
        "torch": str(torch.__version__),
    }
    save_checkpoint(path, network, facts)
    shutil.rmtree(state)  # else the next training would be this one
    return history


def _summary(path: Path, history: pd.DataFrame) -> pd.DataFrame:
    """One row on a trained network, for ``figures/resnet20.csv``."""
    network, facts = load_checkpoint(path)
    row = {
        "test_accuracy": facts["test_accuracy"],
        "parameters": cost.parameters(network),
        "macs": cost.macs(network),
        "bytes": cost.size_in_bytes(network),
        "n_train_images": facts["n_train_images"],
        "epochs": facts["epochs"],
        "minutes": round(facts["seconds"] / 60, 1),
        "images_per_second": round(history.images_per_second.median()),
        "machine": facts["machine"],
    }
    return pd.DataFrame([row])
