"""Pruning one checkpoint without fine-tuning, as points of a sweep (see `sweeps.run_sweep`): plans and settings → accuracy and cost."""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import ParameterGrid
from torch import nn

from .. import calibration, cost, data, evaluation, model, pruning
from ..calibration import LayerStatistics
from ..compression.allocation import SHARES, layer_errors
from ..compression.by_plan import compress_by_plan
from ..data import Images
from ..files import PROFILES, fingerprint
from ..hardware import default_device, keep_freed_memory
from ..plans import Plan, check_plan


@dataclasses.dataclass(frozen=True)
class PruningRuns:
    """Pruning one checkpoint without fine-tuning: from settings to accuracies. Small enough to be sent to any worker.

    Attributes
    ----------
    checkpoint : path of the trained network
    dataset : its data set, see `data.load_images`
    profile : "full", or "quick" for a part of the images
    """

    checkpoint: str
    dataset: str
    profile: str = "full"

    def __post_init__(self):
        if self.profile not in PROFILES:
            raise ValueError(f"profile is {self.profile!r}, expected one of {', '.join(PROFILES)}")

    @property
    def material(self) -> "Material":
        """The network and the images, loaded once per process."""
        return _material(self)

    def points(self, plans: Mapping[tuple[str, int | float], Plan], images: str = "test", **choices: Sequence) -> list[dict[str, Any]]:
        """Points for `measure`: each plan, under a name and a level that tell it from others, with each combination of choices.

        Parameters
        ----------
        plans : such as ``{("uniform", 8): plans.uniform(model, 8)}``
        images : what accuracy is measured on, "test" or "training" (a tenth of the training images)
        choices : lists for distance, weighting, representative, batch_norm ("as trained" or "re-estimated"), seed; one
            value each unless given: the assignment's own
        """
        defaults = {"distance": ["raw"], "weighting": [0.0], "representative": ["centroid"], "batch_norm": ["re-estimated"], "seed": [0]}
        points = self.grid(plans, images, defaults, choices)
        return [point | {"weighting": float(point["weighting"])} for point in points]

    def compression_points(self, plans: Mapping[tuple[str, int | float], Plan], images: str = "test", **choices: Sequence) -> list[dict]:
        """Points for `measure_compressed`: as `points`, with choices of repair, selection, n_steps, batch_norm ("as it is" or
        "re-estimated") and seed."""
        defaults = {
            "repair": ["reconstruction"],
            "selection": ["elimination"],
            "n_steps": [400],
            "batch_norm": ["as it is"],
            "seed": [0],
        }
        return self.grid(plans, images, defaults, choices)

    def grid(self, plans: Mapping, images: str, defaults: Mapping[str, Sequence], choices: Mapping[str, Sequence]) -> list[dict]:
        """Points that name the base network and hold each plan, as numbers of clusters front to back, with each combination of choices."""
        network = self.material.network
        base = fingerprint(self.checkpoint)
        combinations = combined(defaults, choices)
        points = []
        for (name, level), plan in plans.items():
            check_plan(network, plan)
            widths = {layer: conv.out_channels for layer, conv in model.convolutions(network).items()}
            clusters = " ".join(str(min(plan.get(layer, width), width)) for layer, width in widths.items())
            for choice in combinations:
                points.append({"base": base, "images": images, "plan": name, "level": level, "clusters": clusters, **choice})
        return points

    def numbers(self, clusters: str) -> dict[str, int]:
        """A plan from its numbers of clusters, front to back, as `grid` writes them."""
        return dict(zip(model.convolutions(self.material.network), map(int, clusters.split()), strict=True))

    def measure(
        self,
        *,
        base: str,
        images: str,
        plan: str,
        level: int | float,
        clusters: str,
        distance: str,
        weighting: float,
        representative: str,
        batch_norm: str,
        seed: int,
    ) -> dict[str, int | float]:
        """Accuracy in %, its change in pp, cost, accuracy per class, and the seconds that each step took.

        `clusters` holds the numbers of clusters of all convolutions, front to back; `plan` and `level` only name them.
        """
        material = self.material
        numbers = self.numbers(clusters)
        start = time.perf_counter()
        needs_statistics = weighting > 0 or distance in ("output", "correlation")
        statistics = material.statistics if needs_statistics else None
        start_clustering = time.perf_counter()
        network = pruning.replace_filters(
            material.network, numbers, representative, distance=distance, weighting=weighting, statistics=statistics, seed=seed
        )
        clustered = time.perf_counter()
        network = self._with_batch_norm(network, batch_norm, "as trained")
        estimated = time.perf_counter()
        parameters, macs = cost.of_plan(material.network, numbers)
        row = self.judged(network, images, {"distinct_filters": sum(numbers.values()), "parameters": parameters, "macs": macs})
        return {
            **row,
            "seconds_statistics": round(start_clustering - start, 2),  # once per process
            "seconds_clustering": round(clustered - start_clustering, 2),
            "seconds_batch_norm": round(estimated - clustered, 2),
            "seconds_evaluation": round(time.perf_counter() - estimated, 2),
        }

    def measure_compressed(
        self,
        *,
        base: str,
        images: str,
        plan: str,
        level: int | float,
        clusters: str,
        repair: str,
        selection: str,
        n_steps: int,
        batch_norm: str,
        seed: int,
    ) -> dict[str, int | float]:
        """As `measure`, for the network that `compression.compress_by_plan` makes with 2,048 training images."""
        material = self.material
        numbers = self.numbers(clusters)
        statistics = material.statistics
        start = time.perf_counter()
        network = compress_by_plan(
            material.network,
            numbers,
            material.merging,
            repair,
            selection=selection,
            statistics=statistics,
            n_steps=n_steps,
            seed=seed,
            progress=False,
        )
        merged = time.perf_counter()
        network = self._with_batch_norm(network, batch_norm, "as it is")
        row = self.judged(network, images, {"parameters": cost.parameters(network), "macs": cost.macs(network)})
        return {**row, "seconds_merging": round(merged - start, 2)}

    def _with_batch_norm(self, network: nn.Module, batch_norm: str, unchanged: str) -> nn.Module:
        if batch_norm == "re-estimated":
            return calibration.reestimate_batch_norm(network, self.material.calibration)
        if batch_norm != unchanged:
            raise ValueError(f"batch_norm is {batch_norm!r}, expected 're-estimated' or {unchanged!r}")
        return network

    def judged(self, network: nn.Module, images: str, size: Mapping[str, int]) -> dict[str, int | float]:
        """Accuracy in % and its change in pp, `size`, its parameters and macs as shares of the base too, accuracy per class."""
        material = self.material
        chosen = material.images(images)
        logits, labels = evaluation.predict(network, chosen), chosen.labels.cpu()
        accuracy = evaluation.accuracy_of(logits, labels)
        row = {"accuracy": round(accuracy, 2), "change": round(accuracy - _base_accuracy(self, images), 2)}
        for name, value in size.items():
            row[name] = value
            if name in ("parameters", "macs"):
                row[f"{name}_share"] = round(value / getattr(cost, name)(material.network), 4)
        by_class = evaluation.per_class_accuracy(logits, labels).tolist()
        return row | {f"class_{name}": round(value, 2) for name, value in zip(chosen.classes, by_class, strict=True)}


def combined(defaults: Mapping[str, Sequence], choices: Mapping[str, Sequence], **given: Sequence) -> list[dict[str, Any]]:
    """Each combination of the lists in `given`, in `choices`, and in `defaults` where there is no choice.

    Values are plain, the names in `given` come first and then those in `defaults`.

    Raises
    ------
    ValueError : choices of what has no default
    """
    if unknown := set(choices) - set(defaults):
        raise ValueError(f"choices has {', '.join(sorted(unknown))}, expected some of {', '.join(defaults)}")
    names = [*given, *defaults]
    grid = ParameterGrid(given | dict(defaults) | dict(choices))
    return [{name: choice[name].item() if isinstance(choice[name], np.generic) else choice[name] for name in names} for choice in grid]


class Material:
    """What all points of an experiment need, loaded and measured once per process."""

    def __init__(self, experiment: PruningRuns):
        keep_freed_memory()
        device = default_device()
        network, _ = model.load_checkpoint(experiment.checkpoint)
        self.network = network.to(device, memory_format=torch.channels_last)
        training, test = data.load_images(experiment.dataset, device=device)
        if experiment.profile == "quick":
            training, test = training[:2000], test[:1000]
        rest, held_out = data.hold_out(training, len(training) // 10)
        self.calibration, self.merging = rest[:1000], rest[: 512 if experiment.profile == "quick" else 2048]
        self._shares = (0.25, 0.5, 0.75) if experiment.profile == "quick" else SHARES
        self._images = {"test": test, "training": held_out}
        self._trained_on = {"test": training, "training": rest}

    def images(self, name: str) -> Images:
        if name not in self._images:
            raise ValueError(f"images is {name!r}, expected one of {', '.join(self._images)}")
        return self._images[name]

    def trained_on(self, name: str) -> Images:
        """What a network that is judged on these images is trained on: what is judged for a choice was not trained on for it."""
        return self._trained_on[name]

    @functools.cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        return calibration.layer_statistics(self.network, self.calibration[:500])

    @functools.cached_property
    def errors(self) -> pd.DataFrame:
        """What `allocation.by_sensitivity` needs to know."""
        return layer_errors(self.network, self.merging[:1024], statistics=self.statistics, shares=self._shares, progress=False)


@functools.lru_cache(maxsize=1)
def _material(experiment: PruningRuns) -> Material:
    return Material(experiment)


@functools.cache
def _base_accuracy(experiment: PruningRuns, images: str) -> float:
    return evaluation.accuracy(experiment.material.network, experiment.material.images(images))
