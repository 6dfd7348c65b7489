"""What others do, to compare with: weights by magnitude, units by norm, Torch-Pruning's own pruners, and Neuron Merging.

Weight pruning leaves a network of the same shapes with zeros in it; what is structured comes out really smaller. *Units* are the channels
inside the blocks, between their two convolutions, which is where this network can lose channels: what adds to the residual stream must
have all of its channels. A plan (see `plans`) names first convolutions of blocks and says how many of their channels stay.
"""

import copy
import importlib.util
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from . import cost
from .allocation import check_budget
from .compaction import compact, expanded
from .model import ResNet, affine, batch_norms, blocks, convolutions
from .plans import Plan, check_plan

WEIGHT_CRITERIA = ("per layer", "global", "random")
UNIT_CRITERIA = ("L1 norm", "L2 norm", "geometric median", "random")
IMPORTANCES = ("group norm", "batch-norm scale", "geometric median")
HAS_TORCH_PRUNING = importlib.util.find_spec("torch_pruning") is not None


def prune_weights(model: nn.Module, sparsity: float, criterion: str = "global", *, seed: int = 0) -> nn.Module:
    """A copy in which a share of the weights of all convolutions and linear layers is zero (`torch.nn.utils.prune`).

    Fine-tuning keeps the zeros under `finetuning.masked`.

    Parameters
    ----------
    sparsity : share of the weights, in [0, 1)
    criterion : which ones. "per layer": the smallest of each layer, the same share in all; "global": the smallest of the network (Han et
        al. 2015); "random": the same share of each layer by chance
    seed : of chance

    Raises
    ------
    ValueError : a sparsity outside [0, 1), an unknown criterion
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity!r}, expected a number in [0, 1)")
    if criterion not in WEIGHT_CRITERIA:
        raise ValueError(f"criterion is {criterion!r}, expected one of {', '.join(WEIGHT_CRITERIA)}")
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # torch ranks weights as one vector, which is a view
    layers = [(module, "weight") for module in weighted_layers(model).values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if criterion == "global":
            prune.global_unstructured(layers, prune.L1Unstructured, amount=float(sparsity))
        for layer in layers:
            if criterion == "per layer":
                prune.l1_unstructured(*layer, amount=float(sparsity))
            elif criterion == "random":
                prune.random_unstructured(*layer, amount=float(sparsity))
            prune.remove(*layer)
    return model


def weighted_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The convolutions and linear layers by name, front to back."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def sparsity_of(model: nn.Module) -> float:
    """Share of zeros among the weights of convolutions and linear layers."""
    weights = [layer.weight.detach() for layer in weighted_layers(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def prune_units(model: ResNet, plan: Plan, criterion: str = "L2 norm", *, seed: int = 0) -> ResNet:
    """A compact network that lacks the units with the lowest scores, without compensation for what they did.

    Parameters
    ----------
    plan : how many channels stay, for first convolutions of blocks
    criterion : "L1 norm" (Li et al., *Pruning Filters for Efficient ConvNets*, ICLR 2017) or "L2 norm" of a filter; "geometric median":
        filters that lie nearest to all others of their layer go first (He et al., *FPGM*, CVPR 2019); "random"
    seed : of chance

    Raises
    ------
    ValueError : an unknown criterion, a plan for other layers
    """
    return compact(mask_units(model, plan, criterion, seed=seed))


def mask_units(model: ResNet, plan: Plan, criterion: str = "L2 norm", *, seed: int = 0) -> ResNet:
    """What `prune_units` makes smaller: a copy of the same shapes, in which the channels that go are zero on any input."""
    model = expanded(model)
    for name, kept in kept_units(model, plan, criterion, seed=seed).items():
        _mask(model, name, kept)
    return model


def kept_units(model: nn.Module, plan: Plan, criterion: str = "L2 norm", *, seed: int = 0) -> dict[str, Tensor]:
    """For each layer of the plan, which of its channels stay: sorted numbers (n_kept,). See `prune_units`."""
    if criterion not in UNIT_CRITERIA:
        raise ValueError(f"criterion is {criterion!r}, expected one of {', '.join(UNIT_CRITERIA)}")
    _check_inside_blocks(model, plan)
    convs, kept = convolutions(model), {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, n_kept in plan.items():
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


def merge_neurons(model: ResNet, plan: Plan, criterion: str = "L1 norm", *, threshold: float = 0.1, balance: float = 0.85) -> ResNet:
    """Neuron Merging (Kim et al., NeurIPS 2020), without data: each unit that goes is added to the most similar one that stays.

    If the filter i is s times the filter j, then batch norm makes of it S times the channel j, plus B, and ReLU keeps S where it is
    positive: so the slice of ``conv2`` that reads i, times S, is added to that of j. The most similar channel is that with the least
    balance · (cosine distance of the filters) + (1 - balance) · (|B| / S, scaled to [0, 1] over the channels that stay).

    Parameters
    ----------
    plan, criterion : which units stay, see `prune_units`
    threshold : of the filters' cosine similarity, below which a unit goes without being merged
    balance : λ in the paper; 0.85 and the threshold are those of its ResNet on CIFAR-10

    Raises
    ------
    ValueError : an unknown criterion, a plan for other layers, a balance outside [0, 1]
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance is {balance!r}, expected a number in [0, 1]")
    model = expanded(model)
    for name, kept in kept_units(model, plan, criterion).items():
        block = blocks(model)[name.removesuffix(".conv1")]
        factors = _factors_of_neurons(block.conv1, block.bn1, kept, threshold, balance)
        with torch.no_grad():
            merged = torch.einsum("oihw,ik->okhw", block.conv2.weight.double().cpu(), factors)
            block.conv2.weight[:, kept] = merged.to(block.conv2.weight)
        _mask(model, name, kept)
    return compact(model)


def _factors_of_neurons(conv: nn.Conv2d, norm: nn.BatchNorm2d, kept: Tensor, threshold: float, balance: float) -> Tensor:
    """What each channel is of those that stay: float64 (N, n_kept), with at most one entry in each row."""
    filters = conv.weight.detach().double().cpu().flatten(1)
    lengths = filters.norm(dim=1)
    directions = filters / lengths.clamp(min=1e-12).unsqueeze(1)
    similarity = directions @ directions[kept].T
    # y_i = s·y_j turns batch norm's factor·y + shift into S·z + B, for z = factor_j·y_j + shift_j.
    factor, shift = affine(norm)
    ratio = (lengths.unsqueeze(1) / lengths[kept].clamp(min=1e-12)) * (factor.unsqueeze(1) / factor[kept])
    offset = (shift.unsqueeze(1) - ratio * shift[kept]).abs() / ratio
    usable = (ratio > 0) & ratio.isfinite()
    lowest = torch.where(usable, offset, torch.inf).amin(1, keepdim=True)
    highest = torch.where(usable, offset, -torch.inf).amax(1, keepdim=True)
    scaled = (offset - lowest) / (highest - lowest).clamp(min=1e-12)
    score = torch.where(usable, balance * (1 - similarity) + (1 - balance) * scaled, torch.inf)
    nearest = score.argmin(1)
    every = torch.arange(len(filters))
    merged = usable[every, nearest] & (similarity[every, nearest] >= threshold)
    factors = torch.zeros(len(filters), len(kept), dtype=torch.double)
    factors[every, nearest] = torch.where(merged, ratio[every, nearest], 0.0)
    factors[kept] = torch.eye(len(kept), dtype=torch.double)
    return factors


def prune_by_torch_pruning(model: ResNet, importance: str = "group norm", *, plan: Plan | None = None, macs: float | None = None) -> ResNet:
    """A compact network from Torch-Pruning (Fang et al., *DepGraph*, CVPR 2023), in one step, without its sparse training.

    Parameters
    ----------
    importance : its score of a unit, over all tensors that hold the unit: "group norm"; "batch-norm scale" (Liu et al., *Network
        Slimming*, ICCV 2017); "geometric median" (*FPGM*)
    plan : how many channels stay, for first convolutions of blocks
    macs : or a budget, as a share of the model's MACs: then it ranks the units of all layers together

    Raises
    ------
    ImportError : torch_pruning is not installed
    ValueError : an unknown importance, not exactly one of `plan` and `macs`, a budget that it cannot meet
    """
    if importance not in IMPORTANCES:
        raise ValueError(f"importance is {importance!r}, expected one of {', '.join(IMPORTANCES)}")
    if (plan is None) == (macs is None):
        raise ValueError(f"plan is {plan!r} and macs is {macs!r}, expected exactly one of them")
    if not HAS_TORCH_PRUNING:
        raise ImportError("torch_pruning is not installed, expected it for this method: pip install torch-pruning")
    model = expanded(model)
    if plan is None:
        plan = _plan_of_torch_pruning(model, importance, check_budget(macs, None)[1])
    _check_inside_blocks(model, plan)
    convs = convolutions(model)
    ratios = {name: 1 - (min(n_kept, convs[name].out_channels) + 0.5) / convs[name].out_channels for name, n_kept in plan.items()}
    return _torch_pruned(model, importance, {name: max(ratio, 0.0) for name, ratio in ratios.items()})  # it rounds down what stays


def _plan_of_torch_pruning(model: ResNet, importance: str, share: float) -> dict[str, int]:
    """How many channels stay in each layer when the units of all layers are ranked together.

    Each unit that goes makes the network smaller: the fewest go whose removal fits. What is then left of the budget, less than a unit
    of that layer whose turn it is, goes to single units of others, front to back.
    """
    budget = share * cost.macs(model)
    n_units = sum(block.conv1.out_channels for block in blocks(model).values())

    def plan_without(n_pruned: int) -> dict[str, int]:
        return dict(_torch_pruned(model, importance, (n_pruned - 0.5) / n_units if n_pruned else 0.0).config["inner_widths"])

    def macs(plan: Plan) -> int:
        return cost.of_plan(model, plan, merged=True)[1]

    low, high = 0, n_units - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if macs(plan_without(middle)) <= budget else (middle + 1, high)
    plan = plan_without(low)
    if macs(plan) > budget:
        raise ValueError(f"macs is {share}, expected more: it takes no layer's last unit, and misses this budget")
    for name, n_kept in plan.items():
        if n_kept < convolutions(model)[name].out_channels and macs(larger := plan | {name: n_kept + 1}) <= budget:
            plan = larger
    return plan


def _torch_pruned(model: ResNet, importance: str, ratios: float | Mapping[str, float]) -> ResNet:
    """One step of Torch-Pruning, at ratios by layer, or at one over all units."""
    import torch_pruning

    scores: dict[str, Callable] = {
        "group norm": torch_pruning.importance.GroupMagnitudeImportance,
        "batch-norm scale": torch_pruning.importance.BNScaleImportance,
        "geometric median": torch_pruning.importance.FPGMImportance,
    }
    network = copy.deepcopy(model).cpu()
    inside = [block.conv1 for block in blocks(network).values()]
    by_layer = isinstance(ratios, Mapping)
    pruner = torch_pruning.pruner.BasePruner(
        network,
        torch.zeros(1, 3, 32, 32),
        scores[importance](),
        pruning_ratio=0.0 if by_layer else ratios,
        pruning_ratio_dict={network.get_submodule(name): ratio for name, ratio in ratios.items()} if by_layer else None,
        global_pruning=not by_layer,
        max_pruning_ratio=15 / 16,  # or else it takes all units of a layer
        ignored_layers=[layer for layer in weighted_layers(network).values() if layer not in inside],
    )
    pruner.step()
    widths = {name: conv.out_channels for name, conv in convolutions(network).items() if conv in inside}
    small = ResNet(**model.config | {"inner_widths": widths})
    small.load_state_dict(network.state_dict())
    return small.to(next(model.parameters()).device, memory_format=torch.channels_last).train(model.training)


@torch.no_grad()
def _mask(model: nn.Module, name: str, kept: Tensor) -> None:
    """Make the other channels of a layer zero after its batch norm, whatever comes in."""
    conv, norm = convolutions(model)[name], batch_norms(model)[name]
    gone = torch.ones(conv.out_channels, dtype=torch.bool)
    gone[kept] = False
    for tensor in (conv.weight, norm.weight, norm.bias):
        tensor[gone.to(tensor.device)] = 0.0


def _check_inside_blocks(model: nn.Module, plan: Plan) -> None:
    check_plan(model, plan)
    if others := [name for name in plan if not name.endswith(".conv1")]:
        raise ValueError(f"the plan names {', '.join(others)}, expected first convolutions of blocks, whose channels can go")
