"""The trained networks that the notebooks on pruning start from."""

from pathlib import Path

import torch

from ..data import Images, hold_out, load_images
from ..evaluation import accuracy
from ..files import ROOT, results_folder
from ..hardware import default_device, machine
from ..model import ResNet, save_checkpoint
from ..training import Recipe, train

QUICK = Recipe(epochs=4, warmup_epochs=1, small_share=0.25, ema=0.9, batch_size=64)


def base_checkpoint(dataset: str, profile: str) -> Path:
    """Path of the checkpoint: for CIFAR-10 the committed one, for digits that of notebook 01, or else one trained here in seconds."""
    if dataset == "cifar10":
        return ROOT / "checkpoints" / "resnet20.pt"
    path = results_folder(dataset, profile) / "checkpoints" / "resnet20.pt"
    if not path.exists():
        images, _ = load_images(dataset, device=default_device())
        _train(path, images, None, QUICK)
    return path


def choosing_checkpoint(dataset: str, profile: str) -> Path:
    """Path of the checkpoint that settings of fine-tuning are chosen with: it has never seen the held-out tenth of the training images.

    A network remembers the images that it was trained on, so on these the gentlest fine-tuning would look best. For CIFAR-10 it is
    committed (30 epochs of the base's recipe); where it is missing, it is trained here.
    """
    folder = ROOT if dataset == "cifar10" else results_folder(dataset, profile)
    path = folder / "checkpoints" / "resnet20_choosing.pt"
    if not path.exists():
        images, _ = load_images(dataset, device=default_device())
        _train(path, *hold_out(images, len(images) // 10), Recipe(epochs=30) if dataset == "cifar10" else QUICK)
    return path


def _train(path: Path, images: Images, held_out: Images | None, recipe: Recipe) -> None:
    torch.manual_seed(0)
    network = ResNet(depth=20, n_classes=len(images.classes))
    history = train(network, images, recipe, folder=ROOT / "build" / "training" / f"{images.dataset}-{path.stem}")
    facts = {"dataset": images.dataset, "n_train_images": len(images), "seed": 0, "epochs": recipe.epochs}
    facts |= {"seconds": round(history.seconds.sum()), "machine": machine(), "torch": str(torch.__version__)}
    if held_out is not None:
        facts["held_out_accuracy"] = round(accuracy(network, held_out), 2)
    save_checkpoint(path, network, facts)
