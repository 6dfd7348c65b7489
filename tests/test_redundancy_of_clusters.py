import copy

import pytest
import torch

from resnet_pruning import model
from resnet_pruning.clustering import cluster_layers
from resnet_pruning.studies import redundancy

torch.manual_seed(0)
NETWORK = model.ResNet(8, (4, 6, 8))


def test_inertia_falls_from_all_to_nothing():
    table = redundancy.inertia_by_share(NETWORK, [0.01, 0.5, 1.0])
    assert list(table) == ["stage", "layer", "share", "inertia"] and len(table) == 3 * 7
    assert list(dict.fromkeys(table.stage)) == ["stem", "stage 1", "stage 2", "stage 3"]
    wide = table.pivot_table(index="layer", columns="share", values="inertia")
    assert (wide[0.01] == 100).all() and (wide[1.0] == 0).all() and wide[0.5].between(1, 99).all()


def test_filters_are_counted_by_the_size_of_their_cluster():
    network = copy.deepcopy(NETWORK)
    with torch.no_grad():
        weight = network.layer3[0].conv1.weight
        weight[1:5] = weight[0]  # five equal filters, three others
        weight[:5] *= 0.1
    clusters = cluster_layers(network, {"layer3.0.conv1": 4, "conv1": 4})
    sizes = redundancy.cluster_sizes(clusters)
    assert sizes.loc["layer3.0.conv1"].to_dict() == {"1": 37.5, "2": 0, "3": 0, "4 to 7": 62.5, "8 and more": 0}
    assert sizes.loc["conv1", "1"] == 100
    ratios = redundancy.length_ratios(network, clusters)
    assert list(ratios.index) == ["layer3.0.conv1"] and ratios.iloc[0] == pytest.approx(10, rel=0.3)
