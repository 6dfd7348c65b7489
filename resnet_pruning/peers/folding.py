"""Model Folding (Wang et al., ICLR 2025) inside blocks, and GRAIL's ridge (Tang et al., CPAL 2026) to compensate for folding or removal.

Both reduce the channels between the two convolutions of a block. As in GRAIL, the reduction is a matrix R (K, C): row k holds the shares of
the C original channels in channel k of the K remaining ones. Folding averages the channels of a cluster: a row of R has 1/n at the n
members. Removal keeps K channels: a row has a single 1. The next convolution, W (O, C, 3, 3), then becomes W·B. For folding alone, B (C, K)
has a 1 where a channel is a member; for removal alone, where it is the same channel.
"""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import PositiveReal, Seed
from ..clustering import cluster_points
from ..compaction import expanded
from ..data import Images
from ..hardware import full_float32
from ..model import Block, OwnNetwork, ResNet, blocks, convolutions, with_tensors
from ..plans import Plan
from .units import check_inside_blocks, kept_units


def fold_units(model: OwnNetwork, plan: Plan, *, repaired: bool = False, seed: Seed = 0) -> ResNet:
    """A compact network by Model Folding, without data: in each k-means cluster of channels, producers are averaged and consumers summed.

    Channels are compared by all of their parameters: the filter divided by the standard deviation of its output, the weight and the bias of
    its batch norm, and the slice of the next convolution that reads the channel.

    Parameters
    ----------
    plan : number of channels to keep, for first convolutions of blocks
    repaired : as in the paper's *Fold-AR*: the average of n channels varies less than each of them, so batch norm's weight is multiplied by
        √(n / (1 + (n - 1)·ρ)), where ρ is the mean cosine similarity between the members
    seed : of k-means

    Raises
    ------
    ValueError : a plan for other layers
    """
    model = expanded(model)
    reducers = _averages(model, plan, seed)
    gains = {}
    if repaired:
        for name, reducer in reducers.items():
            # The mean of n unit vectors has the squared length (1 + (n - 1)·ρ) / n.
            means = reducer @ F.normalize(_described(blocks(model)[_block(name)]))
            gains[name] = means.norm(dim=1).clamp(min=1e-6).reciprocal()
    return _narrowed(model, reducers, {name: (reducer > 0).double().T for name, reducer in reducers.items()}, gains)


def compensate_units(
    model: OwnNetwork, plan: Plan, images: Images, selection: str = "folding", *, ridge: PositiveReal = 1e-3, seed: Seed = 0
) -> ResNet:
    """A compact network by GRAIL: channels are folded or removed, and a ridge regression adapts the next convolution to the remaining ones.

    Let G (C, C) be the Gram matrix of the activations that the convolution reads in the original network. Then B = G Rᵀ (R G Rᵀ + λ)⁻¹,
    where λ is `ridge` times the mean of the diagonal of R G Rᵀ. As in the authors' code, the remaining channels are taken to be R times the
    activations, although the ReLU of an average is not the average of ReLUs.

    Parameters
    ----------
    plan : number of channels to keep, for first convolutions of blocks
    images : a few hundred training images; labels are not used
    selection : "folding", or one of `UNIT_CRITERIA` for removal
    ridge : 1e-3 in the authors' code
    seed : of k-means, or of random removal

    Raises
    ------
    ValueError : a plan for other layers; an unknown selection
    """
    model = expanded(model)
    if selection == "folding":
        reducers = _averages(model, plan, seed)
    else:
        widths = {name: conv.out_channels for name, conv in convolutions(model).items()}
        kept = kept_units(model, plan, selection, seed=seed)
        reducers = {name: F.one_hot(channels.cpu(), widths[name]).double() for name, channels in kept.items()}
    reads = {}
    for name, gram in gram_matrices(model, list(plan), images).items():
        seen = reducers[name] @ gram
        left = seen @ reducers[name].T
        penalty = ridge * left.diagonal().mean().clamp(min=1e-12) * torch.eye(len(left), dtype=left.dtype)
        reads[name] = torch.linalg.solve(left + penalty, seen).T
    return _narrowed(model, reducers, reads)


@full_float32()
@torch.no_grad()
def gram_matrices(model: OwnNetwork, names: list[str], images: Images) -> dict[str, Tensor]:
    """For first convolutions of blocks, the Gram matrix of the channels that the second ones read, in evaluation mode, summed over images
    and positions: (C, C), float64 on the CPU."""
    model = copy.deepcopy(model).eval()  # hooks and mode are those of the copy
    grams: dict[str, Tensor] = {}

    def observer(name: str) -> Callable[..., None]:
        def observe(layer: torch.nn.Module, inputs: tuple[Tensor]) -> None:
            channels = inputs[0].double().transpose(0, 1).flatten(1)
            grams[name] = grams.get(name, 0) + (channels @ channels.T).cpu()

        return observe

    for name in names:
        blocks(model)[_block(name)].conv2.register_forward_pre_hook(observer(name))
    for inputs, _ in images.beside(model).batches(100):
        model(inputs)
    return grams


def _block(name: str) -> str:
    return name.removesuffix(".conv1")


def _averages(model: ResNet, plan: Plan, seed: Seed) -> dict[str, Tensor]:
    """R of folding, by layer: the mean of each cluster's channels."""
    check_inside_blocks(model, plan)
    reducers = {}
    for name, n_channels in plan.items():
        points = _described(blocks(model)[_block(name)])
        members = F.one_hot(cluster_points(points, min(n_channels, len(points)), torch.ones(len(points)), seed=seed)).double().T
        reducers[name] = members / members.sum(1, keepdim=True)
    return reducers


def _described(block: Block) -> Tensor:
    """The points that k-means clusters, for the channels inside a block: (C, values), float64 on the CPU."""
    slices = block.conv2.weight.detach().double().cpu().transpose(0, 1)
    return torch.cat([values.reshape(len(slices), -1) for values in (*_normalised(block)[:3], slices)], 1)


def _normalised(block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first convolution's filters (C, …) in units of their outputs' standard deviation; and batch norm's weights, biases and means, the
    means in the same units, each (C,)."""
    norm = block.bn1
    values = (block.conv1.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    filters, weight, bias, mean, variance = (tensor.detach().double().cpu() for tensor in values)
    deviation = (variance + norm.eps).sqrt()
    return filters / deviation.view(-1, 1, 1, 1), weight, bias, mean / deviation


def _narrowed(
    model: ResNet, reducers: Mapping[str, Tensor], reads: Mapping[str, Tensor], gains: Mapping[str, Tensor] | None = None
) -> ResNet:
    """The network with R times the channels of each block, second convolutions W·B (B in `reads`), and batch norms' weights times
    `gains`."""
    state, inner = dict(model.state_dict()), dict(model.config["inner_widths"])
    for name, reducer in reducers.items():
        block = blocks(model)[_block(name)]
        filters, weight, bias, mean = _normalised(block)
        kept = {
            "conv1.weight": torch.einsum("kc,cihw->kihw", reducer, filters),
            "conv2.weight": torch.einsum("ochw,ck->okhw", block.conv2.weight.double().cpu(), reads[name]),
            "bn1.weight": reducer @ weight * (gains or {}).get(name, 1.0),
            "bn1.bias": reducer @ bias,
            "bn1.running_mean": reducer @ mean,
            "bn1.running_var": torch.full((len(reducer),), 1.0 - block.bn1.eps),  # the filters are in these units
        }
        state |= {f"{_block(name)}.{key}": value.to(state[f"{_block(name)}.{key}"]) for key, value in kept.items()}
        inner[name] = len(reducer)
    small = with_tensors(model.config | {"inner_widths": inner}, state)
    return small.to(next(model.parameters()).device, memory_format=torch.channels_last)
