"""How much the filters of each layer repeat each other."""

import pandas as pd
import torch
from torch import nn

from ..clustering import cluster_filters
from ..model import batch_norms, convolutions


def redundancy(model: nn.Module, seed: int = 0) -> pd.DataFrame:
    """Four measures for each convolution, front to back.

    Returns
    -------
    DataFrame with the columns layer, n_filters; inertia: what is left within clusters, in % of the variance, when k-means has half as many
    clusters as there are filters; effective_rank: the exponential of the entropy of the shares of the squared singular values (Roy &
    Vetterli 2007), in % of the number of filters; rank_90: singular values that hold 90 % of the sum of squares, in % of the filters;
    neighbour: the mean over filters of the largest absolute cosine similarity to another one
    """
    norms, rows = batch_norms(model), []
    for name, conv in convolutions(model).items():
        weight = conv.weight.detach().double().cpu().flatten(1)
        n = len(weight)
        whole, half = (cluster_filters(conv, k, batch_norm=norms.get(name), seed=seed, layer=name).inertia for k in (1, max(1, n // 2)))
        shares = torch.linalg.svdvals(weight).square()
        shares = shares / shares.sum().clamp(min=1e-300)
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum()
        directions = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
        similarity = (directions @ directions.T).abs().fill_diagonal_(0)
        rows.append(
            {
                "layer": name,
                "n_filters": n,
                "inertia": 100 * half / max(whole, 1e-300),
                "effective_rank": 100 * float(entropy.exp()) / n,
                "rank_90": 100 * (int((shares.cumsum(0) < 0.9).sum()) + 1) / n,
                "neighbour": float(similarity.amax(1).mean()),
            }
        )
    return pd.DataFrame(rows)
