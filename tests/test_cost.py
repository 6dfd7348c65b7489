import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_pruning import clustering, cost, finetuning, plans, quantization
from resnet_pruning.compression.plan_cost import cost_of_plan
from resnet_pruning.model import ResNet, convolutions
from resnet_pruning.quantization import quantized_model


@given(widths=st.tuples(st.integers(1, 4), st.integers(4, 8), st.integers(8, 12)), inner=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_macs_and_parameters_are_those_counted_by_hand(widths, inner):
    a, b, c = widths
    model = ResNet(8, widths, {"layer2.0.conv1": inner})
    convolutions = [(3, a, 32), (a, a, 32), (a, a, 32), (a, inner, 16), (inner, b, 16), (b, c, 8), (c, c, 8)]
    assert cost.macs(model) == sum(9 * i * o * side**2 for i, o, side in convolutions) + 10 * c
    channels = sum(o for _, o, _ in convolutions)
    assert cost.parameters(model) == sum(9 * i * o for i, o, _ in convolutions) + 2 * channels + 10 * c + 10
    # float32, and batch norm stores a mean, a variance and a 64-bit counter besides
    assert cost.size_in_bytes(model) == 4 * (cost.parameters(model) + 2 * channels) + 8 * len(convolutions)


def test_a_layer_that_is_used_twice_counts_twice():
    layer = torch.nn.Conv2d(3, 3, 3, padding=1)
    assert cost.macs(torch.nn.Sequential(layer, torch.nn.ReLU(), layer)) == 2 * 9 * 9 * 32**2


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_mode_as_it_was(training):
    model = ResNet(8).train(training)
    cost.macs(model)
    assert model.training == training


def test_layers_add_up_and_know_their_names():
    by_layer = cost.macs_by_layer(ResNet())
    assert list(by_layer) == [*convolutions(ResNet()), "fc"]
    assert by_layer["conv1"] == 32 * 32 * 27 * 16 and by_layer["layer3.2.conv2"] == 64 * 9 * 64 * 64 and by_layer["fc"] == 640
    assert sum(by_layer.values()) == cost.macs(ResNet()) == 40_551_040


def test_constrained_and_quantized_networks_are_counted(small_images):
    network = ResNet(8).eval()
    tied = finetuning.tied(network, clustering.cluster_layers(network, plans.uniform(network, 4)))
    assert cost.macs(tied) == cost.macs(network) and cost.parameters(tied) < cost.parameters(network)
    quantized = quantization.quantize(network, small_images, 4, 8, progress=False)
    assert cost.macs(quantized) == cost.macs(network)
    weights = sum(layer.weight.numel() for layer in [*convolutions(network).values(), network.fc])
    filters = sum(conv.out_channels for conv in convolutions(network).values()) + 10
    n_activations = len(quantized_model.activations(quantized))
    assert cost.parameters(quantized) == weights + 2 * filters + n_activations, "integers, a scale and a bias for each filter, and scales"
    assert weights / 2 < cost.size_in_bytes(quantized) < weights / 2 + 8 * filters + 8 * 20


def test_numbers_of_numpy_are_numbers_in_a_plan_and_other_layers_are_refused():
    network = ResNet(8, (4, 6, 8))
    plan, same = {"layer1.0.conv1": 2, "layer3": 7}, {"layer1.0.conv1": np.int64(2), "layer3": np.int64(7)}
    assert cost_of_plan(network, plan, merged=True) == cost_of_plan(network, same, merged=True)
    for merged, expected in ((False, "model$"), (True, "model, or layer1, layer2, layer3$")):
        with pytest.raises(ValueError, match=f"the plan names 'layer4.0.conv1', expected convolutions of the {expected}"):
            cost_of_plan(network, {"layer4.0.conv1": 2}, merged=merged)
        for plan in ({"conv1": 0}, {"layer1.0.conv1": -1}, {"layer1.0.conv2": 0}):
            with pytest.raises(ValueError, match=f"n_clusters is {next(iter(plan.values()))} for {next(iter(plan))}, expected an integer"):
                cost_of_plan(network, plan, merged=merged)
    with pytest.raises(ValueError, match="the plan names 'layer3', expected convolutions"):
        cost_of_plan(network, {"layer3": 7})
    assert cost_of_plan(network, {"layer1.0.conv1": 0}, merged=True)[1] < cost.macs(network), "a dropped block"
