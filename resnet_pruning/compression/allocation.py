"""How many clusters each layer gets under a budget, from errors that are measured once.

The error of a layer with k clusters is what it does alone: the mean squared change of the logits, with the part that it is in fitted by
least squares and all others as they were. If the errors of several layers are independent, their squares add, and the best plan for any
budget is found by dynamic programming (as in Frantar & Alistarh, *Optimal Brain Compression*, NeurIPS 2022).
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import cost, plans
from ..arguments import Count, Integer, Real, Seed
from ..calibration import LayerStatistics, layer_statistics
from ..compaction import expanded
from ..data import Images
from ..deployment.runtimes import prepared
from ..deployment.timing import interleaved
from ..hardware import default_device, full_float32
from ..model import Block, OwnNetwork, ResNet, blocks, convolutions
from .knapsack import cheapest
from .parts import N_FITTED, N_STATISTICS, PartFit, apply, augmented, check_images, parts_of
from .plan_cost import cost_of_plan

SHARES = tuple(k / 16 for k in range(1, 17))


@full_float32()
@torch.no_grad()
def layer_errors(
    model: OwnNetwork,
    images: Images,
    *,
    shares: Sequence[Real] = SHARES,
    statistics: Mapping[str, LayerStatistics] | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """What each layer alone does to the logits with fewer clusters, each layer fitted by least squares; labels are not used.

    Parameters
    ----------
    model : is not changed
    images : training images; the first 512 are fitted to, and judged on are as many of those behind them as there are, up to 512
    shares : of a layer's filters, to measure
    statistics : from `calibration.layer_statistics` for this model, computed here if not given
    seed : of augmentation and k-means
    progress : whether to show a bar

    Returns
    -------
    DataFrame with the columns layer, n_clusters and error: the mean squared change of the logits as a share of their variance. The
    whole layer is there too, with error 0

    Raises
    ------
    ValueError : images of another shape or fewer than 200; a share outside (0, 1]
    """
    check_images(images, 200)
    if bad := [share for share in shares if not 0 < share <= 1]:
        raise ValueError(f"shares has {bad[0]!r}, expected numbers above 0 and at most 1")
    model, images = expanded(model).eval(), images.beside(model)
    statistics = statistics or layer_statistics(model, images[:N_STATISTICS], seed=seed)
    n_fitted = min(N_FITTED, len(images) // 2)
    inputs = augmented(images[: n_fitted + N_FITTED], seed)
    parts = parts_of(model)
    logits = _logits(model, [*parts.values()], inputs[n_fitted:])
    rows = []
    with tqdm(total=len(convolutions(model)), desc="errors", unit="layer", disable=not progress) as bar:
        for i, (name, part) in enumerate(parts.items()):
            fit = PartFit(name, part, inputs[:n_fitted], inputs[:n_fitted], statistics)
            for layer, whole in fit.layers.items():
                for n_clusters in _numbers(whole, shares):
                    error = 0.0
                    if n_clusters < whole:
                        small = fit.solve({layer: n_clusters}, "least squares", seed=seed)
                        changed = _logits(model, [small, *list(parts.values())[i + 1 :]], inputs[n_fitted:])
                        error = change_of_logits(changed, logits)
                    rows.append({"layer": layer, "n_clusters": n_clusters, "error": error})
                bar.update()
            inputs = apply(part, inputs)
    return pd.DataFrame(rows)


def by_sensitivity(
    model: OwnNetwork,
    images: Images | None = None,
    macs: Real | None = None,
    *,
    latency: Real | None = None,
    sharing: bool = True,
    errors: pd.DataFrame | None = None,
    timings: pd.DataFrame | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """The plan with the smallest sum of errors whose merged network (see `compression.compress_by_plan`) stays within a budget.

    Parameters
    ----------
    model : is not changed
    images : training images to measure `errors` on; not needed where these are given
    macs : the budget, as a share of the model's MACs
    latency : a budget of time instead, as a share of the model's; always without sharing
    sharing : whether filters on the residual stream may be shared too. That saves MACs, but copying what they compute takes about
        the time that is saved; without it, only channels inside blocks go
    errors : from `layer_errors`
    timings : from `part_timings`; with a budget of time, measured here in eager mode if not given
    progress : whether measurements show bars

    Raises
    ------
    ValueError : none or two budgets, a budget outside (0, 1] or below what the smallest plan takes, neither images nor errors, errors
        or timings that lack a part of the model
    """
    kind, budget = check_budget(macs, latency)
    if errors is None:
        if images is None:
            raise ValueError("neither images nor errors are given, expected one of them")
        errors = layer_errors(model, images, progress=progress)
    if missing := set(convolutions(model)) - set(errors.layer):
        raise ValueError(f"errors lacks {', '.join(sorted(missing))}, expected every convolution of the model")
    if latency is None:
        by_layer = cost.macs_by_layer(expanded(model))
        total, fixed = cost.macs(model), by_layer["fc"]
        if not sharing:
            inside = {layers[0] for layers in _layers_of_parts(model)[1:]}
            errors = errors[errors.layer.isin(inside) | (errors.error == 0)]
        options = [_options_by_macs(layers, by_layer, errors) for layers in _layers_of_parts(model)]
    else:
        timings = part_timings(model, progress=progress) if timings is None else timings
        timed = [layers[0] for layers in _layers_of_parts(model)]
        if missing := set(timed) - set(timings.layer):
            raise ValueError(f"timings lacks {', '.join(sorted(missing))}, expected the stem and the first convolution of every block")
        timings = timings[timings.layer.isin(timed)]
        total, fixed = timings.loc[timings.groupby("layer").n_clusters.idxmax()].seconds.sum(), 0
        options = [_options_by_time(layers, timings, errors) for layers in _layers_of_parts(model)]
    least = (fixed + sum(min(option.cost for option in part) for part in options)) / total
    if least > budget:
        raise ValueError(f"{kind} is {budget:g}, expected at least {least:.4f}, which the smallest plan takes")
    costs = [np.array([(option.cost, option.error) for option in part], dtype=float) for part in options]
    chosen = cheapest(costs, budget * total - fixed)
    return {layer: int(n) for part, index in zip(options, chosen, strict=True) for layer, n in part[index].plan.items()}


def uniform_inside_blocks(model: OwnNetwork, macs: Real) -> dict[str, int]:
    """The same share of the channels inside each block, as large as a budget of MACs allows: what sensitivity is compared with.

    Raises
    ------
    ValueError : a budget outside (0, 1], or below what is left with one channel in each block
    """
    _, budget = check_budget(macs, None)
    return largest_within(
        lambda share: plans.uniform_fraction(model, share, "*.conv1"),
        lambda plan: cost_of_plan(model, plan, merged=True)[1],
        budget * cost.macs(model),
    )


def largest_within(
    build: Callable[[Real], plans.Plan],
    cost: Callable[[plans.Plan], Real],
    budget: Real,
    smallest: Real = 0.01,
    tolerance: Real = 1e-4,
) -> dict[str, int]:
    """The largest plan of a family, from ``build(smallest)`` to ``build(1.0)``, whose cost is within `budget`.

    For comparisons at equal cost: ``largest_within(lambda f: first_last_heavy(model, f, 1.0), cost_of_plan, budget)``. The
    fraction is found by bisection. Where the next plan of the family, in which many layers grow at once, would cost too
    much, single layers take its numbers, front to back, as long as the budget allows. Neither `cost` nor any layer's number
    may fall when the fraction grows.

    Raises
    ------
    ValueError : even the smallest plan costs more
    """
    if (least := cost(build(smallest))) > budget:
        raise ValueError(f"budget is {budget:g}, expected at least {least:g}, which the smallest plan costs")
    low, high = smallest, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(build(middle)) <= budget else (low, middle)
    plan = dict(build(low))
    for name, n_clusters in build(high).items():
        if cost(larger := plan | {name: n_clusters}) <= budget:
            plan = larger
    return plan


def check_budget(macs: Real | None, latency: Real | None) -> tuple[str, float]:
    """The one of the two that is given, with its name; a ValueError if it is not exactly one, or no share."""
    if (macs is None) == (latency is None):
        raise ValueError(f"macs is {macs} and latency is {latency}, expected one of them")
    kind, budget = ("macs", macs) if latency is None else ("latency", latency)
    return kind, plans.check_share(budget, kind)


class Option(NamedTuple):
    """One way to make a part smaller: its clusters, by layer, what it costs, and the error that it makes."""

    plan: dict[str, int]
    cost: float
    error: float


def _options_by_macs(layers: list[str], macs: Mapping[str, Integer], errors: pd.DataFrame) -> list[Option]:
    """All combinations of the measured numbers of clusters of a part's layers; the stem has one layer, a block two."""
    tables = [errors[errors.layer == layer] for layer in layers]
    options = []
    for rows in itertools.product(*(table.itertuples() for table in tables)):
        total, share = 0, Fraction(1)
        for row, table in zip(rows, tables, strict=True):  # fewer channels inside a block save in both of its convolutions
            share *= Fraction(row.n_clusters, int(table.n_clusters.max()))
            total += share * macs[row.layer]
        options.append(Option({row.layer: row.n_clusters for row in rows}, int(total), sum(row.error for row in rows)))
    return options


def _options_by_time(layers: list[str], timings: pd.DataFrame, errors: pd.DataFrame) -> list[Option]:
    """The numbers of channels inside a block that are both timed and measured; the stem as it is."""
    table = timings[timings.layer == layers[0]].merge(errors, on=["layer", "n_clusters"])
    if len(layers) == 1:
        return [Option({}, table.seconds.iloc[-1], 0.0)]
    return [Option({row.layer: row.n_clusters}, row.seconds, row.error) for row in table.itertuples()]


@torch.random.fork_rng(devices=[])
def part_timings(
    model: OwnNetwork,
    batch_size: Count = 256,
    runtime: str = "eager",
    *,
    shares: Sequence[Real] = SHARES[1::2],
    rounds: Integer = 10,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How long the stem, and each block with fewer channels inside, takes on this machine.

    Parameters
    ----------
    model : gives the shapes; blocks of one shape are timed once
    batch_size, runtime, rounds, device, progress : see `deployment.timing.latency`
    shares : of the channels inside a block, to time

    Returns
    -------
    DataFrame with the columns layer (the stem's, or a block's first convolution), n_clusters and seconds, the median of all rounds
    """
    device = torch.device(device or default_device())
    inputs = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    runs, of_layer = {}, {}
    for name, part in parts_of(copy.deepcopy(model).to(device).eval()).items():
        if name:
            in_channels, whole, out_channels = part.conv1.in_channels, part.conv1.out_channels, part.conv2.out_channels
            sizes = _numbers(whole, shares)
        else:
            sizes = [part.conv1.out_channels]
        for n in sizes:
            shape = (*inputs.shape, part.stride, n, out_channels) if name else ("stem",)
            of_layer[f"{name}.conv1".removeprefix("."), n] = shape
            if shape not in runs:
                smaller = Block(in_channels, n, out_channels, part.stride).to(device) if name else part
                runs[shape], _ = prepared(smaller, inputs, runtime)
        inputs = apply(part, inputs)
    seconds = interleaved(runs, rounds, progress).median()
    return pd.DataFrame([{"layer": layer, "n_clusters": n, "seconds": seconds[shape]} for (layer, n), shape in of_layer.items()])


def _numbers(whole: Integer, shares: Sequence[Real]) -> list[int]:
    """The numbers of filters that are these shares of a layer's, at least one, and the whole layer."""
    return sorted({max(1, round(share * whole)) for share in shares} | {whole})


def _layers_of_parts(model: ResNet) -> list[list[str]]:
    return [["conv1"], *([f"{name}.conv1", f"{name}.conv2"] for name in blocks(model))]


def _logits(model: ResNet, parts: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """What the network gives for the inputs of the first of its last `parts`."""
    for part in parts:
        inputs = apply(part, inputs)
    return model.fc(inputs.mean((2, 3)))


def change_of_logits(changed: Tensor, exact: Tensor) -> float:
    """The mean squared change of logits (N, n_classes), as a share of their variance over images."""
    return float((changed - exact).square().sum(1).mean() / exact.var(0).sum())
