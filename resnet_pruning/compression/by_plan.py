"""A compact network for a plan, in which the remaining filters compensate for the removed ones: no labels, part by part, front to back.

`compaction.compact` keeps the function of a network with replaced filters, up to rounding. `compress_by_plan` approximates the function of
the network *before* pruning. Each part (the stem, then each block) gets the inputs that the smaller network actually produces, and is
fitted to the original part's outputs on the original inputs. It thus also corrects the errors of the parts before it.

Inside a block, some channels are kept. The others are removed, with the slices of ``conv2`` that read them. A block that keeps none is
dropped. On the residual stream, either the channels of a cluster share one filter, which is computed once and scaled for each channel by
batch norm; or the stream of a whole stage gets fewer channels, and the layers that read it are adapted.

================  ===========================================================================================================
repair            treatment of the removed channels
================  ===========================================================================================================
"none"            nothing
"summed"          the slice that reads each is added to the slice of the kept channel most correlated with it
"scaled"          the same, times the positive factor between the two activations (ReLU(a·x) = a·ReLU(x); Kim et al., *Neuron
                  Merging*, NeurIPS 2020, take it from the weights)
"least squares"   ``conv2`` is solved for anew (He et al., *Channel Pruning*, ICCV 2017)
"reconstruction"  the same, then the whole part is trained for a few hundred steps to match the outputs of the original one (as
                  Li et al., *BRECQ*, ICLR 2021, do for quantization)
================  ===========================================================================================================

Up to "scaled", batch norm keeps the statistics of the original network, which no longer fit. From "least squares" on, it has those of the
smaller one.
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
from .parts import N_FITTED, N_STATISTICS, PartFit, apply, augmented, check_images, check_statistics, parts_of
from .streams import STAGES, Narrowed, bridge, check_widths, narrow, read_by, sources_of, stage_of

REPAIRS = ("none", "summed", "scaled", "least squares", "reconstruction")
SELECTIONS = ("k-means", "elimination", "L2 norm", "random")


@torch.random.fork_rng(devices=[])  # new modules draw random weights, which must not change the caller's generator
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
    """The compact network of a plan, with the planned numbers of channels inside each block and of filters computed on the residual stream.

    There are fewer if more would make no difference, because channels or their inputs are always 0.

    Parameters
    ----------
    model : is not changed; a compact one is expanded first, see `compaction.expanded`
    plan : by layer. For ``conv1`` of a block, the number of channels to keep, or 0 to drop the block; for the stem and ``conv2``, the
        number of clusters of filters, each computed once; for ``layer1``, ``layer2`` and ``layer3``, the number of channels of that stage's
        stream. Layers that are not named keep all filters
    images : training images; labels are not used. They are shifted and mirrored as in training. Least squares takes up to 512 of them,
        reconstruction all: 2,000 are enough
    repair : one of `REPAIRS`, see the top of this module
    selection : how the kept channels are chosen. "k-means" clusters activations by correlation and keeps each cluster's medoid;
        "elimination" removes one channel at a time, always the one whose loss least squares in ``conv2`` repairs best (Frantar & Alistarh,
        *Optimal Brain Compression*, NeurIPS 2022, for groups of weights); the controls are "L2 norm", which keeps the channels
        whose filters have the largest, and "random"
    statistics : from `calibration.layer_statistics` for this model, computed here if not given
    n_steps, learning_rate : of the reconstruction of each part: Adam on batches of 32, with a cosine schedule to 0
    seed : of augmentation, k-means, the random choice and the reconstruction's batches
    progress : whether to show a progress bar

    Raises
    ------
    ValueError : an unknown repair or selection; a plan or statistics for another model, or a plan that narrows the stream from one stage to
        the next; fewer than 100 images
    """
    if repair not in REPAIRS:
        raise ValueError(f"repair is {repair!r}, expected one of {', '.join(REPAIRS)}")
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}, expected one of {', '.join(SELECTIONS)}")
    check_images(images, 100)
    model, images = expanded(model).eval(), images.beside(model)
    check_compression_plan(model, plan)
    statistics = statistics or layer_statistics(model, images[:N_STATISTICS], seed=seed)
    check_statistics(statistics, model)
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
    """The kept channels of each stage's stream that a plan narrows, by the number of the stage."""
    seen: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    # If all blocks of a stage are dropped already, nothing was measured behind it, and its channels count the same.
    importance = {i: torch.ones(width, dtype=torch.double) for i, width in enumerate(model.config["stage_widths"])}
    for name, part in parts_of(model).items():
        inputs = apply(part, inputs)
        seen[stage_of(name)].append(inputs)
        if (writer := f"{name}.conv2" if name else "conv1") in statistics:
            importance[stage_of(name)] = statistics[writer].importance  # of the last block that is not dropped
    wanted = {i: plan[name] for i, name in enumerate(STAGES) if plan.get(name, width := model.config["stage_widths"][i]) < width}
    return {i: narrow(seen[i], n_channels, importance[i], seed) for i, n_channels in wanted.items()}


@torch.no_grad()
def _linear(linear: nn.Linear, original: Tensor, inputs: Tensor, reads: Narrowed | None, repair: str) -> nn.Linear:
    """The linear layer for a narrower stream: by least squares on the logits, or with the weights of removed channels added or dropped."""
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
    """A copy that computes the same function, with each filter scaled to the root mean square norm of the filters of that layer in `other`.

    Batch norm removes the scale of a filter, so the same training step turns a smaller filter further. In a network that was solved for, as
    by `compress_by_plan`, the norms are arbitrary; those of a trained network suit its learning rates.

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
        rescale_filters(conv, norm, gains)
    return model


def _assembled(model: ResNet, parts: Mapping[str, nn.Module], linear: nn.Linear, streams: Mapping[int, Narrowed]) -> ResNet:
    """The network that consists of these parts, with the other settings of `model`."""
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
