"""Choose the number of clusters of each layer under a budget of MACs or of time, from errors and times that are measured once.

The error of a layer with k clusters is measured for that layer alone: the mean squared change of the logits, with the layer's part fitted
by least squares and all other parts unchanged. If a block is dropped, the next part is fitted; if a stage's stream is narrower, all parts
from there on. If the changes of several choices are independent, their mean squares add. The best plan for any budget is then found by
dynamic programming over the parts (as in Frantar & Alistarh, *Optimal Brain Compression*, NeurIPS 2022), once for each choice of streams.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import cost, plans
from ..arguments import Real, Seed
from ..calibration import LayerStatistics, layer_statistics
from ..compaction import expanded
from ..data import Images
from ..hardware import full_float32
from ..model import OwnNetwork, ResNet, batch_norms, convolutions
from .by_plan import compress_by_plan
from .knapsack import cheapest
from .parts import N_FITTED, N_STATISTICS, PartFit, apply, augmented_in_order, check_images, check_statistics, parts_of
from .plan_cost import cost_of_plan
from .streams import STAGES, read_by, stage_of
from .timings import SHARES, check_shares, numbers, part_timings

N_JUDGED = 256  # images on which errors are measured
KINDS = ("channels", "blocks", "streams")  # what a plan makes fewer or narrower


@torch.random.fork_rng(devices=[])  # new modules draw random weights, which must not change the caller's generator
@full_float32()
@torch.no_grad()
def layer_errors(
    model: OwnNetwork,
    images: Images,
    *,
    shares: Sequence[Real] = SHARES,
    drops: bool = False,
    stream_shares: Sequence[Real] = (),
    statistics: Mapping[str, LayerStatistics] | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The change of the logits when one layer at a time has fewer clusters and is fitted by least squares. Labels are not used.

    Parameters
    ----------
    model : is not changed
    images : training images; up to 512 of them, at most half, are fitted to, and errors are measured on up to 256 others
    shares : shares of a layer's filters to measure
    drops : whether to measure the error of dropping each block, listed as 0 clusters in its first convolution
    stream_shares : shares of the channels of each stage's stream to measure, listed as layers ``layer1``, ``layer2`` and ``layer3``
    statistics : from `calibration.layer_statistics` for this model, computed here if not given
    seed : of augmentation and k-means
    progress : whether to show a progress bar

    Returns
    -------
    DataFrame with the columns layer, n_clusters and error: the mean squared change of the logits as a share of their variance. The
    whole layer or stream is included, with error 0

    Raises
    ------
    ValueError : fewer than 200 images; a share outside (0, 1]; statistics of another model
    """
    check_images(images, 200)
    check_shares([*shares, *stream_shares])
    model, images = expanded(model).eval(), images.beside(model)
    statistics = statistics or layer_statistics(model, images[:N_STATISTICS], seed=seed)
    check_statistics(statistics, model)
    n_fitted = min(N_FITTED, len(images) // 2)
    images = images[: n_fitted + N_JUDGED]
    start, order = augmented_in_order(images, seed)
    inputs, fitted_to = start, images[order[:n_fitted]]  # the others are judged
    parts = parts_of(model)
    names = list(parts)
    logits = _logits(model, parts.values(), inputs[n_fitted:])
    rows = []
    with tqdm(total=len(convolutions(model)), desc="errors", unit="layer", disable=not progress) as bar:
        for i, (name, part) in enumerate(parts.items()):
            if name and part.dropped:
                inputs = apply(part, inputs)
                continue
            fit = PartFit(name, part, inputs[:n_fitted], inputs[:n_fitted], statistics)
            for layer, whole in fit.layers.items():
                for n_clusters in numbers(whole, shares):
                    error = 0.0
                    if n_clusters < whole:
                        small = fit.solve({layer: n_clusters}, "least squares", seed=seed, with_statistics=False)
                        error = change_of_logits(_logits(model, [small, *list(parts.values())[i + 1 :]], inputs[n_fitted:]), logits)
                    rows.append({"layer": layer, "n_clusters": n_clusters, "error": error})
                bar.update()
            if drops and name:
                without = apply(fit.bridge, inputs)
                inputs = apply(part, inputs)
                behind = list(parts.values())[i + 1 :]
                if behind and not behind[0].dropped:
                    fit = PartFit(names[i + 1], behind[0], inputs[:n_fitted], without[:n_fitted], statistics)
                    behind[0] = fit.solve({}, "least squares", with_statistics=False)
                error = change_of_logits(_logits(model, behind, without[n_fitted:]), logits)
                rows.append({"layer": f"{name}.conv1", "n_clusters": 0, "error": error})
            else:
                inputs = apply(part, inputs)
    for stage, whole in zip(STAGES, model.config["stage_widths"], strict=True):
        before = model.config["stage_widths"][max(0, STAGES.index(stage) - 1)]
        for n_channels in numbers(whole, stream_shares) if stream_shares else ():
            error = 0.0
            if n_channels < whole:
                if n_channels < before and stage != STAGES[0]:
                    continue  # no plan may narrow the stream from one stage to the next
                plan, quiet = {stage: n_channels}, {"statistics": statistics, "seed": seed, "progress": False}
                small = compress_by_plan(model, plan, fitted_to, "least squares", **quiet)
                error = change_of_logits(_logits(small, parts_of(small).values(), start[n_fitted:]), logits)
            rows.append({"layer": stage, "n_clusters": n_channels, "error": error})
    return pd.DataFrame(rows)


def by_sensitivity(
    model: OwnNetwork,
    images: Images | None = None,
    macs: Real | None = None,
    *,
    time: Real | None = None,
    sharing: bool = True,
    errors: pd.DataFrame | None = None,
    timings: pd.DataFrame | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """The plan with the smallest sum of errors whose network (see `compression.compress_by_plan`) stays within a budget.

    Blocks are dropped and streams narrowed only if `errors` has rows for it.

    Parameters
    ----------
    model : is not changed
    images : training images to measure `errors` on; required unless these are given
    macs : the budget, as a share of the model's MACs
    time : or a budget of time, as a share of the model's; always without sharing
    sharing : whether filters on the residual stream may be shared too. That saves MACs, but copying their outputs takes about the time that
        is saved
    errors : from `layer_errors`
    timings : from `timings.part_timings`; the plan is made for their runtime, precision and batch size. With a budget of time, measured
        here in eager mode if not given
    progress : whether measurements show progress bars

    Raises
    ------
    ValueError : no budget or two; a budget outside (0, 1] or below the cost of the smallest plan; neither images nor errors; errors or
        timings that lack a part of the model
    """
    kind, budget = check_budget(macs, time)
    if errors is None:
        if images is None:
            raise ValueError("neither images nor errors are given, expected one of them")
        errors = layer_errors(model, images, progress=progress)
    if missing := set(convolutions(model)) - set(errors.layer):
        raise ValueError(f"errors lacks {', '.join(sorted(missing))}, expected every convolution of the model")
    largest = errors.groupby("layer").n_clusters.max()
    for name, norm in batch_norms(model).items():  # of all channels, also where these share filters
        if largest[name] != norm.num_features:
            raise ValueError(f"errors has {largest[name]} filters of {name}, expected those of this model, which has {norm.num_features}")
    table = {layer: list(zip(rows.n_clusters.tolist(), rows.error.tolist(), strict=True)) for layer, rows in errors.groupby("layer")}
    costs = _Macs(model, sharing) if time is None else _Times(model, part_timings(model, progress=progress) if timings is None else timings)
    total, best, least = costs.whole(), None, math.inf
    for widths, error_of_streams in _choices_of_streams(model, table):
        if not costs.knows(widths):
            continue
        options = [costs.options(name, widths, table) for name in parts_of(model)]
        least = min(least, (smallest := costs.fixed(widths) + sum(min(option.cost for option in part) for part in options)) / total)
        if smallest > budget * total:
            continue
        rows = [np.array([(option.cost, option.error) for option in part], dtype=float) for part in options]
        chosen = [part[i] for part, i in zip(options, cheapest(rows, budget * total - costs.fixed(widths)), strict=True)]
        error = error_of_streams + sum(option.error for option in chosen)
        if best is None or error < best[0]:
            narrower = {stage: n for stage, n, whole in zip(STAGES, widths, model.config["stage_widths"], strict=True) if n < whole}
            best = error, {layer: int(n) for option in chosen for layer, n in option.plan.items()} | narrower
    if best is None:
        raise ValueError(f"{kind} is {budget:g}, expected at least {least:.4f}, which the smallest plan takes")
    return best[1]


def uniform_inside_blocks(model: OwnNetwork, macs: Real) -> dict[str, int]:
    """A plan with the same share of the channels inside each block, as large as a budget of MACs allows: the baseline for sensitivity.

    Raises
    ------
    ValueError : a budget outside (0, 1], or below the cost of one channel in each block
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
    fraction is found by bisection. The next plan of the family, in which many layers grow at once, may cost too much. Then single layers
    take its numbers, front to back, where the budget allows. Neither `cost` nor any layer's number may decrease as the fraction grows.

    Raises
    ------
    ValueError : even the smallest plan costs more
    """
    if not (least := cost(build(smallest))) <= budget:
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


def of_kinds(errors: pd.DataFrame, kinds: Sequence[str]) -> pd.DataFrame:
    """The rows of `layer_errors` for plans that only change what is named, some of `KINDS`.

    Raises
    ------
    ValueError : an unknown kind
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kinds has {unknown[0]!r}, expected some of {', '.join(KINDS)}")
    kind = np.where(errors.layer.isin(STAGES), "streams", np.where(errors.n_clusters == 0, "blocks", "channels"))
    whole = errors.n_clusters == errors.groupby("layer").n_clusters.transform("max")
    return errors[whole | np.isin(kind, kinds)]


def check_budget(macs: Real | None, time: Real | None) -> tuple[str, float]:
    """The name and the value of the given budget. Raises a ValueError unless exactly one is given, and is above 0 and at most 1."""
    if (macs is None) == (time is None):
        raise ValueError(f"macs is {macs} and time is {time}, expected one of them")
    kind, budget = ("macs", macs) if time is None else ("time", time)
    return kind, plans.check_share(budget, kind)


class Option(NamedTuple):
    """One way to make a part smaller: its clusters by layer, its cost, and its error."""

    plan: dict[str, int]
    cost: float
    error: float


Table = Mapping[str, Sequence[tuple[int, float]]]  # by layer or stage: numbers of clusters and their errors


def _choices_of_streams(model: ResNet, table: Table) -> Iterator[tuple[tuple[int, ...], float]]:
    """Non-decreasing widths of the three streams, and the error of each choice."""
    of_stages = [table.get(stage, [(width, 0.0)]) for stage, width in zip(STAGES, model.config["stage_widths"], strict=True)]
    for chosen in itertools.product(*of_stages):
        widths = tuple(n for n, _ in chosen)
        if widths[0] <= widths[1] <= widths[2]:
            yield widths, sum(error for _, error in chosen)


class _Macs:
    """The cost of parts in MACs."""

    def __init__(self, model: ResNet, sharing: bool):
        self.model, self.sharing = expanded(model), sharing
        macs, convs = cost.macs_by_layer(self.model), convolutions(self.model)
        # MACs of one filter for one input channel.
        self.units = {name: macs[name] // (conv.in_channels * conv.out_channels) for name, conv in convs.items()}
        self.total = cost.macs(model)

    def whole(self) -> int:
        return self.total

    def knows(self, widths: tuple[int, ...]) -> bool:
        return True

    def fixed(self, widths: tuple[int, ...]) -> int:
        return widths[2] * self.model.fc.out_features

    def options(self, name: str, widths: tuple[int, ...], table: Table) -> list[Option]:
        written = widths[stage_of(name)]
        last = f"{name}.conv2" if name else "conv1"
        is_whole = written == self.model.config["stage_widths"][stage_of(name)]
        shared = [(n, error) for n, error in table.get(last, []) if self.sharing or n == written] if is_whole else [(written, 0.0)]
        if not name:
            return [Option({last: n} if is_whole else {}, 3 * n * self.units[last], error) for n, error in shared]
        if self.model.get_submodule(name).dropped:
            return [Option({}, 0, 0.0)]
        first, read, options = f"{name}.conv1", widths[read_by(name)], []
        for (inner, error), (n, more) in itertools.product(table[first], shared):
            macs = inner * (read * self.units[first] + n * self.units[last])
            options.append(Option({first: inner} | ({last: n} if is_whole and inner else {}), macs, error + more))
        return options


class _Times:
    """The cost of parts in measured time."""

    def __init__(self, model: ResNet, timings: pd.DataFrame):
        self.model = expanded(model)
        self.seconds: dict[tuple[str, int, int], dict[int, float]] = {}
        for row in timings.itertuples():
            self.seconds.setdefault((row.layer, row.reads, row.writes), {})[row.n_clusters] = row.seconds
        if missing := [name for name in parts_of(model) if not self._sizes(name, model.config["stage_widths"])]:
            raise ValueError(f"timings lacks {', '.join(name or 'conv1' for name in missing)}, expected the stem and every block")

    def _sizes(self, name: str, widths: tuple[int, ...]) -> dict[int, float]:
        """Seconds by the number of channels inside a block; the stem has one entry."""
        return self.seconds.get((f"{name}.conv1".removeprefix("."), widths[read_by(name)] if name else 3, widths[stage_of(name)]), {})

    def whole(self) -> float:
        widths = self.model.config["stage_widths"]
        sizes = {name: self._sizes(name, widths) for name in parts_of(self.model)}
        return sum(of_part[max(of_part)] for of_part in sizes.values())

    def knows(self, widths: tuple[int, ...]) -> bool:
        return all(self._sizes(name, widths) for name in parts_of(self.model))

    def fixed(self, widths: tuple[int, ...]) -> float:
        return 0.0

    def options(self, name: str, widths: tuple[int, ...], table: Table) -> list[Option]:
        sizes = self._sizes(name, widths)
        if not name or self.model.get_submodule(name).dropped:
            return [Option({}, next(iter(sizes.values())), 0.0)]
        layer = f"{name}.conv1"
        return [Option({layer: n}, sizes[n], error) for n, error in table[layer] if n in sizes]


def _logits(model: ResNet, parts: Iterable[nn.Module], inputs: Tensor) -> Tensor:
    """The logits, from the inputs of the first of the network's last `parts`."""
    for part in parts:
        inputs = apply(part, inputs)
    return model.fc(inputs.mean((2, 3)))


def change_of_logits(changed: Tensor, exact: Tensor) -> float:
    """The mean squared change of logits (N, n_classes), as a share of their variance over images."""
    return float((changed - exact).square().sum(1).mean() / exact.var(0).sum())
