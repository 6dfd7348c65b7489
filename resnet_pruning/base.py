"""The trained network that the notebooks on pruning start from."""

from pathlib import Path

import torch

from .data import load
from .files import ROOT, results_folder
from .hardware import default_device
from .model import ResNet, save_checkpoint
from .training import Recipe, train


def base_checkpoint(dataset: str, profile: str) -> Path:
    """Path of the checkpoint: for CIFAR-10 the committed one, for digits that of notebook 01, or else one trained here in seconds."""
    if dataset == "cifar10":
        return ROOT / "checkpoints" / "resnet20.pt"
    path = results_folder(dataset, profile) / "checkpoints" / "resnet20.pt"
    if not path.exists():
        images, _ = load(dataset, device=default_device())
        torch.manual_seed(0)
        network = ResNet(depth=20, n_classes=len(images.classes))
        train(network, images, Recipe(epochs=4, warmup_epochs=1, small_epochs=1, ema=0.9, batch_size=64), compile=False)
        save_checkpoint(path, network, {"dataset": dataset, "n_train_images": len(images), "seed": 0})
    return path
