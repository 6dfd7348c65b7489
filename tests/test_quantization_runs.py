import dataclasses

import pytest
import torch

from resnet_pruning import checkpoints, evaluation, model, quantization
from resnet_pruning.quantization import pytorch
from resnet_pruning.studies import sweeps
from resnet_pruning.studies.quantization_runs import READY, QuantizationRuns

torchao = pytest.importorskip("torchao")


@pytest.fixture
def runs(small_checkpoint):
    return QuantizationRuns(small_checkpoint, "digits", "quick")


def test_fewer_bits_are_fewer_bytes_and_settings_are_kept_in_the_row(runs, tmp_path):
    points = runs.quantizing_points([(8, 8), (4, 8), (2, 2)], n_images=[64], rounding=["nearest", "block"], n_steps=[3])
    table = sweeps.run_sweep(runs.measure_quantized, points, tmp_path / "runs.csv", progress=False)
    assert table.groupby("weight_bits").bytes.max().is_monotonic_increasing and (table.file_bytes < table.bytes + 5000).all()
    assert (table.change == table.change_from_base).all() and set(table.rounding) == {"nearest", "block"}


def test_a_kept_network_is_the_one_that_the_row_describes(runs, tmp_path):
    (point,) = runs.quantizing_points([(4, 6)], n_images=[64], checkpoint=["mine"], end_bits=[0])
    row = runs.measure_quantized(point)
    path = runs.path("mine")
    network, facts = quantization.load_quantized(path)
    assert facts["test_accuracy"] == row["accuracy"] == round(evaluation.accuracy(network, runs.material.images("test")), 2)
    assert path.stat().st_size == row["file_bytes"] and facts["end_bits"] == 0 and network.bits["ends"] == 6


def test_changes_are_from_the_network_that_the_file_holds_now(runs):
    (point,) = runs.quantizing_points([(16, 16)], "training", n_images=[32], weight_range=["min-max"])
    judged = runs.material.images("training")
    first = runs.measure_quantized(point)
    before = first["accuracy"] - first["change"]
    network, facts = checkpoints.load_checkpoint(runs.path(""))
    shares = 100 * torch.bincount(judged.labels, minlength=10) / len(judged)
    only = int((shares - before).abs().argmax())
    with torch.no_grad():
        network.fc.bias[only] += 1e4  # the only class that it names
    checkpoints.save_checkpoint(runs.path(""), network, facts)
    now = runs.measure_quantized(point)
    assert now["accuracy"] - now["change"] == pytest.approx(float(shares[only]), abs=0.02)
    assert float(shares[only]) != pytest.approx(before, abs=0.02)


def test_bits_by_sensitivity_take_no_more_bytes(runs):
    points = runs.quantizing_points([(3, 8)], n_images=[64], allocation=["equal", "by sensitivity"])
    equal, mixed = (runs.measure_quantized(point) for point in points)
    assert mixed["bytes"] <= equal["bytes"] and len(set(equal["layer_bits"].split()[1:-1])) == 1
    with pytest.raises(ValueError, match="allocation is 'random', expected one of equal, by sensitivity"):
        runs.measure_quantized(dataclasses.replace(points[0], allocation="random"))


def test_pytorchs_own_ways_are_judged_alike(runs, trained, tmp_path):
    checkpoints.save_checkpoint(tmp_path / "small.pt", trained, {})
    table = sweeps.run_sweep(runs.measure_ready, runs.ready_points(), tmp_path / "ready.csv", progress=False).set_index("kind")
    assert list(table.index) == list(READY) and table.change["float32"] == 0 and table.change.abs().max() < 2, "at most three of 200 images"
    assert table.bytes["torchao int8"] < table.bytes["bfloat16"] < table.bytes["float32"]


def test_calibration_images_differ_by_seed_and_are_none_of_those_judged(runs):
    chosen = [runs.images_to_calibrate(50, seed).pixels for seed in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])


def test_unknown_settings_are_refused(runs):
    with pytest.raises(ValueError, match="choices has quality, expected some of base, images"):
        runs.quantizing_points([(8, 8)], quality=[8])
    with pytest.raises(ValueError, match="kind is 'int3', expected one of float32"):
        runs.measure_ready(runs.ready_points(["int3"])[0])
    with pytest.raises(ValueError, match="kind is 'float8', expected one of float16, bfloat16"):
        pytorch.HalfPrecision(model.ResNet(8), "float8")
