"""Codebooks: pieces of the convolutions' weights are clustered, and each piece is stored as the number of its representative.

A piece is a filter, a pair of kernels, a 3×3 kernel, a row of a kernel, or a single weight. A codebook serves a layer, a stage or the
network. Each filter has a scale, by which its pieces are divided before they are compared (Han et al., *Deep Compression*, ICLR 2016, for
weights; Gong et al., *Compressing Deep Convolutional Networks using Vector Quantization*, 2014, for vectors). The first and the last layer
have 8 bits. Errors can be weighted by how much they change the logits, and bits of the indices can be counted as well as errors (Chou,
Lookabaugh and Gray, *Entropy-Constrained Vector Quantization*, 1989): frequent representatives have shorter indices.

The result is trained like any other network. Representatives get the sum of the gradients of their members. Pieces keep their
representatives, or move to the nearest ones from time to time::

    coded = quantization.coded(network, 64, pieces="kernel", scope="network")
    train(coded, images, recipe, teacher=network)
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..arguments import Count, Integer, Natural, Real, Seed
from ..calibration import LayerStatistics
from ..clustering import cluster_points, usable_weights
from ..compression.parts import check_statistics
from ..model import OwnNetwork, SharedConv2d, affine, batch_norms, convolutions
from .learned_steps import LearnedSteps
from .quantized_model import ENDS, per_filter

LENGTHS = {"filter": 0, "pair of kernels": 18, "kernel": 9, "row": 3, "weight": 1}  # in weights; 0: a filter's length depends on its layer
PIECES = tuple(LENGTHS)
SCOPES = ("layer", "stage", "network")
REPRESENTATIVES = ("k-means", "random")


class Codebook(nn.Module):
    """Representatives (k, P), shared by the layers of a scope, and the bits (k,) that their indices have in an ideal code."""

    def __init__(self, representatives: Tensor, bits: Tensor):
        super().__init__()
        self.representatives = nn.Parameter(representatives)
        self.register_buffer("bits", bits)


class Coded(nn.Module):
    """A weight (N, …) whose pieces are representatives, times a scale for each filter.

    If assignments are renewed, the weight is trained with the gradient of its coded value. In the first forward pass in training mode, and
    in every `renew_every`-th one after it, each piece moves to the representative that costs least. With 0, assignments are fixed.
    A bit of an index counts as much as a squared error of `price` (n,), one for each piece, in units of its filter's squared scale.
    """

    def __init__(self, codebook: Codebook, labels: Tensor, scale: Tensor, price: Tensor, renew_every: Integer = 0):
        super().__init__()
        self.codebook = codebook
        self.renew_every = renew_every
        self.register_buffer("labels", labels)
        self.register_buffer("n_passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("price", price)
        self.register_buffer("scale", scale)  # not trained: the batch norm after it has a factor for each filter

    def extra_repr(self) -> str:  # part of the network's repr, by which `training.train` recognises a training
        return f"{len(self.labels)} pieces of {self.codebook.representatives.shape[1]} weights, renew_every={self.renew_every}"

    def forward(self, weight: Tensor) -> Tensor:
        labels = self.labels
        if self.training and self.renew_every:
            self.n_passes.add_(1)
            due = self.n_passes % self.renew_every == 1 % self.renew_every  # a choice between tensors, as in `finetuning.Projected`
            labels = torch.where(due, self._assigned(weight.detach()), self.labels)
            self.labels.copy_(labels)
        pieces = self.codebook.representatives[labels]
        value = pieces.view(weight.shape) * per_filter(self.scale, weight)
        return value + (weight - weight.detach()) if self.renew_every else value

    def _assigned(self, weight: Tensor) -> Tensor:
        """For each piece, the representative that costs least: the nearest one if bits cost nothing."""
        with torch.autocast(weight.device.type, enabled=False):
            points = (weight / per_filter(self.scale, weight)).reshape(len(self.labels), -1)
            return _cheapest(points, self.codebook.representatives.detach(), self.price, self.codebook.bits)


@torch.no_grad()
def coded(
    model: OwnNetwork,
    n_representatives: Count,
    *,
    pieces: str = "kernel",
    scope: str = "network",
    representatives: str = "k-means",
    statistics: Mapping[str, LayerStatistics] | None = None,
    weighting: Real = 0.0,
    bit_cost: Real = 0.0,
    renew_every: Natural = 0,
    seed: Seed = 0,
) -> nn.Module:
    """A copy of `model` whose weights are composed of representatives, ready to be trained by `training.train`.

    Parameters
    ----------
    n_representatives : number of representatives in each codebook
    pieces : one of `PIECES`
    scope : one of `SCOPES`: which layers share a codebook. Filters of different lengths never share one
    representatives : "k-means", or "random": pieces drawn at random, as a control
    statistics : from `calibration.layer_statistics`, required by `weighting`
    weighting : of k-means. With 0, an error counts the same in all weights. With 1, it counts as much as it changes the logits, to first
        order and as if the errors of weights were independent. In between, this cost is raised to that power; 0.5 suits `bit_cost` better
    bit_cost : what a bit of an index costs in k-means, and when assignments are renewed, in units of what a squared error as large as a
        filter's mean square weight costs on average. Above 0, files are smaller, and representatives that no piece needs are dropped
    renew_every : training steps between two assignments of pieces to representatives; 0 keeps the first assignment
    seed : of k-means, or of the random pieces

    Raises
    ------
    ValueError : an unknown piece, scope or kind of representatives; pieces that do not divide a filter; more representatives than pieces;
        `weighting` outside [0, 1], without statistics of this network, or of pieces that are drawn at random; `bit_cost` below 0, or of
        such pieces
    """
    if pieces not in PIECES:
        raise ValueError(f"pieces is {pieces!r}, expected one of {', '.join(PIECES)}")
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}, expected one of {', '.join(SCOPES)}")
    if representatives not in REPRESENTATIVES:
        raise ValueError(f"representatives is {representatives!r}, expected one of {', '.join(REPRESENTATIVES)}")
    if not 0 <= weighting <= 1:
        raise ValueError(f"weighting is {weighting!r}, expected a number from 0 to 1")
    if not 0 <= bit_cost < math.inf:
        raise ValueError(f"bit_cost is {bit_cost!r}, expected a finite number of at least 0")
    for name, value in {"weighting": weighting, "bit_cost": bit_cost}.items():
        if value and representatives != "k-means":
            raise ValueError(f"{name} is {value!r}, expected 0 for representatives that are drawn at random")
    if weighting and statistics is None:
        raise ValueError(f"weighting is {weighting!r}, which requires statistics: see calibration.layer_statistics")
    if statistics is not None:
        check_statistics(statistics, model)
    model, renew_every = copy.deepcopy(model), int(renew_every)
    layers, norms, layout = convolutions(model), batch_norms(model), groups(model, pieces, scope)
    scales, points, costs = {}, {}, {}  # of each filter; of each piece, with the cost of its squared error in units of its filter's scale
    for (_, length), names in layout.items():
        for name in names:
            weight = layers[name].weight.flatten(1).double().cpu()
            scales[name] = weight.square().mean(1).sqrt().clamp(min=1e-12)
            points[name] = (weight / scales[name].unsqueeze(1)).reshape(-1, length)
            costs[name] = scales[name].square().repeat_interleave(len(points[name]) // len(weight))
            if weighting:
                costs[name] *= _cost_to_logits(layers[name], norms[name], statistics[name], length) ** weighting
    costs = dict(zip(costs, usable_weights(torch.cat([*costs.values()])).split([len(own) for own in costs.values()]), strict=True))
    for names in layout.values():
        everything, weights = (torch.cat([parts[name] for name in names]) for parts in (points, costs))
        if n_representatives > len(everything):
            raise ValueError(f"n_representatives is {n_representatives}, expected at most the number of pieces, {len(everything)}")
        if representatives == "k-means":
            labels, centres = _clustered(everything, weights, n_representatives, bit_cost, seed)
        else:
            labels, centres = _drawn(everything, n_representatives, seed)
        codebook = Codebook(centres.float(), _bits(labels, len(centres)).float())
        for name, own in zip(names, labels.split([len(points[name]) for name in names]), strict=True):
            code = Coded(codebook, own, scales[name].float(), (bit_cost / costs[name]).float(), renew_every)
            parametrize.register_parametrization(layers[name], "weight", code.to(layers[name].weight.device), unsafe=True)
            layers[name].parametrizations.weight.original.requires_grad_(renew_every > 0)
    for name in ENDS:
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", LearnedSteps(layer.weight, 8).to(layer.weight.device), unsafe=True)
    model.coding = {"pieces": pieces, "scope": scope}  # for `save_coded`
    return model


def groups(model: nn.Module, pieces: str, scope: str) -> dict[tuple[str, int], list[str]]:
    """The layers that share a codebook, front to back, by its place in the network and the length of its representatives.

    Raises
    ------
    ValueError : pieces that do not divide a filter
    """
    found: dict[tuple[str, int], list[str]] = {}
    for name, conv in convolutions(model).items():
        if name not in ENDS:
            n_weights = conv.in_channels * 9
            length = LENGTHS[pieces] or n_weights
            if n_weights % length:
                raise ValueError(f"pieces is {pieces!r}, of {length} weights, expected a divisor of the {n_weights} of a filter of {name}")
            found.setdefault(({"layer": name, "stage": name.split(".")[0], "network": ""}[scope], length), []).append(name)
    return found


def _cost_to_logits(conv: nn.Conv2d, norm: nn.BatchNorm2d, statistics: LayerStatistics, length: Integer) -> Tensor:
    """For each piece (N · D / length,), the squared change of the logits per unit squared error of its weights."""
    channels = statistics.importance * affine(norm)[0].square()
    filters = channels
    if isinstance(conv, SharedConv2d):  # a filter changes all channels that are copies of its output
        filters = torch.zeros(len(conv.weight), dtype=torch.double).index_add(0, conv.labels.cpu(), channels)
    inputs = statistics.second_moment.diagonal().view(-1, length).mean(1)  # mean square of what the weights of a piece are multiplied by
    return torch.outer(filters, inputs).flatten()


def _clustered(points: Tensor, costs: Tensor, n_clusters: Integer, bit_cost: Real, seed: Seed) -> tuple[Tensor, Tensor]:
    """The cluster of each point (N, P), and the clusters' weighted means (k, P).

    If bits cost something, k-means is followed by the iteration of Chou, Lookabaugh and Gray (1989): each point goes where its error and
    its index together cost least, then means and lengths of indices are those of the new clusters. No step increases the total cost.
    """
    labels = cluster_points(points, n_clusters, costs, seed=seed, n_init=1)
    for _ in range(100 if bit_cost else 0):
        labels = labels.unique(return_inverse=True)[1]
        moved = _cheapest(points, _means(points, costs, labels), bit_cost / costs, _bits(labels, int(labels.max()) + 1))
        if torch.equal(moved, labels):
            break
        labels = moved
    labels = labels.unique(return_inverse=True)[1]
    return labels, _means(points, costs, labels)


def _means(points: Tensor, costs: Tensor, labels: Tensor) -> Tensor:
    zeros = torch.zeros(int(labels.max()) + 1, points.shape[1], dtype=points.dtype)
    return zeros.index_add(0, labels, points * costs.unsqueeze(1)) / zeros[:, :1].index_add(0, labels, costs.unsqueeze(1))


def _cheapest(points: Tensor, representatives: Tensor, price: Tensor, bits: Tensor) -> Tensor:
    """For each point (N, P), the representative (k, P) with the smallest sum of squared error and `price` (N,) times `bits` (k,). Terms
    that are equal for all representatives are left out."""
    return (representatives.square().sum(1) - 2 * points @ representatives.T + price.unsqueeze(1) * bits).argmin(1)


def _bits(labels: Tensor, k: Integer) -> Tensor:
    """The length (k,) of each index in an ideal code, given how often (N,) it occurs; one that never does counts as if it occurred once."""
    return (len(labels) / labels.bincount(minlength=k).double().clamp(min=1)).log2()


def _drawn(points: Tensor, n_clusters: Integer, seed: Seed) -> tuple[Tensor, Tensor]:
    """For each point (N, P), the nearest of k points that are drawn at random; and these (k, P)."""
    drawn = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(int(seed)))[:n_clusters]]
    none = points.new_zeros(1)
    return _cheapest(points, drawn, none, none), drawn
