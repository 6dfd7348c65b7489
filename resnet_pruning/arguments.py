"""Argument types for annotations. Every call to a function of this package is checked against them: see `__init__`."""

import math
from typing import Annotated

import numpy as np
from beartype.vale import Is, IsInstance

# Numbers read from tables are NumPy's. True is an int in Python, but a mistake here.
Integer = Annotated[int | np.integer, ~IsInstance[bool]]
Real = Annotated[float | np.integer | np.floating, ~IsInstance[bool]]
Natural = Annotated[Integer, Is[lambda number: number >= 0]]
Count = Annotated[Integer, Is[lambda number: number >= 1]]
Seed = Annotated[Integer, Is[lambda number: 0 <= number < 2**32]]
PositiveReal = Annotated[Real, Is[lambda number: 0 < number < math.inf]]


class ArgumentError(TypeError, ValueError):
    """An argument that does not match its annotation. The message names the function, the parameter and the value."""
