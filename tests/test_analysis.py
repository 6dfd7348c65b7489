import numpy as np
import pandas as pd
import pytest

from resnet_pruning.report import analysis

OTHER, BETTER = "geometric median", "Torch-Pruning, group norm, all layers ranked together"
ACCURACIES = {  # of methods as pruned, with new statistics, fine-tuned
    "k-means, centroids": (20, 50, 88),
    "k-means of unit filters, centroids": (15, 53, 88.5),
    "elimination": (40, 70, 88.9),
    "random channels, least squares": (77, 77, 89),
    "random channels, reconstruction": (86, 86, 89.4),
    "elimination, reconstruction": (87, 87, 89.5),
    "by sensitivity, inside blocks": (88, 88, 90),
    "by sensitivity": (89, 89.5, 90.5),
    "random channels": (16, 54, 88.8),
    OTHER: (18, 55, 89.2),
    BETTER: (10, 30, 89.6),
}
STAGES = ("as pruned", "new batch-norm statistics", "fine-tuned")


@pytest.fixture
def methods():
    rows = [
        {"method": method, "stage": stage, "level": level, "seed": seed, "accuracy": accuracy + seed, "macs_share": level, "epochs": 3}
        for method, accuracies in ACCURACIES.items()
        for stage, accuracy in zip(STAGES, accuracies, strict=True)
        for level in ((0.5, 0.25) if method != "k-means, centroids" or stage != "fine-tuned" else (0.5,))
        for seed in (-1, 0, 1)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def tuned():
    columns = ["method", "level", "epochs", "accuracy"]
    rows = [
        ("by sensitivity, inside blocks", 0.5, 5, 90.8),
        ("by sensitivity, inside blocks", 0.5, 5, 91.0),
        ("by sensitivity, inside blocks", 0.5, 20, 91.4),
        ("by sensitivity, inside blocks", 0.5, 20, 91.6),
        ("by sensitivity, inside blocks", 0.5, 40, 92.0),
        ("by sensitivity, inside blocks", 0.25, 20, 89.0),
        ("by sensitivity", 0.5, 20, 99.0),
    ]
    return pd.DataFrame(rows, columns=columns)


def uniform_rows(plan, level, accuracies, **values):
    settings = {"distance": "raw", "weighting": 0.0, "representative": "centroid", "batch_norm": "re-estimated"} | values
    return [{"plan": plan, "level": level, "macs_share": level, "accuracy": accuracy, **settings} for accuracy in accuracies]


def test_rows_of_one_base_network(tmp_path):
    pd.DataFrame({"base": ["a 1", "b 2", "a 1"], "x": [1, 2, 3]}).to_csv(tmp_path / "t.csv", index=False)
    assert analysis.rows_of(tmp_path / "t.csv", "a 1").to_dict("list") == {"base": ["a 1", "a 1"], "x": [1, 3]}
    with pytest.raises(ValueError, match="t.csv has rows for a 1, b 2, expected some for c 3"):
        analysis.rows_of(tmp_path / "t.csv", "c 3")


def test_the_main_result_has_the_same_methods_without_and_with_training(methods):
    half, quarter = methods.level == 0.5, methods.level == 0.25
    panels = analysis.main_result(methods)
    assert list(panels) == ["50 % of the MACs", "25 % of the MACs"]
    best, second, *_, worst = panels["50 % of the MACs"].what.drop_duplicates()
    assert [best, second, worst] == [analysis.MAIN[name] for name in (*analysis.REPAIRED[::-1], "k-means, centroids")]
    (panel,) = analysis.main_result(methods[half | (quarter & (methods.stage != "fine-tuned"))]).values()
    ours = panel[panel.what == analysis.MAIN["by sensitivity, inside blocks"]]
    assert set(ours.stage) == set(STAGES) and set(panel.method) == set(analysis.MAIN) & set(ACCURACIES) and panel.level.eq(0.5).all()


def test_ways_at_the_same_share():
    rows = [
        *uniform_rows("uniform fraction", 0.5, [30, 31]),
        *uniform_rows("uniform fraction", 0.5, [12], batch_norm="as trained"),
        *uniform_rows("uniform fraction", 0.5, [52], distance="correlation", weighting=0.5),
        *uniform_rows("uniform fraction", 0.5, [1], distance="correlation"),
        *uniform_rows("uniform fraction", 0.5, [2], representative="medoid"),
        *uniform_rows("uniform", 8, [3]),
    ]
    curves = analysis.share_curves(pd.DataFrame(rows))
    assert curves.groupby("way").accuracy.apply(list).to_dict() == {
        "raw weights, statistics as trained": [12],
        "raw weights, statistics re-estimated": [30, 31],
        "correlation, weighted, statistics re-estimated": [52],
    }
    assert (curves["kept (%)"] == 50).all()


def test_the_knee():
    shares = [10, 40, 80, 100]
    assert analysis.knee(pd.Series([10, 30, 85, 92], shares)) == (80, pytest.approx(75 - 82 * 70 / 90))
    assert analysis.knee(pd.Series([10, 11, 12, 92], shares)) is None, "below the line everywhere"
    assert analysis.knee(pd.Series([10.0, 50.0, 90.0], [0, 50, 100])) is None, "a straight line"
    curves = pd.DataFrame({"way": ["a"] * 5 + ["b"] * 2, "kept (%)": [10, 40, 80, 80, 100, 50, 75], "accuracy": [10, 30, 84, 86, 92, 1, 2]})
    assert analysis.knees(curves, at_least=4) == {"a": (80, pytest.approx(75 - 82 * 70 / 90))}, "of medians, and not of two points"


def test_allocations():
    uniform = pd.DataFrame(
        [
            *uniform_rows("uniform", 0.4, [20, 22, 90]),
            *uniform_rows("uniform", 0.8, [62]),
            *uniform_rows("uniform fraction", 0.5, [50]),
            *uniform_rows("uniform fraction", 0.5, [0], distance="unit"),
        ]
    )
    budgets = pd.DataFrame(
        {
            "plan": ["uniform fraction", "by sensitivity", "uniform fraction"],
            "repair": ["reconstruction", "reconstruction", "none"],
            "macs_share": 0.5012,
        }
    )
    replaced, compressed = analysis.allocations(uniform, budgets).values()
    assert set(replaced.what) == {"equal numbers", "equal shares"} and len(replaced) == 5
    assert compressed.what.tolist() == ["equal shares, inside blocks", "by sensitivity"] and compressed["MACs (%)"].eq(50.1).all()
    assert analysis.accuracy_at(replaced, "equal numbers", 60) == pytest.approx(42)


def test_mean_gains():
    index = pd.MultiIndex.from_product([["raw"], ["MACs"], [0.5, 0.75], [0, 1]], names=["distance", "measure", "level", "seed"])
    gains = pd.DataFrame({"first-heavy": [-1, -2, -3, -4], "last-heavy": [1, 1, 1, 2], "chosen": 9}, index, dtype=float)
    each = analysis.each_gain(gains)
    assert each.family.drop_duplicates().tolist() == ["chosen", "last-heavy", "first-heavy"] and len(each) == 12
    assert each.iloc[-1].tolist() == ["raw", "MACs", 0.75, 1, "first-heavy", -4]
    table = analysis.mean_gains(each)
    assert table.family.tolist() == ["chosen", "last-heavy", "first-heavy"] and table["gain (pp)"].tolist() == [9, 1.25, -2.5]


def test_each_step_of_the_ladder_is_worth_the_difference(methods, tuned):
    only_here = methods.stage == "as pruned"
    steps = analysis.ladder(methods[~only_here], methods[only_here], tuned)
    assert steps.accuracy.tolist() == [20, 50, 54, 77, 86, 87, 88, 90.9, 91.5]
    assert steps.step.tolist()[-2:] == ["5 epochs of fine-tuning in all", "20 epochs of fine-tuning in all"], "40 epochs have fewer seeds"
    assert np.isnan(steps.worth[0]) and steps.worth[1] == 30 and steps.worth.sum() == pytest.approx(91.5 - 20)


def test_methods_are_compared_with_equal_epochs(tmp_path):
    row = {"base": "a 1", "method": "tied", "stage": "fine-tuned", "epochs": 5}
    pd.DataFrame([row | {"stage": "new batch-norm statistics", "epochs": 0}]).to_csv(tmp_path / "untrained.csv", index=False)
    pd.DataFrame([row | {"base": "old"}, row, row | {"epochs": 20}]).to_csv(tmp_path / "currencies.csv", index=False)
    assert analysis.compared_methods(tmp_path).epochs.tolist() == [0, 5]


def test_distances_are_sorted_by_the_last_share():
    rows = [
        *uniform_rows("uniform fraction", 0.75, [80, 70, 60]),
        *uniform_rows("uniform fraction", 0.5, [30]),
        *uniform_rows("uniform fraction", 0.75, [75], distance="unit", weighting=0.5),
        *uniform_rows("uniform fraction", 0.5, [41], distance="unit", weighting=0.5),
        *uniform_rows("uniform fraction", 0.5, [99], distance="unit", batch_norm="as trained"),
        *uniform_rows("uniform fraction", 0.9, [99], distance="folded"),
    ]
    table = analysis.by_distance(pd.DataFrame(rows))
    assert table.index.tolist() == ["unit, weighted · centroid", "raw · centroid"]
    assert table[0.75].tolist() == [75, 70] and list(table) == [0.75, 0.5]


def test_a_layer_alone_with_half_of_its_filters():
    alone = pd.DataFrame({"plan": ["a", "a", "a", "b", "b"], "level": [8.0, 8.0, 4.0, 8.0, 16.0], "change": [-1.0, -3.0, -9.0, -8.0, -2.0]})
    measures = pd.DataFrame({"layer": ["a", "b", "c"], "n_filters": [16, 32, 64]})
    measures = measures.assign(inertia=1.0, shuffled=1.5, effective_rank=2.0, rank_90=3.0, neighbour=4.0)
    table = analysis.alone_and_redundancy(alone, measures)
    assert table[analysis.ALONE].fillna(0).to_dict() == {"a": -2, "b": -2, "c": 0}
    assert list(table) == [analysis.ALONE, "inertia", "shuffled", "effective_rank", "rank_90", "neighbour"]


def test_mistakes_that_grow():
    before, after = np.array([[9, 1, 0], [2, 7, 1], [0, 0, 10]]), np.array([[5, 1, 4], [1, 7, 2], [0, 0, 10]])
    table = analysis.grown_mistakes(before, after, ["cat", "dog", "frog"])
    assert len(table) == 6 and table.iloc[0].to_dict() == {"true": "cat", "predicted": "frog", "before": 0, "after": 4, "more": 4}
    assert table.iloc[-1].more == -1


def test_time_by_macs():
    speed = pd.DataFrame(
        {
            "device": ["cpu", "cpu", "cpu", "cuda", "cpu"],
            "network": ["whole", "half", "quarter", "half", "resnet20_fast2_batch1"],
            "runtime": "eager",
            "precision": "float32",
            "batch_size": 256,
            "macs_share": [1, 0.5, 0.25, 0.5, 0.5],
            "own_speedup": [1, 1.25, 2, 9, 9],
        }
    )
    times = analysis.time_by_macs(speed)
    assert times["time (%)"].tolist() == [100, 80, 50] and times["MACs (%)"].tolist() == [100, 50, 25]
    assert analysis.saved_time(times).to_dict() == {"eager, float32, batch 256": pytest.approx((20 / 50 + 50 / 75) / 2)}


def test_removal_has_the_means_at_half_of_the_macs(methods):
    table = analysis.removal(methods)
    assert list(table) == list(STAGES[1:]) and table.loc["k-means, centroids"].tolist() == [50, 88]
    assert table.index.tolist() == [*analysis.REMOVED, *analysis.CLUSTERED, analysis.CORRELATED, *analysis.CHOSEN, *analysis.REPAIRED]
    assert table.loc["smallest L2 norm"].isna().all(), "not among the rows"


def test_pruned_quantized_and_both():
    rows = [
        ("MACs: 50 %", "W4A8", 95_000, 90_000, 91.3, -0.7),
        ("not pruned", "W4A8, by layer", 150_000, 148_000, 91.6, -0.4),
        ("not pruned", "W4A8", 151_000, 149_000, 91.7, -0.3),
        ("not pruned", "W2A2", 71_000, 70_000, 60.0, -32.0),
        ("MACs: 50 %", "float32", 735_816, None, 91.6, -0.4),
    ]
    pareto = pd.DataFrame(rows, columns=["pruned", "what", "bytes", "file_bytes", "accuracy", "change_from_base"])
    table = analysis.pruned_quantized_both(pareto)
    assert table.group.tolist() == ["pruned", "quantized", "both"] and table.kB.tolist() == [735.8, 148.0, 90.0]
    assert table.text.tolist() == ["50 %, float32", "not pruned, W4A8, by sensitivity", "50 %, W4A8"]
