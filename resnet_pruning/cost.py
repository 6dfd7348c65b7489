"""What a network costs: parameters, multiply-accumulates, bytes. Time is measured, not counted: see `deployment.timing`."""

import gzip
import io
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .model import batch_norms, convolutions


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


def of_plan(model: nn.Module, plan: Mapping[str, int], merged: bool = False) -> tuple[int, int]:
    """Parameters and MACs of a model whose filters are replaced by this plan, each distinct filter stored and computed once.

    What follows a layer still sees all its channels, so this saves in the layer itself and in no other; unless `merged`, as in
    `compression.compress_by_plan`: then a block has as many channels inside as its ``conv1`` has clusters, which saves in ``conv2`` too.
    """
    convs, norms, macs = convolutions(model), batch_norms(model), macs_by_layer(model)
    shares = {name: Fraction(min(plan.get(name, conv.out_channels), conv.out_channels), conv.out_channels) for name, conv in convs.items()}
    n_parameters, n_macs = parameters(model), sum(macs.values())
    for name, conv in convs.items():
        share = shares[name]
        if merged and name.endswith(".conv1"):
            n_parameters -= round((1 - share) * 2 * norms[name].num_features)
        if merged and name.endswith(".conv2"):
            share *= shares[name.replace("conv2", "conv1")]
        n_parameters -= round((1 - share) * conv.weight.numel())
        n_macs -= round((1 - share) * macs[name])
    return n_parameters, n_macs


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint stores, batch-norm statistics included."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def gzip_bytes(model: nn.Module) -> int:
    """Bytes of the file that holds those tensors, as gzip packs it: zeros take next to none."""
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, buffer)
    return len(gzip.compress(buffer.getvalue()))
