"""What a network costs: parameters, multiply-accumulates, bytes."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .model import convolutions


def parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of the convolutions and the linear layer for one 32×32 image."""
    return sum(macs_by_layer(model).values())


def macs_by_layer(model: nn.Module) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer for one 32×32 image, by name, front to back."""
    training, device = model.training, next(model.parameters()).device
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32, device=device))
    model.train(training)
    # The counter names a layer Class.name, and counts a multiply-accumulate as two operations.
    counts = {name.partition(".")[2]: sum(by_operator.values()) // 2 for name, by_operator in counter.get_flop_counts().items()}
    return {name: counts[name] for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def of_plan(model: nn.Module, plan: Mapping[str, int]) -> tuple[int, int]:
    """Parameters and MACs of a model whose filters are replaced by this plan, each distinct filter stored and computed once.

    What follows a layer still sees all its channels, so this saves in the layer itself and in no other.
    """
    convs, macs = convolutions(model), macs_by_layer(model)
    saved = {name: 1 - min(n_clusters / convs[name].out_channels, 1) for name, n_clusters in plan.items()}
    return (
        parameters(model) - round(sum(saved[name] * convs[name].weight.numel() for name in plan)),
        sum(macs.values()) - round(sum(saved[name] * macs[name] for name in plan)),
    )


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint stores, batch-norm statistics included."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
