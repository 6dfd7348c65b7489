"""Cluster the filters of one convolution: distances between filters, k-means, and the representatives of clusters.

The *distance* defines which filters are near each other. It maps each filter to a point. The Euclidean distance between points,
which k-means uses, is the distance between filters. The distance also gives each filter a *gain*, the factor between the filter and what
is averaged. A replaced filter is its cluster's representative divided by its own gain. Batch norm absorbs the gain (see
`pruning.replace_filters`), so that each layer has only as many distinct filters as clusters. Only "raw" and "unit" work without
a batch norm. With "unit", each filter then keeps its own length, and the filters of a cluster are equal in direction only.

=============  ==============================================================  =============================
distance       two filters are near when …                                     gain
=============  ==============================================================  =============================
"raw"          their weights are                                               1
"folded"       their weights are, multiplied by batch norm's factor            γ/σ
"unit"         they point the same way; each keeps its length                  1/length
"output"       their outputs are, after batch norm's factor, on the layer's    γ/σ
               actual inputs (second moment of the patches)
"correlation"  their outputs are correlated, with either sign: batch norm's    ±1/standard deviation of
               scale and shift turn one into the other                         the output
=============  ==============================================================  =============================
"""

import dataclasses
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from .arguments import Count, Integer, Real, Seed
from .calibration import LayerStatistics
from .model import FiniteTensor, SharedConv2d, TrainableNetwork, affine, batch_norms, convolutions
from .plans import Plan, check_n_clusters, check_plan

DISTANCES = ("raw", "folded", "unit", "output", "correlation")
REPRESENTATIVES = ("centroid", "medoid")


@dataclasses.dataclass(frozen=True)
class Clusters:
    """The filters of one convolution in k clusters. N is the number of filters; all tensors are on the CPU.

    Attributes
    ----------
    labels : int64 tensor (N,), the cluster of each filter, from 0 to k - 1; every cluster has a member
    centroids : float64 tensor (k, C_in, k_h, k_w), the weighted mean of each cluster's filters, brought to the medoid's scale
    medoids : int64 tensor (k,), the member of each cluster nearest to its centroid, the first of those that are equally near
    gains : float64 tensor (N,), what brings a filter to the scale of its medoid, whose own gain is 1; 0 if its output is zero or unused
    inertia : sum over filters of weight (1 on average) times squared distance to the centroid, in the distance's own unit
    """

    labels: Tensor
    centroids: FiniteTensor
    medoids: Tensor
    gains: FiniteTensor
    inertia: float

    def __len__(self) -> int:
        return len(self.centroids)

    @property
    def sizes(self) -> Tensor:
        """Members of each cluster, shape (k,)."""
        return torch.bincount(self.labels, minlength=len(self))


def cluster_filters(
    conv: nn.Conv2d,
    n_clusters: Integer,
    distance: str = "raw",
    *,
    batch_norm: nn.BatchNorm2d | None = None,
    statistics: LayerStatistics | None = None,
    weighting: Real = 0.0,
    seed: Seed = 0,
    n_init: Count = 10,
    layer: str = "the convolution",
) -> Clusters:
    """Cluster the filters of a convolution with k-means (scikit-learn's, k-means++ starts).

    The order of the filters does not affect the clusters; with "correlation", it affects where k-means starts. If `n_clusters` is at least
    the number of distinct filters, each distinct filter gets its own cluster.

    Parameters
    ----------
    conv : its weight (N, C_in, k_h, k_w) holds the N filters
    n_clusters : number of clusters, at least 1
    distance : one of `DISTANCES`, see the top of this module
    batch_norm : the batch norm after `conv`, required by `weighting` and by all distances except "raw" and "unit"
    statistics : of this layer, from `calibration.layer_statistics`; required by "output", "correlation" and `weighting`
    weighting : with 0, all filters count the same. With 1, each weighs as much as the logits depend on it: k-means then
        minimises their change, to first order and as if the errors of channels were independent. In between, the weights
        are raised to this power: errors are too large for the first order to hold, and 0.5 did best
    seed : of the starts; equal seeds give equal clusters
    n_init : number of starts; the one with the smallest inertia is kept
    layer : the convolution's name, for error messages

    Raises
    ------
    ValueError : `n_clusters` not an integer or below 1; an unknown distance; weights that are not finite; `batch_norm` or
        `statistics` missing where required; `statistics` of another layer; `weighting` outside [0, 1]
    """
    check_n_clusters(n_clusters, "" if layer == "the convolution" else layer)
    weight = conv.weight.detach().double().cpu().flatten(1)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{layer} has {int((~torch.isfinite(weight)).sum())} weights that are NaN or infinite")
    if not 0 <= weighting <= 1:
        raise ValueError(f"weighting is {weighting!r}, expected a number from 0 to 1")
    points, gains, importance = _points(weight, distance, batch_norm, statistics, layer, weighting > 0)

    first, labels = distinct_filters(weight)
    if n_clusters >= len(first):
        return Clusters(labels, weight[first].view(-1, *conv.weight.shape[1:]), first, torch.ones_like(gains), 0.0)

    sample_weights = usable_weights(importance**weighting)
    labels = cluster_points(points, n_clusters, sample_weights, seed=seed, n_init=n_init)
    members, squared = distances_to_centroids(points, labels, sample_weights)
    k = len(members)
    # A filter without a gain is ignored in its cluster, unless no member has one.
    known = (members > 0) & ((gains != 0) | ~((members > 0) & (gains != 0)).any(1, keepdim=True))
    nearness = torch.where(known, squared, torch.inf)
    # Both members of a pair are equally near to their mean: the first is taken, whatever rounding says on this machine.
    medoids = (nearness <= nearness.min(1, keepdim=True).values * (1 + 1e-9)).int().argmax(1)
    if distance == "correlation":
        covariances = (weight @ statistics.covariance * weight[medoids[labels]]).sum(1)
        gains = gains * torch.where(covariances < 0, -1.0, 1.0)
    scale = torch.where(gains[medoids] == 0, 1.0, gains[medoids])
    gains = gains / scale[labels]
    averaged = members * known
    centroids = averaged / averaged.sum(1, keepdim=True) @ (weight * gains.unsqueeze(1))
    return Clusters(labels, centroids.view(k, *conv.weight.shape[1:]), medoids, gains, float((sample_weights * squared).sum()))


def cluster_points(points: Tensor, n_clusters: Integer, weights: Tensor, *, seed: Seed = 0, n_init: Count = 10) -> Tensor:
    """Weighted k-means of points (N, P), float64: labels (N,), counted from 0. The order of the points does not affect the clusters.

    Fewer distinct points than `n_clusters` give fewer clusters.
    """
    order = np.lexsort(points.numpy().T)  # k-means++ draws by position, so the order of the points must not matter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: fewer clusters
        kmeans = KMeans(n_clusters, n_init=n_init, random_state=seed)
        kmeans.fit(points.numpy()[order], sample_weight=weights.numpy()[order])
    labels = torch.empty(len(points), dtype=torch.long)
    labels[torch.from_numpy(order)] = torch.unique(torch.from_numpy(kmeans.labels_).long(), return_inverse=True)[1]
    return labels


def usable_weights(weights: Tensor) -> Tensor:
    """Scale weights (N,) to mean 1. None is 0, because a cluster of zero weights would have no mean. If all were 0, all are 1."""
    return weights / weights.mean() + 1e-9 if weights.sum() > 0 else torch.ones_like(weights)


def distances_to_centroids(points: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of each point in each cluster (k, N), and the squared distance of each point to its cluster's weighted mean (N,)."""
    members = nn.functional.one_hot(labels).T * weights
    centroids = members / members.sum(1, keepdim=True) @ points
    return members, (points - centroids[labels]).square().sum(1)


def cluster_layers(
    model: TrainableNetwork,
    plan: Plan,
    distance: str = "raw",
    *,
    statistics: Mapping[str, LayerStatistics] | None = None,
    weighting: Real = 0.0,
    seed: Seed = 0,
    n_init: Count = 10,
) -> dict[str, Clusters]:
    """`cluster_filters` for each layer of a plan, separately; `statistics` by layer, from `calibration.layer_statistics`.

    Raises
    ------
    ValueError : a plan for another model, a model without convolutions or already compact, and what `cluster_filters` raises
    """
    check_plan(model, plan)
    convs, norms, clusters = convolutions(model), batch_norms(model), {}
    for name, n_clusters in plan.items():
        check_unshared(name, convs[name])
        settings = {"batch_norm": norms.get(name), "statistics": (statistics or {}).get(name), "weighting": weighting, "seed": seed}
        clusters[name] = cluster_filters(convs[name], n_clusters, distance, **settings, n_init=n_init, layer=name)
    return clusters


def check_unshared(name: str, conv: nn.Conv2d) -> None:
    """Raise a ValueError for a convolution of a compact network."""
    if isinstance(conv, SharedConv2d):
        raise ValueError(
            f"{name} computes {conv.out_channels} filters for {len(conv.labels)} channels already: "
            "cluster or constrain the model before it is made compact"
        )


def distinct_filters(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Group equal filters of (N, …): the index of the first filter of each group, in order, and each filter's group number (N,)."""
    _, labels = torch.unique(weight.flatten(1), dim=0, return_inverse=True)
    numbers: dict[int, int] = {}
    numbered = [numbers.setdefault(label, len(numbers)) for label in labels.tolist()]
    return torch.tensor([numbered.index(number) for number in numbers.values()]), torch.tensor(numbered)


def _points(
    weight: Tensor, distance: str, batch_norm: nn.BatchNorm2d | None, statistics: LayerStatistics | None, layer: str, weighted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Points (N, P), gains (N,), and importance (N,): the squared change of the logits per unit squared distance from a point."""
    if distance not in DISTANCES:
        raise ValueError(f"distance is {distance!r}, expected one of {', '.join(DISTANCES)}")
    if (distance not in ("raw", "unit") or weighted) and batch_norm is None:
        raise ValueError(f"{layer} has no batch norm, which distance {distance!r}{', weighted,' if weighted else ''} needs")
    if (distance in ("output", "correlation") or weighted) and statistics is None:
        raise ValueError(f"distance {distance!r}{', weighted,' if weighted else ''} needs statistics: see calibration.layer_statistics")
    if statistics is not None and (len(statistics.mean), len(statistics.importance)) != (weight.shape[1], len(weight)):
        raise ValueError(
            f"statistics are of a layer with {len(statistics.importance)} filters of {len(statistics.mean)} values, "
            f"expected those of {layer}, with {len(weight)} filters of {weight.shape[1]} values"
        )
    ones = torch.ones(len(weight), dtype=torch.double)
    factor = affine(batch_norm)[0] if batch_norm is not None else ones
    if distance == "raw":
        points, gains = weight, ones
    elif distance == "folded":
        points, gains = weight * factor.unsqueeze(1), factor
    elif distance == "unit":
        gains = _inverse(weight.norm(dim=1))
        points = weight * gains.unsqueeze(1)
    elif distance == "output":
        points, gains = weight * factor.unsqueeze(1) @ _root(statistics.second_moment), factor
    else:
        outputs = weight @ _root(statistics.covariance)  # centred: inner products of its rows are the covariances of outputs
        gains = _inverse(outputs.norm(dim=1))
        correlations = (outputs @ outputs.T) * torch.outer(gains, gains)
        # Points whose inner products are the squared correlations: their squared distance is 2 - 2 times that.
        points = _root(correlations.square())
    importance = ones
    if weighted:
        importance = statistics.importance * (factor * _inverse(gains)).square()
    return points, gains, importance


def _inverse(values: Tensor) -> Tensor:
    """1/x, and 0 for 0."""
    return torch.where(values == 0, 0.0, 1 / values)


def _root(moment: Tensor) -> Tensor:
    """R with R Rᵀ = moment, which may be singular: some inputs are always zero."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=0).sqrt()
