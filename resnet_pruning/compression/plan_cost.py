"""The cost of the network of a plan, without its weights."""

import functools
import json
from collections.abc import Mapping
from fractions import Fraction

import torch

from .. import cost
from ..arguments import Integer
from ..model import AnyNetwork, ResNet, batch_norms, convolutions
from ..plans import check_n_clusters
from .streams import STAGES, stage_of


def cost_of_plan(
    model: AnyNetwork, plan: Mapping[str, Integer], merged: bool = False, macs: Mapping[str, Integer] | None = None
) -> tuple[int, int]:
    """Parameters and MACs of a model whose filters are replaced by this plan, each distinct filter stored and computed once.

    The next layer still sees all channels, so only the layer itself becomes cheaper. With `merged`, as in `compression.compress_by_plan`, a
    block has as many channels inside as its ``conv1`` has clusters, so that ``conv2`` becomes cheaper too; blocks may be dropped and
    streams narrower. For many plans of one model, pass its `cost.macs_by_layer`, counted once, as `macs`. Raises a ValueError for
    layers that do not exist, and for numbers of filters that make no sense.
    """
    known = {*convolutions(model), *(STAGES if merged else ())}
    for name, n in plan.items():
        if name not in known:
            also = f", or {', '.join(STAGES)}" if merged else ""
            raise ValueError(f"the plan names {name!r}, expected convolutions of the model{also}")
        if n or not merged or not name.endswith(".conv1"):  # a dropped block
            check_n_clusters(n, name)
    if merged:
        return _cost(json.dumps(_config(model, plan)))
    macs = macs or cost.macs_by_layer(model)
    n_parameters, n_macs = cost.parameters(model), sum(macs.values())
    for name, conv in convolutions(model).items():
        share = Fraction(min(plan.get(name, conv.out_channels), conv.out_channels), conv.out_channels)
        n_parameters -= round((1 - share) * conv.weight.numel())
        n_macs -= round((1 - share) * macs[name])
    return n_parameters, n_macs


@functools.lru_cache(maxsize=10_000)
def _cost(config: str) -> tuple[int, int]:
    """Parameters and MACs of a network of a configuration, which is JSON. A search for a plan asks for the same ones again and again."""
    with torch.random.fork_rng(devices=[]):
        small = ResNet(**json.loads(config))
    return cost.parameters(small), cost.macs(small)


def _config(model: ResNet, plan: Mapping[str, Integer]) -> dict:
    """The configuration of a network of this plan; which channels share a filter is arbitrary."""
    widths = [int(min(plan.get(stage, width), width)) for stage, width in zip(STAGES, model.config["stage_widths"], strict=True)]
    config = model.config | {"stage_widths": tuple(widths), "inner_widths": {}, "sharing": {}, "shortcuts": {}}
    for name, norm in batch_norms(model).items():  # of all channels, also where these share filters: such a network is expanded first
        n_filters = int(min(plan.get(name, norm.num_features), norm.num_features))
        if name.endswith("conv1") and name != "conv1":
            config["inner_widths"][name] = n_filters
        elif n_filters < (width := widths[stage_of(name.rpartition(".")[0])]) and plan.get(name.replace("conv2", "conv1"), 1):
            config["sharing"][name] = [*range(n_filters), *[0] * (width - n_filters)]
    dropped = {name: 0 for name, width in model.config["inner_widths"].items() if not width}
    return config | {"inner_widths": config["inner_widths"] | dropped}
