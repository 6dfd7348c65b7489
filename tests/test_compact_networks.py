import pandas as pd
import pytest

from resnet_pruning import cost
from resnet_pruning.report import compact_networks as tables
from resnet_pruning.studies import compact_networks, pruning_runs
from resnet_pruning.studies.pruning_runs import PruningRuns

WIDTHS = {"conv1": 16, "layer1.0.conv1": 16, "layer2.0.conv1": 32}


@pytest.fixture
def runs(small_checkpoint):
    return PruningRuns(small_checkpoint, "digits", "quick")


def test_compact_networks_are_as_good_as_exact(runs):
    table, networks = compact_networks.exactness(runs, [0.5], compact_networks.REPLACEMENTS[:2], ["centroid"])
    assert table.network.tolist() == list(networks) == ["50%, raw, centroid", "50%, folded, centroid, mergeable"]
    assert (table.difference < 100).all() and table.macs_share.is_monotonic_decreasing
    whole = cost.macs(runs.material.network)
    assert [round(cost.macs(small) / whole, 4) for small in networks.values()] == table.macs_share.tolist()


def test_onnxruntime_agrees(runs):
    pytest.importorskip("onnxruntime")
    table = compact_networks.in_onnxruntime({"small": runs.material.network}, runs.material.images("test")[:20])
    assert table["same predictions (%)"].tolist() == [100] and table["largest difference of a logit"].max() < 1e-4 and table.bytes.min() > 0


def test_values_are_laid_out_by_share_of_the_filters():
    table = pd.DataFrame(
        {"layer": ["layer2.0.conv1", "layer2.0.conv1", "layer1.0.conv1"], "n_clusters": [32, 4, 2], "error": [0.0, 0.4, 0.3]}
    )
    grid = tables.by_share(table, "error", WIDTHS)
    assert list(grid) == ["12.5", "100"] and list(grid.index) == ["layer2.0.conv1", "layer1.0.conv1"]
    assert grid["12.5"].tolist() == [0.4, 0.3]


def test_times_are_shares_of_the_whole_block_with_a_row_for_each_shape():
    blocks = ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"]
    rows = [
        (name, n * width // 4, seconds) for name, width in zip(blocks, (16, 16, 32), strict=True) for n, seconds in ((2, 0.3), (4, 0.4))
    ]
    rows[-1] = ("layer2.0.conv1", 32, 0.6)
    timings = pd.DataFrame([("conv1", 16, 0.1), *rows], columns=["layer", "n_clusters", "seconds"])
    grid = tables.time_by_share(timings, WIDTHS | {"layer1.1.conv1": 16})
    assert list(grid.index) == ["layer1.0.conv1", "layer2.0.conv1"] and grid["50"].tolist() == pytest.approx([75, 50])


def test_what_plans_take_away():
    table = tables.removed({"50": WIDTHS | {"conv1": 4}, "25": dict.fromkeys(WIDTHS, 8)}, WIDTHS)
    assert list(table) == ["50", "25"] and table["50"].tolist() == [75, 0, 0] and table["25"].tolist() == [50, 50, 75]
    of_block = {"conv1": 16, "layer1.0.conv1": 16, "layer1.0.conv2": 16, "layer2.0.conv1": 32, "layer2.0.conv2": 32}
    assert tables.removed({"a": {"layer2.0.conv1": 0}}, of_block)["a"].tolist() == [0, 0, 0, 100, 100]
    assert tables.removed({"a": {"layer1": 12, "layer1.0.conv1": 8}}, of_block)["a"].tolist() == [25, 50, 25, 0, 0]


def test_what_one_choice_gains():
    rows = [("none", "a", 10), ("none", "b", 12), ("solved", "a", 50), ("solved", "b", 58)]
    table = pd.DataFrame(rows, columns=["repair", "selection", "accuracy"]).assign(level=0.5)
    gain = tables.gain(table, "selection", "b", "a", ["repair", "level"])
    assert gain["mean"].to_dict() == {"none": 2, "solved": 8} and list(gain) == ["mean", "min", "max"]


def test_kept_networks_are_averaged_over_seeds():
    rows = [("MACs", 0.5, 0, "half", 91.0), ("time", 0.5, 0, "fast", 90.0), ("MACs", 0.5, 1, None, 92.0)]
    table = pd.DataFrame(rows, columns=["measure", "level", "seed", "checkpoint", "accuracy"])
    table = table.assign(
        plan="a", macs_share=table.level, parameters_share=0.6, epochs=20, accuracy_before=88.0, change=table.accuracy - 93
    )
    kept = tables.kept(table)
    assert list(kept.index) == ["half", "fast"] and kept.seeds.tolist() == [2, 1]
    assert kept.loc["half", ["accuracy", "lowest", "highest", "change"]].tolist() == [91.5, 91, 92, -1.5]


def test_compact_networks_are_as_good_as_exact_on_a_gpu(runs, gpu, monkeypatch):
    monkeypatch.setattr(pruning_runs, "default_device", lambda: gpu)
    table, _ = compact_networks.exactness(runs, [0.5], compact_networks.REPLACEMENTS[:1], ["centroid"])
    assert table.difference.max() < 100


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("resnet20", "not pruned"),
        ("resnet20_macs50", "50 % of the MACs"),
        ("resnet20_fast1.5_batch256", "planned 1.5×, batches of 256"),
        ("resnet20_fast2_batch1", "planned 2×, single images"),
    ],
)
def test_networks_have_names_that_need_no_table(network, name):
    assert tables.called(network) == name
