"""The redundancy of the filters of each layer."""

import copy
import statistics
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import nn

from ..arguments import Real, Seed
from ..clustering import Clusters, cluster_filters
from ..model import Network, convolutions


def redundancy(model: Network, seed: Seed = 0) -> pd.DataFrame:
    """Five measures for each convolution, front to back.

    Returns
    -------
    DataFrame with the columns layer, n_filters; inertia: the variance that remains within clusters, in %, when k-means has half as many
    clusters as there are filters; shuffled: the same if the weights of each filter are first put in a random order, which leaves nothing
    that filters share (mean of five); effective_rank: the exponential of the entropy of the shares of the squared singular values, in % of
    the number of filters (Roy & Vetterli 2007 take the singular values themselves, which gives more); rank_90: the number of singular
    values that hold 90 % of their sum of squares, in % of the number of filters; neighbour: the mean over filters of the largest absolute
    cosine similarity to another filter
    """
    rows = []
    for name, conv in convolutions(model).items():
        weight = conv.weight.detach().double().cpu().flatten(1)
        n = len(weight)
        shares = torch.linalg.svdvals(weight).square()
        shares = shares / shares.sum().clamp(min=1e-300)
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum()
        directions = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
        similarity = (directions @ directions.T).abs().fill_diagonal_(0)
        rows.append(
            {
                "layer": name,
                "n_filters": n,
                "inertia": _left_by_half(conv, seed, name),
                "shuffled": statistics.mean(_left_by_half(_shuffled(conv, (seed + k) % 2**32), seed, name) for k in range(5)),
                "effective_rank": 100 * float(entropy.exp()) / n,
                "rank_90": 100 * (int((shares.cumsum(0) < 0.9).sum()) + 1) / n,
                "neighbour": float(similarity.amax(1).mean()),
            }
        )
    return pd.DataFrame(rows)


def _left_by_half(conv: nn.Conv2d, seed: Seed, layer: str) -> float:
    """The variance within half as many clusters as filters, in %."""
    whole, half = (cluster_filters(conv, k, seed=seed, layer=layer).inertia for k in (1, max(1, conv.out_channels // 2)))
    return 100 * half / max(whole, 1e-300)


@torch.no_grad()
def _shuffled(conv: nn.Conv2d, seed: Seed) -> nn.Conv2d:
    """A copy with the weights of each filter in an order of their own."""
    conv, generator = copy.deepcopy(conv), torch.Generator().manual_seed(int(seed))
    order = torch.rand(conv.weight.flatten(1).shape, generator=generator).argsort(1).to(conv.weight.device)
    conv.weight.copy_(conv.weight.flatten(1).gather(1, order).view_as(conv.weight))
    return conv


def inertia_by_share(model: Network, shares: Sequence[Real]) -> pd.DataFrame:
    """The inertia of k-means on the raw weights, by the number of clusters as a share of the layer's filters.

    Returns
    -------
    DataFrame with a row for each convolution and share and the columns stage ("stem", "stage 1", …), layer, share, and inertia, in % of
    that with one cluster
    """
    rows = []
    for name, conv in convolutions(model).items():
        stage = "stem" if name == "conv1" else f"stage {name.removeprefix('layer')[0]}"
        whole = cluster_filters(conv, 1, layer=name).inertia
        for share in shares:
            inertia = cluster_filters(conv, max(1, round(share * conv.out_channels)), layer=name).inertia
            rows.append({"stage": stage, "layer": name, "share": share, "inertia": 100 * inertia / whole})
    return pd.DataFrame(rows)


def cluster_sizes(clusters: Mapping[str, Clusters]) -> pd.DataFrame:
    """The percentage of each layer's filters by the size of their cluster: a column for each range of sizes."""
    ranges = ["1", "2", "3", "4 to 7", "8 and more"]
    rows = {}
    for name, layer in clusters.items():
        sizes = pd.cut(layer.sizes[layer.labels].numpy(), [0, 1, 2, 3, 7, len(layer.labels) + 8], labels=ranges)
        rows[name] = 100 * sizes.value_counts() / len(layer.labels)
    return pd.DataFrame(rows).T.rename_axis("layer")


def length_ratios(model: Network, clusters: Mapping[str, Clusters]) -> pd.Series:
    """The mean length of the filters that are alone in their cluster, divided by that of the others, by layer.

    Layers without filters of both kinds are left out.
    """
    convs, ratios = convolutions(model), {}
    for name, layer in clusters.items():
        lengths = convs[name].weight.detach().cpu().flatten(1).norm(dim=1)
        alone = layer.sizes[layer.labels] == 1
        if alone.any() and not alone.all():
            ratios[name] = float(lengths[alone].mean() / lengths[~alone].mean())
    return pd.Series(ratios, dtype=float)
