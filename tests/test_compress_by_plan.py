import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_pruning import NETWORK, train_an_epoch

from resnet_pruning import calibration, checkpoints, compaction, compression, cost, data, evaluation, model, plans
from resnet_pruning.compression import REPAIRS, SELECTIONS
from resnet_pruning.compression import parts as parts_module
from resnet_pruning.compression.least_squares import Moments, eliminate
from resnet_pruning.compression.parts import PartFit, apply, augmented, parts_of
from resnet_pruning.peers.units import kept_units

IMAGES = data.load_images("digits")[0][:128]
STATISTICS = calibration.layer_statistics(NETWORK, IMAGES)


def merged(plan, chosen="least squares", network=NETWORK, **settings):
    statistics = STATISTICS if network is NETWORK else None
    defaults = {"n_steps": 3, "progress": False, "statistics": statistics}
    return compression.compress_by_plan(network, plan, IMAGES, chosen, **defaults | settings)


def change(network, other):
    """Mean squared change of the logits, as a share of their variance."""
    expected = evaluation.predict(network, IMAGES)
    return float((evaluation.predict(other, IMAGES) - expected).square().sum(1).mean() / expected.var(0).sum())


any_plan = st.dictionaries(st.sampled_from(list(model.convolutions(NETWORK))), st.integers(1, 12))


@given(any_plan, st.sampled_from(REPAIRS), st.sampled_from(SELECTIONS))
@example({"layer3.0.conv2": 2, "conv1": 1, "layer1.0.conv1": 1, "layer1.0.conv2": 1, "layer3.0.conv1": 1}, "none", "k-means")
@settings(deadline=None, max_examples=15)
def test_the_merged_network_is_as_large_as_planned(plan, chosen, selection):
    small = merged(plan, chosen, selection=selection)
    seen = inputs_of_convolutions(small)
    sizes = {}
    for name, whole in model.convolutions(NETWORK).items():
        conv, planned = model.convolutions(small)[name], min(plan.get(name, whole.out_channels), whole.out_channels)
        sizes[name] = conv.weight.shape[0]
        inner = name.endswith(".conv1")
        if inner and sizes[name] < planned:  # all channels that are always 0 make one cluster
            block = NETWORK.get_submodule(name.removesuffix(".conv1"))
            alive = int((block.bn1(block.conv1(seen[name])).amax((0, 2, 3)) > 0).sum())
            assert selection == "k-means" and sizes[name] == alive + 1
        elif sizes[name] < planned:  # nothing comes in, and one filter does as well as many
            assert sizes[name] == 1 and seen[name].abs().max() == 0
        else:
            assert sizes[name] == planned
        assert type(conv) is torch.nn.Conv2d or not inner
    assert (cost.parameters(small), cost.macs(small)) == compression.cost_of_plan(NETWORK, sizes, merged=True)
    assert torch.isfinite(evaluation.predict(small, IMAGES)).all()


@torch.no_grad()
def inputs_of_convolutions(network):
    """What each convolution sees of the images that `merged` fits to."""
    seen = {}
    for name, conv in model.convolutions(network).items():
        conv.register_forward_pre_hook(lambda module, inputs, name=name: seen.__setitem__(name, inputs[0]))
    network(augmented(IMAGES))
    return seen


@pytest.mark.parametrize("chosen", REPAIRS)
def test_a_plan_that_asks_for_all_changes_nothing(chosen):
    small = merged(plans.uniform(NETWORK, 64), chosen)
    assert small.config == NETWORK.config
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), NETWORK.state_dict().values(), strict=True))


def with_multiples(factors):
    """A network in which four of eight channels inside a block are multiples of the other four."""
    network = copy.deepcopy(NETWORK)
    block = network.layer2[0]
    with torch.no_grad():
        block.conv1.weight[4:] = block.conv1.weight[:4]
        for statistic in (block.bn1.running_mean, block.bn1.running_var):
            statistic[4:] = statistic[:4]
        block.bn1.weight[:4].abs_()  # factors have to be positive, and the channels alive
        block.bn1.bias[:4].abs_()
        for parameter in (block.bn1.weight, block.bn1.bias):
            parameter[4:] = parameter[:4] * torch.tensor(factors)
    return network


@pytest.mark.parametrize("selection", ["k-means", "elimination"])
@pytest.mark.parametrize(("chosen", "factors"), [
    ("summed", [1.0, 1.0, 1.0, 1.0]),
    ("scaled", [0.5, 2.0, 3.0, 1.0]),
    ("least squares", [0.5, 2.0, 3.0, 1.0]),
])  # fmt: skip
def test_what_can_be_merged_without_loss_is(chosen, factors, selection):
    network = with_multiples(factors)
    plan = {"layer2.0.conv1": 4}
    exact = change(network, merged(plan, chosen, network, selection=selection))
    assert exact < 1e-4  # the ridge of least squares is what remains
    assert change(network, merged(plan, "none", network, selection=selection)) > 100 * exact


@pytest.mark.parametrize("chosen", ["none", "least squares"])
def test_filters_whose_outputs_are_correlated_share_one_without_loss(chosen):
    network = copy.deepcopy(NETWORK)
    block = network.layer3[0]
    with torch.no_grad():
        factors = torch.tensor([-1.0, 0.5, 2.0, 1.0, 1.0])
        block.conv2.weight[5:] = block.conv2.weight[:5] * factors.view(-1, 1, 1, 1)
    small = merged({"layer3.0.conv2": 5}, chosen, network)
    assert isinstance(small.layer3[0].conv2, model.SharedConv2d)
    assert change(network, small) < 1e-5


@pytest.mark.parametrize("selection", SELECTIONS)
def test_each_repair_is_nearer_to_the_part_than_the_one_before(selection):
    images = augmented(IMAGES)
    parts = parts_of(NETWORK)
    inputs = apply(parts["layer1.0"], apply(parts[""], images))
    fit = PartFit("layer2.0", parts["layer2.0"], inputs, inputs, STATISTICS)
    errors = {}
    for chosen in ("none", "scaled", "least squares"):
        small = fit.solve({"layer2.0.conv1": 4}, chosen, selection=selection)
        errors[chosen] = (small.residual(inputs) - fit.part.residual(inputs)).square().mean().item()
    assert errors["least squares"] < errors["scaled"] < errors["none"]


def test_a_random_choice_goes_by_its_seed_and_is_no_better_than_elimination():
    def smaller(selection, seed=0):
        return merged({"layer2.0.conv1": 4}, "least squares", selection=selection, seed=seed)

    def lost(small):
        return change(NETWORK, small)

    drawn = [smaller("random", seed) for seed in range(5)]
    kept = [small.layer2[0].conv1.weight for small in drawn]
    assert torch.equal(kept[0], smaller("random").layer2[0].conv1.weight)
    assert not all(torch.equal(kept[0], other) for other in kept[1:])
    assert lost(smaller("elimination")) < sum(map(lost, drawn)) / len(drawn)


def test_by_norm_the_same_channels_are_kept_as_by_removal():
    plan = {"layer1.0.conv1": 2, "layer2.0.conv1": 4}
    small = model.convolutions(merged(plan, "none", selection="L2 norm"))
    convs, norms = model.convolutions(NETWORK), model.batch_norms(NETWORK)
    for name, kept in kept_units(NETWORK, plan, "L2 norm").items():
        theirs = convs[name].weight[kept].flatten(1) * norms[name].weight[kept].sign().unsqueeze(1)  # batch norm is folded in
        torch.testing.assert_close(F.normalize(small[name].weight.flatten(1)), F.normalize(theirs))


def test_reconstruction_brings_a_part_nearer():
    images = augmented(IMAGES)
    parts = parts_of(NETWORK)
    inputs = apply(parts[""], images)
    fit = PartFit("layer1.0", parts["layer1.0"], inputs, inputs, STATISTICS)
    small = fit.solve({"layer1.0.conv1": 2}, "reconstruction")
    weights = STATISTICS["layer1.0.conv2"].importance.float().view(-1, 1, 1)

    def loss():
        with torch.no_grad():
            return ((small(inputs) - fit.part(inputs)).square() * weights).mean().item()

    before = loss()
    fit.reconstruct(small, n_steps=60, learning_rate=1e-3)
    assert loss() < 0.95 * before


def test_reconstruction_in_bfloat16_is_about_as_near(monkeypatch):
    plan, losses = {"layer1.0.conv1": 3, "layer3.0.conv1": 6}, {}
    for amp in (False, True):
        monkeypatch.setattr(parts_module, "has_fast_bfloat16", lambda device, amp=amp: amp)
        losses[amp] = change(NETWORK, merged(plan, "reconstruction", n_steps=200, learning_rate=1e-3))
    assert 0 < losses[False] < change(NETWORK, merged(plan))
    assert losses[True] < 2 * losses[False]


def test_batch_norms_hold_the_statistics_of_what_they_see():
    small = merged({"layer1.0.conv1": 3, "layer2.0.conv2": 4}, "reconstruction")
    seen = {}
    for name, conv in model.convolutions(small).items():
        conv.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output))
    with torch.no_grad():
        small(augmented(IMAGES))
    for name, norm in list(model.batch_norms(small).items())[1:]:  # the stem stays as it was
        torch.testing.assert_close(norm.running_mean, seen[name].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var, seen[name].var((0, 2, 3)), rtol=1e-3, atol=1e-5)


def moments(conv, n=64):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, conv.in_channels, 8, 8, generator=generator)
    return inputs, Moments.of(conv, inputs, conv(inputs).detach())


def test_least_squares_of_a_convolutions_own_outputs_gives_its_filters():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)
    _, found = moments(conv)
    torch.testing.assert_close(found.solution().float(), conv.weight.detach().flatten(1), rtol=1e-2, atol=1e-3)


def test_elimination_takes_out_what_least_squares_misses_least():
    conv = torch.nn.Conv2d(6, 5, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight *= torch.tensor([1.0, 0.3, 2.0, 0.1, 1.5, 0.6]).view(1, -1, 1, 1)
    _, found = moments(conv)
    importance = torch.rand(5, dtype=torch.double) + 0.1
    order = eliminate(found, importance)
    assert sorted(order) == list(range(6))

    def explained(kept):
        part = found.restricted(torch.tensor(kept))
        return float((part.solution() * part.cross.T).sum(1) @ importance)

    best = max(itertools.combinations(range(6), 5), key=explained)
    assert order[0] not in best
    assert order[-1] == max(range(6), key=lambda channel: explained([channel]))  # inputs are independent here, so greedy is optimal


def test_a_compact_network_is_merged_further_and_trains(tmp_path):
    first = merged({"layer1.0.conv1": 4, "layer2.0.conv2": 6})
    second = merged({"layer1.0.conv1": 3, "layer2.0.conv2": 4, "layer3.0.conv2": 5}, network=first)
    assert second.config["inner_widths"] == {"layer1.0.conv1": 3}
    assert len(set(second.config["sharing"]["layer2.0.conv2"])) == 4
    checkpoints.save_checkpoint(tmp_path / "small.pt", second, {})
    loaded, _ = checkpoints.load_checkpoint(tmp_path / "small.pt")
    assert torch.equal(evaluation.predict(loaded, IMAGES), evaluation.predict(second, IMAGES))
    train_an_epoch(loaded)
    assert compaction.compact(second).config == second.config


def test_equal_seeds_give_equal_networks_and_the_model_stays_as_it_was():
    before = copy.deepcopy(NETWORK.state_dict())
    plan = {"layer1.0.conv1": 3, "conv1": 4}
    first, second = (merged(plan, "reconstruction", selection="k-means", seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), NETWORK.state_dict().values(), strict=True))


@pytest.mark.parametrize(("changed", "message"), [
    ({"repair": "more"}, "repair is 'more', expected one of none, summed, scaled, least squares, reconstruction"),
    ({"selection": "best"}, "selection is 'best', expected one of k-means, elimination, L2 norm, random"),
    ({"plan": {"layer9": 2}}, "the plan names 'layer9', expected convolutions"),
    ({"plan": {"conv1": 0}}, "n_clusters is 0 for conv1, expected an integer from 1"),
    ({"images": IMAGES[:99]}, "99 images, expected at least 100"),
    ({"images": IMAGES.pixels}, "parameter images="),
])  # fmt: skip
def test_bad_input(changed, message):
    arguments = {"model": NETWORK, "plan": {"conv1": 2}, "images": IMAGES, "repair": "none"} | changed
    with pytest.raises(ValueError, match=message):
        compression.compress_by_plan(**arguments)
