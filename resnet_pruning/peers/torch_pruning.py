"""Torch-Pruning's own pruners (Fang et al., *DepGraph*, CVPR 2023), on this network."""

import copy
import importlib.util
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .. import cost
from ..arguments import Integer, Real
from ..compaction import expanded
from ..compression.plan_cost import cost_of_plan
from ..files import required
from ..model import OwnNetwork, ResNet, blocks, convolutions, with_tensors
from ..plans import Plan, check_share
from .units import check_inside_blocks
from .weights import weighted_layers

IMPORTANCES = ("group norm", "batch-norm scale", "geometric median")
HAS_TORCH_PRUNING = importlib.util.find_spec("torch_pruning") is not None


@torch.random.fork_rng(devices=[])
@torch.enable_grad()  # it finds what belongs together by gradients
def prune_by_torch_pruning(
    model: OwnNetwork, importance: str = "group norm", *, plan: Plan | None = None, macs: Real | None = None
) -> ResNet:
    """A compact network from Torch-Pruning (Fang et al., *DepGraph*, CVPR 2023), in one step, without its sparse training.

    Parameters
    ----------
    importance : Torch-Pruning's score of a unit, over all tensors that hold the unit: "group norm"; "batch-norm scale" (Liu et al.,
        *Network Slimming*, ICCV 2017); "geometric median" (*FPGM*)
    plan : number of channels to keep, for first convolutions of blocks
    macs : or a budget, as a share of the model's MACs; the units of all layers are then ranked together

    Raises
    ------
    ImportError : torch_pruning is not installed
    ValueError : an unknown importance; not exactly one of `plan` and `macs`; a budget that it cannot meet
    """
    if importance not in IMPORTANCES:
        raise ValueError(f"importance is {importance!r}, expected one of {', '.join(IMPORTANCES)}")
    if (plan is None) == (macs is None):
        raise ValueError(f"plan is {plan!r} and macs is {macs!r}, expected exactly one of them")
    required("torch_pruning", "peers")
    whole, model = cost.macs(model), expanded(model)  # shared filters are computed once
    if plan is None:
        plan = _plan_of_torch_pruning(model, importance, check_share(macs, "macs"), whole)
    check_inside_blocks(model, plan)
    convs = convolutions(model)
    ratios = {name: 1 - (min(n_kept, convs[name].out_channels) + 0.5) / convs[name].out_channels for name, n_kept in plan.items()}
    return _torch_pruned(model, importance, {name: max(ratio, 0.0) for name, ratio in ratios.items()})  # it rounds down the number kept


def _plan_of_torch_pruning(model: ResNet, importance: str, share: Real, whole: Integer) -> dict[str, int]:
    """The number of channels to keep in each layer when the units of all layers are ranked together, for a share of `whole` MACs.

    The fewest units are removed whose removal meets the budget. The rest of the budget is too small for the unit that was removed last. It
    is spent on single units of other layers, front to back.
    """
    budget, n_units = share * whole, sum(conv.out_channels for conv in _inside(model).values())

    def plan_without(n_pruned: Integer) -> dict[str, int]:
        pruned = _torch_pruned(model, importance, (n_pruned - 0.5) / n_units if n_pruned else 0.0)
        return {name: conv.out_channels for name, conv in _inside(pruned).items()}

    def macs(plan: Plan) -> int:
        return cost_of_plan(model, plan, merged=True)[1]

    low, high = 0, n_units - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if macs(plan_without(middle)) <= budget else (middle + 1, high)
    plan = plan_without(low)
    if macs(plan) > budget:
        raise ValueError(f"macs is {share}, expected more: Torch-Pruning removes no layer's last unit, and misses this budget")
    for name, n_kept in plan.items():
        if n_kept < convolutions(model)[name].out_channels and macs(larger := plan | {name: n_kept + 1}) <= budget:
            plan = larger
    return plan


def _inside(model: ResNet) -> dict[str, nn.Conv2d]:
    """The first convolutions of the blocks that are not dropped, by name: only their units can be removed."""
    return {f"{name}.conv1": block.conv1 for name, block in blocks(model).items() if not block.dropped}


def _torch_pruned(model: ResNet, importance: str, ratios: Real | Mapping[str, Real]) -> ResNet:
    """One step of Torch-Pruning, with a ratio for each layer or one for all units."""
    torch_pruning = required("torch_pruning", "peers")
    scores: dict[str, Callable] = {
        "group norm": torch_pruning.importance.GroupMagnitudeImportance,
        "batch-norm scale": torch_pruning.importance.BNScaleImportance,
        "geometric median": torch_pruning.importance.FPGMImportance,
    }
    network = copy.deepcopy(model).cpu()
    inside = list(_inside(network).values())
    by_layer = isinstance(ratios, Mapping)
    pruner = torch_pruning.pruner.BasePruner(
        network,
        torch.zeros(1, 3, 32, 32),
        scores[importance](),
        pruning_ratio=0.0 if by_layer else ratios,
        pruning_ratio_dict={network.get_submodule(name): ratio for name, ratio in ratios.items()} if by_layer else None,
        global_pruning=not by_layer,
        max_pruning_ratio=1.0 if by_layer else 15 / 16,  # ranked together, all units of a layer could be removed
        ignored_layers=[layer for layer in weighted_layers(network).values() if layer not in inside],
    )
    pruner.step()
    widths = model.config["inner_widths"] | {name: conv.out_channels for name, conv in _inside(network).items()}  # 0 for dropped blocks
    small = with_tensors(model.config | {"inner_widths": widths}, network.state_dict())
    return small.to(next(model.parameters()).device, memory_format=torch.channels_last).train(model.training)
