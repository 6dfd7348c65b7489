"""Plans that keep the first and the last layers whole."""

from torch import nn

from .. import cost, plans
from ..model import convolutions

MEASURES = ("MACs", "distinct filters")


def whole_ends(network: nn.Module, n_first: int, n_last: int, measure: str, budget: float) -> dict[str, int]:
    """The first `n_first` and the last `n_last` layers whole, and of all between the largest equal share that the budget allows.

    Parameters
    ----------
    measure : one of `MEASURES`
    budget : share of the network's MACs (see `cost.of_plan`) or filters

    Raises
    ------
    ValueError : an unknown measure; a budget that the ends alone exceed
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}, expected one of {', '.join(MEASURES)}")
    each, fixed = dict.fromkeys(convolutions(network), 1), 0  # what a filter of each layer costs, and what costs the same in all plans
    if measure == "MACs":
        macs = cost.macs_by_layer(network)
        each = {name: macs[name] // conv.out_channels for name, conv in convolutions(network).items()}
        fixed = sum(count for name, count in macs.items() if name not in each)

    def cost_of(plan: plans.Plan) -> int:
        return fixed + sum(each[name] * n_clusters for name, n_clusters in plan.items())

    def built(share: float) -> dict[str, int]:
        return plans.first_last_heavy(network, share, 1.0, n_first, n_last)

    return plans.largest_within(built, cost_of, budget * cost_of(built(1.0)))
