"""The pruned and fine-tuned networks that are kept as checkpoints: ``python -m resnet_pruning.studies.kept_networks``.

Some plans have a budget of MACs, others of time, from the times of a network's parts in OpenVINO with int8. These are measured once, on an
idle machine: ``--measure`` does only that. Plans divide their budget among channels inside blocks, whole blocks, and the channels of the
streams, see `compression`. No filters are shared, which would save MACs but no time.
"""

import argparse
import functools
import itertools
from collections.abc import Mapping, Sequence

import pandas as pd

from .. import compression, cost
from ..arguments import Count, Integer, PositiveReal
from ..compression import part_timings
from ..files import required, results_folder
from ..hardware import machine
from ..model import ResNet
from ..plans import Plan
from .base import base_checkpoint
from .finetuning_runs import FineTuningPoint, FineTuningRuns
from .protocol import TEACHER, rate_of
from .sweeps import read_or_measure, run_sweep

LEVELS = (0.5, 0.25)  # of the MACs
SPEEDS = {256: (1.5, 2, 3), 1: (2,)}  # planned speed-ups, by images per batch
SETTING = {"runtime": "openvino", "precision": "int8"}
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the channels inside a block to time
STREAMS = {"layer1": (8, 12, 16), "layer2": (16, 24, 32), "layer3": (32, 48, 64)}  # widths to time
SEEDS, EPOCHS = (0, 1, 2), 10  # of fine-tuning


def measured_parts(
    network: ResNet,
    batch_sizes: Sequence[Integer] = tuple(SPEEDS),
    setting: Mapping[str, str] = SETTING,
    streams: Mapping[str, Sequence[Integer]] = STREAMS,
    rounds: Count = 20,
) -> pd.DataFrame:
    """The times of a network's parts at each batch size, see `compression.part_timings`, with the setting and the machine."""
    if bad := [size for size in batch_sizes if size < 1]:
        raise ValueError(f"batch_sizes has {bad[0]}, expected numbers of at least 1")
    tables = []
    for batch_size in batch_sizes:
        table = part_timings(network, batch_size, **setting, shares=SHARES, drops=True, stream_widths=streams, rounds=rounds, device="cpu")
        tables.append(table.assign(batch_size=batch_size, **setting, machine=machine("cpu")))
    return pd.concat(tables, ignore_index=True).round(8)


def named_plans(
    network: ResNet,
    errors: pd.DataFrame,
    timings: pd.DataFrame,
    levels: Sequence[PositiveReal] = LEVELS,
    speeds: Mapping[Count, Sequence[PositiveReal]] = SPEEDS,
) -> dict[str, tuple[tuple[str, str, float], Plan]]:
    """For each checkpoint name, such as ``resnet20_fast2_batch256``: the family, measure and level of its plan, and the plan.

    Parameters
    ----------
    network : to be pruned
    errors : its errors, from `compression.layer_errors`
    timings : from `measured_parts`
    levels : budgets, as shares of the MACs
    speeds : planned speed-ups, by batch size
    """
    by_macs = functools.partial(compression.by_sensitivity, network, sharing=False, errors=errors)
    plans = {f"resnet20_macs{100 * level:g}": (("by MACs", "MACs", level), by_macs(macs=level)) for level in levels}
    for batch_size, speed in ((size, speed) for size, chosen in speeds.items() for speed in chosen):
        of_size = timings[timings.batch_size == batch_size]
        plan = compression.by_sensitivity(network, time=1 / speed, errors=errors, timings=of_size)
        plans[f"resnet20_fast{speed:g}_batch{batch_size}"] = (f"by time, batch size {batch_size}", "time", 1 / speed), plan
    return plans


def kept_points(
    runs: FineTuningRuns, plans: Mapping[str, tuple[tuple[str, str, float], Plan]], seeds: Sequence[Integer] = SEEDS, **choices: Sequence
) -> list[FineTuningPoint]:
    """Points for `FineTuningRuns.measure_fine_tuned`, with the learning rates of `protocol` if not given. For each plan, the network of the
    first seed is kept, not the best one."""
    points, network = [], runs.material.network
    whole = cost.macs(network)
    shares = {name: compression.cost_of_plan(network, plan, merged=True)[1] / whole for name, (_, plan) in plans.items()}
    for seed, (name, (family, plan)) in itertools.product(seeds, plans.items()):
        own = {"learning_rate": [rate_of("by sensitivity", shares[name])], "checkpoint": ["" if seed != seeds[0] else name]}
        points += runs.fine_tuning_points({family: plan}, seed=[seed], **own | choices)
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", action="store_true", help="only measure the times of the parts, on an idle machine")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of fine-tuning; the networks of the first one are kept")
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time")
    arguments = parser.parse_args()
    figures = results_folder("cifar10", "full") / "figures"
    runs = FineTuningRuns(str(base_checkpoint("cifar10", "full")), "cifar10", taught_by=TEACHER)
    measure = functools.partial(measured_parts, runs.material.network)
    timings = read_or_measure(figures / "part_timings.csv", measure, anew=arguments.measure)
    if not arguments.measure:
        errors = read_or_measure(figures / "compact_errors.csv", lambda: runs.material.errors, base=runs.base)
        points = kept_points(runs, named_plans(runs.material.network, errors, timings), arguments.seeds, epochs=[arguments.epochs])
        with required("joblib", "studies").parallel_config(n_jobs=arguments.jobs):
            table = run_sweep(runs.measure_fine_tuned, points, figures / "kept_networks.csv")
        print(table[["plan", "level", "seed", "macs_share", "parameters_share", "accuracy_before", "accuracy", "change"]].to_string())


if __name__ == "__main__":
    main()
