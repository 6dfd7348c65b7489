"""Unit pruning: channels inside the blocks, between their two convolutions, are removed without compensation.

This network can lose channels only inside the blocks: layers that add to the residual stream must have all of its channels. A plan (see
`plans`) names first convolutions of blocks and gives the number of their channels to keep.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..arguments import Seed
from ..clustering import check_unshared
from ..compaction import compact, expanded
from ..model import Network, OwnNetwork, ResNet, batch_norms, convolutions
from ..plans import Plan, check_plan

UNIT_CRITERIA = ("L1 norm", "L2 norm", "geometric median", "random")


def prune_units(model: OwnNetwork, plan: Plan, criterion: str = "L2 norm", *, seed: Seed = 0) -> ResNet:
    """A compact network without the units with the lowest scores. Their removal is not compensated.

    Parameters
    ----------
    plan : number of channels to keep, for first convolutions of blocks
    criterion : "L1 norm" (Li et al., *Pruning Filters for Efficient ConvNets*, ICLR 2017) or "L2 norm" of a filter; "geometric median":
        the filters nearest to all others of their layer are removed first (He et al., *FPGM*, CVPR 2019); "random"
    seed : of the random choice

    Raises
    ------
    ValueError : an unknown criterion; a plan for other layers
    """
    return compact(mask_units(model, plan, criterion, seed=seed))


def mask_units(model: OwnNetwork, plan: Plan, criterion: str = "L2 norm", *, seed: Seed = 0) -> ResNet:
    """The network that `prune_units` compacts: a copy of the same shapes, in which the removed channels are zero on any input."""
    model = expanded(model)
    for name, kept in kept_units(model, plan, criterion, seed=seed).items():
        mask(model, name, kept)
    return model


def kept_units(model: Network, plan: Plan, criterion: str = "L2 norm", *, seed: Seed = 0) -> dict[str, Tensor]:
    """The kept channels of each layer of the plan: sorted indices (n_kept,). See `prune_units`. Raises a ValueError also for a layer whose
    channels share filters."""
    if criterion not in UNIT_CRITERIA:
        raise ValueError(f"criterion is {criterion!r}, expected one of {', '.join(UNIT_CRITERIA)}")
    check_inside_blocks(model, plan)
    convs, kept = convolutions(model), {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))  # that of a GPU stays as it is
        for name, n_kept in plan.items():
            check_unshared(name, convs[name])
            conv = copy.deepcopy(convs[name]).cpu()
            n_pruned = max(conv.out_channels - n_kept, 0)
            if criterion == "geometric median":
                filters = conv.weight.detach().flatten(1).double()
                order = torch.cdist(filters, filters).sum(1).argsort(stable=True)
                kept[name] = order[n_pruned:].sort().values
                continue
            if criterion == "random":
                prune.random_structured(conv, "weight", amount=n_pruned, dim=0)
            else:
                prune.ln_structured(conv, "weight", amount=n_pruned, n=int(criterion[1]), dim=0)
            kept[name] = conv.weight_mask.flatten(1).any(1).nonzero().flatten()
    return kept


@torch.no_grad()
def mask(model: nn.Module, name: str, kept: Tensor) -> None:
    """Make all channels of a layer except `kept` zero after its batch norm, on any input."""
    conv, norm = convolutions(model)[name], batch_norms(model)[name]
    gone = torch.ones(conv.out_channels, dtype=torch.bool)
    gone[kept] = False
    for tensor in (conv.weight, norm.weight, norm.bias):
        tensor[gone.to(tensor.device)] = 0.0


def check_inside_blocks(model: nn.Module, plan: Plan) -> None:
    check_plan(model, plan)
    if others := [name for name in plan if not name.endswith(".conv1")]:
        raise ValueError(f"the plan names {', '.join(others)}, expected first convolutions of blocks, whose channels can be removed")
