"""Smaller networks under a budget or by a plan, repaired part by part without labels."""

from .allocation import by_sensitivity, layer_errors, uniform_inside_blocks
from .by_plan import REPAIRS, SELECTIONS, compress_by_plan, rescale_like
from .compress import before_after, compress
from .plan_cost import cost_of_plan
from .streams import fold
from .timings import part_timings

__all__ = [
    "REPAIRS",
    "SELECTIONS",
    "before_after",
    "by_sensitivity",
    "compress",
    "compress_by_plan",
    "cost_of_plan",
    "fold",
    "layer_errors",
    "part_timings",
    "rescale_like",
    "uniform_inside_blocks",
]
