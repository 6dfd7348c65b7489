"""What a network costs: parameters, multiply-accumulates, bytes. Time is measured, not counted: see `deployment.timing`."""

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn

from .arguments import Count, Integer
from .model import AnyNetwork, batch_norms, convolutions


def parameters(model: AnyNetwork) -> int:
    """Number of trainable values; of a quantized network, which has none, that of its integers, scales and biases."""
    quantized = ("codes", "scale", "bias", "factor", "levels")
    values = list(model.parameters()) or [t for name, t in model.named_buffers() if name.rpartition(".")[2] in quantized]
    return sum(value.numel() for value in values)


def macs(model: AnyNetwork, image_size: Count = 32) -> int:
    """Multiply-accumulates of the convolutions and the linear layer for one image of `image_size` × `image_size` pixels."""
    return sum(macs_by_layer(model, image_size).values())


def macs_by_layer(model: AnyNetwork, image_size: Count = 32) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer, quantized or not, for one image, by name, front to back."""
    counts: dict[str, int] = {}

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        # Each weight is used once for each position; where filters are shared, the copies of an output take none.
        counts[names[layer]] = layer.weight.numel() * math.prod(output.shape[2:])

    names = {module: name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1}
    hooks = [layer.register_forward_hook(count) for layer in names]
    training, device = model.training, next(iter(model.state_dict().values())).device
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return counts


def of_plan(
    model: AnyNetwork, plan: Mapping[str, Integer], merged: bool = False, macs: Mapping[str, Integer] | None = None
) -> tuple[int, int]:
    """Parameters and MACs of a model whose filters are replaced by this plan, each distinct filter stored and computed once.

    What follows a layer still sees all its channels, so this saves in the layer itself and in no other; unless `merged`, as in
    `compression.compress_by_plan`: then a block has as many channels inside as its ``conv1`` has clusters, which saves in ``conv2`` too.
    For many plans of one model, `macs` are its `macs_by_layer`, counted once.
    """
    convs, norms, macs = convolutions(model), batch_norms(model), macs or macs_by_layer(model)
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


def size_in_bytes(model: AnyNetwork) -> int:
    """Bytes of all tensors that a checkpoint stores, batch-norm statistics included; a quantized network knows its own."""
    if hasattr(model, "stored_bytes"):
        return model.stored_bytes()
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
