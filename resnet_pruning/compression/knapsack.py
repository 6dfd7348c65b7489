"""Choose one option for each part under a budget: the dynamic programme that plans and bits share."""

from collections.abc import Sequence

import numpy as np

from ..arguments import Real


def cheapest(options: Sequence[np.ndarray], budget: Real) -> list[int]:
    """The index of one option per part (rows of cost and error), with the smallest sum of errors whose costs sum to at most `budget`.

    Exact, by dynamic programming over the Pareto-optimal sums, which no other sum beats in both cost and error.

    Raises
    ------
    ValueError : no choice is within the budget
    """
    costs, errors = np.zeros(1), np.zeros(1)
    rest = np.cumsum([0.0, *(part[:, 0].min() for part in reversed(options))])[::-1]  # the least cost of the parts from i on
    trail = []
    for i, part in enumerate(options):
        costs, errors = (np.add.outer(sums, column).ravel() for sums, column in ((costs, part[:, 0]), (errors, part[:, 1])))
        order = np.lexsort((errors, costs))
        order = order[costs[order] <= budget - rest[i + 1] + 1e-9 * abs(budget)]
        if not len(order):
            raise ValueError(f"budget is {budget:g}, expected at least {rest[0]:g}")
        least_before = np.minimum.accumulate(np.concatenate([[np.inf], errors[order][:-1]]))
        order = order[errors[order] < least_before]
        costs, errors = costs[order], errors[order]
        trail.append(order)
    chosen = []
    state = len(costs) - 1  # the costliest of the remaining sums has the least error
    for part, order in zip(reversed(options), reversed(trail), strict=True):
        state, option = divmod(int(order[state]), len(part))
        chosen.append(option)
    return chosen[::-1]
