"""Narrower residual streams: channels are removed or folded throughout a stage, so that every tensor of the stage shrinks.

The stream of a stage is written by the stem, or by the shortcut from the stage before, and by the last convolution of each of its blocks.
It is read by their first convolutions, and by the next stage or the linear layer. All of them must agree on its channels.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import Integer, Seed
from ..clustering import cluster_points, distances_to_centroids, usable_weights
from ..compaction import expanded
from ..model import Block, OwnNetwork, ResNet, affine, blocks, with_tensors

STAGES = ("layer1", "layer2", "layer3")
N_VALUES = 20_000  # of each channel, at each place where the stream is observed, for correlations


@dataclasses.dataclass(frozen=True)
class Narrowed:
    """The channels of a stream, or of the inside of a block, that represent all of them.

    Attributes
    ----------
    kept : (k,) the kept channels, in order
    labels : (C,) for each channel, the number of the kept one that represents it, counted from 0
    """

    kept: Tensor
    labels: Tensor


def stage_of(part: str) -> int:
    """The number of the stage, from 0, whose stream a part writes; the stem writes the first. Parts are named as in `parts.parts_of`."""
    return int(part[5]) - 1 if part else 0


def read_by(part: str) -> int | None:
    """The number of the stage, from 0, whose stream a block reads; None for the stem."""
    return None if not part else max(0, stage_of(part) - part.endswith(".0"))


def sources_of(block: Block) -> list[int]:
    """For each channel after a block's shortcut, the input channel that the shortcut copies there, or -1."""
    if block.sources is not None:
        return [-1 if source == block.in_channels else source for source in block.sources.tolist()]
    before = block.missing_channels // 2
    return [i if 0 <= i < block.in_channels else -1 for i in range(-before, block.in_channels + block.missing_channels - before)]


def bridge(block: Block, reads: Narrowed | None, writes: Narrowed | None) -> Block:
    """A dropped block with the shortcut of `block`, between streams that may be narrower."""
    sources = sources_of(block)
    in_channels, out_channels = block.in_channels, len(sources)
    if reads is not None:
        sources = [source if source < 0 else int(reads.labels[source]) for source in sources]
        in_channels = len(reads.kept)
    if writes is not None:
        sources = [sources[channel] for channel in writes.kept.tolist()]
        out_channels = len(writes.kept)
    plain = Block(in_channels, 0, out_channels, block.stride)
    return plain if sources == sources_of(plain) else Block(in_channels, 0, out_channels, block.stride, sources=sources)


def medoids(correlations: Tensor, importance: Tensor, n_clusters: Integer, seed: Seed = 0) -> Narrowed:
    """The medoids of channels clustered by k-means of their correlations (C, C), and for each channel the medoid most correlated with it.

    `importance` (C,) weights the channels: how much the logits depend on each, times its variance.
    """
    eigenvalues, vectors = torch.linalg.eigh(correlations)
    points, weights = vectors * eigenvalues.clamp(min=0).sqrt(), usable_weights(importance.sqrt())
    members, squared = distances_to_centroids(points, cluster_points(points, n_clusters, weights, seed=seed), weights)
    return represented_by(torch.where(members > 0, squared, torch.inf).argmin(1).sort().values, correlations)


def represented_by(kept: Tensor, correlations: Tensor) -> Narrowed:
    """These channels (k,), and for each channel the kept one most correlated with it, by the correlations (C, C); itself if it is kept."""
    labels = correlations[:, kept].argmax(1)
    labels[kept] = torch.arange(len(kept))
    return Narrowed(kept, labels)


@torch.no_grad()
def narrow(seen: Sequence[Tensor], n_channels: Integer, importance: Tensor, seed: Seed = 0) -> Narrowed:
    """The channels of a stream that represent all of them, by the correlations of their activations.

    Parameters
    ----------
    seen : activations (N, C, H, W) of the stream at each place where it is observed: after the stem and each block of the stage
    importance : (C,), how much the logits depend on each channel
    """
    generator = torch.Generator().manual_seed(int(seed))
    places = [tensor.transpose(0, 1).flatten(1) for tensor in seen]
    picked = [torch.randint(values.shape[1], (N_VALUES,), generator=generator).to(values.device) for values in places]
    values = torch.cat([values[:, columns] for values, columns in zip(places, picked, strict=True)], 1).double().cpu()
    correlations = torch.corrcoef(values).nan_to_num(0.0)
    narrowed = medoids(correlations, importance.double().cpu() * values.var(1), n_channels, seed)
    kept = narrowed.kept.tolist()
    if len(kept) < n_channels:  # some channels are the same; a stream has the width that is asked for
        others = [channel for channel in range(len(correlations)) if channel not in kept]
        narrowed = represented_by(torch.tensor(sorted([*kept, *others[: n_channels - len(kept)]])), correlations)
    return narrowed


def fold(model: OwnNetwork, labels: Mapping[str, Sequence[Integer]]) -> ResNet:
    """A network with narrower streams: for each cluster of channels, writers are averaged and readers summed (*model folding*, Wang et al.,
    ICLR 2025), without data. Exact if the channels of a cluster are equal everywhere on the stream.

    Parameters
    ----------
    model : is not changed
    labels : for each stage to be narrowed ("layer1", "layer2", "layer3"), the cluster number of each channel, from 0

    Raises
    ------
    ValueError : an unknown stage; labels for another number of channels, or with a gap; widths that would decrease along the network
    """
    model = expanded(model)
    widths = model.config["stage_widths"]
    groups = []
    for stage, width in zip(STAGES, widths, strict=True):
        of_channels = [int(label) for label in labels.get(stage, range(width))]
        if len(of_channels) != width or sorted(set(of_channels)) != list(range(max(of_channels) + 1)):
            raise ValueError(
                f"labels[{stage!r}] is {of_channels}, expected the number of a cluster for each of {width} channels, from 0 without a gap"
            )
        groups.append(F.one_hot(torch.tensor(of_channels)).double())  # (C, k)
    if unknown := [stage for stage in labels if stage not in STAGES]:
        raise ValueError(f"labels names {unknown[0]!r}, expected one of {', '.join(STAGES)}")
    check_widths([members.shape[1] for members in groups])
    state = dict(model.state_dict())
    _fold_writer(state, "", groups[0])
    shortcuts = {}
    for name, block in blocks(model).items():
        before, behind = groups[read_by(name)], groups[stage_of(name)]
        sources = torch.tensor(sources_of(block))
        if name.endswith(".0") and name != "layer1.0":
            brought = F.one_hot(sources.clamp(min=0), len(before)).double() * (sources >= 0).unsqueeze(1) @ before  # (C behind, k before)
            most, source = (behind.T @ brought).max(1)
            folded_sources = torch.where(most > 0, source, -1).tolist()
            if folded_sources != sources_of(Block(before.shape[1], 0, behind.shape[1], block.stride)):
                shortcuts[name] = folded_sources
        if not block.dropped:
            state[f"{name}.conv1.weight"] = _summed(state[f"{name}.conv1.weight"], before)
            _fold_writer(state, f"{name}.", behind)
    state["fc.weight"] = _summed(state["fc.weight"], groups[-1])
    config = {"stage_widths": tuple(members.shape[1] for members in groups), "shortcuts": shortcuts}
    inner = {f"{name}.conv1": 0 if block.dropped else block.conv1.out_channels for name, block in blocks(model).items()}
    small = with_tensors(model.config | config | {"inner_widths": inner}, state)
    return small.to(next(model.parameters()).device, memory_format=torch.channels_last).train(model.training)


def check_widths(widths: Sequence[Integer]) -> None:
    """Raise a ValueError for stage widths that decrease along the network: its shortcuts cannot merge channels."""
    if not 1 <= widths[0] <= widths[1] <= widths[2]:
        raise ValueError(f"the streams would have {', '.join(map(str, widths))} channels, expected none below the one before")


def _summed(weight: Tensor, members: Tensor) -> Tensor:
    return torch.einsum("oi...,ik->ok...", weight.double().cpu(), members).to(weight)


def _fold_writer(state: dict[str, Tensor], prefix: str, members: Tensor) -> None:
    """Average the last convolution of a part and its batch norm over clusters; `members` is (C, k), 1 for members.

    Its filters absorb the factor of their batch norm, so that the contributions to the stream are averaged.
    """
    conv, bn = ("conv1", "bn1") if not prefix else ("conv2", "bn2")
    shares = (members / members.sum(0)).T
    norm = nn.BatchNorm2d(len(members))
    norm.load_state_dict({key: state[f"{prefix}{bn}.{key}"] for key in norm.state_dict()})
    factor, constant = affine(norm)
    weight = state[f"{prefix}{conv}.weight"]
    folded = torch.einsum("kc,cihw->kihw", shares, weight.double().cpu() * factor.view(-1, 1, 1, 1))
    mean = shares @ (factor * norm.running_mean.double())
    deviation = shares @ (factor.abs() * norm.running_var.double().sqrt())
    state[f"{prefix}{conv}.weight"] = folded.to(weight)
    values = {"running_mean": mean, "running_var": deviation.square(), "weight": (deviation.square() + norm.eps).sqrt()}
    for key, value in (values | {"bias": shares @ constant + mean}).items():
        state[f"{prefix}{bn}.{key}"] = value.to(weight)
