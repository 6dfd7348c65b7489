"""What a network costs: parameters, multiply-accumulates, bytes."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of the convolutions and the linear layer for one 32×32 image."""
    training, device = model.training, next(model.parameters()).device
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32, device=device))
    model.train(training)
    return counter.get_total_flops() // 2  # it counts a multiply-accumulate as two operations


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint stores, batch-norm statistics included."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
