import pandas as pd
import pytest

from resnet_pruning.report import methods

ROWS = [
    # method, level, stage, seed, accuracy
    ("ours", 0.5, "as pruned", 0, 80.0),
    ("ours", 0.5, "as pruned", 1, 90.0),
    ("ours", 0.5, "as pruned", 2, 82.0),
    ("theirs", 0.5, "as pruned", 0, 60.0),
    ("random", 0.5, "as pruned", 0, 50.0),
    ("ours", 0.25, "as pruned", 0, 30.0),
    ("theirs", 0.25, "as pruned", 0, 40.0),
    ("ours", 0.5, "fine-tuned", 0, 91.0),
    ("theirs", 0.5, "fine-tuned", 0, 92.0),
]


@pytest.fixture
def table():
    rows = pd.DataFrame(ROWS, columns=["method", "level", "stage", "seed", "accuracy"])
    return rows.assign(change=rows.accuracy - 93)


def test_the_leader_of_a_level_has_the_highest_mean(table):
    assert methods.leaders(table[table.stage == "as pruned"]).to_dict() == {0.5: "ours", 0.25: "theirs"}


def test_changes_stand_by_level_and_stage_in_the_order_of_the_methods(table):
    wide = methods.change_by_stage(table, ["random", "ours", "theirs"], ["as pruned", "new statistics", "fine-tuned"])
    assert list(wide) == [(0.5, "as pruned"), (0.5, "fine-tuned"), (0.25, "as pruned")]
    assert list(wide.index) == ["random", "ours", "theirs"]
    assert wide.loc["ours", (0.5, "as pruned")] == 84 - 93 and pd.isna(wide.loc["random", (0.25, "as pruned")])


def test_the_best_of_each_side_and_the_lead(table):
    best = methods.against_others(table, ["ours"])
    assert list(best.index) == [(0.5, "as pruned"), (0.5, "fine-tuned"), (0.25, "as pruned")]
    assert best["this project"].tolist() == ["ours"] * 3 and best["others"].tolist() == ["theirs"] * 3
    assert best["lead (pp)"].tolist() == pytest.approx([24, -1, -10])


def test_the_fit_is_told_from_the_choice():
    rows = [
        (0.5, "before", "elimination", 70.0),
        (0.5, "before", "elimination, reconstruction", 80.0),
        (0.5, "before", "elimination, reconstruction", 82.0),
        (0.5, "after", "random channels", 90.0),
        (0.75, "after", "random channels, reconstruction", 92.0),
    ]
    table = methods.worth_of_the_fit(pd.DataFrame(rows, columns=["level", "stage", "method", "accuracy"]))
    assert list(table.index) == list(methods.FITTED) and [*dict.fromkeys(level for level, _, _ in table)] == [0.75, 0.5]
    assert table[0.5, "before"].loc["elimination"].tolist() == [70, 81]
    assert table[0.5, "after"]["alone"].dropna().to_dict() == {"random channels": 90}
    assert table[0.75, "after", "fitted"]["random channels"] == 92 and table[0.5, "after", "fitted"].isna().all()


def test_controls_count_all_epochs_and_are_as_large_as_they_are():
    base = pd.Series({"epochs": 120, "macs": 1000, "parameters": 200})
    scratch = pd.DataFrame({"network": ["small", "small_seed1"], "epochs": 130, "macs": 500, "parameters": 120, "accuracy": [90.0, 91.0]})
    pruned = pd.DataFrame({"method": ["random", "ours"], "epochs": 10, "macs": 500, "parameters": 80, "accuracy": [89.0, 92.0]})
    table = methods.controls(scratch, pruned, base, base)
    assert list(table.index) == [("ours", 130), ("small, from scratch", 130), ("random", 130)]
    small = table.loc["small, from scratch", 130]
    assert small.tolist() == pytest.approx([0.5, 0.6, 90.5, 90, 91, 2])
    assert table.macs_share.tolist() == [0.5] * 3 and table.parameters_share.tolist() == [0.4, 0.6, 0.4]
    of_another = methods.controls(scratch, pruned, pd.Series({"epochs": 30}), base)
    assert list(of_another.index) == [("ours", 40), ("small, from scratch", 130), ("random", 40)]


def test_own_runs_stand_among_published_results():
    published = pd.DataFrame(
        {
            "network": ["ResNet-20", "ResNet-20"],
            "method": ["A", "B"],
            "year": [2018, 2019],
            "base_accuracy": [92.2, 92.2],
            "pruned_accuracy": [90.83, 91.09],
            "macs_share": [0.58, 0.4],
            "option": ["A", "B"],
            "epoch_read": ["best", "not said"],
            "epochs": [200, None],
            "looked_up": ["yes", "no"],
            "source": ["a paper", "a paper"],
        }
    )
    runs = pd.DataFrame(
        {"method": ["merged"], "epochs": [3], "epochs_before": [120], "accuracy": [91.0], "change": [-1.0], "macs_share": [0.5]}
    )
    everything = methods.among_published(published, runs, 92.004, "ours")
    assert list(everything) == [*published, "change", "MACs (%)", "group"]
    assert everything.change.tolist() == [-1.37, -1.11, -1.0] and everything["MACs (%)"].tolist() == pytest.approx([58, 40, 50])
    assert everything.group.tolist() == ["ResNet-20, option A, published", "ResNet-20, option B, published", "ours"]
    own = everything.iloc[2]
    assert (own.method, own.epochs, own.base_accuracy, own.pruned_accuracy) == ("merged, +3 epochs", 123, 92.0, 91.0)
    assert methods.outdone(everything, "ResNet-20", "ours").tolist() == [True, False]


@pytest.fixture
def levels():
    rows = [("cut", 1.0, 90.0), ("cut", 0.5, 88.0), ("cut", 0.25, 80.0), ("tied", 0.5, 86.0), ("tied", 0.5, 88.0), ("tied", 0.25, 84.0)]
    table = pd.DataFrame(rows, columns=["method", "level", "accuracy"])
    shrink = table.method.map({"cut": 1.0, "tied": 0.5})
    return table.assign(macs_share=table.level, parameters_share=table.level * shrink, bytes_share=table.level * shrink)


def test_each_currency_has_all_rows_in_the_order_of_the_methods(levels):
    panels = methods.in_currencies(levels, ["tied", "cut"])
    assert list(panels) == ["MACs", "parameters", "bytes"]
    assert all(list(panel.method.unique()) == ["tied", "cut"] and len(panel) == 6 for panel in panels.values())
    assert panels["bytes"].share.tolist() == [25, 25, 12.5, 100, 50, 25]


def test_accuracy_at_an_equal_share_lies_between_the_levels(levels):
    table = methods.at_equal(levels, 0.5)
    assert table.loc["cut"].tolist() == [88, 88, 88]
    assert table.MACs["tied"] == 87 and pd.isna(table.parameters["tied"])  # beyond what was measured
    between = methods.at_equal(levels, 0.5**1.5)  # half-way between the levels, as a logarithm
    assert between.MACs.tolist() == pytest.approx([84, 85.5])
    assert methods.at_equal(levels, 0.25).loc["tied"].tolist() == pytest.approx([84, 87, 87])
