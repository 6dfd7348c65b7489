"""Kinds of arguments, for annotations. Every call of every function of this package is checked against them: see `__init__`."""

import math
from typing import Annotated

import numpy as np
from beartype.vale import Is, IsInstance

# Numbers come out of tables as NumPy's; True is an int to Python, and a slip of the pen here.
Integer = Annotated[int | np.integer, ~IsInstance[bool]]
Real = Annotated[float | np.integer | np.floating, ~IsInstance[bool]]
Natural = Annotated[Integer, Is[lambda number: number >= 0]]
Count = Annotated[Integer, Is[lambda number: number >= 1]]
Seed = Annotated[Integer, Is[lambda number: 0 <= number < 2**32]]
PositiveReal = Annotated[Real, Is[lambda number: 0 < number < math.inf]]


class ArgumentError(TypeError, ValueError):
    """An argument that is not of the kind that its annotation names; the message names function, parameter and value, too."""
