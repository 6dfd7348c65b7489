import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_pruning import calibration, evaluation, model


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = model.ResNet(8, (4, 6, 8))
    for norm in model.batch_norms(network).values():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return network.eval()


def test_every_convolution_has_its_batch_norm(network):
    norms = model.batch_norms(network)
    assert list(norms) == list(model.convolutions(network))
    assert norms["conv1"] is network.bn1 and norms["layer2.0.conv2"] is network.layer2[0].bn2
    assert model.batch_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))) == {}


def test_moments_are_those_of_the_layers_inputs(network, small_images, device):
    """wᵀ M w must be the mean squared output, and wᵀ C w the variance, as seen at the outputs themselves."""
    statistics = calibration.layer_statistics(copy.deepcopy(network).to(device), small_images.to(device), batch_size=40)
    seen = {}
    for name, conv in model.convolutions(network).items():
        conv.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output))
    with torch.inference_mode():
        network(small_images.normalised(small_images.pixels))
    for name, conv in model.convolutions(network).items():
        conv._forward_hooks.clear()
        outputs = seen[name].double().transpose(0, 1).flatten(1)
        weight = conv.weight.detach().double().flatten(1)
        layer = statistics[name]
        torch.testing.assert_close((weight @ layer.second_moment * weight).sum(1), outputs.square().mean(1), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close((weight @ layer.covariance * weight).sum(1), outputs.var(1, unbiased=False), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(weight @ layer.mean, outputs.mean(1), rtol=1e-4, atol=1e-5)


def test_importance_is_the_squared_change_of_the_logits(network, small_images):
    """Of the last layer it is known: each position of a channel adds its value, where the ReLU passes it, times fc's weights."""
    images = small_images[:50]
    with torch.inference_mode():
        network.layer3[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
        seen = []
        network(images.normalised(images.pixels))
        network.layer3[0]._forward_hooks.clear()
    passed = (seen[0] > 0).double().sum((2, 3)).mean(0)
    expected = passed * (network.fc.weight.detach().double() / 64).square().sum(0)  # 8×8 positions are averaged
    found = torch.stack([calibration.layer_statistics(network, images, seed=s)["layer3.0.conv2"].importance for s in range(40)])
    torch.testing.assert_close(found.mean(0), expected, rtol=0.1, atol=0)


def test_functions_that_work_in_place_change_no_statistics(small_images):
    """torchvision's networks have such a ReLU, which overwrites the outputs that gradients are taken of."""
    torch.manual_seed(0)
    layers = {"conv1": nn.Conv2d(3, 4, 3), "bn1": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace=True), "pool": nn.AdaptiveAvgPool2d(1)}
    network = nn.Sequential(OrderedDict(layers | {"flat": nn.Flatten(), "fc": nn.Linear(4, 10)})).eval()
    in_place = calibration.layer_statistics(network, small_images)["conv1"].importance
    assert network.relu.inplace
    network.relu.inplace = False
    torch.testing.assert_close(calibration.layer_statistics(network, small_images)["conv1"].importance, in_place)


def test_statistics_leave_the_model_as_it_was(network, small_images):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    calibration.layer_statistics(network.train(), small_images[:20])
    assert network.training and all(p.requires_grad and p.grad is None for p in network.parameters())
    network.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_what_has_no_statistics_is_refused(network, small_images):
    with pytest.raises(ValueError, match=r"pixels are torch.uint8 of shape \(0, 3, 32, 32\), expected"):
        calibration.layer_statistics(network, small_images[:0])
    with pytest.raises(ValueError, match="Sequential has no convolution with a batch norm"):
        calibration.layer_statistics(nn.Sequential(nn.Conv2d(3, 4, 3)), small_images)
    grouped = model.ResNet(8)
    grouped.layer1[0].conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    with pytest.raises(ValueError, match=r"layer1.0.conv2 is Conv2d\(.*groups=4.*, expected one group"):
        calibration.layer_statistics(grouped, small_images)
    for padding in ({"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}):
        grouped.layer1[0].conv2 = nn.Conv2d(16, 16, 3, **padding)
        with pytest.raises(ValueError, match=r"layer1.0.conv2 is Conv2d\(.*expected one group, and padding by a number of zeros"):
            calibration.layer_statistics(grouped, small_images)
    with pytest.raises(ValueError, match="1 images, expected at least 2"):
        calibration.reestimate_batch_norm(network, small_images[:1])


def test_reestimated_statistics_are_those_of_the_images(network, small_images, device):
    renewed = calibration.reestimate_batch_norm(copy.deepcopy(network).to(device), small_images.to(device), augmented=False).cpu()
    x = small_images.normalised(small_images.pixels)
    outputs = F.conv2d(x, network.conv1.weight, padding=1).double()
    torch.testing.assert_close(renewed.bn1.running_mean.double(), outputs.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(renewed.bn1.running_var.double(), outputs.var((0, 2, 3)), rtol=1e-3, atol=1e-6)
    # In evaluation it now does what batch norm in training mode does with these images.
    with torch.no_grad():
        trained = network.train()(x)
    network.eval()
    torch.testing.assert_close(evaluation.predict(renewed, small_images), trained, rtol=1e-3, atol=1e-3)


def test_reestimation_makes_a_copy_in_the_same_mode(network, small_images):
    before = network.bn1.running_mean.clone()
    renewed = calibration.reestimate_batch_norm(network, small_images)
    assert torch.equal(network.bn1.running_mean, before) and not torch.equal(renewed.bn1.running_mean, before)
    assert not renewed.training and not renewed.bn1.training and renewed.bn1.momentum == network.bn1.momentum
    assert all(torch.equal(a, b) for a, b in zip(renewed.parameters(), network.parameters(), strict=True))
    means = [calibration.reestimate_batch_norm(network, small_images, batch_size=b).bn1.running_mean for b in (24, 48)]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-6)


def test_reestimation_shifts_images_as_training_does(network, small_images):
    """Zeros come in at the borders, which the digits' own background is not after normalising."""
    first, again, other, plain = (
        calibration.reestimate_batch_norm(network, small_images, **settings).bn1.running_mean
        for settings in ({}, {}, {"seed": 1}, {"augmented": False})
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.allclose(first, plain, rtol=0.01)
