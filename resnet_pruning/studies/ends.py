"""Plans within a budget in which some layers keep more of their filters: the first and the last ones, or those at borders of stages."""

from collections.abc import Collection

from .. import cost, plans
from ..arguments import Natural, Real
from ..compression.allocation import largest_within
from ..compression.plan_cost import cost_of_plan
from ..model import Network, convolutions

MEASURES = ("MACs", "distinct filters")


def heavy(network: Network, layers: Collection[str], measure: str, budget: Real, share: Real = 1.0) -> dict[str, int]:
    """A plan with a given share of the filters in some layers, and in all others the largest equal share that the budget allows.

    Parameters
    ----------
    layers : names of convolutions, see `end_layers` and `border_layers`
    measure : one of `MEASURES`
    budget : share of the network's MACs (see `compression.cost_of_plan`) or filters
    share : share of the filters of `layers`, in (0, 1]

    Raises
    ------
    ValueError : an unknown measure; layers that do not exist; a share outside (0, 1]; a budget below the cost of the smallest plan
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}, expected one of {', '.join(MEASURES)}")
    if unknown := sorted(set(layers) - set(convolutions(network))):
        raise ValueError(f"layers has {unknown[0]!r}, expected convolutions of the network")
    macs, kept = cost.macs_by_layer(network), plans.uniform_fraction(network, share)

    def cost_of(plan: plans.Plan) -> int:
        return cost_of_plan(network, plan, macs=macs)[1] if measure == "MACs" else sum(plan.values())

    def built(rest: Real) -> dict[str, int]:
        return plans.uniform_fraction(network, rest) | {name: kept[name] for name in layers}

    return largest_within(built, cost_of, budget * cost_of(plans.uniform_fraction(network, 1.0)))


def end_layers(network: Network, n_first: Natural, n_last: Natural) -> list[str]:
    """The names of the first and the last convolutions.

    Raises
    ------
    ValueError : more layers than the network has
    """
    names = list(convolutions(network))
    if n_first + n_last > len(names):
        raise ValueError(f"n_first + n_last is {n_first} + {n_last}, expected at most the number of layers, {len(names)}")
    return names[:n_first] + names[len(names) - n_last :]


def border_layers(network: Network) -> list[str]:
    """The names of the convolutions in the blocks before and after each border between stages."""
    names = [name for name in convolutions(network) if "." in name]
    last = {stage: max(int(name.split(".")[1]) for name in names if name.startswith(stage)) for stage in ("layer1", "layer2")}
    blocks = {f"{stage}.{block}." for stage, block in last.items()} | {"layer2.0.", "layer3.0."}
    return [name for name in names if any(name.startswith(block) for block in blocks)]
