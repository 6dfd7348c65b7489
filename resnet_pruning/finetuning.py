"""Fine-tune a network while its filters stay clustered: constraints on the weights, to be trained by `training.train`.

Each constraint starts from a trained network and its clusters (`clustering.cluster_layers`). It returns a network of the same shapes whose
convolutions compute their weight from the trained parameters (`torch.nn.utils.parametrize`). `released` makes it an ordinary network
again, with equal filters, which `compaction.compact` then makes smaller::

    constrained = finetuning.tied(network, clusters)
    train(constrained, images, finetuning.RECIPE, teacher=network)
    small = compaction.compact(finetuning.released(constrained))

Constraints of other authors are in `peers`. A network that is already smaller, from `compression.compress_by_plan`, needs none. If clusters
have gains (see `clustering`), filters are first brought to their cluster's scale, which batch norm absorbs: centroids are plain means.
"""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .arguments import Integer, Natural
from .clustering import Clusters
from .model import AnyNetwork, Network, convolutions
from .pruning import rescale_by_gains
from .training import Recipe

# From the trials of `studies.protocol`. Whole images: small crops, which network and teacher did not see in the last epochs, cost accuracy.
RECIPE = Recipe(
    epochs=20, optimizer="Muon", learning_rate=0.003, weight_decay=0.05, warmup_epochs=0.5, ema=0.995, small_share=0.0, views=10
)


class Constraint(nn.Module):
    """Base class of constraints on clustered filters: N labels, from 0 to n_clusters - 1."""

    def __init__(self, labels: Tensor):
        super().__init__()
        self.n_clusters = int(labels.max()) + 1
        self.register_buffer("labels", labels)

    def means(self, filters: Tensor) -> Tensor:
        """The mean of each cluster's filters: (N, …) to (k, …)."""
        members = F.one_hot(self.labels, self.n_clusters).to(filters.dtype)
        with torch.autocast(filters.device.type, enabled=False):  # in bfloat16, the pull between near filters would be lost to rounding
            return torch.einsum("nk,n...->k...", members / members.sum(0), filters)

    def clustered(self, weight: Tensor) -> Tensor:
        """The weight (N, C_in, k_h, k_w) that the parameter stands for, with equal filters in each cluster."""
        return self.means(weight)[self.labels]


class Tied(Constraint):
    """A weight of N filters from k representatives (k, C_in, k_h, k_w): filter i is representative ``labels[i]``."""

    def forward(self, representatives: Tensor) -> Tensor:
        return representatives[self.labels]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.means(weight)

    clustered = forward


class Projected(Constraint):
    """A weight whose filters are replaced by the centroids of their clusters in the forward pass, but not in the backward pass.

    In the first forward pass in training mode, and in every `renew_every`-th one after it, filters move to the nearest centroid (a step of
    Lloyd's algorithm). The member nearest to a centroid stays, so that no cluster is ever empty. With 0, clusters are fixed.
    """

    def __init__(self, labels: Tensor, renew_every: Integer):
        super().__init__(labels)
        self.renew_every = renew_every
        self.register_buffer("n_passes", torch.zeros((), dtype=torch.long, device=labels.device))

    def extra_repr(self) -> str:  # part of the network's repr, by which `training.train` recognises a training
        return f"renew_every={self.renew_every}"

    def forward(self, weight: Tensor) -> Tensor:
        if self.training and self.renew_every:
            # A choice between tensors, because a branch on their values would break a compiled graph.
            self.n_passes.add_(1)
            # At the start of each period, so that the rest of the period is trained for the new clusters.
            due = self.n_passes % self.renew_every == 1 % self.renew_every
            self.labels.copy_(torch.where(due, self._renewed(weight.detach().flatten(1)), self.labels))
        return self.clustered(weight).detach() + (weight - weight.detach())

    def _renewed(self, points: Tensor) -> Tensor:
        squared = (points.unsqueeze(1) - self.means(points)).square().sum(2)  # (N, k)
        members = F.one_hot(self.labels, self.n_clusters).bool()
        medoids = torch.where(members, squared, torch.inf).argmin(0)
        return squared.argmin(1).index_copy(0, medoids, torch.arange(self.n_clusters, device=points.device))


def tied(model: Network, clusters: Mapping[str, Clusters]) -> nn.Module:
    """A copy of `model` in which the filters of a cluster are one parameter, initialised to their plain mean.

    Raises a ValueError for clusters of another model.
    """
    return constrained(model, clusters, Tied)


def projected(model: Network, clusters: Mapping[str, Clusters], renew_every: Natural = 1) -> nn.Module:
    """A copy of `model` whose forward pass sees clustered filters, while every filter is trained.

    Parameters
    ----------
    renew_every : training steps between two assignments of filters to clusters; 0 keeps the assignment of `clusters`. Filters are compared
        by their weights, at their cluster's scale

    Raises
    ------
    ValueError : clusters of another model
    """
    return constrained(model, clusters, lambda labels: Projected(labels, int(renew_every)))


@torch.no_grad()
def released(model: AnyNetwork) -> nn.Module:
    """A copy without constraints, in which the filters of a cluster are equal tensors.

    Raises
    ------
    ValueError : a model without constraints
    """
    model = copy.deepcopy(model)
    layers = [layer for layer in model.modules() if parametrize.is_parametrized(layer, "weight")]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no constraint on its weights, expected one from finetuning.tied or projected")
    for layer in layers:
        weight = layer.parametrizations.weight.original
        for constraint in layer.parametrizations.weight:  # `layer.weight` may change the clusters
            weight = (constraint.clustered if isinstance(constraint, Constraint) else constraint)(weight)
        # As remove_parametrizations, which also removes the weight from the class: the copy shares it with the caller's model.
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        layer.weight = nn.Parameter(weight)
    return model.to(memory_format=torch.channels_last)


def constrained(model: Network, clusters: Mapping[str, Clusters], constraint: Callable[[Tensor], Constraint]) -> nn.Module:
    """A copy of `model` in which the filters of each layer of `clusters` are subject to `constraint`, made for their labels.

    Raises a ValueError for clusters of another model.
    """
    if not clusters:
        raise ValueError("clusters is empty, expected those of at least one convolution: see clustering.cluster_layers")
    model = rescale_by_gains(model, clusters)
    for name, conv in convolutions(model).items():
        if name in clusters:
            labels = clusters[name].labels.to(conv.weight.device, copy=True)
            parametrize.register_parametrization(conv, "weight", constraint(labels), unsafe=True)
    return model
