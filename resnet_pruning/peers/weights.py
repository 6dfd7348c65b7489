"""Weight pruning: zeros anywhere, in a network of the same shapes."""

import copy

import torch
from torch import nn
from torch.nn.utils import prune

WEIGHT_CRITERIA = ("per layer", "global", "random")


def prune_weights(model: nn.Module, sparsity: float, criterion: str = "global", *, seed: int = 0) -> nn.Module:
    """A copy in which a share of the weights of all convolutions and linear layers is zero (`torch.nn.utils.prune`).

    Fine-tuning keeps the zeros under `finetuning.masked`.

    Parameters
    ----------
    sparsity : share of the weights, in [0, 1)
    criterion : which ones. "per layer": the smallest of each layer, the same share in all; "global": the smallest of the network (Han et
        al. 2015); "random": the same share of each layer by chance
    seed : of chance

    Raises
    ------
    ValueError : a sparsity outside [0, 1), an unknown criterion
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity!r}, expected a number in [0, 1)")
    if criterion not in WEIGHT_CRITERIA:
        raise ValueError(f"criterion is {criterion!r}, expected one of {', '.join(WEIGHT_CRITERIA)}")
    device = next(model.parameters()).device
    # On the CPU, so that chance is the same everywhere; contiguous because torch ranks weights as one vector, which is a view.
    model = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format)
    layers = [(module, "weight") for module in weighted_layers(model).values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if criterion == "global":
            prune.global_unstructured(layers, prune.L1Unstructured, amount=float(sparsity))
        for layer in layers:
            if criterion == "per layer":
                prune.l1_unstructured(*layer, amount=float(sparsity))
            elif criterion == "random":
                prune.random_unstructured(*layer, amount=float(sparsity))
            prune.remove(*layer)
    return model.to(device)


def weighted_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The convolutions and linear layers by name, front to back."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def sparsity_of(model: nn.Module) -> float:
    """Share of zeros among the weights of convolutions and linear layers."""
    weights = [layer.weight.detach() for layer in weighted_layers(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
