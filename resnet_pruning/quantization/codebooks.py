"""Codebooks: pieces of the convolutions' weights are clustered, and each piece is stored as the number of its representative.

A piece is a filter, a kernel of 3×3, a row of a kernel, or a single weight; a codebook serves a layer, a stage or the network. Each
filter has a scale, by which its pieces are divided before they are compared (Han et al., *Deep Compression*, ICLR 2016, for weights; Gong
et al., *Compressing Deep Convolutional Networks using Vector Quantization*, 2014, for vectors). The first and the last layer have 8 bits.
The result is trained like any other network, while pieces keep their representatives, whose gradients are the sums of their members'::

    coded = quantization.coded(network, 64, pieces="kernel", scope="network")
    train(coded, images, recipe, teacher=network)
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..arguments import Count, Integer, Seed
from ..calibration import LayerStatistics
from ..clustering import cluster_points, usable_weights
from ..model import OwnNetwork, convolutions
from .learned_steps import LearnedSteps
from .quantized_model import ENDS

PIECES = ("filter", "kernel", "row", "weight")
SCOPES = ("layer", "stage", "network")


class Codebook(nn.Module):
    """Representatives (k, P), shared by the layers of a scope."""

    def __init__(self, representatives: Tensor):
        super().__init__()
        self.representatives = nn.Parameter(representatives)


class Coded(nn.Module):
    """A weight (N, …) whose pieces are representatives, times a scale for each filter."""

    def __init__(self, codebook: Codebook, labels: Tensor, scale: Tensor):
        super().__init__()
        self.codebook = codebook
        self.register_buffer("labels", labels)
        self.scale = nn.Parameter(scale)

    def extra_repr(self) -> str:  # a training is known by what is printed of its network, see `training.train`
        return f"{len(self.labels)} pieces of {self.codebook.representatives.shape[1]} weights"

    def forward(self, weight: Tensor) -> Tensor:
        pieces = self.codebook.representatives[self.labels]
        return pieces.view(weight.shape) * self.scale.view(-1, *[1] * (weight.ndim - 1))


@torch.no_grad()
def coded(
    model: OwnNetwork,
    n_representatives: Count,
    *,
    pieces: str = "kernel",
    scope: str = "network",
    statistics: Mapping[str, LayerStatistics] | None = None,
    seed: Seed = 0,
) -> nn.Module:
    """A copy of `model` whose weights are put together from representatives, ready to be trained by `training.train`.

    Parameters
    ----------
    n_representatives : in each codebook
    pieces : one of `PIECES`
    scope : one of `SCOPES`: how many layers share a codebook. Filters of other lengths are never in one
    statistics : from `calibration.layer_statistics`; with them, k-means weights a piece by what its error costs the logits: how much they
        depend on the filter's output, times the mean square of what the piece is multiplied by
    seed : of k-means

    Raises
    ------
    ValueError : an unknown piece or scope, more representatives than pieces
    """
    if pieces not in PIECES:
        raise ValueError(f"pieces is {pieces!r}, expected one of {', '.join(PIECES)}")
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}, expected one of {', '.join(SCOPES)}")
    model = copy.deepcopy(model)
    groups: dict[tuple, list[str]] = {}
    layers = convolutions(model)
    for name, conv in layers.items():
        if name not in ENDS:
            length = {"filter": conv.weight[0].numel(), "kernel": 9, "row": 3, "weight": 1}[pieces]
            place = {"layer": name, "stage": name.split(".")[0], "network": ""}[scope]
            groups.setdefault((place, length), []).append(name)
    for (_, length), names in groups.items():
        weights = {name: layers[name].weight.flatten(1).double().cpu() for name in names}
        scales = {name: weight.square().mean(1).sqrt().clamp(min=1e-12) for name, weight in weights.items()}
        points = {name: (weight / scales[name].unsqueeze(1)).reshape(-1, length) for name, weight in weights.items()}
        costs = {name: _costs(statistics, name, scales[name], len(points[name])) for name in names}
        labels, centres = _clustered(torch.cat([*points.values()]), torch.cat([*costs.values()]), n_representatives, seed)
        codebook = Codebook(centres.float())
        for name, part in zip(names, labels.split([len(own) for own in points.values()]), strict=True):
            code = Coded(codebook, part, scales[name].float()).to(layers[name].weight.device)
            parametrize.register_parametrization(layers[name], "weight", code, unsafe=True)
            layers[name].parametrizations.weight.original.requires_grad_(False)
    for name in ENDS:
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", LearnedSteps(layer.weight, 8).to(layer.weight.device), unsafe=True)
    return model


def _costs(statistics: Mapping[str, LayerStatistics] | None, name: str, scale: Tensor, n_pieces: Integer) -> Tensor:
    """What the squared error of each piece, in units of its filter's scale, costs: (pieces,), float64."""
    of_filters, n_each = scale.square(), n_pieces // len(scale)
    if statistics is None:
        return of_filters.repeat_interleave(n_each)
    squares = statistics[name].second_moment.diagonal().double().view(n_each, -1).mean(1)  # of what each piece is multiplied by
    return torch.outer(of_filters * statistics[name].importance.double(), squares).flatten()


def _clustered(points: Tensor, costs: Tensor, n_clusters: Integer, seed: Seed) -> tuple[Tensor, Tensor]:
    """The cluster of each point (N, P), and the clusters' weighted means (k, P)."""
    if n_clusters > len(points):
        raise ValueError(f"n_representatives is {n_clusters}, expected at most the number of pieces, {len(points)}")
    weights = usable_weights(costs)
    labels = cluster_points(points, n_clusters, weights, seed=seed, n_init=1)
    zeros = torch.zeros(int(labels.max()) + 1, points.shape[1], dtype=points.dtype)
    sums = zeros.index_add(0, labels, points * weights.unsqueeze(1))
    return labels, sums / zeros[:, :1].index_add(0, labels, weights.unsqueeze(1))
