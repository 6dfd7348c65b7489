"""Make a network with replaced filters smaller without changing the function that it computes."""

import torch
from torch import Tensor, nn

from .arguments import PositiveReal, Real
from .clustering import distinct_filters
from .model import OwnNetwork, ResNet, SharedConv2d, blocks, check_described, convolutions, with_tensors


def compact(model: OwnNetwork, tolerance: PositiveReal = 1e-6) -> ResNet:
    """The smallest `ResNet` that computes the same function as `model`, up to float32 rounding, by two exact steps.

    Inside each block, between its two convolutions, channels that are positive multiples of each other on any input are
    merged. One is kept. The slices of ``conv2`` that read the others are added to its slice, times their factors. Such
    channels have equal filters, and batch norms that differ only by a positive factor (ReLU(a·x) = a·ReLU(x)), or are constant.
    Channels that are zero on any input are dropped, but for one where all are.

    Some channels have equal filters but cannot be merged: they are on the residual stream, or their batch norms differ. Their
    distinct filters are computed once and the outputs copied: see `model.SharedConv2d`.

    The result is an ordinary model, trained, saved and loaded like any other. Compacting it again changes nothing.

    Parameters
    ----------
    model : filters to be merged must be equal, bit for bit, as `pruning.replace_filters` makes them
    tolerance : how far the thresholds of merged channels may differ by rounding, relative to standard deviation plus threshold
    """
    whole = expanded(model).cpu()  # channels are compared one by one, and each comparison would wait for a GPU
    state = dict(whole.state_dict())
    inner_widths, sharing = {}, {}
    for block, module in blocks(whole).items():
        if module.dropped:
            inner_widths[f"{block}.conv1"] = 0
            continue
        kept, mixture = _multiples(state[f"{block}.conv1.weight"], module.bn1, tolerance)
        following = state[f"{block}.conv2.weight"]
        merged = torch.einsum("oihw,ki->okhw", following.double(), mixture)
        state[f"{block}.conv2.weight"] = merged.to(following.dtype)
        for part in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
            state[f"{block}.{part}"] = state[f"{block}.{part}"][kept]
        if len(kept) != module.bn2.num_features:
            inner_widths[f"{block}.conv1"] = len(kept)
    for name in convolutions(whole):
        distinct, labels = distinct_filters(state[f"{name}.weight"])
        if len(distinct) < len(labels):
            state[f"{name}.weight"] = state[f"{name}.weight"][distinct]
            sharing[name] = labels.tolist()
    small = with_tensors(model.config | {"inner_widths": inner_widths, "sharing": sharing}, state)
    return small.to(next(model.parameters()).device).train(model.training)


def expanded(model: OwnNetwork) -> ResNet:
    """A copy of `model` in which each channel has its own filter: filters that `compact` shared are copied out, bit for bit."""
    check_described(model)
    state = dict(model.state_dict())
    for name, conv in convolutions(model).items():
        if isinstance(conv, SharedConv2d):
            state[f"{name}.weight"] = state[f"{name}.weight"][conv.labels]
    full = with_tensors(model.config | {"sharing": {}}, state)
    return full.to(next(model.parameters()).device, memory_format=torch.channels_last).train(model.training)


def _multiples(weight: Tensor, norm: nn.BatchNorm2d, tolerance: Real) -> tuple[list[int], Tensor]:
    """Channels to keep, and the matrix (kept, N) that expresses each channel as a multiple of a kept one, after batch norm and ReLU.

    An output is ReLU(s·(y - t)) of a filter's output y. With equal filters, equal t, and s of one sign, they are multiples of each other.
    """
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    slope = norm.weight.detach().double() / deviation
    constant = (slope == 0) | ~weight.flatten(1).any(1)  # all of these are multiples of each other
    shift = norm.bias.detach().double() - slope * norm.running_mean.double()
    threshold = torch.where(constant, 0.0, -shift / torch.where(constant, 1.0, slope))
    kinds = torch.stack([torch.where(constant, -1, distinct_filters(weight)[1]), torch.where(constant, 0.0, slope.sign()).long()], 1)
    close = (threshold.unsqueeze(1) - threshold).abs() <= tolerance * (deviation + threshold.abs()).unsqueeze(1)
    alike = (kinds.unsqueeze(1) == kinds).all(2) & close
    size, kept = torch.where(constant, shift, slope), []
    factors = torch.zeros(len(weight), len(weight), dtype=torch.double)
    for i in torch.nonzero(~constant | (shift > 0)).flatten().tolist():  # the others are zero on any input
        j = next((j for j in kept if alike[i, j]), i)
        kept += [i] if i == j else []
        factors[i, j] = size[i] / size[j]
    kept = kept or [0]  # a layer that is zero throughout keeps one channel
    return kept, factors[:, kept].T
