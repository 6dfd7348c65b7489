"""Centripetal SGD: filters of a cluster are pulled together while all of them are trained (Ding et al., *Centripetal SGD*, CVPR 2019)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..arguments import Integer, Real
from ..clustering import Clusters
from ..finetuning import Constraint, constrained, constrained_layers
from ..model import AnyNetwork, Network
from ..training import Recipe


class Centripetal(Constraint):
    """An unchanged weight, whose gradient treats the filters of a cluster alike and pulls them together.

    Let g be the mean gradient of a filter's cluster, and c the cluster's mean. The filter w gets the gradient g + strength · (w - c): the
    update of Ding et al. without its weight decay, which the optimizer applies.
    """

    def __init__(self, labels: Tensor, strength: Real):
        super().__init__(labels)
        self.strength = strength

    def extra_repr(self) -> str:
        return f"strength={self.strength}"

    def forward(self, weight: Tensor) -> Tensor:
        return _Centripetal.apply(weight, self)


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


def centripetal(model: Network, clusters: Mapping[str, Clusters], strength: Real) -> nn.Module:
    """A copy of `model` that computes the same function, and whose filters approach those of their cluster in training.

    How close they get depends on the training, see `strength_for`. `distances_within_clusters` measures the remaining differences;
    `finetuning.released` removes them.

    Parameters
    ----------
    strength : of the pull; ε in the paper, which uses 3e-3 for a few hundred epochs

    Raises
    ------
    ValueError : clusters of another model; a strength that is not positive
    """
    if not strength > 0:
        raise ValueError(f"strength is {strength!r}, expected a positive number")
    return constrained(model, clusters, lambda labels: Centripetal(labels, float(strength)))


def strength_for(recipe: Recipe, n_images: Integer, shrinkage: Real = 10.0) -> float:
    """The strength of `centripetal` with which a training shrinks the distance of filters from their centroid to exp(-`shrinkage`) of it.

    Each step removes the share learning rate · strength / (1 - momentum). The learning rate is half of its peak on average.

    Raises
    ------
    ValueError : a shrinkage that is not positive
    """
    if not shrinkage > 0:
        raise ValueError(f"shrinkage is {shrinkage!r}, expected a positive number")
    n_steps = recipe.epochs * (n_images // recipe.batch_size)
    return shrinkage * (1 - recipe.momentum) / (recipe.learning_rate / 2 * n_steps)


@torch.no_grad()
def distances_within_clusters(model: AnyNetwork) -> dict[str, float]:
    """For each constrained layer, how far its current filters are from their cluster's mean: the norm of the differences as a share of the
    weight's norm.

    Raises
    ------
    ValueError : a model without clusters
    """
    shares = {}
    for name, (conv, constraint) in constrained_layers(model).items():
        difference = conv.weight - constraint.clustered(conv.parametrizations.weight.original)
        shares[name] = float(difference.norm() / conv.weight.norm().clamp(min=1e-12))
    return shares
