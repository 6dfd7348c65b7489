"""Predictions of a network on images, and their accuracy."""

import torch
from torch import Tensor

from .data import Images
from .hardware import full_float32
from .model import AnyNetwork


@full_float32()
@torch.inference_mode()
def predict(model: AnyNetwork, images: Images, *, amp: bool = False, role: str = "model") -> Tensor:
    """Logits of shape (N, n_classes), float32 on the CPU, computed in evaluation mode on the device that holds the model.

    `amp` computes in bfloat16, for monitoring a training: reported accuracies are float32's. `role` names the model in error messages.

    Raises
    ------
    ValueError : a model without one output for each class of the images
    """
    modes, images = {module: module.training for module in model.modules()}, images.beside(model)
    model.eval()
    try:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            logits = torch.cat([model(inputs).float() for inputs, _ in images.batches()])
    finally:
        for module, mode in modes.items():
            module.training = mode
    if logits.shape[-1] != len(images.classes):
        expected = f"one for each of the {len(images.classes)} classes of {images.dataset}"
        raise ValueError(f"the {role} has {logits.shape[-1]} outputs, expected {expected}")
    return logits.cpu()


def accuracy(model: AnyNetwork, images: Images, *, amp: bool = False) -> float:
    """Top-1 accuracy in %."""
    return accuracy_of(predict(model, images, amp=amp), images.labels.cpu())


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in % of logits (N, n_classes) for labels (N,)."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def per_class_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy in % of each class, shape (n_classes,); NaN for a class without images."""
    right, counts = labels[logits.argmax(1) == labels], torch.bincount(labels, minlength=logits.shape[1])
    return 100 * torch.bincount(right, minlength=logits.shape[1]) / counts
