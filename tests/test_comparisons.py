import pandas as pd
import pytest

from resnet_pruning.files import ROOT
from resnet_pruning.report import comparisons, tables

FIGURES = ROOT / "figures"


def test_the_most_frequent_mistakes_come_first():
    counts = pd.DataFrame({"true class": ["cat", "dog"], "cat": [90, 30], "dog": [10, 70]})
    table = comparisons.frequent_mistakes(counts, n=2)
    assert table["true class"].tolist() == ["dog", "cat"] and table["predicted class"].tolist() == ["cat", "dog"]
    assert table["share (%)"].tolist() == [30.0, 10.0]
    assert len(comparisons.frequent_mistakes(counts, n=1)) == 1


def test_replaced_rows_are_those_of_the_seeds():
    table = tables.newest(FIGURES / "prune_uniform.csv").query("images == 'test'")
    rows = comparisons.replaced_rows(table, plan="uniform fraction", level=0.5)
    assert rows.seed.tolist() == [0, 1, 2] and set(rows.distance) == {"raw"} and set(rows.batch_norm) == {"re-estimated"}
    assert len(comparisons.replaced_rows(table, plan="uniform", level=8, representative="medoid")) == 1
    assert comparisons.replaced_rows(table, plan="uniform", level=5).empty


def test_a_range_is_given_where_there_are_seeds():
    assert comparisons.with_range(pd.Series([80.0])) == "80.00 %"
    assert comparisons.with_range(pd.Series([80.0, 82.5, 81.0])) == "81.00 % (80.00 to 82.50 over 3 seeds)"
    assert comparisons.with_range(pd.Series([80.0, 83.0, 81.5, 83.5]), "mean") == "82.00 % (80.00 to 83.50 over 4 seeds)"


def test_changes_by_class_are_from_the_whole_network():
    whole = pd.Series({"accuracy": 90.0, "class_cat": 80.1, "class_dog": 99.9})
    rows = {"half": pd.Series({"accuracy": 50.0, "class_cat": 30.0, "class_dog": 70.0}, dtype=object)}
    changes = comparisons.changes_by_class(rows, whole)
    assert changes["half"].to_dict() == {"cat": -50.1, "dog": -29.9} and changes.index.name == "class"


def test_gains_are_summed_up_and_put_into_words():
    gains = tables.gains_of_ends(FIGURES)
    table = comparisons.summary_of_gains(gains)
    last = gains.loc["correlation", "MACs"]["last-heavy"]
    row = table.loc["correlation", "MACs", "last-heavy"]
    assert (row["mean"], row["lowest"], row["highest"]) == tuple(round(value, 2) for value in (last.mean(), last.min(), last.max()))
    assert row["better than uniform"] == f"{(last > 0).sum()} of {len(last)}"


@pytest.mark.parametrize(
    "at_macs, at_filters, words",
    [
        ((-1.0, 2.04), (-3.0, -1.0), "1 of 2 plans gain on average at equal MACs (most: chosen, +2.0 pp), none at equal filters"),
        ((-1.0, 0.0), (0.5, 0.1), "no plan gains on average at equal MACs, 2 of 2 at equal filters (most: last-heavy, +0.5 pp)"),
    ],
)
def test_the_plans_that_gain_are_named(at_macs, at_filters, words):
    means = pd.DataFrame([at_macs, at_filters], index=["MACs", "filters"], columns=["last-heavy", "chosen"])
    assert comparisons.plans_that_gain(means) == words


def test_a_schedule_gains_over_a_constant_rate():
    accuracies = {"SGD 0.01, constant": 77.0, "SGD 0.01, warm-up and cosine": 73.5}
    assert comparisons.schedule_gains(accuracies, {"SGD": 0.01}).to_dict() == {"SGD": -3.5}
