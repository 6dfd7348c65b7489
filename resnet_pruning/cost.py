"""The cost of a network: parameters, multiply-accumulates, bytes. Time is measured, not counted: see `deployment.timing`."""

import copy
import math

import torch
from torch import Tensor, nn

from .model import AnyNetwork


def parameters(model: AnyNetwork) -> int:
    """Number of the parameters' values, frozen ones too. Of a quantized network: integers, scales, biases, factors and levels."""
    quantized = ("codes", "scale", "bias", "factor", "levels")
    values = list(model.parameters()) or [t for name, t in model.named_buffers() if name.rpartition(".")[2] in quantized]
    return sum(value.numel() for value in values)


def macs(model: AnyNetwork) -> int:
    """Multiply-accumulates of the convolutions and the linear layer for one image of 32×32 pixels."""
    return sum(macs_by_layer(model).values())


def macs_by_layer(model: AnyNetwork) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer, quantized or not, for one image, by name, front to back."""
    counts: dict[str, int] = {}

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        # Each weight is used once per position. Where filters are shared, copying an output takes no multiplication.
        counts[names[layer]] = counts.get(names[layer], 0) + layer.weight.numel() * math.prod(output.shape[2:])

    model = copy.deepcopy(model).eval()  # the hooks must not be called, or copied, by other threads that use the network
    names = {module: name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1}
    for layer in names:
        layer.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32, device=next(iter(model.state_dict().values())).device))
    return counts


def size_in_bytes(model: AnyNetwork) -> int:
    """Bytes of all tensors that a checkpoint stores, including batch-norm statistics. A quantized network reports its own."""
    if hasattr(model, "stored_bytes"):
        return model.stored_bytes()
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
