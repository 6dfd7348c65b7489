import pytest
import torch

from resnet_pruning import compression, cost, model
from resnet_pruning.studies.ends import MEASURES, border_layers, end_layers, heavy

torch.manual_seed(0)
NETWORK = model.ResNet(20)
CONVS = model.convolutions(NETWORK)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("n_first, n_last", [(0, 0), (3, 2), (0, 6)])
def test_ends_are_whole_and_the_budget_is_used(measure, n_first, n_last):
    plan = heavy(NETWORK, end_layers(NETWORK, n_first, n_last), measure, 0.75)
    names = list(CONVS)
    assert list(plan) == names
    assert all(plan[name] == CONVS[name].out_channels for name in names[:n_first] + names[len(names) - n_last :])
    shares = [plan[name] / CONVS[name].out_channels for name in names[n_first : len(names) - n_last]]
    assert max(shares) - min(shares) < 0.1
    if measure == "MACs":
        assert 0.74 < compression.cost_of_plan(NETWORK, plan)[1] / cost.macs(NETWORK) <= 0.75
    else:
        assert sum(plan.values()) == int(0.75 * sum(conv.out_channels for conv in CONVS.values()))


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="measure is 'filters', expected one of MACs, distinct filters"):
        heavy(NETWORK, [], "filters", 0.75)
    with pytest.raises(ValueError, match="expected at least"):
        heavy(NETWORK, end_layers(NETWORK, 10, 8), "MACs", 0.5)
    with pytest.raises(ValueError, match="layers has 'layer4.0.conv1', expected convolutions of the network"):
        heavy(NETWORK, ["layer4.0.conv1"], "MACs", 0.75)
    with pytest.raises(ValueError, match="n_first \\+ n_last is 10 \\+ 10, expected at most the number of layers, 19"):
        end_layers(NETWORK, 10, 10)


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
def test_milder_plans_have_the_same_macs(share):
    layers = end_layers(NETWORK, 3, 2)
    plan = heavy(NETWORK, layers, "MACs", 0.5, share)
    assert all(plan[name] == round(share * CONVS[name].out_channels) for name in layers)
    assert 0.49 < compression.cost_of_plan(NETWORK, plan)[1] / cost.macs(NETWORK) <= 0.5
    assert max(plan[name] / CONVS[name].out_channels for name in plan if name not in layers) < 0.51


def test_all_layers_as_ends_are_uniform():
    assert heavy(NETWORK, end_layers(NETWORK, 19, 0), "MACs", 0.8, 0.75) == heavy(NETWORK, end_layers(NETWORK, 0, 19), "MACs", 1, 0.75)
    with pytest.raises(ValueError, match="expected at least"):
        heavy(NETWORK, end_layers(NETWORK, 19, 0), "MACs", 0.7, 0.75)


def test_borders_are_the_blocks_beside_them():
    assert border_layers(NETWORK) == [f"layer{block}.conv{i}" for block in ("1.2", "2.0", "2.2", "3.0") for i in (1, 2)]
