import dataclasses

import numpy as np
import pytest
import torch

from resnet_pruning import checkpoints, cost, evaluation, model, quantization
from resnet_pruning.studies import pruning_runs, size_runs, sweeps


@pytest.fixture
def runs(small_checkpoint, tmp_path, monkeypatch):
    torch.manual_seed(0)
    checkpoints.save_checkpoint(small_checkpoint, model.ResNet(8, (8, 12, 16)), {})
    monkeypatch.setattr(pruning_runs, "results_folder", lambda dataset, profile: tmp_path)
    return size_runs.SizeRuns(small_checkpoint, "digits", "quick")


def test_rows_are_those_of_the_files(runs, tmp_path):
    trained = {"epochs": [1], "learning_rate": [0.01]}
    bits = {"weight_bits": [2, 4], "activation_bits": [8]}
    points = runs.size_points("learned steps", **bits, **trained, checkpoint=["steps"])
    points += runs.size_points("learned steps", weight_bits=[2], activation_bits=[2], stream_bits=[0, 8], **trained)
    points += runs.size_points("rounded to nearest", **bits) + runs.size_points("rounding learned", **bits)
    points += runs.size_points("codebook", granularity=["kernel"], n_representatives=[4, 16], renewals=[0, 2], **trained)
    points += runs.size_points("codebook", granularity=["row"], n_representatives=[4], representatives=["random"], checkpoint=["rows"])
    points += size_runs.untrained_points(runs, {"network": {"kernel": [8]}, "layer": {"kernel": [8]}})
    table = sweeps.run_sweep(runs.measure_size, points, tmp_path / "bytes.csv", progress=False)
    assert len(table) == 16 and table.accuracy.between(0, 100).all()
    few, many = (table[(table.method != "codebook") & (table.weight_bits == bits) & (table.activation_bits == 8)] for bits in (2, 4))
    assert (few.bytes_on_disk.to_numpy() < many.bytes_on_disk.to_numpy()).all()
    weights = cost.parameters(runs.material.network)
    assert table.bits_per_weight.tolist() == pytest.approx((8 * table.bytes_on_disk / weights).tolist(), abs=0.001)
    tested = runs.material.images("test")
    for name, load in {"steps": quantization.load_quantized, "rows": quantization.load_coded}.items():
        path = tmp_path / "checkpoints" / f"{name}.pt"
        network, facts = load(path)
        row = table[table.checkpoint == name].iloc[-1]
        assert facts["test_accuracy"] == row.accuracy == round(evaluation.accuracy(network, tested), 2)
        assert path.stat().st_size == row.bytes_on_disk


def test_pruned_networks_are_made_smaller_still(runs, tmp_path):
    torch.manual_seed(1)
    checkpoints.save_checkpoint(tmp_path / "checkpoints" / "half.pt", model.ResNet(8, (4, 6, 8)), {})
    points = runs.size_points("codebook", pruned=["", "half"], granularity=["kernel"], n_representatives=[4])
    whole, half = map(runs.measure_size, points)
    assert half["bytes_on_disk"] < whole["bytes_on_disk"] and half["bits_per_weight"] < whole["bits_per_weight"]


def test_codes_in_contexts_make_other_files_of_the_same_network(runs):
    """Not smaller ones, since this network is not trained: its pieces tell nothing about each other."""
    points = runs.size_points("codebook", granularity=["row"], n_representatives=[16], compact_file=[True], contexts=[False, True])
    plain, in_contexts = map(runs.measure_size, points)
    assert in_contexts["accuracy"] == plain["accuracy"]
    assert in_contexts["bytes_on_disk"] == pytest.approx(plain["bytes_on_disk"], rel=0.03) and in_contexts != plain


def test_steps_of_representatives_take_half_a_byte_each(runs):
    rows = {"granularity": ["row"], "n_representatives": [256], "compact_file": [True], "contexts": [True]}
    without, with_steps = map(runs.measure_size, runs.size_points("codebook", **rows, own_steps=[False, True]))
    assert 0 < with_steps["bytes_on_disk"] - without["bytes_on_disk"] < 256 * 0.75


def test_more_representatives_leave_less_and_random_ones_more(runs):
    numbers = {"filter": [2, 8], "kernel": [2, 8, 32], "row": [2, 8], "weight": [2, 8]}
    network = runs.material.network
    clustered, drawn = (size_runs.distortions(network, numbers, kind) for kind in ("k-means", "random"))
    for _, rows in clustered.groupby("granularity"):
        assert rows.error.is_monotonic_decreasing and rows.bits_per_weight.is_monotonic_increasing
    one_book = clustered[clustered.granularity != "filter"]
    length = one_book.granularity.map({"kernel": 9, "row": 3, "weight": 1})
    n_weights = sum(conv.weight.numel() for name, conv in model.convolutions(network).items() if name != "conv1")
    indices = one_book.bits_per_weight - 16 * one_book.n_representatives * length / n_weights
    assert indices.between(0, np.log2(one_book.n_representatives) / length + 1e-4).all()
    assert clustered.error.mean() < drawn.error.mean() and clustered.error.between(0, 100).all()


def test_unknown_methods_are_refused(runs):
    (point,) = runs.size_points("codebook", granularity=["kernel"], n_representatives=[4])
    with pytest.raises(
        ValueError, match="method is 'magic', expected one of rounded to nearest, rounding learned, learned steps, codebook"
    ):
        runs.measure_size(dataclasses.replace(point, method="magic"))
