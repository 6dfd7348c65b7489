import dataclasses

import pytest
import torch

from resnet_pruning import checkpoints, cost, model
from resnet_pruning.compression.by_plan import compress_by_plan
from resnet_pruning.compression.timings import predicted_seconds
from resnet_pruning.studies import currencies, kept_networks, method_runs, protocol


@pytest.fixture
def runs(small_checkpoint):
    torch.manual_seed(0)
    checkpoints.save_checkpoint(small_checkpoint, model.ResNet(8, (8, 12, 16)), {})
    return method_runs.MethodRuns(small_checkpoint, "digits", "quick")


def test_all_rows_have_equal_epochs_but_those_that_ask_for_more(runs):
    points = currencies.all_points(runs)
    assert len(points) == len(set(points)) and all(point.stage == "fine-tuned" and point.n_images == 0 for point in points)
    assert {point.epochs for point in points} == {protocol.EPOCHS, currencies.LONGER, currencies.LONGEST}
    assert {point.method for point in points if point.epochs == currencies.LONGER} == {*currencies.LONGER_METHODS, "not pruned"}
    assert all(point.learning_rate == protocol.rate_of(point.method, point.level) for point in points)
    for point in points:
        if point.epochs == protocol.EPOCHS and point.level not in currencies.BETWEEN:
            assert {dataclasses.replace(point, seed=seed) for seed in (0, 1, 2)} <= {*points}
    for method in currencies.CURVES:
        assert {point.level for point in points if point.method == method} == {*currencies.LEVELS, *currencies.BETWEEN}
    assert all((point.method == "not pruned") == (point.level == 1) for point in points)


def test_the_wide_network_is_pruned_to_the_bases_macs(runs):
    macs = cost.macs(runs.material.network) // 3
    points = currencies.wide_points(runs, macs)
    assert sorted({point.level for point in points}) == pytest.approx([1 / 6, 1 / 3], abs=1e-3)


def test_kept_networks_stay_within_their_budgets(runs, tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = runs.material.network
    streams = {"layer1": (4, 8), "layer2": (8, 12), "layer3": (12, 16)}
    timings = kept_networks.measured_parts(network, (2,), {"runtime": "eager", "precision": "float32"}, streams, rounds=2)
    assert set(timings.batch_size) == {2} and timings.seconds.ge(0).all() and timings.machine.nunique() == 1
    named = kept_networks.named_plans(network, runs.material.errors, timings, [0.6], {2: [1.25]})
    assert list(named) == ["resnet20_macs60", "resnet20_fast1.25_batch2"]
    points = kept_networks.kept_points(runs, named, (0, 1), epochs=[1], n_images=[64], learning_rate=[0.01])
    assert [(point.seed, point.checkpoint) for point in points] == [(0, name) for name in named] + [(1, ""), (1, "")]
    monkeypatch.setattr("resnet_pruning.studies.pruning_runs.results_folder", lambda dataset, profile: tmp_path)
    row = runs.measure_fine_tuned(points[0])
    small, facts = checkpoints.load_checkpoint(tmp_path / "checkpoints" / "resnet20_macs60.pt")
    assert cost.macs(small) == row["macs"] <= 0.6 * cost.macs(network) and facts["test_accuracy"] == row["accuracy"]
    whole = predicted_seconds(network, timings)
    sizes = [("conv1", 3, 8, 8), ("layer1.0.conv1", 8, 8, 8), ("layer2.0.conv1", 8, 12, 12), ("layer3.0.conv1", 12, 16, 16)]
    by_size = timings.set_index(["layer", "reads", "n_clusters", "writes"]).seconds
    assert whole == pytest.approx(sum(by_size[size] for size in sizes))
    by_time = compress_by_plan(network, named["resnet20_fast1.25_batch2"][1], runs.material.fitted_to, "none", progress=False)
    assert predicted_seconds(by_time, timings) <= whole / 1.25
    with pytest.raises(ValueError, match=r"timings lacks \('layer1.0.conv1', 8, 3, 8\), expected a row"):
        predicted_seconds(model.ResNet(8, (8, 12, 16), inner_widths={"layer1.0.conv1": 3}), timings)
