"""Fine-tuning runs as points of a sweep (see `sweeps.run_sweep`): one row for each run, with its accuracy after each epoch."""

import copy
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import calibration, compaction, cost, evaluation, finetuning
from ..clustering import cluster_layers
from ..compression.by_plan import compress_by_plan
from ..data import Images
from ..files import ROOT, results_folder
from ..hardware import has_fast_bfloat16
from ..model import ResNet, convolutions, save_checkpoint
from ..plans import Plan
from ..pruning import rescale_like
from ..training import Recipe, train
from .pruning_runs import PruningRuns

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
class FineTuningRuns(PruningRuns):
    """Fine-tuning of one checkpoint under plans, in each of `WAYS`.

    The constrained ways start from clusters by `distance`, "compact" from the network that `compression.compress_by_plan` makes of the
    plan, and "from scratch" from random weights of that network's shape. All see the same batches.
    """

    def fine_tuning_points(self, plans: Mapping[tuple[str, int | float], Plan], images: str = "test", **choices: Sequence) -> list[dict]:
        """Points for `measure_fine_tuned`: each plan with each combination of choices.

        Parameters
        ----------
        plans : by name and level
        images : what accuracy is measured on. With "test", all training images are trained on, and with "training" all but the held-out
            tenth, which is judged on
        choices : lists for way, distance, shrinkage (of `finetuning.strength_for`), teacher (whether the base network is imitated),
            n_images (trained on, 0 for all), epochs, learning_rate, seed, and checkpoint: a name under which the result is kept, or ""
        """
        defaults = {
            "way": ["compact"],
            "distance": ["correlation"],
            "shrinkage": [10.0],
            "teacher": [True],
            "n_images": [0],
            "epochs": [finetuning.RECIPE.epochs],
            "learning_rate": [finetuning.RECIPE.learning_rate],
            "seed": [0],
            "checkpoint": [""],
        }
        return self.grid(plans, images, defaults, choices)

    def measure_fine_tuned(
        self,
        *,
        base: str,
        images: str,
        plan: str,
        level: int | float,
        clusters: str,
        way: str,
        distance: str,
        shrinkage: float,
        teacher: bool,
        n_images: int,
        epochs: int,
        learning_rate: float,
        seed: int,
        checkpoint: str,
    ) -> dict[str, Any]:
        """Train, and judge the network that `compaction.compact` makes of the result. An interrupted run goes on where it stopped.

        Returns
        -------
        accuracy in %, its change in pp, cost, accuracy per class; the accuracy before the first epoch, with new batch-norm statistics, and
        after each epoch (`curve`, bfloat16 where it is fast, filters merged); the share of filters in another cluster than an epoch before
        (`moved`, %) and the largest difference of filters from their centroid (`distances`), each epoch's, separated by spaces; seconds
        """
        if way not in WAYS:
            raise ValueError(f"way is {way!r}, expected one of {', '.join(WAYS)}")
        point = {key: value for key, value in locals().items() if key != "self"}
        numbers = self.numbers(clusters)
        training, judged = self.material.trained_on(images), self.material.images(images)
        training = training[: n_images or len(training)]
        recipe = self.recipe(epochs, learning_rate)
        network = self._start(way, numbers, distance, shrinkage, recipe, len(training), seed)
        before = calibration.reestimate_batch_norm(_plain(network), self.material.calibration)
        amp = has_fast_bfloat16(judged.device)

        def watch(averaged: nn.Module) -> dict[str, float | str]:
            return {"accuracy": evaluation.accuracy(_plain(averaged), judged, amp=amp), **_clusters(averaged)}

        start = _clusters(network)
        history = self.fine_tune(network, training, recipe, point, seed=seed, teacher=teacher, watch=watch)
        small = compaction.compact(_plain(network))
        row = self.judged(small, images, {"parameters": cost.parameters(small), "macs": cost.macs(small)})
        if checkpoint:
            facts = point | {"plan": numbers, "test_accuracy" if images == "test" else "held_out_accuracy": row["accuracy"]}
            facts |= {name: row[name] for name in ("parameters", "macs", "macs_share")}
            facts |= {"recipe": dataclasses.asdict(recipe), "dataset": self.dataset, "torch": str(torch.__version__)}
            save_checkpoint(results_folder(self.dataset, self.profile) / "checkpoints" / f"{checkpoint}.pt", small, facts)
        return {
            **row,
            "accuracy_before": round(evaluation.accuracy(before, judged), 2),
            "curve": _text(history.accuracy, 2),
            **_changes(start, history),
            "seconds": round(history.seconds.sum(), 1),
        }

    def merged(self, plan: Plan, seed: int = 0) -> ResNet:
        """What `compression.compress_by_plan` makes of a plan, kept for runs that differ in what comes after it. Not to be changed."""
        return _merged(self, tuple(plan.items()), seed)

    def fine_tune(
        self,
        network: nn.Module,
        images: Images,
        recipe: Recipe,
        point: Mapping[str, Any],
        *,
        seed: int,
        teacher: bool,
        watch: Callable[[nn.Module], Mapping[str, float | str]] | None = None,
    ) -> pd.DataFrame:
        """Train the network of a point in place, with the base network as its teacher or without; resumes where it was interrupted."""
        torch.compiler.reset()  # compiled networks of runs before count towards a limit, from which on nothing is compiled
        return train(
            network,
            images,
            recipe,
            seed=seed,
            teacher=copy.deepcopy(self.material.network) if teacher else None,
            folder=ROOT / "build" / "fine_tuning" / hashlib.sha256(repr((self, point)).encode()).hexdigest()[:16],
            watch=watch,
            progress=self.profile == "full",
        )

    def recipe(self, epochs: int, learning_rate: float) -> Recipe:
        """`finetuning.RECIPE` with these, and in profile "quick" with smaller batches."""
        recipe = dataclasses.replace(finetuning.RECIPE, epochs=epochs, learning_rate=learning_rate)
        return recipe if self.profile == "full" else dataclasses.replace(recipe, batch_size=64, ema=0.9)

    def _start(self, way: str, plan: Plan, distance: str, shrinkage: float, recipe: Recipe, n_images: int, seed: int) -> nn.Module:
        material = self.material
        network, statistics = material.network, material.statistics
        if way == "compact":
            return rescale_like(self.merged(plan, seed), network)
        if way == "from scratch":
            config = compress_by_plan(network, plan, material.merging, "none", statistics=statistics, seed=seed, progress=False).config
            torch.manual_seed(seed)
            return ResNet(**config).to(material.calibration.device)
        weighting = 0.5 if distance == "correlation" else 0.0
        clusters = cluster_layers(network, plan, distance, statistics=statistics, weighting=weighting, seed=seed)
        if way == "tied":
            return finetuning.tied(network, clusters)
        if way == "centripetal":
            return finetuning.centripetal(network, clusters, finetuning.strength_for(recipe, n_images, shrinkage))
        renewals = {"clusters fixed": 0, "new clusters each epoch": n_images // recipe.batch_size, "new clusters each step": 1}
        return finetuning.projected(network, clusters, renewals[way.removeprefix("projected, ")])


def per_epoch(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each run's start, epoch 0, and each of its epochs: its settings, accuracy in %, moved in %, and distance."""
    settings = rows.loc[:, "plan":"checkpoint"]
    parts = []
    for i, row in rows.iterrows():
        accuracies = [row.accuracy_before, *map(float, str(row.curve).split())]
        part = pd.DataFrame({"epoch": range(len(accuracies)), "accuracy": accuracies})
        for name in ("moved", "distances"):
            values = [] if pd.isna(row[name]) else list(map(float, str(row[name]).split()))
            part[name] = pd.Series(values, index=range(1, len(values) + 1), dtype=float)
        parts.append(part.assign(**settings.loc[i]))
    return pd.concat(parts, ignore_index=True)


@functools.lru_cache(maxsize=4)
def _merged(experiment: FineTuningRuns, plan: tuple[tuple[str, int], ...], seed: int) -> ResNet:
    material, n_steps = experiment.material, 400 if experiment.profile == "full" else 20
    statistics = material.statistics
    return compress_by_plan(
        material.network, dict(plan), material.merging, statistics=statistics, n_steps=n_steps, seed=seed, progress=False
    )


def _is_constrained(network: nn.Module) -> bool:
    return any(map(parametrize.is_parametrized, convolutions(network).values()))


def _plain(network: nn.Module) -> nn.Module:
    return finetuning.released(network) if _is_constrained(network) else network


def _clusters(network: nn.Module) -> dict[str, float | str]:
    """The cluster of every filter, and the largest distance within clusters; nothing where filters are not constrained."""
    if not _is_constrained(network):
        return {}
    labels = itertools.chain(*finetuning.assignments(network).values())
    return {"labels": " ".join(map(str, labels)), "distance": max(finetuning.distances_within_clusters(network).values())}


def _changes(start: Mapping[str, float | str], history: pd.DataFrame) -> dict[str, str]:
    """For each epoch, the share of filters in another cluster than an epoch before, and the largest distance within clusters."""
    if not start:
        return {"moved": "", "distances": ""}
    labels = torch.tensor([list(map(int, text.split())) for text in [start["labels"], *history.labels]])
    moved = 100 * (labels[1:] != labels[:-1]).double().mean(1)
    return {"moved": _text(moved.tolist(), 2), "distances": _text(history.distance, 6)}


def _text(values: Sequence[float], digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
