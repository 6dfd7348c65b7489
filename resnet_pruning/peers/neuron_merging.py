"""Neuron Merging (Kim et al., NeurIPS 2020): a removed unit is added to the most similar kept one."""

import torch
from torch import Tensor, nn

from ..arguments import Real
from ..compaction import compact, expanded
from ..model import OwnNetwork, ResNet, affine, blocks
from ..plans import Plan
from .units import kept_units, mask


def merge_neurons(model: OwnNetwork, plan: Plan, criterion: str = "L1 norm", *, threshold: Real = 0.1, balance: Real = 0.85) -> ResNet:
    """Neuron Merging (Kim et al., NeurIPS 2020), without data: each removed unit is added to the most similar kept one.

    If filter i is s times filter j, batch norm turns its output into S times channel j, plus B. ReLU preserves a positive S, so the slice
    of ``conv2`` that reads i is multiplied by S and added to the slice of j. The most similar channel minimises balance · (cosine distance
    of the filters) + (1 - balance) · (|B| / S, scaled to [0, 1] over the kept channels).

    Parameters
    ----------
    plan, criterion : which units are kept, see `prune_units`
    threshold : cosine similarity of the filters below which a unit is removed without being merged
    balance : λ in the paper. 0.85 and the default threshold are those of its ResNet on CIFAR-10

    Raises
    ------
    ValueError : an unknown criterion; a plan for other layers; a balance outside [0, 1]
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance is {balance!r}, expected a number in [0, 1]")
    model = expanded(model)
    for name, kept in kept_units(model, plan, criterion).items():
        block = blocks(model)[name.removesuffix(".conv1")]
        factors = _factors_of_neurons(block.conv1, block.bn1, kept, threshold, balance)
        with torch.no_grad():
            merged = torch.einsum("oihw,ik->okhw", block.conv2.weight.double().cpu(), factors)
            block.conv2.weight[:, kept] = merged.to(block.conv2.weight)
        mask(model, name, kept)
    return compact(model)


def _factors_of_neurons(conv: nn.Conv2d, norm: nn.BatchNorm2d, kept: Tensor, threshold: Real, balance: Real) -> Tensor:
    """Each channel as a multiple of a kept one: float64 (N, n_kept), with at most one non-zero entry in each row."""
    filters = conv.weight.detach().double().cpu().flatten(1)
    lengths = filters.norm(dim=1)
    directions = filters / lengths.clamp(min=1e-12).unsqueeze(1)
    similarity = directions @ directions[kept].T
    # y_i = s·y_j turns batch norm's factor·y + shift into S·z + B, for z = factor_j·y_j + shift_j.
    factor, shift = affine(norm)
    ratio = (lengths.unsqueeze(1) / lengths[kept].clamp(min=1e-12)) * (factor.unsqueeze(1) / factor[kept])
    offset = (shift.unsqueeze(1) - ratio * shift[kept]).abs() / ratio
    usable = (ratio > 0) & ratio.isfinite()
    lowest = torch.where(usable, offset, torch.inf).amin(1, keepdim=True)
    highest = torch.where(usable, offset, -torch.inf).amax(1, keepdim=True)
    scaled = (offset - lowest) / (highest - lowest).clamp(min=1e-12)
    score = torch.where(usable, balance * (1 - similarity) + (1 - balance) * scaled, torch.inf)
    nearest = score.argmin(1)
    every = torch.arange(len(filters))
    merged = usable[every, nearest] & (similarity[every, nearest] >= threshold)
    factors = torch.zeros(len(filters), len(kept), dtype=torch.double)
    factors[every, nearest] = torch.where(merged, ratio[every, nearest], 0.0)
    factors[kept] = torch.eye(len(kept), dtype=torch.double)
    return factors
