"""Train on while the filters stay clustered: three constraints on a network's weights, to be trained by `training.train`.

Each constraint starts from a trained network and its clusters (`clustering.cluster_layers`), and returns a network of the same shapes whose
convolutions compute their weight from what is trained (`torch.nn.utils.parametrize`). `released` makes it an ordinary network again, with
equal filters, which `compaction.compact` then makes smaller::

    constrained = finetuning.tied(network, clusters)
    train(constrained, images, finetuning.RECIPE, teacher=network)
    small = compaction.compact(finetuning.released(constrained))

=============  =========================================================================================================
constraint     what is trained
=============  =========================================================================================================
`tied`         one filter per cluster; its gradient is the sum of its members'
`projected`    every filter; the forward pass sees each cluster's centroid instead, and the gradient goes through to the filters
               themselves (straight-through, as Bengio et al. 2013 do for thresholds); the clusters may be renewed on the way
`centripetal`  every filter, with the mean gradient of its cluster, while a pull towards the centroid makes the filters of a
               cluster equal in the end (Ding et al., *Centripetal SGD*, CVPR 2019)
=============  =========================================================================================================

`masked` is the constraint of weight pruning, for comparison: what is zero stays zero.

The fourth way needs no constraint: a network that is smaller already, from `compression.compress_by_plan`, is trained like any other.

All start from the same weights: where clusters have gains (see `clustering`), filters are first brought to their cluster's scale, which
batch norm takes up, so that the centroid of a cluster is the plain mean of its filters.
"""

import copy
from collections.abc import Mapping
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .clustering import Clusters
from .model import SharedConv2d, convolutions
from .pruning import rescale_by_gains
from .training import Recipe

# Whole images throughout: small crops, which neither the network nor its teacher saw in their last epochs, cost a point of accuracy.
RECIPE = Recipe(epochs=20, learning_rate=0.05, warmup_epochs=0.5, ema=0.995, small_share=0.0)


class _Constraint(nn.Module):
    """What clustered filters have in common: N labels, from 0 to n_clusters - 1."""

    def __init__(self, labels: Tensor):
        super().__init__()
        self.n_clusters = int(labels.max()) + 1
        self.register_buffer("labels", labels)

    def means(self, filters: Tensor) -> Tensor:
        """The mean of each cluster's filters: (N, …) to (k, …)."""
        members = F.one_hot(self.labels, self.n_clusters).to(filters.dtype)
        with torch.autocast(filters.device.type, enabled=False):  # in bfloat16 the pull between near filters would be rounding
            return torch.einsum("nk,n...->k...", members / members.sum(0), filters)

    def clustered(self, weight: Tensor) -> Tensor:
        """The weight (N, C_in, k_h, k_w) with equal filters that the parameter stands for."""
        return self.means(weight)[self.labels]


class Tied(_Constraint):
    """A weight of N filters from k representatives (k, C_in, k_h, k_w): filter i is that of ``labels[i]``."""

    def forward(self, representatives: Tensor) -> Tensor:
        return representatives[self.labels]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.means(weight)

    clustered = forward


class Projected(_Constraint):
    """A weight whose filters are replaced by the centroids of their clusters in the forward pass, and not in the backward pass.

    In the first forward pass in training mode, and in every `renew_every`-th one after it, filters go to the nearest centroid (a step of
    Lloyd's algorithm). The member nearest to a centroid stays, so that no cluster is ever empty. With 0, clusters remain as they are.
    """

    def __init__(self, labels: Tensor, renew_every: int):
        super().__init__(labels)
        self.renew_every = renew_every
        self.register_buffer("n_passes", torch.zeros((), dtype=torch.long, device=labels.device))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training and self.renew_every:
            # A choice between tensors, because a branch on their values would break a compiled graph.
            self.n_passes.add_(1)
            # At the start of each period, so that all that follows in it is trained for the new clusters.
            due = self.n_passes % self.renew_every == 1 % self.renew_every
            self.labels.copy_(torch.where(due, self._renewed(weight.detach().flatten(1)), self.labels))
        return self.clustered(weight).detach() + (weight - weight.detach())

    def _renewed(self, points: Tensor) -> Tensor:
        squared = (points.unsqueeze(1) - self.means(points)).square().sum(2)  # (N, k)
        members = F.one_hot(self.labels, self.n_clusters).bool()
        medoids = torch.where(members, squared, torch.inf).argmin(0)
        return squared.argmin(1).index_copy(0, medoids, torch.arange(self.n_clusters, device=points.device))


class Centripetal(_Constraint):
    """A weight as it is, with a gradient that treats the filters of a cluster alike and pulls them together.

    With g the mean gradient of a filter's cluster and c the cluster's mean, the filter w gets g + strength · (w - c): the update of
    Ding et al. without its weight decay, which the optimizer has.
    """

    def __init__(self, labels: Tensor, strength: float):
        super().__init__(labels)
        self.strength = strength

    def forward(self, weight: Tensor) -> Tensor:
        return _Centripetal.apply(weight, self)


class Masked(nn.Module):
    """A weight of which some entries are zero and stay so, whatever the training does."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class _Centripetal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, constraint: Centripetal) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.constraint = constraint
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return ctx.constraint.clustered(gradient) + ctx.constraint.strength * (weight - ctx.constraint.clustered(weight)), None


def tied(model: nn.Module, clusters: Mapping[str, Clusters]) -> nn.Module:
    """A copy of `model` in which the filters of a cluster are one parameter, at first their centroid.

    Raises
    ------
    ValueError : clusters of another model
    """
    return _constrained(model, clusters, Tied)


def projected(model: nn.Module, clusters: Mapping[str, Clusters], renew_every: int = 1) -> nn.Module:
    """A copy of `model` whose forward pass sees clustered filters, while every filter is trained.

    Parameters
    ----------
    renew_every : training steps between two assignments of filters to clusters; 0 keeps those of `clusters`. Filters are compared by their
        weights, at their cluster's scale

    Raises
    ------
    ValueError : clusters of another model, `renew_every` that is no integer from 0
    """
    if not isinstance(renew_every, Integral) or isinstance(renew_every, bool) or renew_every < 0:
        raise ValueError(f"renew_every is {renew_every!r}, expected an integer from 0")
    return _constrained(model, clusters, lambda labels: Projected(labels, int(renew_every)))


def centripetal(model: nn.Module, clusters: Mapping[str, Clusters], strength: float) -> nn.Module:
    """A copy of `model` with the function that it has, whose filters grow together in training.

    How near they come depends on the training, see `strength_for`; `distances_within_clusters` says how much is left, and `released` takes
    it away.

    Parameters
    ----------
    strength : of the pull, ε in the paper, which takes 3e-3 for some hundred epochs

    Raises
    ------
    ValueError : clusters of another model, a strength that is not positive
    """
    if not strength > 0:
        raise ValueError(f"strength is {strength!r}, expected a positive number")
    return _constrained(model, clusters, lambda labels: Centripetal(labels, float(strength)))


def masked(model: nn.Module) -> nn.Module:
    """A copy in which the weights of convolutions and linear layers that are zero now stay zero, for `baselines.prune_weights`.

    Raises
    ------
    ValueError : a layer that shares filters, or is constrained already
    """
    model = copy.deepcopy(model)
    for name, conv in convolutions(model).items():
        _check_ordinary(name, conv)
    for layer in [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", Masked((layer.weight != 0).detach()))
    return model


def strength_for(recipe: Recipe, n_images: int, shrinkage: float = 10.0) -> float:
    """The strength of `centripetal` with which a training takes what filters differ from their centroid down to exp(-`shrinkage`) of it.

    Each step takes away the share learning rate · strength / (1 - momentum), and the learning rate is half of its peak on average.

    Raises
    ------
    ValueError : a shrinkage that is not positive
    """
    if not shrinkage > 0:
        raise ValueError(f"shrinkage is {shrinkage!r}, expected a positive number")
    n_steps = recipe.epochs * (n_images // recipe.batch_size)
    return shrinkage * (1 - recipe.momentum) / (recipe.learning_rate / 2 * n_steps)


def released(model: nn.Module) -> nn.Module:
    """A copy without constraints, in which the filters of a cluster are equal tensors.

    Raises
    ------
    ValueError : a model without any constraint of this module
    """
    model = copy.deepcopy(model)
    for name, (layer, constraint) in _constrained_layers(model, (_Constraint, Masked)).items():
        # Not remove_parametrizations: it takes the weight from the class, which the copy shares with the caller's model.
        settings = {"bias": layer.bias is not None, "dtype": layer.weight.dtype}
        if isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, **settings)
        else:
            shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
            plain = nn.Conv2d(*shape, padding_mode=layer.padding_mode, **settings).to(memory_format=torch.channels_last)
        imposed = constraint.clustered if isinstance(constraint, _Constraint) else constraint
        with torch.no_grad():
            plain.weight.copy_(imposed(layer.parametrizations.weight.original))
            if layer.bias is not None:
                plain.bias.copy_(layer.bias)
        model.set_submodule(name, plain.to(layer.weight.device).train(layer.training))
    return model


def assignments(model: nn.Module) -> dict[str, list[int]]:
    """For each constrained layer, the cluster of each filter.

    Raises
    ------
    ValueError : a model without any constraint of this module
    """
    return {name: constraint.labels.tolist() for name, (_, constraint) in _constrained_layers(model).items()}


@torch.no_grad()
def distances_within_clusters(model: nn.Module) -> dict[str, float]:
    """For each constrained layer, how much the filters that the network now computes with differ from their cluster's mean: the norm of the
    differences as a share of the weight's norm.

    Raises
    ------
    ValueError : a model without any constraint of this module
    """
    shares = {}
    for name, (conv, constraint) in _constrained_layers(model).items():
        difference = conv.weight - constraint.clustered(conv.parametrizations.weight.original)
        shares[name] = float(difference.norm() / conv.weight.norm().clamp(min=1e-12))
    return shares


def _constrained(model: nn.Module, clusters: Mapping[str, Clusters], constraint) -> nn.Module:
    _check_clusters(model, clusters)
    model = rescale_by_gains(model, clusters)
    for name, conv in convolutions(model).items():
        if name in clusters:
            labels = clusters[name].labels.to(conv.weight.device, copy=True)
            parametrize.register_parametrization(conv, "weight", constraint(labels), unsafe=True)
    return model


def _check_clusters(model: nn.Module, clusters: Mapping[str, Clusters]) -> None:
    convs = convolutions(model)
    if not clusters:
        raise ValueError("clusters is empty, expected those of at least one convolution: see clustering.cluster_layers")
    for name, layer in clusters.items():
        if name not in convs:
            raise ValueError(f"clusters has {name!r}, expected convolutions of the model: {', '.join(convs)}")
        conv = convs[name]
        _check_ordinary(name, conv)
        if len(layer.labels) != len(conv.weight):
            raise ValueError(f"clusters has {len(layer.labels)} labels for {name}, expected one for each of its {len(conv.weight)} filters")
        if layer.centroids.shape[1:] != conv.weight.shape[1:]:
            raise ValueError(
                f"centroids of {name} have the shape {tuple(layer.centroids.shape[1:])}, expected that of its filters, "
                f"{tuple(conv.weight.shape[1:])}"
            )
        if layer.labels.unique().tolist() != list(range(len(layer))):
            raise ValueError(
                f"labels of {name} are {layer.labels.unique().tolist()}, expected each of its {len(layer)} clusters, counted from 0"
            )


def _check_ordinary(name: str, conv: nn.Conv2d) -> None:
    if parametrize.is_parametrized(conv):
        raise ValueError(f"{name} is constrained already, expected an ordinary convolution: see finetuning.released")
    if isinstance(conv, SharedConv2d):
        raise ValueError(f"{name} shares filters already: constrain the model before it is made compact")


def _constrained_layers(model: nn.Module, kinds: type | tuple[type, ...] = _Constraint) -> dict[str, tuple[nn.Module, nn.Module]]:
    layers = {
        name: (layer, layer.parametrizations.weight[0])
        for name, layer in model.named_modules()
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], kinds)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no constraint on its filters, expected one from finetuning.tied, projected, centripetal or masked"
        )
    return layers
