import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnet_pruning import compression, model, plans
from resnet_pruning.compression import allocation

NETWORK = model.ResNet(20)
WIDTHS = {name: conv.out_channels for name, conv in model.convolutions(NETWORK).items()}


def test_select_takes_names_and_patterns_front_to_back():
    assert plans.select(NETWORK) == list(WIDTHS)
    assert plans.select(NETWORK, "*.conv1", without="layer1.*") == [f"layer{s}.{b}.conv1" for s in (2, 3) for b in range(3)]
    assert plans.select(NETWORK, ["layer3.0.conv2", "conv1"]) == ["conv1", "layer3.0.conv2"]
    assert "conv1" not in plans.select(NETWORK, without="conv1") and len(plans.select(NETWORK, without="conv1")) == 18


@pytest.mark.parametrize(("arguments", "message"), [
    ({"layers": "layer4.*"}, "layers has 'layer4.*', which fits no convolution: conv1, layer1.0.conv1, "),
    ({"without": ["conv1", "fc"]}, "without has 'fc', which fits no convolution: conv1, "),
    ({"layers": "conv1", "without": "conv1"}, "no convolution is left of layers='conv1' without='conv1'"),
])  # fmt: skip
def test_selections_that_fit_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        plans.select(NETWORK, **arguments)
    assert message in str(error.value)


def test_a_model_without_convolutions_is_refused():
    with pytest.raises(ValueError, match="Linear has no convolutions, expected at least one"):
        plans.uniform(nn.Linear(3, 4), 2)
    with pytest.raises(ValueError, match="Linear has no convolutions"):
        plans.check_plan(nn.Linear(3, 4), {})


def test_uniform_plans_are_capped_by_the_layer():
    assert set(plans.uniform(NETWORK, 3).values()) == {3}
    assert plans.uniform(NETWORK, 64) == WIDTHS
    assert {name: n for name, n in plans.uniform(NETWORK, 24).items() if n != 24} == {n: w for n, w in WIDTHS.items() if w == 16}


@given(st.floats(0, 1, exclude_min=True))
@settings(deadline=None)
def test_uniform_fractions_are_within_half_a_filter(fraction):
    plan = plans.uniform_fraction(NETWORK, fraction)
    assert list(plan) == list(WIDTHS)
    assert all(n == 1 or abs(n - fraction * WIDTHS[name]) <= 0.5 for name, n in plan.items())
    assert all(1 <= n <= WIDTHS[name] for name, n in plan.items())
    plans.check_plan(NETWORK, plan)


@pytest.mark.parametrize("n", [0, -1, 2.0, 0.5, True, "3", None])
def test_numbers_of_clusters_that_are_none_are_refused(n):
    with pytest.raises((ValueError, TypeError), match="n_clusters(=| is )"):
        plans.uniform(NETWORK, n)
    with pytest.raises(ValueError, match=f"n_clusters is {n!r} for layer1.0.conv1, expected an integer from 1"):
        plans.check_plan(NETWORK, {"conv1": 2, "layer1.0.conv1": n})


@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.01, float("nan"), True, "half"])
def test_fractions_outside_their_range_are_refused(fraction):
    with pytest.raises((ValueError, TypeError), match=f"fraction(=| is ){fraction!r}"):
        plans.uniform_fraction(NETWORK, fraction)


def test_first_last_heavy():
    plan = plans.first_last_heavy(NETWORK, 4, 1.0, n_first=3, n_last=2)
    names = list(WIDTHS)
    assert [plan[name] for name in names] == [16, 16, 16, *[4] * 14, 64, 64]
    assert list(plans.first_last_heavy(NETWORK, 0.25, 0.5, n_first=0, n_last=1).values()) == [4] * 7 + [8] * 6 + [16] * 5 + [32]
    of_a_stage = plans.first_last_heavy(NETWORK, 2, 8, layers="layer2.*")
    assert list(of_a_stage.values()) == [8, 2, 2, 2, 2, 8]
    assert set(plans.first_last_heavy(NETWORK, 1, 1.0, n_first=19, n_last=0).values()) == {16, 32, 64}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"inner": 1.5, "ends": 2}, "fraction is 1.5"),
    ({"inner": 2, "ends": 0}, "n_clusters is 0"),
    ({"inner": 2, "ends": "many"}, "ends='many'"),
    ({"inner": 2, "ends": 4, "n_first": -1}, "n_first=-1"),
    ({"inner": 2, "ends": 4, "n_first": 10, "n_last": 10}, "n_first \\+ n_last is 10 \\+ 10, expected at most the number of layers, 19"),
])  # fmt: skip
def test_impossible_first_last_heavy_plans_are_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        plans.first_last_heavy(NETWORK, **arguments)


def test_a_plan_for_another_model_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="the plan names 'layer1.9.conv1', expected convolutions of the model: conv1, layer1.0.conv1"):
        plans.check_plan(NETWORK, {"layer1.9.conv1": 2})


@given(st.floats(0.2, 1), st.integers(0, 4), st.integers(0, 4))
@settings(deadline=None, max_examples=20)
def test_the_largest_plan_within_a_budget_is_within_and_cannot_grow(share, n_first, n_last):
    def build(fraction):
        return plans.first_last_heavy(NETWORK, fraction, 1.0, n_first, n_last)

    def distinct(plan):
        return sum(plan.values())

    budget = share * sum(WIDTHS.values())
    if distinct(build(0.01)) > budget:
        with pytest.raises(ValueError, match="expected at least"):
            allocation.largest_within(build, distinct, budget)
        return
    plan = allocation.largest_within(build, distinct, budget)
    assert distinct(plan) <= budget
    assert budget - distinct(plan) < 1 or plan == WIDTHS  # one filter more is always possible for a layer between the ends
    assert all(plan[name] == WIDTHS[name] for i, name in enumerate(WIDTHS) if i < n_first or i >= 19 - n_last)


def test_a_plan_costs_what_its_distinct_filters_cost():
    assert compression.cost_of_plan(NETWORK, {}) == compression.cost_of_plan(NETWORK, WIDTHS) == (269_722, 40_551_040)
    parameters, macs = compression.cost_of_plan(NETWORK, plans.uniform_fraction(NETWORK, 0.5))
    convolution_parameters = sum(conv.weight.numel() for conv in model.convolutions(NETWORK).values())
    assert parameters == 269_722 - convolution_parameters // 2
    assert macs == (40_551_040 - 640) // 2 + 640
    assert compression.cost_of_plan(NETWORK, {"conv1": 4}) == (269_722 - 12 * 27, 40_551_040 - 12 * 27 * 32 * 32)
