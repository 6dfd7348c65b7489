"""What the network of a plan costs, without making it."""

from collections.abc import Mapping
from fractions import Fraction

from ..arguments import Integer
from ..cost import macs_by_layer, parameters
from ..model import AnyNetwork, batch_norms, convolutions


def cost_of_plan(
    model: AnyNetwork, plan: Mapping[str, Integer], merged: bool = False, macs: Mapping[str, Integer] | None = None
) -> tuple[int, int]:
    """Parameters and MACs of a model whose filters are replaced by this plan, each distinct filter stored and computed once.

    What follows a layer still sees all its channels, so this saves in the layer itself and in no other; unless `merged`, as in
    `compression.compress_by_plan`: then a block has as many channels inside as its ``conv1`` has clusters, which saves in ``conv2`` too.
    For many plans of one model, `macs` are its `macs_by_layer`, counted once.
    """
    convs, norms, macs = convolutions(model), batch_norms(model), macs or macs_by_layer(model)
    shares = {name: Fraction(min(plan.get(name, conv.out_channels), conv.out_channels), conv.out_channels) for name, conv in convs.items()}
    n_parameters, n_macs = parameters(model), sum(macs.values())
    for name, conv in convs.items():
        share = shares[name]
        if merged and name.endswith(".conv1"):
            n_parameters -= round((1 - share) * 2 * norms[name].num_features)
        if merged and name.endswith(".conv2"):
            share *= shares[name.replace("conv2", "conv1")]
        n_parameters -= round((1 - share) * conv.weight.numel())
        n_macs -= round((1 - share) * macs[name])
    return n_parameters, n_macs
