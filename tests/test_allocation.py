import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compress_by_plan import IMAGES, NETWORK, STATISTICS, with_multiples

from resnet_pruning import calibration, compression, cost, data, model
from resnet_pruning.compression import allocation
from resnet_pruning.compression.timings import predicted_seconds

MANY = data.load_images("digits")[0][:240]
SHARES = (0.25, 0.5, 0.75, 1.0)
ERRORS = allocation.layer_errors(NETWORK, MANY, shares=SHARES, statistics=STATISTICS, progress=False)

amounts = st.integers(0, 20).map(float)
parts = st.lists(st.lists(st.tuples(amounts, amounts), min_size=1, max_size=5).map(np.array), min_size=1, max_size=5)


@given(parts, st.floats(0, 1))
@settings(deadline=None)
def test_the_cheapest_choice_is_that_of_brute_force(options, tightness):
    least, most = (sum(f(part[:, 0]) for part in options) for f in (np.min, np.max))
    budget = least + tightness * (most - least)
    chosen = allocation.cheapest(options, budget)
    total = sum(part[i] for part, i in zip(options, chosen, strict=True))
    combinations = (sum(rows) for rows in itertools.product(*options))
    best = min(error for spent, error in combinations if spent <= budget)
    assert total[0] <= budget + 1e-6 and total[1] == best


def test_no_choice_within_the_budget():
    with pytest.raises(ValueError, match="budget is 2, expected at least 3"):
        allocation.cheapest([np.array([[1.0, 0.0]]), np.array([[2.0, 0.0], [3.0, 1.0]])], 2)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.3])
def test_the_plan_stays_within_its_budget_and_no_measured_plan_is_better(share):
    plan = allocation.by_sensitivity(NETWORK, macs=share, errors=ERRORS)
    macs = compression.cost_of_plan(NETWORK, plan, merged=True)[1]
    assert macs <= share * cost.macs(NETWORK)
    by_layer = {name: table for name, table in ERRORS.groupby("layer", sort=False)}
    free = ["layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1"]  # brute force over these, the others as planned
    best = np.inf
    for rows in itertools.product(*(by_layer[layer].itertuples() for layer in free)):
        other = plan | {row.layer: row.n_clusters for row in rows}
        if compression.cost_of_plan(NETWORK, other, merged=True)[1] <= share * cost.macs(NETWORK):
            best = min(best, sum(row.error for row in rows))
    ours = sum(by_layer[layer].set_index("n_clusters").error[plan[layer]] for layer in free)
    assert ours == pytest.approx(best)
    if share == 1:
        assert ours == 0


def test_the_merged_network_has_the_macs_that_were_allocated():
    plan = allocation.by_sensitivity(NETWORK, macs=0.4, errors=ERRORS)
    small = compression.compress_by_plan(NETWORK, plan, IMAGES, "least squares", statistics=STATISTICS, progress=False)
    assert (
        0.25 * cost.macs(NETWORK) < cost.macs(small) == compression.cost_of_plan(NETWORK, plan, merged=True)[1] <= 0.4 * cost.macs(NETWORK)
    )


def test_errors_are_of_every_layer_and_zero_for_the_whole_one():
    assert set(ERRORS.layer) == set(model.convolutions(NETWORK))
    for layer, table in ERRORS.groupby("layer"):
        whole = model.convolutions(NETWORK)[layer].out_channels
        assert list(table.n_clusters) == sorted({round(share * whole) for share in SHARES})
        assert table.error.iloc[-1] == 0 and (table.error.iloc[:-1] > 0).all()
        assert table.error.iloc[0] > table.error.iloc[-2]


def test_channels_that_are_multiples_cost_nothing():
    network = with_multiples([1.0, 2.0, 0.5, 3.0])
    errors = allocation.layer_errors(network, MANY, shares=(0.5,), progress=False).set_index(["layer", "n_clusters"]).error
    assert errors["layer2.0.conv1", 4] < 1e-4 < errors["layer2.0.conv2", 4]


def test_time_is_spent_where_it_buys_most():
    ends = {"conv1": (3, 6), "layer1.0.conv1": (6, 6), "layer2.0.conv1": (6, 8), "layer3.0.conv1": (8, 10)}
    timings = pd.DataFrame(
        [
            {"layer": layer, "reads": ends[layer][0], "n_clusters": n, "writes": ends[layer][1], "seconds": 1.0}
            for layer, n in ERRORS[["layer", "n_clusters"]].itertuples(index=False)
            if layer in ends
        ]
    )
    fast = (timings.layer == "layer2.0.conv1") & (timings.n_clusters == 4)
    timings.loc[fast, "seconds"] = 0.1  # the only part that is faster with fewer channels
    plan = allocation.by_sensitivity(NETWORK, time=0.9, errors=ERRORS, timings=timings)
    assert plan == {"layer1.0.conv1": 6, "layer2.0.conv1": 4, "layer3.0.conv1": 10}
    with pytest.raises(ValueError, match="time is 0.7, expected at least 0.7750, which the smallest plan takes"):
        allocation.by_sensitivity(NETWORK, time=0.7, errors=ERRORS, timings=timings)
    with pytest.raises(ValueError, match="timings lacks conv1, expected the stem and every block"):
        allocation.by_sensitivity(NETWORK, time=0.7, errors=ERRORS, timings=timings[timings.layer != "conv1"])


def test_timings_cover_every_part():
    timings = allocation.part_timings(NETWORK, 2, shares=(0.5,), rounds=1, device="cpu", progress=False)
    assert list(timings.layer.unique()) == ["conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]
    assert list(timings.n_clusters) == [6, 3, 6, 4, 8, 5, 10] and (timings.seconds >= 0).all() and timings.seconds[0] > 0
    assert (timings.lowest <= timings.seconds).all() and (timings.seconds <= timings.highest).all()
    assert allocation.by_sensitivity(NETWORK, time=1.0, errors=ERRORS, timings=timings).keys() >= {"layer1.0.conv1"}


def test_timings_cover_dropped_blocks_and_narrower_streams():
    widths = {"layer1": [4, 6], "layer2": [5, 8], "layer3": [10]}
    timings = allocation.part_timings(NETWORK, 1, shares=(), drops=True, stream_widths=widths, rounds=1, device="cpu", progress=False)
    shapes = {layer: set(zip(rows.reads, rows.n_clusters, rows.writes, strict=True)) for layer, rows in timings.groupby("layer")}
    assert shapes == {
        "conv1": {(3, 4, 4), (3, 6, 6)},
        "layer1.0.conv1": {(4, 0, 4), (4, 6, 4), (6, 0, 6), (6, 6, 6)},
        "layer2.0.conv1": {(4, 0, 5), (4, 8, 5), (4, 0, 8), (4, 8, 8), (6, 0, 8), (6, 8, 8)},
        "layer3.0.conv1": {(5, 0, 10), (5, 10, 10), (8, 0, 10), (8, 10, 10)},
    }


@pytest.fixture(scope="module")
def all_errors():
    return allocation.layer_errors(
        NETWORK, MANY, shares=(0.5, 1.0), drops=True, stream_shares=(0.5, 0.75), statistics=STATISTICS, progress=False
    )


def test_errors_of_narrower_streams_are_measured_on_images_that_were_not_fitted_to(monkeypatch):
    drawn, fitted, in_order, by_plan = [], [], allocation.augmented_in_order, allocation.compress_by_plan
    monkeypatch.setattr(allocation, "augmented_in_order", lambda *given: drawn.append(in_order(*given)) or drawn[-1])
    monkeypatch.setattr(allocation, "compress_by_plan", lambda *given, **choices: fitted.append(given[2]) or by_plan(*given, **choices))
    allocation.layer_errors(NETWORK, MANY, shares=(1.0,), stream_shares=(0.5,), statistics=STATISTICS, progress=False)
    n_fitted = {len(images) for images in fitted}
    judged = MANY.pixels[drawn[0][1][n_fitted.pop() :]]
    assert not n_fitted and 0 < len(judged) < len(MANY)
    for images in fitted:
        assert not (images.pixels.flatten(1).unsqueeze(1) == judged.flatten(1)).all(2).any()


def test_errors_of_dropped_blocks_and_narrower_streams(all_errors):
    table = {layer: rows.set_index("n_clusters").error.sort_index() for layer, rows in all_errors.groupby("layer")}
    for name in model.blocks(NETWORK):
        errors = table[f"{name}.conv1"]
        assert errors[0] > errors[errors.index[1]] > 0 == errors.iloc[-1]
    assert [list(table[stage].index) for stage in ("layer1", "layer2", "layer3")] == [[3, 4, 6], [6, 8], [8, 10]]
    assert all(table[stage].iloc[-1] == 0 and (table[stage].iloc[:-1] > 0).all() for stage in ("layer1", "layer2", "layer3"))


@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
def test_blocks_are_dropped_and_streams_narrowed_where_that_costs_least(all_errors, share):
    plan = allocation.by_sensitivity(NETWORK, macs=share, errors=all_errors)
    table = {layer: rows.set_index("n_clusters").error.sort_index() for layer, rows in all_errors.groupby("layer")}

    def error(plan):
        return sum(errors[plan.get(layer, errors.index[-1])] for layer, errors in table.items())

    assert compression.cost_of_plan(NETWORK, plan, merged=True)[1] <= share * cost.macs(NETWORK)
    best = np.inf
    choices = [table[stage].index for stage in ("layer1", "layer2", "layer3")]
    choices += [table[f"{name}.conv1"].index for name in model.blocks(NETWORK)]
    for first, second, third, *inner in itertools.product(*choices):
        if first <= second <= third:
            other = {"layer1": first, "layer2": second, "layer3": third} | {
                f"{name}.conv1": n for name, n in zip(model.blocks(NETWORK), inner, strict=True)
            }
            if compression.cost_of_plan(NETWORK, other, merged=True)[1] <= share * cost.macs(NETWORK):
                best = min(best, error(other))
    without_sharing = allocation.by_sensitivity(NETWORK, macs=share, sharing=False, errors=all_errors)
    assert error(without_sharing) == pytest.approx(best) and error(plan) <= best + 1e-12
    small = compression.compress_by_plan(NETWORK, plan, IMAGES, "least squares", statistics=STATISTICS, progress=False)
    assert cost.macs(small) == compression.cost_of_plan(NETWORK, plan, merged=True)[1]


@pytest.mark.parametrize("kinds", [("channels",), ("blocks",), ("streams",), ()])
def test_plans_change_only_what_they_may(all_errors, kinds):
    errors = allocation.of_kinds(all_errors, kinds)
    whole = errors.groupby("layer").n_clusters.max()
    plan = allocation.by_sensitivity(NETWORK, macs=1.0 if not kinds else 0.7, errors=errors)
    smaller = {layer: n for layer, n in plan.items() if n < whole[layer]}
    assert bool(smaller) == bool(kinds)
    assert all((layer in allocation.STAGES) == (kinds == ("streams",)) for layer in smaller)
    assert all((n == 0) == (kinds == ("blocks",)) for n in smaller.values())
    assert allocation.of_kinds(all_errors, allocation.KINDS).equals(all_errors)
    with pytest.raises(ValueError, match="kinds has 'filters', expected some of channels, blocks, streams"):
        allocation.of_kinds(all_errors, ["filters"])


def test_time_is_spent_on_the_streams_that_buy_most(all_errors):
    widths = {"layer1": [3, 4, 6], "layer2": [6, 8], "layer3": [8, 10]}
    timings = allocation.part_timings(NETWORK, 1, shares=(0.5,), drops=True, stream_widths=widths, rounds=1, device="cpu", progress=False)
    timings["seconds"] = timings.reads + timings.writes + timings.n_clusters
    whole = timings.groupby("layer").seconds.max().sum()
    for share in (0.9, 0.6):
        plan = allocation.by_sensitivity(NETWORK, time=share, errors=all_errors, timings=timings)
        stream = [plan.get(stage, width) for stage, width in zip(("layer1", "layer2", "layer3"), (6, 8, 10), strict=True)]
        spent = 3 + 2 * stream[0]
        for name, read, written in zip(model.blocks(NETWORK), (stream[0], *stream[:2]), stream, strict=True):
            spent += read + written + plan[f"{name}.conv1"]
        assert spent <= share * whole


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "macs is None and time is None, expected one of them"),
    ({"macs": 0.5, "time": 0.5}, "macs is 0.5 and time is 0.5, expected one of them"),
    ({"macs": 0}, "macs is 0, expected a number above 0"),
    ({"macs": 1.01}, "macs is 1.01, expected a number above 0"),
    ({"macs": "half"}, "macs='half'"),
    ({"time": float("nan")}, "time is nan, expected a number above 0"),
    ({"macs": 0.01}, r"macs is 0.01, expected at least 0\.\d+, which the smallest plan takes"),
    ({"macs": 0.5, "errors": None}, "neither images nor errors are given"),
    ({"macs": 0.5, "errors": ERRORS[ERRORS.layer != "conv1"]}, "errors lacks conv1, expected every convolution"),
])  # fmt: skip
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocation.by_sensitivity(NETWORK, **{"errors": ERRORS} | arguments)


@pytest.mark.parametrize("shape", [(8, (6, 8, 12)), (14, (6, 8, 10)), (8, (6, 8, 10), {"layer2.0.conv1": 0})])
def test_statistics_of_another_network_are_refused(shape):
    statistics = calibration.layer_statistics(model.ResNet(*shape).eval(), MANY[:10])
    message = r"statistics are of another model: for layer\d.\d.conv\d, the filters and the values of each are .*, expected "
    with pytest.raises(ValueError, match=message):
        allocation.layer_errors(NETWORK, MANY, shares=(0.5,), statistics=statistics, progress=False)
    with pytest.raises(ValueError, match=message):
        compression.compress_by_plan(NETWORK, {"conv1": 2}, MANY, "none", statistics=statistics, progress=False)


def test_bad_measurements():
    with pytest.raises(ValueError, match="128 images, expected at least 200"):
        allocation.layer_errors(NETWORK, IMAGES)
    with pytest.raises(ValueError, match="shares has 0, expected numbers above 0 and at most 1"):
        allocation.layer_errors(NETWORK, MANY, shares=(0, 0.5))
    with pytest.raises(ValueError, match="shares has 1.5, expected numbers above 0 and at most 1"):
        allocation.part_timings(NETWORK, shares=(0.5, 1.5))


def test_parts_with_shared_filters_have_the_size_of_their_channels():
    """A compact network is expanded before it is made smaller."""
    sharing = {"conv1": [0, 1, 0, 1, 2, 2], "layer2.0.conv1": [0, 0, 1, 1, 2, 2, 3, 3], "layer3.0.conv2": [0] * 10}
    compact = model.ResNet(8, (6, 8, 10), sharing=sharing).eval()
    timings = allocation.part_timings(compact, 1, shares=(), rounds=1, device="cpu", progress=False)
    assert list(timings.n_clusters) == [6, 6, 8, 10]
    assert predicted_seconds(compact, timings) == pytest.approx(timings.seconds.sum())
    plan = {"layer1.0.conv1": 4, "layer2.0.conv2": 5}
    small = compression.compress_by_plan(compact, plan, IMAGES, "none", progress=False)
    assert (cost.parameters(small), cost.macs(small)) == compression.cost_of_plan(compact, plan, merged=True)


def test_a_budget_of_time_goes_with_dropped_blocks_and_with_a_narrow_stem():
    network = model.ResNet(8, (2, 6, 8), {"layer2.0.conv1": 0}).eval()
    errors = allocation.layer_errors(network, MANY, shares=(0.5,), progress=False)
    timings = allocation.part_timings(network, 1, shares=(0.5,), rounds=1, device="cpu", progress=False)
    plan = allocation.by_sensitivity(network, time=1.0, errors=errors, timings=timings)
    assert "layer2.0.conv1" not in plan and timings.layer[0] == "conv1"
    assert compression.compress_by_plan(network, plan, IMAGES, "none", progress=False).layer2[0].dropped


def test_errors_of_another_network_are_refused():
    with pytest.raises(ValueError, match="errors has 6 filters of conv1, expected those of this model, which has 8"):
        allocation.by_sensitivity(model.ResNet(8, (8, 12, 16)), macs=1.0, errors=ERRORS)


def test_without_sharing_a_stream_has_all_filters_even_where_fewer_change_nothing():
    errors = ERRORS.assign(error=ERRORS.error.where(ERRORS.layer.str.endswith("conv1") & (ERRORS.layer != "conv1"), 0.0))
    plan = allocation.by_sensitivity(NETWORK, macs=0.6, sharing=False, errors=errors)
    whole = {name: conv.out_channels for name, conv in model.convolutions(NETWORK).items()}
    assert all(plan.get(name, n) == n for name, n in whole.items() if name == "conv1" or name.endswith("conv2"))
    shared = allocation.by_sensitivity(NETWORK, macs=0.6, errors=errors)
    assert any(shared[name] < whole[name] for name in ("conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"))
