"""Weight pruning: single weights are set to zero, in a network of the same shapes."""

import copy
import gzip
import io

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ..arguments import Real, Seed
from ..clustering import check_unshared
from ..model import Network, convolutions

WEIGHT_CRITERIA = ("per layer", "global", "random")


def prune_weights(model: Network, sparsity: Real, criterion: str = "global", *, seed: Seed = 0) -> nn.Module:
    """A copy in which a share of the weights of all convolutions and linear layers is zero (`torch.nn.utils.prune`).

    `masked` keeps the zeros during fine-tuning.

    Parameters
    ----------
    sparsity : share of the weights, in [0, 1)
    criterion : which weights. "per layer": the smallest of each layer, the same share in all; "global": the smallest of the network (Han et
        al. 2015); "random": the same share of each layer, at random
    seed : of the random choice

    Raises
    ------
    ValueError : a sparsity outside [0, 1); an unknown criterion
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity!r}, expected a number in [0, 1)")
    if criterion not in WEIGHT_CRITERIA:
        raise ValueError(f"criterion is {criterion!r}, expected one of {', '.join(WEIGHT_CRITERIA)}")
    device = next(model.parameters()).device
    # On the CPU, so that random choices are the same everywhere; contiguous, because torch ranks weights as one vector, which is a view.
    model = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format)
    layers = [(module, "weight") for module in weighted_layers(model).values()]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))  # that of a GPU stays as it is
        if criterion == "global":
            prune.global_unstructured(layers, prune.L1Unstructured, amount=float(sparsity))
        for layer in layers:
            if criterion == "per layer":
                prune.l1_unstructured(*layer, amount=float(sparsity))
            elif criterion == "random":
                prune.random_unstructured(*layer, amount=float(sparsity))
            prune.remove(*layer)
    return model.to(device)


class Masked(nn.Module):
    """A weight with some entries that are zero and stay zero during training."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked(model: Network) -> nn.Module:
    """A copy in which zero weights of convolutions and linear layers stay zero during training, for `prune_weights`.

    Raises
    ------
    ValueError : a layer that shares filters
    """
    model = copy.deepcopy(model)
    for name, conv in convolutions(model).items():
        check_unshared(name, conv)
    for layer in weighted_layers(model).values():
        parametrize.register_parametrization(layer, "weight", Masked((layer.weight != 0).detach()))
    return model


def weighted_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The convolutions and linear layers by name, front to back."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def sparsity_of(model: Network) -> float:
    """Share of zeros among the weights of convolutions and linear layers."""
    weights = [layer.weight.detach() for layer in weighted_layers(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def gzip_bytes(model: Network) -> int:
    """Bytes of the file that holds a network's tensors, compressed by gzip: zeros take almost none."""
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, buffer)
    return len(gzip.compress(buffer.getvalue()))
