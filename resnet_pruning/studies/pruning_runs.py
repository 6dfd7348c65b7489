"""Pruning one checkpoint without fine-tuning, as points of a sweep (see `sweeps.run_sweep`): plans and settings → accuracy and cost."""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from .. import calibration, checkpoints, cost, data, evaluation, model, pruning
from ..arguments import Integer
from ..calibration import LayerStatistics
from ..compression.allocation import SHARES, layer_errors
from ..compression.by_plan import check_compression_plan, compress_by_plan
from ..compression.plan_cost import cost_of_plan
from ..compression.streams import STAGES
from ..data import Images
from ..files import PROFILES, fingerprint, results_folder
from ..hardware import default_device, keep_freed_memory
from ..plans import Plan
from .sweeps import Point, expanded

Plans = Mapping[tuple[str, str, int | float], Plan]


@dataclasses.dataclass(frozen=True)
class PlanPoint:
    """A plan for one checkpoint. The subclasses add how the plan is used.

    Attributes
    ----------
    base : the checkpoint, by `files.fingerprint`
    images : on which accuracy is measured, "test" or "training" (a tenth of the training images)
    plan, measure, level : the plan's family, and its place in the family, such as "uniform fraction", "filters", 0.5
    clusters : number of clusters of each convolution, front to back, followed by the channels of the three streams if any is narrowed
    """

    base: str
    images: str
    plan: str
    measure: str
    level: float
    clusters: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ReplacementPoint(PlanPoint):
    """Filters replaced by `pruning.replace_filters`; batch norm's statistics "as trained" or "re-estimated"."""

    distance: str = "raw"
    weighting: float = 0.0
    representative: str = "centroid"
    batch_norm: str = "re-estimated"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class CompressionPoint(PlanPoint):
    """A network made smaller by `compression.compress_by_plan`; batch norm's statistics "as it is" or "re-estimated"."""

    repair: str = "reconstruction"
    selection: str = "elimination"
    n_steps: int = 400
    batch_norm: str = "as it is"
    seed: int = 0


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
    def base(self) -> str:
        """The name of the checkpoint in its rows."""
        return fingerprint(self.checkpoint)

    @property
    def material(self) -> "Material":
        """The network and the images, loaded once per process."""
        return _material(self, self.base)

    def path(self, name: str) -> Path:
        """The path of a checkpoint among the results by name, or that of the network before pruning if the name is empty."""
        return results_folder(self.dataset, self.profile) / "checkpoints" / f"{name}.pt" if name else Path(self.checkpoint)

    def network(self, name: str) -> model.ResNet:
        """The network of a checkpoint by name, or the one before pruning if the name is empty; not to be changed."""
        if not name:
            return self.material.network
        network, _ = checkpoints.load_checkpoint(self.path(name))
        return network.to(self.material.calibration.device, memory_format=torch.channels_last)

    def points(self, plans: Plans, images: str = "test", **choices: Sequence) -> list[ReplacementPoint]:
        """Points for `measure`: each plan with each combination of choices.

        Parameters
        ----------
        plans : by name, measure (of which the level is a number or a share) and level, such as
            ``{("uniform", "clusters", 8): plans.uniform(model, 8)}``
        images : on which accuracy is measured, "test" or "training" (a tenth of the training images)
        choices : lists for fields of `ReplacementPoint`
        """
        return self.grid(ReplacementPoint, plans, images, choices)

    def compression_points(self, plans: Plans, images: str = "test", **choices: Sequence) -> list[CompressionPoint]:
        """Points for `measure_compressed`, as `points`, with choices for fields of `CompressionPoint`."""
        return self.grid(CompressionPoint, plans, images, choices)

    def grid(self, kind: type[Point], plans: Plans, images: str, choices: Mapping[str, Sequence]) -> list[Point]:
        """Points of a kind for each plan and each combination of choices."""
        network, base, points = self.material.network, self.base, []
        widths = {layer: conv.out_channels for layer, conv in model.convolutions(network).items()}
        for (name, measure, level), plan in plans.items():
            check_compression_plan(network, plan)
            clusters = tuple(min(plan.get(layer, width), width) for layer, width in widths.items())
            if not plan.keys().isdisjoint(STAGES):
                clusters += tuple(plan.get(stage, width) for stage, width in zip(STAGES, network.config["stage_widths"], strict=True))
            points += expanded(kind(base, images, name, measure, float(level), clusters), **choices)
        return points

    def plan(self, point: PlanPoint) -> dict[str, int]:
        """A point's plan: its numbers of clusters by layer, and the channels of the streams if it narrows any."""
        return dict(zip([*model.convolutions(self.material.network), *STAGES], point.clusters, strict=False))

    def measure(self, point: ReplacementPoint) -> dict[str, int | float]:
        """Accuracy in %, its change in pp, cost, accuracy per class, and the seconds that each step took."""
        material, plan = self.material, self.plan(point)
        start = time.perf_counter()
        needs_statistics = point.weighting > 0 or point.distance in ("output", "correlation")
        statistics = material.statistics if needs_statistics else None
        start_clustering = time.perf_counter()
        settings = {name: getattr(point, name) for name in ("representative", "distance", "weighting", "seed")}
        network = pruning.replace_filters(material.network, plan, statistics=statistics, **settings)
        clustered = time.perf_counter()
        network = self._with_batch_norm(network, point.batch_norm, "as trained")
        estimated = time.perf_counter()
        parameters, macs = cost_of_plan(material.network, plan)
        row = self.judged(network, point.images, {"distinct_filters": sum(point.clusters), "parameters": parameters, "macs": macs})
        return {
            **row,
            "seconds_statistics": round(start_clustering - start, 2),  # once per process
            "seconds_clustering": round(clustered - start_clustering, 2),
            "seconds_batch_norm": round(estimated - clustered, 2),
            "seconds_evaluation": round(time.perf_counter() - estimated, 2),
        }

    def measure_compressed(self, point: CompressionPoint) -> dict[str, int | float]:
        """As `measure`, for the network from `compression.compress_by_plan` with 2,048 training images."""
        material, statistics = self.material, self.material.statistics
        start = time.perf_counter()
        settings = {name: getattr(point, name) for name in ("repair", "selection", "n_steps", "seed")}
        network = compress_by_plan(
            material.network, self.plan(point), material.fitted_to, statistics=statistics, progress=False, **settings
        )
        seconds = time.perf_counter() - start
        network = self._with_batch_norm(network, point.batch_norm, "as it is")
        row = self.judged(network, point.images, {"parameters": cost.parameters(network), "macs": cost.macs(network)})
        return {**row, "seconds_merging": round(seconds, 2)}

    def _with_batch_norm(self, network: nn.Module, batch_norm: str, unchanged: str) -> nn.Module:
        if batch_norm == "re-estimated":
            return calibration.reestimate_batch_norm(network, self.material.calibration)
        if batch_norm != unchanged:
            raise ValueError(f"batch_norm is {batch_norm!r}, expected 're-estimated' or {unchanged!r}")
        return network

    def base_accuracy(self, images: str) -> float:
        """The accuracy (%) of the network before pruning on these images, measured once per process."""
        return _base_accuracy(self, self.base, images)

    def judged(
        self, network: nn.Module, images: str, size: Mapping[str, Integer], logits: torch.Tensor | None = None
    ) -> dict[str, int | float]:
        """Accuracy in %, its change in pp, `size` (parameters and macs also as shares of the base's), and accuracy per class; from
        `logits` if the network's answers on these images are known already."""
        material = self.material
        chosen = material.images(images)
        logits, labels = evaluation.predict(network, chosen) if logits is None else logits, chosen.labels.cpu()
        accuracy = evaluation.accuracy_of(logits, labels)
        row = {"accuracy": round(accuracy, 2), "change": round(accuracy - self.base_accuracy(images), 2)}
        for name, value in size.items():
            row[name] = value
            if name in ("parameters", "macs"):
                row[f"{name}_share"] = round(value / getattr(cost, name)(material.network), 4)
        by_class = evaluation.per_class_accuracy(logits, labels).tolist()
        return row | {f"class_{name}": round(value, 2) for name, value in zip(chosen.classes, by_class, strict=True)}


class Material:
    """The network, images and measurements that all points require, loaded and measured once per process."""

    def __init__(self, runs: PruningRuns):
        keep_freed_memory()
        device = default_device()
        network, _ = checkpoints.load_checkpoint(runs.checkpoint)
        self.network = network.to(device, memory_format=torch.channels_last)
        training, test = data.load_images(runs.dataset, device=device)
        quick = runs.profile == "quick"
        if quick:
            training, test = training[:600], test[:200]
        rest, held_out = data.hold_out(training, len(training) // 10)
        self.calibration, self.fitted_to = rest[: 100 if quick else 1000], rest[: 100 if quick else 2048]
        self._measured_on = rest[: 200 if quick else 1024]
        self._shares = (0.25, 0.5) if quick else SHARES
        self._images = {"test": test, "training": held_out}
        self._trained_on = {"test": training, "training": rest}

    def images(self, name: str) -> Images:
        if name not in self._images:
            raise ValueError(f"images is {name!r}, expected one of {', '.join(self._images)}")
        return self._images[name]

    def trained_on(self, name: str) -> Images:
        """The training images for networks that are evaluated on the images `name`, which are not among them."""
        return self._trained_on[name]

    @functools.cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        return calibration.layer_statistics(self.network, self.fitted_to[:500])

    @functools.cached_property
    def errors(self) -> pd.DataFrame:
        """The errors that `allocation.by_sensitivity` requires."""
        choices = {"shares": self._shares, "drops": True, "stream_shares": [share for share in self._shares if share >= 0.5]}
        return layer_errors(self.network, self._measured_on, statistics=self.statistics, progress=False, **choices)


@functools.lru_cache(maxsize=2)  # a notebook alternates between its network and the one with which choices are made
def _material(runs: PruningRuns, base: str) -> Material:
    return Material(runs)


@functools.cache
def _base_accuracy(runs: PruningRuns, base: str, images: str) -> float:
    return evaluation.accuracy(runs.material.network, runs.material.images(images))
