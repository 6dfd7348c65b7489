"""Replace filters by the representative of their cluster."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .arguments import Count, Real, Seed
from .calibration import LayerStatistics, reestimate_batch_norm
from .clustering import REPRESENTATIVES, Clusters, check_unshared, cluster_layers
from .data import Images
from .model import Network, SharedConv2d, batch_norms, blocks, convolutions
from .plans import Plan


def replace_filters(
    model: Network,
    plan: Plan,
    representative: str = "centroid",
    *,
    distance: str = "raw",
    weighting: Real = 0.0,
    mergeable: bool = False,
    statistics: Mapping[str, LayerStatistics] | None = None,
    batch_norm_images: Images | None = None,
    seed: Seed = 0,
    n_init: Count = 10,
) -> nn.Module:
    """A new model of the same shapes, in which each filter equals the representative of its cluster.

    Each layer that `plan` names is clustered separately and gets at most the planned number of distinct filters. The filters
    of a cluster are equal tensors. If the distance lets them differ by a factor, the batch norm that follows absorbs it. A
    layer with no more distinct filters than planned clusters stays as it is, bit for bit.

    Parameters
    ----------
    model : with convolutions and batch norms named as in torchvision's ResNets; it is not changed
    plan : clusters per layer, by name: see `plans`
    representative : "centroid", the mean of a cluster's filters, or "medoid", the member nearest to the centroid
    distance, weighting, statistics, seed, n_init : of the clustering, see `clustering.cluster_filters`
    mergeable : in the first convolutions of blocks, make the batch norms of a cluster's channels differ by a factor only.
        `compaction.compact` can then merge these channels, instead of only computing their filter once
    batch_norm_images : training images to re-estimate the statistics of all batch norms from; labels are not used. Without
        them, the statistics stay those of the original model

    Raises
    ------
    ValueError : an unknown representative, and what `clustering.cluster_layers` raises
    """
    clusters = cluster_layers(model, plan, distance, statistics=statistics, weighting=weighting, seed=seed, n_init=n_init)
    replaced = replace_by_clusters(model, clusters, representative)
    if mergeable:
        for name, block in blocks(replaced).items():
            if f"{name}.conv1" in clusters:
                _align(block.bn1, clusters[f"{name}.conv1"].labels)
    return replaced if batch_norm_images is None else reestimate_batch_norm(replaced, batch_norm_images)


def replace_by_clusters(model: Network, clusters: Mapping[str, Clusters], representative: str = "centroid") -> nn.Module:
    """`replace_filters` for clusters that are already known, from `clustering.cluster_layers` for this model.

    Raises
    ------
    ValueError : an unknown representative, clusters of another model
    """
    if representative not in REPRESENTATIVES:
        raise ValueError(f"representative is {representative!r}, expected one of {', '.join(REPRESENTATIVES)}")
    check_clusters(model, clusters)
    model = copy.deepcopy(model)
    convs, norms = convolutions(model), batch_norms(model)
    for name, layer in clusters.items():
        conv = convs[name]
        representatives = layer.centroids if representative == "centroid" else conv.weight.detach()[layer.medoids]
        with torch.no_grad():
            filters = representatives[layer.labels]
            if name not in norms:  # each filter keeps its own length
                filters = filters * torch.where(layer.gains == 0, 0.0, 1 / layer.gains).view(-1, 1, 1, 1).to(filters)
            elif (layer.gains != 1).any():
                _take_up(norms[name], layer.gains, conv.bias)
            conv.weight.copy_(filters)
    return model


def rescale_by_gains(model: Network, clusters: Mapping[str, Clusters]) -> nn.Module:
    """A copy that computes the same function, with each filter at its cluster's scale: times its gain, which batch norm absorbs.

    A filter without a gain, whose output carries no information, becomes its cluster's centroid, so that it changes no mean. Raises a
    ValueError for clusters of another model, and for gains other than 1 in a layer without a batch norm.
    """
    check_clusters(model, clusters)
    model = copy.deepcopy(model)
    convs, norms = convolutions(model), batch_norms(model)
    for name, layer in clusters.items():
        if (layer.gains != 1).any():
            if name not in norms:
                raise ValueError(f"{name} has no batch norm, expected one that absorbs its filters' lengths: cluster by distance 'raw'")
            rescale_filters(convs[name], norms[name], layer.gains)
            with torch.no_grad():
                dead = layer.gains == 0
                convs[name].weight[dead] = layer.centroids[layer.labels[dead]].to(convs[name].weight)
    return model


def check_clusters(model: nn.Module, clusters: Mapping[str, Clusters]) -> None:
    """Raise a ValueError that names the problem for clusters of another model, or of a compact one."""
    convs = convolutions(model)
    for name, layer in clusters.items():
        if name not in convs:
            raise ValueError(f"clusters has {name!r}, expected convolutions of the model: {', '.join(convs)}")
        check_unshared(name, convs[name])
        found, expected = (len(layer.labels), *layer.centroids.shape[1:]), tuple(convs[name].weight.shape)
        if found != expected:
            raise ValueError(f"clusters of {name} are of filters of the shape {found}, expected {expected}, as its own")
        if (numbers := layer.labels.unique().tolist()) != list(range(len(layer))):
            raise ValueError(f"labels of {name} are {numbers}, expected each of its {len(layer)} clusters, counted from 0")


@torch.no_grad()
def rescale_filters(conv: nn.Conv2d, norm: nn.BatchNorm2d, gains: Tensor) -> None:
    """Multiply the filters of a convolution by `gains` (N,), which the batch norm after it absorbs, also where channels share filters."""
    conv.weight.copy_(conv.weight.double() * gains.to(conv.weight.device).view(-1, 1, 1, 1))
    _take_up(norm, gains[conv.labels.to(gains.device)] if isinstance(conv, SharedConv2d) else gains, conv.bias)


def _take_up(norm: nn.BatchNorm2d, gains: Tensor, bias: Tensor | None) -> None:
    """Make `norm` undo the multiplication of the filters before it by `gains`. The convolution's `bias` was not multiplied.

    With w·g in place of w, mean and standard deviation are multiplied by g, and the factor γ/σ must be divided by g. A
    channel with gain 0 becomes the constant that a zero filter gave.
    """
    gains = gains.to(norm.weight.device)
    mean, variance, weight, shift = (t.double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    bias = torch.zeros_like(mean) if bias is None else bias.double()
    deviation = (variance + norm.eps).sqrt()
    dead = gains == 0
    safe = torch.where(dead, 1.0, gains)
    norm.running_mean.copy_(torch.where(dead, mean, bias + safe * (mean - bias)))
    norm.running_var.copy_(variance * safe.square())
    norm.weight.copy_(torch.where(dead, 0.0, weight / safe * (variance * safe.square() + norm.eps).sqrt() / deviation))
    norm.bias.copy_(torch.where(dead, shift + weight * (bias - mean) / deviation, shift))


@torch.no_grad()
def _align(norm: nn.BatchNorm2d, labels: Tensor) -> None:
    """Give channels with the same label and the same sign of γ the same statistics and the same β/γ, their means weighted by γ².
    Their outputs after ReLU then differ by a positive factor only, whatever statistics are estimated later."""
    sign = norm.weight.sign()
    for cluster in labels.unique():
        for direction in (-1, 1):
            members = (labels.to(sign.device) == cluster) & (sign == direction)
            if members.sum() < 2:
                continue
            weight = norm.weight[members].double()
            shares = weight.square() / weight.square().sum()
            for statistic in (norm.running_mean, norm.running_var):
                statistic[members] = (shares * statistic[members].double()).sum().float()
            norm.bias[members] = (weight * (shares * norm.bias[members] / weight).sum()).float()
