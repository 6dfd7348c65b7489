import pytest
import torch

from resnet_pruning import compression, cost, model
from resnet_pruning.studies.ends import MEASURES, whole_ends

torch.manual_seed(0)
NETWORK = model.ResNet(20)
CONVS = model.convolutions(NETWORK)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("n_first, n_last", [(0, 0), (3, 2), (0, 6)])
def test_ends_are_whole_and_the_budget_is_used(measure, n_first, n_last):
    plan = whole_ends(NETWORK, n_first, n_last, measure, 0.75)
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
        whole_ends(NETWORK, 0, 0, "filters", 0.75)
    with pytest.raises(ValueError, match="expected at least"):
        whole_ends(NETWORK, 10, 8, "MACs", 0.5)
