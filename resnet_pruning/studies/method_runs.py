"""Ways to prune side by side, as points of a sweep: every one at the same MACs, and then fine-tuned in the same way."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .. import calibration, compaction, cost, finetuning, peers, pruning
from ..compression import allocation
from ..compression.by_plan import compress_by_plan
from ..files import fingerprint
from ..model import ResNet
from .finetuning_runs import FineTuningRuns
from .pruning_runs import combined

STAGES = ("as pruned", "new batch-norm statistics", "fine-tuned")
FINE_TUNING = {"epochs": 3, "learning_rate": 0.03}


@dataclasses.dataclass(frozen=True)
class MethodRuns(FineTuningRuns):
    """One network, pruned in each of `METHODS`."""

    def comparison_points(self, methods: Sequence[str], levels: Sequence[float], images: str = "test", **choices: Sequence) -> list[dict]:
        """Points for `measure_method`: methods at shares of the MACs, with each combination of choices.

        Parameters
        ----------
        methods : some of `METHODS`
        levels : budgets, as shares of the MACs
        images : what accuracy is measured on, see `FineTuningRuns.fine_tuning_points`
        choices : lists for stage (of `STAGES`), seed (of the method and of the fine-tuning); epochs, learning_rate and n_images (trained
            on, 0 for all) of the fine-tuning, which are 0 for other stages
        """
        defaults = {"stage": STAGES[:2], "seed": [0], "n_images": [0]} | {name: [value] for name, value in FINE_TUNING.items()}
        base, points = {"base": fingerprint(self.checkpoint), "images": images}, []
        for choice in combined(defaults, choices, method=list(methods), level=list(levels)):
            if choice["stage"] != "fine-tuned":
                choice |= {"epochs": 0, "learning_rate": 0.0, "n_images": 0}
            points.append(base | choice)
        return points

    def measure_method(
        self,
        *,
        base: str,
        images: str,
        method: str,
        level: float,
        stage: str,
        seed: int,
        n_images: int,
        epochs: int,
        learning_rate: float,
    ) -> dict[str, Any]:
        """Accuracy in %, its change in pp, cost, accuracy per class, and the seconds that pruning and fine-tuning took.

        Fine-tuning is by `finetuning.RECIPE` with distillation from the base network, and goes on where it was interrupted.
        """
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}, expected one of {', '.join(STAGES)}")
        point = {key: value for key, value in locals().items() if key != "self"}
        start = time.perf_counter()
        network = METHODS[method](self, level, seed)
        seconds = time.perf_counter() - start
        if stage == "new batch-norm statistics":
            network = calibration.reestimate_batch_norm(network, self.material.calibration)
        if stage == "fine-tuned":
            if method in SOLVED:
                network = pruning.rescale_like(network, self.material.network)
            self._fine_tuned(network, images, n_images, epochs, learning_rate, point, seed)
        row = self.judged(network, images, {"parameters": cost.parameters(network), "macs": cost.macs(network)})
        return {**row, "seconds_pruning": round(seconds, 2), "seconds": round(time.perf_counter() - start, 1)}

    def weight_points(self, sparsities: Sequence[float], images: str = "test", **choices: Sequence) -> list[dict]:
        """Points for `measure_weights`: shares of zeros, with each combination of choices for criterion, epochs, learning_rate, seed."""
        defaults = {"criterion": ["global"], "sparsity": list(sparsities), "epochs": [0]}
        defaults |= {"learning_rate": [FINE_TUNING["learning_rate"]], "seed": [0]}
        base = {"base": fingerprint(self.checkpoint), "images": images}
        combinations = combined(defaults, choices)
        return [base | choice | ({} if choice["epochs"] else {"learning_rate": 0.0}) for choice in combinations]

    def measure_weights(
        self, *, base: str, images: str, criterion: str, sparsity: float, epochs: int, learning_rate: float, seed: int
    ) -> dict[str, Any]:
        """As `measure_method`, for `peers.prune_weights`; also the share of zeros, and the bytes of the weights, plain and by gzip."""
        point = {key: value for key, value in locals().items() if key != "self"}
        start = time.perf_counter()
        network = peers.prune_weights(self.material.network, sparsity, criterion, seed=seed)
        if epochs:
            constrained = finetuning.masked(network)
            self._fine_tuned(constrained, images, 0, epochs, learning_rate, point, seed)
            network = finetuning.released(constrained)
        row = self.judged(network, images, {"macs": cost.macs(network)})
        return {
            **row,
            "zeros": round(peers.sparsity_of(network), 5),
            "bytes": cost.size_in_bytes(network),
            "gzip_bytes": cost.gzip_bytes(network),
            "seconds": round(time.perf_counter() - start, 1),
        }

    def _fine_tuned(self, network: nn.Module, images: str, n_images: int, epochs: int, learning_rate: float, point: Mapping, seed: int):
        training = self.material.trained_on(images)
        recipe = self.recipe(epochs, learning_rate)
        self.fine_tune(network, training[: n_images or len(training)], recipe, point, seed=seed, teacher=True)


def _unit_pruning(criterion: str) -> Callable[[MethodRuns, float, int], ResNet]:
    def pruned(experiment: MethodRuns, level: float, seed: int) -> ResNet:
        network = experiment.material.network
        return peers.prune_units(network, allocation.uniform_inside_blocks(network, level), criterion, seed=seed)

    return pruned


def _neuron_merging(threshold: float) -> Callable[[MethodRuns, float, int], ResNet]:
    def pruned(experiment: MethodRuns, level: float, seed: int) -> ResNet:
        network = experiment.material.network
        return peers.merge_neurons(network, allocation.uniform_inside_blocks(network, level), threshold=threshold)

    return pruned


def _torch_pruning(importance: str, ranked_together: bool) -> Callable[[MethodRuns, float, int], ResNet]:
    def pruned(experiment: MethodRuns, level: float, seed: int) -> ResNet:
        network = experiment.material.network
        size = {"macs": level} if ranked_together else {"plan": allocation.uniform_inside_blocks(network, level)}
        return peers.prune_by_torch_pruning(network, importance, **size)

    return pruned


def _clusters(distance: str, representative: str) -> Callable[[MethodRuns, float, int], ResNet]:
    """Clustering alone, with batch norms that let channels of a cluster be merged: then `compaction.compact` loses nothing more."""

    def pruned(experiment: MethodRuns, level: float, seed: int) -> ResNet:
        network = experiment.material.network
        plan = allocation.uniform_inside_blocks(network, level)
        return compaction.compact(pruning.replace_filters(network, plan, representative, distance=distance, mergeable=True, seed=seed))

    return pruned


def _least_squares(experiment: MethodRuns, level: float, seed: int) -> ResNet:
    material = experiment.material
    plan = allocation.uniform_inside_blocks(material.network, level)
    return compress_by_plan(
        material.network, plan, material.merging, "least squares", statistics=material.statistics, seed=seed, progress=False
    )


def _reconstruction(experiment: MethodRuns, level: float, seed: int) -> ResNet:
    return experiment.merged(allocation.uniform_inside_blocks(experiment.material.network, level), seed)


def _by_sensitivity(sharing: bool) -> Callable[[MethodRuns, float, int], ResNet]:
    def pruned(experiment: MethodRuns, level: float, seed: int) -> ResNet:
        network = experiment.material.network
        errors = experiment.material.errors
        return experiment.merged(allocation.by_sensitivity(network, macs=level, sharing=sharing, errors=errors), seed)

    return pruned


TOGETHER = "all layers ranked together"
FAMILIES: dict[str, dict[str, Callable[[MethodRuns, float, int], ResNet]]] = {
    "units removed": {
        "random units": _unit_pruning("random"),
        "smallest L1 norm": _unit_pruning("L1 norm"),
        "smallest L2 norm": _unit_pruning("L2 norm"),
        "geometric median": _unit_pruning("geometric median"),
        "Neuron Merging": _neuron_merging(0.1),  # the paper's threshold
        "Neuron Merging, similarity from 0.45": _neuron_merging(0.45),
    },
    "Torch-Pruning": {
        f"Torch-Pruning, {importance}{f', {TOGETHER}' if together else ''}": _torch_pruning(importance, together)
        for together in (False, True)
        for importance in peers.IMPORTANCES
    },
    "this project": {
        "k-means, centroids": _clusters("raw", "centroid"),
        "k-means of unit filters, centroids": _clusters("unit", "centroid"),
        "k-means of unit filters, medoids": _clusters("unit", "medoid"),
        "merged, least squares": _least_squares,
        "merged, reconstruction": _reconstruction,
        "by sensitivity, inside blocks": _by_sensitivity(sharing=False),
        "by sensitivity": _by_sensitivity(sharing=True),
    },
}
METHODS = {name: method for family in FAMILIES.values() for name, method in family.items()}
SOLVED = ("merged, least squares", "merged, reconstruction", "by sensitivity, inside blocks", "by sensitivity")  # see pruning.rescale_like


def available(methods: Sequence[str] = tuple(METHODS)) -> tuple[list[str], str]:
    """Those of the methods whose libraries are installed, and a sentence on those that are left out, empty if there are none."""
    missing = [method for method in methods if method in FAMILIES["Torch-Pruning"] and not peers.HAS_TORCH_PRUNING]
    sentence = f"Left out because torch_pruning is not installed (pip install torch-pruning): {'; '.join(missing)}." if missing else ""
    return [method for method in methods if method not in missing], sentence
