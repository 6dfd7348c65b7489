import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import IMAGES, NETWORK, assert_same_function

from resnet_pruning import cost, model, peers, plans
from resnet_pruning.peers import folding

INSIDE = list(plans.uniform(NETWORK, 1, "*.conv1"))


@torch.no_grad()
def with_twins():
    """The network, with the second half of the channels inside each block equal to the first in all that belongs to them."""
    network = copy.deepcopy(NETWORK)
    for block in model.blocks(network).values():
        half = block.conv1.out_channels // 2
        norm = block.bn1
        for tensor in (block.conv1.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, block.conv2.weight.transpose(0, 1)):
            tensor[half : 2 * half] = tensor[:half]
    return network


TWINS = with_twins()
HALF = {name: model.convolutions(TWINS)[name].out_channels // 2 for name in INSIDE}


@pytest.mark.parametrize("repaired", [False, True])
def test_folding_equal_channels_changes_nothing(repaired):
    small = peers.fold_units(TWINS, HALF, repaired=repaired)
    assert_same_function(small, TWINS)
    assert {name: model.convolutions(small)[name].out_channels for name in INSIDE} == HALF


@pytest.mark.parametrize("selection", ["folding", "random"])
def test_ridge_recovers_what_equal_channels_did(selection):
    """Of twins that are removed at random, one of a pair stays often enough for the rest to be made of it; folded ones are all there."""
    plan = HALF if selection == "folding" else {name: 2 * width - 1 for name, width in HALF.items()}
    assert_same_function(peers.compensate_units(TWINS, plan, IMAGES[:50], selection, ridge=1e-12), TWINS)


def test_the_average_of_orthogonal_channels_is_repaired_by_the_square_root_of_their_number():
    """Two channels that have nothing in common but their length, folded into one."""
    network = model.ResNet(8, (2, 2, 2))
    block = network.layer1[0]
    with torch.no_grad():
        block.conv1.weight.zero_()
        block.conv2.weight.zero_()
        block.conv1.weight[0, 0, 0, 0], block.conv1.weight[1, 1, 1, 1] = 3.0, 3.0
        block.bn1.weight.zero_()
        block.bn1.weight[:], block.bn1.bias[:] = 0.0, 0.0
        block.bn1.running_var.fill_(4 - block.bn1.eps)
        block.bn1.weight.fill_(1e-6)  # too small to count among what is compared
    plan = {"layer1.0.conv1": 1}
    plain, repaired = (peers.fold_units(network, plan, repaired=repaired).layer1[0] for repaired in (False, True))
    # Filters are in units of the standard deviation, 2, and halved as the average of two.
    assert plain.conv1.weight[0, 0, 0, 0].item() == pytest.approx(0.75) and plain.conv1.weight[0, 1, 1, 1].item() == pytest.approx(0.75)
    assert (repaired.bn1.weight / plain.bn1.weight).item() == pytest.approx(2**0.5, rel=1e-4)


def test_the_gram_matrix_is_what_the_second_convolution_reads():
    seen = []
    hook = NETWORK.layer2[0].conv2.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        NETWORK.eval()(IMAGES[:30].normalised(IMAGES[:30].pixels))
    hook.remove()
    channels = seen[0].double().transpose(0, 1).flatten(1)
    found = folding.gram_matrices(NETWORK, ["layer2.0.conv1"], IMAGES[:30])["layer2.0.conv1"]
    torch.testing.assert_close(found, channels @ channels.T, rtol=1e-4, atol=1e-6)


def test_gram_matrices_leave_the_network_as_it_is_and_are_computed_where_it_is(gpu):
    names, network = ["layer1.0.conv1", "layer2.0.conv1"], copy.deepcopy(NETWORK).train()
    before = copy.deepcopy(network.state_dict())
    expected = folding.gram_matrices(network, names, IMAGES[:30])
    assert network.training and all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())
    for place, images in ((network, IMAGES.to(gpu)), (copy.deepcopy(network).to(gpu), IMAGES)):
        for name, gram in folding.gram_matrices(place, names, images[:30]).items():
            torch.testing.assert_close(gram, expected[name], rtol=1e-4, atol=1e-6)


@given(st.integers(1, 8), st.sampled_from(("L2 norm", "random")))
@settings(deadline=None, max_examples=10)
def test_ridge_is_never_further_from_the_block_than_removal(kept, criterion):
    """On the images that it has seen, as the sum of squares behind the channels that are left of them."""
    name = "layer3.0.conv1"
    kept = min(kept, NETWORK.layer3[0].conv1.out_channels)
    gram = folding.gram_matrices(NETWORK, [name], IMAGES[:30])[name]
    weight = NETWORK.layer3[0].conv2.weight.detach().double()
    stays = peers.kept_units(NETWORK, {name: kept}, criterion)[name]

    def error(slices):
        difference = torch.zeros_like(weight)
        difference[:, stays] = slices.double()
        difference = (difference - weight).permute(0, 2, 3, 1)  # centre taps and all others alike
        return torch.einsum("ohwc,cd,ohwd->", difference, gram, difference).item()

    ridge = peers.compensate_units(NETWORK, {name: kept}, IMAGES[:30], criterion, ridge=1e-9)
    assert error(ridge.layer3[0].conv2.weight.detach()) <= error(weight[:, stays]) * (1 + 1e-6) + 1e-9


@given(st.fixed_dictionaries({}, optional={name: st.integers(1, 9) for name in INSIDE}))
@settings(deadline=None, max_examples=10)
def test_plans_are_kept_to(plan):
    small = peers.fold_units(NETWORK, plan, repaired=True)
    widths = {name: model.convolutions(small)[name].out_channels for name in INSIDE}
    assert all(widths[name] == min(plan.get(name, 99), model.convolutions(NETWORK)[name].out_channels) for name in INSIDE)
    assert cost.parameters(small) <= cost.parameters(NETWORK) and small(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_other_layers_and_selections_are_refused():
    with pytest.raises(ValueError, match="the plan names conv1, expected first convolutions of blocks"):
        peers.fold_units(NETWORK, {"conv1": 2})
    with pytest.raises(ValueError, match="criterion is 'size', expected one of L1 norm"):
        peers.compensate_units(NETWORK, {INSIDE[0]: 2}, IMAGES[:10], "size")
