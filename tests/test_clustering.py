import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnet_pruning import calibration, clustering, model


def convolution(weight: torch.Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=1, bias=False)
    conv.weight = nn.Parameter(weight)
    return conv


def batch_norm(n: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(n)
    with torch.no_grad():
        norm.weight.uniform_(0.2, 2)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
    return norm


def statistics_for(conv: nn.Conv2d) -> calibration.LayerStatistics:
    patches = torch.randn(conv.weight[0].numel(), 500, dtype=torch.double).cumsum(0) + 0.3
    return calibration.LayerStatistics(patches.mean(1), patches @ patches.T / 500, torch.rand(len(conv.weight), dtype=torch.double))


def cluster(conv: nn.Conv2d, n_clusters: int, distance: str = "raw", **settings) -> clustering.Clusters:
    """With a batch norm and statistics that are the same for each convolution of these shapes."""
    torch.manual_seed(1)
    settings = {"batch_norm": batch_norm(len(conv.weight)), "statistics": statistics_for(conv)} | settings
    return clustering.cluster_filters(conv, n_clusters, distance, **settings)


distances = pytest.mark.parametrize("distance", clustering.DISTANCES)
weightings = pytest.mark.parametrize("weighting", [0.0, 0.5, 1.0])


@distances
@weightings
def test_two_well_separated_groups_are_found(distance, weighting):
    directions = torch.randn(2, 5, 3, 3)
    group = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    conv = convolution(directions[group] + 0.01 * torch.randn(8, 5, 3, 3))
    even = nn.BatchNorm2d(8)  # "folded" and "output" would see other lengths
    found = cluster(conv, 2, distance, weighting=weighting, batch_norm=even)
    assert len(found) == 2
    assert torch.equal(found.labels == found.labels[0], group == 0)


def test_the_centroid_is_the_mean_and_the_inertia_its_distance():
    weight = torch.tensor([0.0, 1.0, 10.0, 14.0]).view(4, 1, 1, 1)
    found = cluster(convolution(weight), 2)
    assert sorted(found.centroids.flatten().tolist()) == [0.5, 12.0]
    assert found.inertia == pytest.approx(2 * 0.5**2 + 2 * 2**2)
    assert torch.equal(found.gains, torch.ones(4, dtype=torch.double)) and found.sizes.tolist() == [2, 2]


def test_unit_ignores_length_and_correlation_the_sign_too():
    a, b = torch.randn(2, 4, 3, 3)
    conv = convolution(torch.stack([a, 3 * a, b, 0.2 * b, -a, -2 * b]))
    unit = cluster(conv, 4, "unit")
    assert len(unit) == 4 and unit.labels[0] == unit.labels[1] and unit.labels[2] == unit.labels[3]
    assert unit.inertia == pytest.approx(0, abs=1e-9)
    signed = cluster(conv, 2, "correlation")
    assert torch.equal(signed.labels == signed.labels[0], torch.tensor([True, True, False, False, True, False]))
    assert signed.inertia == pytest.approx(0, abs=1e-6)
    # Each filter times its gain is its centroid, which is its medoid.
    for found in (unit, signed):
        scaled = conv.weight.detach().double() * found.gains.view(-1, 1, 1, 1)
        torch.testing.assert_close(scaled, found.centroids[found.labels], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(conv.weight.detach().double()[found.medoids], found.centroids, atol=1e-6, rtol=1e-5)
        assert torch.equal(found.gains[found.medoids], torch.ones(len(found), dtype=torch.double))


def test_folded_sees_what_batch_norm_makes_of_the_weights():
    a = torch.randn(1, 4, 3, 3)
    conv = convolution(torch.cat([a, 2 * a, 1.5 * a, 4 * a]))
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 1.0, 4.0, 1.5]))
    found = cluster(conv, 2, "folded", batch_norm=norm)  # 2, 2, 6 and 6 times a
    assert found.labels[0] == found.labels[1] != found.labels[2] == found.labels[3]
    raw = cluster(conv, 2, "raw")
    assert raw.labels[0] == raw.labels[1] == raw.labels[2] != raw.labels[3]


def test_output_sees_only_what_the_inputs_show():
    """Two filters that differ in an input that is always zero are the same filter."""
    weight = torch.randn(4, 3, 1, 1)
    weight[1] = weight[0] + torch.tensor([0.0, 0.0, 5.0]).view(3, 1, 1)
    patches = torch.randn(3, 200, dtype=torch.double)
    patches[2] = 0
    statistics = calibration.LayerStatistics(patches.mean(1), patches @ patches.T / 200, torch.ones(4, dtype=torch.double))
    for distance in ("output", "correlation"):
        found = cluster(convolution(weight), 3, distance, batch_norm=nn.BatchNorm2d(4), statistics=statistics)
        assert found.labels[0] == found.labels[1] and found.sizes.max() == 2


@pytest.mark.parametrize(("important", "merged"), [([0, 1], [2, 3]), ([2, 3], [0, 1])])
def test_weighting_merges_what_the_logits_depend_on_least(important, merged):
    conv = convolution(torch.tensor([0.0, 1.0, 2.7, 4.0]).view(4, 1, 1, 1))
    importance = torch.ones(4, dtype=torch.double).index_fill(0, torch.tensor(important), 1e4)
    moment = torch.ones(1, 1, dtype=torch.double)
    statistics = calibration.LayerStatistics(torch.zeros(1, dtype=torch.double), moment, importance)
    found = cluster(conv, 3, batch_norm=nn.BatchNorm2d(4), statistics=statistics, weighting=1.0)
    assert found.labels[merged[0]] == found.labels[merged[1]] and len(found) == 3


@distances
@pytest.mark.parametrize("extra", [0, 1, 50])
def test_as_many_clusters_as_filters_is_what_there_was(distance, extra):
    conv = convolution(torch.randn(6, 4, 3, 3))
    found = cluster(conv, 6 + extra, distance)
    assert torch.equal(found.centroids[found.labels].float(), conv.weight)
    assert torch.equal(conv.weight[found.medoids][found.labels], conv.weight)
    assert found.inertia == 0 and sorted(found.labels.tolist()) == list(range(6))


def test_only_distinct_filters_need_a_cluster():
    weight = torch.randn(3, 4, 3, 3)[[0, 1, 0, 2, 1, 0]]
    found = cluster(convolution(weight), 3, "correlation")
    assert len(found) == 3 and torch.equal(found.centroids[found.labels].float(), weight)
    assert found.sizes[found.labels].tolist() == [3, 2, 3, 1, 2, 3]


@distances
def test_one_cluster_holds_all(distance):
    conv = convolution(torch.randn(7, 4, 3, 3))
    found = cluster(conv, 1, distance)
    assert len(found) == 1 and found.labels.tolist() == [0] * 7
    expected = (conv.weight.detach().double() * found.gains.view(-1, 1, 1, 1)).mean(0, keepdim=True)
    torch.testing.assert_close(found.centroids, expected)


@st.composite
def layers(draw):
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 5), st.sampled_from([1, 3]), st.sampled_from([1, 3])))
    torch.manual_seed(draw(st.integers(0, 1000)))
    weight = torch.randn(shape)
    for index in draw(st.lists(st.integers(0, shape[0] - 1), max_size=3)):
        weight[index] = draw(st.sampled_from([0.0, 1.0, -2.0])) * weight[0]  # zero, equal, and opposite filters
    return convolution(weight)


@pytest.mark.parametrize("distance", ["raw", "unit", "output", "correlation"])
def test_the_first_of_equally_near_filters_is_the_medoid(distance):
    """Both members of a pair are as near to their mean. Which one stays must not depend on a processor's rounding."""
    pairs = 0
    for seed in range(10):
        torch.manual_seed(seed)
        found = cluster(convolution(torch.randn(12, 3, 3, 3)), 7, distance)
        for number in (found.sizes == 2).nonzero().flatten().tolist():
            assert found.medoids[number] == (found.labels == number).nonzero()[0, 0]
            pairs += 1
    assert pairs >= 5


@given(layers(), st.integers(1, 14), st.sampled_from(clustering.DISTANCES), st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None, max_examples=150)
def test_clusters_are_well_formed(conv, n_clusters, distance, weighting):
    n_filters = len(conv.weight)
    found = cluster(conv, n_clusters, distance, weighting=weighting, n_init=2)
    again = cluster(conv, n_clusters, distance, weighting=weighting, n_init=2)
    assert torch.equal(found.labels, again.labels) and torch.equal(found.centroids, again.centroids)
    assert 1 <= len(found) <= min(n_clusters, n_filters)
    assert found.labels.shape == found.gains.shape == (n_filters,) and found.sizes.min() >= 1
    assert found.centroids.shape == (len(found), *conv.weight.shape[1:]) and torch.isfinite(found.centroids).all()
    assert torch.equal(found.labels[found.medoids], torch.arange(len(found)))  # medoids are members
    assert torch.isfinite(found.gains).all() and found.inertia >= 0


@given(layers(), st.integers(1, 6), st.sampled_from(clustering.DISTANCES), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_permuting_filters_permutes_the_clusters(conv, n_clusters, distance, random):
    n_filters = len(conv.weight)
    order = torch.tensor(random.sample(range(n_filters), n_filters))
    torch.manual_seed(1)
    norm, statistics = batch_norm(n_filters), statistics_for(conv)
    permuted_norm = copy.deepcopy(norm)
    permuted_norm.load_state_dict({k: v[order] if v.ndim else v for k, v in norm.state_dict().items()})
    permuted_statistics = calibration.LayerStatistics(statistics.mean, statistics.second_moment, statistics.importance[order])
    permuted = convolution(conv.weight.detach()[order])
    found = clustering.cluster_filters(conv, n_clusters, distance, batch_norm=norm, statistics=statistics, weighting=0.5)
    same = clustering.cluster_filters(
        permuted, n_clusters, distance, batch_norm=permuted_norm, statistics=permuted_statistics, weighting=0.5
    )
    assert same.inertia == pytest.approx(found.inertia, rel=1e-6, abs=1e-9)
    directions = nn.functional.normalize(conv.weight.detach().flatten(1).double())
    tied = (directions @ directions.T).abs().fill_diagonal_(0) > 1 - 1e-6  # for some distances the same filter, so that two could swap
    if not tied.any() and len(torch.unique(conv.weight.detach().abs(), dim=0)) == n_filters:
        # Where a filter's length does not count, one that is zero is equally near to all clusters, and has no weight.
        certain = torch.nonzero(conv.weight.detach()[order].flatten(1).any(1)).flatten()
        labels, permuted_labels = found.labels[order][certain], same.labels[certain]
        assert torch.equal(labels.unsqueeze(0) == labels.unsqueeze(1), permuted_labels.unsqueeze(0) == permuted_labels.unsqueeze(1))


def test_seeds_matter_and_more_starts_are_no_worse():
    conv = convolution(torch.randn(40, 4, 3, 3))
    results = [cluster(conv, 12, seed=seed, n_init=1) for seed in range(6)]
    assert len({round(found.inertia, 6) for found in results}) > 1
    assert cluster(conv, 12, seed=0, n_init=20).inertia <= min(found.inertia for found in results[:1])


@pytest.mark.parametrize("n_clusters", [0, -2, 1.5, True, "2"])
def test_numbers_that_are_no_number_of_clusters_are_refused(n_clusters):
    with pytest.raises((ValueError, TypeError), match=f"n_clusters(=| is ){n_clusters!r}"):
        cluster(convolution(torch.randn(4, 2, 3, 3)), n_clusters, layer="layer1.0.conv1")


@pytest.mark.parametrize(("settings", "message"), [
    ({"distance": "cosine"}, "distance is 'cosine', expected one of raw, folded, unit, output, correlation"),
    ({"distance": "folded", "batch_norm": None}, "the convolution has no batch norm, which distance 'folded' needs"),
    ({"distance": "raw", "weighting": 0.5, "batch_norm": None}, "no batch norm, which distance 'raw', weighted, needs"),
    ({"distance": "output", "statistics": None}, "distance 'output' needs statistics: see calibration.layer_statistics"),
    ({"weighting": 1.5}, "weighting is 1.5, expected a number from 0 to 1"),
])  # fmt: skip
def test_bad_choices_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        cluster(convolution(torch.randn(4, 2, 3, 3)), 2, **settings)


def test_statistics_of_another_layer_are_refused():
    other = statistics_for(convolution(torch.randn(4, 3, 3, 3)))
    with pytest.raises(ValueError, match="of a layer with 4 filters of 27 values, expected those of stem, with 4 filters of 18 values"):
        cluster(convolution(torch.randn(4, 2, 3, 3)), 2, "output", statistics=other, layer="stem")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    network = model.ResNet(8)
    with torch.no_grad():
        network.layer2[0].conv1.weight[3, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="layer2.0.conv1.weight of the network hold values that are NaN or infinite"):
        clustering.cluster_layers(network, {"conv1": 2, "layer2.0.conv1": 4})
