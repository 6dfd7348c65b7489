"""Codebooks: pieces of the convolutions' weights are clustered, and each piece is stored as the number of its representative.

A piece is a filter, a pair of kernels, a 3×3 kernel, a row of a kernel, or a single weight. A codebook serves a layer, a stage or the
network. Each filter has a scale, by which its pieces are divided before they are compared (Han et al., *Deep Compression*, ICLR 2016, for
weights; Gong et al., *Compressing Deep Convolutional Networks using Vector Quantization*, 2014, for vectors). The first and the last layer
have 8 bits. Errors can be weighted by how much they change the logits.

The result is trained like any other network. Representatives get the sum of the gradients of their members. Pieces keep their
representatives, or move to the nearest ones from time to time::

    coded = quantization.coded(network, 64, pieces="kernel", scope="network")
    train(coded, images, recipe, teacher=network)
"""

import copy
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
    """Representatives (k, P), shared by the layers of a scope."""

    def __init__(self, representatives: Tensor):
        super().__init__()
        self.representatives = nn.Parameter(representatives)


class Coded(nn.Module):
    """A weight (N, …) whose pieces are representatives, times a scale for each filter.

    If assignments are renewed, the weight is trained with the gradient of its coded value. In the first forward pass in training mode, and
    in every `renew_every`-th one after it, each piece moves to the nearest representative. With 0, assignments are fixed.
    """

    def __init__(self, codebook: Codebook, labels: Tensor, scale: Tensor, renew_every: Integer = 0):
        super().__init__()
        self.codebook = codebook
        self.renew_every = renew_every
        self.register_buffer("labels", labels)
        self.register_buffer("n_passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", scale)  # not trained: the batch norm after it has a factor for each filter

    def extra_repr(self) -> str:  # part of the network's repr, by which `training.train` recognises a training
        return f"{len(self.labels)} pieces of {self.codebook.representatives.shape[1]} weights, renew_every={self.renew_every}"

    def forward(self, weight: Tensor) -> Tensor:
        labels = self.labels
        if self.training and self.renew_every:
            self.n_passes.add_(1)
            due = self.n_passes % self.renew_every == 1 % self.renew_every  # a choice between tensors, as in `finetuning.Projected`
            labels = torch.where(due, self._nearest(weight.detach()), self.labels)
            self.labels.copy_(labels)
        pieces = self.codebook.representatives[labels]
        value = pieces.view(weight.shape) * per_filter(self.scale, weight)
        return value + (weight - weight.detach()) if self.renew_every else value

    def _nearest(self, weight: Tensor) -> Tensor:
        """The representative of each piece with the smallest squared error. Terms that are equal for all representatives are left out."""
        representatives, n_each = self.codebook.representatives.detach(), len(self.labels) // len(weight)
        scale = self.scale.detach().repeat_interleave(n_each).unsqueeze(1)
        with torch.autocast(weight.device.type, enabled=False):
            products = weight.reshape(len(self.labels), -1) @ representatives.T
            return (scale.square() * representatives.square().sum(1) - 2 * scale * products).argmin(1)


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
        order and as if the errors of weights were independent. In between, this cost is raised to that power
    renew_every : training steps between two assignments of pieces to representatives; 0 keeps the first assignment
    seed : of k-means, or of the random pieces

    Raises
    ------
    ValueError : an unknown piece, scope or kind of representatives; pieces that do not divide a filter; more representatives than pieces;
        `weighting` outside [0, 1], without statistics of this network, or of pieces that are drawn at random
    """
    if pieces not in PIECES:
        raise ValueError(f"pieces is {pieces!r}, expected one of {', '.join(PIECES)}")
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}, expected one of {', '.join(SCOPES)}")
    if representatives not in REPRESENTATIVES:
        raise ValueError(f"representatives is {representatives!r}, expected one of {', '.join(REPRESENTATIVES)}")
    if not 0 <= weighting <= 1:
        raise ValueError(f"weighting is {weighting!r}, expected a number from 0 to 1")
    if weighting and representatives != "k-means":
        raise ValueError(f"weighting is {weighting!r}, expected 0 for representatives that are drawn at random")
    if weighting and statistics is None:
        raise ValueError(f"weighting is {weighting!r}, which requires statistics: see calibration.layer_statistics")
    if statistics is not None:
        check_statistics(statistics, model)
    model, renew_every = copy.deepcopy(model), int(renew_every)
    layers, norms = convolutions(model), batch_norms(model)
    for (_, length), names in groups(model, pieces, scope).items():
        weights = {name: layers[name].weight.flatten(1).double().cpu() for name in names}
        scales = {name: weight.square().mean(1).sqrt().clamp(min=1e-12) for name, weight in weights.items()}
        points = {name: (weight / scales[name].unsqueeze(1)).reshape(-1, length) for name, weight in weights.items()}
        # The cost of the squared error of each piece, in units of its filter's scale.
        costs = [scales[name].square().repeat_interleave(len(points[name]) // len(scales[name])) for name in names]
        if weighting:
            logits = [_cost_to_logits(layers[name], norms[name], statistics[name], length) for name in names]
            costs = [own * change**weighting for own, change in zip(costs, logits, strict=True)]
        everything = torch.cat([*points.values()])
        if n_representatives > len(everything):
            raise ValueError(f"n_representatives is {n_representatives}, expected at most the number of pieces, {len(everything)}")
        find = _clustered if representatives == "k-means" else _drawn
        labels, centres = find(everything, torch.cat(costs), n_representatives, seed)
        codebook = Codebook(centres.float())
        for name, part in zip(names, labels.split([len(own) for own in points.values()]), strict=True):
            code = Coded(codebook, part, scales[name].float(), renew_every).to(layers[name].weight.device)
            parametrize.register_parametrization(layers[name], "weight", code, unsafe=True)
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


def _clustered(points: Tensor, costs: Tensor, n_clusters: Integer, seed: Seed) -> tuple[Tensor, Tensor]:
    """The cluster of each point (N, P), and the clusters' weighted means (k, P)."""
    weights = usable_weights(costs)
    labels = cluster_points(points, n_clusters, weights, seed=seed, n_init=1)
    zeros = torch.zeros(int(labels.max()) + 1, points.shape[1], dtype=points.dtype)
    sums = zeros.index_add(0, labels, points * weights.unsqueeze(1))
    return labels, sums / zeros[:, :1].index_add(0, labels, weights.unsqueeze(1))


def _drawn(points: Tensor, costs: Tensor, n_clusters: Integer, seed: Seed) -> tuple[Tensor, Tensor]:
    """For each point (N, P), the nearest of k points that are drawn at random; and these (k, P)."""
    drawn = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(int(seed)))[:n_clusters]]
    return (drawn.square().sum(1) - 2 * points @ drawn.T).argmin(1), drawn
