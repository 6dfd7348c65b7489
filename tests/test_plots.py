"""The figures: what each returns, and that arrays and tensors give the same."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from resnet_pruning import clustering
from resnet_pruning.report import plots, style

CLASSES = ("cat", "dog", "ship")


def both(values):
    """The same values as an array and as a tensor that autograd follows, if it can."""
    array = np.asarray(values)
    return array, torch.tensor(array).requires_grad_(array.dtype.kind == "f")


def legend(figure: Figure) -> list[str]:
    """The texts of the legend that all panels share."""
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.fixture
def seeds():
    """Two ways at two levels; the first has three seeds."""
    rows = [("ours", 50, 80.0), ("ours", 50, 90.0), ("ours", 50, 84.0), ("ours", 25, 70.0), ("theirs", 25, 60.123), ("theirs", 50, 61.0)]
    return pd.DataFrame(rows, columns=["way", "level", "accuracy"])


def test_save_figure_writes_the_figure_and_its_numbers(tmp_path, seeds):
    figure, table = plots.curves({"a": seeds}, "level", "way", "level")
    plots.save_figure(figure, table, tmp_path / "new folder" / "name.png")
    assert sorted(path.name for path in (tmp_path / "new folder").iterdir()) == ["name.csv", "name.png"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new folder" / "name.csv"), table)


def test_curves_have_the_median_and_the_range_over_seeds(seeds):
    figure, table = plots.curves({"a": seeds, "b": seeds[seeds.way == "theirs"]}, "level", "way", "MACs", reference=(92.0, "not pruned"))
    expected = [
        ["a", "ours", 25, 70.0, 70.0, 70.0, 1],
        ["a", "ours", 50, 84.0, 80.0, 90.0, 3],
        ["a", "theirs", 25, 60.12, 60.12, 60.12, 1],
        ["a", "theirs", 50, 61.0, 61.0, 61.0, 1],
        ["b", "theirs", 25, 60.12, 60.12, 60.12, 1],
        ["b", "theirs", 50, 61.0, 61.0, 61.0, 1],
    ]
    pd.testing.assert_frame_equal(table, pd.DataFrame(expected, columns=["panel", "way", "level", "median", "min", "max", "count"]))
    assert legend(figure) == ["ours", "theirs", "not pruned", "band: lowest to highest"]
    left, right = figure.axes
    line = left.get_lines()[0]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([25, 50], [70, 84])
    band = {tuple(corner) for corner in left.collections[0].get_paths()[0].vertices.tolist()}
    assert band == {(25, 70), (50, 80), (50, 90)}, "a point with one seed is where the band ends"
    assert (left.get_ylabel(), right.get_ylabel()) == ("test accuracy (%)", "")


def test_curves_keep_the_look_of_a_line_in_every_panel(seeds):
    figure, _ = plots.curves({"a": seeds, "b": seeds[seeds.way == "theirs"]}, "level", "way", "MACs")
    theirs = [figure.axes[0].get_lines()[1], figure.axes[1].get_lines()[0]]
    assert theirs[0].get_color() == theirs[1].get_color() == style.COLORS[1]
    assert theirs[0].get_marker() == theirs[1].get_marker()
    figure, _ = plots.curves({"b": seeds[seeds.way == "theirs"]}, "level", "way", "MACs")
    assert legend(figure) == ["theirs"], "where nothing has seeds, no band is explained"


def test_more_curves_than_colours_have_a_legend_for_each_panel():
    n = len(style.COLORS)
    panels = {
        panel: pd.DataFrame({"way": [f"{panel}{i}" for i in range(n)], "level": 1.0, "accuracy": np.arange(n)}) for panel in ("a", "b")
    }
    figure, table = plots.curves(panels, "level", "way", "MACs")
    assert figure.legends == []
    assert [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes] == [
        [f"{panel}{i}" for i in range(n)] for panel in ("a", "b")
    ]
    assert len(table) == 2 * n


def test_curves_on_a_logarithmic_axis(seeds):
    figure, table = plots.curves({"a": seeds, "b": seeds}, "level", "way", "clusters", ticks=[[20, 50], None])
    left, right = figure.axes
    assert (left.get_xscale(), right.get_xscale()) == ("log", "linear")
    assert left.get_lines()[0].get_xdata().tolist() == [25, 50]
    assert [tick.get_text() for tick in left.get_xticklabels(which="both")] == ["20", "50"]
    assert table.level.tolist() == [25, 50, 25, 50] * 2


def test_curves_in_given_colours(seeds):
    figure, _ = plots.curves({"a": seeds}, "level", "way", "MACs", colors={"theirs": "#000000", "nobody's": "#ffffff"})
    ours, theirs = figure.axes[0].get_lines()[:2]
    assert (ours.get_color(), theirs.get_color()) == (style.COLORS[0], "#000000")
    assert tuple(plots.DISTANCE_COLORS) == clustering.DISTANCES


def test_a_curve_that_leaves_the_axis_has_its_number_at_the_edge(seeds):
    figure, table = plots.curves({"a": seeds, "b": seeds}, "level", "way", "MACs", lowest=65)
    for axes in figure.axes:
        assert axes.get_ylim()[0] == 65
        assert {(text.get_text(), text.xy) for text in axes.texts} == {("↓ 60", (25, 65)), ("↓ 61", (50, 65))}
    assert table["median"].min() == 60.12, "the table has the number itself"
    figure, _ = plots.curves({"a": seeds}, "level", "way", "MACs", lowest=20)
    assert figure.axes[0].get_ylim()[0] > 50 and not figure.axes[0].texts, "nothing is below"


@pytest.mark.parametrize("order", [["full", "empty"], ["empty", "full"]])
def test_curves_of_a_panel_without_rows(seeds, order):
    tables = {"full": seeds, "empty": seeds[:0]}
    figure, table = plots.curves({name: tables[name] for name in order}, "level", "way", "MACs")
    assert set(table.panel) == {"full"}
    assert legend(figure) == ["ours", "theirs", "band: lowest to highest"]


def test_heat_map_is_darker_further_from_zero():
    values = pd.DataFrame(
        {"half": [-1.0, -40.0], "a long name of a column": [np.nan, -80.0]}, index=pd.Index(["conv1", "fc"], name="layer")
    )
    figure, table = plots.heat_map(values, "a title", "pp", fmt="{:+.0f}", worst=-40, dark="bad")
    pd.testing.assert_frame_equal(table, values.reset_index())
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.texts] == ["-1", "-40", "-80"]
    luminance = axes.collections[0].get_facecolors()[:, :3].sum(axis=1)
    assert luminance[0] > luminance[2] == luminance[3]
    assert bar.get_ylabel() == "pp\n(dark is bad)"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["half", "a long name of\na column"]


@pytest.mark.parametrize(("dark", "label"), [(None, "%"), ("good", "%\n(dark is good)")])
def test_heat_map_says_whether_dark_is_good(dark, label):
    figure, _ = plots.heat_map(pd.DataFrame({1: [0.0, 5.0]}), "a title", "%", dark=dark)
    assert figure.axes[1].get_ylabel() == label
    assert figure.axes[0].collections[0].get_clim() == (0, 5)


def test_a_heat_map_of_few_rows_has_room_for_their_names(recwarn):
    figure, _ = plots.heat_map(pd.DataFrame({"W4A4": [92.0]}, index=["the longest name of all that were tried"]), "a title", "%")
    figure.draw_without_rendering()
    assert not recwarn.list
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["the longest name of all that were tried"]


def test_confusion_counts():
    counts = [[8, 2, 0], [1, 4, 0], [0, 0, 0]]
    tables = []
    for values in both(counts):
        figure, table = plots.confusion(values, CLASSES)
        tables.append(table)
        assert figure.get_suptitle() == "The most frequent mistake is cat taken for dog"
        assert [text.get_text() for text in figure.axes[0].texts[:4]] == ["80.0", "20.0", "0.0", "20.0"]
        assert figure.axes[0].collections[0].get_array().max() == 20, "right answers are not shaded"
    pd.testing.assert_frame_equal(*tables)
    assert table.columns.tolist() == ["true class", *CLASSES]
    assert table.to_numpy().tolist() == [["cat", 8, 2, 0], ["dog", 1, 4, 0], ["ship", 0, 0, 0]]


def test_dots_with_equal_names_stay_apart():
    table = pd.DataFrame({"step": ["first", "again", "again"], "gain": [1.0, 2.5, -3.0]})
    figure = plots.dots(table, "step", "gain", "a title", "pp", reference=(0, "nothing"), fmt="{:+.1f}")
    (axes,) = figure.axes
    assert axes.get_lines()[1].get_ydata().tolist() == [0, 1, 2]
    assert [text.get_text() for text in axes.texts] == ["nothing", "+1.0", "+2.5", "-3.0"]


def test_the_accuracy_before_and_after_is_one_row_for_each_way_in_all_panels():
    rows = [
        ("ours", "before", 70.0),
        ("ours", "before", 74.0),
        ("ours", "after", 90.0),
        ("theirs", "before", 40.0),
        ("theirs", "after", 91.0),
    ]
    half = pd.DataFrame(rows, columns=["way", "stage", "accuracy"])
    panels, stages = {"half": half, "a quarter": half[half.way == "theirs"]}, {"before": "before training", "after": "after it"}
    figure, table = plots.before_and_after(panels, "way", "accuracy", "stage", stages, "%", "a title", reference=(93, "whole"))
    first, second = figure.axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["ours", "theirs"]
    assert [text.get_text() for text in first.texts] == ["72.0", "90.0", "40.0", "91.0"]
    assert first.texts[0].xy == (70, 0), "beside the lowest seed"
    assert [text.get_text() for text in second.texts] == ["40.0", "91.0"] and second.texts[0].xy == (40, 1), (
        "in the same row as on the left"
    )
    assert legend(figure) == ["before training", "after it", "whole", "lowest to highest"]
    assert table.iloc[1].tolist() == ["half", "ours", "before", 72, 70, 74, 2] and len(table) == 6


def test_long_titles_stay_within_the_figure():
    table = pd.DataFrame({"step": ["first"], "gain": [1.0]})
    figure = plots.dots(table, "step", "gain", "a title of many words " * 12, "pp")
    figure.draw_without_rendering()
    assert figure._suptitle.get_window_extent().x1 < figure.bbox.x1
    assert "\n" in figure.get_suptitle()


def test_histograms_count_every_value():
    values = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    tables = []
    for some in both(values):
        figure, table = plots.histograms({"weights": (some, (-1.0, 2.0))}, "value", "a title", n_bins=5)
        tables.append(table)
    pd.testing.assert_frame_equal(*tables)
    assert table.columns.tolist() == ["panel", "low", "high", "value", "count"]
    assert (table["count"].sum(), len(table), table.low.unique(), table.high.unique()) == (120, 5, [-1], [2])
    assert sum(axes.axison for axes in figure.axes) == 1, "the rest of the row is empty"


@pytest.mark.parametrize("logarithmic", [False, True])
def test_scatter_labels_cover_no_dot_and_no_other_label(logarithmic):
    random = np.random.default_rng(0)
    table = pd.DataFrame(
        {"kB": random.uniform(20, 40, 25), "accuracy": random.uniform(90, 90.5, 25), "kind": ["a", "b", "c", "d", "e"] * 5}
    )
    table = pd.concat([table, pd.DataFrame({"kB": [1000.0], "accuracy": [70.0], "kind": ["far"]})], ignore_index=True)
    table["name"] = "network " + table.index.astype(str)
    figure, same = plots.scatter(
        table, "kB", "accuracy", "kind", "name", "kB", "%", "a title", reference=(92, "base"), logarithmic=logarithmic
    )
    pd.testing.assert_frame_equal(same, table)
    assert legend(figure) == ["a", "b", "c", "d", "e", "far", "base"]
    (axes,) = figure.axes
    if not logarithmic:
        return  # in a twentieth of the axis there is not room for all
    dots = axes.transData.transform(table[["kB", "accuracy"]].to_numpy())
    texts = {text.get_text(): text.get_window_extent() for text in axes.texts if text.get_text()}
    assert set(texts) == set(table.name)
    boxes = list(texts.values())
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    assert not any(Bbox.intersection(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_scatter_labels_and_joins_the_front_alone():
    table = pd.DataFrame({"kB": [40.0, 2, 30, 1], "accuracy": [95.0, 90, 85, 80], "kind": ["c", "b", "a", "a"]})
    table["name"] = "a network with a long name " + table.index.astype(str)
    figure, same = plots.scatter(table, "kB", "accuracy", "kind", "name", "kB", "%", "a title", front=[3, 1, 0])
    pd.testing.assert_frame_equal(same, table)
    (axes,) = figure.axes
    corners = axes.transData.transform(table.loc[[3, 1, 0], ["kB", "accuracy"]].to_numpy())
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert not any(box.contains(*point) for box in boxes for point in np.linspace(corners[:-1], corners[1:], 20).reshape(-1, 2))
    assert axes.get_lines()[0].get_xdata().tolist() == [1, 2, 40]
    assert {text.get_text() for text in axes.texts if text.get_text()} == {table.name[i] for i in (0, 1, 3)}
    pale, strong = axes.collections
    assert (pale.get_offsets().tolist(), pale.get_alpha()) == ([[30, 85]], 0.4)
    assert sorted(strong.get_offsets().tolist()) == [[1, 80], [2, 90], [40, 95]]


def test_scatter_keeps_the_looks_of_an_order():
    table = pd.DataFrame({"kB": [1.0, 2], "accuracy": [80.0, 90], "kind": ["c", "b"], "name": ["x", "y"]})
    figure, _ = plots.scatter(table, "kB", "accuracy", "kind", "name", "kB", "%", "a title", order=["a", "b"])
    assert legend(figure) == ["b", "c"], "the legend names what is drawn"
    assert [handle.get_color() for handle in figure.legends[0].legend_handles] == list(style.COLORS[1:3])


@pytest.mark.parametrize("held_out", [np.nan, 50.0])
@pytest.mark.parametrize("small_epochs", [0, 1, None])
def test_learning_curves(held_out, small_epochs):
    columns = {"learning_rate": 0.1234567, "loss": [2.0, 1.0], "train_accuracy": [20.0, 40.0], "held_out_accuracy": held_out}
    history = pd.DataFrame({"epoch": [1, 2], **columns, "seconds": 1.26, "images_per_second": 1000.4})
    figure, table = plots.learning_curves(history, SimpleNamespace(small_epochs=small_epochs, small_size=24), 45.678)
    assert table.columns.tolist() == [*history, "test_accuracy"]
    assert table.iloc[1, [1, 5, 6, 7]].tolist() == [0.12346, 1.3, 1000, 45.68]
    assert np.isnan(table.test_accuracy[0])
    assert "test_accuracy" not in history
    assert figure.get_suptitle() == "The training ends at 45.68 % on the test images"
    assert ("24×24 crops until here" in [text.get_text() for text in figure.axes[0].texts]) == bool(small_epochs)


@pytest.mark.parametrize("channels", [3, 4])
def test_filters_by_cluster(channels):
    weight = np.random.default_rng(0).normal(size=(5, channels, 3, 3))
    labels, medoids = np.array([1, 0, 1, 1, 2]), np.array([1, 2, 4])
    centroids = np.stack([weight[labels == cluster].mean(axis=0) for cluster in range(3)])
    tables = []
    for kind in (0, 1):
        clusters = SimpleNamespace(labels=both(labels)[kind], medoids=both(medoids)[kind], centroids=both(centroids)[kind])
        figure, table = plots.filters_by_cluster(both(weight)[kind], clusters, "a title")
        tables.append(table)
    pd.testing.assert_frame_equal(*tables)
    assert table.to_dict("list") == {"cluster": [1, 1, 1, 0, 2], "filter": [0, 2, 3, 1, 4], "medoid": [False, True, False, True, True]}
    assert [axes.get_title("center") for axes in figure.axes if axes.images] == ["", "0", "2 *", "3", "", "1", "", "4"]
    centroid, member = figure.axes[4], figure.axes[5]
    np.testing.assert_allclose(centroid.images[0].get_array(), member.images[0].get_array())


def test_kinds_of_pruning():
    _, table = plots.kinds_of_pruning()
    assert table.columns.tolist() == ["kind", "table", "row", "column", "state"]
    assert len(table) == 4 * (6 * 4 + 5 * 6)
    assert set(table.state) == {"kept", "zero", "gone", "cluster 0", "cluster 1", "cluster 2"}
    gone = table[(table.kind == "Unit pruning") & (table.state == "gone")]
    assert gone.groupby("table").size().to_dict() == {"layer": 2 * 4, "next layer": 2 * 5}
    assert set(gone[gone.table == "layer"].row) == set(gone[gone.table == "next layer"].column)


def test_the_idea_is_drawn_from_an_example_that_is_computed():
    figure, table = plots.idea()
    steps = dict(tuple(table.groupby("step", sort=False)))
    assert list(steps) == ["1 · Trained", "2 · Clustered", "3 · Replaced", "4 · Merged", "5 · Repaired"]
    weights = {
        (step, name): part.pivot_table(index="row", columns="column", values="value").to_numpy()
        for step, rows in steps.items()
        for name, part in rows.groupby("table")
    }
    replaced, merged = weights["3 · Replaced", "layer"], weights["4 · Merged", "layer"]
    np.testing.assert_array_equal(replaced, np.repeat(merged, 2, axis=0))
    inputs = np.random.default_rng(0).normal(size=(4, 5))
    outputs = [weights[step, "next layer"] @ np.maximum(weights[step, "layer"] @ inputs, 0) for step in ("3 · Replaced", "4 · Merged")]
    np.testing.assert_allclose(*outputs, atol=1e-2)
    assert steps["1 · Trained"].cluster.eq(-1).all() and set(steps["5 · Repaired"].cluster) == {0, 1, 2}
    arrows = [text for text in figure.axes[-1].texts if getattr(text, "arrow_patch", None)]
    lengths = [text.xyann[1] - text.xy[1] for text in arrows]
    changes = (weights["5 · Repaired", "next layer"] - weights["4 · Merged", "next layer"]).ravel()
    np.testing.assert_allclose(lengths, 0.9 * changes / np.abs(changes).max(), atol=1e-3)


@pytest.fixture
def images():
    """Six images of two of three classes."""
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 4, 4)
    return SimpleNamespace(pixels=pixels, labels=torch.tensor([0, 2, 0, 2, 0, 2]), classes=CLASSES)


def shown(figure: Figure) -> list[int]:
    """The numbers of the images in a figure, which are their pixels."""
    return [int(axes.images[0].get_array().max()) for axes in figure.axes if axes.images]


def test_sample_grid_has_the_first_of_each_class(images):
    figure = plots.sample_grid(images, per_class=2)
    assert shown(figure) == [0, 2, 1, 3]
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == list(CLASSES)


def test_mistakes_are_those_that_the_network_was_surest_of(images):
    logits = torch.tensor([[9.0, 0, 0], [1, 0, 0], [0, 3, 0], [0, 0, 8], [0, 0, 5], [0, 0, 6]])
    for values in (logits, logits.numpy()):
        figure = plots.mistakes(images, values, n=2)
        assert shown(figure) == [4, 2]
        lines = figure.axes[0].get_title("center").split("\n")
        probability = 100 * np.exp(5) / (np.exp(5) + 2)
        assert lines[:2] == ["is cat", f"ship {probability:.2f} %"]


def test_figures_are_closed(seeds):
    plots.curves({"a": seeds}, "level", "way", "MACs")
    assert plots.plt.get_fignums() == []
