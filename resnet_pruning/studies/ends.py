"""Plans that keep the first and the last layers whole."""

from .. import cost, plans
from ..arguments import Integer, Real
from ..compression.allocation import largest_within
from ..compression.plan_cost import cost_of_plan
from ..model import Network

MEASURES = ("MACs", "distinct filters")


def whole_ends(network: Network, n_first: Integer, n_last: Integer, measure: str, budget: Real) -> dict[str, int]:
    """The first `n_first` and the last `n_last` layers whole, and of all between the largest equal share that the budget allows.

    Parameters
    ----------
    measure : one of `MEASURES`
    budget : share of the network's MACs (see `compression.cost_of_plan`) or filters

    Raises
    ------
    ValueError : an unknown measure; a budget that the ends alone exceed
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}, expected one of {', '.join(MEASURES)}")
    macs = cost.macs_by_layer(network)

    def cost_of(plan: plans.Plan) -> int:
        return cost_of_plan(network, plan, macs=macs)[1] if measure == "MACs" else sum(plan.values())

    def built(share: Real) -> dict[str, int]:
        return plans.first_last_heavy(network, share, 1.0, n_first, n_last)

    return largest_within(built, cost_of, budget * cost_of(built(1.0)))
