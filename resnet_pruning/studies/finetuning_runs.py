"""Fine-tuning runs as points of a sweep (see `sweeps.run_sweep`): one row for each run, with its accuracy after each epoch."""

import copy
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import calibration, compaction, cost, evaluation, finetuning, peers
from ..arguments import Integer, PositiveReal, Seed
from ..checkpoints import save_checkpoint
from ..clustering import Clusters, cluster_layers
from ..compression.by_plan import compress_by_plan, rescale_like
from ..data import Images
from ..files import results_folder
from ..hardware import has_fast_bfloat16
from ..model import ResNet, convolutions
from ..plans import Plan
from ..training import Recipe, train
from .pruning_runs import PlanPoint, Plans, PruningRuns

WAYS = (
    "tied",
    "projected, clusters fixed",
    "projected, new clusters each epoch",
    "projected, new clusters each step",
    "centripetal",
    "compact",
    "from scratch",
)


@dataclasses.dataclass(frozen=True)
class FineTuningPoint(PlanPoint):
    """A training under a plan.

    Attributes
    ----------
    way : one of `WAYS`
    distance : of the clusters, for the constrained ways
    shrinkage : of `peers.strength_for`, for "centripetal"
    teacher : whether a teacher is imitated, see `FineTuningRuns`
    n_images : number of training images, 0 for all
    epochs, learning_rate : of `finetuning.RECIPE`
    seed : of clusters, initial weights and batches
    checkpoint : name under which the result is saved, or ""
    """

    way: str = "compact"
    distance: str = "correlation"
    shrinkage: float = 10.0
    teacher: bool = True
    n_images: int = 0
    epochs: int = finetuning.RECIPE.epochs
    learning_rate: float = finetuning.RECIPE.learning_rate
    seed: int = 0
    checkpoint: str = ""


@dataclasses.dataclass(frozen=True)
class FineTuningRuns(PruningRuns):
    """Fine-tuning of one checkpoint under plans, in each of `WAYS`.

    The constrained ways start from clusters by `distance`; "compact" from the network that `compression.compress_by_plan` returns for the
    plan; and "from scratch" from a network of that shape with random weights. All are trained on the same batches.

    Attributes
    ----------
    taught_by : name of the teacher's checkpoint, see `path`; "" for the base network
    """

    taught_by: str = ""

    def fine_tuning_points(self, plans: Plans, images: str = "test", **choices: Sequence) -> list[FineTuningPoint]:
        """Points for `measure_fine_tuned`: each plan with each combination of choices for fields of `FineTuningPoint`.

        For images "test", networks are trained on all training images; for "training", on all but the held-out tenth, and evaluated on it.
        """
        return self.grid(FineTuningPoint, plans, images, choices)

    def measure_fine_tuned(self, point: FineTuningPoint) -> dict[str, Any]:
        """Train, make the result compact by `compaction.compact`, and evaluate it. An interrupted run resumes where it stopped.

        Returns
        -------
        accuracy in %, its change in pp, cost, accuracy per class; the accuracy before the first epoch, with new batch-norm statistics;
        seconds; and a table `epochs`: the accuracy at the start (epoch 0) and after each epoch (in bfloat16 if it is fast, constraints
        released), the share of filters in a different cluster than one epoch before (`moved`, %), and the largest difference of filters
        from their centroid (`apart`)
        """
        if point.way not in WAYS:
            raise ValueError(f"way is {point.way!r}, expected one of {', '.join(WAYS)}")
        plan = self.plan(point)
        training, judged = self.material.trained_on(point.images), self.material.images(point.images)
        training = training[: point.n_images or len(training)]
        recipe = self.recipe(point.epochs, point.learning_rate)
        network = self._start(point, recipe, len(training))
        before = evaluation.accuracy(calibration.reestimate_batch_norm(plain(network), self.material.calibration), judged)
        amp = has_fast_bfloat16(judged.device)

        def watch(averaged: nn.Module) -> dict[str, Any]:
            return {"accuracy": evaluation.accuracy(plain(averaged), judged, amp=amp), **_clusters(averaged)}

        start = {"accuracy": before, **_clusters(network)}
        history = self.fine_tune(network, training, recipe, point, watch=watch)
        small = compaction.compact(plain(network))
        row = self.judged(small, point.images, {"parameters": cost.parameters(small), "macs": cost.macs(small)})
        if point.checkpoint:
            facts = {name: value for name, value in dataclasses.asdict(point).items() if name != "clusters"} | {"plan": plan}
            facts |= {"test_accuracy" if point.images == "test" else "held_out_accuracy": row["accuracy"]}
            facts |= {name: row[name] for name in ("parameters", "macs", "macs_share")}
            facts |= {"recipe": dataclasses.asdict(recipe), "dataset": self.dataset, "torch": str(torch.__version__)}
            save_checkpoint(self.path(point.checkpoint), small, facts)
        return {
            **row,
            "accuracy_before": round(before, 2),
            "seconds": round(history.seconds.sum(), 1),
            "epochs": _epochs(start, history),
        }

    def merged(self, plan: Plan, seed: Seed = 0) -> ResNet:
        """The network that `compression.compress_by_plan` returns for a plan, cached for runs that share it. It must not be modified."""
        return _merged(self, tuple(plan.items()), seed)

    def fine_tune(
        self,
        network: nn.Module,
        images: Images,
        recipe: Recipe,
        point: Any,
        *,
        watch: Callable[[nn.Module], Mapping[str, Any]] | None = None,
    ) -> pd.DataFrame:
        """Train the network of a point in place, with the point's seed, and with the teacher (see `taught_by`) unless the `teacher` of the
        point is false or empty. An interrupted training resumes where it stopped."""
        build = results_folder(self.dataset, self.profile) / "build"
        torch.compiler.reset()  # compiled networks of earlier runs count towards a limit, beyond which nothing is compiled
        return train(
            network,
            images,
            recipe,
            seed=point.seed,
            teacher=copy.deepcopy(self.network(self.taught_by)) if getattr(point, "teacher", True) else None,
            folder=build / "fine_tuning" / hashlib.sha256(repr((self, point)).encode()).hexdigest()[:16],
            watch=watch,
            progress=self.profile == "full",
        )

    def recipe(self, epochs: Integer, learning_rate: PositiveReal) -> Recipe:
        """`finetuning.RECIPE` with these settings; in profile "quick", also with smaller batches and a shorter average of the weights."""
        recipe = dataclasses.replace(finetuning.RECIPE, epochs=epochs, learning_rate=learning_rate)
        return recipe if self.profile == "full" else dataclasses.replace(recipe, batch_size=64, ema=0.9)

    def _start(self, point: FineTuningPoint, recipe: Recipe, n_images: Integer) -> nn.Module:
        material, plan, seed = self.material, self.plan(point), point.seed
        network, statistics = material.network, material.statistics
        if point.way == "compact":
            return rescale_like(self.merged(plan, seed), network)
        if point.way == "from scratch":
            shape = compress_by_plan(network, plan, material.fitted_to, "none", statistics=statistics, seed=seed, progress=False).config
            torch.manual_seed(seed)
            return ResNet(**shape).to(material.calibration.device)
        clusters = first_clusters(self, tuple(plan.items()), point.distance, seed)
        if point.way == "tied":
            return finetuning.tied(network, clusters)
        if point.way == "centripetal":
            return peers.centripetal(network, clusters, peers.strength_for(recipe, n_images, point.shrinkage))
        renewals = {"clusters fixed": 0, "new clusters each epoch": n_images // recipe.batch_size, "new clusters each step": 1}
        return finetuning.projected(network, clusters, renewals[point.way.removeprefix("projected, ")])


@functools.lru_cache(maxsize=4)
def _merged(experiment: FineTuningRuns, plan: tuple[tuple[str, Integer], ...], seed: Seed) -> ResNet:
    material, n_steps = experiment.material, 400 if experiment.profile == "full" else 5
    statistics = material.statistics
    return compress_by_plan(
        material.network, dict(plan), material.fitted_to, statistics=statistics, n_steps=n_steps, seed=seed, progress=False
    )


@functools.lru_cache(maxsize=4)
def first_clusters(experiment: FineTuningRuns, plan: tuple[tuple[str, Integer], ...], distance: str, seed: Seed) -> dict[str, Clusters]:
    """The clusters that the constrained ways start from. They must not be modified."""
    material, weighting = experiment.material, 0.5 if distance == "correlation" else 0.0
    return cluster_layers(material.network, dict(plan), distance, statistics=material.statistics, weighting=weighting, seed=seed)


def is_constrained(network: nn.Module) -> bool:
    return any(map(parametrize.is_parametrized, convolutions(network).values()))


def plain(network: nn.Module) -> nn.Module:
    return finetuning.released(network) if is_constrained(network) else network


def _clusters(network: nn.Module) -> dict[str, Any]:
    """The cluster of every filter, and the largest distance within clusters; empty if filters are not constrained."""
    if not is_constrained(network):
        return {}
    labels = itertools.chain(*finetuning.assignments(network).values())
    return {"labels": list(labels), "apart": max(peers.distances_within_clusters(network).values())}


def _epochs(start: Mapping[str, Any], history: pd.DataFrame) -> pd.DataFrame:
    """A row for the start (epoch 0) and for each epoch, from the watched values."""
    seen = pd.concat([pd.DataFrame([start]), history], ignore_index=True)
    table = pd.DataFrame({"epoch": range(len(seen)), "accuracy": seen.accuracy.round(2), "moved": np.nan, "apart": np.nan})
    if "labels" in start:
        labels = np.array(seen.labels.tolist())
        table.loc[1:, "moved"] = (100 * (labels[1:] != labels[:-1]).mean(1)).round(2)
        table.loc[1:, "apart"] = seen.apart[1:].round(6)
    return table
