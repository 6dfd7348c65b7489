import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import IMAGES, NETWORK, any_plan, assert_same_function, choices, replaced, train_an_epoch

from resnet_pruning import checkpoints, compaction, compression, cost, evaluation, model, plans, pruning
from resnet_pruning.studies import compact_networks


@given(any_plan, st.fixed_dictionaries(choices), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_compact_and_replaced_models_agree(plan, chosen, mergeable, renewed):
    network = replaced(plan, **chosen, mergeable=mergeable, batch_norm_images=IMAGES if renewed else None)
    small = compaction.compact(network)
    assert_same_function(network, small)
    assert cost.macs(small) <= compression.cost_of_plan(NETWORK, plan)[1]
    assert cost.parameters(small) <= compression.cost_of_plan(NETWORK, plan)[0]


def test_a_network_with_nothing_to_share_stays_as_it_is():
    small = compaction.compact(NETWORK)
    assert small.config == NETWORK.config
    for (name, tensor), expected in zip(small.state_dict().items(), NETWORK.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def test_raw_centroids_are_shared_since_their_batch_norms_differ():
    plan = plans.uniform(NETWORK, 3)
    small = compaction.compact(replaced(plan))
    assert small.config["inner_widths"] == {} and set(small.config["sharing"]) == set(plan)
    assert all(max(labels) == 2 for labels in small.config["sharing"].values())
    assert (cost.parameters(small), cost.macs(small)) == compression.cost_of_plan(NETWORK, plan)
    table = compact_networks.layer_table(NETWORK, small)
    assert set(table["computed filters"]) == {3} and (table.channels == table["channels before"]).all()


def multiples(factors, thresholds=0.5):
    """A network in which the first three channels of a block have one filter, and batch norms with these factors."""
    network = copy.deepcopy(NETWORK)
    block = network.layer2[0]
    with torch.no_grad():
        block.conv1.weight[1:3] = block.conv1.weight[:1]
        block.bn1.running_mean[:3] = 0.1
        block.bn1.running_var[:3] = 1.3
        block.bn1.weight[:3] = torch.tensor(factors)
        block.bn1.bias[:3] = torch.tensor(factors) * torch.as_tensor(thresholds)
    return network


def test_positive_multiples_are_merged_inside_a_block():
    network = multiples([1.0, 0.3, 2.0])
    small = compaction.compact(network)
    assert small.config["inner_widths"] == {"layer2.0.conv1": 6} and small.config["sharing"] == {}
    assert type(small.layer2[0].conv1) is torch.nn.Conv2d and small.layer2[0].conv2.weight.shape == (8, 6, 3, 3)
    assert_same_function(network, small)


@pytest.mark.parametrize(
    "network", [multiples([1.0, -0.3, -2.0]), multiples([1.0, 0.3, 2.0], [0.5, 0.7, 0.7])], ids=["signs", "thresholds"]
)
def test_what_is_no_multiple_is_shared_instead(network):
    small = compaction.compact(network)
    assert small.config["inner_widths"] == {"layer2.0.conv1": 7}  # of the three, the second and the third are multiples
    assert small.config["sharing"] == {"layer2.0.conv1": [0, 0, 1, 2, 3, 4, 5]}
    assert_same_function(network, small)


def test_channels_that_are_always_zero_are_dropped():
    network = copy.deepcopy(NETWORK)
    with torch.no_grad():
        network.layer2[0].bn1.weight[2:5] = 0
        network.layer2[0].bn1.bias[2:5] = torch.tensor([-1.0, 0.0, 2.0])  # the third is a constant, but not zero
    small = compaction.compact(network)
    assert small.config["inner_widths"] == {"layer2.0.conv1": 6}
    assert_same_function(network, small)
    with torch.no_grad():
        network.layer2[0].bn1.weight.zero_()
        network.layer2[0].bn1.bias.fill_(-1)
    small = compaction.compact(network)
    assert small.config["inner_widths"] == {"layer2.0.conv1": 1}
    assert_same_function(network, small)


@pytest.mark.parametrize(("n_empty", "width"), [(5, 4), (8, 1)])
def test_empty_filters_are_constants_whatever_their_batch_norm(n_empty, width):
    """What PyTorch's own structured pruning leaves. Of the empty filters, all but one are dropped, or all if none is above zero."""
    network = copy.deepcopy(NETWORK)
    with torch.no_grad():
        network.layer2[0].conv1.weight[:n_empty] = 0
        network.layer2[0].bn1.bias[:n_empty] = torch.linspace(-1, 1, n_empty)
        network.layer2[0].bn1.running_mean[:n_empty] = 0
    small = compaction.compact(network)
    assert small.config["inner_widths"] == {"layer2.0.conv1": width}
    assert_same_function(network, small)


@given(any_plan, st.fixed_dictionaries(choices))
@settings(deadline=None, max_examples=15)
def test_compacting_again_changes_nothing(plan, chosen):
    small = compaction.compact(replaced(plan, **chosen, mergeable=True))
    again = compaction.compact(small)
    assert again.config == small.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), small.state_dict().values(), strict=True))


def test_mergeable_clusters_leave_the_network():
    plan = {"layer2.0.conv1": 3, "layer3.0.conv2": 4}
    network = replaced(plan, distance="unit", mergeable=True)
    small = compaction.compact(network)
    signs = {(c, s) for c, s in zip(*_cluster_and_sign(network), strict=True)}
    assert small.config["inner_widths"]["layer2.0.conv1"] == len(signs)
    assert cost.macs(small) < compression.cost_of_plan(NETWORK, plan)[1]
    assert_same_function(network, small)
    renewed = replaced(plan, distance="unit", mergeable=True, batch_norm_images=IMAGES)
    assert compaction.compact(renewed).config["inner_widths"] == small.config["inner_widths"]


def _cluster_and_sign(network):
    block = network.layer2[0]
    return torch.unique(block.conv1.weight.flatten(1), dim=0, return_inverse=True)[1].tolist(), block.bn1.weight.sign().tolist()


def test_a_compact_model_is_saved_loaded_and_trained_like_any_other(tmp_path):
    small = compaction.compact(replaced(plans.uniform(NETWORK, 4), distance="correlation", mergeable=True))
    checkpoints.save_checkpoint(tmp_path / "small.pt", small, {"test_accuracy": 1.0})
    loaded, _ = checkpoints.load_checkpoint(tmp_path / "small.pt")
    assert loaded.config == small.config
    assert torch.equal(evaluation.predict(loaded, IMAGES), evaluation.predict(small, IMAGES))
    before = loaded.conv1.weight.clone()
    train_an_epoch(loaded)
    assert loaded.conv1.weight.shape == before.shape and not torch.equal(loaded.conv1.weight, before)


def test_a_network_that_its_configuration_no_longer_describes_is_refused():
    changed = replaced({"conv1": 3})
    changed.layer1[0].bn1.eps = 0.1
    with pytest.raises(ValueError, match="the network has \\(bn1\\): BatchNorm2d.* eps=0.1"):
        compaction.compact(changed)


def test_a_compact_model_is_not_clustered_again():
    small = compaction.compact(replaced({"conv1": 3}))
    expected = "cluster or constrain the model before it is made compact"
    with pytest.raises(ValueError, match=f"conv1 computes 3 filters for 6 channels already: {expected}"):
        pruning.replace_filters(small, {"conv1": 2})


@pytest.mark.parametrize(("sharing", "message"), [
    ({"fc": [0]}, "sharing names 'fc', expected one of conv1, layer1.0.conv1, layer1.0.conv2, layer2.0.conv1"),
    ({"conv1": [0, 1]}, "sharing\\['conv1'\\] is \\[0, 1\\], expected the number of a filter for each of the 4 channels"),
    ({"conv1": [0, 2, 2, 0]}, "sharing\\['conv1'\\] is \\[0, 2, 2, 0\\], expected"),
    ({"conv1": [-1, 0, 1, 0]}, "sharing\\['conv1'\\] is \\[-1, 0, 1, 0\\], expected"),
])  # fmt: skip
def test_sharing_must_fit_the_network(sharing, message):
    with pytest.raises(ValueError, match=message):
        model.ResNet(8, (4, 6, 8), sharing=sharing)


def test_blocks_that_are_wider_inside_than_their_stream_stay_so():
    network = model.ResNet(8, (4, 6, 8), {"layer1.0.conv1": 7, "layer3.0.conv1": 3})
    small = compaction.compact(network)
    assert small.config == network.config and cost.macs(small) == cost.macs(network)
    assert_same_function(small, network)
