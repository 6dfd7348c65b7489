import dataclasses

import pytest
import torch

from resnet_pruning import checkpoints, cost, model, peers
from resnet_pruning.hardware import default_device
from resnet_pruning.studies import currencies, method_runs, right_answers, sweeps
from resnet_pruning.studies.method_runs import METHODS, STAGES, MethodRuns


@pytest.fixture
def runs(small_checkpoint):
    network = model.ResNet(8, (8, 12, 16))
    for norm in model.batch_norms(network).values():
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)  # of equal units none can be ranked first
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)  # and those with equal filters are not equal
    checkpoints.save_checkpoint(small_checkpoint, network, {})
    return MethodRuns(small_checkpoint, "digits", "quick")


def test_every_method_has_the_same_macs_and_rows_tell_what_was_done(runs, tmp_path):
    methods = [method for method in method_runs.available()[0] if method not in ("not pruned", *currencies.ALONE)]
    in_stages = methods[::4]  # of the others the first two stages would be made of the same networks once more
    points = runs.comparison_points(in_stages, [0.6], stage=STAGES, epochs=[1], n_images=[64])
    rest = [method for method in methods if method not in in_stages]
    points += runs.comparison_points(rest, [0.6], stage=STAGES[2:], epochs=[1], n_images=[64])
    table = sweeps.run_sweep(runs.measure_method, points, tmp_path / "methods.csv", progress=False)
    assert len(table) == 3 * len(in_stages) + len(rest)
    assert table.macs_share.between(0.5, 0.6).all()  # of so few channels each has some per cent of the MACs
    by_stage = table.pivot(index="method", columns="stage", values="accuracy").loc[in_stages]
    assert (by_stage["fine-tuned"] != by_stage["as pruned"]).any() and table[table.stage != "fine-tuned"].epochs.eq(0).all()
    assert table.groupby("method").macs.nunique().eq(1).all()
    assert set(table.family) == set(method_runs.FAMILIES) - {"control"} and table.bytes_share.lt(1).all()
    assert table.teacher.notna().equals(table.stage == "fine-tuned") and set(table.device) == {default_device().type}
    answers = sweeps.read_details(tmp_path / "methods.csv", "right", points)
    n_images = len(runs.material.images("test"))
    accuracies = [100 * right_answers.unpacked(text, n_images).double().mean().item() for text in answers.answers]
    assert accuracies == pytest.approx(table.accuracy.tolist(), abs=0.01)


@pytest.mark.parametrize("method", currencies.ALONE)
def test_streams_and_blocks_alone_leave_the_channels_inside_blocks(runs, method):
    whole = runs.material.network
    small = METHODS[method](runs, 0.75, 0)
    assert cost.macs(small) <= 0.75 * cost.macs(whole)
    widths = {name: (block.conv1.out_channels if not block.dropped else 0) for name, block in model.blocks(small).items()}
    kept = {name: block.conv1.out_channels for name, block in model.blocks(whole).items()}
    if "blocks" in method:
        assert 0 in widths.values() and small.config["stage_widths"] == whole.config["stage_widths"]
    else:
        assert widths == kept and small.config["stage_widths"] != whole.config["stage_widths"]
    assert all(n in (0, kept[name]) for name, n in widths.items())


@pytest.mark.parametrize("method", ["elimination", "elimination, reconstruction", "tied", "random channels"])
def test_fine_tuning_does_not_reach_the_next_measurement(runs, method):
    (tuned,) = runs.comparison_points([method], [0.6], stage=["fine-tuned"], epochs=[1], n_images=[192])
    weights = {name: tensor.clone() for name, tensor in METHODS[method](runs, 0.6, 0).state_dict().items()}
    runs.measure_method(tuned)
    again = METHODS[method](runs, 0.6, 0).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_control_is_the_network_itself(runs):
    (point,) = runs.comparison_points(["not pruned"], [1.0], stage=["as pruned"])
    row = runs.measure_method(point)
    assert row["change"] == 0 and row["macs_share"] == row["parameters_share"] == row["bytes_share"] == 1


def test_the_shape_alone_is_that_of_the_pruned_network_with_weights_that_only_the_seed_decides(runs):
    name, random = "by sensitivity, inside blocks", torch.get_rng_state()
    pruned = METHODS[name](runs, 0.6, 0)
    first, again, other = (METHODS[f"{name}, drawn anew"](runs, 0.6, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), random)
    assert first.config == pruned.config and not first.training and first.fc.weight.device == pruned.fc.weight.device
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not any(torch.equal(first.conv1.weight, network.conv1.weight) for network in (pruned, other))


def test_weights_are_pruned_and_fine_tuned_with_their_zeros(runs, tmp_path):
    points = runs.weight_points([0.0, 0.9], ["global", "per layer"], epochs=[0, 1], learning_rate=[0.03])
    table = sweeps.run_sweep(runs.measure_weights, points, tmp_path / "weights.csv", progress=False)
    assert table.zeros.tolist() == pytest.approx(table.sparsity.tolist(), abs=0.002)
    assert table.macs.eq(cost.macs(runs.material.network)).all() and table.bytes.nunique() == 1
    assert (table[table.sparsity == 0.9].gzip_bytes < 0.5 * table[table.sparsity == 0].gzip_bytes.min()).all()
    assert table[(table.sparsity == 0) & (table.epochs == 0)].change.eq(0).all()


def test_unknown_settings_are_refused(runs):
    (point,) = runs.comparison_points(["random channels"], [0.5], stage=["as pruned"])
    with pytest.raises(ValueError, match="method is 'magic', expected one of not pruned, random channels"):
        runs.measure_method(dataclasses.replace(point, method="magic"))
    with pytest.raises(ValueError, match="stage is 'trained', expected one of as pruned"):
        runs.measure_method(dataclasses.replace(point, stage="trained"))
    with pytest.raises(ValueError, match="choices has teacher, expected some of base, images, method"):
        runs.comparison_points(["random channels"], [0.5], teacher=[True])
    for method in ("random channels", "Neuron Merging", *(["Torch-Pruning, group norm"] if peers.HAS_TORCH_PRUNING else [])):
        with pytest.raises(ValueError, match="expected at least|expected more"):
            runs.measure_method(dataclasses.replace(point, method=method, level=0.01))
    assert set(METHODS) >= set(method_runs.SOLVED)
