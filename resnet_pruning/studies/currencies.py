"""Accuracy for MACs, for parameters and for bytes, after the same fine-tuning: ``python -m resnet_pruning.studies.currencies``.

Each network is made by one of `method_runs.METHODS` and fine-tuned by `finetuning.RECIPE`, with the epochs, the teacher and the learning
rate of its family in `protocol`. What is compared at `LEVELS` after `EPOCHS` has three seeds. A row that is in the CSV is not measured
again, and an interrupted training goes on.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from .. import cost
from ..checkpoints import load_checkpoint
from ..files import required, results_folder
from .base import base_checkpoint
from .method_runs import MethodPoint, MethodRuns, available
from .protocol import EPOCHS, LONGEST, TEACHER, rate_of
from .sweeps import run_sweep

LEVELS = (0.5, 0.25)  # of the MACs, for the methods that are shown
SHOWN = (
    "by sensitivity",
    "by sensitivity, inside blocks",
    "elimination, reconstruction",
    "random channels, reconstruction",
    "elimination, allocated by sensitivity",
    "elimination",
    "k-means of activations, medoids",
    "smallest L2 norm",
    "random channels",
    "k-means, centroids",
    "k-means of unit filters, centroids",
    "k-means of correlation, centroids",
    "tied, clustered by raw weights",
    "tied",
    "projected",
    "projected, new clusters each step",
)
ALONE = ("by sensitivity, streams alone", "by sensitivity, blocks alone")  # at half of the MACs, which both can reach
BETWEEN = (0.36, 0.75)  # for the four methods of the curves, with one seed after `EPOCHS`
CURVES = ("by sensitivity, inside blocks", "elimination, reconstruction", "smallest L2 norm", "tied")
LONGER = 20  # epochs, or even `LONGEST`: are five too few?
ANEW = "by sensitivity, inside blocks, drawn anew"
LONGER_METHODS = ("smallest L2 norm", "by sensitivity, inside blocks", ANEW)
BEST_RIVAL = "Torch-Pruning, geometric median, all layers ranked together"
FOLDED = "Model Folding, repaired"  # of the methods of others, the one that is nearest to clustering
GROUP_NORM = "Torch-Pruning, group norm, all layers ranked together"  # and the default of the library
RIVALS = (
    "Model Folding",
    FOLDED,
    "GRAIL after folding",
    "GRAIL after removal",
    "Neuron Merging",
    GROUP_NORM,
    BEST_RIVAL,
    "geometric median",
    "smallest L1 norm",
)
FITS = ("random channels, least squares", "elimination, least squares", "smallest L2 norm, reconstruction")  # before fine-tuning only
SEEDS = (0, 1, 2)
FROM_WIDE = ("by sensitivity, inside blocks", "by sensitivity", FOLDED, "smallest L2 norm")


def trained(runs: MethodRuns, methods: Sequence[str], levels: Sequence[float], seeds: Sequence[int], epochs: int) -> list[MethodPoint]:
    """Points of fine-tuned networks; what is not pruned has all MACs at any level, and so only one."""
    points = [
        MethodPoint(
            runs.base, "test", method, 1.0 if method == "not pruned" else level, "fine-tuned", seed, 0, epochs, rate_of(method, level)
        )
        for seed in seeds
        for level in levels
        for method in methods
    ]
    return list(dict.fromkeys(points))


def all_points(runs: MethodRuns) -> list[MethodPoint]:
    """What ``figures/currencies.csv`` has, what matters most first."""
    points = trained(runs, ["not pruned", *SHOWN, *ALONE, *available(RIVALS)[0]], LEVELS[:1], SEEDS, EPOCHS)
    points += trained(runs, SHOWN, LEVELS[1:], SEEDS, EPOCHS)
    points += trained(runs, available([BEST_RIVAL, FOLDED, GROUP_NORM])[0], LEVELS[1:], SEEDS, EPOCHS)
    points += trained(runs, CURVES, BETWEEN, SEEDS[:1], EPOCHS)
    points += trained(runs, LONGER_METHODS, LEVELS[:1], SEEDS, LONGER)
    points += trained(runs, ["not pruned"], LEVELS[:1], SEEDS[:1], LONGER)
    points += trained(runs, CURVES[:1], [LEVELS[0], BETWEEN[0]], SEEDS, LONGEST)
    points += trained(runs, CURVES[:1], LEVELS[1:], SEEDS[:1], LONGEST)
    return points


def wide_points(runs: MethodRuns, macs: int) -> list[MethodPoint]:
    """The points of ``figures/currencies_wide.csv``: the network of doubled widths with as many MACs as the base, and with half of them.
    At as many MACs, two of the methods have three seeds.

    Parameters
    ----------
    runs : of the network of doubled widths
    macs : of the base
    """
    levels = [round(share * macs / cost.macs(runs.material.network), 4) for share in (1, 0.5)]
    points = trained(runs, FROM_WIDE, levels, [0], EPOCHS)
    return points + trained(runs, FROM_WIDE[:2], levels[:1], [1, 2], EPOCHS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--wide", action="store_true", help="prune the network of doubled widths, into figures/currencies_wide.csv")
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time")
    arguments = parser.parse_args()
    figures = results_folder("cifar10", "full") / "figures"
    base = base_checkpoint("cifar10", "full")
    runs = MethodRuns(str(base), "cifar10", taught_by=TEACHER)
    points, csv = all_points(runs), "currencies.csv"
    if arguments.wide:
        runs = dataclasses.replace(runs, checkpoint=str(runs.path("resnet20_wide")))
        points, csv = wide_points(runs, cost.macs(load_checkpoint(base)[0])), "currencies_wide.csv"
    with required("joblib", "studies").parallel_config(n_jobs=arguments.jobs):
        print(run_sweep(runs.measure_method, points, figures / csv).to_string())


if __name__ == "__main__":
    main()
