"""Compare methods of pruning, as points of a sweep: each at the same MACs, then fine-tuned in the same way."""

import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import calibration, compaction, cost, evaluation, finetuning, peers, plans, pruning
from ..arguments import Integer, Real, Seed
from ..clustering import Clusters, cluster_layers
from ..compression import allocation
from ..compression.by_plan import rescale_like
from ..compression.plan_cost import cost_of_plan
from ..model import ResNet, convolutions
from ..plans import Plan
from . import right_answers
from .finetuning_runs import FineTuningRuns
from .sweeps import expanded

STAGES = ("as pruned", "new batch-norm statistics", "fine-tuned")
FINE_TUNING = {"n_images": 0, "epochs": 0, "learning_rate": 0.0}  # without fine-tuning


@dataclasses.dataclass(frozen=True)
class MethodPoint:
    """A method of pruning one checkpoint, and the stage at which the network is evaluated.

    Attributes
    ----------
    base : the checkpoint, by `files.fingerprint`
    images : on which accuracy is measured, see `FineTuningRuns.fine_tuning_points`
    method : one of `METHODS`
    level : budget, as a share of the MACs
    stage : one of `STAGES`
    seed : of the method and of the fine-tuning
    n_images, epochs, learning_rate : of the fine-tuning (n_images 0 for all images); 0 in other stages
    """

    base: str
    images: str
    method: str
    level: float
    stage: str = "fine-tuned"
    seed: int = 0
    n_images: int = 0
    epochs: int = 3
    learning_rate: float = 0.03


@dataclasses.dataclass(frozen=True)
class WeightPoint:
    """Weight pruning of one checkpoint to a share of zeros, by `peers.prune_weights`, and the fine-tuning that keeps them, if any."""

    base: str
    images: str
    criterion: str
    sparsity: float
    epochs: int = 0
    learning_rate: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class MethodRuns(FineTuningRuns):
    """One network, pruned by each of `METHODS`."""

    def comparison_points(
        self, methods: Sequence[str], levels: Sequence[Real], images: str = "test", stage: Sequence[str] = STAGES[:2], **choices: Sequence
    ) -> list[MethodPoint]:
        """Points for `measure_method`: methods at shares of the MACs, in some stages, with each combination of choices for fields of
        `MethodPoint`. In other stages, choices for the fine-tuning are ignored."""
        base, points = self.base, []
        for kind, (method, level) in itertools.product(stage, itertools.product(methods, levels)):
            point = MethodPoint(base, images, method, level, kind)
            if kind == "fine-tuned":
                points += expanded(point, **choices)
            else:
                others = {name: values for name, values in choices.items() if name not in FINE_TUNING}
                points += expanded(dataclasses.replace(point, **FINE_TUNING), **others)
        return points

    def measure_method(self, point: MethodPoint) -> dict[str, Any]:
        """Accuracy in %, its change in pp, cost, accuracy per class, the kind of device, the seconds of pruning and of the whole run, and a
        table `right` of the images that the network gets right, see `right_answers`.

        Fine-tuning follows `finetuning.RECIPE` with distillation from the teacher, see `FineTuningRuns`. An interrupted one resumes.
        """
        if point.method not in METHODS:
            raise ValueError(f"method is {point.method!r}, expected one of {', '.join(METHODS)}")
        if point.stage not in STAGES:
            raise ValueError(f"stage is {point.stage!r}, expected one of {', '.join(STAGES)}")
        start = time.perf_counter()
        network = METHODS[point.method](self, point.level, point.seed)
        seconds = time.perf_counter() - start
        if point.stage == "fine-tuned":
            network = self.ready_to_train(network, point.method)
            self._fine_tuned(network, point, point.n_images)
        shares = any(map(parametrize.is_parametrized, convolutions(network).values()))
        network = finetuning.released(network) if shares else network
        if point.stage == "new batch-norm statistics":
            network = calibration.reestimate_batch_norm(network, self.material.calibration)
        if shares:
            network = compaction.compact(network)
        size = {"parameters": cost.parameters(network), "macs": cost.macs(network), "bytes": cost.size_in_bytes(network)}
        judged = self.material.images(point.images)
        logits = evaluation.predict(network, judged)
        row = self.judged(network, point.images, size, logits)
        right = right_answers.packed(logits.argmax(1) == judged.labels.cpu())
        return {
            "family": FAMILY_OF[point.method],
            **row,
            "bytes_share": round(size["bytes"] / cost.size_in_bytes(self.material.network), 4),
            "teacher": self.path(self.taught_by).stem if point.stage == "fine-tuned" else None,
            "chosen_on": "held-out training images",
            "device": judged.device.type,
            "seconds_pruning": round(seconds, 2),
            "seconds": round(time.perf_counter() - start, 1),
            "right": pd.DataFrame({"answers": [right]}),
        }

    def ready_to_train(self, network: nn.Module, method: str) -> nn.Module:
        """The network of a method, ready for fine-tuning: one that was solved for gets the scales of the base's filters."""
        return rescale_like(network, self.material.network) if method in SOLVED else network

    def weight_points(
        self, sparsities: Sequence[Real], criteria: Sequence[str], images: str = "test", **choices: Sequence
    ) -> list[WeightPoint]:
        """Points for `measure_weights`: shares of zeros and criteria, with each combination of choices for fields of `WeightPoint`."""
        base = self.base
        start = [WeightPoint(base, images, criterion, float(sparsity)) for criterion in criteria for sparsity in sparsities]
        return [point for each in start for point in expanded(each, **choices)]

    def measure_weights(self, point: WeightPoint) -> dict[str, Any]:
        """As `measure_method`, for `peers.prune_weights`; also the share of zeros, and the bytes of the network, plain and by gzip."""
        start = time.perf_counter()
        network = peers.prune_weights(self.material.network, point.sparsity, point.criterion, seed=point.seed)
        if point.epochs:
            constrained = peers.masked(network)
            self._fine_tuned(constrained, point)
            network = finetuning.released(constrained)
        row = self.judged(network, point.images, {"macs": cost.macs(network)})
        return {
            **row,
            "zeros": round(peers.sparsity_of(network), 5),
            "bytes": cost.size_in_bytes(network),
            "gzip_bytes": peers.gzip_bytes(network),
            "seconds": round(time.perf_counter() - start, 1),
        }

    def _fine_tuned(self, network: nn.Module, point: MethodPoint | WeightPoint, n_images: Integer = 0) -> None:
        training = self.material.trained_on(point.images)
        recipe = self.recipe(point.epochs, point.learning_rate)
        self.fine_tune(network, training[: n_images or len(training)], recipe, point)


Method = Callable[[MethodRuns, float, int], nn.Module]  # of runs, a budget of MACs and a seed


def _unit_pruning(criterion: str) -> Method:
    def pruned(runs: MethodRuns, level: Real, seed: Seed) -> ResNet:
        network = runs.material.network
        return peers.prune_units(network, allocation.uniform_inside_blocks(network, level), criterion, seed=seed)

    return pruned


def _neuron_merging(threshold: Real) -> Method:
    def pruned(runs: MethodRuns, level: Real, seed: Seed) -> ResNet:
        network = runs.material.network
        return peers.merge_neurons(network, allocation.uniform_inside_blocks(network, level), threshold=threshold)

    return pruned


def _torch_pruning(importance: str, ranked_together: bool) -> Method:
    def pruned(runs: MethodRuns, level: Real, seed: Seed) -> ResNet:
        network = runs.material.network
        size = {"macs": level} if ranked_together else {"plan": allocation.uniform_inside_blocks(network, level)}
        return peers.prune_by_torch_pruning(network, importance, **size)

    return pruned


def _clusters(distance: str, representative: str) -> Method:
    """Clustering alone, with batch norms that allow a cluster's channels to be merged, so that `compaction.compact` loses nothing more."""

    def pruned(runs: MethodRuns, level: Real, seed: Seed) -> ResNet:
        network = runs.material.network
        plan = allocation.uniform_inside_blocks(network, level)
        return compaction.compact(pruning.replace_filters(network, plan, representative, distance=distance, mergeable=True, seed=seed))

    return pruned


def _clusters_of_outputs(runs: MethodRuns, level: Real, seed: Seed) -> ResNet:
    """As `_clusters`, by correlation, weighted. Filters of a cluster may be negatively correlated, but behind a ReLU only channels of equal
    sign can be merged. So there are as many clusters as leave the budget's MACs."""
    network, statistics = runs.material.network, runs.material.statistics

    def made(plan: Plan) -> ResNet:
        clustering = {"distance": "correlation", "weighting": 0.5, "statistics": statistics, "seed": seed}
        return compaction.compact(pruning.replace_filters(network, plan, mergeable=True, **clustering))

    plan = allocation.largest_within(
        lambda share: plans.uniform_fraction(network, share, "*.conv1"), lambda plan: cost.macs(made(plan)), level * cost.macs(network)
    )
    return made(plan)


PlanOf = Callable[[MethodRuns, float], Plan]  # of runs and a budget of MACs


def _same_share(runs: MethodRuns, level: Real) -> Plan:
    return allocation.uniform_inside_blocks(runs.material.network, level)


def _by_sensitivity(*kinds: str, sharing: bool = False) -> PlanOf:
    """Allocation by sensitivity, of some of `allocation.KINDS`; with `sharing`, filters on the stream are shared, too."""

    def planned(runs: MethodRuns, level: Real) -> Plan:
        errors = allocation.of_kinds(runs.material.errors, kinds)
        return allocation.by_sensitivity(runs.material.network, macs=level, sharing=sharing, errors=errors)

    return planned


def _compressed(plan_of: PlanOf, selection: str = "elimination", repair: str = "reconstruction") -> Method:
    def pruned(runs: MethodRuns, level: Real, seed: Seed) -> ResNet:
        # A copy, because what is measured may be trained in place, and the cached network must stay as it is.
        return copy.deepcopy(runs.compressed(plan_of(runs, level), seed, selection=selection, repair=repair))

    return pruned


def _folded(repaired: bool) -> Method:
    def pruned(runs: MethodRuns, level: Real, seed: Seed) -> ResNet:
        network = runs.material.network
        return peers.fold_units(network, allocation.uniform_inside_blocks(network, level), repaired=repaired, seed=seed)

    return pruned


def _grail(selection: str) -> Method:
    def pruned(runs: MethodRuns, level: Real, seed: Seed) -> ResNet:
        network, images = runs.material.network, runs.material.fitted_to
        return peers.compensate_units(network, allocation.uniform_inside_blocks(network, level), images, selection, seed=seed)

    return pruned


@functools.lru_cache(maxsize=4)
def _first_clusters(runs: MethodRuns, base: str, plan: tuple[tuple[str, Integer], ...], distance: str, seed: Seed) -> dict[str, Clusters]:
    """The clusters that constrained networks start from. They must not be modified."""
    material, weighting = runs.material, 0.5 if distance == "correlation" else 0.0
    return cluster_layers(material.network, dict(plan), distance, statistics=material.statistics, weighting=weighting, seed=seed)


def _constrained(constraint: Callable[..., nn.Module], distance: str) -> Method:
    """The same share of the filters in every layer, also on the residual stream. Filters stay clustered during training."""

    def pruned(runs: MethodRuns, level: Real, seed: Seed) -> nn.Module:
        network = runs.material.network
        plan = allocation.largest_within(
            lambda share: plans.uniform_fraction(network, share),
            lambda plan: cost_of_plan(network, plan)[1],
            level * cost.macs(network),
        )
        return constraint(network, _first_clusters(runs, runs.base, tuple(plan.items()), distance, seed))

    return pruned


def _drawn_anew(plan_of: PlanOf) -> Method:
    """The network of a plan with new weights. What it reaches with the same training is due to the shape, not to the kept weights (Liu et
    al. 2019, *Rethinking the Value of Network Pruning*)."""

    @torch.random.fork_rng(devices=[])
    def pruned(runs: MethodRuns, level: Real, seed: Seed) -> ResNet:
        network = runs.compressed(plan_of(runs, level), selection="L2 norm", repair="none")  # of its shape, made in no time
        torch.manual_seed(int(seed))
        return ResNet(**network.config).to(network.fc.weight.device).eval()

    return pruned


def _as_it_is(runs: MethodRuns, level: Real, seed: Seed) -> nn.Module:
    return copy.deepcopy(runs.material.network)


TOGETHER = "all layers ranked together"
FAMILIES: dict[str, dict[str, Method]] = {
    "control": {"not pruned": _as_it_is},
    "channels removed": {
        "random channels": _unit_pruning("random"),
        "smallest L1 norm": _unit_pruning("L1 norm"),
        "smallest L2 norm": _unit_pruning("L2 norm"),
        "geometric median": _unit_pruning("geometric median"),
    },
    "channels merged": {
        "Neuron Merging": _neuron_merging(0.1),  # the paper's threshold
        "Neuron Merging, similarity from 0.45": _neuron_merging(0.45),
        "Model Folding": _folded(repaired=False),
        "Model Folding, repaired": _folded(repaired=True),
        "GRAIL after folding": _grail("folding"),
        "GRAIL after removal": _grail("L2 norm"),
    },
    "Torch-Pruning": {
        f"Torch-Pruning, {importance}{f', {TOGETHER}' if together else ''}": _torch_pruning(importance, together)
        for together in (False, True)
        for importance in peers.IMPORTANCES
    },
    "clustering alone": {
        "k-means, centroids": _clusters("raw", "centroid"),
        "k-means of unit filters, centroids": _clusters("unit", "centroid"),
        "k-means of unit filters, medoids": _clusters("unit", "medoid"),
        "k-means of correlation, centroids": _clusters_of_outputs,
    },
    "chosen on images, removed": {
        "k-means of activations, medoids": _compressed(_same_share, "k-means", "none"),
        "elimination": _compressed(_same_share, "elimination", "none"),
        "elimination, allocated by sensitivity": _compressed(_by_sensitivity("channels"), "elimination", "none"),
    },
    "filters stay clustered": {
        "tied": _constrained(finetuning.tied, "correlation"),
        "tied, clustered by raw weights": _constrained(finetuning.tied, "raw"),
        "projected": _constrained(functools.partial(finetuning.projected, renew_every=0), "correlation"),
        "projected, new clusters each step": _constrained(finetuning.projected, "correlation"),
    },
    "removed and repaired": {
        "random channels, least squares": _compressed(_same_share, "random", "least squares"),
        "random channels, reconstruction": _compressed(_same_share, "random"),
        "smallest L2 norm, reconstruction": _compressed(_same_share, "L2 norm"),
        "elimination, least squares": _compressed(_same_share, repair="least squares"),
        "elimination, reconstruction": _compressed(_same_share),
    },
    "removed and repaired, allocated by sensitivity": {
        "by sensitivity, inside blocks": _compressed(_by_sensitivity("channels")),
        "by sensitivity": _compressed(_by_sensitivity(*allocation.KINDS, sharing=True)),
        "by sensitivity, without sharing": _compressed(_by_sensitivity(*allocation.KINDS)),
        "by sensitivity, streams alone": _compressed(_by_sensitivity("streams")),
        "by sensitivity, blocks alone": _compressed(_by_sensitivity("blocks")),
    },
    "shape alone": {"by sensitivity, inside blocks, drawn anew": _drawn_anew(_by_sensitivity("channels"))},
}
METHODS = {name: method for family in FAMILIES.values() for name, method in family.items()}
FAMILY_OF = {name: family for family, methods in FAMILIES.items() for name in methods}
# See rescale_like.
SOLVED = tuple(name for family, methods in FAMILIES.items() if family.startswith("removed and repaired") for name in methods)


def available(methods: Sequence[str] = tuple(METHODS)) -> tuple[list[str], str]:
    """The methods whose libraries are installed, and a sentence that names those left out, empty if there are none."""
    missing = [method for method in methods if method in FAMILIES["Torch-Pruning"] and not peers.HAS_TORCH_PRUNING]
    sentence = f"Left out because torch_pruning is not installed (pip install torch-pruning): {'; '.join(missing)}." if missing else ""
    return [method for method in methods if method not in missing], sentence
