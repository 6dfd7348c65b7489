"""How everything that is compared is fine-tuned, and how that was chosen: ``python -m resnet_pruning.studies.protocol``.

Each trial changes one thing in the recipe before it. It fine-tunes a network with half or a quarter of the MACs, or with all of them, made
of one that has never seen the held-out tenth of the training images, and is judged on these. A trial that has its row in the CSV is
skipped, an interrupted one goes on.
"""

import argparse
import dataclasses
from typing import Any

import pandas as pd

from .. import evaluation, finetuning
from ..arguments import Real
from ..files import required, results_folder
from ..training import Recipe
from .base import choosing_checkpoint
from .method_runs import FAMILY_OF, METHODS, MethodRuns
from .sweeps import run_sweep
from .trials import LONG

FIRST = "by sensitivity, inside blocks"  # what all trials are run on; learning rates are chosen for a method of each family
EPOCHS = 5  # of every network that is compared
MUON = dataclasses.replace(finetuning.RECIPE, epochs=EPOCHS, views=EPOCHS)
SGD = dataclasses.replace(MUON, optimizer="SGD", learning_rate=0.05, weight_decay=0.0005)
# Learning rates tried for a method of each other family: three, and a fourth where the best of them was the smallest or the largest.
TUNED = {"smallest L2 norm": (0.003, 0.001, 0.01, 0.03), "tied": (0.001, 0.003, 0.01, 0.03), "not pruned": (0.0003, 0.001, 0.003)}
# Rates tried again where half as much is left: do those of half of the MACs still fit?
TUNED_AT_A_QUARTER = {
    "elimination, reconstruction": (0.003, 0.01, 0.03),
    "random channels": (0.003, 0.01, 0.03),
    "tied": (0.003, 0.01, 0.03, 0.1),
}
# Rates tried again for the longest fine-tuning: do those of `EPOCHS` still fit?
LONGEST, TUNED_FOR_LONGER = 40, (0.003, 0.01, 0.03)
TEACHER = ""  # the base itself: in its trial, the network of doubled widths did not teach better, and it takes longer
# The learning rate of each family of methods. What is merged or only clustered starts about where removal does, and has its rate.
RATES = {
    "control": 0.0003,
    **dict.fromkeys(("channels removed", "channels merged", "Torch-Pruning", "clustering alone", "chosen on images, removed"), 0.01),
    **dict.fromkeys(("filters stay clustered", "removed and repaired", "removed and repaired, allocated by sensitivity"), 0.003),
    "shape alone": LONG.learning_rate,  # trained from the start, as the base is
}
RATES_AT_A_QUARTER = RATES | {"filters stay clustered": 0.03}
RATES_AT_A_QUARTER |= dict.fromkeys(("removed and repaired", "removed and repaired, allocated by sensitivity"), 0.01)


@dataclasses.dataclass(frozen=True)
class ProtocolPoint:
    """A fine-tuning of one network, by the name of what is tried.

    Attributes
    ----------
    base : the checkpoint that it is made of, by `files.fingerprint`
    method, level : of `method_runs.METHODS`, and its share of the MACs
    taught_by : name of the network in ``checkpoints/`` that is imitated, or "" for the base
    """

    base: str
    trial: str
    method: str = FIRST
    level: float = 0.5
    seed: int = 0
    taught_by: str = ""
    recipe: Recipe = SGD


def rate_of(method: str, level: Real) -> float:
    """The learning rate of a method of `method_runs.METHODS` at a share of the MACs: from 0.3 downwards, that of a quarter."""
    return (RATES_AT_A_QUARTER if level <= 0.3 else RATES)[FAMILY_OF[method]]


TRIALS: dict[str, tuple[Recipe, str]] = {
    **{f"SGD {rate:g}": (dataclasses.replace(SGD, learning_rate=rate), "") for rate in (0.02, 0.05, 0.1)},
    **{f"Muon {rate:g}": (dataclasses.replace(MUON, learning_rate=rate), "") for rate in (0.003, 0.01, 0.001)},
    "Muon 0.003, taught by doubled widths": (MUON, "resnet20_wide"),
    "Muon 0.003, small crops first": (dataclasses.replace(MUON, small_share=0.5), ""),
    "Muon 0.003, weight decay 0.01": (dataclasses.replace(MUON, weight_decay=0.01), ""),
    "Muon 0.003, labels alone": (dataclasses.replace(MUON, distillation=0.0), ""),
}


def run_trials(runs: MethodRuns, points: list[ProtocolPoint], csv: Any, progress: bool = True) -> pd.DataFrame:
    """The trials' rows, the best first: the point, held-out accuracy (%), the kind of device, training accuracy of the last
    epoch, and seconds."""

    def run(point: ProtocolPoint) -> dict[str, Any]:
        material = runs.material
        network = runs.ready_to_train(METHODS[point.method](runs, point.level, point.seed), point.method)
        taught = dataclasses.replace(runs, taught_by=point.taught_by)
        history = taught.fine_tune(network, material.trained_on("training"), point.recipe, point)
        accuracy = evaluation.accuracy(network, material.images("training"))
        change = accuracy - evaluation.accuracy(material.network, material.images("training"))
        row = {"held_out_accuracy": round(accuracy, 2), "change": round(change, 2), "device": material.images("training").device.type}
        return row | {"train_accuracy": round(history.train_accuracy.iloc[-1], 2), "seconds": round(history.seconds.sum(), 1)}

    return run_sweep(run, points, csv, progress).sort_values("held_out_accuracy", ascending=False, ignore_index=True)


def all_points(runs: MethodRuns) -> list[ProtocolPoint]:
    """Learning rates on a network of each family but the first, of three again at a quarter of the MACs, and all trials on the first, on
    which rates are also tried for the longest fine-tuning."""
    tuned = [(method, 1.0 if method == "not pruned" else 0.5, rates) for method, rates in TUNED.items()]
    points = []
    for method, level, rates in [*tuned, *((method, 0.25, rates) for method, rates in TUNED_AT_A_QUARTER.items())]:
        recipes = [dataclasses.replace(MUON, learning_rate=rate) for rate in rates]
        points += [ProtocolPoint(runs.base, f"Muon {recipe.learning_rate:g}", method, level, recipe=recipe) for recipe in recipes]
    for rate in TUNED_FOR_LONGER:
        recipe = dataclasses.replace(finetuning.RECIPE, epochs=LONGEST, learning_rate=rate)
        points.append(ProtocolPoint(runs.base, f"Muon {rate:g}, {LONGEST} epochs", recipe=recipe))
    return points + [ProtocolPoint(runs.base, name, taught_by=teacher, recipe=recipe) for name, (recipe, teacher) in TRIALS.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time")
    jobs = parser.parse_args().jobs
    runs = MethodRuns(str(choosing_checkpoint("cifar10", "full")), "cifar10")
    with required("joblib", "studies").parallel_config(n_jobs=jobs):
        print(run_trials(runs, all_points(runs), results_folder("cifar10", "full") / "figures" / "protocol_trials.csv").to_string())


if __name__ == "__main__":
    main()
