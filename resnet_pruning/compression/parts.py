"""The parts of a network, the stem and the blocks, and smaller ones fitted to take their place."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import Count, Integer, PositiveReal, Seed
from ..calibration import LayerStatistics
from ..clustering import cluster_filters, distinct_filters
from ..data import Batches, Images
from ..hardware import has_fast_bfloat16
from ..model import Block, OwnNetwork, SharedConv2d, affine, blocks
from ..plans import Plan
from .least_squares import Moments, eliminate
from .streams import Narrowed, bridge, medoids

N_FITTED = 512  # images for least squares
N_STATISTICS = 500  # images for how much the logits depend on each channel


def check_images(images: Images, at_least: Integer) -> None:
    """Raise a ValueError unless there are so many images."""
    if len(images) < at_least:
        raise ValueError(f"{len(images)} images, expected at least {at_least}, better some hundred more")


def parts_of(model: OwnNetwork) -> dict[str, nn.Module]:
    """The stem (named "", with its batch norm and ReLU) and the blocks, front to back: each takes what the one before it gives."""
    stem = nn.Sequential(OrderedDict(conv1=model.conv1, bn1=model.bn1, relu=nn.ReLU()))
    return {"": stem, **blocks(model)}


def augmented(images: Images, seed: Seed = 0) -> Tensor:
    """All `images`, shifted and mirrored as in training, as one float32 tensor (N, 3, 32, 32)."""
    return next(Batches(images, len(images), seed=seed).epoch(0))[0]


@torch.no_grad()
def apply(part: nn.Module, inputs: Tensor) -> Tensor:
    """The outputs of a part for many inputs, some at a time."""
    return torch.cat([part(batch) for batch in inputs.split(256)])


class PartFit:
    """The stem or a block, and smaller ones that take its place.

    Parameters
    ----------
    name, part : from `parts_of`
    original : float32 tensor (N, C, H, W), what the part sees in the original network
    inputs : what it sees in the smaller network, of the same shape but for the channels of a narrowed stream
    statistics : of the original network, from `calibration.layer_statistics`
    reads, writes : the streams of the smaller network before and behind the part, if they are narrower
    """

    def __init__(
        self,
        name: str,
        part: nn.Module,
        original: Tensor,
        inputs: Tensor,
        statistics: Mapping[str, LayerStatistics],
        reads: Narrowed | None = None,
        writes: Narrowed | None = None,
    ):
        self.part, self.original, self.inputs, self.reads = part, original, inputs, reads
        self.is_block = isinstance(part, Block)
        self.conv, self.norm = (part.conv2, part.bn2) if self.is_block else (part.conv1, part.bn1)
        self.first, self.last = (f"{name}.conv1", f"{name}.conv2") if self.is_block else (None, "conv1")
        self.written = torch.arange(self.conv.out_channels) if writes is None else writes.kept
        self.importance = statistics[self.last].importance[self.written]
        self.inner_importance = statistics[self.first].importance if self.is_block else None
        self.bridge = bridge(part, reads, writes).to(inputs.device) if self.is_block else None
        self.is_narrowed = reads is not None or writes is not None

    @property
    def layers(self) -> dict[str, int]:
        """The part's convolutions and their numbers of filters."""
        return ({self.first: self.conv.in_channels} if self.is_block else {}) | {self.last: self.conv.out_channels}

    def changes(self, plan: Plan) -> bool:
        """Whether a plan asks for less than the part has."""
        return self.is_narrowed or any(plan.get(layer, n_filters) < n_filters for layer, n_filters in self.layers.items())

    @functools.cached_property
    def entrance(self) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """A block's first convolution and its batch norm in the smaller network; solved for anew where its stream is narrower."""
        if self.reads is None:
            return self.part.conv1, self.part.bn1
        with torch.no_grad():
            targets = self.part.bn1(self.part.conv1(self.original[:N_FITTED]))
            moments = Moments.of(self.part.conv1, self.inputs[:N_FITTED], targets)
        weight = moments.solution()
        conv = _convolution(weight.view(len(weight), -1, *self.part.conv1.kernel_size), self.part.stride)
        norm = _batch_norm(torch.ones(len(weight)), moments.target_mean - weight @ moments.mean)
        return conv.to(self.inputs.device), norm.to(self.inputs.device)

    @functools.cached_property
    def activations(self) -> Tensor:
        """What the last convolution sees in the smaller network if no channel is taken out."""
        inputs = self.inputs[:N_FITTED]
        with torch.no_grad():
            return F.relu(self.entrance[1](self.entrance[0](inputs))) if self.is_block else inputs

    @functools.cached_property
    def moments(self) -> Moments:
        """Of the last convolution's input patches, and of what it should give: the original stream, less the shortcut as it now is."""
        original, inputs = self.original[:N_FITTED], self.inputs[:N_FITTED]
        with torch.no_grad():
            if self.is_block:
                whole = self.part.shortcut(original) + self.part.residual(original)
                targets = whole[:, self.written] - self.bridge.shortcut(inputs)
            else:
                targets = self.norm(self.conv(original))[:, self.written]
            return Moments.of(self.conv, self.activations, targets)

    @functools.cached_property
    def elimination(self) -> list[int]:
        """The channels in the order in which they are taken out, the last one being the one that stays longest."""
        return eliminate(self.moments, self.importance)

    @functools.cached_property
    def correlations(self) -> Tensor:
        """Of the activations of any two channels, (C, C), float64 on the CPU; 0 for channels that are always 0."""
        return torch.corrcoef(self.activations.transpose(0, 1).flatten(1)).double().cpu().nan_to_num(0.0)

    def selected(self, n_channels: Integer, selection: str, seed: Seed) -> tuple[Tensor, Tensor]:
        """The channels that are kept (n_channels,), in order, and for each channel (C,) the number of the kept one it is merged with."""
        if selection == "elimination":
            kept = torch.tensor(sorted(self.elimination[-n_channels:]))
        else:
            variances = self.activations.transpose(0, 1).flatten(1).var(1).double().cpu()
            kept = medoids(self.correlations, self.inner_importance * variances, n_channels, seed).kept
        labels = self.correlations[:, kept].argmax(1)
        labels[kept] = torch.arange(len(kept))
        return kept, labels

    def solve(self, plan: Plan, repair: str, *, selection: str = "elimination", seed: Seed = 0, stated: bool = True) -> nn.Module:
        """The smaller part for a plan, by one of `REPAIRS`. For "reconstruction" it is the start, from least squares.

        Unless `stated`, batch norms do not hold the statistics of what they see, which takes time and changes nothing of what is computed.
        """
        if self.is_block and plan.get(self.first) == 0:
            return self.bridge
        kept = labels = torch.arange(self.conv.in_channels)
        if plan.get(self.first, len(kept)) < len(kept):
            kept, labels = self.selected(plan[self.first], selection, seed)
        moments = self.moments.restricted(kept)
        fitted = repair in ("least squares", "reconstruction")
        if fitted:
            weight = moments.solution()
            shift = moments.target_mean - weight @ moments.mean
        else:
            slope, shift = (values[self.written] for values in affine(self.norm))
            weight = (self._mixed(kept, labels, repair)[self.written] * slope.view(-1, 1, 1, 1)).flatten(1)
        small = copy.deepcopy(self.bridge if self.is_block else self.part)
        last = _shared(weight, shift, moments, self.importance, plan.get(self.last, len(weight)), self.conv.stride[0], seed)
        if self.is_block:
            conv, norm = self.entrance if fitted else self._entrance_mixed(repair)
            slope, shift = affine(norm)
            weight = (conv.weight.detach().double().cpu() * slope.view(-1, 1, 1, 1))[kept]
            small.conv1, small.bn1 = _convolution(weight, self.part.stride), _batch_norm(torch.ones(len(kept)), shift[kept])
            small.conv2, small.bn2 = last
            small.dropped = False
        else:
            small.conv1, small.bn1 = last
        small = small.to(self.inputs.device, memory_format=torch.channels_last).eval()
        if fitted:
            if stated:
                self._state_measured(small)
        elif self.is_block:
            _state_believed(small.bn1, self.part.bn1, kept)
            _state_believed(small.bn2, self.part.bn2, self.written)
        else:
            _state_believed(small.bn1, self.part.bn1, self.written)
        return small

    def reconstruct(self, small: nn.Module, *, n_steps: Count, learning_rate: PositiveReal, seed: Seed = 0, batch_size: Count = 32) -> None:
        """Train a part from `solve` to give what the original part gives, each channel weighted by what the logits make of it."""
        targets = apply(self.part, self.original)[:, self.written]
        weights = (self.importance / self.importance.mean()).to(targets).view(-1, 1, 1)
        small.requires_grad_()
        amp = has_fast_bfloat16(targets.device)
        optimizer = torch.optim.Adam(small.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(n_steps, 1))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n_steps):
            batch = torch.randint(len(targets), (batch_size,), generator=generator).to(targets.device)
            with torch.autocast(targets.device.type, torch.bfloat16, enabled=amp):
                outputs = small(self.inputs[batch])
            loss = ((outputs.float() - targets[batch]).square() * weights).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self._state_measured(small)

    def _mixed(self, kept: Tensor, labels: Tensor, repair: str) -> Tensor:
        """The last convolution's filters for the kept channels only, float64 (N, kept, k_h, k_w)."""
        mixture = F.one_hot(labels).double()  # (C, kept)
        if repair == "none":
            mixture = torch.zeros_like(mixture)
        if repair == "scaled":
            values = self.activations.transpose(0, 1).flatten(1)
            products = (values * values[kept[labels].to(values.device)]).sum(1) / values[kept[labels].to(values.device)].square().sum(1)
            mixture *= products.double().cpu().nan_to_num(0.0).unsqueeze(1)
        mixture[kept] = torch.eye(len(kept), dtype=torch.double)
        return torch.einsum("oihw,ik->okhw", self.conv.weight.detach().double().cpu(), mixture)

    def _entrance_mixed(self, repair: str) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """The first convolution for the channels of a narrower stream: with those of the others added, unless nothing is repaired."""
        if self.reads is None:
            return self.part.conv1, self.part.bn1
        weight = self.part.conv1.weight.detach().double().cpu()
        summed = torch.einsum("oihw,ik->okhw", weight, F.one_hot(self.reads.labels).double())
        return _convolution(weight[:, self.reads.kept] if repair == "none" else summed, self.part.stride), self.part.bn1

    @torch.no_grad()
    def _state_measured(self, small: nn.Module) -> None:
        """Have each batch norm of `small` hold the statistics of what it sees, without a change of what it computes."""
        inputs = self.inputs[:N_FITTED]
        for conv, norm in ((small.conv1, small.bn1), (small.conv2, small.bn2)) if self.is_block else ((small.conv1, small.bn1),):
            outputs = conv(inputs)
            _state(norm, outputs.mean((0, 2, 3)), outputs.var((0, 2, 3)))
            inputs = F.relu(norm(outputs))


def _shared(
    weight: Tensor, shift: Tensor, moments: Moments, importance: Tensor, n_filters: Integer, stride: Integer, seed: Integer
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that computes `n_filters` filters, and a batch norm that makes of them about weight (N, D) times patch plus shift.

    Filters are clustered by the correlation of their outputs. The one that stands for a cluster is its principal component, and each
    channel gets the multiple of it that is nearest to its own output.
    """
    shape = (-1, len(moments.mean) // moments.kernel_area, *[int(moments.kernel_area**0.5)] * 2)
    conv, norm = _convolution(weight.view(shape), stride), _batch_norm(torch.ones(len(weight)), shift)
    if n_filters >= len(weight):
        return conv, norm
    second_moment = moments.covariance + torch.outer(moments.mean, moments.mean)
    statistics = LayerStatistics(moments.mean, second_moment, importance)
    clusters = cluster_filters(conv, n_filters, "correlation", batch_norm=norm, statistics=statistics, weighting=0.5, seed=seed)
    labels = distinct_filters(clusters.labels.unsqueeze(1))[1]  # numbered in the order of the channels, as `compact` does
    filters, scale = [], torch.zeros(len(weight), dtype=torch.double)
    for cluster in range(int(labels.max()) + 1):
        members = labels == cluster
        own = weight[members]
        weighted = own * (importance[members] / importance.mean()).pow(0.25).unsqueeze(1)
        component = torch.linalg.eigh(weighted @ moments.covariance @ weighted.T).eigenvectors[:, -1] @ weighted
        deviation = (component @ moments.covariance @ component).clamp(min=0).sqrt()
        component = component / deviation if deviation > 0 else component
        filters.append(component)
        scale[members] = own @ moments.covariance @ component
    filters = torch.stack(filters)
    shared = SharedConv2d(shape[1], labels.tolist(), stride)
    with torch.no_grad():
        shared.weight.copy_(filters.view(shape))
    return shared, _batch_norm(scale, shift + (weight - scale.unsqueeze(1) * filters[labels]) @ moments.mean)


def _convolution(weight: Tensor, stride: Integer) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding=weight.shape[2] // 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(weight)
    return conv


def _batch_norm(scale: Tensor, shift: Tensor) -> nn.BatchNorm2d:
    """A batch norm that computes scale · y + shift, with statistics that say mean 0 and variance 1."""
    norm = nn.BatchNorm2d(len(scale)).eval()
    with torch.no_grad():
        norm.running_var.fill_(1 - norm.eps)
        norm.weight.copy_(scale)
        norm.bias.copy_(shift)
    return norm


@torch.no_grad()
def _state(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Give a batch norm other statistics, and the weight and the bias with which it computes the same."""
    factor, constant = affine(norm)
    mean, variance = mean.double().cpu(), variance.double().cpu()
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(factor * (variance + norm.eps).sqrt())
    norm.bias.copy_(constant + factor * mean)


def _state_believed(norm: nn.BatchNorm2d, original: nn.BatchNorm2d, channels: Tensor | slice = slice(None)) -> None:
    """Have `norm`, which computes the same, or less well, as these channels of `original`, hold the statistics that that one holds.

    They say that the output has mean β and deviation γ, whatever it is by now.
    """
    factor, constant = affine(norm)
    mean, deviation = (t.detach().double().cpu()[channels] for t in (original.bias, original.weight))
    dead = factor == 0
    safe = torch.where(dead, 1.0, factor)
    _state(norm, torch.where(dead, 0.0, (mean - constant) / safe), torch.where(dead, 1.0, (deviation / safe).square()))
