import copy
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnet_pruning import calibration, clustering, compaction, compression, data, evaluation, finetuning, model, plans, pruning
from resnet_pruning.training import Execution, Recipe, train

IMAGES = data.load_images("digits")[0][:64]


def train_an_epoch(network):
    recipe = Recipe(epochs=1, batch_size=32, warmup_epochs=0, small_share=0.0)
    train(network, IMAGES, recipe, execution=Execution(compile=False), progress=False)


def varied() -> model.ResNet:
    """A small network whose batch norms are all different, in signs too."""
    torch.manual_seed(0)
    network = model.ResNet(8, (6, 8, 10)).eval()
    with torch.no_grad():
        for norm in model.batch_norms(network).values():
            norm.weight.normal_()
            norm.bias.normal_()
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return network


NETWORK = varied()
STATISTICS = calibration.layer_statistics(NETWORK, IMAGES)


def replaced(plan, **settings) -> model.ResNet:
    return pruning.replace_filters(NETWORK, plan, statistics=STATISTICS, n_init=2, **settings)


def distinct(network: nn.Module) -> dict[str, int]:
    return {name: len(torch.unique(conv.weight.detach(), dim=0)) for name, conv in model.convolutions(network).items()}


def assert_same_function(first, second):
    expected = evaluation.predict(first, IMAGES)
    torch.testing.assert_close(evaluation.predict(second, IMAGES), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


any_plan = st.dictionaries(st.sampled_from(list(model.convolutions(NETWORK))), st.integers(1, 12))
choices = {
    "distance": st.sampled_from(clustering.DISTANCES),
    "representative": st.sampled_from(clustering.REPRESENTATIVES),
    "weighting": st.sampled_from([0.0, 0.5, 1.0]),
}


@given(any_plan, st.fixed_dictionaries(choices))
@settings(deadline=None, max_examples=60)
def test_each_layer_has_at_most_the_planned_distinct_filters(plan, chosen):
    network = replaced(plan, **chosen)
    before, after = model.convolutions(NETWORK), model.convolutions(network)
    for name, n in distinct(network).items():
        assert after[name].weight.shape == before[name].weight.shape
        assert n <= plan.get(name, len(before[name].weight))
        if name not in plan:
            assert torch.equal(after[name].weight, before[name].weight)
        if chosen["representative"] == "medoid":  # each is a filter that was there
            assert torch.isin(after[name].weight.detach().flatten(), before[name].weight.detach().flatten()).all()
    assert torch.isfinite(evaluation.predict(network, IMAGES)).all()


@pytest.mark.parametrize("distance", clustering.DISTANCES)
@pytest.mark.parametrize("representative", clustering.REPRESENTATIVES)
def test_as_many_clusters_as_filters_changes_no_bit(distance, representative):
    network = replaced(plans.uniform(NETWORK, 64), distance=distance, representative=representative)
    for (name, tensor), expected in zip(network.state_dict().items(), NETWORK.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name
    assert network is not NETWORK


def test_one_cluster_makes_all_filters_equal():
    network = replaced(plans.uniform(NETWORK, 1))
    for name, conv in model.convolutions(network).items():
        expected = model.convolutions(NETWORK)[name].weight.mean(0, keepdim=True).expand_as(conv.weight)
        torch.testing.assert_close(conv.weight, expected)
    assert set(distinct(network).values()) == {1}


def test_raw_centroids_leave_batch_norm_alone():
    network = replaced(plans.uniform(NETWORK, 3))
    before = NETWORK.state_dict()
    changed = [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [f"{name}.weight" for name in model.convolutions(NETWORK)]


@pytest.mark.parametrize("distance", ["unit", "correlation"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_filters_that_differ_by_a_factor_are_merged_without_loss(distance, with_bias):
    """The batch norm behind takes up lengths, and for "correlation" signs: same function, fewer distinct filters."""
    network = copy.deepcopy(NETWORK)
    conv = network.layer2[0].conv1
    factors = torch.tensor([1.0, 1, 1, 2, 0.5, 3, 1.5, 0.1]).view(-1, 1, 1, 1)
    factors[5:] *= -1 if distance == "correlation" else 1
    with torch.no_grad():
        conv.weight.copy_(conv.weight[[0, 1, 2, 0, 1, 2, 0, 1]] * factors)
        if with_bias:
            conv.bias = nn.Parameter(torch.randn(8))
    statistics = calibration.layer_statistics(network, IMAGES)
    merged = pruning.replace_filters(network, {"layer2.0.conv1": 3}, distance=distance, statistics=statistics)
    assert distinct(merged)["layer2.0.conv1"] == 3 < distinct(network)["layer2.0.conv1"] == 8
    expected = evaluation.predict(network, IMAGES)
    torch.testing.assert_close(evaluation.predict(merged, IMAGES), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("representative", ["centroid", "medoid"])
def test_without_batch_norm_filters_of_a_direction_keep_their_lengths(representative):
    conv = nn.Conv2d(3, 5, 3)
    lengths = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0]).view(-1, 1, 1, 1)
    with torch.no_grad():
        conv.weight.copy_(conv.weight[[0, 0, 1, 1, 0]] * lengths)
    network = nn.Sequential(OrderedDict(features=conv))
    replaced = pruning.replace_filters(network, {"features": 2}, representative, distance="unit")
    torch.testing.assert_close(replaced.features.weight[:4], conv.weight[:4])
    assert torch.equal(replaced.features.weight[4], conv.weight[4]), "a filter of zeros has no direction, and stays"
    with pytest.raises(ValueError, match="features has no batch norm"):
        finetuning.tied(network, clustering.cluster_layers(network, {"features": 2}, "unit"))


@pytest.mark.parametrize("distance", ["folded", "output"])
def test_folded_filters_of_a_cluster_are_equal(distance):
    network = replaced({"layer2.0.conv1": 3}, distance=distance)
    conv, norm = network.layer2[0].conv1, network.layer2[0].bn1
    clusters = clustering.cluster_layers(NETWORK, {"layer2.0.conv1": 3}, distance, statistics=STATISTICS, n_init=2)["layer2.0.conv1"]
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = (conv.weight * factor.view(-1, 1, 1, 1)).detach()
    for cluster in range(3):
        members = folded[clusters.labels == cluster]
        torch.testing.assert_close(members, members[:1].expand_as(members), rtol=1e-4, atol=1e-6)
    # and the centroid is the mean of what they were
    before = NETWORK.layer2[0]
    factor = before.bn1.weight / (before.bn1.running_var + before.bn1.eps).sqrt()
    means = torch.stack([(before.conv1.weight * factor.view(-1, 1, 1, 1))[clusters.labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(folded, means[clusters.labels].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", clustering.DISTANCES)
def test_unused_and_zero_filters_do_no_harm(distance):
    network = copy.deepcopy(NETWORK)
    with torch.no_grad():
        network.layer2[0].bn1.weight[1] = 0
        network.layer2[0].conv1.weight[4] = 0
        network.layer2[0].bn1.running_mean[4] = 0.3
    statistics = calibration.layer_statistics(network, IMAGES)
    for n_clusters in (1, 3, 7):
        for representative in clustering.REPRESENTATIVES:
            merged = pruning.replace_filters(
                network, {"layer2.0.conv1": n_clusters}, representative, distance=distance, statistics=statistics, weighting=0.5
            )
            assert all(torch.isfinite(tensor).all() for tensor in merged.state_dict().values())
            assert distinct(merged)["layer2.0.conv1"] <= n_clusters
            if distance == "unit":  # whose zero filter has no direction: it stays a constant
                before, after = (n.layer2[0].bn1(n.layer2[0].conv1(torch.randn(2, 6, 8, 8)))[:, 4] for n in (network, merged))
                torch.testing.assert_close(after, before)


def test_the_same_seed_gives_the_same_model():
    first, again = (replaced(plans.uniform(NETWORK, 4), distance="correlation", weighting=0.5, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_model_given_is_left_as_it_was():
    before = copy.deepcopy(NETWORK.state_dict())
    replaced(plans.uniform(NETWORK, 2), distance="correlation", batch_norm_images=IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in NETWORK.state_dict().items())


def test_batch_norm_is_reestimated_on_request():
    plan = plans.uniform(NETWORK, 4)
    network = replaced(plan, batch_norm_images=IMAGES)
    expected = calibration.reestimate_batch_norm(replaced(plan), IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), expected.state_dict().values(), strict=True))
    assert not torch.equal(network.bn1.running_var, replaced(plan).bn1.running_var)


def test_models_of_other_classes_are_replaced_too():
    other = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 1))
    network = pruning.replace_filters(other, {"0": 2, "2": 3})
    assert distinct(network) == {"0": 2, "2": 3}


@pytest.mark.parametrize(("plan", "settings", "message"), [
    ({"conv1": 2}, {"representative": "mean"}, "representative is 'mean', expected one of centroid, medoid"),
    ({"conv9": 2}, {}, "the plan names 'conv9', expected convolutions of the model: conv1, layer1.0.conv1"),
    ({"conv1": 0}, {}, "n_clusters is 0 for conv1, expected an integer from 1"),
    ({"conv1": 2.0}, {}, "plan={'conv1': 2.0}"),
])  # fmt: skip
def test_bad_input_is_refused(plan, settings, message):
    with pytest.raises(ValueError, match=message):
        replaced(plan, **settings)


def test_a_model_without_convolutions_is_refused():
    with pytest.raises(ValueError, match="Linear has no convolutions, expected at least one"):
        pruning.replace_filters(nn.Linear(2, 2), {"conv1": 2})


@given(any_plan, st.sampled_from(clustering.DISTANCES))
@settings(deadline=None, max_examples=30)
def test_filters_at_their_clusters_scale_compute_the_same(plan, distance):
    clusters = clustering.cluster_layers(NETWORK, plan, distance, statistics=STATISTICS, n_init=2)
    scaled = pruning.rescale_by_gains(NETWORK, clusters)
    assert_same_function(scaled, NETWORK)
    for name, layer in clusters.items():
        weight = model.convolutions(scaled)[name].weight.detach()
        means = torch.stack([weight[layer.labels == cluster].mean(0) for cluster in range(len(layer))])
        if (layer.gains != 0).all():
            torch.testing.assert_close(means, layer.centroids.float(), rtol=1e-4, atol=1e-5)


def test_a_filter_without_a_gain_changes_no_mean():
    network = copy.deepcopy(NETWORK)
    with torch.no_grad():
        network.conv1.weight[2] = 0  # always 0, so that its output is correlated with nothing
    clusters = clustering.cluster_layers(network, {"conv1": 2}, "correlation", statistics=calibration.layer_statistics(network, IMAGES))
    assert clusters["conv1"].gains[2] == 0
    scaled = pruning.rescale_by_gains(network, clusters)
    assert_same_function(scaled, network)
    torch.testing.assert_close(scaled.conv1.weight[2], clusters["conv1"].centroids[clusters["conv1"].labels[2]].float())


def test_filters_rescaled_like_another_networks_have_its_norms_and_compute_the_same():
    other = model.ResNet(8, (12, 16, 20))
    shared = compaction.compact(replaced({"conv1": 3, "layer2.0.conv2": 2}))
    for network in (NETWORK, shared):
        scaled = compression.rescale_like(network, other)
        assert_same_function(scaled, network)
        for name, conv in model.convolutions(scaled).items():
            usual = other.get_submodule(name).weight.flatten(1).norm(dim=1).square().mean().sqrt()
            torch.testing.assert_close(conv.weight.flatten(1).norm(dim=1), usual.expand(len(conv.weight)))
    with pytest.raises(ValueError, match=r"layer1.1.conv1, layer1.1.conv2, .* is not in the other network"):
        compression.rescale_like(model.ResNet(14), other)
