"""Least squares for a convolution: the filters whose outputs are nearest to given ones, and the input channels that they need least."""

import dataclasses

import torch
from torch import Tensor, nn

from ..calibration import patches

RIDGE = 1e-4  # relative to the mean variance of the inputs


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means and covariances of a convolution's input patches, of D = C·k_h·k_w values, and of N targets; float64 on the CPU.

    Attributes
    ----------
    mean, target_mean : (D,) and (N,)
    covariance : (D, D), of the patches
    cross : (D, N), covariance of patches and targets
    kernel_area : k_h·k_w, by which a patch's values are grouped into channels
    """

    mean: Tensor
    target_mean: Tensor
    covariance: Tensor
    cross: Tensor
    kernel_area: int

    @classmethod
    def of(cls, conv: nn.Conv2d, inputs: Tensor, targets: Tensor) -> "Moments":
        """The moments of inputs (B, C, H, W) of a convolution and of targets with the shape of its outputs."""
        sums, n = [0.0] * 4, 0
        for batch, target in zip(inputs.split(64), targets.split(64), strict=True):
            seen, target = patches(conv, batch), target.transpose(0, 1).flatten(1)
            parts = (seen.sum(1), target.sum(1), seen @ seen.T, seen @ target.T)
            sums = [total + part.double().cpu() for total, part in zip(sums, parts, strict=True)]
            n += seen.shape[1]
        mean, target_mean, second, cross = (total / n for total in sums)
        area = conv.kernel_size[0] * conv.kernel_size[1]
        return cls(mean, target_mean, second - torch.outer(mean, mean), cross - torch.outer(mean, target_mean), area)

    def restricted(self, channels: Tensor) -> "Moments":
        """The moments of some input channels only."""
        if len(channels) * self.kernel_area == len(self.mean):
            return self
        values = (channels.unsqueeze(1) * self.kernel_area + torch.arange(self.kernel_area)).flatten()
        covariance = self.covariance[values][:, values]
        return dataclasses.replace(self, mean=self.mean[values], covariance=covariance, cross=self.cross[values])

    def regularised(self) -> Tensor:
        """The covariance with a ridge, so that it can be inverted."""
        ridge = RIDGE * self.covariance.diagonal().mean() + 1e-12
        return self.covariance + ridge * torch.eye(len(self.mean), dtype=torch.double)

    def solution(self) -> Tensor:
        """(N, D): the filters whose outputs are nearest to the targets, in mean square and up to a constant."""
        return torch.linalg.solve(self.regularised(), self.cross).T


def eliminate(moments: Moments, importance: Tensor) -> list[int]:
    """All input channels, in the order of their removal: each time, the channel whose removal increases the least-squares loss least.

    The loss is the squared error of the targets, weighted by their `importance` (N,).
    """
    area = moments.kernel_area
    n = len(moments.mean) // area
    inverse = torch.linalg.inv(moments.regularised())
    weight = inverse @ moments.cross  # (D, N), for the remaining channels
    left, order = list(range(n)), []
    while left:
        blocks_of = inverse.view(n, area, n, area)[left, :, left]  # (left, area, area)
        rows = weight.view(n, area, -1)[left]
        losses = (rows * torch.linalg.solve(blocks_of, rows)).sum(1) @ importance
        channel = left.pop(int(losses.argmin()))
        order.append(channel)
        values = slice(channel * area, (channel + 1) * area)
        factor = torch.linalg.solve(inverse[values, values], torch.cat([weight[values], inverse[values]], dim=1))
        weight = weight - inverse[:, values] @ factor[:, : weight.shape[1]]
        inverse = inverse - inverse[:, values] @ factor[:, weight.shape[1] :]
    return order
