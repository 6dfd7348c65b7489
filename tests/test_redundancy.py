import copy

import pytest
import torch
from test_pruning import NETWORK

from resnet_pruning import model
from resnet_pruning.studies.redundancy import redundancy


def test_measures_know_repeated_and_independent_filters():
    network = copy.deepcopy(NETWORK)
    convs = model.convolutions(network)
    repeated, independent = convs["layer1.0.conv1"], convs["layer2.0.conv2"]
    with torch.no_grad():
        repeated.weight.copy_(repeated.weight[[0, 1, 2, 0, 1, 2]])
        torch.nn.init.orthogonal_(independent.weight)
    table = redundancy(network).set_index("layer")
    assert list(table.index) == list(convs) and table.n_filters.tolist() == [len(conv.weight) for conv in convs.values()]
    first, second = table.loc["layer1.0.conv1"], table.loc["layer2.0.conv2"]
    assert first.inertia == pytest.approx(0, abs=1e-9) and first.neighbour == pytest.approx(1) and first.effective_rank <= 50.001
    assert second.effective_rank == pytest.approx(100) and second.neighbour == pytest.approx(0, abs=1e-6) and second.rank_90 == 100
    assert second.inertia > 40 and first.shuffled > 20 and second.shuffled == pytest.approx(second.inertia, abs=10)
