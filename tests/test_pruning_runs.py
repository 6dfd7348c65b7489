import dataclasses
import os
import warnings

import joblib
import pandas as pd
import pytest
import torch

from resnet_pruning import checkpoints, compression, cost, model, plans
from resnet_pruning.studies import sweeps
from resnet_pruning.studies.pruning_runs import PruningRuns


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "small.pt"
    checkpoints.save_checkpoint(path, model.ResNet(8, (4, 6, 8)), {})
    return PruningRuns(str(path), "digits", "quick")


def points_of(runs):
    network, _ = checkpoints.load_checkpoint(runs.checkpoint)
    some = {("uniform", "clusters", n): plans.uniform(network, n) for n in (2, 8)}
    return runs.points(some, distance=["raw", "correlation"], batch_norm=["as trained", "re-estimated"])


def test_points_say_all_that_a_row_must(runs):
    points = points_of(runs)
    assert len(points) == len(set(points)) == 8
    assert points[0].distance == "raw" and points[0].clusters == (2,) * 7
    assert points[-1].clusters == (4, 4, 4, 6, 6, 8, 8) and points[0].base.startswith("small ")
    network, _ = checkpoints.load_checkpoint(runs.checkpoint)
    (only_stem,) = runs.points({("stem alone", "clusters", 1): {"conv1": 1}})
    assert only_stem.clusters == (1, 4, 4, 6, 6, 8, 8)
    with pytest.raises(ValueError, match="choices has metric, expected some of base, images, plan"):
        runs.points({("uniform", "clusters", 1): plans.uniform(network, 1)}, metric=["raw"])
    with pytest.raises(ValueError, match="the plan names 'fc'"):
        runs.points({("mine", "", 1): {"fc": 1}})


def test_measured_rows_hold_together(runs):
    whole = runs.points(
        {("uniform", "clusters", 8): plans.uniform(checkpoints.load_checkpoint(runs.checkpoint)[0], 8)}, batch_norm=["as trained"]
    )
    row = runs.measure(whole[0])
    assert row["change"] == 0 and row["macs_share"] == row["parameters_share"] == 1 and row["distinct_filters"] == 40
    row = runs.measure(points_of(runs)[0])
    assert row["distinct_filters"] == 14 and row["macs_share"] < 0.6
    classes = [value for name, value in row.items() if name.startswith("class_")]
    assert len(classes) == 10 and min(classes) <= row["accuracy"] <= max(classes)


def test_merged_rows_hold_together(runs):
    network, _ = checkpoints.load_checkpoint(runs.checkpoint)
    plan = {"layer2.0.conv1": 3, "layer3.0.conv2": 5}
    whole, *smaller = (
        point
        for some in ({}, plan)
        for point in runs.compression_points({("mine", "", 1): some}, repair=["least squares"], batch_norm=["as it is", "re-estimated"])
    )
    assert runs.measure_compressed(whole)["change"] == 0
    row = runs.measure_compressed(smaller[-1])
    assert smaller[-1].clusters == (4, 4, 4, 3, 6, 8, 5)
    assert (row["parameters"], row["macs"]) == compression.cost_of_plan(network, plan, merged=True)
    assert row["macs_share"] == round(row["macs"] / cost.macs(network), 4)
    with pytest.raises(ValueError, match="batch_norm is 'new', expected 're-estimated' or 'as it is'"):
        runs.measure_compressed(dataclasses.replace(whole, batch_norm="new"))


@pytest.mark.parametrize("change", [{"images": "validation"}, {"batch_norm": "new"}])
def test_unknown_settings_are_refused(runs, change):
    (key, value), point = next(iter(change.items())), points_of(runs)[0]
    with pytest.raises(ValueError, match=f"{key} is '{value}', expected"):
        runs.measure(dataclasses.replace(point, **change))
    with pytest.raises(ValueError, match="profile is 'slow', expected one of quick, full"):
        PruningRuns("a.pt", "digits", "slow")


def test_a_cluster_of_two_processes_gives_the_same_rows(runs, tmp_path):
    """The same call, in a joblib context: a Dask scheduler and two workers, each a process of its own."""
    distributed = pytest.importorskip("distributed")
    points = points_of(runs)
    here = sweeps.run_sweep(runs.measure, points, tmp_path / "here.csv", progress=False)
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of event loops and ports, distributed's own
        with (
            distributed.LocalCluster(**options, local_directory=tmp_path) as cluster,
            distributed.Client(cluster),
            joblib.parallel_config(backend="dask"),
        ):
            pids = joblib.Parallel(batch_size=1)(joblib.delayed(os.getpid)() for _ in range(20))
            there = sweeps.run_sweep(runs.measure, points, tmp_path / "there.csv", progress=False)
    assert os.getpid() not in pids  # the work was not done here
    timings = [name for name in here if name.startswith("seconds_")]
    pd.testing.assert_frame_equal(there.drop(columns=timings), here.drop(columns=timings))
