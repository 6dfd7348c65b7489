"""Fine-tuning runs as points of a sweep (see `sweeps.run_sweep`): one row for each run."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from .. import calibration, cost, evaluation, finetuning
from ..arguments import Integer, PositiveReal, Seed
from ..checkpoints import digest, save_checkpoint
from ..compression.by_plan import compress_by_plan, rescale_like
from ..data import Images
from ..files import results_folder
from ..model import ResNet
from ..plans import Plan
from ..training import Execution, Recipe, train
from .pruning_runs import PlanPoint, Plans, PruningRuns


@dataclasses.dataclass(frozen=True)
class FineTuningPoint(PlanPoint):
    """A training of the network that `compression.compress_by_plan` returns for a plan.

    Attributes
    ----------
    n_images : number of training images, 0 for all
    epochs, learning_rate : of `finetuning.RECIPE`
    seed : of the compression and of the batches
    checkpoint : name under which the result is saved, or ""
    """

    n_images: int = 0
    epochs: int = finetuning.RECIPE.epochs
    learning_rate: float = finetuning.RECIPE.learning_rate
    seed: int = 0
    checkpoint: str = ""


@dataclasses.dataclass(frozen=True)
class FineTuningRuns(PruningRuns):
    """Fine-tuning of networks that were made from one checkpoint, with the same batches and the same teacher.

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
        """Compress, train and evaluate. An interrupted run resumes where it stopped.

        Returns
        -------
        accuracy in %, its change in pp, cost, accuracy per class; the accuracy before the first epoch, with new batch-norm statistics; and
        seconds
        """
        plan = self.plan(point)
        training, judged = self.material.trained_on(point.images), self.material.images(point.images)
        training = training[: point.n_images or len(training)]
        recipe = self.recipe(point.epochs, point.learning_rate)
        network = rescale_like(self.compressed(plan, point.seed), self.material.network)
        before = evaluation.accuracy(calibration.reestimate_batch_norm(network, self.material.calibration), judged)
        history = self.fine_tune(network, training, recipe, point)
        row = self.judged(network, point.images, {"parameters": cost.parameters(network), "macs": cost.macs(network)})
        if point.checkpoint:
            facts = {name: value for name, value in dataclasses.asdict(point).items() if name != "clusters"} | {"plan": plan}
            facts |= {"test_accuracy" if point.images == "test" else "held_out_accuracy": row["accuracy"]}
            facts |= {name: row[name] for name in ("parameters", "macs", "macs_share")}
            facts |= {"recipe": dataclasses.asdict(recipe), "dataset": self.dataset, "torch": str(torch.__version__)}
            save_checkpoint(self.path(point.checkpoint), network, facts)
        return {**row, "accuracy_before": round(before, 2), "seconds": round(history.seconds.sum(), 1)}

    def compressed(self, plan: Plan, seed: Seed = 0, *, selection: str = "elimination", repair: str = "reconstruction") -> ResNet:
        """The network that `compression.compress_by_plan` returns for a plan, cached for runs that share it. It must not be modified."""
        return _compressed(self, self.base, tuple(plan.items()), seed, selection, repair)

    def fine_tune(self, network: nn.Module, images: Images, recipe: Recipe, point: Any, execution: Execution | None = None) -> pd.DataFrame:
        """Train the network of a point in place, with its seed and the teacher. An interrupted training resumes where it stopped."""
        teacher = copy.deepcopy(self.network(self.taught_by))
        # By all that decides the result: with another recipe or teacher, the old state would be refused. By the network, too: with another
        # number of threads, the same point may be pruned a little differently.
        tensors = [*network.state_dict().values(), *teacher.state_dict().values()]
        name = digest(repr((self, point, recipe)), tensors)[:16]
        torch.compiler.reset()  # compiled networks of earlier runs count towards a limit, beyond which nothing is compiled
        return train(
            network,
            images,
            recipe,
            seed=point.seed,
            teacher=teacher,
            folder=results_folder(self.dataset, self.profile) / "build" / "fine_tuning" / name,
            execution=execution or Execution(),
            progress=self.profile == "full",
        )

    def recipe(self, epochs: Integer, learning_rate: PositiveReal) -> Recipe:
        """`finetuning.RECIPE` with these settings; in profile "quick", also with smaller batches and a shorter average of the weights."""
        recipe = dataclasses.replace(finetuning.RECIPE, epochs=epochs, learning_rate=learning_rate)
        return recipe if self.profile == "full" else dataclasses.replace(recipe, batch_size=64, ema=0.9)


@functools.lru_cache(maxsize=4)
def _compressed(runs: FineTuningRuns, base: str, plan: tuple[tuple[str, Integer], ...], seed: Seed, selection: str, repair: str) -> ResNet:
    material = runs.material
    settings = {"selection": selection, "statistics": material.statistics, "seed": seed, "progress": False}
    n_steps = 400 if runs.profile == "full" else 5
    return compress_by_plan(material.network, dict(plan), material.fitted_to, repair, n_steps=n_steps, **settings)
