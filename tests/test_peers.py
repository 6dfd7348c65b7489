import copy
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import IMAGES, NETWORK, assert_same_function

from resnet_pruning import compaction, compression, cost, evaluation, finetuning, model, peers, plans, pruning
from resnet_pruning.compression import allocation
from resnet_pruning.peers import weights
from resnet_pruning.training import Execution, Recipe, train

needs_torch_pruning = pytest.mark.skipif(not peers.HAS_TORCH_PRUNING, reason="torch_pruning is not installed")
INSIDE = list(plans.uniform(NETWORK, 1, "*.conv1"))
inside_plan = st.fixed_dictionaries({}, optional={name: st.integers(1, 9) for name in INSIDE})
PLAN = plans.uniform_fraction(NETWORK, 0.5, "*.conv1")
SHARED = compaction.compact(pruning.replace_filters(NETWORK, {"layer1.0.conv1": 3}))


def zeros_by_layer(network):
    return {name: int((layer.weight == 0).sum()) for name, layer in weights.weighted_layers(network).items()}


@given(sparsity=st.floats(0, 0.999), criterion=st.sampled_from(peers.WEIGHT_CRITERIA))
@settings(deadline=None, max_examples=30)
def test_weight_pruning_makes_the_asked_share_of_weights_zero(sparsity, criterion):
    network = peers.prune_weights(NETWORK, sparsity, criterion)
    layers = weights.weighted_layers(NETWORK)
    assert peers.sparsity_of(network) == pytest.approx(sparsity, abs=1 / min(layer.weight.numel() for layer in layers.values()))
    if criterion != "global":
        for name, n_zeros in zeros_by_layer(network).items():
            assert abs(n_zeros - sparsity * layers[name].weight.numel()) <= 0.5
    for name, layer in weights.weighted_layers(network).items():  # what stays is as it was, and where magnitude decides, no smaller
        stays = layer.weight != 0
        assert torch.equal(layer.weight[stays], layers[name].weight[stays])
        if criterion == "per layer" and stays.any() and not stays.all():
            assert layers[name].weight[stays].abs().min() >= layers[name].weight[~stays].abs().max()
    assert {name for name, _ in network.named_parameters()} == {name for name, _ in NETWORK.named_parameters()}


def test_global_weight_pruning_takes_the_smallest_of_the_whole_network():
    before, after = (
        torch.cat([layer.weight.detach().flatten() for layer in weights.weighted_layers(network).values()])
        for network in (NETWORK, peers.prune_weights(NETWORK, 0.6))
    )
    assert before[after != 0].abs().min() >= before[after == 0].abs().max()


def test_chance_follows_the_seed_and_leaves_torchs_own_alone():
    state = torch.get_rng_state()
    a, b, c = (peers.prune_weights(NETWORK, 0.5, "random", seed=seed) for seed in (0, 0, 1))
    units = [peers.kept_units(NETWORK, PLAN, "random", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.conv1.weight, b.conv1.weight) and not torch.equal(a.conv1.weight, c.conv1.weight)
    same = [all(torch.equal(units[0][name], other[name]) for name in PLAN) for other in units[1:]]
    assert same == [True, False]


def test_fine_tuning_keeps_zeros_and_trains_the_rest():
    pruned = peers.prune_weights(NETWORK, 0.8)
    network = peers.masked(pruned)
    train(
        network,
        IMAGES,
        Recipe(epochs=2, batch_size=16, learning_rate=0.02, ema=0.9, small_share=0.0),
        execution=Execution(compile=False),
        progress=False,
    )
    after = finetuning.released(network)
    assert_same_function(network, after)
    assert zeros_by_layer(after) == zeros_by_layer(pruned)
    assert not torch.equal(after.conv1.weight, pruned.conv1.weight) and not torch.equal(after.fc.weight, pruned.fc.weight)
    assert peers.gzip_bytes(after) < 0.6 * peers.gzip_bytes(NETWORK) and cost.size_in_bytes(after) == cost.size_in_bytes(NETWORK)


@given(plan=inside_plan, criterion=st.sampled_from(peers.UNIT_CRITERIA))
@settings(deadline=None, max_examples=25)
def test_a_network_without_units_computes_what_the_masked_one_does(plan, criterion):
    masked, small = peers.mask_units(NETWORK, plan, criterion), peers.prune_units(NETWORK, plan, criterion)
    assert_same_function(masked, small)
    assert (cost.parameters(small), cost.macs(small)) == compression.cost_of_plan(NETWORK, plan, merged=True)


def test_units_go_by_their_score():
    weight = torch.zeros(4, 3, 3, 3)
    weight[0, 0, 0, 0], weight[1, 0, 0, :2], weight[2, 1], weight[3, 0, 0, 0] = 3.0, torch.tensor([2.0, 2.0]), 5.0, -2.9
    network = copy.deepcopy(NETWORK)
    conv = model.convolutions(network)["layer1.0.conv1"]
    conv.weight.data = torch.zeros_like(conv.weight)
    conv.weight.data[:4, :3] = weight
    plan = {"layer1.0.conv1": 2}
    kept = {criterion: peers.kept_units(network, plan, criterion)["layer1.0.conv1"].tolist() for criterion in peers.UNIT_CRITERIA}
    assert kept["L1 norm"] == [1, 2]  # 3, 4, 45, 2.9
    assert kept["L2 norm"] == [0, 2]  # 3, 2.83, 15, 2.9
    assert kept["geometric median"] == [2, 3]  # the other two lie next to each other


def test_neuron_merging_loses_nothing_where_filters_are_multiples():
    """Channels that are positive multiples of others after batch norm can go: the paper's premise."""
    network = copy.deepcopy(NETWORK)
    plan = {}
    for name, block in model.blocks(network).items():
        half = block.conv1.out_channels // 2
        plan[f"{name}.conv1"] = block.conv1.out_channels - half
        with torch.no_grad():
            scales = torch.linspace(0.2, 0.4, half)
            for tensor in (block.conv1.weight, block.bn1.running_mean):  # filters s times others, and what follows of them
                tensor[:half] = tensor[-half:] * scales.view(-1, *[1] * (tensor.ndim - 1))
            block.bn1.running_var[:half] = block.bn1.running_var[-half:] * scales.square() + block.bn1.eps * (scales.square() - 1)
            block.bn1.weight[:half], block.bn1.bias[:half] = 1.5 * block.bn1.weight[-half:], 1.5 * block.bn1.bias[-half:]
    small = peers.merge_neurons(network, plan)
    assert cost.macs(small) == compression.cost_of_plan(network, plan, merged=True)[1]
    assert_same_function(network, small)
    apart = peers.merge_neurons(network, plan, threshold=1.1)
    assert_same_function(apart, peers.prune_units(network, plan, "L1 norm"))  # nothing is similar enough


@needs_torch_pruning
@pytest.mark.parametrize("importance", peers.IMPORTANCES)
def test_torch_pruning_gives_networks_of_the_asked_size(importance):
    small = peers.prune_by_torch_pruning(NETWORK, importance, plan=PLAN)
    assert cost.macs(small) == compression.cost_of_plan(NETWORK, PLAN, merged=True)[1]
    fewest = dict.fromkeys(INSIDE, 1)
    assert peers.prune_by_torch_pruning(model.ResNet(8, (16, 32, 64)).eval(), importance, plan=fewest).config["inner_widths"] == fewest
    whole = cost.macs(NETWORK)
    together = peers.prune_by_torch_pruning(NETWORK, importance, macs=0.7)
    assert 0.6 * whole < cost.macs(together) <= 0.7 * whole
    assert_same_function(peers.prune_by_torch_pruning(NETWORK, importance, macs=1.0), NETWORK)
    with pytest.raises(ValueError, match="macs is 0.01, expected more"):
        peers.prune_by_torch_pruning(NETWORK, importance, macs=0.01)


@needs_torch_pruning
@pytest.mark.parametrize("amount", [{"plan": {"layer1.0.conv1": 2, "layer3.0.conv1": 7}}, {"macs": 0.7}])
def test_torch_pruning_leaves_dropped_blocks_dropped(amount):
    network = model.ResNet(8, (6, 8, 10), {"layer2.0.conv1": 0}).eval()
    small = peers.prune_by_torch_pruning(network, **amount)
    assert small.layer2[0].dropped and evaluation.predict(small, IMAGES[:4]).isfinite().all()
    if "plan" in amount:
        assert small.config["inner_widths"] == {"layer1.0.conv1": 2, "layer2.0.conv1": 0, "layer3.0.conv1": 7}
    else:
        assert 0.6 * cost.macs(network) < cost.macs(small) <= 0.7 * cost.macs(network)


@needs_torch_pruning
def test_torch_prunings_budget_is_of_the_network_with_its_shared_filters():
    with torch.no_grad():
        small = peers.prune_by_torch_pruning(SHARED, macs=0.9)
    assert 0.8 * cost.macs(SHARED) < cost.macs(small) <= 0.9 * cost.macs(SHARED)


@needs_torch_pruning
def test_torch_prunings_network_is_the_masked_one():
    small = peers.prune_by_torch_pruning(NETWORK, "batch-norm scale", plan=PLAN)
    masked = copy.deepcopy(NETWORK)
    for name, n_kept in PLAN.items():
        norm = model.batch_norms(masked)[name]
        gone = norm.weight.detach().abs().argsort()[: len(norm.weight) - n_kept]
        norm.weight.data[gone] = norm.bias.data[gone] = 0.0
    assert_same_function(masked, small)


def test_equal_budgets_give_equal_costs():
    network = model.ResNet(20)
    for level in (0.75, 0.5, 0.25):
        plan = allocation.uniform_inside_blocks(network, level)
        assert 0.99 * level < compression.cost_of_plan(network, plan, merged=True)[1] / cost.macs(network) <= level


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: peers.prune_weights(NETWORK, 1.0), "sparsity is 1.0, expected a number in"),
        (lambda: peers.prune_weights(NETWORK, -0.1), "sparsity is -0.1"),
        (lambda: peers.prune_weights(NETWORK, float("nan")), "sparsity is nan"),
        (lambda: peers.prune_weights(NETWORK, 0.5, "largest"), "criterion is 'largest', expected one of per layer, global, random"),
        (lambda: peers.prune_units(NETWORK, PLAN, "L3 norm"), "criterion is 'L3 norm', expected one of L1 norm"),
        (lambda: peers.prune_units(NETWORK, {"conv1": 2}), "the plan names conv1, expected first convolutions of blocks"),
        (lambda: peers.prune_units(NETWORK, {"layer1.0.conv1": 0}), "n_clusters is 0 for layer1.0.conv1"),
        (lambda: peers.kept_units(SHARED, PLAN), "layer1.0.conv1 computes 3 filters for 6 channels already"),
        (lambda: peers.merge_neurons(NETWORK, PLAN, balance=2), "balance is 2"),
        (lambda: peers.prune_by_torch_pruning(NETWORK, "size", macs=0.5), "importance is 'size', expected one of group norm"),
        (lambda: peers.prune_by_torch_pruning(NETWORK), "expected exactly one of them"),
        (lambda: allocation.uniform_inside_blocks(NETWORK, 0.01), "budget is .*, expected at least"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_torch_pruning_only_its_own_rows_are_missing(monkeypatch):
    from resnet_pruning.studies import method_runs

    assert method_runs.available() == (list(method_runs.METHODS), "") or not peers.HAS_TORCH_PRUNING
    monkeypatch.setattr(peers, "HAS_TORCH_PRUNING", False)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"torch_pruning is not installed, .*\[peers\]"):
        peers.prune_by_torch_pruning(NETWORK, macs=0.5)
    methods, sentence = method_runs.available()
    assert set(method_runs.METHODS) - set(methods) == set(method_runs.FAMILIES["Torch-Pruning"])
    assert "pip install torch-pruning" in sentence and all(name in sentence for name in method_runs.FAMILIES["Torch-Pruning"])
