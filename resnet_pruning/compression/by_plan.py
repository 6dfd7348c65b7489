"""A compact network for a plan, in which what is left makes up for what was taken away: no labels, part by part, front to back.

Where `compaction.compact` keeps a replaced network's function to the last digit, `compress_by_plan` keeps that of the network *before* it
was pruned, as well as it can: each part (the stem, then each block) gets the inputs that the smaller network really produces, and is
fitted to what the original network made of its own, so that it also corrects the errors of the parts before it.

Inside a block, some channels are kept and the rest go, and with them the slices of ``conv2`` that read them; a block of which none are
kept is dropped. On the residual stream, either the filters of a cluster share one filter, computed once, of which each channel has a
multiple in its batch norm; or the stream of a whole stage gets fewer channels, and what reads it is solved for anew.

================  ===========================================================================================================
repair            what is done about the channels that go
================  ===========================================================================================================
"none"            nothing
"summed"          the slices that read them are added to that of the kept channel that each is most correlated with
"scaled"          the same, times the positive factor between the two activations (ReLU(a·x) = a·ReLU(x); Kim et al., *Neuron
                  Merging*, NeurIPS 2020, take it from the weights)
"least squares"   ``conv2`` is solved for anew (He et al., *Channel Pruning*, ICCV 2017)
"reconstruction"  and then the whole part is trained for some hundred steps to give what the original one gives (as Li et al.,
                  *BRECQ*, ICLR 2021, do for quantization)
================  ===========================================================================================================

Up to "scaled", batch norm holds the statistics of the original network, which no longer fit; from "least squares" on it holds those of
the smaller one.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import Count, PositiveReal, Seed
from ..calibration import LayerStatistics, layer_statistics
from ..compaction import expanded
from ..data import Images
from ..hardware import full_float32
from ..model import AnyNetwork, Block, Network, OwnNetwork, ResNet, SharedConv2d, batch_norms, convolutions, with_tensors
from ..plans import Plan, check_n_clusters, check_plan
from ..pruning import rescale_filters
from .least_squares import Moments
from .parts import N_FITTED, N_STATISTICS, PartFit, apply, augmented, check_images, parts_of
from .streams import STAGES, Narrowed, bridge, check_widths, narrow, read_by, sources_of, stage_of

REPAIRS = ("none", "summed", "scaled", "least squares", "reconstruction")
SELECTIONS = ("k-means", "elimination")


@torch.random.fork_rng(devices=[])  # modules are made with random weights, which are none of the caller's
@full_float32()
def compress_by_plan(
    model: OwnNetwork,
    plan: Plan,
    images: Images,
    repair: str = "reconstruction",
    *,
    selection: str = "elimination",
    statistics: Mapping[str, LayerStatistics] | None = None,
    n_steps: Count = 400,
    learning_rate: PositiveReal = 1e-3,
    seed: Seed = 0,
    progress: bool = True,
) -> ResNet:
    """The compact network of a plan: as many channels inside each block as planned, as many filters computed on the residual stream.

    There are fewer where more would make no difference: among channels that are always 0, or for inputs that are.

    Parameters
    ----------
    model : is not changed; a compact one is taken as the network that it computes, see `compaction.expanded`
    plan : by layer. For ``conv1`` of a block the number of channels that are kept, or 0 to drop the block; for the stem and ``conv2`` the
        number of clusters of filters, of which each is computed once; for ``layer1``, ``layer2`` and ``layer3`` the number of channels of
        that stage's stream. Layers that are not named are kept whole
    images : training images, of which the labels are not used. They are shifted and mirrored as in training. Least squares takes the
        first 512, reconstruction all: 2,000 do
    repair : one of `REPAIRS`, see the top of this module
    selection : how the kept channels are chosen. "k-means" clusters activations by correlation and keeps each cluster's medoid;
        "elimination" takes out one channel after the other, each time the one whose loss least squares in ``conv2`` repairs
        best (Frantar & Alistarh, *Optimal Brain Compression*, NeurIPS 2022, for groups of weights)
    statistics : from `calibration.layer_statistics` for this model, computed here if not given
    n_steps, learning_rate : of the reconstruction of each part: Adam on batches of 32, with a cosine to 0
    seed : of augmentation, k-means and the reconstruction's batches
    progress : whether to show a bar

    Raises
    ------
    ValueError : an unknown repair or selection, a plan for another model or one by which the stream would become narrower from one stage to
        the next, images of another shape or fewer than 100
    """
    if repair not in REPAIRS:
        raise ValueError(f"repair is {repair!r}, expected one of {', '.join(REPAIRS)}")
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}, expected one of {', '.join(SELECTIONS)}")
    check_images(images, 100)
    model, images = expanded(model).eval(), images.beside(model)
    check_compression_plan(model, plan)
    statistics = statistics or layer_statistics(model, images[:N_STATISTICS], seed=seed)
    original = augmented(images if repair == "reconstruction" else images[:N_FITTED], seed)
    inputs = original
    streams = narrowed_streams(model, plan, original[:N_FITTED], statistics, seed)
    parts = {}
    for name, part in tqdm(parts_of(model).items(), desc="compressing", unit="part", disable=not progress):
        reads, writes = streams.get(read_by(name)), streams.get(stage_of(name))
        fit = None if name and part.dropped else PartFit(name, part, original, inputs, statistics, reads, writes)
        changes = inputs is not original or (fit.changes(plan) if fit else (reads or writes) is not None)
        if fit is None:
            parts[name] = bridge(part, reads, writes).to(inputs.device)
        elif not changes:
            parts[name] = copy.deepcopy(part)
        else:
            parts[name] = fit.solve(plan, repair, selection=selection, seed=seed)
            if repair == "reconstruction" and [*parts[name].parameters()]:
                fit.reconstruct(parts[name], n_steps=n_steps, learning_rate=learning_rate, seed=seed)
        original, inputs = (apply(part, original), apply(parts[name], inputs)) if changes else (after := apply(part, original), after)
    return _assembled(model, parts, _linear(model.fc, original, inputs, streams.get(2), repair), streams)


def check_compression_plan(model: ResNet, plan: Plan) -> None:
    """Raise a ValueError for a plan that `compress_by_plan` cannot follow."""
    dropped = [name for name, n in plan.items() if n == 0 and name.endswith(".conv1")]
    check_plan(model, {name: n for name, n in plan.items() if name not in (*STAGES, *dropped)})
    check_plan(model, dict.fromkeys(dropped, 1))
    for name in STAGES:
        check_n_clusters(plan.get(name, 1), name)
    check_widths([min(plan.get(name, width), width) for name, width in zip(STAGES, model.config["stage_widths"], strict=True)])


def narrowed_streams(
    model: ResNet, plan: Plan, inputs: Tensor, statistics: Mapping[str, LayerStatistics], seed: Seed
) -> dict[int | None, Narrowed]:
    """The channels that stay of each stage's stream, by the number of the stage, for those that a plan narrows."""
    seen: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    importance = {}
    for name, part in parts_of(model).items():
        inputs = apply(part, inputs)
        seen[stage_of(name)].append(inputs)
        if (writer := f"{name}.conv2" if name else "conv1") in statistics:
            importance[stage_of(name)] = statistics[writer].importance  # of the last block that is there
    wanted = {i: plan[name] for i, name in enumerate(STAGES) if plan.get(name, width := model.config["stage_widths"][i]) < width}
    return {i: narrow(seen[i], n_channels, importance[i], seed) for i, n_channels in wanted.items()}


@torch.no_grad()
def _linear(linear: nn.Linear, original: Tensor, inputs: Tensor, reads: Narrowed | None, repair: str) -> nn.Linear:
    """The linear layer for a narrower stream: by least squares of the logits, or with the weights of the channels that went added."""
    if reads is None:
        return linear
    small = nn.Linear(len(reads.kept), linear.out_features)
    weight, bias = linear.weight.double().cpu(), linear.bias.double().cpu()
    if repair in ("least squares", "reconstruction"):
        conv = nn.Conv2d(len(reads.kept), linear.out_features, 1)
        logits = linear(original.mean((2, 3))).unflatten(1, (-1, 1, 1))
        moments = Moments.of(conv, inputs.mean((2, 3), keepdim=True), logits)
        weight = moments.solution()
        bias = moments.target_mean - weight @ moments.mean
    else:
        weight = weight[:, reads.kept] if repair == "none" else weight @ F.one_hot(reads.labels).double()
    small.weight.copy_(weight)
    small.bias.copy_(bias)
    return small


def rescale_like(model: Network, other: AnyNetwork) -> nn.Module:
    """A copy that computes the same function, in which each filter has the norm that the filters of that layer in `other` have on average.

    Batch norm takes the scale of a filter out, so the smaller the filter, the further the same step of training turns it. Where
    a network was solved for, as by `compress_by_plan`, norms say nothing; those of a trained one fit its learning rates.

    Parameters
    ----------
    model, other : with the same convolutions by name; their widths may differ

    Raises
    ------
    ValueError : layers that are not in `other`
    """
    model = copy.deepcopy(model)
    norms, others = batch_norms(model), convolutions(other)
    if missing := [name for name in norms if name not in others]:
        raise ValueError(f"{', '.join(missing)} of the model is not in the other network, which has {', '.join(others)}")
    for name, norm in norms.items():
        conv = convolutions(model)[name]
        own = conv.weight.detach().double().cpu().flatten(1).norm(dim=1)
        usual = others[name].weight.detach().double().cpu().flatten(1).norm(dim=1).square().mean().sqrt()
        gains = torch.where((own == 0) | (usual == 0), 1.0, usual / own)
        rescale_filters(conv, norm, gains, gains[conv.labels.cpu()] if isinstance(conv, SharedConv2d) else gains)
    return model


def _assembled(model: ResNet, parts: Mapping[str, nn.Module], linear: nn.Linear, streams: Mapping[int, Narrowed]) -> ResNet:
    """The network of the configuration that `model` would have with these parts."""
    widths = tuple(len(streams[i].kept) if i in streams else width for i, width in enumerate(model.config["stage_widths"]))
    config = {"stage_widths": widths, "inner_widths": {}, "sharing": {}, "shortcuts": {}}
    state = {f"fc.{key}": tensor for key, tensor in linear.state_dict().items()}
    for name, part in parts.items():
        prefix = f"{name}." if name else ""
        state |= {prefix + key: tensor for key, tensor in part.state_dict().items()}
        for last in ("conv1", "conv2"):
            if isinstance(conv := getattr(part, last, None), SharedConv2d):
                config["sharing"][prefix + last] = conv.labels.tolist()
        if isinstance(part, Block):
            config["inner_widths"][f"{name}.conv1"] = 0 if part.dropped else part.conv1.out_channels
            if part.sources is not None:
                config["shortcuts"][name] = sources_of(part)
    small = with_tensors(model.config | config, state)
    return small.to(next(model.parameters()).device, memory_format=torch.channels_last).eval()
