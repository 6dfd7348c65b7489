"""Compact networks: their exactness, their checkpoints, and their agreement with onnxruntime."""

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from torch import nn

from .. import compaction, cost, evaluation, plans, pruning
from ..arguments import Real
from ..data import Images
from ..deployment import runtimes
from ..model import ResNet, batch_norms, convolutions
from .pruning_runs import PruningRuns

# Distance, weighting, and whether batch norms are changed so that channels of a cluster can be merged.
REPLACEMENTS = (("raw", 0.0, False), ("folded", 0.0, True), ("unit", 0.5, True), ("correlation", 0.5, False), ("correlation", 0.5, True))


def exactness(
    runs: PruningRuns,
    shares: Sequence[Real],
    replacements: Sequence[tuple[str, Real, bool]] = REPLACEMENTS,
    representatives: Sequence[str] = ("centroid", "medoid"),
) -> tuple[pd.DataFrame, dict[str, ResNet]]:
    """The difference between compact networks and the networks with replaced filters that they are made from.

    Parameters
    ----------
    runs : the network and its images
    shares : shares of the filters to keep in every layer
    replacements, representatives : see `REPLACEMENTS` and `pruning.replace_filters`

    Returns
    -------
    DataFrame with a row for each network: its name; difference, the largest of any logit on 500 test images, in 10⁻⁷ of the largest logit;
    MACs and parameters as shares. And the compact networks, by name
    """
    rows, networks = [], {}
    material, test = runs.material, runs.material.images("test")[:500]
    for share, (distance, weighting, mergeable), representative in itertools.product(shares, replacements, representatives):
        settings = {"distance": distance, "weighting": weighting, "mergeable": mergeable, "statistics": material.statistics}
        plan = plans.uniform_fraction(material.network, share)
        replaced = pruning.replace_filters(material.network, plan, representative, batch_norm_images=material.calibration, **settings)
        small = compaction.compact(replaced)
        expected = evaluation.predict(replaced, test)
        difference = (evaluation.predict(small, test) - expected).abs().max() / expected.abs().max()
        name = f"{share:.0%}, {distance}{', weighted' if weighting else ''}, {representative}{', mergeable' if mergeable else ''}"
        row = {"network": name, "difference": 1e7 * float(difference)}
        for what, count in (("macs_share", cost.macs), ("parameters_share", cost.parameters)):
            row[what] = round(count(small) / count(material.network), 4)
        rows.append(row)
        networks[name] = small
    return pd.DataFrame(rows), networks


def in_onnxruntime(networks: Mapping[str, nn.Module], images: Images) -> pd.DataFrame:
    """Compare networks with their exports to ONNX, in onnxruntime: a row for each, with the percentage of equal predictions, the largest
    difference of a logit, and the bytes of the file."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, network in networks.items():
            path = Path(folder) / f"{name}.onnx"
            runtimes.to_onnx(network, path)
            ours, theirs = evaluation.predict(network, images), runtimes.predict_onnx(path, images)
            same = 100 * (ours.argmax(1) == theirs.argmax(1)).double().mean().item()
            difference = (ours - theirs).abs().max().item()
            rows.append(
                {
                    "network": name,
                    "same predictions (%)": same,
                    "largest difference of a logit": difference,
                    "bytes": path.stat().st_size,
                }
            )
    return pd.DataFrame(rows)


def layer_table(before: ResNet, after: ResNet) -> pd.DataFrame:
    """The effect of compacting on each convolution: channels and MACs before and after, computed filters and input channels after."""
    rows = []
    macs_before, macs_after = cost.macs_by_layer(before), cost.macs_by_layer(after)
    for name, conv in convolutions(after).items():
        rows.append(
            {
                "layer": name,
                "channels before": batch_norms(before)[name].num_features,
                "channels": batch_norms(after)[name].num_features,
                "computed filters": conv.weight.shape[0],
                "input channels": conv.in_channels,
                "MACs before": macs_before[name],
                "MACs": macs_after[name],
            }
        )
    return pd.DataFrame(rows)
