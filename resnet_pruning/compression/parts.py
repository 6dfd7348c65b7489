"""The parts of a network, the stem and the blocks, and smaller parts fitted to replace them."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import Count, Integer, PositiveReal, Seed
from ..calibration import LayerStatistics
from ..clustering import cluster_filters, distinct_filters
from ..data import Batches, Images
from ..hardware import has_fast_bfloat16
from ..model import Block, OwnNetwork, ResNet, SharedConv2d, affine, batch_norms, blocks, convolutions
from ..plans import Plan
from .least_squares import Moments, eliminate
from .streams import Narrowed, bridge, medoids, represented_by

N_FITTED = 512  # images for least squares
N_STATISTICS = 500  # images to measure how much the logits depend on each channel


def check_statistics(statistics: Mapping[str, LayerStatistics], model: ResNet) -> None:
    """Raise a ValueError for statistics of a network with other layers."""
    convs, norms = convolutions(model), batch_norms(model)
    found = {name: (len(layer.importance), len(layer.mean)) for name, layer in statistics.items()}
    expected = {name: (norm.num_features, convs[name].weight[0].numel()) for name, norm in norms.items()}
    for name in found | expected:
        if found.get(name) != expected.get(name):
            numbers = f"{found.get(name)}, expected {expected.get(name)}"
            raise ValueError(f"statistics are of another model: for {name}, the filters and the values of each are {numbers}")


def check_images(images: Images, at_least: Integer) -> None:
    """Raise a ValueError if there are fewer than `at_least` images."""
    if len(images) < at_least:
        raise ValueError(f"{len(images)} images, expected at least {at_least}, preferably a few hundred more")


def parts_of(model: OwnNetwork) -> dict[str, nn.Module]:
    """The stem (named "", with its batch norm and ReLU) and the blocks, front to back: the outputs of each are the inputs of the next."""
    stem = nn.Sequential(OrderedDict(conv1=model.conv1, bn1=model.bn1, relu=nn.ReLU()))
    return {"": stem, **blocks(model)}


def augmented(images: Images, seed: Seed = 0) -> Tensor:
    """All `images`, in random order, shifted and mirrored as in training, as one float32 tensor (N, 3, 32, 32)."""
    return augmented_in_order(images, seed)[0]


def augmented_in_order(images: Images, seed: Seed = 0) -> tuple[Tensor, Tensor]:
    """`augmented`, and for each of its rows the index of the image."""
    inputs, _, order = next(Batches(images, len(images), seed=seed).epoch(0))
    return inputs, order


@torch.no_grad()
def apply(part: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """The outputs of a part for many inputs, computed in batches."""
    return torch.cat([part(batch) for batch in inputs.split(256)])


class PartFit:
    """The stem or a block, and smaller parts fitted to replace it.

    Parameters
    ----------
    name, part : from `parts_of`
    original : float32 tensor (N, C, H, W), the part's inputs in the original network
    inputs : its inputs in the smaller network, of the same shape except for the channels of a narrowed stream
    statistics : of the original network, from `calibration.layer_statistics`
    reads, writes : the streams of the smaller network before and after the part, if they are narrower
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
        """Whether a plan makes the part smaller."""
        return self.is_narrowed or any(plan.get(layer, n_filters) < n_filters for layer, n_filters in self.layers.items())

    @functools.cached_property
    def entrance(self) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """A block's first convolution and its batch norm in the smaller network; solved for anew if they read a narrower stream."""
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
        """The inputs of the last convolution in the smaller network if no channel is removed."""
        inputs = self.inputs[:N_FITTED]
        with torch.no_grad():
            return F.relu(self.entrance[1](self.entrance[0](inputs))) if self.is_block else inputs

    @functools.cached_property
    def moments(self) -> Moments:
        """Moments of the last convolution's input patches and targets: the original stream minus the smaller network's shortcut."""
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
        """The channels in the order of their removal: the last one stays longest."""
        return eliminate(self.moments, self.importance)

    @functools.cached_property
    def correlations(self) -> Tensor:
        """Correlations between the activations of channels, (C, C), float64 on the CPU; 0 for channels that are always 0."""
        return torch.corrcoef(self.activations.transpose(0, 1).flatten(1)).double().cpu().nan_to_num(0.0)

    def selected(self, n_channels: Integer, selection: str, seed: Seed) -> Narrowed:
        """The channels that are kept between a block's convolutions, `n_channels` of them or, of k-means, fewer."""
        if selection == "k-means":
            variances = self.activations.transpose(0, 1).flatten(1).var(1).double().cpu()
            return medoids(self.correlations, self.inner_importance * variances, n_channels, seed)
        if selection == "elimination":
            kept = torch.tensor(self.elimination[-n_channels:])
        elif selection == "random":  # the same indices in all blocks of a width, whose channels have nothing in common
            kept = torch.randperm(len(self.correlations), generator=torch.Generator().manual_seed(int(seed)))[:n_channels]
        else:
            kept = self.part.conv1.weight.detach().flatten(1).norm(dim=1).cpu().topk(n_channels).indices
        return represented_by(kept.sort().values, self.correlations)

    def solve(self, plan: Plan, repair: str, *, selection: str = "elimination", seed: Seed = 0, with_statistics: bool = True) -> nn.Module:
        """The smaller part for a plan, by one of `REPAIRS`. For "reconstruction", it is the starting point, from least squares.

        Unless `with_statistics`, batch norms do not get the statistics of their inputs. Measuring these takes time and does not change the
        outputs.
        """
        if self.is_block and plan.get(self.first) == 0:
            return self.bridge
        kept = labels = torch.arange(self.conv.in_channels)
        if plan.get(self.first, len(kept)) < len(kept):
            narrowed = self.selected(plan[self.first], selection, seed)
            kept, labels = narrowed.kept, narrowed.labels
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
            if with_statistics:
                self._measure_statistics(small)
        elif self.is_block:
            _keep_statistics(small.bn1, self.part.bn1, kept)
            _keep_statistics(small.bn2, self.part.bn2, self.written)
        else:
            _keep_statistics(small.bn1, self.part.bn1, self.written)
        return small

    @torch.enable_grad()
    def reconstruct(self, small: nn.Module, *, n_steps: Count, learning_rate: PositiveReal, seed: Seed = 0, batch_size: Count = 32) -> None:
        """Train a part from `solve` to match the outputs of the original part, each channel weighted by its importance to the logits."""
        targets = apply(self.part, self.original)[:, self.written]
        weights = (self.importance / self.importance.mean()).to(targets).view(-1, 1, 1)
        small.requires_grad_()
        amp = has_fast_bfloat16(targets.device)
        optimizer = torch.optim.Adam(small.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        generator = torch.Generator().manual_seed(int(seed))
        for _ in range(n_steps):
            batch = torch.randint(len(targets), (batch_size,), generator=generator).to(targets.device)
            with torch.autocast(targets.device.type, torch.bfloat16, enabled=amp):
                outputs = small(self.inputs[batch])
            loss = ((outputs.float() - targets[batch]).square() * weights).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self._measure_statistics(small)

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
        """The first convolution for a narrower stream: with the slices of the removed channels added, except for the repair "none"."""
        if self.reads is None:
            return self.part.conv1, self.part.bn1
        weight = self.part.conv1.weight.detach().double().cpu()
        summed = torch.einsum("oihw,ik->okhw", weight, F.one_hot(self.reads.labels).double())
        return _convolution(weight[:, self.reads.kept] if repair == "none" else summed, self.part.stride), self.part.bn1

    @torch.no_grad()
    def _measure_statistics(self, small: nn.Module) -> None:
        """Give each batch norm of `small` the statistics of its inputs, without changing what `small` computes."""
        inputs = self.inputs[:N_FITTED]
        for conv, norm in ((small.conv1, small.bn1), (small.conv2, small.bn2)) if self.is_block else ((small.conv1, small.bn1),):
            outputs = conv(inputs)
            _set_statistics(norm, outputs.mean((0, 2, 3)), outputs.var((0, 2, 3)))
            inputs = F.relu(norm(outputs))


def _shared(
    weight: Tensor, shift: Tensor, moments: Moments, importance: Tensor, n_filters: Integer, stride: Integer, seed: Integer
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution with `n_filters` filters, and a batch norm that turns its outputs into about weight (N, D) times patch plus shift.

    Filters are clustered by the correlation of their outputs. The representative of a cluster is its principal component. Each channel gets
    the multiple of it that is nearest to the channel's own output.
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
    """A batch norm that computes scale · y + shift, with statistics for mean 0 and variance 1."""
    norm = nn.BatchNorm2d(len(scale)).eval()
    with torch.no_grad():
        norm.running_var.fill_(1 - norm.eps)
        norm.weight.copy_(scale)
        norm.bias.copy_(shift)
    return norm


@torch.no_grad()
def _set_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Change the statistics of a batch norm, and adapt its weight and bias so that it computes the same function."""
    factor, constant = affine(norm)
    mean, variance = mean.double().cpu(), variance.double().cpu()
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(factor * (variance + norm.eps).sqrt())
    norm.bias.copy_(constant + factor * mean)


def _keep_statistics(norm: nn.BatchNorm2d, original: nn.BatchNorm2d, channels: Tensor | slice = slice(None)) -> None:
    """Give `norm`, which computes these channels of `original` exactly or approximately, the statistics that `original` implies.

    By these, the output has mean β and standard deviation γ, even if it no longer does.
    """
    factor, constant = affine(norm)
    mean, deviation = (t.detach().double().cpu()[channels] for t in (original.bias, original.weight))
    dead = factor == 0
    safe = torch.where(dead, 1.0, factor)
    _set_statistics(norm, torch.where(dead, 0.0, (mean - constant) / safe), torch.where(dead, 1.0, (deviation / safe).square()))
