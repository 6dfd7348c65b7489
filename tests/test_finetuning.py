import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import IMAGES, NETWORK, STATISTICS, any_plan, assert_same_function, choices, distinct
from torch.nn.utils import parametrize

from resnet_pruning import clustering, compaction, compression, cost, evaluation, finetuning, model, plans, pruning
from resnet_pruning.training import Execution, Recipe, train

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.02, warmup_epochs=0, ema=0.9, small_share=0.5)
EAGER = {"execution": Execution(amp=False, compile=False), "progress": False}
CONSTRAINTS = {
    "tied": finetuning.tied,
    "fixed": lambda network, clusters: finetuning.projected(network, clusters, 0),
    "each step": lambda network, clusters: finetuning.projected(network, clusters, 1),
    "every third step": lambda network, clusters: finetuning.projected(network, clusters, 3),
}
PLAN = plans.uniform_fraction(NETWORK, 0.5)


def clusters_of(plan=PLAN, distance="correlation", weighting=0.5):
    return clustering.cluster_layers(NETWORK, plan, distance, statistics=STATISTICS, weighting=weighting, n_init=2)


def constrained(way, **settings):
    return CONSTRAINTS[way](NETWORK, clusters_of(**settings))


def assignments(network):
    """The cluster of each filter, by layer."""
    layers = {name: conv for name, conv in model.convolutions(network).items() if hasattr(conv, "parametrizations")}
    return {name: conv.parametrizations.weight[0].labels.tolist() for name, conv in layers.items()}


def gradients(network):
    """Of the loss on the images in evaluation mode, so that nothing else changes."""
    network.zero_grad()
    F.cross_entropy(network.eval()(IMAGES.normalised(IMAGES.pixels)), IMAGES.labels).backward()
    return {
        name: (conv.parametrizations.weight.original if hasattr(conv, "parametrizations") else conv.weight).grad
        for name, conv in model.convolutions(network).items()
    }


@pytest.mark.parametrize("way", CONSTRAINTS)
def test_after_training_each_layer_has_the_planned_filters_and_compact_agrees(way):
    network = constrained(way)
    train(network, IMAGES, RECIPE, **EAGER)
    plain = finetuning.released(network)
    assert distinct(plain) == PLAN
    small = compaction.compact(plain)
    assert_same_function(plain, small)
    assert (cost.parameters(small), cost.macs(small)) == compression.cost_of_plan(NETWORK, PLAN)
    assert not any("original" in name for name in plain.state_dict()) and plain.conv1.weight.requires_grad
    assert_same_function(network, plain)


def test_each_of_several_constraints_of_a_weight_is_released():
    class Half(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    network = constrained("tied")
    for conv in model.convolutions(network).values():
        parametrize.register_parametrization(conv, "weight", Half(), unsafe=True)
    assert_same_function(network, finetuning.released(network))


@given(any_plan.filter(len), st.fixed_dictionaries({key: choices[key] for key in ("distance", "weighting")}))
@settings(deadline=None, max_examples=20)
def test_constraints_start_where_they_should(plan, chosen):
    """At the means of the clusters."""
    clusters = clusters_of(plan, **chosen)
    replaced = [finetuning.released(start(NETWORK, clusters)) for start in CONSTRAINTS.values()]
    for other in replaced[1:]:
        assert_same_function(replaced[0], other)
    if not chosen["weighting"]:  # or else the clusters' own centroids are weighted means
        assert_same_function(replaced[0], pruning.replace_by_clusters(NETWORK, clusters))


def test_the_model_and_the_clusters_stay_as_they_were():
    before, clusters = copy.deepcopy(NETWORK.state_dict()), clusters_of()
    labels = {name: layer.labels.clone() for name, layer in clusters.items()}
    network = finetuning.projected(NETWORK, clusters, 1)
    train(network, IMAGES, dataclasses.replace(RECIPE, learning_rate=0.2), **EAGER)  # enough to move filters between clusters
    finetuning.released(network)
    assert any(assignments(network)[name] != labels[name].tolist() for name in labels)
    assert all(torch.equal(clusters[name].labels, labels[name]) for name in labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in NETWORK.state_dict().items())
    assert network.conv1.weight.shape == NETWORK.conv1.weight.shape  # still constrained, with a weight of its own


def test_the_gradient_of_a_tied_filter_is_the_sum_of_its_members():
    tied = constrained("tied")
    own, members = gradients(tied), gradients(finetuning.released(tied))
    for name, labels in assignments(tied).items():
        for cluster in range(PLAN[name]):
            expected = members[name][torch.tensor(labels) == cluster].sum(0)
            torch.testing.assert_close(own[name][cluster], expected, rtol=1e-4, atol=1e-6)


def test_a_frozen_projections_first_step_moves_centroids_as_a_tied_one_by_the_mean_instead_of_the_sum():
    tied, projected = constrained("tied"), constrained("fixed")
    summed, own = gradients(tied), gradients(projected)
    with torch.no_grad():
        for name, conv in model.convolutions(projected).items():
            conv.parametrizations.weight.original -= 0.1 * own[name]
            sizes = torch.bincount(conv.parametrizations.weight[0].labels).view(-1, 1, 1, 1)
            tied.get_submodule(name).parametrizations.weight.original -= 0.1 * summed[name] / sizes
    assert_same_function(tied, projected)


def test_a_projection_computes_with_the_centroids_bit_for_bit():
    projected = constrained("fixed")
    for name, conv in model.convolutions(projected).items():
        constraint, own = conv.parametrizations.weight[0], conv.parametrizations.weight.original
        assert torch.equal(conv.weight, constraint.clustered(own)) and len(own) > len(torch.unique(conv.weight, dim=0)) == PLAN[name]


def test_only_what_may_renew_its_clusters_does():
    starts, moved = {}, {}
    for way in ("fixed", "each step", "every third step"):
        network = constrained(way)
        starts[way] = assignments(network)
        evaluation.predict(network, IMAGES)
        assert assignments(network) == starts[way]  # evaluation renews nothing
        counts = []
        for _ in range(4):
            before = assignments(network)
            with torch.no_grad():
                for conv in model.convolutions(network).values():
                    own, labels = conv.parametrizations.weight.original, conv.parametrizations.weight[0].labels
                    patterns = torch.randn(int(labels.max()) + 1, *own.shape[1:])
                    own.copy_(patterns[labels[torch.randperm(len(labels))]])  # other filters are alike now
            network.train()(IMAGES.normalised(IMAGES.pixels[:8]))
            counts.append(assignments(network) != before)
        moved[way] = counts
    assert starts["fixed"] == starts["each step"] == starts["every third step"]
    assert moved == {"fixed": [False] * 4, "each step": [True] * 4, "every third step": [True, False, False, True]}


def test_releasing_a_network_changes_no_clusters():
    network = constrained("each step").train()
    before = assignments(network)
    with torch.no_grad():
        for conv in model.convolutions(network).values():
            conv.parametrizations.weight.original.normal_()  # other filters are alike now
    finetuning.released(network)
    assert assignments(network) == before


@given(st.integers(2, 12), st.integers(0, 1000), st.data())
@settings(deadline=None)
def test_a_new_assignment_is_no_worse_and_leaves_no_cluster_empty(n_filters, seed, data):
    n_clusters = data.draw(st.integers(1, n_filters))
    others = data.draw(st.lists(st.integers(0, n_clusters - 1), min_size=n_filters - n_clusters, max_size=n_filters - n_clusters))
    weight = torch.randn(n_filters, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    constraint = finetuning.Projected(torch.tensor([*range(n_clusters), *others]), 1).train()
    inertia = [(weight - constraint.clustered(weight)).square().sum()]
    for _ in range(5):
        constraint(weight)
        assert constraint.labels.unique().tolist() == list(range(n_clusters))
        inertia.append((weight - constraint.clustered(weight)).square().sum())
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(inertia))


@pytest.mark.parametrize("way", ["tied", "every third step"])
def test_an_interrupted_fine_tuning_goes_on_where_it_stopped(way, tmp_path):
    def interrupt(averaged):
        calls.append(averaged)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"accuracy": evaluation.accuracy(averaged, IMAGES)}

    whole, calls = constrained(way), [None, None]
    expected = train(whole, IMAGES, RECIPE, watch=interrupt, **EAGER)
    stopped, calls = constrained(way), []
    with pytest.raises(KeyboardInterrupt):
        train(stopped, IMAGES, RECIPE, watch=interrupt, folder=tmp_path, **EAGER)
    resumed = constrained(way)
    history = train(resumed, IMAGES, RECIPE, watch=interrupt, folder=tmp_path, **EAGER)
    assert history.accuracy.tolist() == expected.accuracy.tolist() and len(history) == 2
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("way", ["tied", "each step"])
def test_a_constrained_convolution_compiles(way):
    """To the same gradient and the same clusters."""
    results = []
    for compiled in (False, True):
        conv = constrained(way).double().train().conv1
        outputs = (torch.compile(conv, dynamic=False) if compiled else conv)(IMAGES.normalised(IMAGES.pixels).double())
        outputs.square().mean().backward()
        results.append((conv.parametrizations.weight[0].labels.tolist(), conv.parametrizations.weight.original.grad))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1])


def test_clusters_of_another_model_are_refused():
    clusters = clusters_of()
    layer = clusters["layer2.0.conv1"]

    def refused(match, **changes):
        for function in (finetuning.tied, pruning.replace_by_clusters, pruning.rescale_by_gains):
            with pytest.raises(ValueError, match=match):
                function(NETWORK, clusters | changes)

    refused(r"clusters has 'layer4', expected convolutions of the model: conv1, layer1.0.conv1", layer4=layer)
    refused(r"clusters of conv1 are of filters of the shape \(8, 6, 3, 3\), expected \(6, 3, 3, 3\)", conv1=layer)
    refused(
        r"clusters of conv1 are of filters of the shape \(6, 6, 3, 3\), expected \(6, 3, 3, 3\)",
        conv1=dataclasses.replace(clusters["conv1"], centroids=layer.centroids),
    )
    refused(
        r"labels of conv1 are \[0, 2\], expected each of its 3 clusters, counted from 0",
        conv1=dataclasses.replace(clusters["conv1"], labels=torch.tensor([0, 0, 0, 2, 2, 2])),
    )
    with pytest.raises(ValueError, match="clusters is empty"):
        finetuning.tied(NETWORK, {})
    with pytest.raises(ValueError, match="conv1 of the network is constrained, expected an ordinary network: see finetuning.released"):
        finetuning.tied(constrained("tied"), clusters)
    with pytest.raises(ValueError, match="conv1 computes 3 filters for 6 channels already: cluster or constrain the model before"):
        finetuning.tied(compaction.compact(pruning.replace_filters(NETWORK, PLAN)), clusters)


def test_settings_that_make_no_sense_are_refused():
    clusters = clusters_of()
    for renew_every in (-1, 1.5, True):
        with pytest.raises((ValueError, TypeError), match=f"renew_every(=| is ){renew_every}"):
            finetuning.projected(NETWORK, clusters, renew_every)
    with pytest.raises(ValueError, match="ResNet has no constraint on its weights, expected one from finetuning.tied"):
        finetuning.released(NETWORK)
